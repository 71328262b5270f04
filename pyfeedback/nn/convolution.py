"""Convolutions and transposed convolutions with a feedback path, in one to three dimensions."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback.core.geometry import Convolution
from pyfeedback.core.layer_checks import check_padded
from pyfeedback.core.tensors import memory_format_of
from pyfeedback.init import Init
from pyfeedback.nn.layer import FeedbackLayer, traced_call
from pyfeedback.rules import Rule


class _ConvNd(FeedbackLayer, torch.nn.modules.conv._ConvNd):
    """Base class of the convolutions; the layer of torch.nn, which defines the arguments, is the other base class."""

    def __init__(
        self, *args, rule: str | Rule = "fa", init: Init | Callable[[Tensor], object] | None = None, **options
    ):
        super().__init__(*args, **options)
        self.attach_feedback(rule, init)

    def as_matrices(self, kernel: Tensor) -> Tensor:
        return super().as_matrices(kernel.movedim(1, -1) if self._is_channels_last() else kernel)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        if not self._is_channels_last():
            return super().from_matrices(matrices)
        outputs, channels, *window = self.weight.shape
        return matrices.reshape(outputs, *window, channels).movedim(-1, 1)

    def _is_channels_last(self) -> bool:
        return memory_format_of(self.weight) is not torch.contiguous_format


class _Conv(_ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        padding: Any = self.padding
        geometry = Convolution(self.stride, padding, self.dilation, False, self.output_padding, self.groups)
        if not torch.compiler.is_dynamo_compiling() and (recalled := self.recalled) is not None:
            output = recalled.repeat(self, geometry, input) if self.padding_mode == "zeros" else None
            if output is not None:
                return output
        if not isinstance(input, Tensor):
            return traced_call(self, (input,), {})
        feedback = self.enter()
        if feedback is None:
            return super().forward(self.detach_input(input))
        if isinstance(padding, str) or self.padding_mode != "zeros":
            check_padded(input, self.weight)
            input, padding = _pad(input, self.padding_mode, self._reversed_padding_repeated_twice)
            return self.run(geometry._replace(padding=padding), input, self.weight, feedback, self.bias)
        return self.run_and_recall(geometry, input, feedback)


class _ConvTranspose(_ConvNd, torch.nn.modules.conv._ConvTransposeNd):
    padding: tuple[int, ...]

    def as_matrices(self, kernel: Tensor) -> Tensor:
        return super().as_matrices(kernel).mT

    def from_matrices(self, matrices: Tensor) -> Tensor:
        return super().from_matrices(matrices.mT)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not isinstance(input, Tensor):
            return traced_call(self, (input, output_size), {})
        feedback = self.enter()
        if feedback is None:
            return super().forward(self.detach_input(input), output_size)
        sizes = self.stride, self.padding, self.kernel_size, len(self.stride), self.dilation
        extra = self._output_padding(input, output_size, *sizes)  # type: ignore[arg-type]
        geometry = Convolution(self.stride, self.padding, self.dilation, True, tuple(extra), self.groups)
        return self.run(geometry, input, self.weight, feedback, self.bias)


class Conv2d(_Conv, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` with a feedback path.

    Args:
        rule: a name of :func:`pyfeedback.rule`, or a :class:`pyfeedback.Rule`.
        init: the initialization of the feedback: a :class:`pyfeedback.Init`, or a function of torch.nn.init.
        others: as in torch.nn.Conv2d, including all padding modes.

    Shape:
        input [N, C, H, W] or [C, H, W]; output [N, K, P, Q] or [K, P, Q]; feedback [K, C/groups, R, S].
        Padding modes other than "zeros" pad the input first, so the rule uses the padded input. So does the uneven
        padding of "same" with an even kernel.

    Equivalent forward: ``torch.nn.Conv2d.forward``. Backward and rule: :func:`pyfeedback.functional.fa_conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
        *,
        rule: str | Rule = "fa",
        init: Init | Callable[[Tensor], object] | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, rule=rule, init=init,
        )  # fmt: skip


class Conv1d(_Conv, torch.nn.Conv1d):
    """``torch.nn.Conv1d`` with a feedback path [K, C/groups, R]; ``rule`` and ``init`` as in :class:`Conv2d`."""


class Conv3d(_Conv, torch.nn.Conv3d):
    """``torch.nn.Conv3d`` with a feedback path [K, C/groups, T, R, S]; ``rule`` and ``init`` as in :class:`Conv2d`."""


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with a feedback path [C, K/groups, R].

    The forward pass is a transposed convolution, so the roles are swapped: the rule's conv(x, B) is the transposed
    convolution, and its conv_transpose(y, B) the convolution. ``rule`` and ``init`` as in :class:`Conv2d`.
    """


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with a feedback path [C, K/groups, R, S], like :class:`ConvTranspose1d`."""


class ConvTranspose3d(_ConvTranspose, torch.nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with a feedback path [C, K/groups, T, R, S], like :class:`ConvTranspose1d`."""


def _pad(input: Tensor, mode: str, sides: list[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input, padded if necessary, and the padding that the op applies.

    The op applies zero padding that is equal on both sides. Any other padding is applied here. ``sides`` has the format
    of torch.nn.functional.pad: both sides of the last dimension first.
    """
    if mode == "zeros" and sides[::2] == sides[1::2]:
        return input, tuple(sides[::-2])
    return F.pad(input, sides, mode="constant" if mode == "zeros" else mode), (0,) * (len(sides) // 2)
