"""Base class of the optimizers: it decides which rows a step updates, and in which calls."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyfeedback import functional
from pyfeedback.core.probes import ProbeCount
from pyfeedback.core.tensors import PLAIN
from pyfeedback.core.values import check_int, describe
from pyfeedback.nn import FeedbackLayer
from pyfeedback.nn.layer import warn_of_uncalled
from pyfeedback.nn.model import feedback_layers, feedback_parameters, forward_parameters
from pyfeedback.optim.probes import layer_probes, probe_gradients
from pyfeedback.optim.replay import Call, Replay
from pyfeedback.optim.rows import (
    Columns,
    LossScale,
    Row,
    has_hooks,
    is_computed,
    is_tied,
    weight_parameters,
    without_loss_scale,
)
from pyfeedback.rules import Rule

SLOW = 0.03  # of a run: a B with a longer time constant does not find W, unless its rule is Kolen-Pollack

_log = logging.getLogger("pyfeedback")

Params = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class RowOptimizer(torch.optim.Optimizer):
    """Updates the rows of all groups, in as few calls as their options allow."""

    _layers: dict[nn.Parameter, FeedbackLayer]
    _released: tuple[tuple[nn.Parameter, nn.Module], ...] = ()  # the same of layers that were unconverted
    _names: dict[nn.Parameter, str]  # of all these layers, by their feedback weights
    probe_seed: int = 0  # of the noise that rules with probes read: the same in every process
    _estimates: dict[nn.Parameter, Tensor]  # in this step, of rules that read probes
    _tied: dict[Any, Rule]  # in this step, see _tied_rules
    _replay: Replay | None = None  # the calls of an earlier step
    _can_replay = True  # whether rows depend on nothing that Replay does not compare
    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf, and does not unscale the gradients

    def _options(self, group: dict[str, Any]) -> tuple:
        """The options that the rows of one call share, as arguments of `_update`."""
        raise NotImplementedError

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        """The row of a parameter; None if this step does not update it."""
        raise NotImplementedError

    def _update(self, columns: Columns, *options) -> None:
        """Update the rows of one call."""
        raise NotImplementedError

    def _prepare(self, columns: Columns, *options) -> Callable[[list[Tensor], float], None] | None:
        """`_update` as a function of gradients and learning rate, the first option; None if that is not faster."""
        return None

    def _update_by_torch(self, columns: Columns, *options) -> None:
        """`_update` for complex parameters and sparse gradients."""
        raise NotImplementedError

    def __getstate__(self):
        return {**super().__getstate__(), "_layers": self._layers, "_released": self._released, "_names": self._names}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of forward parameters with its own options, as in torch.optim.

        The feedback weights of these parameters get the same options, except ``weight_decay``, in a group of their own.
        Those in the group itself are left out.
        """
        params = listed(param_group["params"])
        forward = [p for p in params if p not in self._layers]
        super().add_param_group({**param_group, "params": forward or params})
        self._give_options(param_group, forward)

    def _give_options(self, param_group: dict[str, Any], forward: Iterable[nn.Parameter]) -> None:
        """Give the options that a group of forward parameters has itself to their feedback weights as well."""
        options = {name: v for name, v in param_group.items() if name not in ("params", "weight_decay", "noise")}
        own = set(forward)
        moved = {b for b, layer in self._attached().items() if not own.isdisjoint(weight_parameters(layer))}
        for group in list(self.param_groups) if options else ():
            if params := [p for p in group["params"] if p in moved]:
                group["params"] = [p for p in group["params"] if p not in moved]
                kept = {name: v for name, v in group.items() if name != "initial_lr" or "lr" not in options}
                super().add_param_group({**kept, **options, "params": params})
        self.param_groups = [g for g in self.param_groups if g["params"] or not moved]

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient or a rule; skip the others, as torch.optim does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)  # set by torch.amp.GradScaler, like grad_scale
        skipped = found_inf is not None and found_inf
        if not skipped and (self._replay is None or not self._replay.repeat(self)):
            calls = list(self._calls())
            for by_torch, options, columns in calls:
                if columns.step_size[0] is not None:
                    self._relax(columns, *options)
                else:
                    (self._update_by_torch if by_torch else self._update)(columns, *options)
            if self._can_replay:
                self._replay = Replay.of(self, calls)
        return loss

    def time_constants(self) -> dict[str, float]:
        """Return the number of steps in which each B moves to its target, by layer.

        A B that learns needs a run of many time constants to find W. It is the rule's ``tau``, or longer if aa has too
        few probes for it. Without a ``tau``, it is (1 - momentum) / (lr * decay) with SGD. It is infinite if the rule
        has no decay and no other term that makes B forget, and nan if it depends on the data or on Adam's estimates.
        """
        groups = {p: group for group in self.param_groups for p in group["params"]}
        learning = {b: layer for b, layer in self._attached().items() if layer.rule.learns and b in groups}
        return {self._names[b]: self._time_constant(layer, groups[b]) for b, layer in learning.items()}

    def probe_counts(self) -> dict[str, ProbeCount]:
        """Return the number of probes of each layer whose rule reads them, and the noise that it leaves in the angle.

        The limit on the cost depends on the batch, so the numbers are final only after a forward pass.
        """
        groups = {p: group for group in self.param_groups for p in group["params"]}
        reading = {b: layer for b, layer in self._attached().items() if layer.rule.reads_probes and b in groups}
        return {self._names[b]: layer_probes(layer, groups[b].get("feedback_step", 0)) for b, layer in reading.items()}

    def _time_constant(self, layer: FeedbackLayer, group: dict[str, Any]) -> float:
        rule = layer.rule
        if rule.tau:
            step = group.get("feedback_step", 0)
            return rule.tau_at(step) / (layer_probes(layer, step).reach if rule.reads_probes else 1.0)
        if rule.null or rule.sparse or "momentum" not in group:
            return math.nan
        rate = float(group.get("initial_lr", group["lr"])) / (1 - group["momentum"])
        return 1 / (rate * rule.decay) if rate * rule.decay > 0 else math.inf

    def _warn_of_slow_feedback(self, total_steps: int | None) -> None:
        """Warn of each B that cannot find W in a run of so many steps; with None, of those that never forget."""
        if total_steps is not None:
            check_int("total_steps", total_steps, least=1)
        # Under Kolen-Pollack, W forgets as fast as W - B: a tau of a few per cent of a run leaves nothing to learn.
        tied = {self._names[b] for b, layer in self._layers.items() if is_tied(layer.rule)}
        steps = math.inf if total_steps is None else total_steps
        limits = {name: steps * (1.0 if name in tied else SLOW) for name in self._names.values()}
        slow = {name: tau for name, tau in self.time_constants().items() if tau > limits[name] or tau == math.inf}
        if slow:
            described = ", ".join(f"{name} {tau:.0f}" for name, tau in slow.items())
            run = "" if total_steps is None else f" for a run of {total_steps}"
            _log.warning(
                "the feedback weights will not find W: they move to their targets in too many steps (%s)%s; give the "
                "rule a smaller tau, or a larger decay or learning rate", described, run,
            )  # fmt: skip

    def _relax(self, columns: Columns, noise: float, skip_nonfinite: bool, step_size: float) -> None:
        """Move feedback weights along the gradients of rules with a time constant: ``step_size`` of the way."""
        param, weight, grad, decay, self_, tie, *_ = columns
        functional.feedback_step_(
            *map(local, (param, weight, grad)), decay=decay, self_=self_, tie=tie, lr=step_size, noise=noise,
            skip_nonfinite=skip_nonfinite, seed=int(torch.randint(2**62, ())) if noise else 0,
        )  # fmt: skip

    def _calls(self) -> Iterator[Call]:
        """Yield for each call: whether torch's own functions make the update, the options, and the columns of its rows.

        B's update must read W before W is updated. If both share options they go in one call, B first; otherwise W is
        deferred to a second call. If W is computed from other parameters, those are deferred too.
        """
        attached = self._attached()
        self._released += tuple(each for each in self._layers.items() if each[0] not in attached)
        self._layers, released = attached, {b for b, _ in self._released}
        places: dict[nn.Parameter, list] = {}  # group, and what the rows of one call share
        for group in self.param_groups:
            options = self._options(group)
            places |= {p: [group, (p.device, options)] for p in group["params"] if p not in released}
        readers: dict[Any, list[nn.Parameter]] = {}  # by the weight they read
        for b, layer in self._layers.items():
            readers.setdefault(layer.weight, []).append(b)
        in_turn = [p for w, feedback in readers.items() for p in (*feedback, w) if p in places]
        none_computed = all(w in places for w in readers)
        loss_scale, uncalled = LossScale.of(self), self._uncalled()
        self._estimates, self._tied = self._read_probes(places, uncalled), self._tied_rules()
        calls: dict[bool, dict[tuple, list[Row]]] = {False: {}, True: {}}
        for p in dict.fromkeys([*in_turn, *places]):
            group, shared = places[p]
            row = None if p in uncalled else self._row(p, group)
            if row is not None:
                of_feedback = self._layers.get(p)
                if row.step_size is not None:
                    noise, skip_nonfinite = group.get("noise", 0.0), group.get("skip_nonfinite", False)
                    shared = places[p][1] = (p.device, (noise, skip_nonfinite, row.step_size))
                has_weight = of_feedback is not None and of_feedback.weight in places
                row = without_loss_scale(row, of_feedback, self._names.get(p, ""), loss_scale, has_weight)
                beside = {places[b][1] for b in readers.get(p, ())}
                late = p not in self._layers and (beside != {shared} if beside else not none_computed)
                calls[late].setdefault((row.by_torch, shared), []).append(row)
        for of_time in calls.values():
            for (by_torch, (_, options)), rows in of_time.items():
                yield by_torch, options, Columns(*zip(*rows, strict=True))

    def _attached(self) -> dict[nn.Parameter, FeedbackLayer]:
        """Return the layers, by feedback weight, without those that were unconverted."""
        for b, layer in (*self._released, *self._layers.items()):
            if isinstance(layer, FeedbackLayer) and layer.feedback is not b:
                raise RuntimeError(
                    f"{self._names[b]} has another feedback weight now, expected an optimizer that was made "
                    "after pyfeedback.convert and load_state_dict(assign=True)"
                )
        return {b: layer for b, layer in self._layers.items() if isinstance(layer, FeedbackLayer)}

    def _tied_rules(self) -> dict[Any, Rule]:
        """Return the rules of Kolen-Pollack with a time constant, by forward weight."""
        rules = ((layer.weight, layer.rule) for layer in self._layers.values())
        return {w: rule for w, rule in rules if rule.tau and is_tied(rule)}

    def _read_probes(self, places: dict[nn.Parameter, list], uncalled: set[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """Return the gradients of the rules that read probes, for those that make an estimate in this step."""
        due = {}
        rules = ((b, layer.rule) for b, layer in self._layers.items() if b in places)
        counting = [b for b, rule in rules if rule.tau or rule.reads_probes]
        for group in {id(places[b][0]): places[b][0] for b in counting}.values():
            group["feedback_step"] = group.get("feedback_step", -1) + 1
        for index, (b, layer) in enumerate(self._layers.items()):
            if layer.rule.reads_probes and b in places and b not in uncalled and not layer.paused and b.numel():
                step = places[b][0]["feedback_step"]
                if step % layer.rule.every_at(step) == 0:
                    due[b] = (layer, self._names[b], (step, index))
        return probe_gradients(due, self.probe_seed) if due else {}

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
    layers, names = layers_of(model)
    set_gradients(layers, wrapped=isinstance(model, DistributedDataParallel))
    return layers, names


def layers_of(model: nn.Module) -> tuple[dict[nn.Parameter, FeedbackLayer], dict[nn.Parameter, str]]:
    """Return the layers and their names, by feedback weight."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected the converted model itself, not its parameters")
    if not any(isinstance(module, FeedbackLayer) for module in model.modules()):
        raise ValueError("model has no layer with a feedback weight, expected a model converted by pyfeedback.convert")
    named = {}
    for name, layer in feedback_layers(model):
        if not isinstance(layer.feedback, nn.Parameter):
            what = "expected a parameter: only its weight may be pruned or parametrized"
            raise ValueError(f"feedback of {name or 'the layer'} is computed from other parameters, {what}")
        named[layer.feedback] = name, layer
    return {b: layer for b, (_, layer) in named.items()}, {b: name for b, (name, _) in named.items()}


def set_gradients(layers: dict[nn.Parameter, FeedbackLayer], wrapped: bool) -> None:
    """Mark the layers as trained, and let autograd compute only those gradients that the optimizer does not.

    Args:
        wrapped: whether DistributedDataParallel has the model: it expects a gradient for every parameter that had
            ``requires_grad`` when it was built.
    """
    for feedback, layer in layers.items():
        layer.has_optimizer = True
        if not wrapped:
            rule = layer.unscheduled or layer.rule
            needs_autograd = is_computed(layer) or has_hooks(feedback)
            feedback.requires_grad_(rule.reads_data or (rule.learns and needs_autograd and not rule.reads_probes))


def check_option(name: str, value: object, below: float = math.inf) -> None:
    """Raise unless ``value`` is a number, or a tensor of one number, that is at least 0 and less than ``below``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number or (isinstance(value, Tensor) and value.numel() == 1)
    if not number or not 0 <= value < below:  # type: ignore[operator]
        limit = "a finite number, 0 or more" if below == math.inf else f"a number in [0, {below:g})"
        raise (ValueError if number else TypeError)(f"{name} is {describe(value)}, expected {limit}")


def forward_groups(model: nn.Module, params: Params | None) -> list[dict[str, Any]]:
    """Parameter groups of the forward parameters: ``params`` without feedback weights if given, else all of ``model``.

    Raises:
        TypeError: ``params`` is neither parameters nor groups of them.
    """
    if params is None:
        return [{"params": list(forward_parameters(model))}]
    if isinstance(params, Tensor):  # as in torch.optim
        raise TypeError(f"params is {describe(params)}, expected parameters, or groups of them")
    given: list = listed(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    feedback = set(feedback_parameters(model))
    return [{**group, "params": [p for p in listed(group["params"]) if p not in feedback]} for group in groups]


def listed(params: Any) -> list:
    """The parameters or groups of an argument ``params`` of an optimizer.

    Raises:
        TypeError: it is neither a parameter nor an iterable of parameters or groups.
    """
    if isinstance(params, Tensor):
        return [params]
    found = list(params) if isinstance(params, Iterable) and not isinstance(params, (str, bytes, dict)) else [params]
    for value in found:
        if not isinstance(value, (Tensor, dict)):
            raise TypeError(f"params is or contains {describe(value)}, expected parameters, or groups of them")
    return found


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The local shards of tensors that FSDP may have sharded."""
    return [t if type(t) in PLAIN or not hasattr(t, "to_local") else t.to_local() for t in tensors]
