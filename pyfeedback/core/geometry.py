"""The map from the input of a layer to its output: one type for linear layers, one for all convolutions.

Both have the same methods. Notation as in :func:`pyfeedback.functional.fa_conv2d`: x is an input, y an output,
``kernel`` a weight or a feedback weight::

    fprop(x, kernel)       conv(x, kernel)
    dgrad(y, kernel, x)    conv_transpose(y, kernel), of the size of x
    wgrad(x, y, kernel)    the gradient of <conv(x, kernel), y> with respect to the kernel
    gram(x)                x'x [C, C] over all positions
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback.core.algorithm import Sizes
from pyfeedback.core.tensors import memory_format_of

Shape = Sequence[int]

_convolution_backward = torch.ops.aten.convolution_backward.default


class Convolution(NamedTuple):
    """A convolution of any number of dimensions, or its transpose: the arguments of torch.convolution.

    x is [N, C, ...], y [N, K, ...] and a kernel [K, C/groups, ...], or [C, K/groups, ...] if ``transposed``.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0)
    groups: int = 1

    @property
    def channel(self) -> int:
        """The index of an activation's channel dimension."""
        return 1

    @property
    def is_conv2d(self) -> bool:
        """Whether this is a convolution that ``fa_conv2d`` computes."""
        return len(self.stride) == 2 and not self.transposed

    def is_pointwise(self, kernel: Shape) -> bool:
        """Whether every output position reads exactly one input position and no padding."""
        return not self.transposed and not any(self.padding) and all(size == 1 for size in kernel[2:])

    def output_shape(self, x: Shape, kernel: Shape) -> tuple[int, ...]:
        """The shape of y."""
        reach = [d * (r - 1) + 1 for d, r in zip(self.dilation, kernel[2:], strict=True)]
        spans = zip(x[2:], reach, self.stride, self.padding, self.output_padding, strict=True)
        if self.transposed:
            sizes = [(size - 1) * s - 2 * p + r + extra for size, r, s, p, extra in spans]
            return (x[0], kernel[1] * self.groups, *sizes)
        return (x[0], kernel[0], *((size + 2 * p - r) // s + 1 for size, r, s, p, _ in spans))

    def sizes(self, x: Shape, kernel: Shape, samples: int) -> Sizes:
        """The sizes that determine the cost; 0 ``samples`` are the whole batch. A transpose costs the same."""
        larger = x if self.transposed else self.output_shape(x, kernel)
        positions = (samples or x[0]) * math.prod(larger[2:])
        taps, pointwise = math.prod(kernel[2:]), self.is_pointwise(kernel)
        return Sizes(positions, kernel[1] * self.groups, kernel[0], taps, self.groups, pointwise)

    def fprop(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """conv(x, kernel) + bias"""
        return torch.convolution(x, kernel, bias, *self)

    def dgrad(self, y: Tensor, kernel: Tensor, x: Tensor) -> Tensor:
        """conv_transpose(y, kernel), of the size of x"""
        return _convolution_backward(y, x, kernel, None, *self, (True, False, False))[0]

    def wgrad(self, x: Tensor, y: Tensor, kernel: Tensor) -> Tensor:
        """The gradient of <conv(x, kernel), y> with respect to the kernel"""
        return _convolution_backward(y, x, kernel, None, *self, (False, True, False))[1]

    def gram(self, x: Tensor) -> Tensor:
        """x'x [C, C], as the weight gradient of a pointwise convolution: 2 to 3 times faster than mm on a CPU"""
        c, spatial = x.shape[1], x.dim() - 2
        square = Convolution((1,) * spatial, (0,) * spatial, (1,) * spatial, False, (0,) * spatial)
        return square.wgrad(x, x, x.new_empty(c, c, *(1,) * spatial)).reshape(c, c)

    def backward(self, grad_output: Tensor, x: Tensor, kernel: Tensor, mask: Sequence[bool]) -> Any:
        """dgrad, wgrad and the gradient of a bias; None if ``mask`` is False"""
        return _convolution_backward(grad_output, x, kernel, (grad_output.shape[1],), *self, mask)

    def skips_positions(self, kernel: Shape) -> bool:
        """Whether this is a pointwise convolution with a stride, which does not read every position."""
        return max(self.stride) > 1 and self.is_pointwise(kernel)

    def dense(self, x: Tensor, kernel: Shape) -> "tuple[Convolution, Tensor]":
        """The same layer on only the positions that it reads: a strided pointwise convolution becomes one of stride 1.

        Gram matrices need this form. It also avoids the weight gradient of a 1x1 convolution of stride 3 in
        channels_last, which corrupts the heap (torch 2.13, CPU).
        """
        if not self.skips_positions(kernel):
            return self, x
        read = self.read_positions(x).contiguous(memory_format=memory_format_of(x))
        return self._replace(stride=(1,) * len(self.stride)), read

    def scatter(self, grad: Tensor, input: Tensor) -> Tensor:
        """The gradient of ``input``, given that of the positions that are read; it is zero elsewhere."""
        scatter = torch.zeros_like(input)
        self.read_positions(scatter).copy_(grad)
        return scatter

    def read_positions(self, x: Tensor) -> Tensor:
        """A view of the positions that a pointwise convolution with this stride reads."""
        strides = (slice(None), slice(None), *(slice(None, None, step) for step in self.stride))
        return x[strides]


class Linear(NamedTuple):
    """A linear layer: x is [N, ..., C], y [N, ..., K] and a kernel [K, C]."""

    @property
    def channel(self) -> int:
        """The index of an activation's channel dimension."""
        return -1

    @property
    def groups(self) -> int:
        """Always one."""
        return 1

    def output_shape(self, x: Shape, kernel: Shape) -> tuple[int, ...]:
        """The shape of y."""
        return (*x[:-1], kernel[0])

    def sizes(self, x: Shape, kernel: Shape, samples: int) -> Sizes:
        """The sizes that determine the cost; 0 ``samples`` are the whole batch."""
        return Sizes((samples or x[0]) * math.prod(x[1:-1]), kernel[1], kernel[0])

    def fprop(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """x kernel' + bias"""
        return F.linear(x, kernel, bias)

    def dgrad(self, y: Tensor, kernel: Tensor, x: Tensor) -> Tensor:
        """y kernel"""
        return torch.matmul(y, kernel)

    def wgrad(self, x: Tensor, y: Tensor, kernel: Tensor) -> Tensor:
        """y'x"""
        return torch.mm(y.reshape(-1, y.shape[-1]).t(), x.reshape(-1, x.shape[-1]))

    def gram(self, x: Tensor) -> Tensor:
        """x'x"""
        return self.wgrad(x, x, x)

    def backward(self, grad_output: Tensor, x: Tensor, kernel: Tensor, mask: Sequence[bool]) -> Any:
        """dgrad, wgrad and the gradient of a bias; None if ``mask`` is False"""
        return (
            self.dgrad(grad_output, kernel, x) if mask[0] else None,
            self.wgrad(x, grad_output, kernel) if mask[1] else None,
            grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if mask[2] else None,
        )

    def skips_positions(self, kernel: Shape) -> bool:
        """Always False."""
        return False

    def dense(self, x: Tensor, kernel: Shape) -> "tuple[Linear, Tensor]":
        """The layer itself."""
        return self, x

    def scatter(self, grad: Tensor, input: Tensor) -> Tensor:
        """The gradient itself."""
        return grad


Geometry = Convolution | Linear
LINEAR = Linear()

Arguments = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, tuple[int, ...], int]


def to_arguments(geometry: Geometry) -> Arguments:
    """The arguments of torch.convolution for a geometry; those of a linear layer are empty, with 0 groups."""
    return tuple(geometry) if isinstance(geometry, Convolution) else ((), (), (), False, (), 0)  # type: ignore[return-value]


def from_arguments(stride, padding, dilation, transposed, output_padding, groups) -> Geometry:
    """The inverse of :func:`to_arguments`; lists become tuples."""
    if not groups and not stride:
        return LINEAR
    return Convolution(tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)
