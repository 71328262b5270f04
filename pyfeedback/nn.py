"""Layers with a feedback path: torch.nn's own, with ``.feedback`` beside ``.weight`` and a rule."""

import logging
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback import functional
from pyfeedback.forms import Window
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


class Conv2d(FeedbackLayer, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` with a feedback path.

    Args:
        rule: a name ("bp", "fa", "wm", "ia", "sa", "aa", "kp") or a :class:`pyfeedback.Rule`.
        init: how the feedback is drawn: a :class:`pyfeedback.Init`, or a function of torch.nn.init.
        others: as torch.nn.Conv2d, every padding mode included.

    Shape:
        input [N, C, H, W] or [C, H, W]; output [N, K, P, Q] or [K, P, Q]; feedback [K, C/groups, R, S].
        Padding of another mode than "zeros" is applied first, so the rule sees the padded input; so is the uneven
        one of "same" with an even kernel.

    Equivalent forward: ``torch.nn.Conv2d.forward``. Backward and rule: :func:`pyfeedback.functional.fa_conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
        *,
        rule: str | Rule = "fa",
        init: Init | Callable[[Tensor], object] | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.attach_feedback(rule, init)

    def forward(self, input: Tensor) -> Tensor:
        feedback = self.feedback
        if feedback is None:
            return super().forward(input)
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        weight, padding, rule = self.weight, self.padding, self.rule
        if isinstance(padding, str) or self.padding_mode != "zeros":
            left, right, top, bottom = sides = self._reversed_padding_repeated_twice
            if self.padding_mode == "zeros" and left == right and top == bottom:
                padding = (top, left)
            else:
                mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
                input, padding = F.pad(input, sides, mode=mode), (0, 0)
        window = Window(self.stride, padding, self.dilation, self.groups)
        positions = 1
        if rule.reduction == "mean":
            positions = math.prod(window.output_shape(input.shape, weight.shape)[2:])
        if self.scheduled is not None and torch.compiler.is_compiling():
            moving = self._moving(input, positions)
            return functional.scheduled_conv2d(input, weight, feedback, self.bias, self.scheduled, window, **moving)
        coefficients = rule.coefficients(input.shape[0], positions)
        return functional.conv2d(input, weight, feedback, self.bias, window, coefficients)


class Linear(FeedbackLayer, torch.nn.Linear):
    """``torch.nn.Linear`` with a feedback path.

    Args:
        rule: a name ("bp", "fa", "wm", "ia", "sa", "aa", "kp") or a :class:`pyfeedback.Rule`.
        init: how the feedback is drawn: a :class:`pyfeedback.Init`, or a function of torch.nn.init.
        others: as torch.nn.Linear.

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
        feedback = self.feedback
        if feedback is None:
            return super().forward(input)
        if input.dim() == 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        positions = math.prod(input.shape[1:-1]) if self.rule.reduction == "mean" else 1
        if self.scheduled is not None and torch.compiler.is_compiling():
            moving = self._moving(input, positions)
            return functional.scheduled_linear(input, self.weight, feedback, self.bias, self.scheduled, **moving)
        coefficients = self.rule.coefficients(input.shape[0], positions)
        return functional.linear(input, self.weight, feedback, self.bias, coefficients)


LAYERS: dict[type, type] = {torch.nn.Conv2d: Conv2d, torch.nn.Linear: Linear}
