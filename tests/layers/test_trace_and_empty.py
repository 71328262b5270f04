"""torch.jit.trace of converted models, and layers without features."""

import pytest
import torch
from torch import nn

import pyfeedback

LEARNING = ["wm", "ia", "aa", "sa", "kp", "oja", "wm-probes", "ia-probes", "aa-probes", "pfa"]
FIXED = ["fa", "usf", "frsf"]

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:Initializing zero-element tensors"
)


def network(rule):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)
    return pyfeedback.convert(nn.Sequential(*layers), rule)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rule", ["ia", "kp", "ia-probes", "pfa", *FIXED])
def test_a_traced_model_has_the_gradients_of_the_model(rule, grad):
    model, x = network(rule), torch.randn(3, 2, 4, 4)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, torch.randn(3, 2, 4, 4))
    found = []
    for called in (model, traced):
        model.zero_grad()
        called(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() >= {"0.weight", "3.weight"}
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("rule", ["dfa", "brsf"])
def test_what_a_trace_cannot_record_is_refused(rule):
    with pytest.raises(RuntimeError, match=f"a layer follows {rule}, expected another rule: torch.jit.trace"):
        torch.jit.trace(network(rule), torch.randn(3, 2, 4, 4))


EMPTY = {
    "linear": (lambda: nn.Linear(0, 5), (2, 0)),
    "linear, from none to none": (lambda: nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 5)), (2, 4, 3)),
    "convolution": (lambda: nn.Conv2d(0, 4, 3), (2, 0, 8, 8)),
}


@pytest.mark.parametrize("rule", [*LEARNING, *FIXED])
@pytest.mark.parametrize("name", EMPTY)
def test_layers_without_features(name, rule):
    make, shape = EMPTY[name]
    model = pyfeedback.convert(nn.Sequential(make()), rule)
    plain = pyfeedback.unconvert(pyfeedback.convert(nn.Sequential(make()), rule))
    bias = [p for n, p in model.named_parameters() if n.endswith("bias")][-1]
    with torch.no_grad():
        for p, q in zip(pyfeedback.forward_parameters(model), plain.parameters(), strict=True):
            q.copy_(p)
    optimizer = pyfeedback.optim.SGD(model, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        plain.zero_grad()
        x = torch.randn(shape)
        for of in (model, plain):
            of(x).square().sum().backward()
        torch.testing.assert_close(bias.grad, list(plain.parameters())[-1].grad)
        optimizer.step()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.1 * p.grad
    torch.testing.assert_close(model(x), plain(x))
    follower = torch.optim.SGD(model.parameters(), lr=0.1)
    pyfeedback.optim.follow(follower, model)
    model(x).sum().backward()
    follower.step()
    pyfeedback.status(model)
