"""The backward of a small layer without groups by the compiled kernel: all gradients in one call.

PyTorch's own kernels take longer to start than such a layer's products take.
"""

import torch
from torch import Tensor

from pyfeedback.backends.extension.depthwise import IMPLEMENTED as IMPLEMENTED
from pyfeedback.core.algorithm import Algorithm, pass_macs
from pyfeedback.core.call import Gradients, LayerCall
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Convolution, Geometry
from pyfeedback.core.tensors import match_strides

# Multiply-adds of a pass up to which the kernel, on one thread, was measured to be faster than PyTorch's kernels.
MOST_MACS, MOST_MACS_LINEAR = 2**17, 2**16

_backward = torch.ops.pyfeedback.extension_dense_backward.default


def supports(geometry: Geometry, input: Tensor, weight: Tensor, rule: Coefficients, algorithm: Algorithm) -> bool:
    """Whether the layer is small, 2-D or linear, with data terms, and with an input that is dense in memory."""
    if algorithm is Algorithm.NONE or 0 in input.shape or 0 in weight.shape:
        return False
    if isinstance(geometry, Convolution):
        if not geometry.is_conv2d:
            return False
        most, dense = MOST_MACS, input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last)
    else:
        most, dense = MOST_MACS_LINEAR, input.is_contiguous() and input.dim() <= 3
    return dense and pass_macs(geometry.sizes(input.shape, weight.shape, 0)) <= most


def reads_response(rule: Coefficients, device_type: str) -> bool:
    """Always False: the kernel computes the response again, in the cache."""
    return False


def backward(
    call: LayerCall, grad_output: Tensor, input: Tensor, weight: Tensor, feedback: Tensor, response: Tensor | None
) -> Gradients:
    """The gradients of a layer that :func:`supports` accepts."""
    geometry, rule, mask = call.geometry, call.rule, call.mask
    window = geometry[:3] if isinstance(geometry, Convolution) else ((1, 1), (0, 0), (1, 1))
    *coefficients, center, samples, _ = rule  # in the order of KERNEL_ORDER of depthwise.py
    need_input, need_weight, need_feedback, need_bias = mask
    grad_input, grad_weight, grad_feedback, grad_bias = _backward(
        grad_output, input, weight.contiguous(), feedback.contiguous(), *window,
        coefficients, center, samples or input.shape[0], *mask,
    )  # fmt: skip
    return (
        grad_input if need_input else None,
        match_strides(grad_weight, weight) if need_weight else None,
        match_strides(grad_feedback, weight) if need_feedback else None,
        grad_bias if need_bias else None,
    )
