"""The backward of a feedback layer, composed of PyTorch's own kernels.

The rule's gradient is written once, in terms of the products of :mod:`pyfeedback.core.geometry`. Notation: x is the
input, y = conv(x, W) the response without bias, B the feedback weight, and n the number of samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyfeedback.backends.composite.centered_factors import (
    LARGE,
    centered,
    centered_factor,
    centered_gram,
    centered_products,
    combined,
    responds_to_centered,
)
from pyfeedback.backends.composite.normalized import normalized_gradient
from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.call import Gradients, LayerCall
from pyfeedback.core.geometry import LINEAR
from pyfeedback.core.tensors import CPU_HAS_BFLOAT16, acc_dtype, blend, match_strides

KERNEL_BLOCK = 2**20  # elements
IMPLEMENTED = frozenset({"decay", "amp", "null", "sparse", "self_", "tie", "normalize"})  # coefficients, options

Scaled = tuple[Tensor, float]  # a product, and the factor to multiply it by


def backward(
    call: LayerCall, grad_output: Tensor, input: Tensor, weight: Tensor, feedback: Tensor, response: Tensor | None
) -> Gradients:
    """The gradients of input, weight, feedback and bias; None if the mask of the call is False."""
    need_input, need_weight, need_feedback, need_bias = call.mask
    rule = call.rule
    geometry, x = call.geometry.dense(input, weight.shape)
    needs = (need_input, need_weight or (need_feedback and rule.tie != 0), need_bias)
    grad_input = grad_weight = grad_bias = grad_feedback = None
    if True in needs:
        grad_input, grad_weight, grad_bias = geometry.backward(grad_output, x, feedback, needs)
    if need_feedback:
        dense = call if x is input else call._replace(geometry=geometry)
        grad_feedback = _feedback_gradient(dense, x, response, weight, feedback, grad_weight)
        if grad_feedback.stride() != weight.stride():
            grad_feedback = match_strides(grad_feedback, weight)
    if grad_input is not None:
        if x is not input:
            grad_input = call.geometry.scatter(grad_input, input)
        elif grad_input.stride() != input.stride():
            grad_input = match_strides(grad_input, input)
    if not need_weight or grad_weight is None:
        grad_weight = None
    elif grad_weight.stride() != weight.stride():
        grad_weight = match_strides(grad_weight, weight)
    return grad_input, grad_weight, grad_feedback, grad_bias


def _feedback_gradient(
    call: LayerCall, x: Tensor, y: Tensor | None, weight: Tensor, feedback: Tensor, grad_weight: Tensor | None
) -> Tensor:
    """dR/dB + tie * grad_weight, rounded once to the dtype of the weight."""
    rule = call.rule
    n = rule.samples or x.shape[0]
    if n == 0:
        return torch.zeros_like(weight)
    if call.algorithm is Algorithm.NONE:
        grad = blend(feedback, weight, rule.decay, rule.self_)
    else:
        if rule.samples:
            x, y = x[:n], y[:n] if y is not None else None
        grad = _data_gradient(call, x, y, weight, feedback)
        if rule.self_:
            grad = grad.add_(blend(feedback, weight, rule.decay, rule.self_))
        elif rule.decay:
            grad = grad.add_(feedback, alpha=rule.decay)
    if rule.tie and grad_weight is not None:
        grad = grad.add_(grad_weight, alpha=rule.tie)
    return grad.to(weight.dtype)


def _data_gradient(call: LayerCall, x: Tensor, y: Tensor | None, weight: Tensor, feedback: Tensor) -> Tensor:
    """The amp, null and sparse terms of dR/dB, in float32 or float64.

    float16 is computed in float32: sums over a batch exceed 65504, the largest float16, long before their mean does. So
    is bfloat16 on a CPU without it: PyTorch then adds up the weight gradients of the samples of a convolution in
    bfloat16, with an error that grows with the batch.
    """
    if x.dtype is torch.float16 or (x.dtype is torch.bfloat16 and x.is_cpu and not CPU_HAS_BFLOAT16):
        x, weight, feedback = x.float(), weight.float(), feedback.float()
        y = y.float() if y is not None else None
    if call.reads_response and call.rule.center and responds_to_centered(x, y, weight):
        x = centered(x, call)
        y, call = call.geometry.fprop(x, weight), call._replace(rule=call.rule._replace(center=False))
    elif y is None and call.reads_response:
        y = call.geometry.fprop(x, weight)
    if call.rule.normalize:
        return normalized_gradient(call, x, y, weight, feedback)
    data, scale = _DATA_TERMS[call.algorithm](call, x, y, weight, feedback)
    return (data.float() if data.itemsize == 2 else data).mul_(scale / x.shape[0])


def _direct(call: LayerCall, x: Tensor, y: Tensor, weight: Tensor, feedback: Tensor) -> Scaled:
    """wgrad(x, conv(x, sparse B - amp W)) and wgrad(null z - amp x, y), with z = conv_transpose(y, B).

    If B is close to W, the difference of two convolutions would cancel; the combined kernel is exact. The amp term is
    part of either product.
    """
    rule, geometry = call.rule, call.geometry
    if rule.sparse:
        scale = max(abs(rule.sparse), abs(rule.amp))
        x = centered(x, call)
        response = _response_to_blend(call, x, weight, feedback, rule.sparse / scale, rule.amp / scale)
        total = geometry.wgrad(x, response, weight)
        if rule.null:
            y = centered(y, call)
            total = total.add_(geometry.wgrad(geometry.dgrad(y, feedback, x), y, weight), alpha=rule.null / scale)
        return total, scale
    if not rule.null:
        if x.numel() >= LARGE and (products := centered_products(x, y, weight, call, gram=False)):
            return products[0].reshape(weight.shape), -rule.amp
        return geometry.wgrad(centered_factor(x, call), centered(y, call), weight), -rule.amp
    y = centered(y, call)
    z = geometry.dgrad(y, feedback, x)
    if abs(rule.amp) <= abs(rule.null):
        return geometry.wgrad(combined(z, 1.0, x, -rule.amp / rule.null, call), y, weight), rule.null
    return geometry.wgrad(combined(z, -rule.null / rule.amp, x, 1.0, call), y, weight), -rule.amp


def _response_to_blend(call: LayerCall, x: Tensor, weight: Tensor, feedback: Tensor, b: float, w: float) -> Tensor:
    """conv(x, b B - w W), in blocks of outputs if the kernel of a linear layer is large.

    On a CPU, a new tensor of the size of a large kernel costs more in page faults than in arithmetic.
    """
    geometry, outputs = call.geometry, weight.shape[0]
    if geometry is not LINEAR or not x.is_cpu or weight.numel() <= KERNEL_BLOCK:
        return geometry.fprop(x, blend(feedback, weight, b, w).to(x.dtype))
    response, rows = x.new_empty(*x.shape[:-1], outputs), max(1, KERNEL_BLOCK // weight.shape[1])
    for at in range(0, outputs, rows):
        part = slice(at, at + rows)
        response[..., part] = geometry.fprop(x, blend(feedback[part], weight[part], b, w).to(x.dtype))
    return response


def _input_gram(call: LayerCall, x: Tensor, y: Tensor, weight: Tensor, feedback: Tensor) -> Scaled:
    """(sparse B - amp W) G + null W G W' B, with the gram matrix G = x'x."""
    rule, wide = call.rule, acc_dtype(x.dtype)
    gram = centered_gram(x, call).to(wide)
    w, b = (t.reshape(t.shape[0], -1).to(wide) for t in (weight, feedback))
    if not rule.null:
        if not rule.sparse:
            return (w @ gram).reshape(weight.shape), -rule.amp
        return (blend(b, w, rule.sparse, rule.amp) @ gram).reshape(weight.shape), 1.0
    mixed = w @ gram
    spread = (mixed @ w.t()) @ b if w.shape[0] < w.shape[1] else mixed @ (w.t() @ b)
    total = spread.mul_(rule.null).sub_(mixed, alpha=rule.amp)
    if rule.sparse:
        total = total.add_(b @ gram, alpha=rule.sparse)
    return total.reshape(weight.shape), 1.0


def _response_gram(call: LayerCall, x: Tensor, y: Tensor, weight: Tensor, feedback: Tensor) -> Scaled:
    """null Y B - amp y'x, with the gram matrix Y = y'y."""
    rule, wide = call.rule, acc_dtype(x.dtype)
    mixed, gram = (rule.amp and centered_products(x, y, weight, call, gram=True)) or (None, None)
    if gram is None:
        y = centered(y, call)
        gram = call.geometry.gram(y)
        mixed = call.geometry.wgrad(centered_factor(x, call), y, weight) if rule.amp else None
    total = gram.to(wide) @ feedback.reshape(feedback.shape[0], -1).to(wide)
    if mixed is not None:
        total = total.sub_(mixed.reshape(total.shape), alpha=rule.amp / rule.null)
    return total.reshape(weight.shape), rule.null


# The functions that compute the data terms; y is None if the algorithm does not read it.
_DATA_TERMS: dict[Algorithm, Callable[..., Scaled]] = {
    Algorithm.DIRECT: _direct,
    Algorithm.INPUT_GRAM: _input_gram,
    Algorithm.RESPONSE_GRAM: _response_gram,
}
