"""Centered rules with a mean much larger than the spread, and float16 statistics at the sizes of real layers."""

import math
from unittest import mock

import pytest
import torch
from cases import fresh, norm_error, percentile
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyfeedback
from pyfeedback import functional, reference
from pyfeedback.backends.composite import centered_factors
from pyfeedback.backends.composite.center import center
from pyfeedback.backends.composite.centered_factors import LARGE

RULES = {
    "wm": {"amp": 0.7},
    "ia": {"amp": 0.6, "null": 0.4},
    "ia, null above amp": {"amp": 0.3, "null": 0.5},
    "oja": {"amp": 0.5, "null": 0.5},
    "null": {"null": 0.5},
    "aa": {"amp": 0.5, "sparse": 0.5},
    "all three": {"amp": 0.4, "null": 0.5, "sparse": 0.6},
}
# Shapes of input and weight, and arguments; a pointwise layer for each algorithm of the data terms.
LAYERS = {
    "linear up": ((12, 20, 8), (16, 8), {}),
    "linear down": ((12, 20, 16), (8, 16), {}),
    "pointwise up": ((8, 8, 6, 6), (16, 8, 1, 1), {}),
    "pointwise down": ((8, 16, 6, 6), (4, 16, 1, 1), {}),
    "3x3": ((8, 6, 7, 7), (8, 6, 3, 3), {"padding": 1}),
    "strided": ((8, 6, 9, 7), (8, 6, 3, 2), {"stride": (2, 3), "padding": (0, 1)}),
    "grouped": ((8, 6, 7, 7), (9, 2, 3, 3), {"padding": 1, "groups": 3}),
    "depthwise": ((8, 8, 9, 9), (8, 1, 5, 5), {"padding": 2, "groups": 8}),
}
MEANS = (0, 1, 30, 1000)
SEEDS = range(20)


def operations(weight):
    """The functions for a layer with this weight: ours, torch's, and the reference."""
    if weight.dim() == 2:
        return functional.fa_linear, torch.nn.functional.linear, reference.linear
    return functional.fa_conv2d, torch.nn.functional.conv2d, reference.conv2d


def centered(x):
    """x minus its mean over the batch, computed in float32 and rounded once."""
    return (x.float() - x.float().mean(0)).to(x.dtype)


def composed(x, w, b, options, amp=0.0, null=0.0, sparse=0.0):
    """The gradient of the data terms with both factors of every product centered, in plain PyTorch."""
    apply = operations(w)[1]
    y, x = centered(apply(x, w, **options)), centered(x)

    def of_feedback(factor, output):
        """wgrad(factor, output)"""
        (grad,) = torch.autograd.grad(apply(factor, kernel, **options), kernel, output)
        return grad.float()

    kernel, total = b.clone().requires_grad_(), 0
    if amp:
        total = total - amp * of_feedback(x, y)
    if null:
        received = x.clone().requires_grad_()
        (z,) = torch.autograd.grad(apply(received, b, **options), received, y)
        total = total + null * of_feedback(z, y)
    if sparse:
        total = total + sparse * of_feedback(x, apply(x, b, **options))
    return (total / len(x)).to(w.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", LAYERS)
def test_error_at_most_four_times_that_of_centering_both_factors(layer, rule, dtype):
    """The order of our sums differs. Centering only one factor would be worse by a factor of mean squared."""
    check_errors(layer, rule, dtype)


def check_errors(layer, rule, dtype):
    """Of every mean, over the seeds."""
    (shape, kernel_shape, options), terms = LAYERS[layer], RULES[rule]
    for mean in MEANS:
        ratios = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            x = (torch.randn(shape) + mean).to(dtype)
            w, b = (torch.randn(kernel_shape).to(dtype) for _ in range(2))
            op, _, exact_op = operations(w)
            feedback = b.clone().requires_grad_()
            op(x, w, feedback, **options, **terms, center=True).float().sum().backward()
            exact = b.double().requires_grad_()
            exact_op(x.double(), w.double(), exact, **options, **terms, center=True)[1].backward()
            plain = norm_error(composed(x, w, b, options, **terms), exact.grad)
            ratios.append(norm_error(feedback.grad, exact.grad) / (plain + torch.finfo(dtype).eps / 4))
        assert percentile(ratios, 95) <= 4, (mean, ratios)


@pytest.mark.parametrize(("layer", "rule"), [("linear down", "ia"), ("strided", "wm"), ("3x3", "all three")])
def test_error_of_the_response_to_a_centered_input(layer, rule, monkeypatch):
    """GPUs compute it where that is faster than centering the response."""
    responses = []
    choice = lambda x, y, weight: responses.append(y) or True  # noqa: E731
    monkeypatch.setattr("pyfeedback.backends.composite.layer.responds_to_centered", choice)
    with pyfeedback.backend("composite"):
        check_errors(layer, rule, torch.float32)
    assert len(responses) == len(MEANS) * len(SEEDS)


@pytest.mark.parametrize(
    ("shape", "kernel_shape", "dtype", "expected"),
    [
        ((8, 3, 32, 32), (64, 3, 7, 7), torch.bfloat16, True),
        ((8, 3, 32, 32), (64, 3, 7, 7), torch.float32, False),
        ((8, 64, 32, 32), (64, 64, 3, 3), torch.bfloat16, False),
    ],
)
def test_which_layers_respond_to_a_centered_input(shape, kernel_shape, dtype, expected):
    for device in ("meta", "cpu"):
        x, w = (torch.empty(s, dtype=dtype, device=device) for s in (shape, kernel_shape))
        on_gpu = device == "meta"
        assert centered_factors.responds_to_centered(x, None, w) == on_gpu
        y = torch.empty(shape[0], kernel_shape[0], *shape[2:], dtype=dtype, device=device)
        assert centered_factors.responds_to_centered(x, y, w) == (on_gpu and expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rule", ["wm", "ia"])
@pytest.mark.parametrize(
    ("shape", "kernel_shape"),
    [((16, 150, 128), (24, 128)), ((8, 128, 18, 18), (24, 128, 1, 1)), ((4, 16, 72, 72), (16, 16, 3, 3))],
    ids=["linear", "pointwise", "3x3"],
)
def test_error_of_a_large_input(shape, kernel_shape, rule, dtype):
    """A large input is not copied if its mean is small; one channel with a large mean centers all channels."""
    assert torch.Size(shape).numel() >= LARGE
    terms, channel = RULES[rule], -1 if len(kernel_shape) == 2 else 1
    for mean in (0.0, 1.0, 2.3, 2.7, 30.0, 1000.0, "one channel"):
        ratios = []
        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.randn(shape)
            if mean == "one channel":
                x.select(channel, 3).add_(1000)
            else:
                x.add_(mean)
            x, w, b = x.to(dtype), *(torch.randn(kernel_shape).to(dtype) for _ in range(2))
            op, _, exact_op = operations(w)
            feedback = b.clone().requires_grad_()
            op(x, w, feedback, **terms, center=True).float().sum().backward()
            exact = b.double().requires_grad_()
            exact_op(x.double(), w.double(), exact, **terms, center=True)[1].backward()
            plain = norm_error(composed(x, w, b, {}, **terms), exact.grad)
            ratios.append(norm_error(feedback.grad, exact.grad) / (plain + torch.finfo(dtype).eps / 4))
        assert max(ratios) <= 4, (mean, ratios)


@pytest.mark.parametrize("rule", ["wm", "ia"])
@pytest.mark.parametrize(
    ("shape", "kernel_shape"),
    [((16, 130, 128), (256, 128)), ((4, 512, 12, 12), (256, 512, 1, 1))],
    ids=["gram of x", "products with y"],
)
def test_error_of_blocks_is_at_most_that_of_copies(shape, kernel_shape, rule):
    """Large inputs of pointwise layers are centered in blocks of positions, which are not copied as a whole."""
    ratios = []
    for mean in (0.7, 30, 1000):
        torch.manual_seed(0)
        x = torch.randn(shape).add_(mean)
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        w, b = (torch.randn(kernel_shape) for _ in range(2))
        op, _, exact_op = operations(w)
        exact = b.double().requires_grad_()
        exact_op(x.double(), w.double(), exact, **RULES[rule], center=True)[1].backward()
        errors = []
        for least in (LARGE, math.inf):
            feedback = b.clone().requires_grad_()
            blocks = mock.Mock(wraps=centered_factors._blocks)
            with mock.patch.multiple(centered_factors, LARGE=least, _blocks=blocks):
                op(x, w, feedback, **RULES[rule], center=True).sum().backward()
            assert blocks.called == (least == LARGE)
            errors.append(norm_error(feedback.grad, exact.grad))
        ratios.append(errors[0] / (errors[1] + torch.finfo(torch.float32).eps / 4))
    assert max(ratios) <= 1.5, ratios


@pytest.mark.parametrize("backend", ["extension", "composite"])
@pytest.mark.parametrize("rule", ["wm", "ia", "aa"])
@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize(
    ("shape", "kernel_shape", "options"),
    [
        ((512, 197, 16), (24, 16), {}),
        ((64, 16, 56, 56), (24, 16, 1, 1), {}),
        ((64, 24, 56, 56), (8, 24, 1, 1), {}),
        ((64, 4, 56, 56), (4, 4, 3, 3), {"padding": (1, 1)}),
        ((64, 8, 56, 56), (8, 1, 5, 5), {"padding": (2, 2), "groups": 8}),
    ],
    ids=["linear", "pointwise up", "pointwise down", "3x3", "depthwise"],
)
def test_float16_statistics_are_finite_at_the_size_of_a_layer(shape, kernel_shape, options, center, rule, backend):
    """The sums over a batch exceed 65504, the largest float16, although the gradient is small."""
    torch.manual_seed(0)
    positions = shape[1] if len(shape) == 3 else shape[2] * shape[3]
    terms = {name: value / (1000 * positions) for name, value in RULES[rule].items()}
    x = torch.randn(shape).add_(1).half()
    fan_in = torch.Size(kernel_shape[1:]).numel()
    w, b = (torch.randn(kernel_shape).mul_(fan_in**-0.5).half() for _ in range(2))
    _, apply, exact_op = operations(w)
    response = apply(x.float(), w.float(), **options).half()
    with pyfeedback.backend(backend):
        name = "fa_linear_backward" if len(kernel_shape) == 2 else "fa_conv2d_backward"
        backward = getattr(torch.ops.pyfeedback, name)
        mask = [False, False, True, False]
        arguments = (response, x, w, b, response)
        found = backward(*arguments, **options, **terms, center=center, output_mask=mask)[2]
    exact = b.double().requires_grad_()
    exact_op(x.double(), w.double(), exact, **options, **terms, center=center)[1].backward()
    assert found.dtype == torch.float16
    assert found.isfinite().all()
    # Half a unit in the last place of float16, and half its smallest number.
    assert (found.double() - exact.grad).norm() <= 2e-3 * exact.grad.norm() + 2**-24 * exact.numel() ** 0.5


@pytest.mark.parametrize("rule", ["wm", "ia", "aa"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_bfloat16_error_after_relu_is_about_that_of_rounding_the_gradient(kernel, rule):
    """The gradient is rounded to bfloat16 at the end, and that dominates. On a CPU without products of bfloat16, the
    error was 6 to 8 times as large with 128 samples, as PyTorch adds up the products of samples in bfloat16."""
    ratios = []
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.randn(128, 16, 6, 6).relu().bfloat16()
        w, b = (torch.randn(16, 16, kernel, kernel).mul_(0.25 / kernel).bfloat16() for _ in range(2))
        feedback = b.clone().requires_grad_()
        functional.fa_conv2d(x, w, feedback, padding=kernel // 2, **RULES[rule], center=True).float().sum().backward()
        exact = b.double().requires_grad_()
        options = {"padding": kernel // 2, **RULES[rule], "center": True}
        reference.conv2d(x.double(), w.double(), exact, **options)[1].backward()
        ratios.append(norm_error(feedback.grad, exact.grad) / norm_error(exact.grad.bfloat16(), exact.grad))
    assert percentile(ratios, 95) <= 2, ratios


def test_information_alignment_takes_steps_under_float16_autocast():
    """A Gram matrix in float16 would be infinite here, and the loss scale would fall until training stops."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten(2))
    pyfeedback.convert(model, pyfeedback.rule("ia", reduction="mean"))
    optimizer = pyfeedback.optim.SGD(model, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(64, 3, 56, 56)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1024.0
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert all(moved)


def test_float16_gradient_is_finite_wherever_float64s_fits():
    """z = convT(y, B) exceeds 65504 here, but the gradient, which is scaled by null, does not."""
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 64, 5, 5) * 30, torch.randn(96, 64, 3, 3), torch.randn(96, 64, 3, 3)
    tensors = fresh([t.half() for t in (x, w, b)])
    functional.fa_conv2d(*tensors, padding=1, amp=1e-6, null=1e-8).sum().backward()
    exact = tensors[2].detach().double().requires_grad_()
    reference.conv2d(*(t.detach().double() for t in tensors[:2]), exact, padding=1, amp=1e-6, null=1e-8)[1].backward()
    assert exact.grad.abs().max() < 65504
    assert tensors[2].grad.isfinite().all()
    assert norm_error(tensors[2].grad, exact.grad) < 2e-3


def test_a_composed_centering_makes_no_wider_copy():
    """Of 16 bits, 6 bytes are moved for each element: read for the mean, read and written for the difference."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                sizes.append(out.numel() * out.itemsize)
            return out

    sizes = []
    x = torch.ones(32, 8, 5, 5, dtype=torch.bfloat16)
    with Sizes():
        center(x, 32)
    assert max(sizes) == x.numel() * x.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_composed_mean_is_of_float32(dtype):
    """A mean of 30 rounded to 16 bits has an error of up to a sixteenth of the spread."""
    x = (torch.randn(64, 50) + 30).to(dtype)
    exact = x.double() - x.double().mean(0)
    with pyfeedback.backend("composite"):
        found = torch.ops.pyfeedback.center(x, 64)
        total = torch.zeros_like(x)
        torch.ops.pyfeedback.add_centered_(total, x, 1.0, 1.0)
    for values in (found, total):
        assert (values.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() / 2
