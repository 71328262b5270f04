"""The backward of a feedback layer from the Triton kernels: prepares named operands and runs the launches of a plan."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import JITFunction

from .geometry import Pair, layer_geometry
from .launch import DTYPES, MOST_POSITIONS, Target, architecture, run
from .plan import Problem, plan_backward, scales
from .wgrad import wgrad_kernel

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Convolution = tuple[Pair, Pair, Pair]  # stride, padding, dilation

FEWEST_CHANNELS = 16  # one step of a tensor core: a layer with fewer, such as a network's first, is mostly padding
NAMES = {getattr(torch, name): name for name in DTYPES}
_INTERPRETED = not isinstance(wgrad_kernel, JITFunction)


def supports(input: Tensor, weight: Tensor, groups: int = 1) -> bool:
    """True where the kernels compute the layer: 16-bit or float32, one group, enough channels, on a GPU."""
    if input.numel() == 0 or groups != 1 or min(weight.shape[:2]) < FEWEST_CHANNELS:
        return False
    on_gpu = input.device.type == "cuda" or (_INTERPRETED and input.device.type == "cpu")
    return on_gpu and input.dtype in NAMES and input.numel() // weight.shape[1] < MOST_POSITIONS


def layer_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    *,
    convolution: Convolution | None,
    rule,
    mask: Sequence[bool],
    algorithm: str,
    center: Callable[[Tensor, int], Tensor],
    fused: bool = True,
) -> Gradients:
    """Gradients of input, weight, feedback and bias of a layer with :func:`supports`; None where ``mask`` is False.

    Args:
        grad_output, response: [N, K, P, Q] or, of a linear layer, [N, ..., K]. The response, conv(input, weight), is
            computed if it is None and needed.
        input: [N, C, H, W] or [N, ..., C], any strides; weight, feedback: [K, C, R, S] or [K, C].
        convolution: stride, padding and dilation as pairs; None for a linear layer.
        rule: a named tuple with decay, amp, null, sparse, self_, tie, center and samples.
        algorithm: what computes the data terms, see plan.py: "none", "direct" or, of a pointwise layer, "input_gram" or
            "response_gram".
        center: center(t, n) is t[:n] minus its mean over dimension 0.
        fused: False to launch dx and dW separately, without one-pass and grouped launches.

    Raises:
        ValueError: the rule has a coefficient that the kernels do not implement.
    """
    geometry, rows = layer_geometry(input.shape, weight.shape, convolution)
    layer = _Layer(convolution, geometry.H * geometry.W * geometry.R * geometry.S == 1 and geometry.pointwise)
    need_input, need_weight, need_feedback, need_bias = mask
    n, fields, strides = rule.samples or input.shape[0], (), ()
    if need_feedback:
        numbers = [
            name for name, value in zip(rule._fields, rule, strict=True) if isinstance(value, (int, float)) and value
        ]
        fields = tuple(numbers)
    if need_weight or need_feedback:
        out = torch.empty_like(weight)
        strides = (*out.stride(), 0, 0) if convolution is None else out.stride()
        strides = (strides[0], strides[2], strides[3], strides[1])
    precision = (torch.backends.cuda.matmul if convolution is None else torch.backends.cudnn.conv).fp32_precision
    target = Target(NAMES[input.dtype], precision == "tf32", *architecture(input.device))
    wanted = (need_input, need_weight, need_feedback)
    plan = plan_backward(Problem(geometry, rows, n, algorithm, fields, wanted, strides, target, fused))

    values = {"B": _channels_last(feedback).contiguous()}
    if "x" in plan.operands or "x_used" in plan.operands:
        values["x"] = layer.block(layer.read(input))
    if "dy" in plan.operands:
        values["dy"] = layer.block(grad_output)
    if need_input:
        values["dx"] = input.new_empty(geometry.N, geometry.H, geometry.W, geometry.C)
    if need_weight or "tie" in fields:
        # A launch of data terms may read dW back: in float32 it is not rounded, and finite where tie * dW is finite.
        exact = "tie" in fields and algorithm != "none"
        values["dW"] = torch.empty_like(weight, dtype=torch.float32 if exact else None)
    if need_feedback:
        values |= scales(rule, n)
        values["f"] = out
        _feedback_operands(values, plan.operands, layer, input, weight, feedback, response, rule, n, center)
    with torch.cuda.device(input.device) if input.device.type == "cuda" else nullcontext():
        for launch in plan.launches:
            run(launch, values, input.device)
    if plan.finish:
        out.copy_(_composed_gradient(plan.finish, values, weight, feedback, rule, n))
    return (
        layer.input_gradient(values["dx"], input) if need_input else None,
        values["dW"].to(weight.dtype) if need_weight else None,
        out if need_feedback else None,
        layer.bias_gradient(grad_output) if need_bias else None,
    )


class _Layer(NamedTuple):
    """The layouts of a layer. A block is what the kernels read: [n, H, W, C] or [n, P, Q, K] contiguous; of a pointwise
    layer [n * positions, 1, 1, channels]."""

    convolution: Convolution | None
    pointwise: bool

    def fprop(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The response to ``kernel`` without bias, in the caller's layouts."""
        return x @ kernel.t() if self.convolution is None else torch.conv2d(x, kernel, None, *self.convolution)

    def read(self, x: Tensor) -> Tensor:
        """The positions that are read: a strided 1x1 convolution is a dense one on those."""
        if self.convolution is None or not self.pointwise:
            return x
        down, across = self.convolution[0]
        return x[:, :, ::down, ::across]

    def block(self, t: Tensor) -> Tensor:
        """Input (after ``read``) or output as the kernels read it."""
        if self.convolution is not None:
            t = t.permute(0, 2, 3, 1)
        return (t.reshape(-1, 1, 1, t.shape[-1]) if self.pointwise else t).contiguous()

    def input_gradient(self, dx: Tensor, input: Tensor) -> Tensor:
        """A block in the layout of the input."""
        if self.convolution is None:
            return strided_like(dx.view(input.shape), torch.empty_like(input))
        n, c, h, w = self.read(input).shape
        gradient = dx.view(n, h, w, c).permute(0, 3, 1, 2)
        if gradient.shape != input.shape:
            dense, gradient = gradient, torch.zeros_like(input)
            self.read(gradient).copy_(dense)
        return strided_like(gradient, torch.empty_like(input))

    def bias_gradient(self, dy: Tensor) -> Tensor:
        """[K]"""
        return dy.reshape(-1, dy.shape[-1]).sum(0) if self.convolution is None else dy.sum((0, 2, 3))


def _feedback_operands(
    values: dict,
    names: frozenset[str],
    layer: _Layer,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    rule,
    n: int,
    center: Callable[[Tensor, int], Tensor],
) -> None:
    """Add to ``values`` what the launches of the feedback's gradient read and write."""
    half = input.dtype is torch.float16
    if "weight" in names:
        values["weight"] = strided_like(weight, values["f"])
    if "feedback" in names:
        values["feedback"] = strided_like(feedback, values["f"])
    # Both factors of every product are centred, each by its own mean: a product with one centred factor, or one from
    # which the product of the means is subtracted, cancels where the mean is large relative to the spread.
    if "x" in values:
        x = values["x_used"] = values["x"][: len(values["x"]) // len(input) * n]
    if "mean" in names:
        values["mean"] = x.view(n, -1, x.shape[-1]).mean(0, dtype=torch.float32)
    if "y" in names:
        y = layer.fprop(input[:n], weight) if response is None else response[:n]
        values["y"] = layer.block(center(y, n) if rule.center else y)
    if "u" in names:
        largest = max(abs(rule.sparse), abs(rule.amp))
        # The combined kernel is exact where B is close to W and the difference of two convolutions would cancel.
        kernel = blend(feedback, weight, rule.sparse / largest, rule.amp / largest)
        if half:
            values["u_unit"] = unit_of(kernel, dim=0)
            kernel /= values["u_unit"]
        # The response is linear: that of a centred input is centred, and is not rounded at the magnitude of its mean.
        x = center(input, n) if rule.center else input[:n]
        values["u"] = layer.block(layer.fprop(x, kernel.to(input.dtype)))
    if "f_sparse" in names:
        values["f_sparse"] = torch.empty_like(weight, dtype=torch.float32)
    if "z" in names:
        values["z"] = values["x"].new_empty(len(values["y"]), *values["x"].shape[1:])
    if "z_unit" in names:
        values["z_unit"] = unit_of(feedback, dim=1)
    k, c = weight.shape[:2]
    if "gram" in names:
        values["gram"] = weight.new_empty(*((k, k) if "y" in names else (c, c)), dtype=torch.float32)
    if "cross" in names:
        values["cross"] = weight.new_empty(k, c, dtype=torch.float32)


def _composed_gradient(finish: str, values: dict, weight: Tensor, feedback: Tensor, rule, n: int) -> Tensor:
    """f from the products [K, C] and the terms that read no data, in float32 and the shape of the weight."""
    if finish == "blend":
        return blend(feedback, weight, rule.decay, rule.self_)
    w, b = (t.reshape(t.shape[0], -1).float() for t in (weight, feedback))
    if finish == "input_gram":  # (sparse B - amp W) G + null W G W' B, with G = x'x
        total = blend(b, w, rule.sparse, rule.amp) @ values["gram"]
        if rule.null:
            mixed = w @ values["gram"]
            spread = (mixed @ w.t()) @ b if w.shape[0] < w.shape[1] else mixed @ (w.t() @ b)
            total = total.add_(spread, alpha=rule.null)
    else:  # null Y B - amp y'x, with Y = y'y
        total = rule.null * (values["gram"] @ b)
        if rule.amp:
            total = total.sub_(values["cross"], alpha=rule.amp)
    total = total.reshape(weight.shape) / n
    if rule.decay or rule.self_:
        total = total + blend(feedback, weight, rule.decay, rule.self_)
    return total.add_(values["dW"], alpha=rule.tie) if rule.tie else total


def unit_of(kernel: Tensor, dim: int) -> Tensor:
    """[1] in float32: a power of two, the unit in which float16 holds what ``kernel`` makes of any float16 activations.

    No sum over the kernel along all dimensions but ``dim`` exceeds its largest absolute sum. An input gradient
    (``dim`` 1, the input's channels) has an activation of up to twice float16's range added to it.
    """
    sums = kernel.abs().sum([d for d in range(kernel.dim()) if d != dim], dtype=torch.float32)
    largest = sums.amax().add(2.0) if dim == 1 else sums.amax().clamp_min(torch.finfo(torch.float32).tiny)
    return largest.log2().ceil().exp2().view(1)


def blend(feedback: Tensor, weight: Tensor, b: float, w: float) -> Tensor:
    """b * B - w * W in float32, exact where b == w and B is close to W; an operand with coefficient 0 is not read."""
    if not w:
        return b * feedback.float()
    if not b:
        return -w * weight.float()
    difference = b * (feedback.float() - weight.float())
    return difference if b == w else difference.add_(weight, alpha=b - w)


def strided_like(t: Tensor, like: Tensor) -> Tensor:
    """t with the strides of ``like``: itself where it has them already."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)


def _channels_last(kernel: Tensor) -> Tensor:
    """The view [K, R, S, C] of a kernel [K, C, R, S] or [K, C]."""
    return kernel.permute(0, 2, 3, 1) if kernel.dim() == 4 else kernel[:, None, None]
