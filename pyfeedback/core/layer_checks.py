"""Checks of a layer's arguments. Each error is one line: the argument, its value, and what was expected.

Each check is one expression, which is true for valid arguments, so that a valid call costs little. If it is false, a
second function finds the invalid argument and raises.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NoReturn

import torch
from torch import Tensor

from pyfeedback.core.coefficients import COEFFICIENTS, Coefficients
from pyfeedback.core.geometry import Convolution, Geometry
from pyfeedback.core.tensors import DTYPES
from pyfeedback.core.values import check_flag, check_int, check_number, describe, is_int, refuse_non_tensor

_INTS, _NUMBERS, _COUNT = frozenset((int,)), frozenset((int, float)), len(COEFFICIENTS)
_WRONG_TYPE = (AttributeError, TypeError, ValueError, IndexError)  # raised by the checks of another type of value


def check_layer(geometry: Geometry, input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None) -> None:
    """Raise unless the tensors fit a layer of this geometry and the geometry is valid."""
    try:
        x, w, dtype, device = input.shape, weight.shape, input.dtype, input.device  # each access makes an object
        if isinstance(geometry, Convolution):
            stride, padding, dilation, transposed, output_padding, groups = geometry
            rank, wide = len(stride) + 2 if stride else 3, w[1] * groups
            fits = len(x) == rank and x[1] == (w[0] if transposed else wide)
            outputs = wide if transposed else w[0]
        else:
            rank, outputs = 2, w[0]
            fits = len(x) >= 2 and x[-1] == w[1]
        good = (
            fits
            and len(w) == rank
            and feedback.shape == w
            and dtype in DTYPES
            and weight.dtype is dtype
            and feedback.dtype is dtype
            and weight.device == device
            and feedback.device == device
            and input.layout is torch.strided
            and weight.layout is torch.strided
            and feedback.layout is torch.strided
            and (
                bias is None
                or (bias.shape == (outputs,) and bias.dtype is dtype and bias.device == device
                    and bias.layout is torch.strided)
            )
        )  # fmt: skip
    except _WRONG_TYPE:
        good = False
    if not good:
        _refuse_tensors(geometry, input, weight, feedback, bias)
    if rank == 2:
        return
    try:
        # A float or bool may equal an int, but must not match the cached result of the int.
        # Dynamo ignores a cache and warns about it.
        good = (
            not torch.compiler.is_compiling()
            and type(groups) is int
            and _INTS.issuperset(map(type, (*stride, *padding, *dilation, *output_padding)))
        )
        good = good and type(transposed) is bool and _window_is_valid(geometry, x, w)
    except _WRONG_TYPE:  # among them symbolic sizes, which have no hash
        good = False
    if not good:
        _check_window(x, w, geometry)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _window_is_valid(geometry: Convolution, x: Sequence[int], kernel: Sequence[int]) -> bool:
    try:
        _check_window(x, kernel, geometry)
    except (TypeError, ValueError):
        return False
    return True


def check_lengths(geometry: Geometry, spatial: int) -> None:
    """Raise unless a convolution has one number for each of the ``spatial`` dimensions."""
    if not isinstance(geometry, Convolution):
        return
    check_flag("transposed", geometry.transposed)
    for name in ("stride", "padding", "dilation", "output_padding"):
        numbers = getattr(geometry, name)
        if spatial > 0 and len(numbers) != spatial:
            raise ValueError(f"{name} is {numbers}, expected {spatial} numbers, one for each spatial dimension")


def check_padded(input: Tensor, weight: Tensor) -> None:
    """Raise unless a layer can pad the input; the batch dimension is optional."""
    if input.dtype not in DTYPES:
        raise TypeError(f"input has dtype {input.dtype}, expected float64, float32, bfloat16 or float16")
    if input.dim() not in (weight.dim(), weight.dim() - 1):
        what = f"rank {weight.dim()}, [N, C, ...], or one less"
        raise ValueError(f"input has rank {input.dim()}, shape {_shape(input)}, expected {what}")


def check_coefficients(rule: Coefficients, input: Tensor) -> None:
    """Raise unless the coefficients are finite numbers, ``center`` is a bool and ``samples`` is in 0..batch."""
    try:
        good = (
            _NUMBERS.issuperset(map(type, rule[:_COUNT]))
            and all(map(math.isfinite, rule[:_COUNT]))
            and type(rule.center) is bool
            and type(rule.normalize) is bool
            and type(rule.samples) is int
            and 0 <= rule.samples <= input.shape[0]
        )
    except _WRONG_TYPE:
        good = False
    if not good:
        _refuse_coefficients(rule, input)


def check_scheduled(coefficients: Tensor, positions: int) -> None:
    """Raise unless the coefficients and the number of positions of a scheduled op are valid."""
    fits = len(coefficients.shape) == 1 and coefficients.shape[0] == _COUNT and coefficients.dtype is torch.float64
    if not fits or coefficients.device.type not in ("cpu", "meta"):
        raise ValueError(f"coefficients is {_describe(coefficients)}, expected ({_COUNT},) torch.float64 on cpu")
    if positions < 1:
        raise ValueError(f"positions is {positions}, expected 1 or more")


def check_mix(mixing: Tensor, feedback: Tensor, decay: float) -> None:
    """Raise unless ``mixing`` and ``feedback`` are the factors of a product and ``decay`` is a finite number."""
    if mixing.dim() != 2:
        raise ValueError(f"mixing has shape {_shape(mixing)}, expected [K, M]")
    if feedback.dim() < 2 or feedback.shape[0] != mixing.shape[1]:
        what = f"[{mixing.shape[1]}, ...], as many rows as mixing has columns"
        raise ValueError(f"feedback has shape {_shape(feedback)}, expected {what}")
    if feedback.dtype != mixing.dtype:
        raise TypeError(f"feedback has dtype {feedback.dtype}, expected that of mixing, {mixing.dtype}")
    if feedback.device != mixing.device:
        raise ValueError(f"feedback is on {feedback.device}, expected the device of mixing, {mixing.device}")
    check_number("decay", decay)


def check_backward(
    grad_output: Tensor, output_shape: Sequence[int], input: Tensor, response: Tensor | None, mask: Sequence[bool]
) -> None:
    """Raise unless the gradient and the response have the shape, dtype and device of the output."""
    for name, tensor in (("grad_output", grad_output), ("response", response)):
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}, expected torch.strided")
        if tuple(tensor.shape) != tuple(output_shape):
            raise ValueError(f"{name} has shape {_shape(tensor)}, expected that of the output, {tuple(output_shape)}")
        if tensor.dtype != input.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected that of input, {input.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, expected the device of input, {input.device}")
    if len(mask) != 4:
        raise ValueError(f"output_mask has {len(mask)} entries, expected 4: input, weight, feedback, bias")


def check_center(input: Tensor, samples: int) -> None:
    """Raise if the batch does not have ``samples`` samples to center."""
    if input.dim() < 1 or input.dtype not in DTYPES:
        raise TypeError(f"input is {_describe(input)}, expected a floating-point tensor of rank 1 or more")
    if not 1 <= samples <= input.shape[0]:
        raise ValueError(f"samples is {samples}, expected 1 to {input.shape[0]}, the size of the batch")


def check_add_centered(self: Tensor, input: Tensor) -> None:
    """Raise unless both have the same shape, dtype and device."""
    check_center(input, input.shape[0] if input.dim() else 0)
    if _describe(self) != _describe(input):
        raise ValueError(f"self is {_describe(self)}, expected that of input, {_describe(input)}")


def _check_window(x: Sequence[int], kernel: Sequence[int], geometry: Convolution) -> None:
    stride, padding, dilation, transposed, output_padding, groups = geometry
    sizes, kernel_size = tuple(x[2:]), tuple(kernel[2:])
    for name, numbers, least in (
        ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1), ("output_padding", output_padding, 0)
    ):  # fmt: skip
        if len(numbers) != len(sizes):
            raise ValueError(f"{name} is {numbers}, expected {len(sizes)} numbers, one for each spatial dimension")
        if not all(map(is_int, numbers)):
            what = f"ints of {least} or more, one number or one for each spatial dimension"
            raise TypeError(f"{name} is {_given(numbers)}, expected {what}")
        if min(numbers) < least:
            raise ValueError(f"{name} is {numbers}, expected {least} or more")
    if not is_int(groups):
        check_int("groups", groups, least=1)
    if groups < 1 or kernel[0] % groups:
        channels = "input" if transposed else "output"
        raise ValueError(f"groups is {groups}, expected a divisor of the {kernel[0]} {channels} channels of weight")
    if min(kernel_size) < 1:
        raise ValueError(f"weight has shape {tuple(kernel)}, expected a kernel of at least {_times(kernel_size)}")
    if transposed:
        _check_transposed_sizes(sizes, kernel_size, geometry)
        return
    if any(output_padding):
        raise ValueError(f"output_padding is {output_padding}, expected 0 for a convolution that is not transposed")
    reach = tuple(d * (r - 1) + 1 for d, r in zip(dilation, kernel_size, strict=True))
    padded = tuple(x + 2 * p for x, p in zip(sizes, padding, strict=True))
    if any(x < r for x, r in zip(padded, reach, strict=True)):
        raise ValueError(f"input has a padded size of {padded}, expected at least {reach}, that of the dilated kernel")


def _check_transposed_sizes(sizes: tuple[int, ...], kernel_size: tuple[int, ...], geometry: Convolution) -> None:
    stride, extra, dilation = geometry.stride, geometry.output_padding, geometry.dilation
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(f"output_padding is {extra}, expected less than stride {stride} or dilation {dilation}")
    made = geometry.output_shape((1, 1, *sizes), (1, 1, *kernel_size))[2:]
    if min(made) < 1:
        raise ValueError(f"input has a size of {sizes} and the output would have {made}, expected 1 or more")


def _refuse_tensors(
    geometry: Geometry, input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None
) -> NoReturn:
    """Raise for the first invalid argument."""
    rank, transposed, groups = 2, False, geometry.groups
    if isinstance(geometry, Convolution):
        rank, transposed = max(len(geometry.stride), 1) + 2, geometry.transposed
    tensors = {"input": input, "weight": weight, "feedback": feedback, "bias": bias}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (name != "bias" or tensor is not None):
            refuse_non_tensor(name, tensor)
    if not is_int(groups):  # otherwise the error would be about the channels
        check_int("groups", groups, least=1)
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


def _refuse_coefficients(rule: Coefficients, input: Tensor) -> None:
    """Raise for the first invalid coefficient; NumPy numbers and a compiler's symbolic numbers are valid."""
    for name in COEFFICIENTS:
        check_number(name, getattr(rule, name))
    check_flag("center", rule.center)
    check_flag("normalize", rule.normalize)
    if not isinstance(input, Tensor):
        refuse_non_tensor("input", input)
    if input.dim() == 0:  # its rank is refused later
        return
    expected = f"0 (all) to {input.shape[0]}, the size of the batch"
    if not is_int(rule.samples):
        raise TypeError(f"samples is {describe(rule.samples)}, expected an int, {expected}")
    if not 0 <= rule.samples <= input.shape[0]:
        raise ValueError(f"samples is {rule.samples}, expected {expected}")


def _given(numbers: tuple) -> str:
    """A description of the numbers, or of the single object that was given for all dimensions."""
    first = numbers[0]
    alone = all(n is first for n in numbers) and not isinstance(first, (int, float, tuple))
    return describe(first if alone else numbers)


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join("1" for _ in sizes)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _describe(tensor: Tensor) -> str:
    return f"{_shape(tensor)} {tensor.dtype} on {tensor.device}"
