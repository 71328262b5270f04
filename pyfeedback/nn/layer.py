"""The base class of the layers: a feedback weight in addition to the weight, and a rule."""

import logging
import math
from collections.abc import Callable, Mapping
from weakref import WeakSet

import torch
from torch import Tensor

from pyfeedback import functional
from pyfeedback.core.deprecation import renamed_keyword
from pyfeedback.core.geometry import Geometry
from pyfeedback.core.values import refuse_non_tensor
from pyfeedback.init import Init, as_init, default_init_
from pyfeedback.nn.direct import DirectInput
from pyfeedback.rules import Rule
from pyfeedback.rules import rule as as_rule

_log = logging.getLogger("pyfeedback")
_warned: WeakSet[torch.nn.Module] = WeakSet()  # layers for which a warning was logged


class FeedbackLayer(torch.nn.Module):
    """Base class of the layers, with ``rule``, and ``feedback``, a Parameter in the layout of ``weight``.

    ``feedback`` is None if the rule has weight transport (bp). It requires no gradient if the rule keeps its initial
    value (fa).
    """

    rule: Rule
    weight: Tensor
    feedback: torch.nn.Parameter | None
    feedback_init: Init
    mixing: Tensor | None  # the fixed factor [K, M] of a feedback that is a product (pfa)
    direct: DirectInput | None = None  # only under dfa, where the error comes directly from the model's output
    called = False  # True from the first forward pass on; remains False if a model only reads the weight
    last_call: tuple[Geometry, torch.Size] | None = None  # of a layer that reads probes: how expensive a pass is
    has_optimizer = False  # whether an optimizer of pyfeedback.optim was built for the feedback weight
    scheduled: Tensor | None = None  # the coefficients under a schedule, an input of a compiled graph
    unscheduled: Rule | None = None  # the rule before the schedule changed it

    def attach_feedback(self, rule: str | Rule, init: Init | Callable[[Tensor], object] | None = None) -> None:
        """Give the layer a rule and a new feedback weight with the dtype, device and layout of ``weight``."""
        self.rule, self.feedback_init = as_rule(rule), as_init(init)
        self.scheduled = self.unscheduled = self.direct = None
        self.called = self.has_optimizer = False
        self.last_call = None
        feedback, mixing, weight = None, None, self.weight
        if self.rule.expansion:
            rows = weight.shape[0] * self.rule.expansion
            feedback = torch.nn.Parameter(weight.new_empty(rows, *weight.shape[1:]))
            mixing = weight.new_empty(weight.shape[0], rows)
        elif not self.rule.transport and self.rule.direct == "no":
            by_autograd = self.rule.learns and not self.rule.reads_probes
            feedback = torch.nn.Parameter(torch.empty_like(weight), requires_grad=by_autograd)
        self.register_parameter("feedback", feedback)
        self.register_buffer("mixing", mixing)
        self.reset_feedback()

    def detach_feedback(self) -> None:
        """Undo :meth:`attach_feedback`."""
        del self.feedback, self.mixing, self.rule, self.feedback_init, self.scheduled, self.unscheduled, self.direct
        del self.called, self.has_optimizer, self.last_call

    @renamed_keyword("law", "init_fn")
    def reset_feedback(self, init_fn: Callable[[Tensor], object] = default_init_) -> None:
        """Initialize the feedback weight by ``feedback_init``; ``init_fn`` is used if that has none."""
        feedback, init = self.feedback, self.feedback_init
        if feedback is None or feedback.is_meta:
            return
        init.draw(feedback, self.weight, init_fn)
        if self.mixing is not None:
            std = self.mixing.shape[1] ** -0.5
            init.of_layer("mixing").draw(self.mixing, self.mixing, lambda mixing: mixing.normal_(0.0, std))
        if self.rule.signs in ("uniform", "batch"):
            with torch.no_grad():
                feedback.copy_(feedback.square().mean().sqrt().expand_as(feedback))

    def enter(self, input: Tensor) -> Tensor | None:
        """Begin a forward pass: check the input, mark the layer as called, and return :meth:`effective_feedback`."""
        if not isinstance(input, Tensor):
            refuse_non_tensor("input", input)
        object.__setattr__(self, "called", True)  # nn.Module.__setattr__ takes a microsecond
        feedback = self.feedback
        if feedback is None:
            return None
        learns = feedback.requires_grad and feedback.is_leaf and not torch.compiler.is_compiling()
        if learns and feedback.grad is not None:
            self._check_gradients_are_cleared()
        rule = self.rule  # the first lines of effective_feedback, inlined to save most layers a call
        return feedback if rule.signs == "free" and not rule.expansion else self.effective_feedback()

    def run(self, geometry: Geometry, input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the output with these weights under the layer's rule, for an input with or without a batch."""
        if input.dim() == weight.dim() - 1:
            return self.run(geometry, input.unsqueeze(0), weight, feedback, bias).squeeze(0)
        rule, scheduled = self.rule, self.scheduled
        if rule.needs_optimizer and not torch.compiler.is_compiling():
            if self.last_call is not None and not self.has_optimizer and torch.is_grad_enabled() and self.training:
                self._warn_of_no_optimizer()
            object.__setattr__(self, "last_call", (geometry, input.shape))
        coefficients = rule.fixed
        if scheduled is not None and not torch.compiler.is_compiling():
            scheduled = None
        if coefficients is None or scheduled is not None:
            positions = 1
            if rule.reduction == "mean":
                shape = geometry.output_shape(input.shape, weight.shape)
                positions = math.prod(shape[2:] if geometry.channel == 1 else shape[1:-1])
            if scheduled is not None:
                options = {
                    "center": rule.center,
                    "samples": rule.samples_of(input.shape[0]),
                    "normalize": rule.is_normalized,
                    "positions": positions or 1,
                }
                return functional.scheduled_layer(geometry, scheduled, input, weight, feedback, bias, **options)
            coefficients = rule.coefficients(input.shape[0], positions)
        return functional.layer(geometry, coefficients, input, weight, feedback, bias)

    def _warn_of_no_optimizer(self) -> None:
        """Warn, once per layer, if no optimizer of this package trains a rule that needs one."""
        if self not in _warned:
            _warned.add(self)
            _log.warning(
                "%s(%s): its feedback weight does not learn: its rule %s in the step of an optimizer of "
                "pyfeedback.optim, and none was built for this model",
                type(self).__name__,
                self.extra_repr().removeprefix(", "),
                "reads probes" if self.rule.reads_probes else "makes W and B decay",
            )

    def _check_gradients_are_cleared(self) -> None:
        """Warn, once per layer, if the gradient of W was cleared and that of the feedback was not."""
        weight = self.weight
        learns = torch.is_grad_enabled() and weight.is_leaf and weight.requires_grad
        if learns and weight.grad is None and self not in _warned:
            _warned.add(self)
            _log.warning(
                "%s(%s): feedback.grad keeps growing, since weight.grad was cleared and feedback.grad was not: an "
                "optimizer that was built before convert does not have the feedback weights; build it afterwards, or "
                "call pyfeedback.optim.follow(optimizer, model)",
                type(self).__name__,
                self.extra_repr().removeprefix(", "),
            )

    def effective_feedback(self, random: bool = True) -> Tensor | None:
        """Return the feedback weight that a pass uses: ``feedback`` as modified by the rule.

        Args:
            random: whether to draw the random magnitudes of brsf.
        """
        feedback, rule = self.feedback, self.rule
        if feedback is None or (rule.signs == "free" and not rule.expansion):
            return feedback
        if rule.expansion:
            return torch.ops.pyfeedback.mix.default(self.mixing, feedback, rule.decay)
        magnitudes: Tensor = feedback
        if random and rule.signs == "batch" and torch.is_grad_enabled():
            magnitudes = feedback * torch.randn_like(feedback)
        return torch.copysign(magnitudes, self.weight.detach())

    def as_matrices(self, kernel: Tensor) -> Tensor:
        """Return a weight or feedback weight as one matrix [outputs, inputs] for each group: [G, K/G, d]."""
        groups = getattr(self, "groups", 1)
        return kernel.reshape(groups, kernel.shape[0] // groups, -1)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """Undo :meth:`as_matrices`."""
        return matrices.reshape(self.weight.shape)

    def positions(self) -> int:
        """Return the number of output positions of the last batch; 0 if not known. Only layers that read probes."""
        if self.last_call is None:
            return 0
        geometry, input = self.last_call
        return geometry.sizes(input, self.weight.shape, 0).positions

    def factor_gradient(self, grad: Tensor) -> Tensor:
        """Compute the gradient of a feedback weight that is a factor (pfa) from the gradient of the product."""
        assert self.mixing is not None
        return (self.mixing.t() @ grad.flatten(1)).view(-1, *self.weight.shape[1:])

    def detach_input(self, input: Tensor) -> Tensor:
        """Detach the input if the error comes directly from the model's output (dfa)."""
        return input if self.direct is None else self.direct.detach(input)

    def reset_parameters(self) -> None:
        """Draw weight, bias and feedback again."""
        super().reset_parameters()  # type: ignore[misc]  # defined by the torch.nn layer, the other base class
        if "feedback" in self._parameters:  # the constructor of torch.nn calls this before the feedback exists
            self.reset_feedback()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *others) -> None:
        """Load a checkpoint; one of the torch.nn layer loads too, with a warning that the feedback is unchanged."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *others)
        for name in ("feedback", "mixing"):
            if f"{prefix}{name}" in missing_keys:
                missing_keys.remove(f"{prefix}{name}")
                _log.warning("%s%s is not in the state dict: the feedback weight stays as it is", prefix, name)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rule={self.rule}"


def warn_of_uncalled(layers: Mapping[str, FeedbackLayer]) -> None:
    """Warn, once per layer, about layers that have never been called while others have."""
    left = [name for name, layer in layers.items() if not layer.called and layer not in _warned]
    if left and any(layer.called for layer in layers.values()):
        _warned.update(layers[name] for name in left)
        _log.warning(
            "%s: in use, but never called; where the weight is read instead (F.linear(x, layer.weight)), the layer "
            "trains by backprop, without its feedback weight",
            ", ".join(left),
        )
