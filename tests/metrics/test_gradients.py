"""The angle between the gradient of a whole model and that of backprop: compared with gradients by hand."""

import math

import pytest
import torch
from small_networks import RULES, convnet, normalized_convnet, regression
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback.metrics import gradient_alignment

BATCH = regression()


def gradients(model):
    """The gradient of each forward parameter on the batch."""
    return torch.autograd.grad(F.mse_loss(model(BATCH[0]), BATCH[1]), list(pyfeedback.forward_parameters(model)))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def degrees(a, b):
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    return math.degrees(math.acos(min(cosine, 1.0)))  # of parallel vectors, it may be rounded to more


@pytest.mark.parametrize("rule", ["fa", "ia", "kp", "usf", "dfa", "pfa"])
def test_the_angle_is_that_of_all_gradients_by_hand(rule):
    plain = convnet().double()
    model = pyfeedback.convert(convnet().double(), rule, init=pyfeedback.Init(seed=0))
    found, true = gradients(model), gradients(plain)
    reading = gradient_alignment(model, BATCH, F.mse_loss)
    assert reading.angle == pytest.approx(degrees(flat(found), flat(true)), abs=1e-6)
    assert reading.norm_ratio == pytest.approx((flat(found).norm() / flat(true).norm()).item())
    names = [name for name, _ in plain.named_parameters()]
    assert list(reading.parameters) == names
    for name, g, t in zip(names, found, true, strict=True):
        if degrees(g, t) > 0.01:
            assert reading.parameters[name] == pytest.approx(degrees(g, t), abs=1e-6)
        else:
            assert reading.parameters[name] < 0.02


def test_backprop_has_no_angle():
    for model in (convnet().double(), pyfeedback.convert(convnet().double(), "bp")):
        reading = gradient_alignment(model, BATCH, F.mse_loss)
        assert reading.angle == pytest.approx(0, abs=1e-5)
        assert reading.norm_ratio == pytest.approx(1)


def test_below_90_degrees_a_small_step_reduces_the_loss_by_the_cosine():
    model = pyfeedback.convert(convnet().double(), "fa", init=pyfeedback.Init(seed=1))
    reading = gradient_alignment(model, BATCH, F.mse_loss)
    found, parameters = gradients(model), list(pyfeedback.forward_parameters(model))
    with pyfeedback.metrics.weight_transport(model):
        true = flat(gradients(model))
    before, rate = F.mse_loss(model(BATCH[0]), BATCH[1]).item(), 1e-6
    with torch.no_grad():
        for p, g in zip(parameters, found, strict=True):
            p.sub_(rate * g)
    change = F.mse_loss(model(BATCH[0]), BATCH[1]).item() - before
    cosine = math.cos(math.radians(reading.angle))
    assert change == pytest.approx(-rate * reading.norm_ratio * true.norm().item() ** 2 * cosine, rel=1e-3)


@pytest.mark.parametrize("reading", [gradient_alignment, pyfeedback.alignment])
def test_without_a_batch_the_loss_runs_the_model(reading):
    model = pyfeedback.convert(convnet().double(), RULES["ia"])
    assert reading(model, loss=lambda: F.mse_loss(model(BATCH[0]), BATCH[1])) == reading(model, BATCH, F.mse_loss)


def test_a_monitor_of_a_model_with_two_inputs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x, y):
            return self.out((self.a(x) + self.b(y)).tanh())

    model = pyfeedback.convert(Sum(), "fa")
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    monitor = pyfeedback.Monitor(model, every=1, loss=lambda: model(x, y).square().mean())
    assert all(0 <= layer.gradient_angle <= 180 for layer in monitor.latest.values())


def test_the_model_is_not_changed():
    model = pyfeedback.convert(normalized_convnet().double(), RULES["ia"])
    model[5].weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    assert "5.weight" not in gradient_alignment(model, BATCH, F.mse_loss).parameters
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_bad_arguments():
    model = pyfeedback.convert(convnet(), "fa")
    with pytest.raises(ValueError, match="loss is None, expected a function"):
        gradient_alignment(model)
    with pytest.raises(TypeError, match=r"loss is 3, expected a function of no argument, without a batch"):
        gradient_alignment(model, loss=3)
    for loss in (F.cross_entropy, torch.nn.CrossEntropyLoss()):
        with pytest.raises(ValueError, match=r"^batch is None, expected a pair \(input, target\), or a loss that can"):
            gradient_alignment(model, loss=loss)
    with pytest.raises(TypeError, match=r"loss returned .*, expected a tensor of one number"):
        gradient_alignment(model, loss=lambda: model(torch.ones(2, 2, 4, 4)))
    with pytest.raises(ValueError, match="model has no forward parameter that requires a gradient"):
        gradient_alignment(model.requires_grad_(False), loss=lambda: model(torch.ones(1, 2, 4, 4)).sum())
