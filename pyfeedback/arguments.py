"""Checks of arguments: one line that names the argument, the value it had and the value expected.

Each check is one expression over the good case, so that a good call pays for little; a bad call is looked at closely
by a second function, which always raises.
"""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from pyfeedback.forms import COEFFICIENTS, Coefficients, Window, WindowNd

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_conv2d(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, window: Window) -> None:
    """Raise where these are not the tensors of a convolution, or the window is none."""
    map_shape, kernel_shape = input.shape, weight.shape  # each look at a shape makes one
    if not (
        len(map_shape) == 4
        and len(kernel_shape) == 4
        and feedback.shape == kernel_shape
        and map_shape[1] == kernel_shape[1] * window.groups
        and _consistent(input, weight, feedback, bias)
        and (bias is None or bias.shape == kernel_shape[:1])
    ):
        _refuse_tensors(input, weight, feedback, bias, rank=4, groups=window.groups)
    _check_window(map_shape, kernel_shape, window)


def check_convolution(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, window: WindowNd) -> None:
    """Raise where these are not the tensors of a convolution of any number of dimensions, or the window is none."""
    map_shape, kernel_shape, groups, transposed = input.shape, weight.shape, window.groups, window.transposed
    rank = len(kernel_shape)
    if not (
        rank >= 3
        and len(map_shape) == rank
        and feedback.shape == kernel_shape
        and map_shape[1] == (kernel_shape[0] if transposed else kernel_shape[1] * groups)
        and _consistent(input, weight, feedback, bias)
        and (bias is None or bias.shape == (kernel_shape[1] * groups if transposed else kernel_shape[0],))
    ):
        _refuse_tensors(input, weight, feedback, bias, max(rank, 3), groups, transposed)
    _check_window_nd(map_shape, kernel_shape, window)


def check_linear(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None) -> None:
    """Raise where these are not the tensors of a linear layer."""
    if not (
        input.dim() >= 2
        and weight.dim() == 2
        and weight.shape == feedback.shape
        and input.shape[-1] == weight.shape[1]
        and _consistent(input, weight, feedback, bias)
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        _refuse_tensors(input, weight, feedback, bias, rank=2, groups=1)


def check_coefficients(rule: Coefficients, batch: int) -> None:
    """Raise where a coefficient is not finite, or ``samples`` is not in 0..batch."""
    for name in COEFFICIENTS:
        value = getattr(rule, name)
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, expected a finite number")
    if not 0 <= rule.samples <= batch:
        raise ValueError(f"samples is {rule.samples}, expected 0 (all) to {batch}, the size of the batch")


def check_backward(
    grad_output: Tensor, output_shape: Sequence[int], input: Tensor, response: Tensor | None, mask: Sequence[bool]
) -> None:
    """Raise where the gradient or the response does not have the shape, dtype and device of the output."""
    for name, tensor in (("grad_output", grad_output), ("response", response)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(output_shape):
            raise ValueError(f"{name} has shape {_shape(tensor)}, expected that of the output, {tuple(output_shape)}")
        if tensor.dtype != input.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected that of input, {input.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, expected the device of input, {input.device}")
    if len(mask) != 4:
        raise ValueError(f"output_mask has {len(mask)} entries, expected 4: input, weight, feedback, bias")


def check_center(input: Tensor, samples: int) -> None:
    """Raise where there is no batch of ``samples`` to centre."""
    if input.dim() < 1 or input.dtype not in DTYPES:
        raise TypeError(f"input is {_describe(input)}, expected a floating tensor of rank 1 or more")
    if not 1 <= samples <= input.shape[0]:
        raise ValueError(f"samples is {samples}, expected 1 to {input.shape[0]}, the size of the batch")


def check_add_centered(self: Tensor, input: Tensor) -> None:
    """Raise where the two do not have one shape, dtype and device."""
    check_center(input, input.shape[0] if input.dim() else 0)
    if _describe(self) != _describe(input):
        raise ValueError(f"self is {_describe(self)}, expected that of input, {_describe(input)}")


def _consistent(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None) -> bool:
    dtype, device = input.dtype, input.device
    return (
        dtype in DTYPES
        and weight.dtype is dtype
        and feedback.dtype is dtype
        and weight.device == device
        and feedback.device == device
        and input.layout is torch.strided
        and weight.layout is torch.strided
        and feedback.layout is torch.strided
        and (bias is None or (bias.dtype is dtype and bias.device == device))
    )


def _check_window(map_shape: Sequence[int], kernel_shape: Sequence[int], window: Window) -> None:
    (sh, sw), (ph, pw), (dh, dw), groups = window
    _, _, height, width = map_shape
    out_channels, _, rows, columns = kernel_shape
    if (
        sh > 0 and sw > 0 and ph >= 0 and pw >= 0 and dh > 0 and dw > 0 and groups > 0
        and out_channels % groups == 0
        and height + 2 * ph > dh * (rows - 1) and width + 2 * pw > dw * (columns - 1)
        and rows > 0 and columns > 0
    ):  # fmt: skip
        return
    _check_window_nd(map_shape, kernel_shape, WindowNd(*window[:3], False, (0, 0), groups))
    raise AssertionError("a refused window was not found")


def _check_window_nd(map_shape: Sequence[int], kernel_shape: Sequence[int], window: WindowNd) -> None:
    stride, padding, dilation, transposed, output_padding, groups = window
    sizes, taps = tuple(map_shape[2:]), tuple(kernel_shape[2:])
    for name, numbers, least in (
        ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1), ("output_padding", output_padding, 0)
    ):  # fmt: skip
        if len(numbers) != len(sizes):
            raise ValueError(f"{name} is {numbers}, expected {len(sizes)} numbers, one for each dimension of the map")
        if min(numbers) < least:
            raise ValueError(f"{name} is {numbers}, expected {least} or more")
    if groups < 1 or kernel_shape[0] % groups:
        channels = "input" if transposed else "output"
        raise ValueError(
            f"groups is {groups}, expected a divisor of the {kernel_shape[0]} {channels} channels of weight"
        )
    if min(taps) < 1:
        raise ValueError(f"weight has shape {tuple(kernel_shape)}, expected a window of at least {_times(taps)}")
    if transposed:
        _check_transposed_sizes(sizes, taps, window)
        return
    if any(output_padding):
        raise ValueError(f"output_padding is {output_padding}, expected 0 where the convolution is not transposed")
    reach = tuple(d * (r - 1) + 1 for d, r in zip(dilation, taps, strict=True))
    padded = tuple(x + 2 * p for x, p in zip(sizes, padding, strict=True))
    if any(x < r for x, r in zip(padded, reach, strict=True)):
        raise ValueError(f"input has a padded map of {padded}, expected at least the dilated kernel's {reach}")


def _check_transposed_sizes(sizes: tuple[int, ...], taps: tuple[int, ...], window: WindowNd) -> None:
    stride, extra, dilation = window.stride, window.output_padding, window.dilation
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(f"output_padding is {extra}, expected less than stride {stride} or dilation {dilation}")
    made = window.output_shape((1, 1, *sizes), (1, 1, *taps))[2:]
    if min(made) < 1:
        raise ValueError(f"input has a map of {sizes}, expected one whose output {made} is 1 or more everywhere")


def _refuse_tensors(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None,
    rank: int,
    groups: int,
    transposed: bool = False,
) -> NoReturn:
    """Raise for the first argument that is wrong."""
    tensors = {"input": input, "weight": weight, "feedback": feedback, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.layout is not torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}, expected torch.strided")
    if input.dtype not in DTYPES:
        raise TypeError(f"input has dtype {input.dtype}, expected float64, float32, bfloat16 or float16")
    layout = {4: "4, [N, C, H, W]", 2: "2 or more, [N, ..., C]"}.get(rank, f"{rank}, [N, C, ...]")
    if input.dim() < rank or (rank > 2 and input.dim() > rank):
        raise ValueError(f"input has rank {input.dim()}, shape {_shape(input)}, expected rank {layout}")
    if weight.dim() != rank:
        layout = {4: "[K, C/groups, R, S]", 2: "[K, C]"}.get(rank, "[K, C/groups, ...]")
        raise ValueError(f"weight has rank {weight.dim()}, shape {_shape(weight)}, expected rank {rank}, {layout}")
    if feedback.shape != weight.shape:
        raise ValueError(f"feedback has shape {_shape(feedback)}, expected that of weight, {_shape(weight)}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected that of input, {input.dtype}")
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, expected the device of input, {input.device}")
    channels = input.shape[1] if rank > 2 else input.shape[-1]
    near, far = weight.shape[0], weight.shape[1] * groups
    of_groups = f"{far} = {weight.shape[1]} of weight * {groups} groups"
    if channels != (near if transposed else far):
        expected = f"{near}, the input channels of weight" if transposed else of_groups
        raise ValueError(f"input has {channels} channels, shape {_shape(input)}, expected {expected}")
    outputs = far if transposed else near
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias has shape {_shape(bias)}, expected ({outputs},), the output channels of weight")
    raise AssertionError("a refused argument was not found")


def _times(taps: tuple[int, ...]) -> str:
    return "x".join("1" for _ in taps)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _describe(tensor: Tensor) -> str:
    return f"{_shape(tensor)} {tensor.dtype} on {tensor.device}"
