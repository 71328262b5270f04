"""Which algebraic form computes the data terms of the feedback weight's gradient: one pure function, no tensors.

The amp, null and sparse terms of a layer can be computed from its response, from the response to the combined kernel
``sparse * B - amp * W``, or, where the layer is pointwise (1x1 without padding, or linear), from the second moment
of its input or of its response. All are exact; they differ only in arithmetic, so the cheapest is taken.
"""

import enum
import math
from collections.abc import Sequence
from typing import NamedTuple


class Coefficients(NamedTuple):
    """The rule as the ops see it: coefficients of the primitives, and the estimate's sample."""

    decay: float = 0.0
    amp: float = 0.0
    null: float = 0.0
    sparse: float = 0.0
    self_: float = 0.0
    tie: float = 0.0
    center: bool = False
    samples: int = 0


COEFFICIENTS = Coefficients._fields[:6]  # the numbers among them


class Window(NamedTuple):
    """How a convolution visits its input, as pairs; the defaults are the linear layer's."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    def output_shape(self, input: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """(N, K, P, Q) for an input (N, C, H, W) and a weight (K, C/g, R, S)."""
        spans = zip(input[2:], weight[2:], self.stride, self.padding, self.dilation, strict=True)
        return (input[0], weight[0], *((x + 2 * p - d * (r - 1) - 1) // s + 1 for x, r, s, p, d in spans))


class WindowNd(NamedTuple):
    """The same in any number of dimensions, or transposed: the arguments of torch.convolution after the tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def output_shape(self, input: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """(N, K, ...) for an input (N, C, ...) and a weight (K, C/g, ...), or (C, K/g, ...) where it is transposed."""
        reach = [d * (r - 1) + 1 for d, r in zip(self.dilation, weight[2:], strict=True)]
        spans = zip(input[2:], reach, self.stride, self.padding, self.output_padding, strict=True)
        if self.transposed:
            sizes = [(x - 1) * s - 2 * p + r + extra for x, r, s, p, extra in spans]
            return (input[0], weight[1] * self.groups, *sizes)
        return (input[0], weight[0], *((x + 2 * p - r) // s + 1 for x, r, s, p, _ in spans))


class Problem(NamedTuple):
    """Sizes of one layer: ``positions`` is n * P * Q, the samples used times the output positions of each."""

    positions: int
    in_channels: int
    out_channels: int
    taps: int = 1
    groups: int = 1
    pointwise: bool = True


class Form(enum.Enum):
    """How the data terms are computed (y is the response conv(x, W), z = convT(y, B))."""

    NONE = "none"  # no term reads the data
    DIRECT = "direct"  # wgrad(x, conv(x, sparse B - amp W)) and wgrad(null z - amp x, y)
    INPUT_MOMENT = "input_moment"  # G = x'x: (sparse B - amp W) G + null W G W' B
    RESPONSE_MOMENT = "response_moment"  # Y = y'y: null Y B - amp y'x

    @property
    def algorithm(self) -> str:
        """The name that the Triton kernels have for it."""
        return self.value.replace("moment", "gram")


def is_pointwise(weight: Sequence[int], window: Window) -> bool:
    """True where every output position reads one input position and no padding."""
    return tuple(weight[2:]) == (1, 1) and window.padding == (0, 0)


def conv2d_problem(input: Sequence[int], weight: Sequence[int], window: Window, samples: int) -> Problem:
    """The problem of an input (N, C, H, W) and a weight (K, C/g, R, S); ``samples`` 0 is the whole batch."""
    n, k, p, q = window.output_shape(input, weight)
    positions = (samples or n) * p * q
    return Problem(positions, input[1], k, weight[2] * weight[3], window.groups, is_pointwise(weight, window))


def convolution_problem(input: Sequence[int], weight: Sequence[int], window: WindowNd, samples: int) -> Problem:
    """The problem of a convolution of any number of dimensions; what it costs does not depend on which way it goes."""
    read = input if window.transposed else window.output_shape(input, weight)  # where the kernel is laid
    positions = (samples or input[0]) * math.prod(read[2:])
    return Problem(positions, weight[1] * window.groups, weight[0], math.prod(weight[2:]), window.groups, False)


def linear_problem(input: Sequence[int], weight: Sequence[int], samples: int) -> Problem:
    """The problem of an input (N, ..., C) and a weight (K, C); ``samples`` 0 is the whole batch."""
    k, c = weight
    return Problem((samples or input[0]) * math.prod(input[1:-1]), c, k)


def reads_data(rule: Coefficients) -> bool:
    """True where some term depends on the activations."""
    return rule.amp != 0 or rule.null != 0 or rule.sparse != 0


def pass_macs(problem: Problem) -> int:
    """Multiply-adds of one pass of the layer, forward or either gradient."""
    return problem.positions * problem.in_channels * problem.out_channels * problem.taps // problem.groups


def choose_form(problem: Problem, rule: Coefficients, response_at_hand: bool) -> Form:
    """The form with the fewest multiply-adds; ties go to the one that reads the response least.

    ``response_at_hand`` is False where the response would have to be computed again, one more pass.
    """
    if not reads_data(rule):
        return Form.NONE
    costs = {Form.DIRECT: _direct_macs(problem, rule, response_at_hand)}
    if problem.pointwise and problem.groups == 1:
        costs[Form.INPUT_MOMENT] = _input_moment_macs(problem, rule)
        if rule.null and not rule.sparse:
            costs[Form.RESPONSE_MOMENT] = _response_moment_macs(problem, rule, response_at_hand)
    best = Form.INPUT_MOMENT if Form.INPUT_MOMENT in costs else Form.DIRECT
    for form, macs in costs.items():
        if macs < costs[best]:
            best = form
    return best


def needs_response(form: Form, rule: Coefficients) -> bool:
    """True where ``form`` reads the response conv(x, W)."""
    if form is Form.DIRECT:
        return rule.null != 0 or rule.sparse == 0
    return form is Form.RESPONSE_MOMENT


def _direct_macs(problem: Problem, rule: Coefficients, response_at_hand: bool) -> int:
    passes = 2 * int(rule.sparse != 0) + 2 * int(rule.null != 0)
    passes = max(passes, 1)  # amp rides on either; alone it is one wgrad
    if needs_response(Form.DIRECT, rule) and not response_at_hand:
        passes += 1
    return passes * pass_macs(problem)


def _input_moment_macs(problem: Problem, rule: Coefficients) -> int:
    _, c, k, *_ = problem
    macs = problem.positions * c * c
    if rule.amp or rule.sparse:
        macs += k * c * c
    if rule.null:
        macs += k * c * c + 2 * c * k * min(c, k)
    return macs


def _response_moment_macs(problem: Problem, rule: Coefficients, response_at_hand: bool) -> int:
    _, c, k, *_ = problem
    passes = int(rule.amp != 0) + int(not response_at_hand)
    return problem.positions * k * k + k * k * c + passes * pass_macs(problem)
