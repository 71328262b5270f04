"""The linear layer with a feedback path."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyfeedback.core.geometry import LINEAR
from pyfeedback.init import Init
from pyfeedback.nn.layer import FeedbackLayer, traced_call
from pyfeedback.rules import Rule


class Linear(FeedbackLayer, torch.nn.Linear):
    """``torch.nn.Linear`` with a feedback path.

    Args:
        rule: a name of :func:`pyfeedback.rule`, or a :class:`pyfeedback.Rule`.
        init: the initialization of the feedback: a :class:`pyfeedback.Init`, or a function of torch.nn.init.
        others: as in torch.nn.Linear.

    Shape:
        input [N, ..., C] or [C]; output [N, ..., K] or [K]; feedback [K, C].

    Equivalent forward: ``torch.nn.Linear.forward``. Backward and rule: :func:`pyfeedback.functional.fa_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        rule: str | Rule = "fa",
        init: Init | Callable[[Tensor], object] | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.attach_feedback(rule, init)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_dynamo_compiling() and (recalled := self.recalled) is not None:
            output = recalled.repeat(self, LINEAR, input)
            if output is not None:
                return output
        if not isinstance(input, Tensor):
            return traced_call(self, (input,), {})
        feedback = self.enter()
        if feedback is None:
            return super().forward(self.detach_input(input))
        return self.run_and_recall(LINEAR, input, feedback)
