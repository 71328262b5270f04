"""Feedback weights that are stepped together with an optimizer of torch.optim or of any other package."""

import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pyfeedback.core.values import check_flag, describe
from pyfeedback.nn import FeedbackLayer
from pyfeedback.optim.base import RowOptimizer, check_option, layers_of, set_gradients
from pyfeedback.optim.follower import Follower
from pyfeedback.optim.passes import data_parallel
from pyfeedback.optim.rows import is_computed, is_tied, takes_step_of_weight, weight_parameters
from pyfeedback.rules import Rule

NO_WEIGHT = "optimizer has no weight of a feedback layer of model, expected one that trains the model"
MIXED_TIE = "{name} follows {rule}, which has tie and other terms, expected tie and decay, or no tie"

_log = logging.getLogger("pyfeedback")
_followers: weakref.WeakKeyDictionary[FeedbackLayer, weakref.ref[Follower]] = weakref.WeakKeyDictionary()


def follow(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    lr: float | Tensor | None = None,
    momentum: float | None = None,
    noise: float = 0.0,
    skip_nonfinite: bool = False,
    total_steps: int | None = None,
) -> Follower:
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
    check_flag("skip_nonfinite", skip_nonfinite)
    layers, names = layers_of(model)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    weights = {b: weight_parameters(layer) for b, layer in layers.items()}
    others = [b for b, own in weights.items() if trained.isdisjoint(own) and any(p.requires_grad for p in own)]
    if layers and len(others) == len(layers):
        raise ValueError(NO_WEIGHT)
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
    _followers.update((layer, weakref.ref(follower)) for layer in layers.values())
    if others:
        described = ", ".join(names[b] for b in others)
        _log.warning("the optimizer has no weight of these layers, so it does not step their feedback: %s", described)
    follower._warn_of_slow_feedback(total_steps)
    return follower


def check_follow(optimizer: Optimizer, weights: Iterable[Tensor], rules: Mapping[str, Rule]) -> None:
    """Raise the errors of :func:`follow` that are known before a conversion.

    Args:
        weights: of the layers that will be converted.
        rules: theirs, by the name of the layer.
    """
    groups = _with_hooks(optimizer).param_groups
    trainable = [w for w in weights if w.requires_grad]
    if trainable and {p for group in groups for p in group["params"]}.isdisjoint(trainable):
        raise ValueError(NO_WEIGHT)
    for name, rule in rules.items():
        if rule.tie and not is_tied(rule) and rule.reads_data:
            raise ValueError(MIXED_TIE.format(name=name or "the layer", rule=rule))


def _with_hooks(optimizer: Any) -> Optimizer:
    """Return the optimizer, or the one that it wraps without hooks of its own, as that of Accelerate does."""
    if isinstance(optimizer, RowOptimizer):
        raise ValueError(f"optimizer is {describe(optimizer)}, which steps feedback weights itself, expected another")
    while isinstance(optimizer, Optimizer) and not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        optimizer = getattr(optimizer, "optimizer", None)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is {describe(optimizer)}, expected a torch.optim.Optimizer")
    return optimizer


def _check_rules(layers: dict[nn.Parameter, FeedbackLayer], names: dict[nn.Parameter, str]) -> None:
    for b, layer in layers.items():
        rule, name = layer.unscheduled or layer.rule, names[b] or "the layer"
        if rule.tie and not is_tied(rule) and (rule.reads_data or is_computed(layer)):
            raise ValueError(MIXED_TIE.format(name=name, rule=rule))
        if rule.tie and rule.tau and is_computed(layer):
            raise ValueError(
                f"{name}.weight is computed from other parameters, expected a parameter: kp with a tau makes it decay"
            )


def _take_over(optimizer: Optimizer, layers: dict[nn.Parameter, FeedbackLayer], names: dict[nn.Parameter, str]) -> None:
    """Release these feedback weights from the optimizers that have stepped them until now."""
    taken = []
    for b, layer in layers.items():
        reference = _followers.get(layer)
        owner = None if reference is None else reference()
        if owner is not None:
            for replaced, _ in owner.replaced():
                owner.release(replaced)
            if owner.has(b):
                if owner.optimizer is optimizer:
                    raise ValueError(f"optimizer already steps {names[b] or 'model'}.feedback, expected one follow")
                owner.release(b)
                taken.append(names[b])
    if taken:
        _log.warning("another optimizer has stepped the feedback of these layers until now: %s", ", ".join(taken))
