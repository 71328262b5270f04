"""The feedback layers, feedback weights and forward parameters of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import nn

from pyfeedback.core.values import check_model
from pyfeedback.nn.layer import FeedbackLayer, attached_layers


def feedback_layers(model: nn.Module) -> Iterator[tuple[str, FeedbackLayer]]:
    """Yield the name and module of each layer of ``model`` that has a feedback weight; shared layers appear once."""
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, FeedbackLayer) and module.feedback is not None:
            yield name, module


def feedback_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield each feedback weight of ``model`` once."""
    seen = set()
    for _, layer in feedback_layers(model):
        if layer.feedback is not None and id(layer.feedback) not in seen:
            seen.add(id(layer.feedback))
            yield layer.feedback


def forward_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Return every parameter of ``model`` that is not a feedback weight, for the optimizer of the task."""
    check_model(model)
    feedback = {id(p) for p in feedback_parameters(model)}
    return (p for p in model.parameters() if id(p) not in feedback)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the modules of ``model`` if the block raises an error: their classes and attributes, with all hooks."""
    before: dict[nn.Module, tuple[type, dict[str, Any]]] = {}
    for module in model.modules():
        before[module] = (
            type(module),
            {
                name: (value, copy(value) if isinstance(value, (dict, set)) else value)
                for name, value in vars(module).items()
            },
        )
    try:
        yield
    except BaseException:
        for module in list(model.modules()):
            is_new = module not in before or not issubclass(before[module][0], FeedbackLayer)
            if isinstance(module, FeedbackLayer) and is_new:
                attached_layers.pop(module, None)
        for module, (cls, attributes) in before.items():
            if type(module) is not cls:
                module.__class__ = cls
            vars(module).clear()
            for name, (value, content) in attributes.items():
                if value is not content:  # the same object, because the handle of a hook refers to it
                    value.clear()
                    value.update(content)
                vars(module)[name] = value
        raise
