"""Helpers for tests and benchmarks: layers of well-known networks, inputs, the reference in a model, peak memory."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pyfeedback import functional, reference
from pyfeedback.core.geometry import Convolution


class ConvShape(NamedTuple):
    """A convolution of a network: square input map, square kernel, and how often it occurs (``repeats``)."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    map_size: int
    repeats: int = 1
    groups: int = 1

    @property
    def geometry(self) -> Convolution:
        """The geometry, with "same" padding."""
        pad = self.kernel // 2
        return Convolution((self.stride,) * 2, (pad, pad), groups=self.groups)

    @property
    def window(self) -> tuple:
        """The geometry as arguments of ``fa_conv2d``: stride, padding, dilation, groups."""
        return *self.geometry[:3], self.groups

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass of one sample."""
        out = -(-self.map_size // self.stride)
        return out * out * self.in_channels * self.out_channels * self.kernel**2 // self.groups


def _conv(c: int, k: int, kernel: int, stride: int, map_size: int, repeats: int = 1) -> ConvShape:
    return ConvShape(f"{c}-{k}-{kernel}x{kernel}s{stride}@{map_size}", c, k, kernel, stride, map_size, repeats)


RESNET50 = (
    _conv(3, 64, 7, 2, 224),
    _conv(64, 64, 1, 1, 56),
    _conv(64, 64, 3, 1, 56, 3),
    _conv(64, 256, 1, 1, 56, 4),
    _conv(256, 64, 1, 1, 56, 2),
    _conv(256, 128, 1, 1, 56),
    _conv(128, 128, 3, 2, 56),
    _conv(256, 512, 1, 2, 56),
    _conv(128, 512, 1, 1, 28, 4),
    _conv(512, 128, 1, 1, 28, 3),
    _conv(128, 128, 3, 1, 28, 3),
    _conv(512, 256, 1, 1, 28),
    _conv(256, 256, 3, 2, 28),
    _conv(512, 1024, 1, 2, 28),
    _conv(256, 1024, 1, 1, 14, 6),
    _conv(1024, 256, 1, 1, 14, 5),
    _conv(256, 256, 3, 1, 14, 5),
    _conv(1024, 512, 1, 1, 14),
    _conv(512, 512, 3, 2, 14),
    _conv(1024, 2048, 1, 2, 14),
    _conv(512, 2048, 1, 1, 7, 3),
    _conv(2048, 512, 1, 1, 7, 2),
    _conv(512, 512, 3, 1, 7, 2),
)

RESNET18 = (
    _conv(3, 64, 7, 2, 224),
    _conv(64, 64, 3, 1, 56, 4),
    _conv(64, 128, 3, 2, 56),
    _conv(64, 128, 1, 2, 56),
    _conv(128, 128, 3, 1, 28, 3),
    _conv(128, 256, 3, 2, 28),
    _conv(128, 256, 1, 2, 28),
    _conv(256, 256, 3, 1, 14, 3),
    _conv(256, 512, 3, 2, 14),
    _conv(256, 512, 1, 2, 14),
    _conv(512, 512, 3, 1, 7, 3),
)

RESNET20_CIFAR = (
    _conv(3, 16, 3, 1, 32),
    _conv(16, 16, 3, 1, 32, 6),
    _conv(16, 32, 3, 2, 32),
    _conv(32, 32, 3, 1, 16, 5),
    _conv(32, 64, 3, 2, 16),
    _conv(64, 64, 3, 1, 8, 5),
)

# Every distinct depthwise layer of MobileNetV2, EfficientNet-B0 and ConvNeXt-T.


def _depthwise(c: int, kernel: int, stride: int, map_size: int, repeats: int = 1) -> ConvShape:
    return ConvShape(f"{c}-dw-{kernel}x{kernel}s{stride}@{map_size}", c, c, kernel, stride, map_size, repeats, c)


MOBILENET_V2 = (
    _depthwise(32, 3, 1, 112),
    _depthwise(96, 3, 2, 112),
    _depthwise(144, 3, 1, 56),
    _depthwise(144, 3, 2, 56),
    _depthwise(192, 3, 1, 28, 2),
    _depthwise(192, 3, 2, 28),
    _depthwise(384, 3, 1, 14, 4),
    _depthwise(576, 3, 1, 14, 2),
    _depthwise(576, 3, 2, 14),
    _depthwise(960, 3, 1, 7, 3),
)

EFFICIENTNET_B0 = (
    _depthwise(32, 3, 1, 112),
    _depthwise(96, 3, 2, 112),
    _depthwise(144, 3, 1, 56),
    _depthwise(144, 5, 2, 56),
    _depthwise(240, 5, 1, 28),
    _depthwise(240, 3, 2, 28),
    _depthwise(480, 3, 1, 14, 2),
    _depthwise(480, 5, 1, 14),
    _depthwise(672, 5, 1, 14, 2),
    _depthwise(672, 5, 2, 14),
    _depthwise(1152, 5, 1, 7, 3),
    _depthwise(1152, 3, 1, 7),
)

CONVNEXT_T = (
    _depthwise(96, 7, 1, 56, 3),
    _depthwise(192, 7, 1, 28, 3),
    _depthwise(384, 7, 1, 14, 9),
    _depthwise(768, 7, 1, 7, 3),
)


class ConvInputs(NamedTuple):
    """The leaf tensors of one layer call, and the gradient of its output."""

    input: Tensor
    weight: Tensor
    feedback: Tensor
    grad_output: Tensor


def conv_inputs(
    shape: ConvShape,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    memory_format: torch.memory_format = torch.channels_last,
    seed: int = 0,
) -> ConvInputs:
    """Random inputs as in a network with batch norm and ReLU: half-normal input, Kaiming weights."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device) * scale
        return values.to(dtype, memory_format=memory_format)

    c, k, r = shape.in_channels, shape.out_channels, shape.kernel
    scale = (2 / (k * r * r)) ** 0.5
    weight = normal(k, c // shape.groups, r, r, scale=scale)
    feedback = normal(k, c // shape.groups, r, r, scale=scale)
    input = normal(batch, c, shape.map_size, shape.map_size).relu_()
    grad_output = normal(*shape.geometry.output_shape(input.shape, weight.shape))
    return ConvInputs(input.requires_grad_(), weight.requires_grad_(), feedback.requires_grad_(), grad_output)


@contextmanager
def by_reference() -> Iterator[list[Tensor]]:
    """Compute the feedback layers of any model by :mod:`pyfeedback.reference` inside the block.

    Yields the list to which the layers append their regularizers: ``(loss + sum(penalties)).backward()``.
    """
    penalties: list[Tensor] = []

    def keep(found: tuple[Tensor, Tensor]) -> Tensor:
        penalties.append(found[1])
        return found[0]

    def layer(geometry, rule, input, weight, feedback, bias):
        op = reference.linear
        arguments: tuple = ()
        if isinstance(geometry, Convolution):
            op, arguments = reference.convolution, tuple(geometry)
        if isinstance(geometry, Convolution) and geometry.is_conv2d:
            op, arguments = reference.conv2d, (*geometry[:3], geometry.groups)
        return keep(op(input, weight, feedback, bias, *arguments, **rule._asdict()))

    with mock.patch.object(functional, "layer", layer):
        yield penalties


def python_calls(run: Callable[[], object]) -> list[str]:
    """List the functions of this package and its kernels that ``run`` calls, in order: "backends/dispatch.py plan"."""
    package = Path(__file__).parent
    found: list[str] = []

    def record(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and package in path.parents:
            found.append(f"{path.relative_to(package)} {frame.f_code.co_name}")

    sys.setprofile(record)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def peak_bytes(run: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Return the peak memory that ``run`` allocates through PyTorch, beyond what was allocated before, in bytes."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
