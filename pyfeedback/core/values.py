"""Checks of single values. Each error is one line: the argument, its value, and what was expected.

A wrong type raises TypeError, a wrong value ValueError. NumPy numbers are valid where Python numbers of the same kind
are. Flags are not numbers.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


def describe(value: Any) -> str:
    """A short description of a value on one line: a number or string itself, the type of anything else."""
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple) and value and all(isinstance(v, (int, float, str, tuple)) for v in value):
        return repr(value)
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    shape = getattr(value, "shape", None)
    return f"a {name} of shape {shape}" if isinstance(shape, tuple) else f"a {name}"


def is_int(value: Any) -> bool:
    """Whether ``value`` is an integer, including symbolic ones of a compiler."""
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number, including symbolic ones of a compiler."""
    return isinstance(value, (Real, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)


def check_int(name: str, value: Any, least: int = 0) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if not is_int(value):
        raise TypeError(f"{name} is {describe(value)}, expected an int of {least} or more")
    if value < least:
        raise ValueError(f"{name} is {value}, expected {least} or more")


def check_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number."""
    if not is_number(value):
        raise TypeError(f"{name} is {describe(value)}, expected a finite number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a finite number")


def check_positive(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    if not is_number(value) or not 0 < value < math.inf:
        kind = ValueError if is_number(value) else TypeError
        raise kind(f"{name} is {describe(value)}, expected a finite number above 0")


def check_flag(name: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {describe(value)}, expected True or False")


def check_callable(name: str, value: Any, what: str) -> None:
    """Raise unless ``value`` is callable."""
    if not callable(value):
        raise TypeError(f"{name} is {describe(value)}, expected {what}")


def check_model(value: Any) -> None:
    """Raise unless ``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"model is {describe(value)}, expected a torch.nn.Module")


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the strings ``known``."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {describe(value)}, expected one of {', '.join(known)}")


def refuse_non_tensor(name: str, value: Any) -> NoReturn:
    """Raise for a value that is not a tensor."""
    raise TypeError(f"{name} is {describe(value)}, expected a tensor")
