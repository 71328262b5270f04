"""Estimates of rules that read white noise instead of data: one gradient for each feedback weight."""

import logging
import math
from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pyfeedback.backends import dispatch
from pyfeedback.core.probes import ProbeCount, ProbeProblem, count_probes, part_of
from pyfeedback.core.tensors import shard_like, unsharded
from pyfeedback.nn import FeedbackLayer

LOUD = 0.5  # radians: more noise than this in the angle is reported

_log = logging.getLogger("pyfeedback")
_warned: WeakSet[FeedbackLayer] = WeakSet()

Due = Mapping[nn.Parameter, tuple[FeedbackLayer, str, tuple[int, int]]]


@torch.no_grad()
def probe_gradients(due: Due, seed: int) -> dict[nn.Parameter, Tensor]:
    """Return the gradient of the rule of each feedback weight, in its shape and dtype.

    Args:
        due: by feedback weight, the layer, its name, and the step and index that determine its noise with ``seed``.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if due and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, expected an optimizer step outside of it: replays would repeat the probes"
        )
    problems: dict[int, dict[nn.Parameter, ProbeProblem]] = {}  # by step
    found: dict[nn.Parameter, Tensor] = {}
    noisy = {}
    for b, (layer, name, (step, index)) in due.items():
        # A sharded weight is gathered: a null term reads the response of the whole layer.
        weight, feedback = (layer.as_matrices(unsharded(t.detach())) for t in (layer.weight, b))
        probes = layer_probes(layer, step)
        if probes.noise_floor > LOUD and not layer.rule.growth and layer not in _warned:
            noisy[name] = probes
            _warned.add(layer)
        part = part_of(probes, weight.shape[-1], step // layer.rule.every_at(step))
        rule = layer.rule.probe_coefficients()
        rule = rule._replace(amp=rule.amp * probes.reach, sparse=rule.sparse * probes.reach)
        problem = ProbeProblem(weight, feedback, probes.probes, rule, index, part)
        if hasattr(b, "placements"):  # one layer at a time is whole
            found |= _computed({b: problem}, due, seed, step)
        else:
            problems.setdefault(step, {})[b] = problem
    for step, of_step in problems.items():
        found |= _computed(of_step, due, seed, step)
    if noisy:
        described = ", ".join(f"{name} {math.degrees(probes.noise_floor):.0f}" for name, probes in noisy.items())
        _log.warning(
            "the noise of the probes keeps these feedback weights at about so many degrees from their targets: %s; "
            "give the rule a larger tau or more probes", described,
        )  # fmt: skip
    return found


def _computed(problems: dict[nn.Parameter, ProbeProblem], due: Due, seed: int, step: int) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of these problems, sharded like the feedback weights."""
    gradients = dispatch.probe_gradients(list(problems.values()), seed, step)
    pairs = zip(problems, gradients, strict=True)
    return {b: shard_like(due[b][0].from_matrices(gradient).to(b.dtype), b) for b, gradient in pairs}


def layer_probes(layer: FeedbackLayer, step: int) -> ProbeCount:
    """Return the number of probes of a layer in this step, and the noise of its angle, for the last batch.

    The batches of several processes may differ, but not their numbers of probes, so there the cost has no limit.
    """
    rule = layer.rule
    positions = 0 if _several_processes() else layer.positions()
    size = layer.as_matrices(torch.zeros(()).expand(layer.weight.shape)).shape[-1]  # a sharded one is not gathered
    step_size = 1 / rule.tau_at(step) if rule.tau else 0.0
    return count_probes(
        rule.probes, size, step_size, rule.every_at(step), rule.null != 0, positions, rule.orthogonal,
        has_sparse=rule.sparse != 0,
    )  # fmt: skip


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
