"""The backward of a feedback layer, composed of PyTorch's own kernels.

The rule's gradient is written once, over the products of a layer (:class:`_Conv2d`, :class:`_Linear`). Notation as in
the contract of the ops: x the input, y = conv(x, W) the response without bias, B the feedback weight, n the samples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeedback.aten.center import wide_dtype
from pyfeedback.aten.centering import centered, centered_beside, combined
from pyfeedback.forms import (
    Coefficients,
    Form,
    Problem,
    Window,
    WindowNd,
    choose_form,
    conv2d_problem,
    convolution_problem,
    is_pointwise,
    linear_problem,
    needs_response,
    reads_data,
)

Mask = Sequence[bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Scaled = tuple[Tensor, float]  # a product, and the factor it still wants

_convolution_backward = torch.ops.aten.convolution_backward.default


def conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    window: Window,
    rule: Coefficients,
    mask: Mask,
) -> Gradients:
    """Gradients of input, weight, feedback and bias of a convolution; None where ``mask`` is False."""
    need_input, need_weight, need_feedback, need_bias = mask[:4]
    grad_input: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_feedback: Tensor | None = None
    grad_bias: Tensor | None = None
    x, whole = input, window
    strided = window.stride != (1, 1) and is_pointwise(weight.shape, window)
    if strided:
        # A strided 1x1 convolution is a dense one on the positions it reads. Not only the moments want it so: the
        # weight gradient of stride 3 in channels_last corrupts the heap (oneDNN on a CPU, torch 2.13).
        x = _read_positions(input, window).contiguous(memory_format=_memory_format(input))
        window = window._replace(stride=(1, 1))
    needs = (need_input, need_weight or (need_feedback and rule.tie != 0), need_bias)
    if True in needs:
        stride, padding, dilation, groups = window
        grad_input, grad_weight, grad_bias = _convolution_backward(
            grad_output, x, feedback, (weight.shape[0],), stride, padding, dilation, False, (0, 0), groups, needs
        )
    if need_feedback:
        layer = _Conv2d(weight, window)
        grad_feedback = _feedback_gradient(layer, x, response, weight, feedback, grad_weight, rule)
    if strided and grad_input is not None:
        spread = torch.zeros_like(input)
        _read_positions(spread, whole).copy_(grad_input)
        grad_input = spread
    return (
        laid_out_like(grad_input, input),
        laid_out_like(grad_weight, weight) if need_weight else None,
        laid_out_like(grad_feedback, weight),
        grad_bias,
    )


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    rule: Coefficients,
    mask: Mask,
) -> Gradients:
    """Gradients of input, weight, feedback and bias of a linear layer; None where ``mask`` is False."""
    need_input, need_weight, need_feedback, need_bias = mask[:4]
    layer = _Linear(weight)
    grad_weight: Tensor | None = None
    grad_feedback: Tensor | None = None
    if need_weight or (need_feedback and rule.tie != 0):
        grad_weight = layer.correlate(input, grad_output)
    if need_feedback:
        grad_feedback = _feedback_gradient(layer, input, response, weight, feedback, grad_weight, rule)
    return (
        laid_out_like(layer.project(grad_output, feedback, input), input) if need_input else None,
        laid_out_like(grad_weight, weight) if need_weight else None,
        laid_out_like(grad_feedback, weight),
        grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if need_bias else None,
    )


def convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    window: WindowNd,
    rule: Coefficients,
    mask: Mask,
) -> Gradients:
    """The same for a convolution of any number of dimensions, transposed or not."""
    need_input, need_weight, need_feedback, need_bias = mask[:4]
    needs = (need_input, need_weight or (need_feedback and rule.tie != 0), need_bias)
    grad_input, grad_weight, grad_bias, grad_feedback = None, None, None, None
    if True in needs:
        channels = (grad_output.shape[1],)
        grad_input, grad_weight, grad_bias = _convolution_backward(
            grad_output, input, feedback, channels, *window, needs
        )  # fmt: skip
    if need_feedback:
        layer = _Convolution(weight, window)
        grad_feedback = _feedback_gradient(layer, input, response, weight, feedback, grad_weight, rule)
    return (
        laid_out_like(grad_input, input),
        laid_out_like(grad_weight, weight) if need_weight else None,
        laid_out_like(grad_feedback, weight),
        grad_bias,
    )


def conv2d_saves_response(
    input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, rule: Coefficients
) -> bool:
    """True where the forward's output is the response and the backward will read it."""
    return _saves_response(_Conv2d(weight, window), input, bias, rule)


def convolution_saves_response(
    input: Tensor, weight: Tensor, bias: Tensor | None, window: WindowNd, rule: Coefficients
) -> bool:
    """True where the forward's output is the response and the backward will read it."""
    return _saves_response(_Convolution(weight, window), input, bias, rule)


def linear_saves_response(input: Tensor, weight: Tensor, bias: Tensor | None, rule: Coefficients) -> bool:
    """True where the forward's output is the response and the backward will read it."""
    return _saves_response(_Linear(weight), input, bias, rule)


class _Conv2d(NamedTuple):
    """The products of a convolution: activations [n, C, H, W], kernels [K, C/g, R, S]."""

    weight: Tensor
    window: Window

    @property
    def channel(self) -> int:
        """The dimension of an activation's channels."""
        return 1

    def problem(self, input_shape: Sequence[int], samples: int) -> Problem:
        return conv2d_problem(input_shape, self.weight.shape, self.window, samples)

    def respond(self, x: Tensor, kernel: Tensor) -> Tensor:
        """conv(x, kernel)"""
        return torch.conv2d(x, kernel, None, *self.window)

    def project(self, y: Tensor, kernel: Tensor, x: Tensor) -> Tensor:
        """convT(y, kernel), of the size of x"""
        return self._backward(y, x, kernel, (True, False, False))[0]

    def correlate(self, x: Tensor, y: Tensor) -> Tensor:
        """wgrad(x, y)"""
        return self._backward(y, x, self.weight, (False, True, False))[1]

    def moment(self, x: Tensor) -> Tensor:
        """x'x [C, C]: as the weight gradient of a 1x1 convolution, 2 to 3 times faster than mm on a CPU"""
        c = x.shape[1]
        square = _Conv2d(x.new_empty(c, c, 1, 1), Window())
        return square.correlate(x, x).reshape(c, c)

    def _backward(self, y: Tensor, x: Tensor, kernel: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
        stride, padding, dilation, groups = self.window
        return _convolution_backward(y, x, kernel, None, stride, padding, dilation, False, (0, 0), groups, mask)


class _Convolution(NamedTuple):
    """The products of a convolution of any number of dimensions, which never is taken for a pointwise one."""

    weight: Tensor
    window: WindowNd

    @property
    def channel(self) -> int:
        return 1

    def problem(self, input_shape: Sequence[int], samples: int) -> Problem:
        return convolution_problem(input_shape, self.weight.shape, self.window, samples)

    def respond(self, x: Tensor, kernel: Tensor) -> Tensor:
        return torch.convolution(x, kernel, None, *self.window)

    def project(self, y: Tensor, kernel: Tensor, x: Tensor) -> Tensor:
        return _convolution_backward(y, x, kernel, None, *self.window, (True, False, False))[0]

    def correlate(self, x: Tensor, y: Tensor) -> Tensor:
        return _convolution_backward(y, x, self.weight, None, *self.window, (False, True, False))[1]


class _Linear(NamedTuple):
    """The products of a linear layer: activations [n, ..., C], kernels [K, C]."""

    weight: Tensor

    @property
    def channel(self) -> int:
        return -1

    def problem(self, input_shape: Sequence[int], samples: int) -> Problem:
        return linear_problem(input_shape, self.weight.shape, samples)

    def respond(self, x: Tensor, kernel: Tensor) -> Tensor:
        return torch.matmul(x, kernel.t())

    def project(self, y: Tensor, kernel: Tensor, x: Tensor) -> Tensor:
        return torch.matmul(y, kernel)

    def correlate(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.mm(y.reshape(-1, y.shape[-1]).t(), x.reshape(-1, x.shape[-1]))

    def moment(self, x: Tensor) -> Tensor:
        return self.correlate(x, x)


_Layer = _Conv2d | _Convolution | _Linear


def _saves_response(layer: _Layer, input: Tensor, bias: Tensor | None, rule: Coefficients) -> bool:
    if bias is not None or not reads_data(rule) or input.shape[0] == 0:
        return False
    return needs_response(choose_form(layer.problem(input.shape, rule.samples), rule, True), rule)


def _feedback_gradient(
    layer: _Layer,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    feedback: Tensor,
    grad_weight: Tensor | None,
    rule: Coefficients,
) -> Tensor:
    """dR/dB + tie * grad_weight, rounded once to the dtype of the weight."""
    n = rule.samples or x.shape[0]
    if n == 0:
        return torch.zeros_like(weight)
    x = x[:n]
    y = y[:n] if y is not None else None
    form = choose_form(layer.problem(x.shape, n), rule, y is not None)
    if form is Form.NONE:
        grad = _blend(feedback, weight, rule.decay, rule.self_)
    else:
        grad = _data_gradient(layer, form, x, y, weight, feedback, rule)
        if rule.self_:
            grad = grad.add_(_blend(feedback, weight, rule.decay, rule.self_))
        elif rule.decay:
            grad = grad.add_(feedback, alpha=rule.decay)
    if rule.tie and grad_weight is not None:
        grad = grad.add_(grad_weight, alpha=rule.tie)
    return grad.to(weight.dtype)


def _data_gradient(
    layer: _Layer, form: Form, x: Tensor, y: Tensor | None, weight: Tensor, feedback: Tensor, rule: Coefficients
) -> Tensor:
    """The amp, null and sparse terms of dR/dB, in float32 or wider.

    float16 is computed in float32: sums over a batch exceed 65504, the largest float16, long before their mean does.
    """
    if x.dtype is torch.float16:
        x, weight, feedback = x.float(), weight.float(), feedback.float()
        y = y.float() if y is not None else None
        layer = layer._replace(weight=weight)
    if y is None and needs_response(form, rule):
        y = layer.respond(x, weight)
    data, scale = _DATA_TERMS[form](layer, x, y, weight, feedback, rule)
    return data.to(wide_dtype(data.dtype)).mul_(scale / x.shape[0])


def _direct(layer, x: Tensor, y: Tensor, weight: Tensor, feedback: Tensor, rule: Coefficients) -> Scaled:
    """sparse: wgrad(x, conv(x, sparse B - amp W)), which stays exact where B nears W and the difference of two
    convolutions would cancel; null: wgrad(null z - amp x, y), folded into z in one pass. amp rides on either.
    """
    if rule.sparse:
        scale = max(abs(rule.sparse), abs(rule.amp))
        kernel = _blend(feedback, weight, rule.sparse / scale, rule.amp / scale).to(x.dtype)
        x = centered(x, rule)
        total = layer.correlate(x, layer.respond(x, kernel))
        if rule.null:
            y = centered(y, rule)
            total = total.add_(layer.correlate(layer.project(y, feedback, x), y), alpha=rule.null / scale)
        return total, scale
    y = centered(y, rule)
    if not rule.null:
        return layer.correlate(centered_beside(x, layer.channel, rule), y), -rule.amp
    z = layer.project(y, feedback, x)
    if abs(rule.amp) <= abs(rule.null):
        return layer.correlate(combined(z, 1.0, x, -rule.amp / rule.null, rule), y), rule.null
    return layer.correlate(combined(z, -rule.null / rule.amp, x, 1.0, rule), y), -rule.amp


def _input_moment(layer, x: Tensor, y: Tensor, weight: Tensor, feedback: Tensor, rule: Coefficients) -> Scaled:
    """(sparse B - amp W) G + null W G W' B, with the second moment G = x'x."""
    wide = wide_dtype(x.dtype)
    moment = layer.moment(centered(x, rule)).to(wide)
    w, b = (t.reshape(t.shape[0], -1).to(wide) for t in (weight, feedback))
    if not rule.null:
        if not rule.sparse:
            return (w @ moment).reshape(weight.shape), -rule.amp
        return (_blend(b, w, rule.sparse, rule.amp) @ moment).reshape(weight.shape), 1.0
    mixed = w @ moment
    spread = (mixed @ w.t()) @ b if w.shape[0] < w.shape[1] else mixed @ (w.t() @ b)
    total = spread.mul_(rule.null).sub_(mixed, alpha=rule.amp)
    if rule.sparse:
        total = total.add_(b @ moment, alpha=rule.sparse)
    return total.reshape(weight.shape), 1.0


def _response_moment(layer, x: Tensor, y: Tensor, weight: Tensor, feedback: Tensor, rule: Coefficients) -> Scaled:
    """null Y B - amp y'x, with the second moment Y = y'y."""
    wide = wide_dtype(x.dtype)
    y = centered(y, rule)
    total = layer.moment(y).to(wide) @ feedback.reshape(feedback.shape[0], -1).to(wide)
    if rule.amp:
        mixed = layer.correlate(centered_beside(x, layer.channel, rule), y)
        total = total.sub_(mixed.reshape(total.shape), alpha=rule.amp / rule.null)
    return total.reshape(weight.shape), rule.null


# What computes each form; y is None where needs_response says that the form does not read it.
_DATA_TERMS: dict[Form, Callable[..., Scaled]] = {
    Form.DIRECT: _direct,
    Form.INPUT_MOMENT: _input_moment,
    Form.RESPONSE_MOMENT: _response_moment,
}


def _blend(feedback: Tensor, weight: Tensor, b: float, w: float) -> Tensor:
    """b * B - w * W in float32 or wider, written so that it stays exact where b == w and B nears W."""
    wide = wide_dtype(weight.dtype)
    feedback, weight = feedback.to(wide), weight.to(wide)
    if not w:
        return feedback * b
    difference = torch.sub(feedback, weight)
    if b != 1.0:
        difference = difference.mul_(b)
    return difference if b == w else difference.add_(weight, alpha=b - w)


def _read_positions(x: Tensor, window: Window) -> Tensor:
    """The view of the positions that a pointwise convolution of this stride reads."""
    return x[:, :, :: window.stride[0], :: window.stride[1]]


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def laid_out_like(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """grad with the strides of ``like``: the same tensor where it has them already."""
    if grad is None or grad.stride() == like.stride():
        return grad
    if grad.is_contiguous() and like.is_contiguous():  # they differ in dimensions of size one alone
        return grad.as_strided(like.shape, like.stride())
    return torch.empty_like(like).copy_(grad)
