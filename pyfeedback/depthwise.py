"""The backward of depthwise and grouped convolutions by the compiled kernel: every gradient from one read.

The mathematics and the measurements stand in docs/depthwise.md.
"""

import torch
from torch import Tensor

from pyfeedback import aten
from pyfeedback.aten.backward import laid_out_like
from pyfeedback.aten.center import wide_dtype
from pyfeedback.forms import Coefficients, Window, reads_data


def takes(input: Tensor, weight: Tensor, window: Window, only_faster: bool = False) -> bool:
    """True for a layer of more than one group with something to compute and an input that is dense in memory.

    Args:
        only_faster: and of a kind that was measured faster than PyTorch's own kernels (docs/depthwise.md).
    """
    dense = input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last)
    if window.groups == 1 or not dense or 0 in (*input.shape, *weight.shape):
        return False
    return not only_faster or _is_faster(input, weight)


def _is_faster(input: Tensor, weight: Tensor) -> bool:
    """Depthwise, and a kernel of 5x5 or larger, or of 3x3 on a large map in contiguous memory."""
    if weight.shape[1] > 1:
        return False
    taps, positions = (t.shape[2] * t.shape[3] for t in (weight, input))
    return taps >= 25 or (taps >= 9 and positions >= 48 * 48 and input.is_contiguous())


def saves_response(input: Tensor, bias: Tensor | None, rule: Coefficients) -> bool:
    """True where the forward's output is the response and the backward will read it."""
    return bias is None and _reads_response(input, rule)


def _reads_response(input: Tensor, rule: Coefficients) -> bool:
    """On CPUs it is computed again, in the cache."""
    return input.device.type != "cpu" and rule.null != 0


def conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    window: Window,
    rule: Coefficients,
    mask,
    *,
    only_faster: bool = False,
):
    """As :func:`pyfeedback.aten.conv2d_backward`, which does what :func:`takes` leaves."""
    if not takes(input, weight, window, only_faster):
        return aten.conv2d_backward(grad_output, input, weight, feedback, response, window, rule, mask)
    n = rule.samples or input.shape[0]
    mean = response_mean = None
    learns = mask[2] and reads_data(rule)
    if not (learns and _reads_response(input, rule)):
        response = None
    elif response is None:
        response = torch.conv2d(input, weight, None, *window)
    if learns and rule.center:
        mean = _mean(input, n)
        response_mean = None if response is None else _mean(response, n)
    grads = torch.ops.pyfeedback.native_depthwise_backward.default(
        grad_output, input, weight.contiguous(), feedback.contiguous(), mean, response, response_mean, *window,
        list(rule[:6]), n, *mask[:4],
    )  # fmt: skip
    grad_input, grad_weight, grad_feedback, grad_bias = (
        grad if needed else None for grad, needed in zip(grads, mask, strict=False)
    )
    return grad_input, laid_out_like(grad_weight, weight), laid_out_like(grad_feedback, weight), grad_bias


def _mean(x: Tensor, samples: int) -> Tensor:
    """[1, C, H, W] of the first samples, in float32 or wider."""
    return x[:samples].mean(0, keepdim=True, dtype=wide_dtype(x.dtype))
