"""Checkpoints: a file is either the old one or the new one, whenever the machine stops."""

import io
import os
import pickle
from pathlib import Path

import torch


def save(state: dict, path: Path) -> None:
    """Write ``state``, of tensors, numbers, strings and containers of these, in the place of what is there.

    Raises:
        OSError: the file cannot be written, on a full disk for example; what was there before stays.
    """
    contents = io.BytesIO()  # torch.save hides an error of the disk behind one of its own
    torch.save(state, contents)
    unfinished = path.with_suffix(".unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(contents.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} was not written, {error.strerror}: what was there before stays") from error


def load(path: Path) -> dict:
    """The state of :func:`save`, on the CPU.

    Raises:
        ValueError: the file is not a whole checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, expected a whole checkpoint: remove it to start again") from error
