"""The base class of the layers: a feedback weight in addition to the weight, and a rule."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from pyfeedback import functional
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.deprecation import renamed_keyword
from pyfeedback.core.geometry import Geometry
from pyfeedback.core.values import refuse_non_tensor
from pyfeedback.init import Init, as_init, default_init_
from pyfeedback.nn.direct import DirectInput
from pyfeedback.rules import Rule
from pyfeedback.rules import rule as as_rule

OTHER_RULE = "the state dict has feedback weights of the rule"

_log = logging.getLogger("pyfeedback")
_warned: WeakSet[torch.nn.Module] = WeakSet()  # layers for which a warning was logged
# Every layer with a rule, of all models, in the order of their conversion; for pyfeedback.guard.
attached_layers: WeakKeyDictionary["FeedbackLayer", None] = WeakKeyDictionary()


class FeedbackLayer(torch.nn.Module):
    """Base class of the layers, with ``rule``, and ``feedback``, a Parameter in the layout of ``weight``.

    ``feedback`` is None if the rule has weight transport (bp). It requires no gradient if the rule keeps its initial
    value (fa). ``rule`` may be set to another rule with the same kind of feedback weight, or its name; for a rule with
    another kind, call :func:`pyfeedback.convert`.
    """

    rule: Rule
    weight: Tensor
    feedback: torch.nn.Parameter | None
    feedback_init: Init
    mixing: Tensor | None  # the fixed factor [K, M] of a feedback that is a product (pfa)
    direct: DirectInput | None = None  # only under dfa, where the error comes directly from the model's output
    weight_name = "weight"  # of the parameter that ``weight`` is
    called = False  # True from the first forward pass on that uses the layer
    # Of a layer that reads probes: the geometry, input and weight of a pass, and so its cost.
    last_call: tuple[Geometry, torch.Size, torch.Size] | None = None
    recalled: functional.Recalled | None = None  # the last call in eager mode
    has_optimizer = False  # whether an optimizer of pyfeedback.optim was built for the feedback weight
    has_single_sample = False  # whether a centered rule had a single sample in the last pass, so that it read zeros
    paused = False  # whether the optimizers leave the feedback weight as it is, for an Alternation
    full_name = ""  # in the model that was converted, for messages
    drawn_version = 0  # the version counter of the feedback weight before its first step
    scheduled: Tensor | None = None  # the coefficients under a schedule, an input of a compiled graph
    unscheduled: Rule | None = None  # the rule before the schedule changed it

    def attach_feedback(self, rule: str | Rule, init: Init | Callable[[Tensor], object] | None = None) -> None:
        """Give the layer a rule and a new feedback weight with the dtype, device and layout of ``weight``."""
        vars(self)["rule"], self.feedback_init = as_rule(rule), as_init(init)
        self.scheduled = self.unscheduled = self.direct = self.recalled = None
        self.called = self.has_optimizer = self.has_single_sample = self.paused = False
        self.last_call, self.full_name, self.drawn_version = None, "", 0
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
        attached_layers[self] = None
        self.reset_feedback()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("rule", "called"):
            vars(self)["recalled"] = None
        if name == "rule":
            value, old = as_rule(value), self.rule
            if _kind(value) != _kind(old):
                raise ValueError(
                    f"rule is {value}, expected one with the kind of feedback weight of {old}, or pyfeedback.convert"
                )
        super().__setattr__(name, value)

    def weight_owner(self) -> torch.nn.Module:
        """Return the module that has W as a parameter."""
        return self

    def detach_feedback(self) -> None:
        """Undo :meth:`attach_feedback`."""
        del self.feedback, self.mixing, self.rule, self.feedback_init, self.scheduled, self.unscheduled, self.direct
        del self.called, self.has_optimizer, self.has_single_sample, self.paused, self.recalled
        del self.last_call, self.full_name, self.drawn_version
        attached_layers.pop(self, None)

    def __setstate__(self, state: dict) -> None:  # of a copy
        super().__setstate__(state)
        attached_layers[self] = None
        self._remember_version()

    @renamed_keyword("law", "init_fn")
    def reset_feedback(self, init_fn: Callable[[Tensor], object] = default_init_) -> None:
        """Initialize the feedback weight by ``feedback_init``; ``init_fn`` is used if that has none."""
        feedback, init = self.feedback, self.feedback_init
        if feedback is None or feedback.is_meta:
            return
        init.draw(feedback, self.weight, init_fn)
        if self.mixing is not None:
            std = max(1, self.mixing.shape[1]) ** -0.5
            init.of_layer("mixing").draw(self.mixing, self.mixing, lambda mixing: mixing.normal_(0.0, std))
        if self.rule.signs in ("uniform", "batch"):
            with torch.no_grad():
                feedback.copy_(feedback.square().mean().sqrt().expand_as(feedback))
        self._remember_version()

    def _remember_version(self) -> None:
        self.drawn_version = 0 if self.feedback is None else self.feedback._version

    def enter(self) -> Tensor | None:
        """Begin a forward pass: mark the layer as called, and return :meth:`effective_feedback`."""
        object.__setattr__(self, "called", True)  # nn.Module's own functions for attributes take a microsecond each
        feedback = self._parameters.get("feedback")
        if feedback is None:
            return self.effective_feedback()
        rule = self.rule  # the first lines of effective_feedback, inlined to save most layers a call
        return feedback if rule.signs == "free" and not rule.expansion else self.effective_feedback()

    def run_and_recall(self, geometry: Geometry, input: Tensor, feedback: Tensor) -> Tensor:
        """Call :meth:`run` with the layer's own weight and bias, and recall the call for the next one."""
        bias: Any = self.bias
        output = self.run(geometry, input, self.weight, feedback, bias)
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "recalled", functional.Recalled.of(self, geometry, input, output))
        return output

    def enter_by_use(self, computed: Tensor | None) -> None:
        """Begin a product of a forward that reads the weight, or has ``computed`` another one from it."""
        object.__setattr__(self, "called", True)
        feedback, rule = self.feedback, self.rule
        if feedback is None or not feedback.is_leaf or torch.compiler.is_compiling():
            return
        if computed is not None and rule.learns and not rule.reads_probes:
            feedback.requires_grad_()  # the optimizers have W, but not the weight that was computed

    def note_layout(self, geometry: Geometry, feedback: Tensor) -> None:
        """Note in which layout a product by use has the feedback weight; a layer of torch.nn has only one."""

    def run(
        self,
        geometry: Geometry,
        input: Tensor,
        weight: Tensor,
        feedback: Tensor,
        bias: Tensor | None,
        steps: int = 1,
    ) -> Tensor:
        """Compute the output with these weights under the layer's rule, for an input with or without a batch.

        Args:
            steps: the number of calls in one pass, if each is a step of a recurrent layer. The steps then count like
                the positions of one call.
        """
        if input.dim() == weight.dim() - 1:
            return self.run(geometry, input.unsqueeze(0), weight, feedback, bias, steps).squeeze(0)
        if not torch.compiler.is_compiling() and torch._C._is_torch_function_mode_enabled():
            with torch._C.DisableTorchFunction():  # nn.products must not see the product inside of this one
                return self.run(geometry, input, weight, feedback, bias, steps)
        rule, scheduled = self.rule, self.scheduled
        if rule.needs_optimizer and not torch.compiler.is_compiling():
            object.__setattr__(self, "last_call", (geometry, input.shape, weight.shape))
        if rule.center and not torch.compiler.is_compiling():
            batch = input.shape[0]
            object.__setattr__(self, "has_single_sample", (rule.samples_of(batch) or batch) == 1)
        if scheduled is not None and steps == 1 and torch.compiler.is_compiling():
            options = {
                "center": rule.center,
                "samples": rule.samples_of(input.shape[0]),
                "normalize": rule.is_normalized,
                "positions": self._positions(geometry, input, weight) or 1,
            }
            return functional.scheduled_layer(geometry, scheduled, input, weight, feedback, bias, **options)
        coefficients = rule.fixed or self.coefficients_of(geometry, input, weight)
        if steps > 1:
            coefficients = coefficients.of_step(steps, rule.is_normalized or rule.reduction == "mean")
        return functional.layer(geometry, coefficients, input, weight, feedback, bias)

    def coefficients_of(self, geometry: Geometry, input: Tensor, weight: Tensor) -> Coefficients:
        """The coefficients of a call, under a rule for which they depend on the shapes."""
        return self.rule.coefficients(input.shape[0], self._positions(geometry, input, weight))

    def _positions(self, geometry: Geometry, input: Tensor, weight: Tensor) -> int:
        """The output positions of a sample, if the rule takes their mean; otherwise 1."""
        if self.rule.reduction != "mean":
            return 1
        shape = geometry.output_shape(input.shape, weight.shape)
        return math.prod(shape[2:] if geometry.channel == 1 else shape[1:-1])

    def effective_feedback(self, random: bool = True) -> Tensor | None:
        """Return the feedback weight that a pass uses: ``feedback`` as modified by the rule.

        Args:
            random: whether to draw the random magnitudes of brsf.
        """
        feedback, rule = self.feedback, self.rule
        if feedback is None or (rule.signs == "free" and not rule.expansion):
            return feedback
        if rule.expansion:
            assert self.mixing is not None
            return functional.mix(self.mixing, feedback, rule.decay)
        magnitudes: Tensor = feedback
        if random and rule.signs == "batch" and torch._C._get_tracing_state() is not None:
            raise RuntimeError("a layer follows brsf, expected another rule: torch.jit.trace compares two passes")
        if random and rule.signs == "batch" and torch.is_grad_enabled():
            magnitudes = feedback * torch.randn_like(feedback)
        return torch.copysign(magnitudes, self.weight.detach())

    def as_matrices(self, kernel: Tensor) -> Tensor:
        """Return a weight or feedback weight as one matrix [outputs, inputs] for each group: [G, K/G, d].

        The inputs are in the order of ``weight`` in memory: by channel, or in channels_last by position.
        """
        groups = getattr(self, "groups", 1)
        return kernel.reshape(groups, kernel.shape[0] // groups, math.prod(kernel.shape[1:]))

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """Undo :meth:`as_matrices`."""
        return matrices.reshape(self.weight.shape)

    def positions(self) -> int:
        """Return the number of output positions of the last batch; 0 if not known. Only layers that read probes."""
        if self.last_call is None:
            return 0
        geometry, input, weight = self.last_call
        return geometry.sizes(input, weight, 0).positions

    def factor_gradient(self, grad: Tensor) -> Tensor:
        """Compute the gradient of a feedback weight that is a factor (pfa) from the gradient of the product."""
        assert self.mixing is not None
        return (self.mixing.t() @ grad.flatten(1)).view(self.mixing.shape[1], *self.weight.shape[1:])

    def detach_input(self, input: Tensor) -> Tensor:
        """Detach the input if the error comes directly from the model's output (dfa)."""
        if self.direct is None:
            return input
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError("a layer follows dfa, expected another rule: torch.jit.trace records no hook of a model")
        return self.direct.detach(input)

    def reset_parameters(self) -> None:
        """Draw weight, bias and feedback again."""
        super().reset_parameters()  # type: ignore[misc]  # defined by the torch.nn layer, the other base class
        if "feedback" in self._parameters:  # the constructor of torch.nn calls this before the feedback exists
            self.reset_feedback()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """Save a checkpoint, with the name of the rule in its metadata."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["rule"] = self.rule.name

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Load a checkpoint; one of the torch.nn layer loads too, with a warning that the feedback is unchanged."""
        saved = local_metadata.get("rule", self.rule.name)
        if saved != self.rule.name and f"{prefix}feedback" in state_dict:
            if not any(message.startswith(OTHER_RULE) for message in error_msgs):  # once, not for each layer
                error_msgs.append(
                    f"{OTHER_RULE} {saved}, but {prefix[:-1] or 'the layer'} follows {self.rule.name}: convert the "
                    "model to the saved rule, or load dict(state_dict), which does not contain the rules"
                )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in ("feedback", "mixing"):
            if f"{prefix}{name}" in missing_keys:
                missing_keys.remove(f"{prefix}{name}")
                _log.warning("%s%s is not in the state dict: the feedback weight stays as it is", prefix, name)
        self._remember_version()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rule={self.rule}"


def _kind(rule: Rule) -> tuple:
    """What the feedback weight of a rule is, independently of how it learns."""
    return rule.transport, rule.signs, rule.expansion, rule.direct


def traced_call(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Record the call of a module in the graph of torch.fx.symbolic_trace, for which it is a leaf as in torch.nn.

    Raises:
        TypeError: the first argument is neither a tensor nor a value of such a graph.
        RuntimeError: the layer follows dfa, whose error comes from a hook of the model that the graph does not have.
    """
    proxies = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.fx.Proxy)]
    if not proxies:
        refuse_non_tensor("input", args[0] if args else None)
    if any(isinstance(m, FeedbackLayer) and m.direct is not None for m in module.modules()):
        raise RuntimeError("a layer follows dfa, expected another rule: a traced model has no hook on its output")
    tracer: Any = proxies[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def warn_of_uncalled(layers: Mapping[str, FeedbackLayer]) -> None:
    """Warn, once per layer, about layers that have never been called while others have."""
    left = [name for name, layer in layers.items() if not layer.called and layer not in _warned]
    if left and any(layer.called for layer in layers.values()):
        _warned.update(layers[name] for name in left)
        _log.warning(
            "%s: in use, but neither called nor used in a product of a forward that convert knows: the layer trains by "
            "backprop, without its feedback weight",
            ", ".join(left),
        )
