"""Layers with a feedback path: the layers of torch.nn with ``.feedback`` in addition to ``.weight``, and a rule."""

import torch

from pyfeedback.nn.attention import MultiheadAttention, OutProjection
from pyfeedback.nn.convolution import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from pyfeedback.nn.layer import FeedbackLayer
from pyfeedback.nn.linear import Linear

# The layers of torch.nn that are converted, and their classes here. Subclasses may have their own forward, so they are
# not converted.
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
