"""Alignment metrics: compared with numpy and gradients by hand; the model is not changed."""

import math

import numpy
import pytest
import torch
from small_networks import convnet, regression
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback.metrics import angle


def angle_by_numpy(a, b):
    a, b = (numpy.asarray(t.detach().double()).ravel() for t in (a, b))
    return numpy.degrees(numpy.arccos(numpy.clip(a @ b / (numpy.linalg.norm(a) * numpy.linalg.norm(b)), -1, 1)))


def network(rule="fa", dtype=torch.float64):
    return pyfeedback.convert(convnet(), rule).to(dtype)


def set_feedback(model, function):
    with torch.no_grad():
        for _, layer in pyfeedback.feedback_layers(model):
            layer.feedback.copy_(function(layer.weight))
    return model


# Angle and norm ratio


@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 2, 5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_angle_is_numpy_s(shape, dtype):
    torch.manual_seed(2)
    a, b = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    assert angle(a, b) == pytest.approx(angle_by_numpy(a, b), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_angle_of_copies_and_opposites_is_never_nan(seed):
    """The cosine is rounded to more than 1 for about a third of the tensors."""
    a = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    assert angle(a, 3 * a) == pytest.approx(0, abs=1e-5)
    assert angle(a, -a) == pytest.approx(180, abs=1e-5)


def test_angle_of_orthogonal_tensors():
    assert angle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])) == 90


@pytest.mark.parametrize("zero", [0, 1], ids=["first", "second"])
def test_angle_with_zero_is_nan(zero):
    pair = [torch.ones(3), torch.ones(3)]
    pair[zero] = torch.zeros(3)
    assert math.isnan(angle(*pair))


def test_alignment_of_weights():
    model = network()
    with torch.no_grad():
        model[0].feedback.copy_(2 * model[0].weight)
        model[3].feedback.copy_(-0.5 * model[3].weight)
    found = pyfeedback.alignment(model)
    assert list(found) == ["0", "3", "5"]
    assert found["0"].angle == pytest.approx(0, abs=1e-5)
    assert found["0"].norm_ratio == pytest.approx(2)
    assert found["3"].angle == pytest.approx(180, abs=1e-5)
    assert found["3"].norm_ratio == pytest.approx(0.5)
    assert found["5"].angle == pytest.approx(angle_by_numpy(model[5].weight, model[5].feedback))
    assert {(a.projection_angle, a.gradient_angle) for a in found.values()} == {(None, None)}


@pytest.mark.parametrize("backend", ["composite", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_backend_finds_the_same_alignment(backend, dtype):
    model = network(dtype=dtype)
    model[0].to(memory_format=torch.channels_last)
    with pyfeedback.backend(backend):
        found = pyfeedback.alignment(model)
    for name, layer in pyfeedback.feedback_layers(model):
        assert found[name].angle == pytest.approx(angle_by_numpy(layer.weight, layer.feedback))
        ratio = layer.feedback.detach().double().norm() / layer.weight.detach().double().norm()
        assert found[name].norm_ratio == pytest.approx(ratio.item())


def test_alignment_with_an_infinite_weight_is_nan():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.inf
    assert math.isnan(pyfeedback.alignment(model)["0"].angle)


def test_alignment_with_a_zero_weight_is_nan():
    model = network()
    nn.init.zeros_(model[0].weight)
    found = pyfeedback.alignment(model)["0"]
    assert math.isnan(found.angle)
    assert math.isnan(found.norm_ratio)


def test_a_model_without_feedback_has_no_alignment():
    assert pyfeedback.alignment(nn.Linear(2, 3)) == {}
    assert pyfeedback.alignment(network("bp"), regression(), F.mse_loss) == {}


def test_a_batch_requires_a_loss():
    with pytest.raises(ValueError, match="loss is None with a batch"):
        pyfeedback.alignment(network(), regression())


# Projection and gradient angles


@pytest.mark.parametrize("rule", ["fa", "ia"])
def test_angles_are_zero_where_feedback_is_weight(rule):
    model = set_feedback(network(rule), lambda weight: weight)
    for found in pyfeedback.alignment(model, regression(), F.mse_loss).values():
        assert found.projection_angle == pytest.approx(0, abs=1e-4)
        assert found.gradient_angle == pytest.approx(0, abs=1e-4)


def test_negated_feedback_turns_every_second_gradient():
    model = set_feedback(network(), torch.neg)
    found = pyfeedback.alignment(model, regression(), F.mse_loss)
    assert [round(a.projection_angle, 3) for a in found.values()] == [180, 180, 180]
    assert [round(a.gradient_angle, 3) for a in found.values()] == [0, 180, 0]


def test_angles_of_a_network_by_hand():
    torch.manual_seed(3)
    options = {"dtype": torch.float64}
    model = nn.Sequential(nn.Linear(7, 5, **options), nn.ReLU(), nn.Linear(5, 3, **options))
    pyfeedback.convert(model, "fa")
    x, target = torch.randn(6, 7, **options), torch.randn(6, 3, **options)

    hidden = F.linear(x, model[0].weight, model[0].bias)
    error = 2 * (F.linear(hidden.relu(), model[2].weight, model[2].bias) - target) / target.numel()
    by_feedback, by_weight = error @ model[2].feedback, error @ model[2].weight
    delta, true_delta = by_feedback * (hidden > 0), by_weight * (hidden > 0)

    found = pyfeedback.alignment(model, (x, target), F.mse_loss)
    assert found["2"].projection_angle == pytest.approx(angle_by_numpy(by_feedback, by_weight))
    assert found["2"].gradient_angle == pytest.approx(0, abs=1e-4)
    assert found["0"].projection_angle == pytest.approx(
        angle_by_numpy(delta @ model[0].feedback, delta @ model[0].weight)
    )
    assert found["0"].gradient_angle == pytest.approx(angle_by_numpy(delta.t() @ x, true_delta.t() @ x))


@pytest.mark.parametrize("rule", ["fa", "ia"])
def test_an_activation_in_place_changes_no_angle(rule):
    """The projection uses the gradient before the activation, which overwrites the output of the layer."""
    found = []
    for inplace in (False, True):
        torch.manual_seed(4)
        model = nn.Sequential(
            nn.Linear(6, 5), nn.ReLU(inplace), nn.Linear(5, 4), nn.ReLU(inplace), nn.Linear(4, 2)
        ).double()
        pyfeedback.convert(model, rule)
        pair = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
        found.append(pyfeedback.alignment(model, pair, F.mse_loss))
    assert found[0] == found[1]


class Twice(nn.Module):
    """A layer called twice in a pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_called_twice_counts_both_calls():
    torch.manual_seed(5)
    model = pyfeedback.convert(Twice(), "fa")
    x, target = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    found = pyfeedback.alignment(model, (x, target), F.mse_loss)
    layer = model.layer
    hidden = torch.tanh(F.linear(x, layer.weight, layer.bias))
    second = 2 * (F.linear(hidden, layer.weight, layer.bias) - target) / target.numel()
    slope = 1 - hidden.square()
    first, true_first = (second @ layer.feedback) * slope, (second @ layer.weight) * slope
    assert list(found) == ["layer"]
    assert found["layer"].projection_angle == pytest.approx(
        angle_by_numpy(
            torch.cat([first @ layer.feedback, second @ layer.feedback]),
            torch.cat([first @ layer.weight, second @ layer.weight]),
        )
    )
    assert found["layer"].gradient_angle == pytest.approx(
        angle_by_numpy(first.t() @ x + second.t() @ hidden, true_first.t() @ x + second.t() @ hidden)
    )


def test_a_shared_module_is_listed_once():
    torch.manual_seed(5)
    layer = nn.Linear(4, 4)
    model = pyfeedback.convert(nn.Sequential(layer, nn.Tanh(), layer), "fa")
    found = pyfeedback.alignment(model, (torch.randn(5, 4), torch.randn(5, 4)), F.mse_loss)
    assert list(found) == ["0"]
    assert 0 < found["0"].projection_angle < 180


class Aside(nn.Module):
    """A layer that is never called, and one whose output is discarded."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.dropped = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        self.dropped(x)
        return self.used(x)


def test_layers_that_the_loss_does_not_reach_are_nan():
    model = pyfeedback.convert(Aside(), "fa")
    found = pyfeedback.alignment(model, (torch.randn(5, 4), torch.randn(5, 3)), F.mse_loss)
    assert found["used"].gradient_angle == pytest.approx(0, abs=1e-2)
    for name in ("unused", "dropped"):
        assert math.isfinite(found[name].angle)
        assert math.isnan(found[name].projection_angle)
        assert math.isnan(found[name].gradient_angle)


def test_frozen_weights_have_a_projection_and_no_gradient():
    model = network()
    expected = pyfeedback.alignment(model, regression(), F.mse_loss)
    model[0].requires_grad_(False)
    model[3].weight.requires_grad_(False)
    found = pyfeedback.alignment(model, regression(), F.mse_loss)
    assert [a.projection_angle for a in found.values()] == [a.projection_angle for a in expected.values()]
    assert math.isnan(found["0"].gradient_angle)
    assert math.isnan(found["3"].gradient_angle)
    assert found["5"] == expected["5"]


def test_a_wholly_frozen_model():
    model = network().requires_grad_(False)
    for found in pyfeedback.alignment(model, regression(), F.mse_loss).values():
        assert math.isfinite(found.projection_angle)
        assert math.isnan(found.gradient_angle)


def test_inside_no_grad():
    model = network()
    with torch.no_grad():
        found = pyfeedback.alignment(model, regression(), F.mse_loss)
    assert found == pyfeedback.alignment(model, regression(), F.mse_loss)


# The model is not changed


class Drifting(nn.Module):
    """A buffer that every forward pass replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x):
        self.level = 0.9 * self.level + x.detach().mean()
        return x


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_model_is_not_changed(train):
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Drifting(), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    pyfeedback.convert(model, "ia").train(train)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    grads = [p.grad for p in model.parameters()]
    grad_values = [g.clone() for g in grads]
    state = {name: (t, t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append("forward"))
    hooks = [(len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    rng = torch.get_rng_state()

    pyfeedback.alignment(
        model, (torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 3)), F.mse_loss
    )

    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == [train] * len(list(model.modules()))
    assert [
        (len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ] == hooks
    assert seen == ["forward", "forward"]
    handle.remove()
    for p, grad, value in zip(model.parameters(), grads, grad_values, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(after) == list(state)
    for name, (tensor, value) in state.items():
        assert after[name] is tensor, name
        assert torch.equal(tensor, value), name


def test_both_passes_see_the_same_dropout():
    """Otherwise the gradient angle would measure the dropout."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.5), nn.Linear(20, 3)).double()
    set_feedback(pyfeedback.convert(model, "fa"), lambda weight: weight)
    pair = torch.randn(6, 20, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    for found in pyfeedback.alignment(model, pair, F.mse_loss).values():
        assert found.gradient_angle == pytest.approx(0, abs=1e-4)


def test_a_failing_model_is_not_changed():
    model = network("ia")
    state = [(name, id(p)) for name, p in model.named_parameters()]

    def broken(output, target):
        raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError):
        pyfeedback.alignment(model, regression(), broken)
    assert [(name, id(p)) for name, p in model.named_parameters()] == state
    assert not any(m._forward_hooks for m in model.modules())
