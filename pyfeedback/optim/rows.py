"""What an optimizer of :mod:`pyfeedback.optim` does to one parameter in one step."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyfeedback.nn import FeedbackLayer
from pyfeedback.rules import Rule


class Row(NamedTuple):
    """What moves one parameter: its gradient is ``decay * param - self_ * weight + tie * grad``."""

    param: nn.Parameter
    weight: Tensor
    grad: Tensor
    decay: float
    self_: float
    tie: float
    weight_decay: float = 0.0  # that is no part of the gradient
    by_torch: bool = False  # complex, or with a sparse gradient: updated by the functions of torch.optim


class Scaling(NamedTuple):
    """What torch.amp.GradScaler has done to the gradients."""

    factor: float | None  # by which they are to be multiplied; None where scaler.unscale_ has done it already

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "Scaling | None":
        """What the scaler left on the optimizer; None without a scaler."""
        if getattr(optimizer, "found_inf", None) is None:
            return None
        scale = getattr(optimizer, "grad_scale", None)
        return cls(None if scale is None else 1 / float(scale))


def is_tied(rule: Rule) -> bool:
    """True for Kolen-Pollack: a tie, a decay and nothing else."""
    return rule.tie != 0 and not rule.reads_data and not rule.self_


def is_computed(layer: FeedbackLayer) -> bool:
    """True where the weight is made of other parameters, by a parametrization, weight_norm or pruning.

    Such a weight has no gradient of its own: what a rule reads of it comes by autograd, through the feedback weight.
    """
    return not isinstance(layer.weight, nn.Parameter)


def forward_row(p: nn.Parameter, decay: float, weight_decay: float) -> Row | None:
    """The row of a parameter that is no feedback weight; None without a gradient."""
    grad = p.grad
    if grad is None:
        return None
    return Row(p, p, grad, decay, 0.0, 1.0, weight_decay, grad.is_sparse or grad.is_complex())


def feedback_row(b: nn.Parameter, layer: FeedbackLayer, name: str, by_autograd: bool, noisy: bool) -> Row | None:
    """The row of a feedback weight; None where its rule leaves it."""
    if layer.feedback is not b:
        raise RuntimeError("model has other feedback weights now, expected those this optimizer was made of")
    rule, w = layer.rule, layer.weight
    if rule.reads_data or by_autograd:
        grad, terms = b.grad, (0.0, 0.0, 1.0)  # everything, decay included, is in the gradient
    elif rule.tie and is_computed(layer):
        raise RuntimeError(
            f"{name}.weight is computed from other parameters, and was not when this optimizer was built: expected "
            "weight_norm, parametrizations and pruning to be applied before"
        )
    else:
        grad, terms = w.grad if rule.tie else w, (rule.decay, rule.self_, rule.tie)
    if layer.mixing is not None:  # the feedback is a factor of what stands beside the weight
        w, grad = b, grad if grad is b.grad or grad is None else layer.factor_gradient(grad)
    return Row(b, w, grad, *terms) if grad is not None and (rule.learns or noisy) else None


def unscaled(row: Row, layer: FeedbackLayer | None, name: str, scaling: Scaling | None, has_weight: bool) -> Row:
    """The row without the loss scale, which a rule's own gradient never had and W's gradient has.

    Args:
        layer: of a feedback weight, None for a forward parameter.
        has_weight: whether the optimizer steps W as well, so that ``scaling`` is that of W's gradient.
    """
    if scaling is None:
        return row
    factor = scaling.factor
    if layer is None:
        return row if factor is None else row._replace(tie=row.tie * factor)
    rule, by_autograd = layer.rule, row.grad is row.param.grad
    if by_autograd and factor is None:
        raise RuntimeError("scaler.unscale_ divided the rules' own gradients, expected scaler.step alone")
    if not rule.tie:
        return row
    if by_autograd and not rule.reads_data:
        # The gradient is decay * B - self * W + tie * scale * dW: what is not scaled is taken out and put in again.
        assert factor is not None
        rest = 1 - factor
        return row._replace(decay=row.decay + rest * rule.decay, self_=rest * rule.self_, tie=factor)
    if not has_weight:
        raise RuntimeError(
            f"{name} follows {rule.name}, which reads weight.grad, and only the optimizer of weight has its loss "
            "scale: under GradScaler expected pyfeedback.optim.SGD or AdamW, which step both"
        )
    if not by_autograd:
        return row if factor is None else row._replace(tie=row.tie * factor)
    if layer.weight.grad is None:
        raise RuntimeError(f"{name}.weight has no gradient, expected one: {rule.name} reads its loss scale there")
    assert factor is not None
    return row._replace(weight=layer.weight.grad, self_=rule.tie * (1 - factor))
