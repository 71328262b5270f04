"""The backward of a 2-D convolution whose weight gradients are matrix products: another composition, for CPUs.

It differs from `layer.py` only in the weight gradients: that of W, and those in the terms of the rules. Whether it is
faster than PyTorch's own (oneDNN) depends on the layer and the processor, so :func:`pyfeedback.tune` measures both for
each layer. Nothing else uses this module.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback.backends.composite import layer
from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.call import Gradients, LayerCall
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Convolution, Geometry

ELEMENTS = 2**22  # of the matrix of windows at a time: 16 MiB in float32


class Im2col(Convolution):
    """A 2-D convolution without groups, whose weight gradient multiplies y with the windows of x."""

    __slots__ = ()

    def wgrad(self, x: Tensor, y: Tensor, kernel: Tensor) -> Tensor:
        """The gradient of <conv(x, kernel), y> with respect to the kernel, in channels_last."""
        (k, c, *size), (n, _, p, q) = kernel.shape, y.shape
        (top, left), (down, right), (below, beside) = self.padding, self.stride, self.dilation
        inputs = math.prod(size) * c
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).contiguous()
        y = y.permute(0, 2, 3, 1).contiguous()
        image, row, column, _ = x.stride()
        strides = (image, down * row, right * column, below * row, beside * column, 1)
        windows = x.as_strided((n, p, q, *size, c), strides)
        images, rows = max(1, ELEMENTS // (p * q * inputs)), max(1, ELEMENTS // (q * inputs))
        matrix, total = x.new_empty(min(n, images) * min(p, rows) * q, inputs), x.new_zeros(k, inputs)
        for several, gradients in zip(windows.split(images), y.split(images), strict=True):
            for part, gradient in zip(several.split(rows, 1), gradients.split(rows, 1), strict=True):
                gradient = gradient.flatten(0, 2)
                copy = matrix[: len(gradient)]
                copy.view(part.shape).copy_(part)
                total.addmm_(gradient.t(), copy)
        return total.view(k, *size, c).permute(0, 3, 1, 2)

    def backward(self, grad_output: Tensor, x: Tensor, kernel: Tensor, mask: Sequence[bool]) -> Any:
        """dgrad, wgrad and the gradient of a bias; None if ``mask`` is False."""
        needs_input, needs_weight, needs_bias = mask
        grad_input, grad_weight, grad_bias = None, None, None
        if needs_input or needs_bias:
            grad_input, _, grad_bias = super().backward(grad_output, x, kernel, (needs_input, False, needs_bias))
        if needs_weight:
            grad_weight = self.wgrad(x, grad_output, kernel)
        return grad_input, grad_weight, grad_bias


def backward(call: LayerCall, *tensors: Tensor | None) -> Gradients:
    """See :func:`pyfeedback.backends.composite.layer.backward`."""
    return layer.backward(call._replace(geometry=Im2col(*call.geometry)), *tensors)  # type: ignore[arg-type]


def supports(geometry: Geometry, input: Tensor, weight: Tensor, rule: Coefficients, algorithm: Algorithm) -> bool:
    """Whether this is such a convolution on a CPU, in a dtype with fast matrix products."""
    if not input.is_cpu or input.dtype not in (torch.float32, torch.float64):
        return False
    return isinstance(geometry, Convolution) and geometry.is_conv2d and not geometry.is_pointwise(weight.shape)
