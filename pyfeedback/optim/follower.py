"""An optimizer of the feedback weights that is stepped by the steps of another optimizer."""

import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyfeedback.nn import FeedbackLayer
from pyfeedback.optim.base import local
from pyfeedback.optim.passes import PassGradients
from pyfeedback.optim.rows import (
    Row,
    current_weight,
    feedback_row,
    is_computed,
    is_tied,
    takes_step_of_weight,
    weight_parameters,
)
from pyfeedback.optim.sgd import FeedbackSGD

KEY = "pyfeedback"  # of the feedback weights' state in the state_dict of the optimizer

_log = logging.getLogger("pyfeedback")


class Follower(FeedbackSGD):
    """Steps feedback weights before each step of another optimizer; made by :func:`pyfeedback.optim.follow`.

    ``time_constants()``, ``probe_counts()`` and ``probe_seed`` are those of :class:`FeedbackSGD`.
    """

    _can_replay = False  # a row depends on the steps of the other optimizer

    def __init__(
        self,
        optimizer: Optimizer,
        layers: dict[nn.Parameter, FeedbackLayer],
        names: dict[nn.Parameter, str],
        lr: float | Tensor | None,
        momentum: float | None,
        noise: float,
        skip_nonfinite: bool,
    ):
        self._layers, self._names = layers, names
        self._optimizer = weakref.ref(optimizer)
        self._lr, self._momentum = lr, momentum
        self._taken: dict[nn.Parameter, tuple[Tensor, int]] = {}
        self._before: dict[nn.Parameter, Tensor] = {}  # W before the step, by feedback weights that take W's step
        self._held: dict[nn.Parameter, int] = {}  # versions of feedback weights that the optimizer has as well
        options = {"lr": 0.0, "momentum": 0.0, "nesterov": False, "noise": noise, "skip_nonfinite": skip_nonfinite}
        groups: list = [{"params": [b]} for b in layers]
        Optimizer.__init__(self, groups or [{"params": []}], {**options, "weight_decay": 0.0})
        self._read_options(optimizer)
        self._passes = PassGradients(layers, self._optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._on_step),
            optimizer.register_step_post_hook(self._on_stepped),
            optimizer.register_state_dict_post_hook(self._on_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._on_load_state_dict),
        ]
        _warn_of_copies(optimizer)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that is followed; None if it no longer exists."""
        return self._optimizer()

    def has(self, feedback: nn.Parameter) -> bool:
        """Whether this follower steps the feedback weight."""
        return feedback in self._layers

    def release(self, *feedback: nn.Parameter) -> None:
        """Stop stepping these feedback weights; without arguments, all of them."""
        for b in feedback or tuple(self._layers):
            self._passes.remove(b)
            if self._layers.pop(b, None) is not None:
                self.param_groups = [group for group in self.param_groups if all(p is not b for p in group["params"])]
                self.state.pop(b, None)
        if not self._layers:
            for handle in self._handles:
                handle.remove()

    def restore(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the feedback weights from a state dict that the optimizer has loaded before ``follow``.

        Raises:
            ValueError: it is of a model with another number of feedback weights.
        """
        saved = state_dict.get(KEY)
        if not saved:
            _log.warning("state_dict has no state of the feedback weights: their momentum and steps begin anew")
            return
        state = dict(saved[0])
        if len(state["param_groups"]) != len(self.param_groups):
            count = len(state["param_groups"])
            raise ValueError(f"state_dict has {count} feedback weights, expected {len(self.param_groups)}")
        self.probe_seed = state.pop("probe_seed")
        self.load_state_dict(state)

    # The hooks of the optimizer

    def _on_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Step now, or after the first evaluation of a closure: only then the gradients are there."""
        by_name = "closure" in kwargs
        closure = kwargs["closure"] if by_name else args[1] if len(args) > 1 else None
        if not callable(closure):
            self._step_feedback(optimizer)
            return None
        waiting = True

        def evaluate():
            nonlocal waiting
            loss = closure()
            if waiting:
                waiting = False
                self._step_feedback(optimizer)
            return loss

        return (args, {**kwargs, "closure": evaluate}) if by_name else ((args[0], evaluate, *args[2:]), kwargs)

    @torch._disable_dynamo
    @torch.no_grad()
    def _on_stepped(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        """Add the change of W to those B that follow it."""
        for b, version in self._held.items():
            if b._version != version:
                raise RuntimeError(
                    f"{type(optimizer).__name__} changed {self._names[b]}.feedback, which had no gradient, expected an "
                    "optimizer of pyfeedback.forward_parameters(model)"
                )
        changes = [(b, current_weight(self._layers[b]) - before) for b, before in self._before.items()]
        self._before = {}
        if self.defaults["skip_nonfinite"] and not all(change.isfinite().all() for _, change in changes):
            changes = []
        for b, change in changes:
            layer = self._layers[b]
            own, added = local([b, change if layer.mixing is None else layer.factor_gradient(change)])
            own.add_(added, alpha=layer.rule.tie)
        self._passes.take()

    def _on_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict.setdefault(KEY, []).append({**self.state_dict(), "probe_seed": self.probe_seed})

    def _on_load_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.restore(state_dict)
        state_dict[KEY] = state_dict.get(KEY, [])[1:]  # of the next follower; state_dict is a copy

    # The step

    @torch._disable_dynamo  # a compiled step of the optimizer calls it
    @torch.no_grad()
    def _step_feedback(self, optimizer: Optimizer) -> None:
        self._refuse_converted()
        self._taken, self._before = self._passes.take(), {}
        found_inf = getattr(optimizer, "found_inf", None)  # GradScaler and a fused optimizer, which skips this step
        if found_inf is None or not found_inf:
            self._refuse_capture()
            self._read_options(optimizer)
            self._prepare_tied(optimizer)
            for b, (total, _) in self._taken.items():
                b.grad = total
            self.step()
        self._taken = {}
        held = {p for group in optimizer.param_groups for p in group["params"]}
        self._held = {b: b._version for b in self._layers if b in held}
        for b in self._layers:
            b.grad = None

    def _refuse_converted(self) -> None:
        """Release the feedback weights of layers that were unconverted; raise if they have others now."""
        for b, layer in self.replaced():
            if getattr(layer, "feedback", None) is not None:
                raise RuntimeError(
                    f"{self._names[b]} was converted again, expected pyfeedback.convert(model, rule, optimizer=...) or "
                    "pyfeedback.optim.follow after it"
                )
            self.release(b)

    def replaced(self) -> list[tuple[nn.Parameter, FeedbackLayer]]:
        """Return the feedback weights that their layers no longer have."""
        return [(b, layer) for b, layer in self._layers.items() if getattr(layer, "feedback", None) is not b]

    def _read_options(self, optimizer: Optimizer) -> None:
        """Set the options of each feedback weight from the optimizer's group of W."""
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        for own in self.param_groups:
            for b in own["params"]:
                layer = self._layers[b]
                rule, of_weight = layer.rule, _group_of(layer, groups, optimizer)
                lr = of_weight.get("lr") if self._lr is None else self._lr
                if lr is None and rule.learns and not rule.tau:
                    raise ValueError(f"lr is None and {type(optimizer).__name__} has no lr, expected a number")
                # The momentum of other optimizers than SGD does not apply to their weight decay.
                has_momentum = not is_tied(rule) or isinstance(optimizer, torch.optim.SGD)
                momentum = of_weight.get("momentum", 0.0) if has_momentum else 0.0
                own["lr"] = 0.0 if lr is None else lr
                own["momentum"] = momentum if self._momentum is None else self._momentum
                own["nesterov"] = bool(self._momentum is None and momentum and of_weight.get("nesterov", False))
                own["weight_decay"] = of_weight.get("weight_decay", 0.0)
                own.pop("initial_lr", None)
                if self._lr is None and "initial_lr" in of_weight:
                    own["initial_lr"] = of_weight["initial_lr"]

    def _prepare_tied(self, optimizer: Optimizer) -> None:
        """Keep each W whose change its B will take, after the decay of both that a time constant requires."""
        tied = {b: layer for b, layer in self._layers.items() if takes_step_of_weight(layer)}
        if not tied:
            return
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        uncalled, decayed = self._uncalled(), set()
        for b, layer in tied.items():
            own = weight_parameters(layer)
            if layer.paused or b in uncalled or all(p.grad is None or p not in groups for p in own):
                continue
            if layer.rule.tau:
                of_weight = _group_of(layer, groups, optimizer)
                lr = float(of_weight.get("lr", 1.0))
                full = float(of_weight.get("initial_lr", lr))
                kept = 1 - lr / (full * layer.rule.tau) if full else 1.0
                for p in local([b, *(p for p in own if p not in decayed)]):
                    p.mul_(kept)
                decayed.update(own)
            self._before[b] = current_weight(layer).clone()

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        layer, name = self._layers[p], self._names[p]
        if layer.paused:
            return None
        rule, step, noisy = layer.rule, group.get("feedback_step", 0), bool(group["noise"])
        if takes_step_of_weight(layer):
            w = self._before.get(p)
            decay, decay_of_weight = group["weight_decay"] if rule.tau else rule.decay, rule.tie * group["weight_decay"]
            if w is None or not (decay or decay_of_weight or noisy):
                return None
            if layer.mixing is not None:
                w = layer.factor_gradient(w)
            return Row(p, w, w, decay, decay_of_weight, 0.0)
        taken = self._taken.get(p) if rule.reads_data or is_computed(layer) else None
        row = feedback_row(p, layer, name, taken is not None, noisy, step, self._estimates.get(p))
        if row is None or taken is None:
            scale = getattr(self.optimizer, "grad_scale", None)  # of GradScaler, in the gradient of W
            return row if row is None or scale is None or not rule.tie else row._replace(tie=row.tie / float(scale))
        return row._replace(tie=row.tie / taken[1])

    def _refuse_capture(self) -> None:
        for b, layer in self._layers.items():
            rule = layer.rule
            if b.is_cuda and (rule.reads_probes or rule.growth) and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{self._names[b]} follows {rule.name}, whose steps differ, expected a step outside of a CUDA graph"
                )


def _group_of(layer: FeedbackLayer, groups: dict[Any, dict], optimizer: Optimizer) -> dict[str, Any]:
    """Return the group that has W, or the first one if W is frozen and in none."""
    return next((groups[p] for p in weight_parameters(layer) if p in groups), optimizer.param_groups[0])


def _warn_of_copies(optimizer: Optimizer) -> None:
    """Make a copy or a pickle of the optimizer log a warning: it has no hooks."""

    def reduce(protocol: Any) -> Any:
        _log.warning(
            "a copy of %s does not step the feedback weights: call pyfeedback.optim.follow on the copy",
            type(optimizer).__name__,
        )
        return type(optimizer).__reduce_ex__(optimizer, protocol)

    vars(optimizer)["__reduce_ex__"] = reduce
