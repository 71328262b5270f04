"""One call of a layer: the decisions of its forward pass that its backward pass needs."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Geometry

DIFFERENTIATED_ONCE = (
    "pyfeedback: double backward is not supported: the feedback path is not the derivative of the forward pass"
)

Mask = tuple[bool, ...]  # which gradients are needed: of input, weight, feedback and bias
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # in that order


class Implementations(NamedTuple):
    """The functions that the backward of a layer calls, chosen for its device and backend."""

    backward: Callable[..., Gradients]  # of (call, grad_output, input, weight, feedback, response)
    center: Callable[[Tensor, int], Tensor]
    add_centered_: Callable[[Tensor, Tensor, float, float], None]


class LayerCall(NamedTuple):
    """Made once by :func:`pyfeedback.backends.dispatch.plan` in the forward pass, and saved for the backward pass."""

    geometry: Geometry
    rule: Coefficients
    mask: Mask
    algorithm: Algorithm
    chosen: Implementations
    reads_response: bool  # whether the backward reads the response, the output without bias
