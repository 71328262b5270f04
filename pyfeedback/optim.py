"""The optimizer of feedback weights: one `feedback_step_` for a whole model."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyfeedback import functional
from pyfeedback.conversion import feedback_layers
from pyfeedback.nn import FeedbackLayer


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
        if not any(isinstance(module, FeedbackLayer) for module in model.modules()):
            raise ValueError("model has no layer with a feedback weight, expected one converted by pyfeedback.convert")
        self._layers = {layer.feedback: layer for _, layer in feedback_layers(model) if layer.feedback is not None}
        for feedback, layer in self._layers.items():
            if not isinstance(model, DistributedDataParallel):  # which waits for the gradients it saw promised
                feedback.requires_grad_(layer.rule.reads_data)
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

    def _step_group(self, params, lr, momentum, nesterov, noise, skip_nonfinite, **_):
        feedback, weight, grad, buffers = [], [], [], []
        coefficients: dict[str, list[float]] = {"decay": [], "self_": [], "tie": []}
        for b in params:
            layer = self._layers[b]
            if layer.feedback is not b:
                raise RuntimeError("model has other feedback weights now, expected those this optimizer was made of")
            rule, w = layer.rule, layer.weight
            if rule.reads_data or b.requires_grad:
                terms = (0.0, 0.0, 1.0, b.grad)  # everything, decay included, is in the gradient
            else:
                terms = (rule.decay, rule.self_, rule.tie, w.grad if rule.tie else w)
            if terms[3] is None or not (rule.learns or noise):
                continue
            feedback.append(b)
            weight.append(w.detach())
            grad.append(terms[3])
            for values, value in zip(coefficients.values(), terms, strict=False):
                values.append(value)
            if momentum:
                state = self.state[b]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(b)
                buffers.append(state["momentum_buffer"])
        for device in dict.fromkeys(b.device for b in feedback):
            here = [i for i, b in enumerate(feedback) if b.device == device]
            functional.feedback_step_(
                *([_local(tensors[i]) for i in here if tensors] for tensors in (feedback, weight, grad, buffers)),
                **{name: [values[i] for i in here] for name, values in coefficients.items()}, lr=float(lr),
                momentum=momentum, nesterov=nesterov, noise=noise, skip_nonfinite=skip_nonfinite,
                seed=int(torch.randint(2**62, ())) if noise else 0,
            )  # fmt: skip


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that FSDP shards."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
