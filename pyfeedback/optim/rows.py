"""The update of one parameter in one step of an optimizer of :mod:`pyfeedback.optim`."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyfeedback.nn import FeedbackLayer
from pyfeedback.rules import Rule


class Row(NamedTuple):
    """The update of one parameter, along the gradient ``decay * param - self_ * weight + tie * grad``."""

    param: nn.Parameter
    weight: Tensor
    grad: Tensor
    decay: float
    self_: float
    tie: float
    weight_decay: float = 0.0  # decoupled: not part of the gradient
    by_torch: bool = False  # complex, or with a sparse gradient: updated by the functions of torch.optim
    step_size: float | None = None  # of a rule with a time constant, instead of the optimizer's learning rate


class Columns(NamedTuple):
    """The rows of one call: for each field of :class:`Row`, its values in all rows."""

    param: tuple[nn.Parameter, ...]
    weight: tuple[Tensor, ...]
    grad: tuple[Tensor, ...]
    decay: tuple[float, ...]
    self_: tuple[float, ...]
    tie: tuple[float, ...]
    weight_decay: tuple[float, ...]
    by_torch: tuple[bool, ...]
    step_size: tuple[float | None, ...]

    def rows(self) -> list[Row]:
        """Return the rows."""
        return [Row(*values) for values in zip(*self, strict=True)]


class LossScale(NamedTuple):
    """The loss scale by which torch.amp.GradScaler has multiplied the gradients."""

    factor: float | None  # 1 / scale; None if scaler.unscale_ has already been called

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "LossScale | None":
        """Return the scale that a scaler has set on the optimizer; None without a scaler."""
        if getattr(optimizer, "found_inf", None) is None:
            return None
        scale = getattr(optimizer, "grad_scale", None)
        return cls(None if scale is None else 1 / float(scale))


def has_hooks(p: Tensor) -> bool:
    """Whether hooks are to read or change the gradient that autograd computes for ``p``."""
    return bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))


def is_tied(rule: Rule) -> bool:
    """Whether the rule is Kolen-Pollack: tie and decay, and nothing else."""
    return rule.tie != 0 and not rule.has_data_terms and not rule.self_


def is_computed(layer: FeedbackLayer) -> bool:
    """Whether the weight is computed from parameters: by a parametrization, weight_norm, pruning or the forward itself.

    Such a weight has no ``.grad``, so autograd computes the rule's gradient and stores it in the feedback weight.
    """
    return layer.weight_name not in layer.weight_owner()._parameters or is_computed_by_forward(layer)


def is_computed_by_forward(layer: FeedbackLayer) -> bool:
    """Whether the forward computes the weight, so that its new value is not known before the next forward pass."""
    return getattr(layer, "computed", None) is not None


def forward_row(p: nn.Parameter, decay: float, weight_decay: float) -> Row | None:
    """Return the row of a forward parameter; None if it has no gradient."""
    grad = p.grad
    if grad is None:
        return None
    return Row(p, p, grad, decay, 0.0, 1.0, weight_decay, grad.is_sparse or grad.is_complex())


def feedback_row(
    b: nn.Parameter,
    layer: FeedbackLayer,
    name: str,
    by_autograd: bool,
    noisy: bool,
    step: int = 0,
    estimate: Tensor | None = None,
) -> Row | None:
    """Return the row of a feedback weight; None if its rule does not change it.

    Args:
        step: the number of steps made, for a time constant that grows.
        estimate: the gradient of a rule that reads probes; None in a step without an estimate.
    """
    rule, w = layer.rule, layer.weight
    step_size = 1 / rule.tau_at(step) if rule.tau and not is_tied(rule) else None
    if rule.reads_probes:
        step_size = None if step_size is None else min(1.0, step_size * rule.every_at(step))
        return None if estimate is None else Row(b, b, estimate, 0.0, 0.0, 1.0, step_size=step_size)
    if rule.reads_data or by_autograd:
        grad, terms = b.grad, (0.0, 0.0, 1.0)  # the gradient includes every term, decay too
    elif rule.tie and is_computed(layer):
        raise RuntimeError(
            f"{name}.weight is computed from other parameters, but was a parameter when this optimizer was created: "
            "expected weight_norm, parametrizations and pruning to be applied earlier"
        )
    else:
        grad, terms = w.grad if rule.tie else w, (rule.decay, rule.self_, rule.tie)
    if layer.mixing is not None:  # B is a product, and the feedback weight is its second factor
        w, grad = b, grad if grad is b.grad or grad is None else layer.factor_gradient(grad)
    return Row(b, w, grad, *terms, step_size=step_size) if grad is not None and (rule.learns or noisy) else None


def without_loss_scale(
    row: Row, layer: FeedbackLayer | None, name: str, loss_scale: LossScale | None, has_weight: bool
) -> Row:
    """Return the row with the loss scale removed: W's gradient is scaled, but a rule's own gradient is not.

    Args:
        layer: the layer of a feedback weight; None for a forward parameter.
        has_weight: whether the optimizer also updates W, so that ``loss_scale`` is the scale of W's gradient.
    """
    if loss_scale is None:
        return row
    factor = loss_scale.factor
    if layer is None:
        return row if factor is None else row._replace(tie=row.tie * factor)
    rule, by_autograd = layer.rule, row.grad is row.param.grad
    if by_autograd and factor is None:
        raise RuntimeError("scaler.unscale_ divided the rules' own gradients, expected only scaler.step")
    if not rule.tie:
        return row
    if by_autograd and not rule.reads_data:
        # The gradient is decay * B - self * W + tie * scale * dW. Dividing it by scale divides the first two terms too:
        # the rest of these is added here.
        assert factor is not None
        rest = 1 - factor
        return row._replace(decay=row.decay + rest * rule.decay, self_=rest * rule.self_, tie=factor)
    if not has_weight:
        raise RuntimeError(
            f"{name} follows {rule.name}, which reads weight.grad, but only the optimizer of weight has the loss "
            "scale: under GradScaler expected pyfeedback.optim.SGD or AdamW, which update both"
        )
    if not by_autograd:
        return row if factor is None else row._replace(tie=row.tie * factor)
    if layer.weight.grad is None:
        raise RuntimeError(f"{name}.weight has no gradient, expected one: {rule.name} reads the loss scale from it")
    assert factor is not None
    return row._replace(weight=layer.weight.grad, self_=rule.tie * (1 - factor))


def takes_step_of_weight(layer: FeedbackLayer) -> bool:
    """Whether B can add the change of W: under Kolen-Pollack, unless it is known only after the next forward pass."""
    return is_tied(layer.rule) and not is_computed_by_forward(layer)


def weight_parameters(layer: FeedbackLayer) -> list[nn.Parameter]:
    """Return the parameter W of a layer, or those that W is computed from."""
    owner, name = layer.weight_owner(), layer.weight_name
    parameter = owner._parameters.get(name)
    if parameter is not None:
        return [parameter]
    # The names in pruning and spectral_norm, in the older weight_norm, and in parametrizations.
    computed_from = {f"{name}_{suffix}" for suffix in ("orig", "g", "v")}
    named = owner.named_parameters()
    return [p for other, p in named if other in computed_from or other.startswith(f"parametrizations.{name}.")]


def current_weight(layer: FeedbackLayer) -> Tensor:
    """Return W, computed from the current values of its parameters, without changing the state of the computation."""
    if not is_computed(layer):
        return layer.weight.detach()
    modes = {module: module.training for module in layer.modules()}
    layer.eval()  # spectral_norm makes no power iteration
    for hook in list(layer._forward_pre_hooks.values()):
        if type(hook).__module__.startswith("torch.nn.utils."):  # computes the weight before each forward pass
            hook(layer, ())
    weight = layer.weight.detach()
    for module, training in modes.items():
        module.training = training
    return weight
