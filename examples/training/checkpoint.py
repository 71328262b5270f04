"""Checkpoints: a file is either the old one or the new one, whenever the machine stops."""

import os
from pathlib import Path

import torch


def save(state: dict, path: Path) -> None:
    """Write ``state``, of tensors, numbers, strings and containers of these, in the place of what is there."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load(path: Path) -> dict:
    """The state of :func:`save`, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)
