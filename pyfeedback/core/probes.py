"""How many probes estimate the gradient of a feedback weight: white noise of one receptive field each."""

import math
from functools import cache
from typing import NamedTuple

from torch import Tensor

from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.hadamard import basis_factors, basis_size, paley_rows

NOISE_FLOOR = 0.1  # radians: the wanted noise of the angle between B and its target
MOST_NOISE = 0.3  # radians: what is accepted to save cost
MOST_COST = 0.02  # of the multiply-adds of a training step of the layer


class Part(NamedTuple):
    """Orthogonal probes for one estimate: ``start`` to ``stop`` of a basis that the estimates of a sweep share.

    Attributes:
        draw: the number of the sweep.
        scale: of the probes. Parts may differ by one probe; with it, all probes have the same weight in a sweep.
        power: of two, the order of Sylvester's factor of the basis.
        paley: the rows of the other factor, as :func:`pyfeedback.core.hadamard.paley_rows` returns them.
    """

    draw: int
    start: int
    stop: int
    scale: float
    power: int
    paley: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether these are all probes of the basis."""
        return self.stop - self.start == len(self.paley) << self.power


class ProbeProblem(NamedTuple):
    """One estimate of a layer: the gradient of its feedback weight under a rule that reads probes.

    Attributes:
        weight, feedback: [G, K, d], the kernels of each group as matrices.
        probes: the number of probes.
        rule: ``center`` and ``samples`` have no effect.
        layer_index: of the layer in its model; determines the noise with the seed and the step.
        part: which of a basis the probes are; None if they are independent.
    """

    weight: Tensor
    feedback: Tensor
    probes: int
    rule: Coefficients
    layer_index: int
    part: Part | None = None


class ProbeCount(NamedTuple):
    """The number of probes of a layer, and what it means for the angle between B and its target.

    Attributes:
        probes: of one estimate.
        wanted: the number without the limit of the cost.
        noise_floor: of the angle, in radians; 0 if tau is not known.
        sweep: the estimates in which orthogonal probes go through their basis once; 0 if they are independent.
        reach: the part of the step to the target that a rule with sparse makes, 1 unless the probes are too few for it.
    """

    probes: int
    wanted: int
    noise_floor: float
    sweep: int = 0
    reach: float = 1.0


def part_of(count: ProbeCount, inputs: int, estimate: int) -> Part | None:
    """The probes of the estimate with this number, counted from 0; None if they are independent."""
    if not count.sweep:
        return None
    size = basis_size(inputs)
    draw, place = divmod(estimate, count.sweep)
    start, stop = size * place // count.sweep, size * (place + 1) // count.sweep
    order, power = basis_factors(size)
    return Part(draw, start, stop, math.sqrt((stop - start) * count.sweep / size), power, paley_rows(order))


def count_probes(
    probes: int | float,
    inputs: int,
    step_size: float,
    every: int,
    has_null: bool,
    positions: int,
    orthogonal: bool = False,
    has_sparse: bool = False,
) -> ProbeCount:
    """The number of probes for one estimate of a layer.

    With sparse, B is compared with W along the probes, and has no noise. The number is such that the step along each of
    them is a whole one: B is copied from W along every direction once in tau steps.

    Args:
        probes: the number itself; as a float, the number relative to ``inputs``; or 0, to choose it.
        inputs: d, the number of elements of a receptive field.
        step_size: 1 / tau, the fraction of the way to the estimate that B moves in a step.
        every: steps for each estimate.
        has_null: whether the rule also multiplies the response with itself.
        positions: output positions of the batch, by which a pass of the layer is more expensive than a probe; 0 if not
            known.
        orthogonal: whether the probes of consecutive estimates are orthogonal.
        has_sparse: whether the rule compares the responses of B and W, as aa does.
    """
    if not inputs:
        return ProbeCount(0, 0, 0.0)
    share = min(1.0, every * step_size)  # of the way to an estimate
    if has_sparse:
        return _count_compared(probes, inputs, share, orthogonal)
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
    return ProbeCount(-(-size // sweep), min(wanted, size), _sweep_noise(sweep, share, inputs), sweep)


def _count_compared(probes: int | float, inputs: int, share: float, orthogonal: bool) -> ProbeCount:
    """The number of probes for a rule that compares the responses of B and W.

    A step is limited to the one that reduces the mean square of W - B most: M / n with orthogonal probes, where it is
    exact along each of them, and M / (M + d) with independent ones.
    """
    size = basis_size(inputs) if orthogonal else inputs
    count = wanted = max(1, math.ceil(size * share))
    if probes:
        count = wanted = probes if isinstance(probes, int) else max(1, round(probes * inputs))
    sweep = 0
    if orthogonal:
        sweep = -(-size // min(count, size))
        count, wanted = -(-size // sweep), min(wanted, size)
    longest = 1 / sweep if sweep else count / (count + inputs)
    return ProbeCount(count, wanted, 0.0, sweep, min(1.0, longest / share) if share else 1.0)


def _least(floor: float, inputs: int, share: float, orthogonal: bool) -> int:
    """The least number of probes with this noise."""
    if not orthogonal:
        return max(1, math.ceil(inputs * share / (2 * floor**2)))
    size = basis_size(inputs)
    sweep = min(math.floor(_longest_sweep(floor * math.sqrt(size / inputs)) / share) if share else size, size)
    while sweep > 1 and _sweep_noise(sweep, share, inputs) > floor:
        sweep -= 1
    return -(-size // max(1, sweep))


def _sweep_noise(sweep: int, share: float, inputs: int) -> float:
    """The noise of the angle in radians, as a root mean square over the steps.

    The estimate of j steps ago has a weight of (1 - share)^j. Each direction has one of these weights in every sweep,
    and none yet, perhaps, in the current one. Sweeps are independent. The noise is the standard deviation of the sum of
    a direction's weights, relative to the mean. The part d / n of it is in the d columns of the basis that are used.
    """
    if sweep == 1 or not share:
        return 0.0
    kept, length = 1 - share, sweep * share
    variance = length / (1 + kept) - 1 + 2 * kept * (1 - kept**sweep) / (length * (1 + kept))
    return math.sqrt(max(0.0, variance) * inputs / basis_size(inputs))


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
