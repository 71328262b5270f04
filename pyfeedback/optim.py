"""The optimizer of feedback weights: one `feedback_step_` for a whole model."""

import torch
from torch import nn

from pyfeedback import functional
from pyfeedback.conversion import feedback_layers


class FeedbackSGD(torch.optim.Optimizer):
    """SGD for the feedback weights of a model, all of them in one pass.

    Under a rule that reads no activations (sa, kp and fa) the step computes the rule's gradient itself, from W, its
    gradient and B, and autograd is spared all work: the constructor sets ``feedback.requires_grad_(False)`` on those
    layers. Other rules leave ``feedback.grad``, which the step takes. Call it beside the optimizer of the forward
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
        self._layers = {layer.feedback: layer for _, layer in feedback_layers(model) if layer.feedback is not None}
        if not self._layers:
            raise ValueError("model has no layer with a feedback weight, expected one converted by pyfeedback.convert")
        for feedback, layer in self._layers.items():
            feedback.requires_grad_(layer.rule.reads_data)
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "noise": noise}
        super().__init__(list(self._layers), {**options, "skip_nonfinite": skip_nonfinite})

    def __getstate__(self):
        return {**super().__getstate__(), "_layers": self._layers}

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
            rule, w = layer.rule, layer.weight
            if rule.reads_data:
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
        if feedback:
            functional.feedback_step_(
                feedback, weight, grad, buffers, **coefficients, lr=float(lr), momentum=momentum,
                nesterov=nesterov, noise=noise, skip_nonfinite=skip_nonfinite,
                seed=int(torch.randint(2**62, ())) if noise else 0,
            )  # fmt: skip
