"""Old names, which work for one more release."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that ``old`` is deprecated; ``stacklevel`` is relative to the caller, as in warnings.warn."""
    message = f"{old} is now {new}; the old name is removed in the release after next"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


def renamed_keyword(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of functions that also accept the keyword ``new`` by its old name."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if old in kwargs and new not in kwargs:
                warn_renamed(old, new)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def renamed_attribute(old: str, new: str) -> property:
    """A property that reads the attribute ``new`` by its old name."""

    def get(self: object) -> object:
        warn_renamed(old, new)
        return getattr(self, new)

    get.__doc__ = f"The old name of ``{new}``."
    return property(get)
