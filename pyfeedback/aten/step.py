"""The multi-tensor feedback update, composed of torch._foreach kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor


def feedback_step_(
    feedback: Sequence[Tensor],
    weight: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    *,
    decay: Sequence[float],
    self_: Sequence[float],
    tie: Sequence[float],
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    noise: float = 0.0,
    seed: int = 0,
    skip_nonfinite: bool = False,
) -> None:
    """See ``pyfeedback.functional.feedback_step_``. The noise is torch's own normal stream for ``seed``."""
    feedback = list(feedback)
    if not feedback:
        return
    read_weight = [i for i, a in enumerate(self_) if a]
    read_grad = [i for i, a in enumerate(tie) if a]
    keep = None
    if skip_nonfinite:
        read = [weight[i] for i in read_weight] + [grad[i] for i in read_grad]
        keep = torch.stack([t.isfinite().all() for t in read]).all() if read else None
    direction = list(torch._foreach_mul(feedback, list(decay)))
    _add_(direction, weight, read_weight, [-a for a in self_])
    _add_(direction, grad, read_grad, tie)
    if noise:
        generator = torch.Generator(feedback[0].device).manual_seed(seed)
        for d in direction:
            d.add_(torch.randn(d.shape, dtype=d.dtype, device=d.device, generator=generator), alpha=noise)
    buffers = None
    if momentum:
        buffers = list(torch._foreach_mul(list(momentum_buffer), momentum))
        torch._foreach_add_(buffers, direction)
        direction = list(torch._foreach_add(direction, buffers, alpha=momentum)) if nesterov else buffers
    stepped = list(torch._foreach_add(feedback, direction, alpha=-lr))
    _write(feedback, stepped, keep)
    if buffers is not None:
        _write(list(momentum_buffer), buffers, keep)


def _add_(direction: list[Tensor], tensors: Sequence[Tensor], read: list[int], scale: Sequence[float]) -> None:
    """direction[i] += scale[i] * tensors[i] for the indices that are read at all: 0 * nan is nan."""
    if read:
        scaled = torch._foreach_mul([tensors[i] for i in read], [scale[i] for i in read])
        torch._foreach_add_([direction[i] for i in read], scaled)


def _write(targets: list[Tensor], values: list[Tensor], keep: Tensor | None) -> None:
    """Write the values, all of them or, where ``keep`` is False, none: decided on the device."""
    if keep is not None:
        values = [torch.where(keep, value, target) for target, value in zip(targets, values, strict=True)]
    torch._foreach_copy_(targets, values)
