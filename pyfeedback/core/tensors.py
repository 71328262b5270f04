"""Functions of dtypes and memory layouts, used by several backends."""

import torch
from torch import Tensor

# Whether oneDNN computes products of bfloat16 on this processor.
CPU_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = frozenset((Tensor, torch.nn.Parameter))  # types that are no subclass with a behavior of its own


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are accumulated: float32 for 16-bit dtypes, otherwise the same."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def unsharded(tensor: Tensor) -> Tensor:
    """The full tensor if it is sharded over ranks, otherwise the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor that this rank keeps if ``like`` is sharded over ranks, without communication.

    Args:
        tensor: the same on every rank.
    """
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def match_strides(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """``grad`` with the strides of ``like``; ``grad`` itself if it already has them."""
    if grad is None or grad.stride() == like.stride():
        return grad
    if grad.is_contiguous() and like.is_contiguous():  # only dimensions of size one differ
        return grad.as_strided(like.shape, like.stride())
    return torch.empty_like(like).copy_(grad)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last (2-D or 3-D) if ``x`` has that layout and is not contiguous, otherwise contiguous."""
    if not x.is_contiguous():
        for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == rank and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def blend(feedback: Tensor, weight: Tensor, b: float, w: float) -> Tensor:
    """b * B - w * W in float32 or wider, exact where b == w and B is near W."""
    wide = acc_dtype(weight.dtype)
    feedback, weight = feedback.to(wide), weight.to(wide)
    if not w:
        return feedback * b
    difference = torch.sub(feedback, weight)
    if b != 1.0:
        difference = difference.mul_(b)
    return difference if b == w else difference.add_(weight, alpha=b - w)
