"""Centering over the batch, composed of PyTorch's own kernels.

On a GPU, a kernel reads operands of 16 bits and computes in float32, so nothing is converted in memory: centering moves
6 bytes for each element of 16 bits.
"""

import torch
from torch import Tensor

from pyfeedback.core.tensors import acc_dtype


def center(input: Tensor, samples: int) -> Tensor:
    """input[:samples] minus its mean over dimension 0; both are computed in float32 or float64."""
    x = input[:samples]
    return torch.sub(x, _mean(x), out=torch.empty_like(x))


def add_centered_(self: Tensor, input: Tensor, beta: float, alpha: float) -> None:
    """self = beta * self + alpha * (input minus its mean over dimension 0), in float32 or float64 and rounded once."""
    centered = torch.sub(input, _mean(input))
    if beta == 1.0:
        torch.add(self, centered, alpha=alpha, out=self)
    else:
        torch.add(centered.mul_(alpha) if alpha != 1.0 else centered, self, alpha=beta, out=self)


def _mean(x: Tensor) -> Tensor:
    return x.mean(0, keepdim=True, dtype=acc_dtype(x.dtype))
