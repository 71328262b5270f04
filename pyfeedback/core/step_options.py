"""The options of ``feedback_step_``."""

from typing import NamedTuple

from torch import Tensor


class StepOptions(NamedTuple):
    """The options that :func:`pyfeedback.functional.feedback_step_` documents."""

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    noise: float = 0.0
    seed: int = 0
    skip_nonfinite: bool = False
    dynamic: Tensor | None = None
