"""The feedback layers, feedback weights and forward parameters of a model."""

from collections.abc import Iterator

from torch import nn

from pyfeedback.core.values import check_model
from pyfeedback.nn.layer import FeedbackLayer


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
