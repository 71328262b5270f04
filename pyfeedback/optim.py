"""Optimizers: of the feedback weights beside one of torch.optim, or of a whole model at once.

Where a rule reads no activations (sa, kp) its gradient is made of W, W's gradient and B, so the optimizer computes it
and autograd is spared. W and B of a layer are stepped together, and what both read is read from memory once.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyfeedback import functional
from pyfeedback.conversion import feedback_layers, forward_parameters
from pyfeedback.nn import FeedbackLayer
from pyfeedback.providers import provide
from pyfeedback.rules import Rule

Params = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class Row(NamedTuple):
    """What moves one parameter: its gradient is ``decay * param - self_ * weight + tie * grad``."""

    param: nn.Parameter
    weight: Tensor
    grad: Tensor
    decay: float
    self_: float
    tie: float
    weight_decay: float = 0.0  # that is no part of the gradient


class _RowOptimizer(torch.optim.Optimizer):
    """Steps the rows of all groups, in as few calls as their options allow."""

    _layers: dict[nn.Parameter, FeedbackLayer]

    def _options(self, group: dict[str, Any]) -> tuple:
        """What the rows of one call have in common, as `_update` takes it."""
        raise NotImplementedError

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        """None where nothing moves the parameter."""
        raise NotImplementedError

    def _update(self, rows: list[Row], *options) -> None:
        raise NotImplementedError

    def __getstate__(self):
        return {**super().__getstate__(), "_layers": self._layers}

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has something to follow; one with no gradient to take is left, as torch does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)  # left by torch.amp.GradScaler, as grad_scale
        if found_inf is None or not found_inf:
            for options, rows in self._calls():
                self._update(rows, *options)
        return loss

    def _calls(self) -> Iterator[tuple[tuple, list[Row]]]:
        """Options and rows of each call.

        A rule reads W before it moves, as autograd did: W comes right behind its B where both have the same options,
        and in a later call otherwise, as everything does that a W which is no parameter may have been made of.
        """
        places: dict[nn.Parameter, tuple[dict, tuple]] = {}
        for group in self.param_groups:
            options = self._options(group)
            places |= {p: (group, (p.device, options)) for p in group["params"]}
        readers: dict[Any, list[nn.Parameter]] = {}  # by the weight they read
        for b, layer in self._layers.items():
            readers.setdefault(layer.weight, []).append(b)
        in_turn = [p for w, feedback in readers.items() for p in (*feedback, w) if p in places]
        unmade = all(w in places for w in readers)
        scale = getattr(self, "grad_scale", None)
        factor = None if scale is None else 1 / float(scale)
        calls: dict[bool, dict[tuple, list[Row]]] = {False: {}, True: {}}
        for p in dict.fromkeys([*in_turn, *places]):
            group, shared = places[p]
            row = self._row(p, group)
            if row is not None:
                beside = {places[b][1] for b in readers.get(p, ())}
                late = p not in self._layers and (beside != {shared} if beside else not unmade)
                calls[late].setdefault(shared, []).append(self._unscaled(row, factor))
        for of_time in calls.values():
            for (_, options), rows in of_time.items():
                yield options, rows

    def _unscaled(self, row: Row, factor: float | None) -> Row:
        """The row without the loss scale of torch.amp.GradScaler, which a rule's own gradient never had."""
        if getattr(self, "found_inf", None) is None:
            return row
        if row.param in self._layers and row.grad is row.param.grad:
            if factor is None:
                raise RuntimeError("scaler.unscale_ divided the rules' own gradients, expected scaler.step alone")
            return row
        return row if factor is None else row._replace(tie=row.tie * factor)


class FeedbackSGD(_RowOptimizer):
    """SGD for the feedback weights of a model, all of them in one pass.

    Under a rule that reads no activations (sa, kp and fa) the step computes the rule's gradient itself, from W, its
    gradient and B, and autograd is spared all work: the constructor sets ``feedback.requires_grad_(False)`` on those
    layers (build it before DistributedDataParallel wraps the model, or of the wrapped model, whose promise of gradients
    is kept). Other rules leave ``feedback.grad``, which the step takes. Call it beside the optimizer of the forward
    weights (:func:`pyfeedback.forward_parameters`), before their gradients are cleared. Kolen-Pollack aligns where
    both step alike: the same learning rate and momentum, and a weight decay equal to the rule's ``decay``.

    Args:
        model: a model with feedback layers; the rule each has at the time of a step is followed.
        lr: learning rate. A tensor on the parameters' device is read there by each step, so that a captured CUDA graph
            follows it, and draws its noise from the device's generator.
        momentum, nesterov: as torch.optim.SGD.
        noise: standard deviation of Gaussian noise added to each gradient element before momentum; it follows
            ``torch.manual_seed``.
        skip_nonfinite: leave every feedback weight as it is when a gradient holds an infinity or nan.

    Source: the update with noise is that of Kunin et al., ICML 2020, section 5.

    Raises:
        ValueError: no feedback layer in ``model``, or a number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        momentum: float = 0.0,
        nesterov: bool = False,
        noise: float = 0.0,
        skip_nonfinite: bool = False,
    ):
        for name, value in {"lr": lr, "momentum": momentum, "noise": noise}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}, expected a finite number, 0 or more")
        if nesterov and momentum == 0:
            raise ValueError("nesterov is True with momentum 0, expected a momentum above 0")
        self._layers = _feedback_of(model)
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "noise": noise}
        super().__init__([{"params": list(self._layers)}], {**options, "skip_nonfinite": skip_nonfinite})

    def add_param_group(self, param_group: dict) -> None:
        """A group of feedback weights with options of its own, as torch.optim's; they must be the model's."""
        params = param_group["params"]
        for p in [params] if isinstance(params, torch.Tensor) else params:
            if p not in self._layers:
                raise ValueError(
                    f"params holds a tensor of shape {tuple(p.shape)}, expected feedback weights of the model"
                )
        super().add_param_group(param_group)

    def _options(self, group: dict[str, Any]) -> tuple:
        return group["lr"], group["momentum"], group["nesterov"], group["noise"], group["skip_nonfinite"]

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        layer = self._layers[p]
        return _feedback_row(p, layer, p.requires_grad, bool(group["noise"]))

    def _update(self, rows: list[Row], *options) -> None:
        lr, momentum, nesterov, noise, skip_nonfinite = options
        param, weight, grad, decay, self_, tie, _ = zip(*rows, strict=True)
        buffers = [self._buffer(p) for p in param] if momentum else []
        on_device = isinstance(lr, Tensor)
        functional.feedback_step_(
            *map(_local, (param, weight, grad, buffers)), decay=decay, self_=self_, tie=tie,
            lr=1.0 if on_device else float(lr), momentum=momentum, nesterov=nesterov, noise=noise,
            skip_nonfinite=skip_nonfinite, seed=int(torch.randint(2**62, ())) if noise and not on_device else 0,
            dynamic=_dynamic(lr, noise, param[0].device) if on_device else None,
        )  # fmt: skip

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


class SGD(FeedbackSGD):
    """``torch.optim.SGD`` for a converted model: W, B and every other parameter, one pass over memory each.

    Forward parameters step as under torch.optim.SGD with the same arguments, which ``state_dict``, parameter groups,
    schedulers and gradient clipping follow too. Each B follows its rule with the same learning rate and momentum; its
    decay is the rule's, not ``weight_decay``. Kolen-Pollack therefore wants ``weight_decay`` equal to the rule's
    ``decay``: ``SGD(convert(model, rule("kp", decay=1e-4)), lr, momentum=0.9, weight_decay=1e-4)``.

    Args:
        model: a model with feedback layers; its parameters are taken as they are now.
        lr, momentum, weight_decay, nesterov: as torch.optim.SGD.
        params: forward parameters, or groups of them with options of their own, as torch.optim.SGD takes them; every
            one of the model by default.
        noise, skip_nonfinite: as :class:`FeedbackSGD`; noise is added to the feedback's gradients alone.

    Under ``torch.amp.GradScaler`` a plain ``scaler.step(optimizer)`` is right: the step divides by the loss scale what
    was scaled, and not a rule's own gradient. ``scaler.unscale_`` divides that too, so clip with two optimizers,
    torch's and :class:`FeedbackSGD`.

    Raises:
        ValueError: no feedback layer in ``model``, or a number out of range.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves the gradients, and sets grad_scale and found_inf

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
    ):
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay is {weight_decay}, expected a finite number, 0 or more")
        super().__init__(model, lr, momentum, nesterov, noise, skip_nonfinite)
        self.defaults["weight_decay"] = weight_decay
        for group in _forward_groups(model, params):
            self.add_param_group(group)

    def add_param_group(self, param_group: dict) -> None:
        """A group with options of its own, as torch.optim's, of feedback weights or of forward parameters."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if all(p in self._layers for p in params):
            super().add_param_group({**param_group, "params": params})
        else:
            options = {"weight_decay": self.defaults["weight_decay"], "noise": 0.0}
            torch.optim.Optimizer.add_param_group(self, {**options, **param_group, "params": params})

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        return super()._row(p, group) if p in self._layers else _forward_row(p, group["weight_decay"], 0.0)


class AdamW(_RowOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` for a converted model: W, B and every other parameter.

    Forward parameters step as under torch.optim.AdamW with the same arguments. Each B takes Adam's step along its
    rule's gradient, without ``weight_decay``: a rule's decay is part of that gradient. Kolen-Pollack (a tie and a decay
    and nothing else) is the exception: there W and B must take the same step, so the decay is decoupled as W's is, and
    W - B shrinks by 1 - lr * decay where ``weight_decay`` equals the rule's ``decay``.

    Args:
        model: a model with feedback layers; its parameters are taken as they are now.
        lr, betas, eps, weight_decay, amsgrad: as torch.optim.AdamW.
        params: as :class:`SGD`.

    Under ``torch.amp.GradScaler`` as :class:`SGD`.

    Raises:
        ValueError: no feedback layer in ``model``, or a number out of range.
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
    ):
        self._layers = _feedback_of(model)
        tied = {b: layer.rule.decay for b, layer in self._layers.items() if _is_tied(layer.rule)}
        others = [b for b in self._layers if b not in tied]
        groups = [*_forward_groups(model, params), {"params": others, "weight_decay": 0.0}]
        groups += [{"params": [b], "weight_decay": decay} for b, decay in tied.items()]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr, betas, eps, weight_decay, amsgrad, fused=True)

    def _options(self, group: dict[str, Any]) -> tuple:
        return group["lr"], *group["betas"], group["eps"], group["amsgrad"]

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        layer = self._layers.get(p)
        if layer is None:
            return _forward_row(p, 0.0, group["weight_decay"])
        tied = _is_tied(layer.rule)
        row = _feedback_row(p, layer, p.requires_grad and not tied, False)
        if row is None or not tied:
            return row
        return row._replace(decay=0.0, weight_decay=group["weight_decay"])

    def _update(self, rows: list[Row], *options) -> None:
        lr, beta1, beta2, eps, amsgrad = options
        param, weight, grad, decay, self_, tie, weight_decay = zip(*rows, strict=True)
        names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []))
        states = [self._state_of(p, names) for p in param]
        moments = ([state[name] for state in states] for name in names)
        provide("adamw_step_", param[0].device.type)(
            *map(_local, (param, weight, grad, *moments)), step=[state["step"] for state in states], decay=decay,
            self_=self_, tie=tie, weight_decay=weight_decay, lr=float(lr), beta1=beta1, beta2=beta2, eps=eps,
        )  # fmt: skip

    def _state_of(self, p: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """As torch.optim.AdamW's fused form keeps it."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state.update((name, torch.zeros_like(p)) for name in names)
        return state


def _feedback_of(model: nn.Module) -> dict[nn.Parameter, FeedbackLayer]:
    """Layers by feedback weight; autograd is spared the gradients that the optimizer can compute."""
    if not any(isinstance(module, FeedbackLayer) for module in model.modules()):
        raise ValueError("model has no layer with a feedback weight, expected one converted by pyfeedback.convert")
    layers = {layer.feedback: layer for _, layer in feedback_layers(model) if layer.feedback is not None}
    if not isinstance(model, DistributedDataParallel):  # which waits for the gradients it saw promised
        for feedback, layer in layers.items():
            feedback.requires_grad_((layer.unscheduled or layer.rule).reads_data)
    return layers


def _forward_groups(model: nn.Module, params: Params | None) -> list[dict[str, Any]]:
    """Parameter groups of what is no feedback weight."""
    given: list = list(forward_parameters(model) if params is None else params)
    return given if given and isinstance(given[0], dict) else [{"params": given}]


def _feedback_row(b: nn.Parameter, layer: FeedbackLayer, by_autograd: bool, noisy: bool) -> Row | None:
    """The row of a feedback weight; None where its rule leaves it."""
    if layer.feedback is not b:
        raise RuntimeError("model has other feedback weights now, expected those this optimizer was made of")
    rule, w = layer.rule, layer.weight
    if rule.reads_data or by_autograd:
        grad, terms = b.grad, (0.0, 0.0, 1.0)  # everything, decay included, is in the gradient
    else:
        grad, terms = w.grad if rule.tie else w, (rule.decay, rule.self_, rule.tie)
    if layer.mixing is not None:  # the feedback is a factor of what stands beside the weight
        w, grad = b, grad if grad is b.grad or grad is None else layer.through_mixing(grad)
    return Row(b, w, grad, *terms) if grad is not None and (rule.learns or noisy) else None


def _forward_row(p: nn.Parameter, decay: float, weight_decay: float) -> Row | None:
    return None if p.grad is None else Row(p, p, p.grad, decay, 0.0, 1.0, weight_decay)


def _is_tied(rule: Rule) -> bool:
    return rule.tie != 0 and not rule.reads_data and not rule.self_


def _dynamic(lr: Tensor, noise: float, device: torch.device) -> Tensor:
    """The factors and the seed that ``feedback_step_`` reads when it runs."""
    factors = torch.ones(5, dtype=torch.float64, device=device)
    factors[0] = lr
    factors[4] = torch.randint(2**53, (), device=device) if noise else 0
    return factors


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of tensors that FSDP may shard."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
