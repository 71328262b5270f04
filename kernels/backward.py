"""The backward of a feedback layer by the Triton kernels: prepares named operands and runs the launches of a plan."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import JITFunction

from .geometry import Pair, layer_geometry
from .handles import Launcher
from .launch import DTYPES, MOST_POSITIONS, architecture
from .plan import Plan, Problem, plan_backward, scales
from .tiles import Target
from .wgrad import wgrad_kernel

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Convolution = tuple[Pair, Pair, Pair]  # stride, padding, dilation
Center = Callable[[Tensor, int], Tensor]

FEWEST_CHANNELS = 16  # one step of a tensor core; with fewer, as in the first layer of a network, most is padding
NAMES = {getattr(torch, name): name for name in DTYPES}
_INTERPRETED = not isinstance(wgrad_kernel, JITFunction)


def supports(input: Tensor, weight: Tensor, groups: int = 1) -> bool:
    """Whether the kernels compute the layer: 16-bit or float32, one group, enough channels, on a GPU."""
    if input.numel() == 0 or groups != 1 or min(weight.shape[:2]) < FEWEST_CHANNELS or weight.numel() >= 2**31:
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
    center: Center,
    fused: bool = True,
) -> Gradients:
    """Gradients of input, weight, feedback and bias of a layer that the kernels support; None if ``mask`` is False.

    Args:
        grad_output, response: [N, K, P, Q], or [N, ..., K] of a linear layer. The response, conv(input, weight), is
            computed if it is None and needed.
        input: [N, C, H, W] or [N, ..., C], any strides; weight, feedback: [K, C, R, S] or [K, C].
        convolution: stride, padding and dilation as pairs; None for a linear layer.
        rule: a named tuple with decay, amp, null, sparse, self_, tie, center and samples.
        algorithm: how the data terms are computed (see plan.py): "none", "direct" or, if pointwise, "input_gram" or
            "response_gram".
        center: center(t, n) is t[:n] minus its mean over dimension 0.
        fused: False to launch dx and dW separately, without one-pass and joint launches.

    Raises:
        ValueError: the rule has a coefficient that the kernels do not implement.
    """
    geometry, rows, strided = layer_geometry(input.shape, weight.shape, convolution)
    need_input, need_weight, need_feedback, need_bias = mask[:4]
    n, fields, out, strides = rule.samples or input.shape[0], (), None, ()
    if need_feedback:
        fields = tuple(k for k, v in zip(rule._fields, rule, strict=True) if isinstance(v, (int, float)) and v)
    if need_weight or need_feedback:
        out = torch.empty_like(weight)
        k, c, r, s = out.stride() if convolution else (*out.stride(), 0, 0)
        strides = (k, r, s, c)
    precision = (torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul).fp32_precision
    target = Target(NAMES[input.dtype], precision == "tf32", *architecture(input.device))
    wanted = (need_input, need_weight, need_feedback)
    problem = Problem(geometry, rows, n, algorithm, fields, wanted, strides, target, fused, strided)
    plan, launcher = planned(problem, input.device)

    layer = _Layer(input, weight, feedback, response, convolution, geometry.pointwise, rule, n, center)
    values = {}
    if "B" in plan.operands:
        values["B"] = (feedback.permute(0, 2, 3, 1) if convolution else feedback[:, None, None]).contiguous()
    if plan.operands & {"x", "x_used", "z"}:
        values["x"] = layer.block(layer.read(input))
    if "dy" in plan.operands:
        values["dy"] = layer.block(grad_output)
    if need_input:
        values["dx"] = input.new_empty(plan.dx.N, plan.dx.H, plan.dx.W, plan.dx.C)
    if need_weight or "tie" in fields:
        # A launch of data terms may read dW: in float32, it is not rounded, and it is finite if tie * dW is.
        exact = "tie" in fields and algorithm != "none"
        values["dW"] = torch.empty_like(weight, dtype=torch.float32 if exact else None)
    if need_feedback:
        values |= scales(rule, n) | {"f": out}
        _add_feedback_operands(values, plan.operands, layer)
    with torch.cuda.device(input.device) if input.device.type == "cuda" else nullcontext():
        launcher.run(values)
    if plan.finish:
        _composed_gradient(plan.finish, values, layer)
    grad_bias = None
    if need_bias:
        grad_bias = grad_output.sum((0, 2, 3)) if convolution else grad_output.reshape(-1, geometry.K).sum(0)
    return (
        layer.input_gradient(values["dx"]) if need_input else None,
        values["dW"].to(weight.dtype) if need_weight else None,
        out if need_feedback else None,
        grad_bias,
    )


@lru_cache(4096)
def planned(problem: Problem, device: torch.device) -> tuple[Plan, Launcher]:
    """The plan of a backward pass, and what runs its launches on a device."""
    plan = plan_backward(problem)
    return plan, Launcher(plan.launches, device)


class _Layer(NamedTuple):
    """The tensors and options of one call, and the layouts of the layer.

    The kernels read blocks: contiguous [n, H, W, C] or [n, P, Q, K], or [n * positions, 1, 1, channels] of a pointwise
    layer.
    """

    input: Tensor
    weight: Tensor
    feedback: Tensor
    response: Tensor | None
    convolution: Convolution | None
    pointwise: bool
    rule: Any
    n: int  # samples that the rule reads
    center: Center

    def fprop(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The response of ``kernel`` without bias, in the layouts of the caller."""
        return torch.conv2d(x, kernel, None, *self.convolution) if self.convolution else x @ kernel.t()

    def sampled(self, t: Tensor) -> Tensor:
        """The samples that the rule reads, centered if the rule centers them."""
        return self.center(t, self.n) if self.rule.center else t[: self.n]

    def read(self, x: Tensor) -> Tensor:
        """The positions that are read: a strided 1x1 convolution is a dense one on these."""
        if self.convolution and self.pointwise:
            down, across = self.convolution[0]
            return x[:, :, ::down, ::across]
        return x

    def block(self, t: Tensor) -> Tensor:
        """The block of an input (after ``read``) or output."""
        if self.convolution:
            t = t.permute(0, 2, 3, 1)
        return (t.reshape(-1, 1, 1, t.shape[-1]) if self.pointwise else t).contiguous()

    def input_gradient(self, dx: Tensor) -> Tensor:
        """The input gradient in the layout of the input, from its block."""
        if not self.convolution:
            return match_strides(dx.view(self.input.shape), torch.empty_like(self.input))
        n, c, h, w = self.input.shape if dx.numel() == self.input.numel() else self.read(self.input).shape
        gradient = dx.view(n, h, w, c).permute(0, 3, 1, 2)
        if gradient.shape != self.input.shape:
            dense, gradient = gradient, torch.zeros_like(self.input)
            self.read(gradient).copy_(dense)
        return match_strides(gradient, torch.empty_like(self.input))


def _add_feedback_operands(values: dict[str, Any], names: frozenset[str], layer: _Layer) -> None:
    """Add the tensors that the launches of the feedback's gradient read and write to ``values``."""
    input, weight, feedback, response = layer.input, layer.weight, layer.feedback, layer.response
    rule, n = layer.rule, layer.n
    for name, kernel in (("weight", weight), ("feedback", feedback)):
        if name in names:
            values[name] = match_strides(kernel, values["f"])
    # Both factors of every product are centered. A product with one centered factor, or one from which the product of
    # the means is subtracted, cancels if the mean is large relative to the standard deviation.
    if "x" in values:
        values["x_used"] = values["x"][: len(values["x"]) // len(input) * n]
    if "y" in names:
        y = layer.fprop(input[:n], weight) if response is None else response
        in_kernels = names & {"y_mean", "y_shift"}
        values["y"] = layer.block(y[:n] if in_kernels else layer.sampled(y))
    for factor, block in (("x", "x_used"), ("y", "y")):
        if f"{factor}_mean" in names:
            values[f"{factor}_mean"] = _samples(values[block], n).mean(0, dtype=torch.float32)
        if f"{factor}_shift" in names:
            # The mean of 1/16 of any n values is off by at most about 4 of their standard deviations.
            values[f"{factor}_shift"] = _samples(values[block], n)[: max(n // 16, 8)].mean(0)
    if "u" in names:
        largest = max(abs(rule.sparse), abs(rule.amp))
        # If B is close to W, the difference of two convolutions would cancel; the combined kernel is exact.
        kernel = blend(feedback, weight, rule.sparse / largest, rule.amp / largest)
        if "u_unit" in names:
            values["u_unit"] = unit_of(kernel, dim=0)
            kernel /= values["u_unit"]
        # The response to a centered input is centered, and is not rounded at the magnitude of its mean.
        values["u"] = layer.block(layer.fprop(layer.sampled(input), kernel.to(input.dtype)))
    if "z" in names:
        values["z"] = torch.empty_like(values["x_used"])
    if "z_unit" in names:
        values["z_unit"] = unit_of(feedback, dim=1)
    if "f_sparse" in names:
        values["f_sparse"] = torch.empty_like(weight, dtype=torch.float32)
    k, c = weight.shape[:2]
    for name, size in (("cross", (k, c)), ("gram", (k, k) if "y" in names else (c, c))):
        if name in names:
            values[name] = weight.new_empty(size, dtype=torch.float32)


def _samples(block: Tensor, n: int) -> Tensor:
    """The block of n samples as [n, positions, channels]."""
    return block.view(n, -1, block.shape[-1])


def _composed_gradient(finish: str, values: dict[str, Any], layer: _Layer) -> None:
    """Write f, from products [K, C] in float32 and the terms without data; it is rounded once."""
    weight, feedback, rule, n, out = layer.weight, layer.feedback, layer.rule, layer.n, values["f"]
    if finish == "blend":
        out.copy_(blend(feedback, weight, rule.decay, rule.self_))
        return
    w, b, gram = weight.reshape(len(weight), -1), feedback.reshape(len(weight), -1), values["gram"]
    if finish == "input_gram":  # (sparse B - amp W) G + null W G W' B, with G = x'x
        w = w.float()
        kernel, scale = (blend(b, w, rule.sparse, rule.amp), 1.0) if rule.sparse else (w, -rule.amp)
        total = torch.addmm(w, kernel, gram, beta=0, alpha=scale / n)
        if rule.null:
            mixed, b = w @ gram, b.float()
            factors = (mixed @ w.t(), b) if w.shape[0] < w.shape[1] else (mixed, w.t() @ b)
            total = total.addmm_(*factors, alpha=rule.null / n)
    else:  # null Y B - amp y'x, with Y = y'y
        b = b.float()
        total = torch.addmm(b, gram, b, beta=0, alpha=rule.null / n)
        if rule.amp:
            total = total.sub_(values["cross"], alpha=rule.amp / n)
    total = total.reshape(weight.shape)
    if rule.tie:
        total = total.add_(values["dW"], alpha=rule.tie)
    if rule.self_:
        torch.add(total, blend(feedback, weight, rule.decay, rule.self_), out=out)
    elif rule.decay:
        torch.add(total, feedback, alpha=rule.decay, out=out)  # the sum of both dtypes is float32
    else:
        out.copy_(total)


def unit_of(kernel: Tensor, dim: int) -> Tensor:
    """A float32 power of two, [1]: divided by it, the products of ``kernel`` with float16 activations fit float16.

    They are bounded by the largest absolute sum over the kernel along all dimensions except ``dim``. For an input
    gradient (``dim`` 1, the channels of the input), an activation of up to twice the range of float16 is added.
    """
    sums = kernel.abs().sum([d for d in range(kernel.dim()) if d != dim], dtype=torch.float32)
    largest = sums.amax().add(2.0) if dim == 1 else sums.amax().clamp_min(torch.finfo(torch.float32).tiny)
    return largest.log2().ceil().exp2().view(1)


def blend(feedback: Tensor, weight: Tensor, b: float, w: float) -> Tensor:
    """b * B - w * W in float32, exact if b == w and B is close to W; an operand with coefficient 0 is not read."""
    if not w:
        return b * feedback.float()
    if not b:
        return -w * weight.float()
    difference = b * (feedback.float() - weight.float())
    return difference if b == w else difference.add_(weight, alpha=b - w)


def match_strides(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with the strides of ``like``; ``t`` itself if it already has them."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)
