"""Optimizers: of the feedback weights beside one of torch.optim, or of a whole model at once.

Where a rule reads no activations (sa, kp) its gradient is made of W, W's gradient and B, so the optimizer computes it
and autograd is spared. W and B of a layer are stepped together, and what both read is read from memory once.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from pyfeedback import functional
from pyfeedback.conversion import feedback_layers, forward_parameters
from pyfeedback.nn import FeedbackLayer
from pyfeedback.nn.layer import warn_of_uncalled
from pyfeedback.providers import provide
from pyfeedback.step_rows import Row, Scaling, feedback_row, forward_row, is_computed, is_tied, unscaled
from pyfeedback.values import in_words

Params = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class _RowOptimizer(torch.optim.Optimizer):
    """Steps the rows of all groups, in as few calls as their options allow."""

    _layers: dict[nn.Parameter, FeedbackLayer]
    _names: dict[nn.Parameter, str]  # of the layers, by their feedback weights
    _step_supports_amp_scaling = True  # GradScaler leaves the gradients, and sets grad_scale and found_inf

    def _options(self, group: dict[str, Any]) -> tuple:
        """What the rows of one call have in common, as `_update` takes it."""
        raise NotImplementedError

    def _row(self, p: nn.Parameter, group: dict[str, Any]) -> Row | None:
        """None where nothing moves the parameter."""
        raise NotImplementedError

    def _update(self, rows: list[Row], *options) -> None:
        raise NotImplementedError

    def _update_by_torch(self, rows: list[Row], *options) -> None:
        """As `_update`, of complex parameters and sparse gradients."""
        raise NotImplementedError

    def __getstate__(self):
        return {**super().__getstate__(), "_layers": self._layers, "_names": self._names}

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient or a rule; skip the others, as torch.optim does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)  # left by torch.amp.GradScaler, as grad_scale
        if found_inf is None or not found_inf:
            for by_torch, options, rows in self._calls():
                (self._update_by_torch if by_torch else self._update)(rows, *options)
        return loss

    def _calls(self) -> Iterator[tuple[bool, tuple, list[Row]]]:
        """Whether torch's own functions update the rows, their options, and the rows, of each call.

        B's update must see W before W is updated. If both share options they go in one call, B first; otherwise W is
        deferred to a second call. If W is computed from other parameters, those are deferred too.
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
        scaling, uncalled = Scaling.of(self), self._uncalled()
        calls: dict[bool, dict[tuple, list[Row]]] = {False: {}, True: {}}
        for p in dict.fromkeys([*in_turn, *places]):
            group, shared = places[p]
            row = None if p in uncalled else self._row(p, group)
            if row is not None:
                of_feedback = self._layers.get(p)
                has_weight = of_feedback is not None and of_feedback.weight in places
                row = unscaled(row, of_feedback, self._names.get(p, ""), scaling, has_weight)
                beside = {places[b][1] for b in readers.get(p, ())}
                late = p not in self._layers and (beside != {shared} if beside else not unmade)
                calls[late].setdefault((row.by_torch, shared), []).append(row)
        for of_time in calls.values():
            for (by_torch, (_, options)), rows in of_time.items():
                yield by_torch, options, rows

    def _uncalled(self) -> set[nn.Parameter]:
        """Feedback weights of layers whose weight is trained without a call of the layer, by plain backprop."""
        if not any(layer.called for layer in self._layers.values()):  # gradients that no forward pass of it has made
            return set()
        uncalled = {b for b, layer in self._layers.items() if not layer.called and layer.weight.grad is not None}
        if uncalled:
            warn_of_uncalled(
                {self._names[b]: layer for b, layer in self._layers.items() if layer.called or b in uncalled}
            )
        return uncalled


class FeedbackSGD(_RowOptimizer):
    """SGD for the feedback weights of a model, all of them in one pass.

    Under a rule that reads no activations (sa, kp and fa) the step computes the rule's gradient itself, from W, its
    gradient and B, and autograd is spared all work: the constructor sets ``feedback.requires_grad_(False)`` on those
    layers (build it before DistributedDataParallel wraps the model, or of the wrapped model, whose promise of gradients
    is kept). Other rules leave ``feedback.grad``, which the step takes; so does every rule of a layer whose weight is
    computed from other parameters (weight_norm, parametrizations, pruning), which must be so when the optimizer is
    built. Step it before the optimizer of the forward weights (:func:`pyfeedback.forward_parameters`), since sa reads W
    before it moves, and before their gradients are cleared. Kolen-Pollack aligns where both step alike: the same
    learning rate and momentum, and a weight decay equal to the rule's ``decay``.

    Under ``torch.amp.GradScaler`` call ``scaler.step`` on both optimizers, this one first. Kolen-Pollack reads W's
    gradient, of which only the optimizer of W has the scale: it wants :class:`SGD` or :class:`AdamW`.

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
            _check_number(name, value)
        if nesterov and momentum == 0:
            raise ValueError("nesterov is True with momentum 0, expected a momentum above 0")
        self._layers, self._names = _feedback_of(model)
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
        return feedback_row(p, layer, self._names[p], p.requires_grad, bool(group["noise"]))

    def _update(self, rows: list[Row], *options) -> None:
        lr, momentum, nesterov, noise, skip_nonfinite = options
        param, weight, grad, decay, self_, tie, *_ = zip(*rows, strict=True)
        buffers = [self._buffer(p) for p in param] if momentum else []
        on_device = isinstance(lr, Tensor)
        functional.feedback_step_(
            *map(_local, (param, weight, grad, buffers)), decay=decay, self_=self_, tie=tie,
            lr=1.0 if on_device else float(lr), momentum=momentum, nesterov=nesterov, noise=noise,
            skip_nonfinite=skip_nonfinite, seed=int(torch.randint(2**62, ())) if noise and not on_device else 0,
            dynamic=_dynamic(lr, noise, param[0].device) if on_device else None,
        )  # fmt: skip

    def _update_by_torch(self, rows: list[Row], *options) -> None:
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
        _check_number("weight_decay", weight_decay)
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
        return super()._row(p, group) if p in self._layers else forward_row(p, group["weight_decay"], 0.0)


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
        self._layers, self._names = _feedback_of(model)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas is {betas!r}, expected two numbers in [0, 1)")
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            _check_number(name, value)
        for i, beta in enumerate(betas):
            _check_number(f"betas[{i}]", beta, 1.0)
        tied = {b: layer.rule.decay for b, layer in self._layers.items() if is_tied(layer.rule)}
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
            return forward_row(p, 0.0, group["weight_decay"])
        tied = is_tied(layer.rule)
        by_autograd = p.requires_grad and (not tied or is_computed(layer))
        row = feedback_row(p, layer, self._names[p], by_autograd, False)
        if row is None or not tied:
            return row
        # The decay is decoupled: it is left out of the gradient, and taken out where autograd has put it in.
        return row._replace(decay=-layer.rule.decay if by_autograd else 0.0, weight_decay=group["weight_decay"])

    def _update(self, rows: list[Row], *options) -> None:
        lr, beta1, beta2, eps, amsgrad = options
        param, weight, grad, decay, self_, tie, weight_decay, _ = zip(*rows, strict=True)
        names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []))
        states = [self._state_of(p, names) for p in param]
        moments = ([state[name] for state in states] for name in names)
        provide("adamw_step_", param[0].device.type)(
            *map(_local, (param, weight, grad, *moments)), step=[state["step"] for state in states], decay=decay,
            self_=self_, tie=tie, weight_decay=weight_decay, lr=float(lr), beta1=beta1, beta2=beta2, eps=eps,
        )  # fmt: skip

    def _update_by_torch(self, rows: list[Row], *options) -> None:
        lr, beta1, beta2, eps, amsgrad = options
        for row in rows:
            if row.grad.is_sparse:
                shape = tuple(row.param.shape)
                raise RuntimeError(f"a parameter of shape {shape} has a sparse gradient, expected SGD: AdamW has none")
            state = self._state_of(row.param, ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])))
            grad = row.grad if row.tie == 1.0 else row.grad * row.tie
            adamw(
                [row.param], [grad], [state["exp_avg"]], [state["exp_avg_sq"]],
                [state["max_exp_avg_sq"]] if amsgrad else [], [state["step"]], foreach=False, amsgrad=amsgrad,
                beta1=beta1, beta2=beta2, lr=float(lr), weight_decay=row.weight_decay, eps=eps, maximize=False,
                has_complex=True,
            )  # fmt: skip

    def _state_of(self, p: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """As torch.optim.AdamW's fused form keeps it."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state.update((name, torch.zeros_like(p)) for name in names)
        return state


def _feedback_of(model: nn.Module) -> tuple[dict[nn.Parameter, FeedbackLayer], dict[nn.Parameter, str]]:
    """Layers and their names by feedback weight; autograd is left out where the optimizer computes the gradient."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected the converted model itself, not its parameters")
    if not any(isinstance(module, FeedbackLayer) for module in model.modules()):
        raise ValueError("model has no layer with a feedback weight, expected one converted by pyfeedback.convert")
    named = {layer.feedback: (name, layer) for name, layer in feedback_layers(model) if layer.feedback is not None}
    layers = {feedback: layer for feedback, (_, layer) in named.items()}
    if not isinstance(model, DistributedDataParallel):  # which waits for the gradients it saw promised
        for feedback, layer in layers.items():
            rule = layer.unscheduled or layer.rule
            feedback.requires_grad_(rule.reads_data or (rule.learns and is_computed(layer)))
    return layers, {feedback: name for feedback, (name, _) in named.items()}


def _check_number(name: str, value: object, below: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number or (isinstance(value, Tensor) and value.numel() == 1)
    if not number or not 0 <= value < below:  # type: ignore[operator]
        limit = "a finite number, 0 or more" if below == math.inf else f"a number in [0, {below:g})"
        raise (ValueError if number else TypeError)(f"{name} is {in_words(value)}, expected {limit}")


def _forward_groups(model: nn.Module, params: Params | None) -> list[dict[str, Any]]:
    """Parameter groups of what is no feedback weight."""
    given: list = list(forward_parameters(model) if params is None else params)
    return given if given and isinstance(given[0], dict) else [{"params": given}]


def _dynamic(lr: Tensor, noise: float, device: torch.device) -> Tensor:
    """The factors and the seed that ``feedback_step_`` reads when it runs."""
    factors = torch.ones(5, dtype=torch.float64, device=device)
    factors[0] = lr
    factors[4] = torch.randint(2**53, (), device=device) if noise else 0
    return factors


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of tensors that FSDP may shard."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
