"""Layers: forward bit for bit torch.nn's, backward the reference's, and good citizens of all around them."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pyfeedback
from pyfeedback import Rule, reference

# Coefficients large enough for every term to be seen in the gradient.
RULES = {
    "fa": Rule(name="fa"),
    "wm": Rule(amp=0.3, decay=0.2, center=True, name="wm"),
    "ia": Rule(amp=0.3, null=0.2, decay=0.1, center=True, name="ia"),
    "sa": Rule(self_=0.3, decay=0.2, name="sa"),
    "aa": Rule(amp=0.3, sparse=0.2, name="aa"),
    "kp": Rule(tie=1.0, decay=0.2, name="kp"),
    "oja": Rule(amp=0.3, null=0.3, samples=2, name="oja"),
    "all": Rule(
        decay=0.1,
        amp=0.2,
        null=0.3,
        sparse=0.15,
        self_=0.25,
        tie=0.5,
        samples=0.5,
        reduction="mean",
        name="all",
    ),
}

# Arguments of nn.Conv2d after the channels, and the input's shape without its batch.
CONVS = {
    "3x3": ((4, 6, 3), {}, (4, 7, 6)),
    "padded": ((4, 6, 3), {"padding": 1}, (4, 7, 6)),
    "rectangular": ((4, 6, (2, 3)), {"padding": (1, 2), "stride": (2, 1)}, (4, 7, 6)),
    "strided": ((4, 6, 3), {"padding": 1, "stride": 2}, (4, 8, 7)),
    "dilated": ((4, 6, 3), {"padding": 2, "dilation": 2}, (4, 7, 6)),
    "grouped": ((4, 6, 3), {"padding": 1, "groups": 2}, (4, 7, 6)),
    "depthwise": ((4, 8, 3), {"padding": 1, "groups": 4}, (4, 7, 6)),
    "1x1": ((4, 6, 1), {}, (4, 7, 6)),
    "1x1_strided": ((4, 6, 1), {"stride": 2}, (4, 7, 6)),
    "1x1_padded": ((4, 6, 1), {"padding": 1}, (4, 7, 6)),
    "same": ((4, 6, 3), {"padding": "same"}, (4, 7, 6)),
    "same_even": ((4, 6, (2, 4)), {"padding": "same"}, (4, 7, 6)),
    "same_dilated": ((4, 6, (2, 3)), {"padding": "same", "dilation": (1, 2)}, (4, 7, 6)),
    "valid": ((4, 6, 3), {"padding": "valid"}, (4, 7, 6)),
}
KINDS = ("conv", "linear")
MODES = ("zeros", "reflect", "replicate", "circular")
LINEARS = {"2d": (5, 7), "3d": (5, 4, 7), "4d": (3, 2, 4, 7), "single": (1, 7)}

# torch says this of its own layer, for an even kernel with padding "same".
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


def conv_layer(case, rule, **options):
    args, window, _ = CONVS[case]
    return pyfeedback.nn.Conv2d(*args, **window, **options, rule=rule)


def conv_input(case, batch=4, **options):
    return torch.randn(batch, *CONVS[case][2], **options)


def plain_twin(layer):
    """torch.nn's own layer with the same weight and bias."""
    if isinstance(layer, nn.Linear):
        twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
    else:
        twin = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode,
            dtype=layer.weight.dtype,
        )  # fmt: skip
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "feedback"})
    return twin


def padded_by_hand(layer, x):
    """The input and the padding of the convolution that reads it.

    Zeros that stand evenly on both sides are the convolution's own padding, which its adjoint crops; any other
    is part of the input.
    """
    if layer.padding == "valid":
        return x, 0
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    else:
        total = [2 * p for p in layer.padding]
    if layer.padding_mode == "zeros" and not any(t % 2 for t in total):
        return x, tuple(t // 2 for t in total)
    sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]  # F.pad takes the last dimension first
    return F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode), 0


def reference_output(layer, x):
    """Output and regulariser of the layer by pyfeedback.reference."""
    rule = layer.rule
    if isinstance(layer, nn.Linear):
        positions, arguments = math.prod(x.shape[1:-1]), ()
    else:
        x, padding = padded_by_hand(layer, x)
        arguments = (layer.stride, padding, layer.dilation, layer.groups)
        positions = F.conv2d(x, layer.weight, None, *arguments)[0, 0].numel()
    scale = 1 / positions if rule.reduction == "mean" else 1.0
    samples = math.ceil(rule.samples * len(x)) if isinstance(rule.samples, float) else min(rule.samples, len(x))
    function = reference.linear if isinstance(layer, nn.Linear) else reference.conv2d
    return function(
        x, layer.weight, layer.feedback, layer.bias, *arguments, decay=rule.decay, amp=rule.amp * scale,
        null=rule.null * scale, sparse=rule.sparse * scale, self_=rule.self_, tie=rule.tie,
        center=rule.center, samples=samples,
    )  # fmt: skip


def gradients(layer, x, grad_output=None, forward=None):
    """Gradients of the input and of every parameter, by name; None where there is none."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = (forward or layer)(x)
    if grad_output is None:
        grad_output = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).view(y.shape)
    y.backward(grad_output)
    return {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def reference_gradients(layer, x):
    layer = copy.deepcopy(layer)

    def forward(x):
        y, penalty = reference_output(layer, x)
        if penalty.requires_grad:
            penalty.backward(retain_graph=True)
        return y

    return gradients(layer, x, forward=forward)


def assert_close(actual, expected, tolerance=1e-10):
    """Equal up to rounding in float64, relative to the largest value."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        else:
            error = (actual[name] - value).abs().max()
            assert error <= tolerance * value.abs().max().clamp(min=1e-3), f"{name}: error {error:.3g}"


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is value is None) or torch.equal(actual[name], value), name


def small_layer(kind, rule, **options):
    """A small layer and an input for it."""
    torch.manual_seed(0)
    rule = RULES.get(rule, rule)
    if kind == "conv":
        layer, shape = pyfeedback.nn.Conv2d(3, 5, 3, padding=1, rule=rule, **options), (4, 3, 6, 5)
    else:
        layer, shape = pyfeedback.nn.Linear(6, 5, rule=rule, **options), (4, 6)
    return layer, torch.randn(shape, dtype=layer.weight.dtype)


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
    """Counts the operators that run inside."""

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
    y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape))
    found = {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert_close(found, {name: value if name in live else None for name, value in whole.items()})


@pytest.mark.parametrize("rule", ["fa", "ia"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda y: y.square().sum(), id="curved"),
        pytest.param(lambda y: y.sum(), id="linear"),
    ],
)
def test_double_backward_raises(loss, kind, rule):
    """Backprop's gradient depends on W even under a linear loss: a penalty on it must not be dropped."""
    layer, x = small_layer(kind, rule)
    x = x.clone().requires_grad_()
    y = layer(x)

    def penalised():
        (grad,) = torch.autograd.grad(loss(y), x, create_graph=True)
        (y.sum() + grad.square().sum()).backward()

    with pytest.raises(RuntimeError, match=r"twice|double backward"):
        penalised()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_grad(kind, rule):
    layer, x = small_layer(kind, rule, dtype=torch.float64)
    expected = gradients(layer, x)
    y = layer(x)
    grad_output = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)

    def loss(parameters, x):
        return (torch.func.functional_call(layer, parameters, (x,)) * grad_output).sum()

    by_parameter, by_input = torch.func.grad(loss, argnums=(0, 1))(dict(layer.named_parameters()), x)
    for name, value in expected.items():
        if value is not None:
            assert torch.allclose({"input": by_input, **by_parameter}[name], value, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_vmap(kind):
    layer, x = small_layer(kind, "ia", dtype=torch.float64)
    stack = torch.stack([x, 2 * x, -x])
    expected = torch.stack([layer(part) for part in stack])
    assert torch.allclose(torch.func.vmap(layer)(stack), expected, rtol=1e-12, atol=1e-12)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    parameters = dict(layer.named_parameters())
    stacked = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, stack)
    for i, part in enumerate(stack):
        alone = torch.func.grad(loss)(parameters, part)
        assert all(torch.allclose(stacked[name][i], alone[name], rtol=1e-12, atol=1e-12) for name in parameters)


# Memory format


@pytest.mark.parametrize("case", ["padded", "strided", "grouped", "1x1", "1x1_strided"])
@pytest.mark.parametrize("rule", ["fa", "ia", "aa"])
def test_gradients_keep_channels_last(case, rule):
    torch.manual_seed(5)
    layer = conv_layer(case, RULES[rule], dtype=torch.float64)
    x = conv_input(case, dtype=torch.float64)
    expected = gradients(layer, x)
    layer = layer.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape))
    assert x.grad.stride() == x.stride()
    assert layer.weight.grad.stride() == layer.weight.stride()
    found = {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert_close(found, expected)
    if layer.feedback.grad is not None:
        assert layer.feedback.grad.stride() == layer.feedback.stride() == layer.weight.stride()


# Autocast


def bf16_gradients(layer, x):
    """What autocast does, by hand: everything cast before, every gradient cast back."""
    grads = gradients(copy.deepcopy(layer).bfloat16(), x.bfloat16())
    return {name: None if g is None else g.float() for name, g in grads.items()}


AUTOCAST_INPUTS = {
    "conv": (lambda rule: pyfeedback.nn.Conv2d(4, 8, 3, padding=1, rule=rule), (4, 4, 6, 6)),
    "linear": (lambda rule: pyfeedback.nn.Linear(16, 8, rule=rule), (6, 16)),
    "linear_3d": (lambda rule: pyfeedback.nn.Linear(16, 8, rule=rule), (6, 3, 16)),
}


@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
@pytest.mark.parametrize("rule", ["bp", *RULES])
@pytest.mark.parametrize("kind", AUTOCAST_INPUTS)
def test_autocast(kind, rule, inside):
    torch.manual_seed(6)
    make, shape = AUTOCAST_INPUTS[kind]
    layer = make(RULES.get(rule, rule))
    x = torch.randn(shape).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype is torch.bfloat16
        assert torch.equal(y, plain_twin(layer)(x))
        grad_output = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).view(y.shape)
        if inside:
            y.backward(grad_output)
    if not inside:
        y.backward(grad_output)
    found = {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert {g.dtype for g in found.values() if g is not None} == {torch.float32}
    if rule != "bp":  # torch's own backward is not ours to pin
        assert_same(found, bf16_gradients(layer, x))


# Construction, copies and checkpoints


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_factory_dtype(dtype):
    for layer in (
        pyfeedback.nn.Conv2d(3, 4, 3, dtype=dtype, rule="ia"),
        pyfeedback.nn.Linear(3, 4, dtype=dtype, rule="ia"),
    ):
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert layer.feedback.isfinite().all()


BIG_LAYERS = {
    "conv": lambda **options: pyfeedback.nn.Conv2d(40, 80, 3, rule="ia", **options),
    "linear": lambda **options: pyfeedback.nn.Linear(400, 200, rule="ia", **options),
}


@pytest.mark.parametrize("make", BIG_LAYERS.values(), ids=BIG_LAYERS)
def test_meta_device_then_empty_then_reset(make):
    layer = make(device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert layer.feedback.requires_grad


@pytest.mark.parametrize("rule", ["fa", "ia", "aa"])
@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors_flow_through_both_passes(kind, rule):
    layer, x = small_layer(kind, rule)
    shapes = {name: None if g is None else g.shape for name, g in gradients(layer, x).items()}
    layer, x = layer.to("meta"), x.to("meta").requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(torch.empty_like(y))
    found = {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert {name: None if g is None else g.shape for name, g in found.items()} == shapes


@pytest.mark.parametrize("make", BIG_LAYERS.values(), ids=BIG_LAYERS)
def test_reset_draws_feedback_by_the_law_of_the_weight(make):
    torch.manual_seed(7)
    layer = make()
    bound = layer.weight[0].numel() ** -0.5
    drawn = layer.feedback.detach().clone()
    for values in (drawn, layer.weight.detach()):
        assert values.abs().max() <= bound
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(values.mean()) < 0.02 * bound
    assert abs(pyfeedback.metrics.angle(drawn, layer.weight) - 90) < 3
    layer.reset_parameters()
    assert abs(pyfeedback.metrics.angle(drawn, layer.feedback) - 90) < 3
    assert layer.feedback.detach().std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_weights_are_drawn_as_torch_nn_draws_them():
    """The feedback is drawn after the weight and bias."""
    torch.manual_seed(8)
    layer = pyfeedback.nn.Conv2d(3, 4, 3, rule="ia")
    torch.manual_seed(8)
    assert torch.equal(layer.weight, nn.Conv2d(3, 4, 3).weight)


@pytest.mark.parametrize("rule", ["bp", "fa", "ia"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_apart(kind, duplicate, rule):
    layer, x = small_layer(kind, rule)
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert twin.rule == layer.rule
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in layer.named_parameters()
    ]
    assert_same(gradients(twin, x), gradients(layer, x))
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert not any(torch.equal(p, q) for p, q in zip(twin.parameters(), layer.parameters(), strict=True))


@pytest.mark.parametrize("rule", ["bp", "fa", "ia"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind, rule):
    layer, x = small_layer(kind, rule)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin, _ = small_layer(kind, rule)
    twin.reset_parameters()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert_same(twin.state_dict(), layer.state_dict())
    assert_same(gradients(twin, x), gradients(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_the_plain_layer_loads_and_the_missing_feedback_is_told(kind, caplog):
    layer, _ = small_layer(kind, "ia")
    plain = plain_twin(layer)
    plain.reset_parameters()
    feedback = layer.feedback.detach().clone()
    result = nn.Sequential(layer).load_state_dict(nn.Sequential(plain).state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.feedback, feedback)
    assert "0.feedback" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_without_a_weight_is_refused(kind):
    layer, _ = small_layer(kind, "ia")
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({"bias": layer.bias, "feedback": layer.feedback})


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_loads_back_into_the_plain_layer(kind):
    layer, _ = small_layer(kind, "ia")
    plain = plain_twin(layer)
    plain.reset_parameters()
    result = plain.load_state_dict(layer.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["feedback"])
    assert torch.equal(layer.weight, plain.weight)


def test_extra_repr_is_torch_nn_s_and_the_rule():
    assert repr(pyfeedback.nn.Linear(3, 4, rule="fa")) == "Linear(in_features=3, out_features=4, bias=True, rule=fa())"
    assert repr(pyfeedback.nn.Conv2d(3, 4, 3, padding=1, rule="kp")) == (
        "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), rule=kp(decay=0.002, tie=1.0))"
    )


def test_input_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float32, expected that of input, torch\.float64"):
        pyfeedback.nn.Linear(3, 4)(torch.randn(2, 3, dtype=torch.float64))


# Training


def small_network(rule, dtype=torch.float32):
    torch.manual_seed(9)
    return pyfeedback.convert(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, stride=2), nn.Tanh(), nn.Flatten(),
            nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3),
        ).to(dtype),
        rule,
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["bp", "fa", "wm", "ia", "sa", "aa", "kp"])
def test_training_lowers_the_loss(rule):
    model = small_network(rule)
    x, target = torch.randn(16, 2, 6, 6), torch.randn(16, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("rule", ["bp", *RULES])
def test_activation_checkpoint_gives_equal_gradients(rule, use_reentrant):
    model = small_network(RULES.get(rule, rule))
    x = torch.randn(4, 2, 6, 6)

    def forward(x):
        return checkpoint(model, x, use_reentrant=use_reentrant)

    assert_same(gradients(model, x, forward=forward), gradients(model, x))


@pytest.mark.parametrize("rule", ["wm", "ia", "sa", "aa", "kp"])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_of_two_half_batches(kind, rule):
    """R is a mean over the samples of a backward pass, as the decay is per pass: two passes give it twice.

    The task's own gradients are sums over samples, and with them tie. Uncentred: halves have other means.
    """
    layer, x = small_layer(kind, pyfeedback.rule(RULES[rule], center=False), dtype=torch.float64)
    rule = layer.rule
    y = layer(x)
    grad_output = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
    whole = gradients(layer, x, grad_output)
    layer.zero_grad(set_to_none=True)
    for part, grad in zip(x.chunk(2), grad_output.chunk(2), strict=True):
        layer(part).backward(grad)
    assert torch.allclose(layer.weight.grad, whole["weight"], rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer.bias.grad, whole["bias"], rtol=1e-12, atol=1e-12)
    tied = rule.tie * whole["weight"]
    assert torch.allclose(layer.feedback.grad, 2 * (whole["feedback"] - tied) + tied, rtol=1e-12, atol=1e-12)
