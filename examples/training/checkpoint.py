"""Files of a run: each is either the old one or the new one, whenever the machine stops or its disk is full."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch


@contextmanager
def replacing(path: Path, mode: str = "wb", **options) -> Iterator[IO]:
    """A file to write, which takes the place of ``path`` once it is whole.

    Raises:
        OSError: it cannot be written. What was there is as it was, and nothing else is left.
    """
    unfinished = path.with_suffix(".unfinished")
    try:
        with open(unfinished, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        # Where a write fails, torch.save raises an error of its own on top of the system's.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(f"{path} cannot be written: {cause.strerror}") from None
        raise


def save(state: dict, path: Path) -> None:
    """Write ``state``, of tensors, numbers, strings and containers of these, in the place of what is there.

    Raises:
        OSError: it cannot be written; what is there stays.
    """
    with replacing(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict:
    """The state of :func:`save`, on the CPU.

    Raises:
        ValueError: the file is not whole.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged, expected a whole checkpoint: {why}") from None
