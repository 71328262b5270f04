"""Random calls of the layer ops: any rule, dtype, layout, window and backend, against the float64 reference."""

import math
import random
from typing import NamedTuple

import torch
from cases import RULES, gradients, laid_out
from torch import Tensor
from torch.nn import functional as F

import pyfeedback
from pyfeedback import functional, reference
from pyfeedback.backends.extension import loading

# As in test_numerics: two units in the last place of the largest element. float64 is the dtype of the oracle.
FLOOR = {torch.float64: 1e-11, torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "mixed")
NAMES = ("grad_input", "grad_weight", "grad_feedback", "grad_bias")
MOST_MACS = 400_000
MORE_DRAWS = 48  # decide about a case whose first draw is off


class Call(NamedTuple):
    """One random call. :func:`tensors_of` draws its tensors."""

    op: str  # linear, conv2d or convolution
    input: tuple[int, ...]
    weight: tuple[int, ...]
    out_channels: int
    made: tuple[int, ...]  # the size of the output map
    bias: bool
    window: tuple  # the arguments after the tensors
    rule: dict
    dtype: torch.dtype
    layout: str
    scale: float  # approximate scale of the input
    mean: float
    needs: tuple[bool, ...]  # whether input, weight, feedback and bias require a gradient
    expanded: bool  # the output gradient has stride 0, as after a sum
    ops: str  # function or dispatcher
    backend: str


def random_call(number: int) -> Call:
    """The call with this number."""
    draw = random.Random(number)
    while True:
        geometry = _linear(draw) if number % 4 == 0 else _convolution(draw, number % 3 + 1)
        call = None if geometry is None else _call(draw, *geometry)
        if call is not None and not is_a_fault_of_torch(call):
            return call


def is_a_fault_of_torch(call: Call) -> bool:
    """Whether torch 2.13 (oneDNN on a CPU) computes this plain layer wrongly, from unwritten memory, or crashes.

    Affected are the weight gradient of a 3-D layer that pads by more than half of its dilated kernel, such as
    ``nn.Conv3d(1, 1, (5, 1, 1), (2, 1, 1), (3, 0, 0))`` on a map of [5, 3, 3], and its forward pass in channels_last;
    the weight gradient of any grouped 3-D layer in bfloat16 and channels_last; and in bfloat16 that of a kernel tap
    which reads only padding. The weight gradient of a 1x1 layer with stride 2 or 3 corrupts the heap; without padding,
    pyfeedback computes it differently (tests/ops/test_ops.py).
    """
    if call.op == "linear":
        return False
    stride, padding, dilation, *_, groups = call.window
    if max(call.weight[2:]) == 1 and max(stride) >= 2:
        return True
    if len(call.weight) == 5:
        if any(2 * p > d * (r - 1) for p, d, r in zip(padding, dilation, call.weight[2:], strict=True)):
            return True
        if groups > 1 and call.dtype is torch.bfloat16 and call.layout in ("channels_last", "mixed"):
            return True
    return call.dtype is torch.bfloat16 and sees_padding_alone(call)


def sees_padding_alone(call: Call) -> bool:
    """Whether some kernel tap reads only padding at every position."""
    stride, padding, dilation, *_ = call.window
    transposed = len(call.window) == 6 and call.window[3]
    map_, laid = call.input[2:], call.made
    if transposed:
        map_, laid = laid, map_
    return any(
        all(not 0 <= s * position - p + d * tap < size for position in range(positions))
        for size, positions, taps, s, p, d in zip(map_, laid, call.weight[2:], stride, padding, dilation, strict=True)
        for tap in range(taps)
    )


def _call(draw: random.Random, op: str, size, weight, out_channels: int, window: tuple, made: tuple) -> Call:
    backends = ("auto", "auto", "composite", "extension") if loading.has_cpu() else ("auto", "composite")
    return Call(
        op, size, weight, out_channels, made,
        bias=draw.random() < 0.5,
        window=window,
        rule=_rule(draw, size[0]),
        dtype=draw.choice(tuple(FLOOR)),
        layout=draw.choice(LAYOUTS),
        scale=draw.choice((1.0, 1.0, 0.125, 8.0)),
        mean=draw.choice((0.0, 0.0, 0.5, 30.0)),
        needs=tuple(draw.random() < 0.85 for _ in range(4)),
        expanded=draw.random() < 0.1,
        ops=draw.choice(("function", "dispatcher")),
        backend=draw.choice(backends),
    )  # fmt: skip


def _linear(draw: random.Random):
    c, k = draw.randrange(1, 40), draw.randrange(1, 40)
    middle = tuple(draw.randrange(1, 6) for _ in range(draw.choice((0, 0, 1, 1, 2, 3))))
    return "linear", (draw.randrange(1, 10), *middle, c), (k, c), k, (), middle


def _convolution(draw: random.Random, spatial: int):
    """None if the kernel is larger than the padded map."""
    transposed = draw.random() < 0.35
    groups = draw.choice((1, 1, 1, 2, 3))
    if draw.random() < 0.2:  # depthwise, with a multiplier
        groups = draw.choice((1, 3, 8, 11, 17))
        c, k = groups, groups * draw.choice((1, 1, 2, 3))
        c, k = (k, c) if transposed else (c, k)
    else:
        c, k = (groups * draw.choice((1, 2, 3, 5, 8, 13)) for _ in range(2))
    pointwise = draw.random() < 0.3
    taps = (1,) * spatial if pointwise else tuple(draw.choice((1, 2, 3, 3, 5)) for _ in range(spatial))
    stride, dilation = (tuple(draw.choice((1, 1, 2, 3)) for _ in range(spatial)) for _ in range(2))
    padding = (0,) * spatial if draw.random() < 0.3 else tuple(draw.randrange(4) for _ in range(spatial))
    extra = tuple(draw.randrange(max(s, d)) if transposed else 0 for s, d in zip(stride, dilation, strict=True))
    size = (draw.randrange(1, 6), c, *(draw.randrange(1, (24, 13, 7)[spatial - 1]) for _ in range(spatial)))
    made = []
    for x, r, s, p, d, e in zip(size[2:], taps, stride, padding, dilation, extra, strict=True):
        reach = d * (r - 1) + 1
        made.append((x - 1) * s - 2 * p + reach + e if transposed else (x + 2 * p - reach) // s + 1)
        if made[-1] < 1 or (not transposed and x + 2 * p < reach):
            return None
    if size[0] * c * k // groups * math.prod(taps) * math.prod(size[2:] if transposed else made) > MOST_MACS:
        return None
    weight = (c, k // groups, *taps) if transposed else (k, c // groups, *taps)
    if spatial == 2 and not transposed and draw.random() < 0.8:
        return "conv2d", size, weight, k, (stride, padding, dilation, groups), tuple(made)
    return "convolution", size, weight, k, (stride, padding, dilation, transposed, extra, groups), tuple(made)


def _rule(draw: random.Random, batch: int) -> dict:
    if draw.random() < 0.5:
        rule = dict(RULES[draw.choice(tuple(RULES))])
    else:
        names = ("decay", "amp", "null", "sparse", "self_", "tie")
        rule = {name: draw.choice((1.0, -0.5, draw.random())) for name in names if draw.random() < 0.45}
        rule["center"] = draw.random() < 0.4
    if draw.random() < 0.4:
        rule["samples"] = draw.randrange(batch + 1)
    return rule


def tensors_of(call: Call, seed: int) -> list[Tensor | None]:
    """Input, weight, feedback and bias, leaves in the layouts of the call, and the output gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    spread = (call.weight[0] * math.prod(call.weight[2:])) ** -0.5
    values = [
        normal(*call.input) * call.scale + call.mean,
        normal(*call.weight) * spread,
        normal(*call.weight) * spread,
    ]
    values.append(normal(call.out_channels) if call.bias else None)
    needs = list(call.needs)
    if not any(need for need, value in zip(needs, values, strict=True) if value is not None):
        needs[1] = True
    return [
        None if v is None else arranged(v.to(call.dtype), call.layout, i).requires_grad_(needs[i])
        for i, v in enumerate(values)
    ]


def arranged(x: Tensor, layout: str, position: int) -> Tensor:
    """Like :func:`cases.laid_out`, for any number of dimensions."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if x.dim() == 5 and (layout == "channels_last" or (layout == "mixed" and position == 0)):
        return x.contiguous(memory_format=torch.channels_last_3d)
    if x.dim() == 0 or (layout in ("channels_last", "mixed") and x.dim() != 4):
        return x
    return laid_out(x, layout, position)


def passed(call: Call, op, tensors: list[Tensor | None], seed: int) -> tuple[Tensor, list[Tensor]]:
    """The output and every gradient; zeros for a missing gradient."""
    result = op(*tensors, *call.window, **call.rule)
    output, penalty = result if isinstance(result, tuple) else (result, None)
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn((1,) if call.expanded else output.shape, generator=generator).to(call.dtype).to(output.dtype)
    if output.requires_grad:
        torch.autograd.backward([output], [grad.expand(output.shape)])
    if penalty is not None and penalty.requires_grad:
        penalty.backward()
    return output.detach(), gradients(tensors)


def copies(call: Call, tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The same values in ``dtype`` and the same layout; contiguous in float64."""
    found = []
    for i, t in enumerate(tensors):
        if t is not None:
            plain = t.detach().to(dtype, copy=True).contiguous()
            plain = plain if dtype is torch.float64 else arranged(plain, call.layout, i)
            t = plain.requires_grad_(t.requires_grad)
        found.append(t)
    return found


def layer(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain layer."""
    if call.op == "linear":
        return F.linear(input, weight, bias)
    return (torch.conv2d if call.op == "conv2d" else torch.convolution)(input, weight, bias, *call.window)


def plain_gradients(call: Call, tensors: list[Tensor | None], seed: int) -> list[Tensor]:
    """The gradients of PyTorch's own kernels in the same dtype.

    The gradient of the feedback is computed by the reference. The others are those of the plain layer with B as its
    weight, since they do not depend on W.
    """
    _, found = passed(call, getattr(reference, call.op), copies(call, tensors, call.dtype), seed)
    input, weight, feedback, bias = copies(call, tensors, call.dtype)
    through = feedback.detach().requires_grad_(weight.requires_grad)

    def at_feedback(input, weight, feedback, bias, *window, **rule):
        return layer(call, input, through, bias)

    passed(call, at_feedback, [input, weight, feedback, bias], seed)
    own = gradients([input, through, None, bias])
    return [own[0], own[1], found[2], *own[2:]]


def compare(call: Call, seed: int) -> list[tuple[str, float, float, float]]:
    """For each gradient of one draw: name, largest error, largest error of plain PyTorch, and largest value."""
    tensors = tensors_of(call, seed)
    ops = functional if call.ops == "function" else torch.ops.pyfeedback
    with pyfeedback.backend(call.backend):
        output, ours = passed(call, getattr(ops, f"fa_{call.op}"), tensors, seed)
    input, weight, _, bias = tensors
    with torch.no_grad():  # with grad, F.linear uses another product for a strided input
        assert torch.equal(output, layer(call, input, weight, bias)), f"the output is not torch's: {call}"
    for t, grad in zip((t for t in tensors if t is not None), ours, strict=True):
        assert grad.shape == t.shape
        assert grad.dtype == t.dtype
    _, exact = passed(call, getattr(reference, call.op), copies(call, tensors, torch.float64), seed)
    rows = []
    for name, a, b, c in zip(NAMES, ours, plain_gradients(call, tensors, seed), exact, strict=False):
        largest = c.abs().max().item()
        if largest >= torch.finfo(call.dtype).max or not output.isfinite().all():
            continue  # not representable in the dtype
        assert a.isfinite().all() or (name != "grad_feedback" and not b.isfinite().all()), (
            f"{name} is not finite: {call}"
        )
        errors = [(v.double() - c).abs().nan_to_num(nan=math.inf).max().item() for v in (a, b)]
        rows.append((name, *errors, largest))
    return rows


def check(number: int) -> None:
    """Raise AssertionError if the call with this number is wrong.

    The error of a gradient may be twice that of plain PyTorch in the same dtype, plus a floor. The ratio of a single
    draw varies, so after a draw that fails, the sums over many draws decide.
    """
    call = random_call(number)
    suspects = {name for name, *row in compare(call, number) if is_off(call, *row)}
    if not suspects:
        return
    sums = {name: [0.0, 0.0, 0.0] for name in suspects}
    for more in range(1, MORE_DRAWS + 1):
        for name, *row in compare(call, number + 1_000_003 * more):
            if name in suspects:
                sums[name] = [a + b for a, b in zip(sums[name], row, strict=True)]
    for name, (error, plain, largest) in sums.items():
        relative = [f"{e / (largest or 1.0):.2e}" for e in (error, plain)]
        message = f"{name} is off by {relative[0]} of its largest, plain PyTorch by {relative[1]}"
        assert not is_off(call, error, plain, largest), f"{message}: {call}"


def is_off(call: Call, error: float, plain: float, largest: float) -> bool:
    """Whether an error, or a sum of errors, is too large."""
    smallest = torch.finfo(call.dtype).smallest_normal * torch.finfo(call.dtype).eps
    return not error <= 2 * plain + FLOOR[call.dtype] * largest + 2 * smallest
