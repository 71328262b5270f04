"""The table of a rule's coefficients. A new primitive needs a line in both classes.

The regularizer of each primitive is written in :mod:`pyfeedback.reference`, its gradient in
:mod:`pyfeedback.backends.composite.layer` and its cost in :mod:`pyfeedback.core.algorithm`; schemas, checks and keyword
arguments follow this table. A primitive in ``ELEMENTWISE`` also needs its term in backends/composite/steps.py and
csrc/step.h (optimizers), csrc/depthwise.h and kernels/common.py (layers). The backend of a layer may do without it and
leave it out of its ``IMPLEMENTED``.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Primitives:
    """The coefficient of each primitive, as the fields of :class:`pyfeedback.Rule`, which documents them."""

    decay: float = 0.0
    amp: float = 0.0
    null: float = 0.0
    sparse: float = 0.0
    self_: float = 0.0
    tie: float = 0.0


class Coefficients(NamedTuple):
    """A rule as the arguments of an op: the coefficients of its primitives and the options of its statistics.

    Attributes:
        center: subtract the mean over the samples from the activations in amp, null and sparse.
        samples: the number of samples, from the start of the batch, that amp, null and sparse use; 0 means all.
        normalize: divide each data term by the power of what it reads, so that its coefficient has no unit; see
            :func:`pyfeedback.reference.regularizer`.
    """

    decay: float = 0.0
    amp: float = 0.0
    null: float = 0.0
    sparse: float = 0.0
    self_: float = 0.0
    tie: float = 0.0
    center: bool = False
    samples: int = 0
    normalize: bool = False

    @property
    def reads_data(self) -> bool:
        """Whether a term depends on the activations."""
        return any(getattr(self, name) for name in READ_DATA)

    def of_step(self, steps: int, is_mean: bool) -> "Coefficients":
        """The coefficients of one of several steps that use the same weight.

        Summed over the steps, the terms without data count once, and those with data as over positions: a sum, or a
        mean if ``is_mean``.
        """
        shared = ("decay", "self_", *(READ_DATA if is_mean else ()))
        return self._replace(**{name: getattr(self, name) / steps for name in shared})


COEFFICIENTS = tuple(Primitives.__dataclass_fields__)
ELEMENTWISE = ("decay", "self_", "tie")  # of B, W and the gradient of W: the optimizers compute them
READ_DATA = tuple(name for name in COEFFICIENTS if name not in ELEMENTWISE)  # of the activations, summed over positions


def from_keywords(keywords: dict[str, Any]) -> Coefficients:
    """The coefficients given as keywords.

    Raises:
        TypeError: a keyword is not a coefficient.
    """
    try:
        return Coefficients(**keywords)
    except TypeError:
        unknown = next(name for name in keywords if name not in Coefficients._fields)
        expected = ", ".join(Coefficients._fields)
        raise TypeError(f"{unknown} is not a coefficient, expected one of {expected}") from None
