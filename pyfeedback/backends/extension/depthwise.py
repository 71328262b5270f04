"""The backward of depthwise and grouped convolutions by the compiled kernel, which reads its operands once.

The mathematics and the measurements are in docs/depthwise.md.
"""

import torch
from torch import Tensor

from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.call import Gradients, LayerCall
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Convolution
from pyfeedback.core.tensors import acc_dtype, match_strides

# The coefficients in the order of the op's argument, which csrc/checks/depthwise.cpp reads by position.
KERNEL_ORDER = ("decay", "amp", "null", "sparse", "self_", "tie")
IMPLEMENTED = frozenset(KERNEL_ORDER)


def supports(geometry: Convolution, input: Tensor, weight: Tensor, rule: Coefficients, algorithm: Algorithm) -> bool:
    """Whether the layer is a nonempty 2-D convolution of several groups, with an input that is dense in memory."""
    dense = input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last)
    return geometry.is_conv2d and geometry.groups > 1 and dense and 0 not in (*input.shape, *weight.shape)


def is_faster(geometry: Convolution, input: Tensor, weight: Tensor, rule: Coefficients, algorithm: Algorithm) -> bool:
    """Whether a supported layer was measured to be faster than PyTorch's kernels (docs/depthwise.md).

    These layers are depthwise, with a kernel of 5x5 or larger, or of 3x3 on a large map in contiguous memory.
    """
    if weight.shape[1] > 1 or not supports(geometry, input, weight, rule, algorithm):
        return False
    window, positions = (t.shape[2] * t.shape[3] for t in (weight, input))
    return window >= 25 or (window >= 9 and positions >= 48 * 48 and input.is_contiguous())


def reads_response(rule: Coefficients, device_type: str) -> bool:
    """Whether the backward reads the response; on a CPU, the kernel computes it again in the cache."""
    return device_type != "cpu" and rule.null != 0


def backward(
    call: LayerCall, grad_output: Tensor, input: Tensor, weight: Tensor, feedback: Tensor, response: Tensor | None
) -> Gradients:
    """The gradients of a layer that :func:`supports` accepts."""
    geometry, rule, mask = call.geometry, call.rule, call.mask
    assert isinstance(geometry, Convolution)
    n = rule.samples or input.shape[0]
    mean = response_mean = None
    learns = mask[2] and rule.reads_data
    if not call.reads_response:
        response = None
    elif response is None:
        response = geometry.fprop(input, weight)
    if learns and rule.center:
        mean = _mean(input, n)
        response_mean = None if response is None else _mean(response, n)
    grads = torch.ops.pyfeedback.extension_depthwise_backward.default(
        grad_output, input, weight.contiguous(), feedback.contiguous(), mean, response, response_mean,
        geometry.stride, geometry.padding, geometry.dilation, geometry.groups,
        [getattr(rule, name) for name in KERNEL_ORDER], n, *mask[:4],
    )  # fmt: skip
    grad_input, grad_weight, grad_feedback, grad_bias = (
        grad if needed else None for grad, needed in zip(grads, mask, strict=False)
    )
    return grad_input, match_strides(grad_weight, weight), match_strides(grad_feedback, weight), grad_bias


def _mean(x: Tensor, samples: int) -> Tensor:
    """The mean [1, C, H, W] of the first samples, in float32 or float64."""
    return x[:samples].mean(0, keepdim=True, dtype=acc_dtype(x.dtype))
