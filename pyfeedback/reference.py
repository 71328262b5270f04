"""The reference: the paper's regularizers, differentiated by autograd.

It is slow and simple on purpose, so that it can be read next to Kunin et al., "Two Routes to Scalable Credit Assignment
without Weight Symmetry" (ICML 2020, arXiv 2003.01513). The ops are tested against it. It imports only torch.

    y, regularizer = reference.conv2d(input, weight, feedback, padding=1, amp=1e-3, decay=2e-3)
    (loss(y) + regularizer).backward()          # feedback.grad is the rule's gradient
"""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad
from torch.nn.modules.utils import _pair


def conv2d(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    tie: float = 0.0,
    **rule,
) -> tuple[Tensor, Tensor]:
    """Convolution with a feedback path, and the regularizer whose gradient is the rule.

    Args:
        input: [N, C, H, W]; weight, feedback: [K, C/g, R, S]; bias: [K].
        rule: see :func:`regularizer`; ``tie`` adds ``tie * grad_weight`` to the feedback's gradient.

    Returns:
        The output [N, K, P, Q], and the regularizer R(B), a scalar to add to the loss.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)

    def conv(x, kernel):
        return F.conv2d(x, kernel, None, stride, padding, dilation, groups)

    def conv_transposed(y, kernel):
        spans = zip(input.shape[2:], y.shape[2:], stride, padding, dilation, kernel.shape[2:], strict=True)
        extra = [x - ((p - 1) * s - 2 * pad + d * (r - 1) + 1) for x, p, s, pad, d, r in spans]
        return F.conv_transpose2d(y, kernel, None, stride, padding, extra, groups, dilation)

    y = _ConvFeedbackPath.apply(input, weight, feedback.detach(), stride, padding, dilation, groups)
    if tie:
        y = y + tie * _without_value(conv(input.detach(), feedback))
    rule |= {"positions": y[0, 0].numel(), "stride": 1 if any(padding) else stride}
    penalty = regularizer(input.detach(), y.detach(), weight.detach(), feedback, conv, conv_transposed, **rule)
    return y if bias is None else y + bias.view(-1, 1, 1), penalty


def convolution(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    transposed: bool = False,
    output_padding=0,
    groups: int = 1,
    *,
    tie: float = 0.0,
    **rule,
) -> tuple[Tensor, Tensor]:
    """:func:`conv2d` for any number of dimensions, or transposed with weight and feedback [C, K/g, ...].

    Autograd computes the feedback path: the input gradient of the forward pass with B in place of W.
    """
    spatial = input.dim() - 2
    plain = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    of_transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]

    def conv(x, kernel):
        if transposed:
            return of_transpose(x, kernel, None, stride, padding, output_padding, groups, dilation)
        return plain(x, kernel, None, stride, padding, dilation, groups)

    def conv_transposed(y, kernel):
        at = torch.zeros_like(input[: len(y)], requires_grad=True)
        return torch.autograd.grad(conv(at, kernel), at, y, create_graph=True)[0]

    fixed = input.detach()
    through_feedback = conv(input, feedback.detach())
    y = conv(fixed, weight) + _without_value(through_feedback)
    if tie:
        y = y + tie * _without_value(conv(fixed, feedback))
    rule |= {"positions": (input if transposed else y)[0, 0].numel(), "stride": stride}
    if transposed or (any(padding) if isinstance(padding, (tuple, list)) else padding):
        rule["stride"] = 1
    penalty = regularizer(fixed, y.detach(), weight.detach(), feedback, conv, conv_transposed, **rule)
    return y if bias is None else y + bias.view(-1, *(1,) * spatial), penalty


def linear(
    input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None = None, *, tie: float = 0.0, **rule
) -> tuple[Tensor, Tensor]:
    """:func:`conv2d` for a linear layer: input [N, ..., C], weight and feedback [K, C]; output [N, ..., K]."""
    y = _LinearFeedbackPath.apply(input, weight, feedback.detach())
    if tie:
        y = y + tie * _without_value(F.linear(input.detach(), feedback))
    rule["positions"] = y[0, ..., 0].numel()
    penalty = regularizer(input.detach(), y.detach(), weight.detach(), feedback, F.linear, torch.matmul, **rule)
    return y if bias is None else y + bias, penalty


def regularizer(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    feedback: Tensor,
    conv,
    conv_transposed,
    *,
    decay: float = 0.0,
    amp: float = 0.0,
    null: float = 0.0,
    sparse: float = 0.0,
    self_: float = 0.0,
    center: bool = False,
    samples: int = 0,
    normalize: bool = False,
    positions: int = 1,
    stride=1,
) -> Tensor:
    """R(B), the sum of the primitives (paper, section 3), over the first ``samples`` of the batch (0: all).

    With ``normalize``, each data term is divided by the power of what it reads, which is a constant in R: the
    mean of x^2 times the output ``positions`` of a sample (of a transposed convolution, its input positions); for null,
    :func:`null_power`; for sparse, and the amp beside it, :func:`largest_variance`. A 1x1 convolution with a ``stride``
    and without padding reads only some positions of x.
    """
    n = samples or x.shape[0]
    x, y = x[:n], y[:n]
    if center:
        x, y = x - x.mean(0), y - y.mean(0)
    if normalize:
        largest = largest_variance(x, weight, conv) / n if sparse else 1.0
        spatial = weight.dim() - 2
        strides = stride if isinstance(stride, (tuple, list)) else (stride,) * spatial
        read = x
        if spatial and all(size == 1 for size in weight.shape[2:]):
            for dimension, s in enumerate(strides, 2):
                read = read.index_select(dimension, torch.arange(0, x.shape[dimension], s))
        amp /= largest if sparse else positions * float(read.square().mean())
        sparse /= largest
        null *= n / null_power(y.detach(), feedback.detach(), conv_transposed) if null else 0.0
    total = feedback.new_zeros(())
    if decay:
        total = total + decay * feedback.square().sum() / 2
    if amp:
        total = total - amp * (conv(x, feedback) * y).sum() / n
    if sparse:
        total = total + sparse * conv(x, feedback).square().sum() / (2 * n)
    if null:
        total = total + null * conv_transposed(y, feedback).square().sum() / (2 * n)
    if self_:
        total = total - self_ * (feedback * weight).sum()
    return total


def null_power(y: Tensor, feedback: Tensor, conv_transposed) -> float:
    """The sum over the samples of |conv_transpose(y, B)|^2 / |B|^2"""
    return float(conv_transposed(y, feedback).detach().square().sum() / feedback.square().sum())


def largest_variance(x: Tensor, weight: Tensor, conv, steps: int = 4, share: int = 8) -> float:
    """The largest eigenvalue of the sum over the windows of x x', by power iteration on one of ``share`` samples."""
    part = x[: -(-len(x) // share)]
    kernel = torch.ones_like(weight)
    value = x.new_zeros(())
    for _ in range(steps):
        kernel = (kernel / kernel.norm()).requires_grad_()
        kernel = torch.autograd.grad(conv(part, kernel).square().sum() / 2, kernel)[0]
        value = kernel.norm()
    return float(value.detach()) * (len(x) / len(part))


class _ConvFeedbackPath(torch.autograd.Function):
    """conv(x, W) in the forward pass, convT(dy, B) in the backward pass."""

    @staticmethod
    def forward(ctx, input, weight, feedback, *window):
        ctx.save_for_backward(input, weight, feedback)
        ctx.window = window
        return F.conv2d(input, weight, None, *window)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, feedback = ctx.saved_tensors
        grad_input = grad.conv2d_input(input.shape, feedback, grad_output, *ctx.window)
        grad_weight = grad.conv2d_weight(input, weight.shape, grad_output, *ctx.window)
        return grad_input, grad_weight, None, None, None, None, None


class _LinearFeedbackPath(torch.autograd.Function):
    """x W' in the forward pass, dy B in the backward pass."""

    @staticmethod
    def forward(ctx, input, weight, feedback):
        ctx.save_for_backward(input, feedback)
        return F.linear(input, weight)

    @staticmethod
    def backward(ctx, grad_output):
        input, feedback = ctx.saved_tensors
        return grad_output @ feedback, grad_output.flatten(0, -2).t() @ input.flatten(0, -2), None


def __getattr__(name: str):
    if name == "regulariser":
        old = "the old name is removed in the release after next"
        warnings.warn(f"reference.regulariser is now reference.regularizer; {old}", DeprecationWarning, stacklevel=2)
        return regularizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _without_value(x: Tensor) -> Tensor:
    """A zero tensor that has the gradient of x."""
    return x - x.detach()
