"""Feedback weights that are stepped together with an optimizer of torch.optim or of any other package."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pyfeedback.core.values import describe
from pyfeedback.nn import FeedbackLayer
from pyfeedback.optim.base import RowOptimizer, check_option, layers_of, local, set_gradients
from pyfeedback.optim.passes import PassGradients, data_parallel
from pyfeedback.optim.rows import (
    Row,
    current_weight,
    feedback_row,
    is_computed,
    is_computed_by_forward,
    is_tied,
    weight_parameters,
)
from pyfeedback.optim.sgd import FeedbackSGD

KEY = "pyfeedback"  # of the feedback weights' state in the state_dict of the optimizer

_log = logging.getLogger("pyfeedback")
_followers: weakref.WeakKeyDictionary[FeedbackLayer, Callable[[], Any]] = weakref.WeakKeyDictionary()  # weak references


def follow(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    lr: float | Tensor | None = None,
    momentum: float | None = None,
    noise: float = 0.0,
    skip_nonfinite: bool = False,
    total_steps: int | None = None,
) -> "Follower":
    """Step the feedback weights of ``model`` in every step of ``optimizer``, whichever optimizer it is.

    ``optimizer`` may have been built before or after :func:`pyfeedback.convert`, and need not have the feedback
    weights. In each ``optimizer.step()``, every B whose W it trains takes the step of its rule, before W is updated:

    * A rule with a ``tau``, or that reads probes, takes a step of 1 / tau, as with :class:`FeedbackSGD`.
    * Another rule takes a step of SGD with ``lr`` and ``momentum`` along its gradient.
    * Kolen-Pollack (tie and decay only) adds the change of W to B after the step, whatever the optimizer has done:
      ``B += tie * (dW + lr * weight_decay * W) - lr * decay * B``, where dW is the change of W and the term of
      ``weight_decay``, the option of W's group, removes W's own decay from it. If ``weight_decay`` equals the rule's
      ``decay``, every step multiplies W - B by 1 - lr * decay; otherwise :mod:`pyfeedback.guard` warns. With
      torch.optim.SGD, which adds the decay to the gradient, both terms of decay have its momentum. With a ``tau``, the
      step first multiplies W and B by 1 - lr / (initial_lr * tau), so that W - B vanishes in ``tau`` steps.

    The gradients of B are taken out of ``.grad`` when a backward pass has computed them. The optimizer, GradScaler,
    weight decay and ``clip_grad_norm_(model.parameters())`` do not see them. If gradients are accumulated over several
    passes, B takes their mean. Under DistributedDataParallel they are averaged over the ranks.

    The momentum of B and the count of steps are saved and loaded with ``optimizer.state_dict()``, under the key
    "pyfeedback". Call this function before ``load_state_dict``, or :meth:`Follower.restore` afterwards. A copy or a
    pickle of the optimizer does not step B, and a warning is logged.

    If ``step`` gets a closure, B takes its step after the first evaluation, and the gradients of B in the others are
    dropped. In a CUDA graph, rules with probes or ``growth`` raise an error, and a learning rate that is not a tensor
    is constant.

    Args:
        optimizer: a torch.optim.Optimizer.
        model: a model with feedback layers, or DistributedDataParallel of one.
        lr, momentum: of rules with units; by default, in each step, those of the optimizer's group that has W, so that
            schedulers apply, and no momentum if the optimizer has no option with this name. If W is frozen and in no
            group, those of the first group.
        noise, skip_nonfinite, total_steps: as in :class:`FeedbackSGD`.

    Returns:
        The :class:`Follower`, which is only needed for reports and to stop.

    Raises:
        TypeError: ``optimizer`` is not a torch.optim.Optimizer.
        ValueError: ``model`` has no feedback layer, ``optimizer`` has no weight of one, it steps feedback weights
            already, a number is out of range, or a rule is not supported: one that combines tie with other terms that
            read data, and kp with a ``tau`` and a weight that is computed from other parameters.
    """
    optimizer = _with_hooks(optimizer)
    for name, value in {"lr": lr, "momentum": momentum, "noise": noise}.items():
        if value is not None or name == "noise":
            check_option(name, value)
    layers, names = layers_of(model)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    weights = {b: weight_parameters(layer) for b, layer in layers.items()}
    others = [b for b, own in weights.items() if trained.isdisjoint(own) and any(p.requires_grad for p in own)]
    if layers and len(others) == len(layers):
        raise ValueError("optimizer has no weight of a feedback layer of model, expected one that trains the model")
    for b in others:
        del layers[b]
    _check_rules(layers, names)
    _take_over(optimizer, layers, names)
    wrapped = isinstance(model, DistributedDataParallel) or bool(data_parallel(layers.values()))
    set_gradients(layers, wrapped)
    for b, layer in layers.items():
        if takes_step_of_weight(layer) and not wrapped:
            b.requires_grad_(False)  # B takes the step of W, so a computed W needs no gradient of B either
    follower = Follower(optimizer, layers, names, lr, momentum, noise, skip_nonfinite)
    if others:
        described = ", ".join(names[b] for b in others)
        _log.warning("the optimizer has no weight of these layers, so it does not step their feedback: %s", described)
    follower._warn_of_slow_feedback(total_steps)
    return follower


class Follower(FeedbackSGD):
    """Steps feedback weights before each step of another optimizer; made by :func:`follow`.

    ``time_constants()``, ``probe_counts()`` and ``probe_seed`` are those of :class:`FeedbackSGD`.
    """

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
        self._passes = PassGradients(layers, self._optimizer)
        self._taken: dict[nn.Parameter, tuple[Tensor, int]] = {}
        self._before: dict[nn.Parameter, Tensor] = {}  # W before the step, by feedback weights that take W's step
        self._held: dict[nn.Parameter, int] = {}  # versions of feedback weights that the optimizer has as well
        options = {"lr": 0.0, "momentum": 0.0, "nesterov": False, "noise": noise, "skip_nonfinite": skip_nonfinite}
        groups: list = [{"params": [b]} for b in layers]
        Optimizer.__init__(self, groups or [{"params": []}], {**options, "weight_decay": 0.0})
        self._read_options(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._on_step),
            optimizer.register_step_post_hook(self._on_stepped),
            optimizer.register_state_dict_post_hook(self._on_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._on_load_state_dict),
        ]
        _warn_of_copies(optimizer)
        for layer in layers.values():
            _followers[layer] = weakref.ref(self)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that is followed; None if it no longer exists."""
        return self._optimizer()

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
        for b, before in self._before.items():
            layer = self._layers[b]
            (change, own) = local([current_weight(layer) - before, b])
            own.add_(change if layer.mixing is None else layer.factor_gradient(change), alpha=layer.rule.tie)
        self._before = {}
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
        held = {p for group in optimizer.param_groups for p in group["params"]}
        self._held = {b: b._version for b in self._layers if b in held}
        for b in self._layers:
            b.grad = None

    def _refuse_converted(self) -> None:
        """Release the feedback weights of layers that were unconverted; raise if they have others now."""
        for b, layer in self._replaced():
            if getattr(layer, "feedback", None) is not None:
                raise RuntimeError(
                    f"{self._names[b]} was converted again, expected pyfeedback.convert(model, rule, optimizer=...) or "
                    "pyfeedback.optim.follow after it"
                )
            self.release(b)

    def _replaced(self) -> list[tuple[nn.Parameter, FeedbackLayer]]:
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
            if b in uncalled or all(p.grad is None or p not in groups for p in own):
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


def _with_hooks(optimizer: Any) -> Optimizer:
    """Return the optimizer, or the one that it wraps without hooks of its own, as that of Accelerate does."""
    if isinstance(optimizer, RowOptimizer):
        raise ValueError(f"optimizer is {describe(optimizer)}, which steps feedback weights itself, expected another")
    while isinstance(optimizer, Optimizer) and not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        optimizer = getattr(optimizer, "optimizer", None)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is {describe(optimizer)}, expected a torch.optim.Optimizer")
    return optimizer


def takes_step_of_weight(layer: FeedbackLayer) -> bool:
    """Whether B adds the change of W: under Kolen-Pollack, unless it is known only after the next forward pass."""
    return is_tied(layer.rule) and not is_computed_by_forward(layer)


def _group_of(layer: FeedbackLayer, groups: dict[Any, dict], optimizer: Optimizer) -> dict[str, Any]:
    """Return the group that has W, or the first one if W is frozen and in none."""
    return next((groups[p] for p in weight_parameters(layer) if p in groups), optimizer.param_groups[0])


def _check_rules(layers: dict[nn.Parameter, FeedbackLayer], names: dict[nn.Parameter, str]) -> None:
    for b, layer in layers.items():
        rule, name = layer.unscheduled or layer.rule, names[b] or "the layer"
        if rule.tie and not is_tied(rule) and (rule.reads_data or is_computed(layer)):
            raise ValueError(f"{name} follows {rule}, which has tie and other terms, expected tie and decay, or no tie")
        if rule.tie and rule.tau and is_computed(layer):
            raise ValueError(
                f"{name}.weight is computed from other parameters, expected a parameter: kp with a tau makes it decay"
            )


def _take_over(optimizer: Optimizer, layers: dict[nn.Parameter, FeedbackLayer], names: dict[nn.Parameter, str]) -> None:
    """Release these feedback weights from the optimizers that have stepped them until now."""
    taken = []
    for b, layer in layers.items():
        owner = _followers.get(layer, lambda: None)()
        if owner is not None:
            for replaced, _ in owner._replaced():
                owner.release(replaced)
            if b in owner._layers:
                if owner.optimizer is optimizer:
                    raise ValueError(f"optimizer already steps {names[b] or 'model'}.feedback, expected one follow")
                owner.release(b)
                taken.append(names[b])
    if taken:
        _log.warning("another optimizer has stepped the feedback of these layers until now: %s", ", ".join(taken))


def _warn_of_copies(optimizer: Optimizer) -> None:
    """Make a copy or a pickle of the optimizer log a warning: it has no hooks."""

    def reduce(protocol: Any) -> Any:
        _log.warning(
            "a copy of %s does not step the feedback weights: call pyfeedback.optim.follow on the copy",
            type(optimizer).__name__,
        )
        return type(optimizer).__reduce_ex__(optimizer, protocol)

    vars(optimizer)["__reduce_ex__"] = reduce
