"""The calls of a step, repeated in later steps without examining every parameter again.

Rules, weights and options rarely change between steps, but gradients always do. A repeated step therefore reads the new
gradients and compares everything else on which the calls depend. If anything differs, the step examines all parameters.
"""

import math
from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from pyfeedback.backends.dispatch import current_backend
from pyfeedback.core.tensors import PLAIN
from pyfeedback.nn import FeedbackLayer
from pyfeedback.optim.rows import Columns, has_hooks, is_computed

Call = tuple[bool, tuple, Columns]  # whether torch's own functions make the update, its options, and its rows


class Replay:
    """The calls of one step of an optimizer."""

    def __init__(self, optimizer: Any, calls: list[Call], sources: list[list[nn.Parameter | None]]):
        self._sources = sources
        self._columns = [columns for *_, columns in calls]
        for i, of_rows in enumerate(sources):  # the memory of gradients is not to be kept
            read = zip(self._columns[i].grad, of_rows, strict=True)
            kept = tuple(grad if source is None else source for grad, source in read)
            self._columns[i] = self._columns[i]._replace(grad=kept)
        groups = optimizer.param_groups
        group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        self._groups = [group_of[columns.param[0]] for columns in self._columns]
        self._layout = _layout(groups)
        self._options = [options for _, options, _ in calls]
        self._equal_options = _equal([optimizer._options(group) for group in groups])
        self._backend, self._prepared = current_backend(), [_prepared(optimizer, call) for call in calls]
        self._layers = [_facts(b, layer) for b, layer in optimizer._layers.items()]
        updated = {p for columns in self._columns for p in columns.param}
        idle = [p for p in group_of if p not in updated]
        self._without_gradient = [
            source
            for p in idle
            for source in ((p, optimizer._layers[p].weight) if p in optimizer._layers else (p,))
            if p not in optimizer._layers or optimizer._layers[p].rule.learns
        ]

    @classmethod
    def of(cls, optimizer: Any, calls: list[Call]) -> "Replay | None":
        """Return the calls for later steps; None if they depend on more than gradients, rules, weights and options."""
        layers, options = optimizer._layers, [options for _, options, _ in calls]
        if (
            torch.compiler.is_compiling()
            or getattr(optimizer, "found_inf", None) is not None
            or any(by_torch or columns.step_size[0] is not None for by_torch, _, columns in calls)
            or any(isinstance(option, Tensor) for each in options for option in each)
            or any(group.get("noise") for group in optimizer.param_groups)
            or optimizer._released  # they may be converted again
            or not all(_is_simple(layer) for layer in layers.values())
        ):
            return None
        sources = [
            [_source(p, layers.get(p), grad) for p, grad in zip(columns.param, columns.grad, strict=True)]
            for *_, columns in calls
        ]
        return cls(optimizer, calls, sources)

    def repeat(self, optimizer: Any) -> bool:
        """Make the calls with the current gradients and options; False, without any call, if they have to be found."""
        groups = optimizer.param_groups
        options = [optimizer._options(group) for group in groups]
        if (
            torch.compiler.is_compiling()
            or getattr(optimizer, "found_inf", None) is not None
            or _layout(groups) != self._layout
            or _equal(options) != self._equal_options
            or not all(map(_is_unchanged, self._layers))
        ):
            return False
        for p in self._without_gradient:
            if p.grad is not None:
                return False
        grads: list[list[Any]] = []
        for columns, sources in zip(self._columns, self._sources, strict=True):
            read = zip(columns.grad, sources, strict=True)
            grads.append([kept if source is None else source.grad for kept, source in read])
            for grad in grads[-1]:
                if grad is None or grad.is_sparse:
                    return False
        is_same_backend = current_backend() == self._backend
        for i, current in enumerate(options[group] for group in self._groups):
            prepared = self._prepared[i] if is_same_backend else None
            if prepared is not None and _differs_in_rate_only(current, self._options[i]):
                prepared(grads[i], current[0])
            else:
                optimizer._update(self._columns[i]._replace(grad=tuple(grads[i])), *current)
        return True


def _prepared(optimizer: Any, call: Call) -> Callable[..., None] | None:
    """The update of a call as a function of gradients and learning rate; None if more than these may change."""
    _, options, columns = call
    plain = PLAIN.issuperset(map(type, (*columns.param, *columns.weight, *columns.grad)))
    return optimizer._prepare(columns, *options) if plain else None


def _differs_in_rate_only(options: tuple, before: tuple) -> bool:
    """Whether ``options`` differ from those of the earlier step only in the learning rate, and it is a valid float."""
    lr = options[0]
    return type(lr) is float and 0.0 <= lr < math.inf and all(map(is_, options[1:], before[1:]))


def _layout(groups: list[dict[str, Any]]) -> list[tuple]:
    """The parameters of each group, and the options of its own rows."""
    return [(group.get("weight_decay"), group.get("noise"), *map(id, group["params"])) for group in groups]


def _equal(options: list[tuple]) -> list[int] | None:
    """Which groups have the same options, whatever these are; None if one is a tensor."""
    for each in options:
        for option in each:
            if isinstance(option, Tensor):
                return None
    return [options.index(each) for each in options]


def _is_simple(layer: FeedbackLayer) -> bool:
    """Whether the update of B depends only on B, W and their gradients."""
    rule = layer.rule
    if rule.tau or rule.reads_probes or layer.mixing is not None or hasattr(layer, "computed"):
        return False
    return layer.called and not is_computed(layer)


def _facts(b: nn.Parameter, layer: FeedbackLayer) -> tuple:
    of_weight, state = layer.weight_owner()._parameters, (b.requires_grad, has_hooks(b), layer.paused)
    return layer, layer.rule, layer._parameters, b, of_weight, layer.weight_name, layer.weight, state


def _is_unchanged(facts: tuple) -> bool:
    layer, rule, own, b, of_weight, name, w, state = facts
    return (
        own.get("feedback") is b  # not if the layer was unconverted
        and layer.rule is rule
        and layer.called
        and of_weight.get(name) is w
        and (b.requires_grad, has_hooks(b), layer.paused) == state
    )


def _source(p: nn.Parameter, layer: FeedbackLayer | None, grad: Tensor) -> nn.Parameter | None:
    """The parameter that has the gradient which a row reads; None if the row reads a weight in its place."""
    for source in (p, *(() if layer is None else (layer.weight,))):
        if grad is source.grad:
            return source
    return None
