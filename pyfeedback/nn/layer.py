"""What the layers share: a feedback weight beside the weight, and a rule."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from pyfeedback.init import Init, as_init, fresh
from pyfeedback.rules import Rule
from pyfeedback.rules import rule as as_rule

_log = logging.getLogger("pyfeedback")


class FeedbackLayer(torch.nn.Module):
    """What the layers share: ``rule``, and ``feedback``, a Parameter in the layout of ``weight``.

    ``feedback`` is None under a rule with weight transport (bp), and needs no gradient under one that leaves it as it
    was drawn (fa).
    """

    rule: Rule
    weight: Tensor
    feedback: torch.nn.Parameter | None
    feedback_init: Init
    scheduled: Tensor | None = None  # the rule's coefficients where they move, for a graph compiled once
    unscheduled: Rule | None = None  # and the rule as it was before they moved

    def attach_feedback(self, rule: str | Rule, init: Init | Callable[[Tensor], object] | None = None) -> None:
        """Give the layer a rule and a fresh feedback weight of the dtype, device and layout of ``weight``."""
        self.rule, self.feedback_init = as_rule(rule), as_init(init)
        self.scheduled = self.unscheduled = None
        feedback = None
        if not self.rule.transport:
            feedback = torch.nn.Parameter(torch.empty_like(self.weight), requires_grad=self.rule.learns)
        self.register_parameter("feedback", feedback)
        self.reset_feedback()

    def detach_feedback(self) -> None:
        """Leave nothing of :meth:`attach_feedback`."""
        del self.feedback, self.rule, self.feedback_init, self.scheduled, self.unscheduled

    def reset_feedback(self) -> None:
        """Draw the feedback weight as ``feedback_init`` says, by default as torch.nn draws a fresh ``weight``."""
        if self.feedback is not None:
            self.feedback_init.draw(self.feedback, self.weight, fresh)

    def reset_parameters(self) -> None:
        """Draw weight, bias and feedback afresh."""
        super().reset_parameters()  # type: ignore[misc]  # of the torch.nn layer beside this class
        if "feedback" in self._parameters:  # torch.nn calls this before the feedback is there
            self.reset_feedback()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *others) -> None:
        """A checkpoint of torch.nn's layer loads: the feedback it lacks stays as it is, with a warning."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *others)
        if f"{prefix}feedback" in missing_keys:
            missing_keys.remove(f"{prefix}feedback")
            _log.warning("%sfeedback is not in the state dict: the feedback weight stays as it is", prefix)

    def _moving(self, input: Tensor, positions: int) -> dict:
        """The rest of the rule, where its coefficients are a tensor."""
        samples = self.rule.samples_of(input.shape[0])
        return {"center": self.rule.center, "samples": samples, "positions": positions or 1}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rule={self.rule}"
