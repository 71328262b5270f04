"""The "aten" provider: every op composed of PyTorch's own kernels, on any device."""

from pyfeedback.aten.alignment import alignment_products
from pyfeedback.aten.backward import (
    conv2d_backward,
    conv2d_saves_response,
    convolution_backward,
    convolution_saves_response,
    linear_backward,
    linear_saves_response,
)
from pyfeedback.aten.center import add_centered_, center
from pyfeedback.aten.step import adamw_step_, feedback_step_

__all__ = [
    "adamw_step_",
    "add_centered_",
    "alignment_products",
    "center",
    "conv2d_backward",
    "conv2d_saves_response",
    "convolution_backward",
    "convolution_saves_response",
    "feedback_step_",
    "linear_backward",
    "linear_saves_response",
]
