"""Weights that a forward reads, or has of its own: their products have the gradients of the reference."""

import copy

import layer_cases
import pytest
import torch
import use_cases
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import pyfeedback
from pyfeedback import reference
from pyfeedback.core import uses
from pyfeedback.nn import products

RULES = {name: layer_cases.RULES[name] for name in ("fa", "ia", "wm", "sa", "aa", "kp")}


def converted(name, rule):
    plain, x = use_cases.build(name)
    model, report = pyfeedback.convert(copy.deepcopy(plain), rule, return_report=True)
    assert report.left == {}
    return plain, model, x, dict(pyfeedback.feedback_layers(model))


def with_feedback(plain, layers):
    """The weights of the plain module, with each replaced by its feedback weight."""
    values = {}
    for name, layer in layers.items():
        owner = name.rpartition(".")[0] if name.endswith("_feedback") else name
        key = f"{owner}.{layer.weight_name}" if owner else layer.weight_name
        values[key] = layer.feedback.detach()
    return dict(plain.named_parameters()) | values


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", use_cases.ALL)
def test_the_input_gradient_is_that_of_the_feedback_and_the_others_are_true(name):
    plain, model, x, layers = converted(name, "fa")
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    found, true = model(inputs[0]), plain(inputs[1])
    torch.testing.assert_close(found, true)
    grad = layer_cases.output_gradient(found)
    found.backward(grad), true.backward(grad)
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(key).grad, parameter.grad)
    functional_call(plain, with_feedback(plain, layers), (inputs[2],)).backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[2].grad)
    assert (inputs[0].grad - inputs[1].grad).norm() > 0.1 * inputs[1].grad.norm()
    assert all(layer.called for layer in layers.values())


# Under ia, the rule reads the padded input, as in nn.Conv2d with a padding mode.
PADDED = {("padded", "ia"), ("same", "ia")}
LEARNING = [(n, r) for n in use_cases.PRODUCTS for r in RULES if r != "fa" and (n, r) not in PADDED]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("name", "rule"), LEARNING)
def test_the_gradient_of_the_feedback_is_that_of_the_rule(name, rule):
    plain, model, x, layers = converted(name, RULES[rule])
    y = model(x)
    y.backward(layer_cases.output_gradient(y))
    (layer,) = layers.values()
    ((key, weight),) = [(k, p.detach()) for k, p in plain.named_parameters() if p.dim() > 1]
    without_bias = {k: torch.zeros_like(p) for k, p in plain.named_parameters()}
    factor = 0.5 if name == "addmm" else 1.0  # of the output, not of the weight

    def conv(x, kernel):
        return functional_call(plain, without_bias | {key: kernel}, (x,)) / factor

    def conv_transposed(y, kernel):
        at = torch.zeros_like(samples, requires_grad=True)
        return torch.autograd.grad(conv(at, kernel), at, y, create_graph=True)[0]

    samples = x if x.dim() > 1 else x.unsqueeze(0)
    feedback = layer.feedback.detach().clone().requires_grad_()
    terms = {term: getattr(RULES[rule], term) for term in ("decay", "amp", "null", "sparse", "self_", "center")}
    reference.regularizer(samples, conv(samples, weight), weight, feedback, conv, conv_transposed, **terms).backward()
    expected = feedback.grad + RULES[rule].tie * model.get_parameter(key).grad
    torch.testing.assert_close(layer.feedback.grad, expected)


# Weights that the forward changes before the product


class Standardized(nn.Conv2d):
    """As timm's ScaledStdConv2d."""

    def __init__(self):
        super().__init__(3, 6, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(6, 1, 1, 1) + 0.5)

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=(self.gain * 0.3).view(-1), training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Centered(nn.Module):
    """A linear layer with a standardization of its own, as in BiT."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        var, mean = torch.var_mean(self.kernel, dim=0, keepdim=True)
        return x @ ((self.kernel - mean) / torch.sqrt(var + 1e-5))


class Normalized(nn.Module):
    """A classifier that compares directions: the weight of a layer is read and normalized."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 6, bias=False)

    def forward(self, x):
        return F.linear(x, F.normalize(self.fc.weight))


COMPUTED = {"conv": (Standardized, (4, 3, 5, 5)), "own": (Centered, (4, 3)), "read": (Normalized, (4, 3))}


@pytest.mark.parametrize("rule", ["fa", "sa", "kp", "aa", "frsf"])
@pytest.mark.parametrize("name", COMPUTED)
def test_the_feedback_belongs_to_the_weight_that_is_computed(name, rule):
    make, shape = COMPUTED[name]
    torch.manual_seed(0)
    model = pyfeedback.convert(make().double(), RULES.get(rule, rule))
    ((_, layer),) = pyfeedback.feedback_layers(model)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.backward(layer_cases.output_gradient(y))
    twin = copy.deepcopy(pyfeedback.unconvert(copy.deepcopy(model)))
    x2 = x.detach().clone().requires_grad_()
    with Recorded() as recorded:
        expected = twin(x2)
    torch.testing.assert_close(y, expected)
    expected.backward(layer_cases.output_gradient(y))
    for key, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(key).grad, parameter.grad)
    (weight,) = recorded.weights
    feedback = layer.feedback.detach().clone().requires_grad_()
    if rule == "frsf":
        feedback = torch.copysign(feedback.detach(), weight.detach())
    product = {"conv": lambda x, w: F.conv2d(x, w, None, 1, 1), "own": torch.matmul, "read": F.linear}[name]
    through = x.detach().clone().requires_grad_()
    product(through, feedback.detach()).backward(layer_cases.output_gradient(y))
    torch.testing.assert_close(x.grad, through.grad)
    if rule in ("fa", "frsf"):
        return
    at = x.detach()
    terms = {term: getattr(RULES[rule], term) for term in ("decay", "amp", "sparse", "self_")}
    reference.regularizer(
        at, product(at, weight.detach()), weight.detach(), feedback, product, None, **terms
    ).backward()
    tied = torch.autograd.grad(product(at, weight), weight, layer_cases.output_gradient(y))[0]
    torch.testing.assert_close(layer.feedback.grad, feedback.grad + RULES[rule].tie * tied)


class Recorded(torch.overrides.TorchFunctionMode):
    """The weights of the products inside the block."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d, torch.Tensor.__matmul__, torch.Tensor.matmul):
            self.weights.append(args[1])
        return func(*args, **(kwargs or {}))


def test_a_product_that_is_found_in_a_source_goes_through_the_feedback():
    """The names in core/uses.py are those of nn/products.py; there, the operator @ is a method."""
    names = {function.__name__ for function in products.PRODUCTS}
    assert names - {"__matmul__", "__rmatmul__"} == uses.PRODUCTS
