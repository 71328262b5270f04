"""Centering over the batch, composed of PyTorch's own kernels."""

from torch import Tensor

from pyfeedback.core.tensors import acc_dtype


def center(input: Tensor, samples: int) -> Tensor:
    """input[:samples] minus its mean over dimension 0; both are computed in float32 or float64."""
    return _minus_mean(input[:samples]).to(input.dtype)


def add_centered_(self: Tensor, input: Tensor, beta: float, alpha: float) -> None:
    """self = beta * self + alpha * (input minus its mean over dimension 0), in float32 or float64 and rounded once."""
    centered = _minus_mean(input)
    self.copy_(self.to(centered.dtype).mul(beta).add_(centered, alpha=alpha))


def _minus_mean(x: Tensor) -> Tensor:
    wide = x.to(acc_dtype(x.dtype))
    return wide.sub(wide.mean(0, keepdim=True))
