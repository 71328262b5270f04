"""What each layer of a model does: its rule, the path of its gradient, and whether its feedback weight learns."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.nn.parameter import is_lazy

from pyfeedback.core.values import check_model, describe
from pyfeedback.metrics.alignment import alignment
from pyfeedback.nn import FeedbackLayer


class HasTimeConstants(Protocol):
    """An optimizer of :mod:`pyfeedback.optim`."""

    def time_constants(self) -> dict[str, float]:
        """Return the number of steps in which each B moves to its target, by layer."""


@dataclass(frozen=True)
class LayerStatus:
    """The status of one layer.

    Attributes:
        name: the name of the module in the model.
        kind: its class; for a weight that a module multiplies itself, the class of the module and the weight's name.
        rule: the name of its rule; "" for a layer without one, which trains by backprop.
        path: what carries the gradient to its input: "feedback" (B), "weight" (W: plain backprop), "output" (the error
            of the model's output, under dfa) or "not called": nothing has called the layer since its conversion.
        stepped: whether B has changed since it was drawn, loaded or copied; None without a B that learns.
        angle: between B and W, in degrees; nan without B.
        norm_ratio: |B| / |W|; nan without B.
        tau: the number of steps in which B moves to its target; nan if not known (without ``optimizer``, of a rule
            with units).
    """

    name: str
    kind: str
    rule: str
    path: str
    stepped: bool | None
    angle: float
    norm_ratio: float
    tau: float


class Status(list[LayerStatus]):
    """The rows of :func:`status`. ``str`` and ``print`` show a table."""

    def __str__(self) -> str:
        lines = [("layer", "kind", "rule", "path", "B stepped", "angle", "|B|/|W|", "tau")]
        for row in self:
            stepped = {None: "", True: "yes", False: "no"}[row.stepped]
            numbers = (_number(row.angle, ".1f"), _number(row.norm_ratio, ".2f"), _number(row.tau, "g"))
            lines.append((row.name or "(model)", row.kind, row.rule or "-", row.path, stepped, *numbers))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def status(model: nn.Module, optimizer: HasTimeConstants | None = None) -> Status:
    """Return what each layer with weights does, in the order of the modules.

    Takes one pass over the weights and, on a GPU, one synchronization.

    Args:
        model: any model. Layers without a rule are those that :func:`pyfeedback.convert` left.
        optimizer: an optimizer of :mod:`pyfeedback.optim`, or what :func:`pyfeedback.optim.follow` has returned, for
            the time constants of rules with units.

    Returns:
        A list of :class:`LayerStatus` whose ``str`` is a table.

    Raises:
        ValueError: weights have no values (on the meta device).
        TypeError: ``model`` is not a module, or ``optimizer`` has no time constants.
    """
    check_model(model)
    if optimizer is not None and not hasattr(optimizer, "time_constants"):
        what = "one of pyfeedback.optim, or what pyfeedback.optim.follow has returned"
        raise TypeError(f"optimizer is {describe(optimizer)}, expected {what}")
    readings = alignment(model)
    time_constants = {} if optimizer is None else optimizer.time_constants()
    rows = Status()
    layers = [module for module in model.modules() if isinstance(module, FeedbackLayer)]
    parametrizations = {p for layer in layers for p in getattr(layer, "parametrizations", {}).values()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, FeedbackLayer):
            if (owner := module.weight_owner()) is not module:
                kind = f"{type(owner).__name__}.{module.weight_name}"
            b, rule, reading = module.feedback, module.rule, readings.get(name)
            stepped = b._version != module.drawn_version if b is not None and rule.learns else None
            angle, ratio = (math.nan, math.nan) if reading is None else (reading.angle, reading.norm_ratio)
            tau = time_constants.get(name, rule.tau or math.nan)
            rows.append(LayerStatus(name, kind, rule.name, _path(module), stepped, angle, ratio, tau))
        elif module not in parametrizations and any(is_lazy(p) or p.dim() > 1 for p in _without_feedback(module)):
            rows.append(LayerStatus(name, kind, "", "weight", None, math.nan, math.nan, math.nan))
    return rows


def _without_feedback(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module itself, except those with a feedback weight in a child of it."""
    for name, parameter in module.named_parameters(recurse=False):
        if not isinstance(getattr(module, f"{name}_feedback", None), FeedbackLayer):
            yield parameter


def _path(layer: FeedbackLayer) -> str:
    if not layer.called:
        return "not called"
    if layer.direct is not None:
        return "output"
    return "weight" if layer.feedback is None else "feedback"


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
