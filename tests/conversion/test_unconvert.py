"""unconvert: plain torch.nn modules with the trained weights, which run without pyfeedback."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyfeedback

RULES = ("bp", "fa", "wm", "ia", "sa", "aa", "kp")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip


def trained(rule):
    model = pyfeedback.convert(network(), rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(torch.randn(4, 2, 6, 6)), torch.randn(4, 3)).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("rule", RULES)
def test_the_trained_weights_load_strictly_into_the_plain_architecture(rule):
    model = trained(rule)
    pyfeedback.schedules.Schedule(model, decay=pyfeedback.schedules.constant(0.5))
    x = torch.randn(4, 2, 6, 6)
    parameters, expected = dict(model.named_parameters()), model(x)
    assert pyfeedback.unconvert(model) is model
    assert [type(m) for m in model] == [type(m) for m in network()]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert vars(model[0]).keys() == vars(network()[0]).keys()
    assert repr(model) == repr(network())
    assert torch.equal(model(x), expected)
    plain = network().eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), expected)


def test_a_plain_model_and_a_single_layer_unconvert_too():
    model = network()
    names = list(model.state_dict())
    assert list(pyfeedback.unconvert(model).state_dict()) == names
    layer = pyfeedback.nn.Linear(3, 4, rule="ia")
    assert type(pyfeedback.unconvert(layer)) is nn.Linear


def test_sharing_hooks_and_mode_are_kept():
    layer = nn.Linear(4, 4)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(layer, nn.Tanh(), layer).eval()
    pyfeedback.unconvert(pyfeedback.convert(model, "ia"))
    model(torch.randn(2, 4))
    assert calls == [1, 1]
    assert model[0] is model[2]
    assert not model.training


@pytest.mark.parametrize("kind", ["subclass", "parametrized"])
def test_layers_that_cannot_be_unconverted_are_refused_before_any_change(kind):
    class Own(pyfeedback.nn.Linear):
        """A subclass."""

    model = nn.Sequential(pyfeedback.nn.Linear(3, 3), Own(3, 3) if kind == "subclass" else pyfeedback.nn.Linear(3, 3))
    if kind == "parametrized":
        nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(ValueError, match=r"^1 is a (Own|ParametrizedLinear), expected a layer of pyfeedback.nn itself"):
        pyfeedback.unconvert(model)
    assert len(list(pyfeedback.feedback_layers(model))) == 2


@pytest.mark.slow
def test_export_needs_no_pyfeedback(tmp_path):
    """A pickled module and an exported program run in a process that cannot import pyfeedback."""
    model = pyfeedback.unconvert(trained("ia"))
    x = torch.randn(4, 2, 6, 6)
    program = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(model, tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "data.pt")
    script = """
import sys; sys.modules["pyfeedback"] = None
import torch
x, expected = torch.load("data.pt")
assert torch.equal(torch.load("model.pt", weights_only=False)(x), expected)
program = torch.export.load("program.pt2").module()
torch.testing.assert_close(program(x), expected)
assert program(x[:3]).shape == (3, 3)
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
