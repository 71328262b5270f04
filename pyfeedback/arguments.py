"""Checks of arguments: one line that names the argument, the value it had and the value expected.

Each check is one expression over the good case, so that a good call pays for little; a bad call is looked at closely
by a second function, which always raises.
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyfeedback.forms import COEFFICIENTS, Coefficients, Window, WindowNd
from pyfeedback.values import check_flag, check_int, check_number, in_words, is_int, refuse_no_tensor

_NUMBERS = frozenset((int, float))
_NOT_OF_THE_KIND = (AttributeError, TypeError, ValueError, IndexError)  # what a check of another kind of value raises
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_conv2d(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, window: Window) -> None:
    """Raise where these are not the tensors of a convolution, or the window is none."""
    try:
        map_shape, kernel_shape = input.shape, weight.shape  # each look at a shape makes one
        good = (
            len(map_shape) == 4
            and len(kernel_shape) == 4
            and feedback.shape == kernel_shape
            and map_shape[1] == kernel_shape[1] * window.groups
            and _consistent(input, weight, feedback, bias)
            and (bias is None or bias.shape == kernel_shape[:1])
        )
    except _NOT_OF_THE_KIND:
        good = False
    if not good:
        _refuse_tensors(input, weight, feedback, bias, 4, window.groups)
    _check_window(map_shape, kernel_shape, window)


def check_convolution(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, window: WindowNd) -> None:
    """Raise where these are not the tensors of a convolution of any number of dimensions, or the window is none."""
    groups, transposed = window.groups, window.transposed
    check_flag("transposed", transposed)
    try:
        map_shape, kernel_shape = input.shape, weight.shape
        rank = len(kernel_shape)
        good = (
            rank >= 3
            and len(map_shape) == rank
            and feedback.shape == kernel_shape
            and map_shape[1] == (kernel_shape[0] if transposed else kernel_shape[1] * groups)
            and _consistent(input, weight, feedback, bias)
            and (bias is None or bias.shape == (kernel_shape[1] * groups if transposed else kernel_shape[0],))
        )
    except _NOT_OF_THE_KIND:
        good = False
    if not good:
        rank = weight.dim() if isinstance(weight, Tensor) else 0
        _refuse_tensors(input, weight, feedback, bias, max(rank, 3), groups, transposed)
    _check_window_nd(map_shape, kernel_shape, window)


def check_padded(input: Tensor, weight: Tensor) -> None:
    """Raise where a layer cannot pad its input, with or without a batch."""
    if input.dtype not in DTYPES:
        raise TypeError(f"input has dtype {input.dtype}, expected float64, float32, bfloat16 or float16")
    if input.dim() not in (weight.dim(), weight.dim() - 1):
        what = f"rank {weight.dim()}, [N, C, ...], or one less"
        raise ValueError(f"input has rank {input.dim()}, shape {_shape(input)}, expected {what}")


def check_linear(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None) -> None:
    """Raise where these are not the tensors of a linear layer."""
    try:
        input_shape, kernel_shape = input.shape, weight.shape
        good = (
            len(input_shape) >= 2
            and len(kernel_shape) == 2
            and feedback.shape == kernel_shape
            and input_shape[-1] == kernel_shape[1]
            and _consistent(input, weight, feedback, bias)
            and (bias is None or bias.shape == kernel_shape[:1])
        )
    except _NOT_OF_THE_KIND:
        good = False
    if not good:
        _refuse_tensors(input, weight, feedback, bias, rank=2, groups=1)


def check_coefficients(rule: Coefficients, input: Tensor) -> None:
    """Raise where a coefficient is no finite number, ``center`` no flag, or ``samples`` not in 0..batch."""
    try:
        good = (
            _NUMBERS.issuperset(map(type, rule[:6]))
            and all(map(math.isfinite, rule[:6]))
            and type(rule.center) is bool
            and type(rule.samples) is int
            and 0 <= rule.samples <= input.shape[0]
        )
    except _NOT_OF_THE_KIND:
        good = False
    if not good:
        _look_at_coefficients(rule, input)


def coefficients_of(rule: dict[str, Any]) -> Coefficients:
    """The coefficients of a call by keywords.

    Raises:
        TypeError: a keyword is none of them.
    """
    try:
        return Coefficients(**rule)
    except TypeError:
        unknown = next(name for name in rule if name not in Coefficients._fields)
        expected = ", ".join(Coefficients._fields)
        raise TypeError(f"{unknown} is no coefficient, expected one of {expected}") from None


def check_scheduled(coefficients: Tensor, positions: int) -> None:
    """Raise where these are not the coefficients of a scheduled op."""
    fits = len(coefficients.shape) == 1 and coefficients.shape[0] == 6 and coefficients.dtype is torch.float64
    if not fits or coefficients.device.type not in ("cpu", "meta"):
        raise ValueError(f"coefficients is {_describe(coefficients)}, expected (6,) torch.float64 on cpu")
    if positions < 1:
        raise ValueError(f"positions is {positions}, expected 1 or more")


def check_mix(mixing: Tensor, feedback: Tensor, decay: float) -> None:
    """Raise where these are not the factors of a feedback that is a product."""
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
    """Raise where the gradient or the response does not have the shape, dtype and device of the output."""
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
        and (bias is None or (bias.dtype is dtype and bias.device == device and bias.layout is torch.strided))
    )


def _check_window(map_shape: Sequence[int], kernel_shape: Sequence[int], window: Window) -> None:
    try:
        (sh, sw), (ph, pw), (dh, dw), groups = window
        _, _, height, width = map_shape
        out_channels, _, rows, columns = kernel_shape
        if (
            type(sh) is type(sw) is type(ph) is type(pw) is type(dh) is type(dw) is type(groups) is int
            and sh > 0 and sw > 0 and ph >= 0 and pw >= 0 and dh > 0 and dw > 0 and groups > 0
            and out_channels % groups == 0
            and height + 2 * ph > dh * (rows - 1) and width + 2 * pw > dw * (columns - 1)
            and rows > 0 and columns > 0
        ):  # fmt: skip
            return
    except _NOT_OF_THE_KIND:
        pass
    _check_window_nd(map_shape, kernel_shape, WindowNd(*window[:3], False, (0, 0), window.groups))


def _check_window_nd(map_shape: Sequence[int], kernel_shape: Sequence[int], window: WindowNd) -> None:
    stride, padding, dilation, transposed, output_padding, groups = window
    sizes, taps = tuple(map_shape[2:]), tuple(kernel_shape[2:])
    for name, numbers, least in (
        ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1), ("output_padding", output_padding, 0)
    ):  # fmt: skip
        if len(numbers) != len(sizes):
            raise ValueError(f"{name} is {numbers}, expected {len(sizes)} numbers, one for each dimension of the map")
        if not all(map(is_int, numbers)):
            what = f"ints of {least} or more, one number or one for each dimension of the map"
            raise TypeError(f"{name} is {_given(numbers)}, expected {what}")
        if min(numbers) < least:
            raise ValueError(f"{name} is {numbers}, expected {least} or more")
    if not is_int(groups):
        check_int("groups", groups, least=1)
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
        if not isinstance(tensor, Tensor) and (name != "bias" or tensor is not None):
            refuse_no_tensor(name, tensor)
    if not is_int(groups):  # the error of a number that does not divide the channels names theirs
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


def _look_at_coefficients(rule: Coefficients, input: Tensor) -> None:
    """Raise for the first that is wrong; numbers of numpy and those that a compiler keeps symbolic are taken."""
    for name in COEFFICIENTS:
        check_number(name, getattr(rule, name))
    check_flag("center", rule.center)
    if not isinstance(input, Tensor):
        refuse_no_tensor("input", input)
    if input.dim() == 0:  # refused by its rank, later
        return
    expected = f"0 (all) to {input.shape[0]}, the size of the batch"
    if not is_int(rule.samples):
        raise TypeError(f"samples is {in_words(rule.samples)}, expected an int, {expected}")
    if not 0 <= rule.samples <= input.shape[0]:
        raise ValueError(f"samples is {rule.samples}, expected {expected}")


def _given(numbers: tuple) -> str:
    """What was given for each dimension; once where it was given for all of them."""
    first = numbers[0]
    alone = all(n is first for n in numbers) and not isinstance(first, (int, float, tuple))
    return in_words(first if alone else numbers)


def _times(taps: tuple[int, ...]) -> str:
    return "x".join("1" for _ in taps)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _describe(tensor: Tensor) -> str:
    return f"{_shape(tensor)} {tensor.dtype} on {tensor.device}"
