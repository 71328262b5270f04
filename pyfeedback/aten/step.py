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
    feedback, buffers = list(feedback), list(momentum_buffer) if momentum else []
    if not feedback:
        return
    read_weight = [i for i, a in enumerate(self_) if a]
    read_grad = [i for i, a in enumerate(tie) if a]
    written, backup = [*feedback, *buffers], []
    if skip_nonfinite:
        backup = [t.clone() for t in written]
    direction = list(torch._foreach_mul(feedback, list(decay)))
    _add_(direction, weight, read_weight, [-a for a in self_])
    _add_(direction, grad, read_grad, tie)
    if noise:
        generator = torch.Generator(feedback[0].device).manual_seed(seed)
        for d in direction:
            d.add_(torch.randn(d.shape, dtype=d.dtype, device=d.device, generator=generator), alpha=noise)
    if momentum:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, direction)
        if nesterov:
            torch._foreach_add_(direction, buffers, alpha=momentum)
        else:
            direction = buffers
    torch._foreach_add_(feedback, direction, alpha=-lr)
    read = [weight[i] for i in read_weight] + [grad[i] for i in read_grad]
    if skip_nonfinite and read:
        keep = torch.stack([t.isfinite().all() for t in read]).all()  # decided on the device
        torch._foreach_copy_(written, [torch.where(keep, t, b) for t, b in zip(written, backup, strict=True)])


def _add_(direction: list[Tensor], tensors: Sequence[Tensor], read: list[int], scale: Sequence[float]) -> None:
    """direction[i] += scale[i] * tensors[i] for the indices that are read at all: 0 * nan is nan."""
    if not read:
        return
    targets, values = [direction[i] for i in read], [tensors[i] for i in read]
    if len({scale[i] for i in read}) == 1:
        torch._foreach_add_(targets, values, alpha=scale[read[0]])
    else:
        torch._foreach_add_(targets, torch._foreach_mul(values, [scale[i] for i in read]))
