"""Layers of every geometry and rule, with their outputs and gradients by torch.nn and by the reference."""

import copy
import math
import random

import torch
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback import Rule, reference

# The coefficients are large enough for every term to affect the gradient.
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

# Positional and keyword arguments of nn.Conv2d, and the shape of the input without its batch.
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


def conv_layer(case, rule, **options):
    args, window, _ = CONVS[case]
    return pyfeedback.nn.Conv2d(*args, **window, **options, rule=rule)


def conv_input(case, batch=4, **options):
    return torch.randn(batch, *CONVS[case][2], **options)


def plain_twin(layer):
    """The torch.nn layer with the same weight and bias."""
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
    """The input of the convolution after explicit padding, and the padding left to the convolution.

    Symmetric zero padding is left to the convolution, whose adjoint crops it. Any other padding becomes part of the
    input.
    """
    if layer.padding == "valid":
        return x, 0
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    else:
        total = [2 * p for p in layer.padding]
    if layer.padding_mode == "zeros" and not any(t % 2 for t in total):
        return x, tuple(t // 2 for t in total)
    sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]  # F.pad starts with the last dimension
    return F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode), 0


def reference_output(layer, x):
    """Output and regularizer of the layer, computed by pyfeedback.reference."""
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


def output_gradient(y):
    """A gradient for this output, with its shape and dtype."""
    return torch.sin(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).view(y.shape)


def gradients(layer, x, grad_output=None, forward=None):
    """Gradients of the input and of every parameter by name, or None."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = (forward or layer)(x)
    if grad_output is None:
        grad_output = output_gradient(y)
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
    """Equal up to float64 rounding, relative to the largest value."""
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


def random_convolution(number):
    """Shapes of input and weight, whether there is a bias, and the window. 1 to 3 dimensions; half are transposed."""
    draw = random.Random(number)
    spatial, transposed = number % 3 + 1, number % 2 == 1
    while True:
        groups = draw.choice((1, 1, 2, 3))
        c, k = (groups * draw.choice((1, 2, 4)) for _ in range(2))
        taps, stride, dilation, padding = (
            tuple(draw.choice(choices) for _ in range(spatial))
            for choices in ((1, 2, 3), (1, 1, 2, 3), (1, 1, 2), (0, 1, 2))
        )
        extra = tuple(draw.randrange(max(s, d)) if transposed else 0 for s, d in zip(stride, dilation, strict=True))
        size = (draw.choice((1, 2, 3)), c, *(draw.randrange(1, 7) for _ in range(spatial)))
        weight = (c, k // groups, *taps) if transposed else (k, c // groups, *taps)
        window = stride, padding, dilation, transposed, extra, groups
        spans = list(zip(size[2:], taps, stride, padding, dilation, extra, strict=True))
        if transposed:
            fits = all((x - 1) * s - 2 * p + d * (r - 1) + 1 + e > 0 for x, r, s, p, d, e in spans)
        else:
            fits = all(x + 2 * p > d * (r - 1) for x, r, _, p, d, _ in spans)
        if fits:
            return size, weight, (k,) if draw.random() < 0.5 else None, window
