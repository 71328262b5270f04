"""Inputs of the models of the zoo; see zoo.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CLASSES, BATCH, LENGTH, WORDS = 5, 4, 8, 40

Made = tuple[nn.Module, dict[str, Any]]  # a model, and its inputs by keyword


def image(size: int = 32, channels: int = 3) -> torch.Tensor:
    """A batch of images."""
    return torch.randn(BATCH, channels, size, size)


def video(frames: int = 8, size: int = 32) -> torch.Tensor:
    """A batch of videos."""
    return torch.randn(BATCH, 3, frames, size, size)


def tokens(length: int = LENGTH) -> torch.Tensor:
    """A batch of token numbers, without the first few, which are special in some models."""
    return torch.randint(5, WORDS, (BATCH, length))


class Positional(nn.Module):
    """A model whose only input may have any name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)
