"""How far the gradient of a whole model is from that of backprop."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from pyfeedback.core.values import check_model
from pyfeedback.metrics.alignment import (
    angle_of,
    gradients_of,
    inner_products,
    loss_of,
    norm_ratio_of,
    preserving_state,
    weight_transport,
)
from pyfeedback.nn.model import feedback_parameters


@dataclass(frozen=True)
class GradientAlignment:
    """The gradient g of a model through its feedback weights, beside the gradient t of backprop on the same batch.

    Attributes:
        angle: the angle between g and t, over all forward parameters together, in degrees: below 90, a small step along
            -g reduces the loss. nan if either is zero.
        norm_ratio: |g| / |t|; nan if t is zero.
        parameters: the angle of each forward parameter that requires a gradient, by name; nan if either is zero.
    """

    angle: float
    norm_ratio: float
    parameters: dict[str, float]


def gradient_alignment(
    model: nn.Module, batch: tuple | None = None, loss: Callable[..., Tensor] | None = None
) -> GradientAlignment:
    """Return the angle between the gradient of ``model`` under its rules and the gradient of backprop on a batch.

    The gradient is that of all forward parameters, with biases, normalizations and embeddings. The model runs twice.
    The gradients of parameters, the buffers and the random state do not change.

    Args:
        model: any model; without feedback layers, both gradients are those of backprop.
        batch: ``(input, target)``.
        loss: ``loss(model(input), target)`` returns the scalar loss. Without a batch, ``loss()`` runs the model itself
            and returns the loss, for models with several inputs or outputs.

    Raises:
        ValueError: ``loss`` is None, or takes arguments without a ``batch``; or no forward parameter requires a
            gradient.
        TypeError: an argument has the wrong type, or ``loss`` returns something else than a tensor of one number.
    """
    check_model(model)
    evaluate = loss_of(model, batch, loss)
    if evaluate is None:
        raise ValueError("loss is None, expected a function of the model's output and the target")
    feedback = {id(p) for p in feedback_parameters(model)}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in feedback}
    if not parameters:
        raise ValueError("model has no forward parameter that requires a gradient")
    with preserving_state(model):
        found = gradients_of(evaluate(), list(parameters.values()))
    with preserving_state(model), weight_transport(model):
        true = gradients_of(evaluate(), list(parameters.values()))
    products = inner_products(found, true)
    total = tuple(math.fsum(of_all) for of_all in zip(*products, strict=True))
    angles = {name: angle_of(*p) for name, p in zip(parameters, products, strict=True)}
    return GradientAlignment(angle_of(*total), norm_ratio_of(*total), angles)
