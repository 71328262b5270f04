"""Checks of the multi-tensor ops. Each error is one line: the argument, its value, and what was expected.

The compiled ops only check that memory access is safe, in a fraction of the time. These checks repeat a failed check
for a better error.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from itertools import repeat
from numbers import Real
from operator import add, attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, UntypedStorage

from pyfeedback.core import overlap
from pyfeedback.core.step_options import StepOptions
from pyfeedback.core.tensors import DTYPES, PLAIN
from pyfeedback.core.values import describe

Tensors = Sequence[Tensor]
Rows = Sequence[Any]  # tensors, or None for a row without that operand

_DTYPES, _STRIDED = set(DTYPES), {torch.strided}
_facts = attrgetter("shape", "dtype", "device", "layout")
_nbytes, _requires_grad = attrgetter("nbytes"), attrgetter("requires_grad")


def check_step_numbers(count: int, coefficients: dict[str, Sequence[float]], options: StepOptions) -> None:
    """Raise unless each of ``count`` rows has all coefficients, and every number is finite and in range."""
    lr, momentum, nesterov, noise, seed, skip_nonfinite, _ = options
    try:
        good = (
            all(len(values) == count and type(total := sum(values)) in (float, int) and math.isfinite(total)
                for values in coefficients.values())
            and all(value >= 0 and math.isfinite(value) for value in (lr, momentum, noise))
            and type(nesterov) is type(skip_nonfinite) is bool
            and type(seed) is int and -(2**63) <= seed < 2**63
        )  # fmt: skip
    except (TypeError, OverflowError, ValueError, RuntimeError):
        good = False
    if not good:
        _refuse_step_numbers(count, coefficients, options)


def check_step_tensors(
    feedback: Tensors,
    weight: Tensors,
    grad: Tensors,
    momentum_buffer: Tensors,
    coefficients: dict[str, Sequence[float]],
    options: StepOptions,
    memory: bool = True,
) -> None:
    """Raise if the tensors of a feedback step do not match or, if ``memory``, have no memory or share it."""
    read = {"weight": coefficients["self_"], "grad": coefficients["tie"]}
    dynamic, buffers = options.dynamic, momentum_buffer if options.momentum else ()
    if not options.momentum:
        _check_length("momentum_buffer", momentum_buffer, len(feedback), needed=False)
    lists = {"feedback": feedback, "weight": weight, "grad": grad, "momentum_buffer": buffers}
    operands = _operands(lists, read, optional=() if options.momentum else ("momentum_buffer",))
    written = ("feedback", "momentum_buffer")
    _check_alike(operands, written)
    if dynamic is not None and feedback:
        expected = f"(5,) torch.float64 on {feedback[0].device}"
        if not isinstance(dynamic, Tensor):
            raise TypeError(f"dynamic is {describe(dynamic)}, expected a Tensor or None")
        if _describe(dynamic) != expected or not dynamic.is_contiguous():
            raise ValueError(f"dynamic is {_describe(dynamic)}, expected contiguous {expected}")
    if memory:
        _check_memory(operands, written, {} if dynamic is None else {"dynamic": dynamic})


def check_adamw_tensors(
    param: Tensors,
    weight: Tensors,
    grad: Tensors,
    moments: dict[str, Tensors],
    step: Tensors,
    coefficients: dict[str, Sequence[float]],
) -> None:
    """Raise if the tensors of an AdamW step do not match, have no memory, or share it."""
    read = {"weight": coefficients["self_"], "grad": coefficients["tie"]}
    operands = _operands({"param": param, "weight": weight, "grad": grad, **moments}, read)
    written = ("param", *moments)
    _check_alike(operands, written)
    _check_length("step", step, len(param))
    for i, (count, like) in enumerate(zip(step, param, strict=True)):
        if not isinstance(count, Tensor) or count.dtype is not torch.float32 or count.numel() != 1:
            what = _describe(count) if isinstance(count, Tensor) else describe(count)
            raise TypeError(f"step[{i}] is {what}, expected a torch.float32 tensor with one element")
        if count.device not in (like.device, torch.device("cpu")):
            raise ValueError(f"step[{i}] is on {count.device}, expected cpu or the device of param[{i}], {like.device}")
    _check_memory({**operands, "step": step}, (*written, "step"))


def check_pairs(feedback: Tensors, weight: Tensors) -> None:
    """Raise if feedback and weight are not pairs of tensors with memory."""
    operands = _operands({"feedback": feedback, "weight": weight}, {})
    _check_alike(operands, ())
    _check_memory(operands, ())


def check_storage(name: str, tensor: Tensor) -> None:
    """Raise if the storage of ``tensor`` was freed, as FSDP does with parameters."""
    offset = tensor.storage_offset() * tensor.itemsize
    held, needed = tensor.untyped_storage().nbytes(), offset + overlap.span(tensor)
    if tensor.numel() and held < needed:
        raise ValueError(f"{name} has storage of {held} bytes, expected {needed}")


def check_in_place(lists: dict[str, Tensors]) -> None:
    """Raise if a tensor requires grad, as PyTorch's in-place ops do for a leaf: autograd would miss the write."""
    for name, tensors in lists.items():
        try:
            if not any(map(_requires_grad, tensors)):
                continue
        except (AttributeError, TypeError):  # not tensors: another check raises
            continue
        for i, tensor in enumerate(tensors):
            if tensor.requires_grad:
                kind = "leaf" if tensor.is_leaf else "tensor"
                raise RuntimeError(f"{name}[{i}] is a {kind} that requires grad, expected a step in torch.no_grad()")


def kernel_error(error: Exception) -> RuntimeError:
    """A kernel's error in one line, without the source location and the dispatcher's explanations."""
    return RuntimeError(re.sub(r"^\w+, \S+:\d+, ", "", str(error).partition("\n")[0]))


def refuse_list(name: str, tensors: object) -> NoReturn:
    """Raise for a value that is not a list, or for a list whose first element is not a tensor."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} is {describe(tensors)}, expected a list of tensors")
    raise TypeError(f"{name}[0] is {describe(tensors[0])}, expected a Tensor")


def refuse_meta(operands: dict[str, Tensor | Tensors]) -> None:
    """Raise for meta tensors, on which an op that writes or computes a gradient would silently do nothing."""
    for name, given in operands.items():
        for i, tensor in enumerate([given] if isinstance(given, Tensor) else given):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                which = name if isinstance(given, Tensor) else f"{name}[{i}]"
                raise ValueError(f"{which} is on meta, expected a device with memory")


def _operands(
    lists: dict[str, Tensors], read: dict[str, Sequence[float]], optional: Sequence[str] = ()
) -> dict[str, Rows]:
    """The lists, with None for operands that have a coefficient of 0: these are neither read nor checked."""
    rows = next(iter(lists.values()))
    operands: dict[str, Rows] = {}
    for name, tensors in lists.items():
        factors = read.get(name)
        needed = name not in optional and (factors is None or any(factors))
        _check_length(name, tensors, len(rows), needed)
        if not needed:
            continue
        if not set(map(type, tensors)) <= PLAIN:
            for i, tensor in enumerate(tensors):
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"{name}[{i}] is {describe(tensor)}, expected a Tensor")
        operands[name] = (
            tensors
            if factors is None or all(factors)
            else [t if a else None for t, a in zip(tensors, factors, strict=True)]
        )
    return operands


def _check_length(name: str, tensors: Tensors, count: int, needed: bool = True) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} is {describe(tensors)}, expected a list of tensors")
    if len(tensors) != count and (needed or len(tensors)):
        raise ValueError(
            f"{name} has {len(tensors)} tensors, expected {count}{'' if needed else ' or 0'}, one for each feedback"
        )


def _check_alike(operands: dict[str, Rows], written: Sequence[str]) -> None:
    """Raise if the operands of a row differ in shape, dtype or device, or a written operand overlaps itself."""
    (_, first), *others = operands.items()
    likes = list(map(_facts, first))  # map takes half the time of a comprehension
    _, dtypes, devices, layouts = zip(*likes, strict=True) if likes else ((), (), (), ())
    good = set(dtypes) <= _DTYPES and set(layouts) <= _STRIDED and len(set(devices)) <= 1
    for _, tensors in others:
        if type(None) not in set(map(type, tensors)):
            good = good and list(map(_facts, tensors)) == likes
        else:
            pairs = zip(tensors, likes, strict=True)
            good = good and all(tensor is None or _facts(tensor) == like for tensor, like in pairs)
    if not good:
        _refuse_unlike(operands)
    for name in written:
        tensors = operands.get(name, ())
        for i, tensor in enumerate(() if all(map(Tensor.is_contiguous, tensors)) else tensors):
            if not tensor.is_contiguous() and overlap.overlaps_itself(tensor):
                raise ValueError(
                    f"{name}[{i}] has more than one element at a memory location, shape {_shape(tensor)} and strides "
                    f"{tensor.stride()}, expected one"
                )


def _refuse_unlike(operands: dict[str, Rows]) -> NoReturn:
    """Raise for the first tensor that does not match the first list."""
    (first, likes), *others = operands.items()
    for i, like in enumerate(likes):
        if like is None:
            continue
        if like.dtype not in DTYPES or like.layout is not torch.strided:
            raise TypeError(f"{first}[{i}] is {like.dtype}, {like.layout}, expected a strided floating-point tensor")
        if like.device != likes[0].device:
            raise ValueError(f"{first}[{i}] is on {like.device}, expected the device of {first}[0], {likes[0].device}")
    for name, tensors in others:
        for i, (tensor, like) in enumerate(zip(tensors, likes, strict=True)):
            if tensor is None or like is None:
                continue
            if tensor.shape != like.shape or tensor.dtype is not like.dtype or tensor.device != like.device:
                raise ValueError(
                    f"{name}[{i}] is {_describe(tensor)}, expected the same as {first}[{i}], {_describe(like)}"
                )
            if tensor.layout is not torch.strided:
                raise TypeError(f"{name}[{i}] is {tensor.layout}, expected torch.strided")
    raise AssertionError("a refused tensor was not found")


def _check_memory(operands: dict[str, Rows], written: Sequence[str], extra: dict[str, Tensor] | None = None) -> None:
    """Raise if a tensor has no memory, or a written tensor shares memory in an unsupported way."""
    lists = {**operands, **{name: [tensor] for name, tensor in (extra or {}).items()}}
    names: list[str] = list(lists)
    begins: list[int] = []
    ends: list[int] = []
    indices: list[tuple[int, int]] = []  # (row, list) of each
    for order, (name, tensors) in enumerate(lists.items()):
        rows: Sequence[int] = range(len(tensors))
        there, sizes = tensors, list(map(_nbytes, tensors)) if set(map(type, tensors)) <= PLAIN else [0]
        if 0 in sizes:
            rows = [row for row in rows if _has_memory(tensors[row])]
            there = [tensors[row] for row in rows]
            sizes = list(map(_nbytes, there))
        storages = list(map(Tensor.untyped_storage, there))
        starts, held = list(map(UntypedStorage.data_ptr, storages)), list(map(UntypedStorage.nbytes, storages))
        if 0 in starts or held != sizes:
            for row, tensor in zip(rows, there, strict=True):
                _check_held(f"{name}[{row}]" if name in operands else name, tensor)
        begins += starts
        ends += map(add, starts, held)
        indices += zip(rows if name in operands else [-1], repeat(order))
    if not written:
        return
    if not torch.is_inference_mode_enabled():
        _refuse_inference({name: operands[name] for name in written if name in operands})

    def operand(row: int, order: int) -> overlap.Operand:
        tensor = lists[names[order]][max(row, 0)]
        assert tensor is not None
        begin = tensor.data_ptr()
        return overlap.Operand(
            begin, begin + overlap.span(tensor), row, order, names[order], tensor, names[order] in written
        )

    if overlap.are_disjoint(begins, ends):
        return
    extents = [(begin, end, *index) for begin, end, index in zip(begins, ends, indices, strict=True)]
    found = overlap.conflict(extents, operand, cache(lambda: _chains(operands)))
    if found is not None:
        _refuse_sharing(*found)


def _has_memory(tensor: Tensor | None) -> bool:
    """Whether the tensor has elements in memory; a subclass that wraps other tensors has none."""
    return tensor is not None and tensor.nbytes > 0 and (type(tensor) in PLAIN or not _wraps(type(tensor)))


@cache
def _wraps(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__


def _check_held(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        refuse_meta({name: tensor})
    check_storage(name, tensor)


def _refuse_inference(lists: dict[str, Rows]) -> None:
    """Raise for inference tensors before anything is written; PyTorch's in-place ops would raise after some writes."""
    for name, tensors in lists.items():
        if any(map(Tensor.is_inference, tensors)):
            i = next(i for i, tensor in enumerate(tensors) if tensor.is_inference())
            raise RuntimeError(f"{name}[{i}] is an inference tensor, expected a step in torch.inference_mode()")


def _refuse_sharing(later: overlap.Operand, earlier: overlap.Operand) -> None:
    stepped = next((o for o in (later, earlier) if o.order == 0), None)
    expected = "expected separate memory"
    if stepped is not None and not (later.written and earlier.written) and later.row >= 0:
        expected += f", or {stepped} updated after every row that reads it"
    raise ValueError(f"{later} shares memory with {earlier}, {expected}")


def _chains(operands: dict[str, Rows]) -> list[int]:
    """The chain of each row: element i of all rows of a chain is updated together, in the order of the rows.

    A row belongs to the chain of the row before it if both read the same weight or gradient, or if it updates the
    weight that the row before reads.
    """
    likes = next(iter(operands.values()))
    absent = [None] * len(likes)
    weights, grads = (operands.get(name, absent) for name in ("weight", "grad"))
    chains: list[int] = []
    before: int | None = None
    for i, like in enumerate(likes):
        assert like is not None
        if not like.numel():
            chains.append(-1)
            continue
        joined = before is not None and (
            overlap.is_same(weights[before], like)
            or overlap.is_same(weights[before], weights[i])
            or overlap.is_same(grads[before], grads[i])
        )
        chains.append(chains[before] if joined and before is not None else i)
        before = i
    return chains


def _refuse_step_numbers(count: int, coefficients: dict[str, Sequence[float]], options: StepOptions) -> None:
    """Raise for the first invalid number."""
    for name, values in coefficients.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} is {describe(values)}, expected a list of numbers")
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} numbers, expected {count}, one for each feedback")
        for i, value in enumerate(values):
            _check_in_range(f"{name}[{i}]", value, -math.inf)
    for name in ("lr", "momentum", "noise"):
        _check_in_range(name, getattr(options, name))
    for name in ("nesterov", "skip_nonfinite"):
        if not isinstance(getattr(options, name), bool):
            raise TypeError(f"{name} is {getattr(options, name)!r}, expected True or False")
    seed = options.seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed is {seed!r}, expected an int")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected a 64-bit integer")


def _check_in_range(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> None:
    """Raise unless ``value`` is a finite real number, at least ``least`` and less than ``most``."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {describe(value)}, expected a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int that exceeds every float
        finite = False
    if not finite or float(value) < least or float(value) >= most:
        bounds = "" if least == -math.inf else f", {least:g} or more"
        bounds += "" if most == math.inf else f" and below {most:g}"
        raise ValueError(f"{name} is {value}, expected a finite number{bounds}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _describe(tensor: Tensor) -> str:
    return f"{_shape(tensor)} {tensor.dtype} on {tensor.device}"
