"""The multi-tensor updates, composed of torch._foreach kernels and torch's own AdamW."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pyfeedback.core import step_checks
from pyfeedback.core.step_options import StepOptions

T = TypeVar("T")


@torch.no_grad()
def feedback_step_(
    feedback: Sequence[Tensor],
    weight: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    coefficients: dict[str, Sequence[float]],
    options: StepOptions,
) -> None:
    """See :func:`pyfeedback.functional.feedback_step_`. The noise is drawn by torch.randn from the seed."""
    if not feedback:
        return
    step_checks.check_step_tensors(feedback, weight, grad, momentum_buffer, coefficients, options)
    lr, momentum, nesterov, noise, seed, skip_nonfinite, dynamic = options
    decay, self_, tie = coefficients.values()
    feedback, buffers = list(feedback), list(momentum_buffer) if momentum else []
    written, backup = [*feedback, *buffers], []
    if skip_nonfinite:
        backup = [t.clone() for t in written]
    factors: Sequence[Tensor | None] = [None] * 4 if dynamic is None else dynamic[:4].unbind()
    direction = _rule_gradients(feedback, weight, grad, decay, self_, tie, factors[1:])
    if noise:
        seed += 0 if dynamic is None else int(dynamic[4])
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
    torch._foreach_add_(feedback, _scaled(direction, factors[0]), alpha=-lr)
    read = [w for w, a in zip(weight, self_, strict=False) if a] + [g for g, a in zip(grad, tie, strict=False) if a]
    if skip_nonfinite and read:
        keep = torch.stack([t.isfinite().all() for t in read]).all()  # decided on the device
        torch._foreach_copy_(written, [torch.where(keep, t, b) for t, b in zip(written, backup, strict=True)])


@torch.no_grad()
def adamw_step_(
    param: Sequence[Tensor],
    weight: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    max_exp_avg_sq: Sequence[Tensor] = (),
    *,
    step: Sequence[Tensor],
    decay: Sequence[float],
    self_: Sequence[float],
    tie: Sequence[float],
    weight_decay: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of AdamW, in place, with the gradient ``decay * param - self_ * weight + tie * grad`` of each param.

    The other arguments are those of torch.optim.AdamW and its state; amsgrad is used if ``max_exp_avg_sq`` is given.
    """
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    moments |= {"max_exp_avg_sq": max_exp_avg_sq} if max_exp_avg_sq else {}
    step_checks.check_adamw_tensors(param, weight, grad, moments, step, {"self_": self_, "tie": tie})
    stepped = {p.data_ptr() for p in param}
    gradient: list[Tensor] = list(grad) if grad else [param[0]] * len(param)
    made = [
        i
        for i, terms in enumerate(zip(decay, self_, tie, strict=True))
        if terms != (0.0, 0.0, 1.0) or gradient[i].data_ptr() in stepped  # PyTorch's kernels would read it too late
    ]
    if made:
        weight, grad = ([tensors[i] for i in made] if tensors else [] for tensors in (weight, grad))
        own = _rule_gradients(_at(made, param), weight, grad, _at(made, decay), _at(made, self_), _at(made, tie))
        for i, g in zip(made, own, strict=True):
            gradient[i] = g
    # On a CPU, the fused kernel of torch 2.13 ignores strides: it reads element i of every operand at offset i.
    operands = zip(param, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq or exp_avg, strict=True)
    alike = [len({t.stride() for t in tensors}) == 1 for tensors in operands]
    for decayed, fused in dict.fromkeys(zip(weight_decay, alike, strict=True)):
        here = [i for i, each in enumerate(zip(weight_decay, alike, strict=True)) if each == (decayed, fused)]
        adamw(
            _at(here, param), _at(here, gradient), _at(here, exp_avg), _at(here, exp_avg_sq),
            _at(here, max_exp_avg_sq) if max_exp_avg_sq else [], _at(here, step), fused=fused, foreach=not fused,
            amsgrad=bool(max_exp_avg_sq), beta1=beta1, beta2=beta2, lr=lr, weight_decay=decayed, eps=eps,
            maximize=False,
        )  # fmt: skip
        if fused:  # PyTorch's fused kernel does not bump version counters
            written = (param, exp_avg, exp_avg_sq, max_exp_avg_sq or [])
            torch.autograd.graph.increment_version([tensors[i] for tensors in written if tensors for i in here])


def _at(indices: list[int], values: Sequence[T]) -> list[T]:
    return [values[i] for i in indices]


def _rule_gradients(
    param: Sequence[Tensor],
    weight: Sequence[Tensor],
    grad: Sequence[Tensor],
    decay: Sequence[float],
    self_: Sequence[float],
    tie: Sequence[float],
    factors: Sequence[Tensor | None] = (None, None, None),
) -> list[Tensor]:
    """decay * param - self_ * weight + tie * grad, for each row."""
    gradient = _scaled(list(torch._foreach_mul(list(param), list(decay))), factors[0])
    _add_(gradient, weight, [-a for a in self_], factors[1])
    _add_(gradient, grad, tie, factors[2])
    return gradient


def _scaled(tensors: list[Tensor], factor: Tensor | None) -> list[Tensor]:
    return tensors if factor is None or not tensors else list(torch._foreach_mul(tensors, factor))


def _add_(direction: list[Tensor], tensors: Sequence[Tensor], scale: Sequence[float], factor: Tensor | None) -> None:
    """direction[i] += factor * scale[i] * tensors[i] for non-zero scale[i], since 0 * nan is nan."""
    read = [i for i, a in enumerate(scale) if a]
    if not read:
        return
    targets, values = [direction[i] for i in read], _scaled([tensors[i] for i in read], factor)
    if len({scale[i] for i in read}) == 1:
        torch._foreach_add_(targets, values, alpha=scale[read[0]])
    else:
        torch._foreach_add_(targets, torch._foreach_mul(values, [scale[i] for i in read]))
