"""How many probes estimate the gradient of a feedback weight: white noise of one receptive field each."""

import math
from functools import cache
from typing import NamedTuple

NOISE_FLOOR = 0.1  # radians: the wanted noise of the angle between B and its target
MOST_NOISE = 0.3  # radians: what is accepted to save cost
MOST_COST = 0.02  # of the multiply-adds of a training step of the layer


class ProbeCount(NamedTuple):
    """The number of probes of a layer, and what it means for the angle between B and its target."""

    probes: int
    wanted: int  # without the limit of the cost
    noise_floor: float  # radians; 0 if tau is not known
    sweep: int = 0  # the estimates in which orthogonal probes go through their basis once


def basis_size(inputs: int) -> int:
    """The number of orthogonal probes for d inputs: the least number below 64, times a power of two, that suffices."""
    power = max(0, (inputs - 1).bit_length() - 6)
    return -(-inputs >> power) << power


def count_probes(
    probes: int | float,
    inputs: int,
    step_size: float,
    every: int,
    has_null: bool,
    positions: int,
    orthogonal: bool = False,
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
        orthogonal: whether the probes of consecutive estimates are orthogonal.
    """
    share = every * step_size  # of the way to an estimate
    if probes:
        count = wanted = probes if isinstance(probes, int) else max(1, round(probes * inputs))
    else:
        wanted, needed = (_least(floor, inputs, share, orthogonal) for floor in (NOISE_FLOOR, MOST_NOISE))
        # A training step has three passes, and a probe two products, or four with null.
        limit = MOST_COST * every * 3 * positions / (4 if has_null else 2)
        count = min(wanted, max(needed, math.floor(limit))) if positions else wanted
    if not orthogonal:
        return ProbeCount(count, wanted, math.sqrt(inputs * share / (2 * count)))
    size = basis_size(inputs)
    sweep = -(-size // min(count, size))
    return ProbeCount(-(-size // sweep), min(wanted, size), _sweep_noise(sweep, share), sweep)


def _least(floor: float, inputs: int, share: float, orthogonal: bool) -> int:
    """The least number of probes with this noise."""
    if not orthogonal:
        return max(1, math.ceil(inputs * share / (2 * floor**2)))
    size = basis_size(inputs)
    sweep = min(math.floor(_longest_sweep(floor) / share) if share else size, size)
    while sweep > 1 and _sweep_noise(sweep, share) > floor:
        sweep -= 1
    return -(-size // max(1, sweep))


def _sweep_noise(sweep: int, share: float) -> float:
    """The noise of the angle in radians, as a root mean square over the steps.

    The estimate of j steps ago has a weight of (1 - share)^j. Each direction has one of these weights in every sweep,
    and none yet, perhaps, in the current one. Sweeps are independent. The noise is the standard deviation of the sum of
    a direction's weights, relative to the mean.
    """
    if sweep == 1 or not share:
        return 0.0
    kept, length = 1 - share, sweep * share
    return math.sqrt(max(0.0, length / (1 + kept) - 1 + 2 * kept * (1 - kept**sweep) / (length * (1 + kept))))


@cache
def _longest_sweep(floor: float) -> float:
    """The length of a sweep relative to tau at which the noise is ``floor``, for many estimates in a sweep.

    It is the root of a / 2 - 1 + (1 - exp(-a)) / a = floor^2.
    """
    low, high = 0.0, 2 * (1 + floor**2)
    for _ in range(60):
        middle = (low + high) / 2
        noise = math.sqrt(max(0.0, middle / 2 - 1 - math.expm1(-middle) / middle))
        low, high = (low, middle) if noise > floor else (middle, high)
    return low
