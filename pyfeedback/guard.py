"""Warnings about training that does not do what its user expects, in the first steps of every optimizer.

torch.optim calls a hook after each step of every optimizer. In the third step of an optimizer, the version counters of
W and B are compared with those of its first step, and its options with the rules. This reads no tensor and happens
once. After 10, 100, 1,000 ... steps, the feedback weights are searched for infinities and nans, which synchronizes with
a GPU. All other steps only count. A compiled step, torch.compile(optimizer.step), is not examined.
"""

import logging
import os
import sys
import weakref
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from pyfeedback.core.values import check_flag
from pyfeedback.nn.layer import FeedbackLayer, attached_layers, warn_of_uncalled
from pyfeedback.optim.base import RowOptimizer, local
from pyfeedback.optim.rows import is_tied, weight_parameters

EXAMINED = 3  # the step in which an optimizer is examined

_log = logging.getLogger("pyfeedback")
_enabled = os.environ.get("PYFEEDBACK_GUARD", "on") != "off"

NEEDED = "B does not learn: its rule {why} in the step of an optimizer of pyfeedback.optim, and none was built for it"
NO_OPTIMIZER = (
    "B did not change in the first steps, although W did: no optimizer has it. Pass the optimizer to convert "
    "(optimizer=...), or build it afterwards"
)
NO_GRADIENT = (
    "B did not change in the first steps, although W did: it had no gradient. Clear the gradients after the step of "
    "B's optimizer, not before"
)
DECAYED = (
    "the weight_decay {decay:g} of {optimizer} also acts on B, besides its rule. Set it to 0 in the group of "
    "pyfeedback.feedback_parameters(model), or use pyfeedback.optim.follow"
)
UNEQUAL = (
    "W decays by {weight_decay:g} and B by {decay:g}. Kolen-Pollack needs the same decay: set weight_decay to the "
    "rule's decay, or give the rule a tau"
)
SCALED = (
    "torch.amp.GradScaler divides the gradient of B by the loss scale, but the rule does not multiply it, so that B "
    "hardly moves. Use pyfeedback.optim.follow, or another optimizer of pyfeedback.optim"
)
LATE = (
    "B reads a W that the other optimizer has already updated: step FeedbackSGD before the optimizer of W, or use "
    "pyfeedback.optim.follow"
)
SINGLE = (
    "B only decays: its rule subtracts the mean over the samples of the batch, and there is one. Use larger batches, "
    "or a rule that reads no batch, such as ia-probes"
)
NOT_FINITE = (
    "B has infinities or nans after {count} steps of {optimizer}: the rule diverges. Reduce its coefficients or B's "
    "learning rate, or use a rule without units, such as ia-probes"
)
NOT_FINITE_WITHOUT_UNITS = (
    "B has infinities or nans after {count} steps of {optimizer}. A rule without units moves B towards W whatever the "
    "learning rate, so most likely W diverges: reduce the learning rate of W"
)


class Steps:
    """The steps of one optimizer, and the version counters of its layers (W, B) after the first one."""

    def __init__(self) -> None:
        self.count = 0
        self.next_search = 10  # for infinities and nans
        self.versions: WeakKeyDictionary[FeedbackLayer, tuple[int, int]] = WeakKeyDictionary()


_steps: WeakKeyDictionary[Optimizer, Steps] = WeakKeyDictionary()
# The gradient of W, and its version counter, in one of the first steps of an optimizer of W, by layer.
_applied: WeakKeyDictionary[FeedbackLayer, tuple[weakref.ref[torch.Tensor], int]] = WeakKeyDictionary()


def set_guard(enabled: bool) -> None:
    """Turn the warnings of the first steps on or off; the environment variable PYFEEDBACK_GUARD=off does the same.

    Raises:
        TypeError: ``enabled`` is not True or False.
    """
    global _enabled
    check_flag("enabled", enabled)
    _enabled = enabled


def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if torch.compiler.is_compiling() or not _enabled or not attached_layers:
        return
    steps = _steps.get(optimizer)
    if steps is None:
        steps = _steps[optimizer] = Steps()
    if steps.count < EXAMINED and getattr(optimizer, "found_inf", None):  # GradScaler skipped the update
        return
    steps.count += 1
    if steps.count <= EXAMINED:
        for layer in _layers_of(optimizer):
            grad = weight_parameters(layer)[0].grad
            if grad is not None:
                _applied[layer] = weakref.ref(grad), grad._version
    if steps.count == 1:
        steps.versions.update((layer, _versions(layer)) for layer in _layers_of(optimizer))
    elif steps.count == EXAMINED:
        for problem, names in _problems(optimizer, steps).items():
            _log.warning("%s: %s", _listed(names), problem)
    elif steps.count == steps.next_search:
        steps.next_search *= 10
        _search(optimizer, steps.count)


register_optimizer_step_post_hook(_after_step)


def _layers_of(optimizer: Optimizer) -> Iterator[FeedbackLayer]:
    """The layers whose weight, or a parameter that it is computed from, belongs to this optimizer."""
    params = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in list(attached_layers):
        if any(id(p) in params for p in weight_parameters(layer)):
            yield layer


def _name(layer: FeedbackLayer) -> str:
    return layer.full_name or f"{type(layer).__name__}({layer.extra_repr().removeprefix(', ')})"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _versions(layer: FeedbackLayer) -> tuple[int, int]:
    feedback = layer.feedback
    weights = sum(p._version for p in weight_parameters(layer))
    return weights, 0 if feedback is None else feedback._version


def _problems(optimizer: Optimizer, steps: Steps) -> dict[str, list[str]]:
    """What is wrong with the training of each layer of this optimizer: the names of the layers by problem."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scaled = not isinstance(optimizer, RowOptimizer) and _is_called_by_a_scaler()
    found: dict[str, list[str]] = {}
    if late := [_name(layer) for layer in _late_layers(optimizer, groups)]:
        found[LATE] = late
    uncalled: dict[str, FeedbackLayer] = {}
    attached = {layer: versions for layer, versions in steps.versions.items() if layer in attached_layers}
    for layer, (weight_before, feedback_before) in attached.items():
        feedback, rule, name = layer.feedback, layer.rule, _name(layer)
        if feedback is None or not feedback.numel() or not rule.learns or layer.paused:
            continue
        weight_version, feedback_version = _versions(layer)
        if not layer.called and weight_version != weight_before:
            uncalled[name] = layer
            continue
        problem = None
        if rule.needs_optimizer:
            if not layer.has_optimizer:
                problem = NEEDED.format(why="reads probes" if rule.reads_probes else "makes W and B decay")
        elif feedback_version == feedback_before:
            if weight_version != weight_before and (feedback.requires_grad or layer.has_optimizer):
                problem = NO_GRADIENT if layer.has_optimizer or id(feedback) in groups else NO_OPTIMIZER
        elif not isinstance(optimizer, RowOptimizer) and id(feedback) in groups and feedback.grad is not None:
            decay = groups[id(feedback)].get("weight_decay", 0.0)
            if scaled:
                problem = SCALED
            elif decay and not is_tied(rule):
                problem = DECAYED.format(decay=decay, optimizer=type(optimizer).__name__)
        if problem is None and layer.has_single_sample and rule.reads_data and rule.center:
            problem = SINGLE
        if problem is None and is_tied(rule) and not rule.tau and not rule.expansion:
            weight_decay = groups.get(id(weight_parameters(layer)[0]), {}).get("weight_decay")
            if weight_decay is not None and abs(weight_decay - rule.decay) > 1e-3 * rule.decay:
                problem = UNEQUAL.format(weight_decay=weight_decay, decay=rule.decay)
        if problem is not None:
            found.setdefault(problem, []).append(name)
    if uncalled:
        warn_of_uncalled(uncalled | {_name(layer): layer for layer in attached if layer.called})
    return found


def _late_layers(optimizer: Optimizer, groups: dict[int, dict]) -> Iterator[FeedbackLayer]:
    """Yield the layers whose B reads W in its own step, after another optimizer has applied the gradient of W."""
    for layer in optimizer._layers.values() if isinstance(optimizer, RowOptimizer) else ():
        if layer in attached_layers and layer in _applied and layer.rule.self_:
            weight, (grad, version) = weight_parameters(layer)[0], _applied[layer]
            is_applied = weight.grad is not None and weight.grad is grad() and weight.grad._version == version
            if is_applied and id(weight) not in groups:
                yield layer


def _is_called_by_a_scaler() -> bool:
    """Whether the step that is running was called by torch.amp.GradScaler; the optimizer itself cannot tell."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), torch.amp.GradScaler):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@torch.no_grad()
def _search(optimizer: Optimizer, count: int) -> None:
    """Warn of feedback weights with infinities or nans. One synchronization for each device."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    by_device: dict[torch.device, dict[FeedbackLayer, torch.Tensor]] = {}
    for layer in _layers_of(optimizer):
        if layer.feedback is not None and not layer.feedback.is_meta:
            (feedback,) = local([layer.feedback])
            if feedback.numel():
                by_device.setdefault(feedback.device, {})[layer] = feedback
    bad: dict[str, list[str]] = {}
    for layers in by_device.values():
        norms = torch._foreach_norm(list(layers.values()), torch.inf)
        finite = torch.stack([norm.double() for norm in norms]).isfinite().tolist()
        for layer, is_finite in zip(layers, finite, strict=True):
            if not is_finite:
                bad.setdefault(NOT_FINITE_WITHOUT_UNITS if layer.rule.tau else NOT_FINITE, []).append(_name(layer))
    for message, names in bad.items():
        _log.warning("%s: %s", _listed(names), message.format(count=count, optimizer=type(optimizer).__name__))
