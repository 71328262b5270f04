"""The compiled kernels of depthwise and grouped layers against the paper's regularizers in float64."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import cuda_emulator
import pytest
import torch
from cases import RULES, Conv, conv_tensors, fresh, gradients, largest_error, random_conv

import pyfeedback
from pyfeedback import functional, reference
from pyfeedback.backends import dispatch
from pyfeedback.backends.extension import loading
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Convolution

pytestmark = pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")

# Two units in the last place of the largest element; in float64, the dtype of the oracle, the bound of test_ops.
FLOOR = {torch.float64: 1e-12, torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(FLOOR)


def layer(channels, size, kernel, stride=1, dilation=1, padding=None, multiplier=1, group=1, batch=3, layout=0):
    """A layer whose groups have ``group`` input channels and ``multiplier`` output channels."""
    pair = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(dilation * (k // 2) for k in pair) if padding is None else (padding, padding)
    groups = channels // group
    shape = (batch, channels, *size), (groups * multiplier, group, *pair)
    names = ("contiguous", "channels_last")
    return Conv(*shape, True, (stride, stride), padding, (dilation, dilation), groups, names[layout])


LAYERS = {
    "3x3": layer(8, (7, 9), 3, layout=1),
    "3x3 stride 2": layer(11, (9, 7), 3, stride=2),
    "5x5": layer(17, (6, 11), 5, layout=1),
    "5x5 stride 2": layer(9, (11, 10), 5, stride=2, layout=1),
    "7x7": layer(16, (8, 8), 7),
    "7x7 on a smaller map": layer(24, (5, 3), 7, layout=1),
    "dilated": layer(10, (11, 9), 3, dilation=2),
    "dilated, strided": layer(10, (13, 12), 3, stride=2, dilation=3, layout=1),
    "stride beyond the kernel": layer(9, (10, 8), 2, stride=3, padding=0),
    "uneven kernel": layer(9, (6, 5), (1, 4), layout=1),
    "wide padding": layer(9, (3, 4), 3, padding=5),
    "multiplier 2": layer(9, (7, 6), 3, multiplier=2, layout=1),
    "multiplier 3, stride 2": layer(5, (7, 6), 5, stride=2, multiplier=3),
    "grouped": layer(12, (6, 7), 3, group=4, multiplier=2),
    "grouped, pointwise": layer(20, (5, 6), 1, group=2, multiplier=2, layout=1),
    "one position": layer(33, (3, 3), 3, padding=0, batch=5),
    "a row": layer(16, (1, 40), (1, 3), batch=2, layout=1),
}


def step(op, case, tensors, rule, dtype):
    """The gradients of one step, with the same output gradient in every dtype."""
    output = op(*tensors, *case.window, **rule)
    output, penalty = output if isinstance(output, tuple) else (output, None)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).to(dtype).to(output))
    if penalty is not None and penalty.requires_grad:
        penalty.backward()
    return gradients(tensors)


def assert_as_accurate(case, rule, dtype, device="cpu"):
    """The error of every gradient is at most twice that of plain PyTorch in the same dtype."""
    rounded = [t.detach().to(device) for t in conv_tensors(case, 0, dtype)]
    with pyfeedback.backend("extension"):
        ours = step(functional.fa_conv2d, case, fresh(rounded), rule, dtype)
    plain = step(reference.conv2d, case, fresh(rounded), rule, dtype)
    exact = step(reference.conv2d, case, fresh(rounded, torch.float64), rule, dtype)
    for name, a, b, c in zip(("input", "weight", "feedback", "bias"), ours, plain, exact, strict=True):
        bound = 2 * largest_error([b], [c]) + FLOOR[dtype]
        assert largest_error([a], [c]) <= bound, (name, case, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_every_rule_in_float64(name, rule):
    for samples in (0, 2):
        assert_as_accurate(LAYERS[name], {**RULES[rule], "samples": samples}, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", LAYERS)
def test_every_dtype(name, dtype):
    for rule in ("wm", "ia-centered", "aa", "kp", "everything"):
        assert_as_accurate(LAYERS[name], RULES[rule], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_size_of_a_layer(dtype):
    """Half-normal inputs, as after a ReLU, so that centering matters; more work items than one chunk has."""
    case = layer(72, (28, 28), 3, batch=12, layout=1)
    for rule in ("wm-centered", "ia-centered", "aa"):
        rounded = conv_tensors(case, 0, dtype)
        rounded[0] = rounded[0].detach().relu()
        results = []
        for op, backend, working in (
            (functional.fa_conv2d, "extension", dtype),
            (reference.conv2d, "auto", dtype),
            (reference.conv2d, "auto", torch.float64),
        ):
            with pyfeedback.backend(backend):
                results.append(step(op, case, fresh(rounded, working), RULES[rule], dtype))
        for ours, plain, exact in zip(*results, strict=True):
            assert largest_error([ours], [exact]) <= 2 * largest_error([plain], [exact]) + FLOOR[dtype]


@pytest.mark.parametrize("rule", [{"decay": 0.3, "self_": 0.3}, {"amp": 0.3, "sparse": 0.3}], ids=["sa", "aa"])
def test_equal_coefficients_near_the_weight(rule):
    """B is W but for 1e-5 of it: the gradient is the rule's coefficient times B - W, and loses none of its digits."""
    case = layer(12, (9, 8), 5)
    x, weight, _, _ = (t.detach() for t in conv_tensors(case, 0, torch.float32))
    feedback = weight * (1 + 1e-5 * torch.randn(weight.shape))
    tensors = [x, weight, feedback, None]
    with pyfeedback.backend("extension"):
        ours = step(functional.fa_conv2d, case, fresh(tensors), rule, torch.float32)[2]
    exact = step(reference.conv2d, case, fresh(tensors, torch.float64), rule, torch.float32)[2]
    assert largest_error([ours], [exact]) < 1e-6


@pytest.mark.parametrize("number", [n for n in range(200) if random_conv(n).groups > 1])
def test_random_layers(number):
    case, rule = random_conv(number), dict(RULES[list(RULES)[number % len(RULES)]])
    if number % 4 == 1 and case.input[0] > 1:
        rule["samples"] = case.input[0] - 1
    tensors = conv_tensors(case, number)
    with pyfeedback.backend("extension"):
        ours = step(functional.fa_conv2d, case, fresh(tensors), rule, torch.float64)
    oracle = step(reference.conv2d, case, fresh(tensors), rule, torch.float64)
    assert largest_error(ours, oracle) < 1e-12


def geometry_of(case):
    return Convolution(*case.window[:3], groups=case.groups)


def arguments(case):
    """Tensors of a backward pass: grad_output, input, weight and feedback."""
    x, w, b, _ = (t if t is None else t.detach() for t in conv_tensors(case, 0, torch.float32))
    return torch.randn(geometry_of(case).output_shape(x.shape, w.shape)), x, w, b


def backward(case, grad_output, x, w, b, mask=(True,) * 4):
    """The gradients by the backend "extension", under every term of a rule."""
    rule = Coefficients(**RULES["everything"])
    call = dispatch.plan(geometry_of(case), x, w, rule, mask, False, "extension")
    return call.chosen.backward(call, grad_output, x, w, b, None)


def test_every_mask():
    case = LAYERS["5x5 stride 2"]
    args = arguments(case)
    whole = backward(case, *args)
    for mask in itertools.product((True, False), repeat=4):
        for needed, part, full in zip(mask, backward(case, *args, mask), whole, strict=True):
            assert (part is not None) == needed
            assert not needed or torch.equal(part, full)


@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "grouped"])
def test_the_same_on_any_number_of_threads(name):
    args = arguments(LAYERS[name])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(backward(LAYERS[name], *args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "multiplier 2", "grouped"])
def test_gradients_have_the_layout_of_their_tensors(name):
    args = arguments(LAYERS[name])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid_out = [t.contiguous(memory_format=memory_format) for t in args]
        grads = backward(LAYERS[name], *laid_out)
        for grad, tensor in zip(grads, (laid_out[1], laid_out[2], laid_out[2]), strict=False):
            assert grad.stride() == tensor.stride()


def test_an_output_gradient_may_be_a_view():
    case = LAYERS["3x3"]
    args = arguments(case)
    expanded = torch.ones(()).expand(args[0].shape)
    views = (expanded, args[0].transpose(2, 3).contiguous().transpose(2, 3), args[0][:, :, :, :1].expand_as(args[0]))
    for view in views:
        for a, b in zip(*(backward(case, g, *args[1:]) for g in (view, view.clone())), strict=True):
            assert torch.equal(a, b)


class Op(NamedTuple):
    """A substitute for an op of torch.ops."""

    default: Callable


def test_unsupported_layers_are_composed(monkeypatch):
    def never(*args):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(torch.ops.pyfeedback, "extension_depthwise_backward", Op(never))
    dense, empty = layer(6, (5, 5), 3, group=6), layer(6, (5, 5), 3, batch=0)
    for case in (dense, empty):
        args = arguments(case)
        assert backward(case, *args)[2].shape == case.weight
    args = list(arguments(LAYERS["3x3"]))
    args[1] = args[1].repeat_interleave(2, 3)[..., ::2]
    assert backward(LAYERS["3x3"], *args)[0].shape == args[1].shape


def test_bad_arguments_are_refused_before_anything_is_read():
    op = torch.ops.pyfeedback.extension_depthwise_backward.default
    grad_output, x, w, b = arguments(LAYERS["3x3"])
    geometry, rule = geometry_of(LAYERS["3x3"]), Coefficients(**RULES["everything"])

    def call(**changed):
        given = {"grad_output": grad_output, "input": x, "weight": w, "feedback": b, "mean": None, "response": None}
        given |= {"response_mean": None, "stride": geometry.stride, "padding": geometry.padding}
        given |= {"dilation": geometry.dilation, "groups": geometry.groups}
        given |= {"coefficients": list(rule[:6]), "samples": 3}
        masks = dict.fromkeys(("need_input", "need_weight", "need_feedback", "need_bias"), True)
        return op(**{**given, **masks, **changed})

    assert len(call()) == 4
    for changed in (
        {"grad_output": grad_output[..., 1:]}, {"feedback": b.double()}, {"weight": w[1:]}, {"samples": 0},
        {"samples": 4}, {"groups": 3}, {"stride": (0, 1)}, {"padding": (-1, 0)}, {"dilation": (9, 9)},
        {"coefficients": [1.0]}, {"mean": x}, {"input": x[..., ::2]},
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            call(**changed)


UNREAD = {
    "5x5 stride 2": layer(16, (18, 10), 5, stride=2, padding=0),
    "stride beyond the kernel": layer(2, (6, 5), 2, stride=3, padding=0),
    "dilation beyond the map": layer(2, (5, 7), 2, dilation=4, padding=0),
}


def assert_unread_inputs_have_no_effect(case):
    grad_output, x, *weights = arguments(case)
    ones = torch.ones(case.weight), torch.ones_like(grad_output)
    unread = torch.nn.grad.conv2d_input(x.shape, *ones, *case.window) == 0
    assert unread.any()
    expected = backward(case, grad_output, x.masked_fill(unread, 0), *weights)
    for value in (float("inf"), float("nan")):
        found = backward(case, grad_output, x.masked_fill(unread, value), *weights)
        assert all(map(torch.equal, found, expected)), value


@pytest.mark.parametrize("name", UNREAD)
def test_unread_inputs_have_no_effect(name):
    assert_unread_inputs_have_no_effect(UNREAD[name])


# The CUDA kernels in the emulator on the CPU. The generic kernel takes about 10^6 thread switches for a layer, so its
# maps are tiny. The tiled kernels take fewer, so their maps have several tiles, the last ones incomplete, and their
# layers have several blocks of 16 groups.

TILED = {
    "3x3": layer(19, (19, 11), 3, layout=1),
    "3x3 stride 2": layer(19, (21, 18), 3, stride=2, layout=1),
    "5x5": layer(5, (9, 20), 5),
    "5x5 stride 2": layer(5, (20, 17), 5, stride=2),
    "7x7": layer(17, (10, 9), 7, layout=1),
    "7x7 stride 2": layer(6, (17, 19), 7, stride=2, layout=1),
    "3x3 without padding": layer(33, (3, 12), 3, padding=0, layout=1),
    "3x3 stride 2, wide padding": layer(4, (4, 9), 3, stride=2, padding=7),
    "5x5 stride 2, unread inputs": UNREAD["5x5 stride 2"],
    "7x7 on a smaller map": layer(16, (2, 3), 7),
}
SMALL = {
    "3x3": layer(3, (4, 5), 3, layout=1),
    "3x3 dilated, stride 2": layer(2, (5, 4), 3, stride=2, dilation=2),
    "5x5 dilated": layer(2, (6, 5), 5, dilation=2, layout=1),
    "7x7": layer(2, (4, 3), 7),
    "uneven kernel, strided": layer(3, (5, 6), (1, 4), stride=3, layout=1),
    "multiplier 2": layer(3, (4, 4), 3, multiplier=2, layout=1),
    "grouped": layer(4, (3, 4), 3, group=2, multiplier=2),
    "more groups than a warp": layer(35, (2, 2), 3, batch=2, layout=1),
}


@pytest.fixture
def on_cuda_emulator(monkeypatch):
    """The backward pass with the CUDA kernel, run by the emulator."""
    monkeypatch.setattr(
        torch.ops.pyfeedback, "extension_depthwise_backward", Op(cuda_emulator.extension_depthwise_backward)
    )
    compiled = dispatch._LAYER_BACKENDS["extension"]._replace(reads_response=lambda rule, device_type: rule.null != 0)
    monkeypatch.setitem(dispatch._LAYER_BACKENDS, "extension", compiled)
    dispatch.set_backend("auto")  # forgets what was chosen before
    yield
    monkeypatch.undo()
    dispatch.set_backend("auto")


@pytest.mark.long
@pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", SMALL)
def test_the_cuda_kernel(on_cuda_emulator, name, dtype):
    for rule in ("wm", "ia-centered", "aa", "kp", "everything") if dtype is DTYPES[0] else ("kp", "everything"):
        assert_as_accurate(SMALL[name], {**RULES[rule], "samples": SMALL[name].input[0] - 1}, dtype)


@pytest.mark.slow
@pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", TILED)
def test_the_cuda_kernels_by_tiles(on_cuda_emulator, name):
    for rule in ("wm", "ia-centered", "aa", "kp", "everything"):
        assert_as_accurate(TILED[name], {**RULES[rule], "samples": 2}, torch.float32)
    for dtype in DTYPES[2:]:
        assert_as_accurate(TILED[name], {**RULES["everything"], "samples": 2}, dtype)


@pytest.mark.slow
@pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", UNREAD)
def test_the_cuda_kernels_do_not_multiply_unread_inputs(on_cuda_emulator, name):
    assert_unread_inputs_have_no_effect(UNREAD[name])


@pytest.mark.slow
@pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "case", [*TILED.values(), SMALL["grouped"]], ids=[*(f"{name}, tiles" for name in TILED), "grouped"]
)
def test_the_cuda_kernels_in_any_order(on_cuda_emulator, case):
    args = arguments(case)
    results = []
    for order in cuda_emulator.ORDERS:
        with cuda_emulator.order(order):
            results.append(backward(case, *args))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not loading.has_cuda(), reason="the CUDA library is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", LAYERS)
def test_the_cuda_kernel_on_a_device(name, dtype):
    for rule in ("ia-centered", "aa", "everything"):
        assert_as_accurate(LAYERS[name], RULES[rule], dtype, device="cuda")


def columns(x, kernel, places):
    """[n, channels, taps, positions] of x. ``places(r, s)`` maps positions to indices into x, or a negative number."""
    rows = [places(r, s) for r, s in itertools.product(*map(range, kernel))]
    flat = torch.nn.functional.pad(x.flatten(2), (0, 1))  # the last element is zero
    return torch.stack([flat[:, :, row] for row in rows], 2)


def places(outer, inner, window, r, s):
    """For each output position, the index of the input element under the tap (r, s), or -1."""
    axes = [
        torch.arange(o) * stride + tap * dilation - padding
        for o, tap, stride, padding, dilation in zip(outer, (r, s), *window[:3], strict=True)
    ]
    inside = [(a >= 0) & (a < size) for a, size in zip(axes, inner, strict=True)]
    return torch.where(inside[0][:, None] & inside[1], axes[0][:, None] * inner[1] + axes[1], -1).flatten()


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("name", LAYERS)
def test_two_gram_matrices_express_every_rule(name, center):
    """docs/depthwise.md: the gradient is (sparse B - amp W) G + null H B, with both Gram matrices by definition."""
    case, rule = LAYERS[name], {"amp": 0.4, "null": 0.5, "sparse": 0.6, "center": center}
    x, w, b, _ = conv_tensors(case, 0)
    reference.conv2d(x, w, b, None, *case.window, **rule)[1].backward()
    (n, _, *size), (k, i, *kernel), groups = case.input, case.weight, case.groups
    x, w, exact, b = x.detach(), w.detach(), b.grad, b.detach()
    x = x - x.mean(0) if center else x
    y = torch.conv2d(x, w, None, *case.window)

    def under(r, s):
        return places(y.shape[2:], size, case.window, r, s)

    def over(r, s):  # the inverse map
        found = torch.full((size[0] * size[1] + 1,), -1)
        found[under(r, s)] = torch.arange(y[0, 0].numel())
        return found[:-1]

    g_columns, h_columns = (columns(t, kernel, f).reshape(n, groups, -1, m) for t, f, m in (
        (x, under, y[0, 0].numel()), (y, over, x[0, 0].numel())))  # fmt: skip
    g, h = (torch.einsum("ngap,ngbp->gab", c, c) / n for c in (g_columns, h_columns))
    by_input = (rule["sparse"] * b - rule["amp"] * w).reshape(groups, k // groups, -1) @ g
    by_tap = b.reshape(groups, k // groups, i, -1).transpose(2, 3).reshape(groups, -1, i)
    spread = (h @ by_tap).reshape(groups, k // groups, -1, i).transpose(2, 3)
    moments = by_input.reshape(b.shape) + rule["null"] * spread.reshape(b.shape)
    assert largest_error([moments], [exact]) < 1e-12
