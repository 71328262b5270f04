"""How many probes estimate the gradient of a feedback weight: white noise of one receptive field each."""

import math
from typing import NamedTuple

from torch import Tensor

from pyfeedback.core.coefficients import Coefficients

NOISE_FLOOR = 0.1  # radians: the wanted noise of the angle between B and its target
MOST_NOISE = 0.3  # radians: what is accepted to save cost
MOST_COST = 0.02  # of the multiply-adds of a training step of the layer


class ProbeProblem(NamedTuple):
    """One estimate of a layer: the gradient of its feedback weight under a rule that reads probes.

    Attributes:
        weight, feedback: [G, K, d], the kernels of each group as matrices.
        probes: the number of probes.
        rule: ``center`` and ``samples`` have no effect.
        layer_index: of the layer in its model; determines the noise with the seed and the step.
    """

    weight: Tensor
    feedback: Tensor
    probes: int
    rule: Coefficients
    layer_index: int


class ProbeCount(NamedTuple):
    """The number of probes of a layer, and what it means for the angle between B and its target."""

    probes: int
    wanted: int  # without the limit of the cost
    noise_floor: float  # radians; 0 if tau is not known


def count_probes(
    probes: int | float, inputs: int, step_size: float, every: int, has_null: bool, positions: int
) -> ProbeCount:
    """The number of probes for one estimate of a layer.

    Args:
        probes: the number itself; as a float, the number relative to ``inputs``; or 0, to choose it.
        inputs: d, the number of elements of a receptive field.
        step_size: 1 / tau, the fraction of the way to the estimate that B moves in a step.
        every: steps for each estimate.
        has_null: whether the rule also multiplies the response with itself.
        positions: output positions of the batch, by which a pass of the layer is more expensive than a probe; 0 if not
            known.
    """
    if probes:
        count = wanted = probes if isinstance(probes, int) else max(1, round(probes * inputs))
    else:
        wanted, needed = (
            max(1, math.ceil(inputs * every * step_size / (2 * floor**2))) for floor in (NOISE_FLOOR, MOST_NOISE)
        )
        # A training step has three passes, and a probe two products, or four with null.
        limit = MOST_COST * every * 3 * positions / (4 if has_null else 2)
        count = min(wanted, max(needed, math.floor(limit))) if positions else wanted
    return ProbeCount(count, wanted, math.sqrt(inputs * every * step_size / (2 * count)))
