"""Dtypes and layouts of tensors that several backends share."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` are kept: float32 for the 16-bit ones, itself for the others."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def laid_out_like(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """``grad`` with the strides of ``like``; the same tensor if it has them already."""
    if grad is None or grad.stride() == like.stride():
        return grad
    if grad.is_contiguous() and like.is_contiguous():  # only dimensions of size one differ
        return grad.as_strided(like.shape, like.stride())
    return torch.empty_like(like).copy_(grad)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last (2-D or 3-D) if that is the layout of ``x`` and it is not contiguous as well."""
    if not x.is_contiguous():
        for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == rank and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def blend(feedback: Tensor, weight: Tensor, b: float, w: float) -> Tensor:
    """b * B - w * W in float32 or wider, exact where b == w and B is near W."""
    wide = wide_dtype(weight.dtype)
    feedback, weight = feedback.to(wide), weight.to(wide)
    if not w:
        return feedback * b
    difference = torch.sub(feedback, weight)
    if b != 1.0:
        difference = difference.mul_(b)
    return difference if b == w else difference.add_(weight, alpha=b - w)
