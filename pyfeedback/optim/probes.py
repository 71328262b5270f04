"""Estimates of rules that read white noise instead of data: one gradient for each feedback weight."""

import logging
import math
from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pyfeedback.backends.dispatch import current_implementation
from pyfeedback.core.probes import ProbeCount, basis_size, count_probes
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
        RuntimeError: the weight is sharded.
    """
    generators: dict[torch.device, torch.Generator] = {}
    found, noisy = {}, {}
    for b, (layer, name, (step, index)) in due.items():
        w = layer.weight.detach()
        if hasattr(w, "to_local"):
            raise RuntimeError(f"{name}.weight is sharded, expected a whole one: probes are inputs of the whole layer")
        weight, feedback = layer.as_matrices(w), layer.as_matrices(b.detach())
        probes = layer_probes(layer, step)
        if probes.noise_floor > LOUD and not layer.rule.growth and layer not in _warned:
            noisy[name] = probes
            _warned.add(layer)
        generator = generators.setdefault(w.device, torch.Generator(w.device))
        noise = _draw(probes, weight.shape[-1], w, generator, (seed, step, layer.rule.every_at(step), index))
        compute = current_implementation("probe_gradient", w.device.type)
        gradient = compute(weight, feedback, noise, layer.rule.probe_coefficients())
        found[b] = layer.from_matrices(gradient).to(b.dtype)
    if noisy:
        described = ", ".join(f"{name} {math.degrees(probes.noise_floor):.0f}" for name, probes in noisy.items())
        _log.warning(
            "the noise of the probes keeps these feedback weights at about so many degrees from their targets: %s; "
            "give the rule a larger tau or more probes", described,
        )  # fmt: skip
    return found


def _draw(
    probes: ProbeCount, inputs: int, like: Tensor, generator: torch.Generator, key: tuple[int, int, int, int]
) -> Tensor:
    """The probes [n, d] of a layer for one estimate, determined by the seed, the step, ``every`` and the layer's index.

    Orthogonal probes are a part of a basis that the estimates of a sweep share. Parts may differ by one probe; all
    probes have the same weight nevertheless.
    """
    seed, step, every, index = key
    sweep = probes.sweep
    draw, part = divmod((step + index) // every, sweep) if sweep else (step, 0)
    generator.manual_seed(((seed * 1_000_003 + draw) * 1_000_003 + index) % 2**63)
    if not sweep:
        return current_implementation("random_signs", like.device.type)(probes.probes, inputs, like, generator)
    size = basis_size(inputs)
    start, stop = size * part // sweep, size * (part + 1) // sweep
    noise = current_implementation("orthogonal_probes", like.device.type)(inputs, start, stop, like, generator)
    return noise.mul_(math.sqrt((stop - start) * sweep / size)) if size % sweep else noise


def layer_probes(layer: FeedbackLayer, step: int) -> ProbeCount:
    """Return the number of probes of a layer in this step, and the noise of its angle, for the last batch."""
    rule = layer.rule
    size, step_size = layer.as_matrices(layer.weight.detach()).shape[-1], 1 / rule.tau_at(step) if rule.tau else 0.0
    return count_probes(
        rule.probes, size, step_size, rule.every_at(step), rule.null != 0, layer.positions(), rule.orthogonal
    )
