"""Base class of the optimizers: it decides which rows a step updates, and in which calls."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyfeedback.conversion import feedback_layers, forward_parameters
from pyfeedback.core.values import describe
from pyfeedback.nn import FeedbackLayer
from pyfeedback.nn.layer import warn_of_uncalled
from pyfeedback.optim.rows import LossScale, Row, is_computed, without_loss_scale

Params = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class RowOptimizer(torch.optim.Optimizer):
    """Updates the rows of all groups, in as few calls as their options allow."""

    _layers: dict[nn.Parameter, FeedbackLayer]
    _names: dict[nn.Parameter, str]  # of the layers, by their feedback weights
    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf, and does not unscale the gradients

    def _options(self, group: dict[str, Any]) -> tuple:
        """The options that the rows of one call share, as arguments of `_update`."""
        raise NotImplementedError

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        """The row of a parameter; None if this step does not update it."""
        raise NotImplementedError

    def _update(self, rows: list[Row], *options) -> None:
        raise NotImplementedError

    def _update_by_torch(self, rows: list[Row], *options) -> None:
        """`_update` for complex parameters and sparse gradients."""
        raise NotImplementedError

    def __getstate__(self):
        return {**super().__getstate__(), "_layers": self._layers, "_names": self._names}

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient or a rule; skip the others, as torch.optim does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)  # set by torch.amp.GradScaler, like grad_scale
        if found_inf is None or not found_inf:
            for by_torch, options, rows in self._calls():
                (self._update_by_torch if by_torch else self._update)(rows, *options)
        return loss

    def _calls(self) -> Iterator[tuple[bool, tuple, list[Row]]]:
        """Yield for each call: whether torch's own functions make the update, the options, and the rows.

        B's update must read W before W is updated. If both share options they go in one call, B first; otherwise W is
        deferred to a second call. If W is computed from other parameters, those are deferred too.
        """
        places: dict[nn.Parameter, tuple[dict, tuple]] = {}
        for group in self.param_groups:
            options = self._options(group)
            places |= {p: (group, (p.device, options)) for p in group["params"]}
        readers: dict[Any, list[nn.Parameter]] = {}  # by the weight they read
        for b, layer in self._layers.items():
            readers.setdefault(layer.weight, []).append(b)
        in_turn = [p for w, feedback in readers.items() for p in (*feedback, w) if p in places]
        none_computed = all(w in places for w in readers)
        loss_scale, uncalled = LossScale.of(self), self._uncalled()
        calls: dict[bool, dict[tuple, list[Row]]] = {False: {}, True: {}}
        for p in dict.fromkeys([*in_turn, *places]):
            group, shared = places[p]
            row = None if p in uncalled else self._row(p, group)
            if row is not None:
                of_feedback = self._layers.get(p)
                has_weight = of_feedback is not None and of_feedback.weight in places
                row = without_loss_scale(row, of_feedback, self._names.get(p, ""), loss_scale, has_weight)
                beside = {places[b][1] for b in readers.get(p, ())}
                late = p not in self._layers and (beside != {shared} if beside else not none_computed)
                calls[late].setdefault((row.by_torch, shared), []).append(row)
        for of_time in calls.values():
            for (by_torch, (_, options)), rows in of_time.items():
                yield by_torch, options, rows

    def _uncalled(self) -> set[nn.Parameter]:
        """Feedback weights of layers that are never called although their weight is trained, by plain backprop."""
        if not any(layer.called for layer in self._layers.values()):  # the gradients were set without a forward pass
            return set()
        uncalled = {b for b, layer in self._layers.items() if not layer.called and layer.weight.grad is not None}
        if uncalled:
            warn_of_uncalled(
                {self._names[b]: layer for b, layer in self._layers.items() if layer.called or b in uncalled}
            )
        return uncalled


def feedback_of(model: nn.Module) -> tuple[dict[nn.Parameter, FeedbackLayer], dict[nn.Parameter, str]]:
    """Return the layers and their names, by feedback weight.

    Sets ``requires_grad`` of each feedback weight: False if the optimizer computes its gradient.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected the converted model itself, not its parameters")
    if not any(isinstance(module, FeedbackLayer) for module in model.modules()):
        raise ValueError("model has no layer with a feedback weight, expected a model converted by pyfeedback.convert")
    named = {layer.feedback: (name, layer) for name, layer in feedback_layers(model) if layer.feedback is not None}
    layers = {feedback: layer for feedback, (_, layer) in named.items()}
    if not isinstance(model, DistributedDataParallel):  # it expects a gradient for every parameter it was built with
        for feedback, layer in layers.items():
            rule = layer.unscheduled or layer.rule
            feedback.requires_grad_(rule.reads_data or (rule.learns and is_computed(layer)))
    return layers, {feedback: name for feedback, (name, _) in named.items()}


def check_option(name: str, value: object, below: float = math.inf) -> None:
    """Raise unless ``value`` is a number, or a tensor of one number, that is at least 0 and less than ``below``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number or (isinstance(value, Tensor) and value.numel() == 1)
    if not number or not 0 <= value < below:  # type: ignore[operator]
        limit = "a finite number, 0 or more" if below == math.inf else f"a number in [0, {below:g})"
        raise (ValueError if number else TypeError)(f"{name} is {describe(value)}, expected {limit}")


def forward_groups(model: nn.Module, params: Params | None) -> list[dict[str, Any]]:
    """Parameter groups of the forward parameters: ``params`` if given, else all of ``model``."""
    given: list = list(forward_parameters(model) if params is None else params)
    return given if given and isinstance(given[0], dict) else [{"params": given}]


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The local shards of tensors that FSDP may have sharded."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
