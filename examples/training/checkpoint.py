"""Atomic files: if the machine stops or the disk is full, the old file remains."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch


@contextmanager
def replacing(path: Path, mode: str = "wb", **options) -> Iterator[IO]:
    """Open a file for writing that replaces ``path`` once it is complete.

    Raises:
        OSError: if it cannot be written. The old file is unchanged, and no other file is left.
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
        # If a write fails, torch.save raises its own error on top of the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(f"{path} cannot be written: {cause.strerror}") from None
        raise


def save(state: dict, path: Path) -> None:
    """Write ``state``, which consists of tensors, numbers, strings and containers of these, and replace ``path``.

    Raises:
        OSError: if it cannot be written. The old file is unchanged.
    """
    with replacing(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict:
    """Load the state written by :func:`save`, on the CPU.

    Raises:
        ValueError: if the file is damaged.
        OSError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged, expected a whole checkpoint: {why}") from None
