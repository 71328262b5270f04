"""Centring a batch, composed of PyTorch's own kernels."""

import torch
from torch import Tensor


def center(input: Tensor, samples: int) -> Tensor:
    """input[:samples] minus its mean over dimension 0, the mean and the difference taken in float32 or wider."""
    x = input[:samples]
    wide = x.to(wide_dtype(x.dtype))
    return wide.sub(wide.mean(0, keepdim=True)).to(x.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` are kept: float32 for the 16-bit ones, itself for the others."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
