"""AdamW for a whole model."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pyfeedback.backends.dispatch import current_implementation
from pyfeedback.core.values import check_flag
from pyfeedback.optim.base import Params, RowOptimizer, check_option, feedback_of, forward_groups, local
from pyfeedback.optim.rows import Columns, Row, feedback_row, forward_row, has_hooks, is_computed, is_tied
from pyfeedback.rules import Rule


class AdamW(RowOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` for a converted model: W, B and every other parameter.

    Forward parameters are updated as by torch.optim.AdamW with the same arguments. Each B takes an Adam step along its
    rule's gradient, without ``weight_decay``, because the rule's decay is part of that gradient. Kolen-Pollack (tie and
    decay only) is the exception: W and B must take the same step, so its decay is decoupled like that of W. If
    ``weight_decay`` equals the rule's ``decay``, W - B is multiplied by 1 - lr * decay in each step.

    Args:
        model: a model with feedback layers. The optimizer updates the parameters that the model has now.
        lr, betas, eps, weight_decay, amsgrad: as in torch.optim.AdamW.
        params, total_steps: as in :class:`SGD`.

    ``torch.amp.GradScaler`` is supported as by :class:`SGD`.

    Raises:
        ValueError: ``model`` has no feedback layer, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        params: Params | None = None,
        total_steps: int | None = None,
    ):
        self._layers, self._names = feedback_of(model)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas is {betas!r}, expected two numbers in [0, 1)")
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            check_option(name, value)
        for i, beta in enumerate(betas):
            check_option(f"betas[{i}]", beta, 1.0)
        tied = {b: layer.rule.decay for b, layer in self._layers.items() if is_tied(layer.rule)}
        others = [b for b in self._layers if b not in tied]
        check_flag("amsgrad", amsgrad)
        forward = forward_groups(model, params)
        groups = [*forward, {"params": others, "weight_decay": 0.0}]
        groups += [{"params": [b], "weight_decay": decay} for b, decay in tied.items()]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr, betas, eps, weight_decay, amsgrad, fused=True)
        for group in forward:
            self._give_options(group, group["params"])
        self._warn_of_slow_feedback(total_steps)

    def _options(self, group: dict[str, Any]) -> tuple:
        return group["lr"], *group["betas"], group["eps"], group["amsgrad"]

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        layer = self._layers.get(p)
        if layer is None:
            rule = self._tied.get(p)
            return forward_row(p, 0.0, group["weight_decay"] if rule is None else self._tied_decay(rule, group))
        tied = is_tied(layer.rule)
        by_autograd = p.requires_grad and (not tied or is_computed(layer) or has_hooks(p))
        step, estimate = group.get("feedback_step", 0), self._estimates.get(p)
        row = feedback_row(p, layer, self._names[p], by_autograd, False, step, estimate)
        if row is None or not tied:
            return row
        if layer.rule.tau:
            return row._replace(decay=0.0, weight_decay=self._tied_decay(layer.rule, group))
        # The decay is decoupled: it is not added to the gradient, and subtracted from a gradient that includes it.
        return row._replace(decay=-layer.rule.decay if by_autograd else 0.0, weight_decay=group["weight_decay"])

    @staticmethod
    def _tied_decay(rule: Rule, group: dict[str, Any]) -> float:
        """Return the decoupled decay of W and B under Kolen-Pollack with a time constant."""
        lr = float(group.get("initial_lr", group["lr"]))
        return 1 / (lr * rule.tau) if lr else 0.0

    def _update(self, columns: Columns, *options) -> None:
        lr, beta1, beta2, eps, amsgrad = options
        param, weight, grad, decay, self_, tie, weight_decay, *_ = columns
        names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []))
        states = [self._state_of(p, names) for p in param]
        moments = ([state[name] for state in states] for name in names)
        current_implementation("adamw_step_", param[0].device.type)(
            *map(local, (param, weight, grad, *moments)), step=[state["step"] for state in states], decay=decay,
            self_=self_, tie=tie, weight_decay=weight_decay, lr=float(lr), beta1=beta1, beta2=beta2, eps=eps,
        )  # fmt: skip

    def _update_by_torch(self, columns: Columns, *options) -> None:
        rows = columns.rows()
        lr, beta1, beta2, eps, amsgrad = options
        for row in rows:
            if row.grad.is_sparse:
                shape = tuple(row.param.shape)
                raise RuntimeError(
                    f"a parameter of shape {shape} has a sparse gradient, expected a dense one; SGD supports sparse"
                )
            state = self._state_of(row.param, ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])))
            grad = row.grad if row.tie == 1.0 else row.grad * row.tie
            adamw(
                [row.param], [grad], [state["exp_avg"]], [state["exp_avg_sq"]],
                [state["max_exp_avg_sq"]] if amsgrad else [], [state["step"]], foreach=False, amsgrad=amsgrad,
                beta1=beta1, beta2=beta2, lr=float(lr), weight_decay=row.weight_decay, eps=eps, maximize=False,
                has_complex=True,
            )  # fmt: skip

    def _state_of(self, p: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The state of a parameter, in the format of torch.optim.AdamW with fused=True."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state.update((name, torch.zeros_like(p)) for name in names)
        return state
