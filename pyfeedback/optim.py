"""Optimizers: of the feedback weights beside one of torch.optim, or of a whole model at once.

Where a rule reads no activations (sa, kp) its gradient is made of W, W's gradient and B, so the optimizer computes it
and autograd is spared. Every parameter of an SGD is stepped by `feedback_step_`, in one pass over memory.
"""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyfeedback import functional
from pyfeedback.conversion import feedback_layers, forward_parameters
from pyfeedback.nn import FeedbackLayer
from pyfeedback.rules import Rule

Terms = tuple[Tensor, Tensor, float, float, float]


class FeedbackSGD(torch.optim.Optimizer):
    """SGD for the feedback weights of a model, all of them in one pass.

    Under a rule that reads no activations (sa, kp and fa) the step computes the rule's gradient itself, from W, its
    gradient and B, and autograd is spared all work: the constructor sets ``feedback.requires_grad_(False)`` on those
    layers (build it before DistributedDataParallel wraps the model, or of the wrapped model, whose promise of gradients
    is kept). Other rules leave ``feedback.grad``, which the step takes. Call it beside the optimizer of the forward
    weights (:func:`pyfeedback.forward_parameters`), before their gradients are cleared. Kolen-Pollack aligns where
    both step alike: the same learning rate and momentum, and a weight decay equal to the rule's ``decay``.

    Args:
        model: a model with feedback layers; the rule each has at the time of a step is followed.
        lr: learning rate.
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
        lr: float,
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

    def __getstate__(self):
        return {**super().__getstate__(), "_layers": self._layers}

    def add_param_group(self, param_group: dict) -> None:
        """A group of feedback weights with options of its own, as torch.optim's; they must be the model's."""
        params = param_group["params"]
        for p in [params] if isinstance(params, torch.Tensor) else params:
            if p not in self._layers:
                raise ValueError(
                    f"params holds a tensor of shape {tuple(p.shape)}, expected feedback weights of the model"
                )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every feedback weight whose rule moves it; one with no gradient to take is left, as torch does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(**group)
        return loss

    def _step_group(self, params, lr, momentum, nesterov, noise, skip_nonfinite, weight_decay=0.0, **_):
        operands: tuple[list[Tensor], ...] = ([], [], [], [])  # stepped, weight, grad, momentum
        coefficients: tuple[list[float], ...] = ([], [], [])
        for p in params:
            terms = self._terms(p, weight_decay, bool(noise))
            if terms is None:
                continue
            for tensors, tensor in zip(operands, (p, *terms[:2]), strict=False):
                tensors.append(tensor)
            for values, value in zip(coefficients, terms[2:], strict=True):
                values.append(value)
            if momentum:
                state = self.state[p]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
                operands[3].append(state["momentum_buffer"])
        for device in dict.fromkeys(p.device for p in operands[0]):
            here = [i for i, p in enumerate(operands[0]) if p.device == device]
            lists = [[_local(tensors[i]) for i in here] if tensors else [] for tensors in operands]
            decay, self_, tie = ([values[i] for i in here] for values in coefficients)
            functional.feedback_step_(
                *lists, decay=decay, self_=self_, tie=tie, lr=float(lr), momentum=momentum, nesterov=nesterov,
                noise=noise, skip_nonfinite=skip_nonfinite, seed=int(torch.randint(2**62, ())) if noise else 0,
            )  # fmt: skip

    def _terms(self, p: nn.Parameter, weight_decay: float, noisy: bool) -> Terms | None:
        """(weight, grad, decay, self_, tie) of ``feedback_step_`` for one parameter; None where nothing moves it."""
        layer = self._layers.get(p)
        if layer is None:
            return None if p.grad is None else (p, p.grad, weight_decay, 0.0, 1.0)
        return _feedback_terms(p, layer, noisy)


class SGD(FeedbackSGD):
    """``torch.optim.SGD`` for a converted model: W, B and every other parameter, one pass over memory each.

    Forward parameters step as under torch.optim.SGD with the same arguments, which ``state_dict``, parameter groups,
    schedulers and gradient clipping follow too. Each B follows its rule with the same learning rate and momentum; its
    decay is the rule's, not ``weight_decay``. Kolen-Pollack therefore wants ``weight_decay`` equal to the rule's
    ``decay``: ``SGD(convert(model, rule("kp", decay=1e-4)), lr, momentum=0.9, weight_decay=1e-4)``.

    Args:
        model: a model with feedback layers; its parameters are taken as they are now.
        lr, momentum, weight_decay, nesterov: as torch.optim.SGD.
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
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        noise: float = 0.0,
        skip_nonfinite: bool = False,
    ):
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay is {weight_decay}, expected a finite number, 0 or more")
        super().__init__(model, lr, momentum, nesterov, noise, skip_nonfinite)
        # Behind the feedback's group: a rule that reads W reads it before it moves, as autograd did.
        forward = {"params": list(forward_parameters(model)), "weight_decay": weight_decay, "noise": 0.0}
        torch.optim.Optimizer.add_param_group(self, forward)

    def step(self, closure=None):
        """Update every parameter that has something to follow."""
        found = getattr(self, "found_inf", None)
        if found is not None and found:
            return None if closure is None else closure()
        return super().step(closure)

    def _terms(self, p: nn.Parameter, weight_decay: float, noisy: bool) -> Terms | None:
        terms = super()._terms(p, weight_decay, noisy)
        own = p in self._layers and p.requires_grad  # the rule's own gradient, which was never scaled
        scale = _scale_of(self, own)
        return terms if terms is None or scale is None or own else (*terms[:4], terms[4] / float(scale))


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` for a converted model: W, B and every other parameter.

    Forward parameters step as under torch.optim.AdamW with the same arguments. Each B takes Adam's step along its
    rule's gradient, without ``weight_decay``: a rule's decay is part of that gradient. Kolen-Pollack (a tie and a decay
    and nothing else) is the exception: there W and B must take the same step, so the decay is decoupled as W's is, and
    W - B shrinks by 1 - lr * decay where ``weight_decay`` equals the rule's ``decay``.

    Args:
        model: a model with feedback layers; its parameters are taken as they are now.
        lr, betas, eps, weight_decay, amsgrad: as torch.optim.AdamW, of which the fused form is taken.

    Under ``torch.amp.GradScaler`` as :class:`SGD`.

    Raises:
        ValueError: no feedback layer in ``model``, or a number out of range.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False
    ):
        self._layers = _feedback_of(model)
        tied = {b: layer.rule.decay for b, layer in self._layers.items() if _is_tied(layer.rule)}
        others = [b for b in self._layers if b not in tied]
        groups: list[dict] = [{"params": list(forward_parameters(model))}, {"params": others, "weight_decay": 0.0}]
        groups += [{"params": [b], "weight_decay": decay} for b, decay in tied.items()]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr, betas, eps, weight_decay, amsgrad, fused=True)

    def __getstate__(self):
        return {**super().__getstate__(), "_layers": self._layers}

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has something to follow."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lent = []
        for b, layer in self._layers.items():
            terms = _feedback_terms(b, layer, False)
            if terms is None:
                continue
            if not b.requires_grad:
                b.grad = _gradient(b, layer.rule, terms)
                lent.append(b)
            scale = _scale_of(self, own=b.requires_grad)
            if scale is not None and b.grad is not None:
                # The fused step divides in place: what was never scaled is made ready for it, what is W's is copied.
                b.grad = b.grad.clone() if _is_tied(layer.rule) else b.grad * scale
        super().step()
        for b in lent:
            b.grad = None
        return loss


def _feedback_of(model: nn.Module) -> dict[nn.Parameter, FeedbackLayer]:
    """Layers by feedback weight; autograd is spared the gradients that the optimizer can compute."""
    if not any(isinstance(module, FeedbackLayer) for module in model.modules()):
        raise ValueError("model has no layer with a feedback weight, expected one converted by pyfeedback.convert")
    layers = {layer.feedback: layer for _, layer in feedback_layers(model) if layer.feedback is not None}
    if not isinstance(model, DistributedDataParallel):  # which waits for the gradients it saw promised
        for feedback, layer in layers.items():
            feedback.requires_grad_((layer.unscheduled or layer.rule).reads_data)
    return layers


def _feedback_terms(b: nn.Parameter, layer: FeedbackLayer, noisy: bool) -> Terms | None:
    """(weight, grad, decay, self_, tie) of a feedback weight; None where its rule leaves it."""
    if layer.feedback is not b:
        raise RuntimeError("model has other feedback weights now, expected those this optimizer was made of")
    rule, w = layer.rule, layer.weight
    if rule.reads_data or b.requires_grad:
        grad, terms = b.grad, (0.0, 0.0, 1.0)  # everything, decay included, is in the gradient
    else:
        grad, terms = w.grad if rule.tie else w, (rule.decay, rule.self_, rule.tie)
    if layer.mixing is not None:  # the feedback is a factor of what stands beside the weight
        w, grad = b, grad if grad is b.grad or grad is None else layer.through_mixing(grad)
    return (w.detach(), grad, *terms) if grad is not None and (rule.learns or noisy) else None


def _scale_of(optimizer: torch.optim.Optimizer, own: bool) -> Tensor | None:
    """The loss scale that torch.amp.GradScaler left to this step; ``own`` is a gradient it must not have touched."""
    scale = getattr(optimizer, "grad_scale", None)
    if own and scale is None and getattr(optimizer, "found_inf", None) is not None:
        raise RuntimeError("scaler.unscale_ divided the rules' own gradients, expected scaler.step alone")
    return scale


def _is_tied(rule: Rule) -> bool:
    return rule.tie != 0 and not rule.reads_data and not rule.self_


def _gradient(b: Tensor, rule: Rule, terms: Terms) -> Tensor:
    """What Adam follows; the decay of a tied rule is the group's."""
    weight, grad, decay, self_, tie = terms
    if _is_tied(rule):
        return grad if tie == 1.0 else grad * tie
    total = torch.sub(b, weight).mul_(decay).add_(weight, alpha=decay - self_)
    return total.add_(grad, alpha=tie) if tie else total


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that FSDP shards."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
