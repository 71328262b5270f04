"""Layers: the forward pass is bit for bit that of torch.nn, and the backward pass is that of the reference."""

import itertools

import pytest
import torch
from layer_cases import (
    CONVS,
    KINDS,
    LINEARS,
    MODES,
    RULES,
    assert_close,
    assert_same,
    conv_input,
    conv_layer,
    gradients,
    output_gradient,
    plain_twin,
    reference_gradients,
    small_layer,
)
from torch.utils._python_dispatch import TorchDispatchMode

import pyfeedback

# torch raises this warning for its own layer too, with an even kernel and padding "same".
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


# Forward


@pytest.mark.parametrize("rule", ["bp", "fa", "ia"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CONVS)
def test_conv_forward_is_torch_nn_bit_for_bit(case, mode, bias, rule):
    torch.manual_seed(1)
    layer = conv_layer(case, rule, bias=bias, padding_mode=mode)
    x = conv_input(case)
    assert torch.equal(layer(x), plain_twin(layer)(x))


@pytest.mark.parametrize("rule", ["bp", "ia"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["padded", "same_even"])
def test_unbatched_conv_forward_is_torch_nn(case, mode, rule):
    torch.manual_seed(1)
    layer = conv_layer(case, rule, padding_mode=mode)
    x = conv_input(case)[0]
    y = layer(x)
    assert y.dim() == 3
    assert torch.equal(y, plain_twin(layer)(x))


@pytest.mark.parametrize("rule", ["bp", "fa", "ia"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [*LINEARS.values(), (7,)], ids=[*LINEARS, "1d"])
def test_linear_forward_is_torch_nn_bit_for_bit(shape, bias, rule):
    torch.manual_seed(1)
    layer = pyfeedback.nn.Linear(7, 5, bias, rule=rule)
    x = torch.randn(shape)
    assert torch.equal(layer(x), plain_twin(layer)(x))


# Backward


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CONVS)
def test_conv_backward_is_the_reference(case, rule, bias):
    torch.manual_seed(2)
    layer = conv_layer(case, RULES[rule], bias=bias, dtype=torch.float64)
    x = conv_input(case, dtype=torch.float64)
    assert_close(gradients(layer, x), reference_gradients(layer, x))


@pytest.mark.parametrize("rule", ["fa", "ia", "aa", "all"])
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("case", ["padded", "rectangular", "same_even", "grouped", "1x1_padded"])
def test_conv_backward_sees_the_padded_input(case, mode, rule):
    torch.manual_seed(2)
    layer = conv_layer(case, RULES[rule], padding_mode=mode, dtype=torch.float64)
    x = conv_input(case, dtype=torch.float64)
    assert_close(gradients(layer, x), reference_gradients(layer, x))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", LINEARS)
def test_linear_backward_is_the_reference(shape, rule, bias):
    torch.manual_seed(2)
    layer = pyfeedback.nn.Linear(7, 5, bias, dtype=torch.float64, rule=RULES[rule])
    x = torch.randn(LINEARS[shape], dtype=torch.float64)
    assert_close(gradients(layer, x), reference_gradients(layer, x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_backward_is_a_batch_of_one(kind, rule):
    torch.manual_seed(2)
    layer, x = small_layer(kind, rule, dtype=torch.float64)
    batched = gradients(layer, x[:1])
    single = gradients(layer, x[0])
    assert single["input"].shape == x[0].shape
    assert_same(single | {"input": single["input"][None]}, batched)


@pytest.mark.parametrize("rule", ["ia", "all"])
def test_padding_same_and_valid_are_their_numbers(rule):
    torch.manual_seed(2)
    x = torch.randn(4, 4, 7, 6, dtype=torch.float64)
    for word, numbers, kernel, dilation in (
        ("same", (2, 1), 3, (2, 1)),
        ("valid", (0, 0), 3, (2, 1)),
        ("same", (0, 2), (1, 5), 1),
    ):
        named = pyfeedback.nn.Conv2d(
            4, 6, kernel, padding=word, dilation=dilation, dtype=torch.float64, rule=RULES[rule]
        )
        numbered = pyfeedback.nn.Conv2d(
            4, 6, kernel, padding=numbers, dilation=dilation, dtype=torch.float64, rule=RULES[rule]
        )
        numbered.load_state_dict(named.state_dict())
        assert_same(gradients(named, x), gradients(numbered, x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CONVS)
def test_conv_with_transport_has_torch_nn_gradients(case, mode):
    torch.manual_seed(3)
    layer = conv_layer(case, "bp", padding_mode=mode)
    x = conv_input(case)
    assert layer.feedback is None
    assert_same(gradients(layer, x), gradients(plain_twin(layer), x))


@pytest.mark.parametrize("shape", LINEARS)
def test_linear_with_transport_has_torch_nn_gradients(shape):
    torch.manual_seed(3)
    layer = pyfeedback.nn.Linear(7, 5, rule="bp")
    x = torch.randn(LINEARS[shape])
    assert_same(gradients(layer, x), gradients(plain_twin(layer), x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_has_zero_gradients(kind, rule):
    layer, x = small_layer(kind, rule)
    grads = gradients(layer, x[:0])
    assert grads["input"].shape == x[:0].shape
    for name, p in layer.named_parameters():
        assert not p.requires_grad or torch.equal(grads[name], torch.zeros_like(p)), name


class Operators(TorchDispatchMode):
    """Records the operators that run in its context."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_fixed_feedback_costs_one_convolution_backward_and_has_no_gradient():
    layer = pyfeedback.nn.Conv2d(3, 5, 3, padding=1, rule="fa")
    y = layer(torch.randn(4, 3, 6, 5, requires_grad=True))
    with Operators() as operators:
        y.backward(torch.ones_like(y))
    heavy = [name for name in operators.names if "convolution" in name or "mm" in name or "matmul" in name]
    assert heavy == ["convolution_backward"]
    assert not layer.feedback.requires_grad
    assert layer.feedback.grad is None


def test_frozen_feedback_costs_what_fixed_feedback_costs():
    counts = []
    for rule in ("fa", "ia"):
        layer = pyfeedback.nn.Conv2d(3, 5, 3, padding=1, rule=rule)
        layer.feedback.requires_grad_(False)
        y = layer(torch.randn(4, 3, 6, 5, requires_grad=True))
        with Operators() as operators:
            y.backward(torch.ones_like(y))
        counts.append(operators.names)
    assert counts[0] == counts[1]


PARTS = ("input", "weight", "feedback", "bias")
SUBSETS = [set(s) for n in (1, 2, 3) for s in itertools.combinations(PARTS, n)]


@pytest.mark.parametrize("live", SUBSETS, ids=["+".join(p for p in PARTS if p in s) for s in SUBSETS])
@pytest.mark.parametrize("rule", ["ia", "aa", "kp", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_need_no_gradient(kind, rule, live):
    torch.manual_seed(4)
    layer, x = small_layer(kind, rule, dtype=torch.float64)
    whole = gradients(layer, x)
    layer.zero_grad(set_to_none=True)
    for name, p in layer.named_parameters():
        p.requires_grad_(name in live)
    x = x.clone().requires_grad_("input" in live)
    y = layer(x)
    y.backward(output_gradient(y))
    found = {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert_close(found, {name: value if name in live else None for name, value in whole.items()})


@pytest.mark.parametrize("rule", ["fa", "ia"])
@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_raises(kind, rule):
    """The true gradient depends on W, so a penalty on it must not be ignored silently."""
    layer, x = small_layer(kind, rule)
    x = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
