"""Rules that change over time: small objects to use in your own training loop.

    schedule = Schedule(model, amp=linear(0, 1, 1000))       # factors of the coefficients, by step
    alternation = Alternation(model, every=4)                # the feedback learns in every fourth step
    growth = GrowthControl(model)                            # keep the size of B: growth.step() after rule.step()

    for x, target in data:
        task.zero_grad(), rule.zero_grad()
        loss(model(x), target).backward()
        if alternation.aligns:
            rule.step()                                  # before W is updated
        task.step()
        schedule.step(), alternation.step()

    with alignment_only(model): ...                          # warm-up: W does not change

The optimizer adds noise to the updates themselves: ``pyfeedback.optim.FeedbackSGD(model, noise=...)``.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace

import torch
from torch import nn

from pyfeedback.core.coefficients import COEFFICIENTS
from pyfeedback.core.values import (
    check_callable,
    check_int,
    check_model,
    check_number,
    check_positive,
    describe,
    is_int,
    is_number,
)
from pyfeedback.nn.layer import FeedbackLayer
from pyfeedback.nn.model import feedback_layers, feedback_parameters, forward_parameters
from pyfeedback.rules import UNITLESS, Rule

_log = logging.getLogger("pyfeedback")

Curve = Callable[[int], float]


def constant(value: float) -> Curve:
    """Return ``value`` at every step."""
    check_number("value", value)
    return lambda step: value


def linear(start: float, end: float, steps: int) -> Curve:
    """Go from ``start`` at step 0 to ``end`` at step ``steps`` in equal differences, then stay at ``end``."""
    check_number("start", start)
    check_number("end", end)
    check_positive("steps", steps)
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def exponential(start: float, end: float, steps: int) -> Curve:
    """Go from ``start`` to ``end`` in ``steps`` steps of equal ratio, then stay there; both have the same sign."""
    check_number("start", start)
    check_number("end", end)
    check_positive("steps", steps)
    if start * end <= 0:
        raise ValueError(f"start and end are {start} and {end}, expected two numbers of the same sign, neither 0")
    return lambda step: start * (end / start) ** min(step / steps, 1.0)


def cyclic(low: float, high: float, period: int) -> Curve:
    """Go from ``low`` to ``high`` and back in every ``period`` steps, along a cosine."""
    check_number("low", low)
    check_number("high", high)
    check_positive("period", period)
    return lambda step: low + (high - low) * (1 - math.cos(2 * math.pi * step / period)) / 2


def between(first: int, last: float, curve: Curve | None = None) -> Curve:
    """Return ``curve`` (default 1) from step ``first`` up to, but not including, step ``last``, and 0 elsewhere."""
    check_number("first", first)
    check_number("last", last)
    if curve is not None:
        check_callable("curve", curve, "a function of the step")
    return lambda step: (curve(step - first) if curve else 1.0) if first <= step < last else 0.0


class Schedule:
    """Multiplies the coefficients of every rule of a model by curves, evaluated at the current step.

    Args:
        model: a model with feedback layers; the factors apply to the rules that the layers have now.
        curves: functions of the step, starting at 0, for any of decay, amp, null, sparse, self_ and tie; for rules with
            a ``tau``, for any of tau, ratio and nu.

    A model has one schedule: a later one replaces it, and a warning is logged. It leaves layers that are converted
    again as they are.

    The factors of step 0 apply immediately; each :meth:`step` applies the next ones. A model that is compiled after the
    schedule was created is not recompiled when the factors change.

    Raises:
        ValueError: a name is not a coefficient, or the value of a curve is not a finite number.
        TypeError: a curve is not a function.
    """

    def __init__(self, model: nn.Module, **curves: Curve):
        for name, curve in curves.items():
            if name not in (*COEFFICIENTS, *UNITLESS):
                raise ValueError(
                    f"{name} is not a coefficient, expected one of {', '.join((*COEFFICIENTS, *UNITLESS))}"
                )
            check_callable(name, curve, "a function of the step")
        self.curves = curves
        layers = [layer for _, layer in feedback_layers(model)]
        self._rules = [(layer, copy(layer.unscheduled or layer.rule)) for layer in layers]
        for _, rule in self._rules:
            for name in curves:
                if rule.learns and (name in UNITLESS) != (rule.tau > 0):
                    what = "tau, ratio or nu, since the rule has a tau" if rule.tau else "a rule with a tau"
                    raise ValueError(f"{name} has no effect on {rule}, expected {what}")
        self._last = 0
        self._scheduled()  # raises before anything is changed
        if any(layer.unscheduled is not None for layer in layers):
            _log.warning("the earlier Schedule of this model has no effect any more: give all curves to one Schedule")
        for layer, rule in self._rules:
            layer.unscheduled = rule
        self._apply()

    def step(self) -> None:
        """Advance by one step."""
        self._last += 1
        self._apply()

    def factors(self) -> dict[str, float]:
        """Return the factors of the coefficients at the current step."""
        values = {name: curve(self._last) for name, curve in self.curves.items()}
        for name, value in values.items():
            if not is_number(value) or not math.isfinite(value):
                raise ValueError(f"{name} is {describe(value)} at step {self._last}, expected a finite number")
        return {name: float(value) for name, value in values.items()}

    def state_dict(self) -> dict[str, int]:
        """Return the step. The curves are code and are not saved."""
        return {"step": self._last}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the step of a :meth:`state_dict`.

        Raises:
            ValueError: ``state`` is not a state_dict of a schedule.
        """
        if not isinstance(state, dict) or not is_int(state.get("step")):
            raise ValueError(f"state is {describe(state)}, expected what state_dict returned")
        self._last = state["step"]
        self._apply()

    def _scheduled(self) -> list[Rule]:
        factors = self.factors()
        return [replace(r, **{name: getattr(r, name) * f for name, f in factors.items()}) for _, r in self._rules]

    def _apply(self) -> None:
        for (layer, rule), scheduled in zip(self._rules, self._scheduled(), strict=True):
            if getattr(layer, "unscheduled", None) is not rule:  # converted again, or it has another schedule
                continue
            layer.rule = scheduled
            values = torch.tensor(layer.rule.coefficients(1, 1)[: len(COEFFICIENTS)], dtype=torch.float64)
            layer.scheduled = values if layer.scheduled is None else layer.scheduled.copy_(values)


class Alternation:
    """Lets the feedback learn in one of every ``every`` steps; in the others only the task trains.

    In the other steps, the optimizers of :mod:`pyfeedback.optim`, and those that are followed, do not move B.

    Args:
        model: a model with feedback layers.
        every: the period in steps; the feedback learns in the last step of each period, so 1 means in every step.

    Attributes:
        aligns: whether the feedback learns in the current step; if not, an optimizer that has only B need not step.
    """

    def __init__(self, model: nn.Module, every: int):
        check_int("every", every, least=1)
        self._layers = [layer for _, layer in feedback_layers(model)]
        self._learn = [p for p in feedback_parameters(model) if p.requires_grad]
        self.every, self._last = every, 0
        self._apply()

    def step(self) -> None:
        """Advance by one step."""
        self._last += 1
        self._apply()

    def _apply(self) -> None:
        self.aligns = self._last % self.every == self.every - 1
        for layer in self._layers:
            if isinstance(layer, FeedbackLayer):  # not unconverted
                layer.paused = not self.aligns
        for feedback in self._learn:
            feedback.requires_grad_(self.aligns)
            if not self.aligns:
                feedback.grad = None


@contextmanager
def alignment_only(model: nn.Module) -> Iterator[None]:
    """Train only the feedback weights inside the block: a warm-up before the task.

    Forward parameters require no gradient inside the block, so optimizers skip them.
    """
    frozen = [p for p in forward_parameters(model) if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


class GrowthControl:
    """Keeps feedback weights from growing by rescaling them after the optimizer's step.

    Let u be noise with one value per output channel, uniform in [0, 1). Sent back through B, it excites the input units
    with B'u. :meth:`step` scales B so that the variance of B'u over the units, averaged over u, equals ``std`` squared.
    Both averages are computed in closed form, so no random numbers are drawn.

    Args:
        model: a model with feedback layers.
        std: the standard deviation to maintain.

    Source: Akrout et al., NeurIPS 2019 (arXiv 1904.05391), whose code estimates the variance from a batch of noise.
    """

    def __init__(self, model: nn.Module, std: float = 0.5):
        check_model(model)
        check_positive("std", std)
        self.model, self.std = model, std

    @torch.no_grad()
    def step(self) -> None:
        """Rescale every feedback weight, except one that excites all units equally, such as zero."""
        for b in feedback_parameters(self.model):
            spread = b.flatten(1) - b.flatten(1).mean(1, keepdim=True)
            variance = (spread.square().sum() / 12 + spread.sum(0).square().sum() / 4) / spread.shape[1]
            b.mul_(torch.where(variance > 0, self.std * variance.rsqrt(), 1.0))
