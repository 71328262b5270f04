"""The baseline: the best composition of PyTorch calls that does not use the algebra of this package.

One aten::convolution_backward computes the task gradients. It does not read the weight for grad_weight, so the
feedback is passed as the weight. Each rule then takes the calls of its formula, with elementwise operations folded:

    amp            wgrad(x, y)
    amp, null      z = convT(y, B);  wgrad(null z - amp x, y)
    amp, sparse    e = conv(x, B);   wgrad(x, sparse e - amp y)

Here y is the response saved by the forward pass. Centering copies x and y.
"""

import torch
from torch import Tensor

from pyfeedback.core.coefficients import Coefficients

_backward = torch.ops.aten.convolution_backward.default


def conv2d(input: Tensor, weight: Tensor, feedback: Tensor, window: tuple, rule: Coefficients) -> Tensor:
    """The same result as ``pyfeedback.functional.fa_conv2d``, without bias."""
    return _Conv2d.apply(input, weight, feedback, window, rule)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, feedback, window, rule):
        y = torch.conv2d(input, weight, None, *window)
        ctx.save_for_backward(input, weight, feedback, y if rule.reads_data else None)
        ctx.window, ctx.rule = window, rule
        return y

    @staticmethod
    def backward(ctx, grad_output):
        x, w, b, y = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], False)
        grad_input, grad_weight, _ = _products(grad_output, x, b, ctx.window, needs)
        grad_feedback = None
        if ctx.needs_input_grad[2]:
            grad_feedback = _rule_gradient(x, y, w, b, grad_weight, ctx.window, ctx.rule)
        return grad_input, grad_weight, grad_feedback, None, None


def _rule_gradient(
    x: Tensor, y: Tensor | None, w: Tensor, b: Tensor, grad_weight: Tensor, window: tuple, rule: Coefficients
) -> Tensor:
    grad = b * rule.decay if rule.decay else torch.zeros_like(b)
    if rule.self_:
        grad.add_(w, alpha=-rule.self_)
    if rule.tie:
        grad.add_(grad_weight, alpha=rule.tie)
    if rule.reads_data:
        n = rule.samples or x.shape[0]
        x, y = x[:n], y[:n]
        if rule.center:
            x, y = x - x.mean(0), y - y.mean(0)
        grad.add_(_data_terms(x, y, b, window, rule), alpha=1 / n)
    return grad


def _data_terms(x: Tensor, y: Tensor, b: Tensor, window: tuple, rule: Coefficients) -> Tensor:
    total = None
    if rule.null:
        z = _products(y, x, b, window, (True, False, False))[0]
        z.mul_(rule.null).add_(x, alpha=-rule.amp)
        total = _wgrad(z, y, b, window)
    if rule.sparse:
        e = torch.conv2d(x, b, None, *window).mul_(rule.sparse)
        if rule.amp and total is None:
            e.add_(y, alpha=-rule.amp)
        part = _wgrad(x, e, b, window)
        total = part if total is None else total.add_(part)
    return total if total is not None else _wgrad(x, y, b, window).mul_(-rule.amp)


def _wgrad(x: Tensor, y: Tensor, kernel: Tensor, window: tuple) -> Tensor:
    """wgrad(x, y)"""
    return _products(y, x, kernel, window, (False, True, False))[1]


def _products(y: Tensor, x: Tensor, kernel: Tensor, window: tuple, needs: tuple[bool, bool, bool]):
    stride, padding, dilation, groups = window
    return _backward(y, x, kernel, None, stride, padding, dilation, False, (0, 0), groups, needs)
