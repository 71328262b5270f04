"""Layers with a feedback path: torch.nn's own, with ``.feedback`` beside ``.weight`` and a rule."""

import torch

from pyfeedback.nn.attention import MultiheadAttention, OutProjection
from pyfeedback.nn.convolution import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from pyfeedback.nn.layer import FeedbackLayer
from pyfeedback.nn.linear import Linear

# The layers of torch.nn that convert, and what they become. Subclasses of them do not: their forward is their own.
LAYERS: dict[type, type] = {
    torch.nn.Conv1d: Conv1d,
    torch.nn.Conv2d: Conv2d,
    torch.nn.Conv3d: Conv3d,
    torch.nn.ConvTranspose1d: ConvTranspose1d,
    torch.nn.ConvTranspose2d: ConvTranspose2d,
    torch.nn.ConvTranspose3d: ConvTranspose3d,
    torch.nn.Linear: Linear,
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.modules.linear.NonDynamicallyQuantizableLinear: OutProjection,
}

__all__ = [*sorted(layer.__name__ for layer in LAYERS.values()), "FeedbackLayer"]
