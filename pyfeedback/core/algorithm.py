"""The choice of the algorithm that computes the data terms of the feedback gradient: a pure function of sizes.

The amp, null and sparse terms of a layer can be computed from its response, from the response to the combined kernel
``sparse * B - amp * W`` or, if the layer is pointwise (a 1x1 convolution without padding, or linear), from the gram
matrix of its input or of its response. All are exact and differ only in cost, so the cheapest is chosen.
"""

import enum
from typing import NamedTuple

from pyfeedback.core.coefficients import Coefficients


class Sizes(NamedTuple):
    """The sizes that determine the cost of a layer; ``positions`` are those of the output, over all samples used."""

    positions: int
    in_channels: int
    out_channels: int
    taps: int = 1
    groups: int = 1
    pointwise: bool = True

    @property
    def is_product(self) -> bool:
        """Whether the layer multiplies its input by one matrix at each position."""
        return self.pointwise and self.groups == 1


class Algorithm(enum.Enum):
    """An algorithm for the data terms; y is the response conv(x, W), and z is conv_transpose(y, B)."""

    NONE = "none"  # no term reads the data
    DIRECT = "direct"  # wgrad(x, conv(x, sparse B - amp W)) and wgrad(null z - amp x, y)
    INPUT_GRAM = "input_gram"  # G = x'x: (sparse B - amp W) G + null W G W' B
    RESPONSE_GRAM = "response_gram"  # Y = y'y: null Y B - amp y'x


def algorithms(sizes: Sizes, rule: Coefficients, response_saved: bool) -> dict[Algorithm, int]:
    """The multiply-adds of each algorithm that the layer may use, in order of preference among equals.

    Args:
        response_saved: if False, the response has to be computed again, which takes one more pass.
    """
    if not rule.reads_data:
        return {Algorithm.NONE: 0}
    costs = {}
    if sizes.is_product:
        costs[Algorithm.INPUT_GRAM] = _input_gram_macs(sizes, rule)
    costs[Algorithm.DIRECT] = _direct_macs(sizes, rule, response_saved)
    if sizes.is_product and rule.null and not rule.sparse:
        costs[Algorithm.RESPONSE_GRAM] = _response_gram_macs(sizes, rule, response_saved)
    return costs


def choose_algorithm(sizes: Sizes, rule: Coefficients, response_saved: bool) -> Algorithm:
    """The algorithm with the fewest multiply-adds; among equals, the one that reads the response least."""
    costs = algorithms(sizes, rule, response_saved)
    return min(costs, key=costs.__getitem__)


def needs_response(algorithm: Algorithm, rule: Coefficients) -> bool:
    """Whether ``algorithm`` reads the response conv(x, W)."""
    if algorithm is Algorithm.DIRECT:
        return rule.null != 0 or rule.sparse == 0
    return algorithm is Algorithm.RESPONSE_GRAM


def pass_macs(sizes: Sizes) -> int:
    """Multiply-adds of one pass of the layer, forward or either gradient."""
    return sizes.positions * sizes.in_channels * sizes.out_channels * sizes.taps // sizes.groups


def _direct_macs(sizes: Sizes, rule: Coefficients, response_saved: bool) -> int:
    passes = 2 * int(rule.sparse != 0) + 2 * int(rule.null != 0)
    passes = max(passes, 1)  # amp is part of either of them; alone, it is one wgrad
    if needs_response(Algorithm.DIRECT, rule) and not response_saved:
        passes += 1
    return passes * pass_macs(sizes)


def _input_gram_macs(sizes: Sizes, rule: Coefficients) -> int:
    _, c, k, *_ = sizes
    macs = sizes.positions * c * c
    if rule.amp or rule.sparse:
        macs += k * c * c
    if rule.null:
        macs += k * c * c + 2 * c * k * min(c, k)
    return macs


def _response_gram_macs(sizes: Sizes, rule: Coefficients, response_saved: bool) -> int:
    _, c, k, *_ = sizes
    passes = int(rule.amp != 0) + int(not response_saved)
    return sizes.positions * k * k + k * k * c + passes * pass_macs(sizes)
