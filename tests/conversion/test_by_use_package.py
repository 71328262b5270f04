"""Weights that are used without calling a layer, with the metrics, the optimizers and the rules of the package."""

import copy
import math

import layer_cases
import pytest
import torch
import use_cases
from layer_cases import gradients
from torch import nn
from use_cases import SAMPLED as NAMES
from use_cases import Standardized, converted

import pyfeedback


@pytest.mark.parametrize("name", NAMES)
def test_weight_transport_and_alignment(name):
    model, plain, x = converted(name, "fa")
    with pyfeedback.metrics.weight_transport(model):
        found = gradients(model, x)
    for key, value in gradients(plain, x).items():
        torch.testing.assert_close(found[key], value)
    reading = pyfeedback.alignment(model, (x, torch.zeros(())), lambda y, _: y.square().sum())
    assert list(reading) == [key for key, _ in pyfeedback.feedback_layers(model)]
    assert all(math.isfinite(a.angle) and a.gradient_angle < 1e-3 for a in reading.values())  # the last layer
    assert pyfeedback.Monitor(model).latest.keys() == reading.keys()


@pytest.mark.parametrize("optimizer", [pyfeedback.optim.SGD, pyfeedback.optim.AdamW])
@pytest.mark.parametrize("rule", ["sa", "kp", "ia"])
@pytest.mark.parametrize("name", ["swin", "conv1d", "bmm"])
def test_optimizers_step_each_feedback_weight_with_its_weight(name, rule, optimizer):
    """A weight that is used once: the step is that of a linear layer with the same tensors."""
    model, _, x = converted(name, rule)
    before = {key: layer.feedback.detach().clone() for key, layer in pyfeedback.feedback_layers(model)}
    stepper = optimizer(model, lr=0.1)
    assert list(stepper.time_constants()) == list(before)
    model(x).square().sum().backward()
    (layer,) = (layer for _, layer in pyfeedback.feedback_layers(model))
    weight, of_weight = layer.weight.detach().clone(), layer.weight.grad.clone()
    of_feedback = None if layer.feedback.grad is None else layer.feedback.grad.clone()
    stepper.step()
    (old,) = before.values()
    if optimizer is pyfeedback.optim.AdamW:
        assert (layer.feedback - old).abs().max() > 0
        return
    rule = layer.rule
    expected = rule.decay * old - rule.self_ * weight + rule.tie * of_weight if of_feedback is None else of_feedback
    assert (of_feedback is None) == (rule.name != "ia")
    torch.testing.assert_close(layer.feedback.detach(), old - 0.1 * expected)


@pytest.mark.parametrize("rule", ["sa", "kp"])
def test_optimizers_compare_with_the_weight_that_is_computed(rule):
    torch.manual_seed(0)
    model = pyfeedback.convert(Standardized(4, 6, 3).double(), layer_cases.RULES[rule])
    optimizer = pyfeedback.optim.SGD(model, lr=0.1)
    layer = model.weight_feedback
    old = layer.feedback.detach().clone()
    model(torch.randn(2, 4, 7, dtype=torch.float64)).square().sum().backward()
    var, mean = torch.var_mean(model.weight.detach(), dim=(1, 2), keepdim=True)
    if rule == "sa":
        expected = layer.rule.decay * old - layer.rule.self_ * (model.weight.detach() - mean) * (var + 1e-5).rsqrt()
        torch.testing.assert_close(layer.feedback.grad, expected)
    expected = old - 0.1 * layer.feedback.grad
    optimizer.step()
    torch.testing.assert_close(layer.feedback.detach(), expected)


LAYOUTS = {
    "own": lambda w: w.unsqueeze(0),
    "conv1d": lambda w: w.t().unsqueeze(0),
    "matmul": lambda w: w.unsqueeze(0),
    "left": lambda w: w.unsqueeze(0),
    "slices": lambda w: w.unsqueeze(0),
    "einsum": lambda w: w.flatten(1).t().unsqueeze(0),
    "bmm": lambda w: w.mT,
    "batched einsum": lambda w: w.mT,
    "indexed": lambda w: w.mT,
    "padded": lambda w: w.flatten(1).unsqueeze(0),
    "same": lambda w: w.reshape(2, 3, -1),
    "transposed": lambda w: w.flatten(1).t().unsqueeze(0),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYOUTS)
def test_probes_are_inputs_of_the_product(name):
    """The matrices [groups, outputs, inputs] of a weight, and B comes near W."""
    model, _, x = converted(name, pyfeedback.rule("wm-probes", growth=0.0, tau=10.0))
    ((_, layer),) = pyfeedback.feedback_layers(model)
    optimizer = pyfeedback.optim.SGD(model, lr=0.0)
    for _ in range(80):
        model(x)
        optimizer.step()
    expected = LAYOUTS[name](layer.weight)
    matrices = layer.as_matrices(layer.weight)
    assert matrices.shape[-1] == expected.shape[-1]
    torch.testing.assert_close(matrices, expected)
    torch.testing.assert_close(layer.from_matrices(matrices), layer.weight)
    assert layer.positions() > 0
    assert next(iter(pyfeedback.alignment(model).values())).angle < 25


def test_dfa_sends_the_error_to_the_input_of_the_product():
    torch.manual_seed(0)
    model = nn.Sequential(use_cases.Conv1D(), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), use_cases.Conv1D()).double()
    pyfeedback.convert(model, "dfa")
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.sum().backward()
    direct = model.direct_feedback
    projection = direct.projection([("0.weight", 4), ("2", 6), ("4.weight", 4)], 6, model.direct_feedback_seed, y)
    torch.testing.assert_close(x.grad, (torch.ones_like(y) @ projection.t())[:, :4])


class Named(nn.Module):
    """A product with the names of its arguments, as in Bloom."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.baddbmm(torch.zeros(3, 1, 5, dtype=x.dtype), batch1=x, batch2=self.weight, beta=2.0, alpha=0.5)


class Relative(nn.Module):
    """Rows of a table for pairs of positions, as in the attention of SAM."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        rows = torch.arange(2)[:, None] - torch.arange(2)[None, :] + 1
        table = self.table * 1.0
        return torch.einsum("nqc,qkc->nqk", x, table[rows])


class Receiver(nn.Module):
    """Methods whose first argument has another name than self."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 5))

    def forward(module, x):  # noqa: N805
        return module.product(x)

    def product(this, x):  # noqa: N805
        return x @ this.kernel


@pytest.mark.parametrize(("make", "shape"), [(Named, (3, 2, 4)), (Relative, (5, 2, 4)), (Receiver, (3, 4))])
@pytest.mark.parametrize("rule", ["fa", "ia", "kp", "ia-probes"])
def test_products_of_other_libraries(make, shape, rule):
    torch.manual_seed(0)
    plain = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = torch.func.jacrev(plain)(x)
    model = pyfeedback.convert(copy.deepcopy(plain), rule)
    ((_, layer),) = pyfeedback.feedback_layers(model)
    with torch.no_grad():
        layer.feedback.copy_(next(plain.parameters()))
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf)[0], expected.sum(tuple(range(y.dim()))))  # B is W
    optimizer = pyfeedback.optim.SGD(model, lr=0.1, weight_decay=2e-3)
    model(x).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(pyfeedback.status(model)) == 1
