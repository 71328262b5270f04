"""SGD for the feedback weights alone, to use with an optimizer of torch.optim, or for a whole model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from pyfeedback import functional
from pyfeedback.backends.dispatch import current_implementation
from pyfeedback.core.step_options import StepOptions
from pyfeedback.core.values import check_flag
from pyfeedback.optim.base import Params, RowOptimizer, check_option, feedback_of, forward_groups, listed, local
from pyfeedback.optim.rows import Columns, Row, feedback_row, forward_row, is_tied
from pyfeedback.rules import Rule


class FeedbackSGD(RowOptimizer):
    """SGD for the feedback weights of a model, all of them in one pass.

    If a rule reads no activations (sa, kp and fa), the step computes the rule's gradient from W, its gradient and B,
    and autograd does no work for it: the constructor sets ``feedback.requires_grad_(False)`` on these layers. Build the
    optimizer before DistributedDataParallel wraps the model, or pass the wrapped model, which still gets a gradient for
    every parameter. Under other rules autograd computes ``feedback.grad``, and the step uses it. The same holds for
    every rule of a layer whose weight is computed from other parameters (weight_norm, parametrizations, pruning); apply
    these before you build the optimizer.

    Step it before the optimizer of the forward weights (:func:`pyfeedback.forward_parameters`), because sa reads W
    before W is updated, and before their gradients are cleared. Kolen-Pollack aligns if both optimizers take the same
    steps: the same learning rate and momentum, and a weight decay equal to the rule's ``decay``.

    With ``torch.amp.GradScaler``, call ``scaler.step`` on both optimizers, this one first. Kolen-Pollack reads W's
    gradient, and only the optimizer of W has its loss scale: use :class:`SGD` or :class:`AdamW` for this rule.

    Args:
        model: a model with feedback layers. Each step follows the rules that the layers have at that time.
        lr: learning rate. If it is a tensor on the parameters' device, each step reads it there, so that a captured
            CUDA graph uses its current value, and the noise comes from the device's generator.
        momentum, nesterov: as in torch.optim.SGD.
        noise: standard deviation of the Gaussian noise added to each gradient element before momentum. It depends on
            ``torch.manual_seed``.
        skip_nonfinite: do not change any feedback weight if a gradient contains an infinity or nan.
        total_steps: the length of the run, to warn of feedback weights that are too slow to find W in it.

    Source: the update with noise is that of Kunin et al., ICML 2020, section 5.

    Raises:
        ValueError: ``model`` has no feedback layer, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        momentum: float = 0.0,
        nesterov: bool = False,
        noise: float = 0.0,
        skip_nonfinite: bool = False,
        total_steps: int | None = None,
    ):
        for name, value in {"lr": lr, "momentum": momentum, "noise": noise}.items():
            check_option(name, value)
        check_flag("nesterov", nesterov)
        check_flag("skip_nonfinite", skip_nonfinite)
        if nesterov and momentum == 0:
            raise ValueError("nesterov is True with momentum 0, expected a momentum above 0")
        self._layers, self._names = feedback_of(model)
        if type(self) is FeedbackSGD and self._tied_rules():
            raise ValueError(
                "model follows kp with a tau, expected SGD or AdamW of pyfeedback.optim: W has to decay too"
            )
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "noise": noise}
        super().__init__([{"params": list(self._layers)}], {**options, "skip_nonfinite": skip_nonfinite})
        self._warn_of_slow_feedback(total_steps)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group of feedback weights with its own options, as in torch.optim; they must belong to the model."""
        params = listed(param_group["params"])
        for p in params:
            if p not in self._layers:
                raise ValueError(
                    f"params contains a tensor of shape {tuple(p.shape)}, expected feedback weights of the model"
                )
        torch.optim.Optimizer.add_param_group(self, {**param_group, "params": params})

    def _options(self, group: dict[str, Any]) -> tuple:
        return group["lr"], group["momentum"], group["nesterov"], group["noise"], group["skip_nonfinite"]

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        layer = self._layers[p]
        step, estimate = group.get("feedback_step", 0), self._estimates.get(p)
        row = feedback_row(p, layer, self._names[p], p.requires_grad, bool(group["noise"]), step, estimate)
        if row is None or not layer.rule.tau or not is_tied(layer.rule):
            return row
        return row._replace(decay=self._tied_decay(layer.rule, group))

    def _tied_decay(self, rule: Rule, group: dict[str, Any]) -> float:
        """Return the decay of W and B under Kolen-Pollack with a time constant, at the group's full learning rate."""
        lr = float(group.get("initial_lr", group["lr"]))
        return (1 - group["momentum"]) / (lr * rule.tau) if lr else 0.0

    def _update(self, columns: Columns, *options) -> None:
        lr, momentum, nesterov, noise, skip_nonfinite = options
        param, weight, grad, decay, self_, tie, *_ = columns
        buffers = [self.state[p].get("momentum_buffer") for p in param] if momentum else []
        if any(buffer is None for buffer in buffers):
            buffers = [self._buffer(p) for p in param]
        on_device = isinstance(lr, Tensor)
        functional.feedback_step_(
            *map(local, (param, weight, grad, buffers)), decay=decay, self_=self_, tie=tie,
            lr=1.0 if on_device else float(lr), momentum=momentum, nesterov=nesterov, noise=noise,
            skip_nonfinite=skip_nonfinite, seed=int(torch.randint(2**62, ())) if noise and not on_device else 0,
            dynamic=_dynamic(lr, noise, param[0].device) if on_device else None,
        )  # fmt: skip

    def _prepare(self, columns: Columns, *options) -> Callable[[list[Tensor], float], None] | None:
        lr, momentum, nesterov, noise, skip_nonfinite = options
        param, weight, _, decay, self_, tie, *_ = columns
        prepare = getattr(current_implementation("feedback_step_", param[0].device.type), "prepare", None)
        if prepare is None or noise or isinstance(lr, Tensor):
            return None
        coefficients = {"decay": decay, "self_": self_, "tie": tie}
        given = StepOptions(float(lr), momentum, nesterov, skip_nonfinite=skip_nonfinite)
        step = prepare(coefficients, given)

        def update(grad: list[Tensor], lr: float) -> None:
            step(param, weight, grad, [self._buffer(p) for p in param] if momentum else [], lr)

        return update

    def _update_by_torch(self, columns: Columns, *options) -> None:
        rows = columns.rows()
        lr, momentum, nesterov, _, skip_nonfinite = options
        grads = [row.grad if row.tie == 1.0 else row.grad * row.tie for row in rows]
        if skip_nonfinite and not all((g._values() if g.is_sparse else g).isfinite().all() for g in grads):
            return
        for row, grad in zip(rows, grads, strict=True):
            sgd(
                [row.param], [grad], [self._buffer(row.param) if momentum else None], has_sparse_grad=grad.is_sparse,
                foreach=False, weight_decay=row.decay, momentum=momentum, lr=lr, dampening=0.0, nesterov=nesterov,
                maximize=False,
            )  # fmt: skip

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


class SGD(FeedbackSGD):
    """``torch.optim.SGD`` for a converted model: W, B and every other parameter, one pass over memory each.

    Forward parameters are updated as by torch.optim.SGD with the same arguments; ``state_dict``, parameter groups,
    schedulers and gradient clipping work the same, too. Each B follows its rule with the same learning rate and
    momentum, and the rule's decay instead of ``weight_decay``. Kolen-Pollack therefore requires ``weight_decay`` to
    equal the rule's ``decay``: ``SGD(convert(model, rule("kp", decay=1e-4)), lr, momentum=0.9, weight_decay=1e-4)``.

    Args:
        model: a model with feedback layers. The optimizer updates the parameters that the model has now.
        lr, momentum, weight_decay, nesterov: as in torch.optim.SGD.
        params: forward parameters, or groups of them with their own options, as for torch.optim.SGD. By default, all
            forward parameters of the model. Each B is updated with the options of the group of its W, except
            ``weight_decay``. Feedback weights in ``params`` itself are left out.
        noise, skip_nonfinite, total_steps: as in :class:`FeedbackSGD`; noise is added to the gradients of the feedback
            only.

    With ``torch.amp.GradScaler``, ``scaler.step(optimizer)`` is enough: the step divides scaled gradients by the loss
    scale, and does not divide a rule's own gradient. ``scaler.unscale_`` would divide that as well, so to clip
    gradients use two optimizers, one of torch.optim and :class:`FeedbackSGD`.

    Raises:
        ValueError: ``model`` has no feedback layer, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        params: Params | None = None,
        noise: float = 0.0,
        skip_nonfinite: bool = False,
        total_steps: int | None = None,
    ):
        check_option("weight_decay", weight_decay)
        super().__init__(model, lr, momentum, nesterov, noise, skip_nonfinite, total_steps)
        self.defaults["weight_decay"] = weight_decay
        for group in forward_groups(model, params):
            self.add_param_group(group)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group of feedback weights or of forward parameters, with its own options, as in torch.optim.

        The feedback weights of forward parameters get the same options, except ``weight_decay``.
        """
        params = listed(param_group["params"])
        if all(p in self._layers for p in params):
            super().add_param_group({**param_group, "params": params})
        else:
            options = {"weight_decay": self.defaults["weight_decay"], "noise": 0.0}
            group = {**options, **param_group, "params": [p for p in params if p not in self._layers]}
            torch.optim.Optimizer.add_param_group(self, group)
            self._give_options(param_group, params)

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        if p in self._layers:
            return super()._row(p, group)
        rule = self._tied.get(p)
        return forward_row(p, group["weight_decay"] if rule is None else self._tied_decay(rule, group), 0.0)


def _dynamic(lr: Tensor, noise: float, device: torch.device) -> Tensor:
    """The factors and the seed that ``feedback_step_`` reads when it runs."""
    factors = torch.ones(5, dtype=torch.float64, device=device)
    factors[0] = lr
    factors[4] = torch.randint(2**53, (), device=device) if noise else 0
    return factors
