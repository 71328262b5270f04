"""Conversion of models: convolutions and linear layers get a feedback path, everything else is unchanged."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from pyfeedback.core.algorithm import Algorithm, needs_response
from pyfeedback.core.tensors import DTYPES
from pyfeedback.core.values import check_flag, check_model, describe
from pyfeedback.init import Init, as_init, default_init_
from pyfeedback.nn import LAYERS, FeedbackLayer, MultiheadAttention, by_use
from pyfeedback.nn.direct import DirectFeedback, DirectInput
from pyfeedback.nn.model import feedback_layers, unchanged_on_error
from pyfeedback.optim import follow
from pyfeedback.optim.following import check_follow
from pyfeedback.pretrained import record_rules
from pyfeedback.rules import Rule
from pyfeedback.rules import rule as as_rule

_log = logging.getLogger("pyfeedback")
_NOT_FOUND = "no product of it with the input was found in the forward"
_NO_PATTERN = "no pattern of the rules matches its name"
_EMBEDDING = "an embedding has no input gradient, so there is nothing to feed back"
_LAZY = "they have no shape yet: run a forward pass before the conversion"
_LIST = "convert does not follow the module that takes them out of the list"
_DTYPE = "their dtype is {}, expected float64, float32, bfloat16 or float16"
_PARAMETRIZED = "it is parametrized: apply weight_norm and other parametrizations after the conversion"


@dataclass
class Conversion:
    """Report of :func:`convert`. Names of modules are those of ``model.named_modules()``; "" is the model itself.

    Attributes:
        rules: the rule of each pattern of names; "*" matches all names.
        changed: layers that now have a feedback path, and modules that multiply weights of their own with their input.
        left: layers with weights but without a feedback path, and the reason for each. If other weights of the same
            module have one, the name is that of the weight.
        not_in_place: activations that no longer work in place, because they would overwrite a response that the rule
            reads.
    """

    rules: dict[str, Rule]
    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    not_in_place: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        follow = ", ".join(f"{r}" if p == "*" else f"{p} {r}" for p, r in self.rules.items())
        changed = ", ".join(name or "the model" for name in self.changed)
        lines = [f"{len(self.changed)} layers follow {follow}: {changed or 'none'}"]
        lines += [f"left {name or 'the model'}: {why}" for name, why in self.left.items()]
        if self.not_in_place:
            lines.append(f"no longer in place, the rule reads their input: {', '.join(self.not_in_place)}")
        return "\n".join(lines)


def convert(
    model: nn.Module,
    rule: str | Rule | Mapping[str, str | Rule],
    *,
    init: Init | Callable[[Tensor], object] | None = None,
    strict: bool = False,
    return_report: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
):
    """Give every convolution and linear layer of ``model`` a feedback path that learns by ``rule``, in place.

    A layer is a product of a weight and an input, wherever a forward computes it. :mod:`pyfeedback.nn` lists the layers
    of torch.nn that are replaced. Any other module whose forward multiplies its own weights with its input gets a
    feedback weight for each of them, as the parameter ``{name}_feedback.feedback`` in the layout of the weight: its own
    linear class, a standardized convolution, the weights of experts, an LSTM. In a module that reads the weight of a
    layer instead of calling it (``F.linear(x, self.qkv.weight)``), the product uses the feedback weight of that layer.
    docs/pytorch.md says how such products are found.

    The modules remain the same objects and keep their weights, dtype, device, memory format, training mode, hooks and
    sharing. Create the optimizer after the conversion, or pass it as ``optimizer``. Otherwise it does not have the
    feedback weights: they never learn, while their gradients keep growing. A layer that already has a feedback path
    gets the new rule and a newly drawn feedback weight. The config of a model of transformers gets ``feedback_rules``,
    the names of the rules, which ``save_pretrained`` saves for :func:`pyfeedback.load_feedback`.

    Args:
        model: any module, or a single layer.
        rule: a name or a :class:`pyfeedback.Rule`. To mix rules, a dict from patterns of layer names to rules, such as
            ``{"layer1.*": "ia", "fc": "bp", "*": "kp"}``: each layer follows the first pattern that matches (fnmatch)
            and is not converted if none does.
        init: the initialization of the feedback weights: a :class:`pyfeedback.Init`, or a function of torch.nn.init. By
            default, a normal distribution with the standard deviation of the layer's weight. With a seed, each layer
            draws different values.
        strict: raise an error if a layer with weights cannot be converted, or matches no pattern.
        return_report: return ``(model, Conversion)``. The report is logged in any case, at level INFO; at WARNING if
            layers with more weights are left than are converted. A pattern that matches no layer is logged at WARNING.
        optimizer: any optimizer of the model, built before or after the conversion. Its steps are to update the
            feedback weights as well: :func:`pyfeedback.optim.follow` with its default options.

    Returns:
        ``model`` itself.

    Raises:
        ValueError, TypeError: an argument is invalid, or no layer would be converted and no report is returned.

    After any error, also one that ``init`` raises, the model is as before.
    """
    check_model(model)
    check_flag("strict", strict)
    check_flag("return_report", return_report)
    rules, init = rules_by_pattern(rule), as_init(init)
    chosen, left = _chosen_rules(model, rules)
    if not chosen and not return_report:
        raise ValueError(_nothing_to_convert(model, rules, left))
    if strict and left:
        described = "; ".join(f"{name or 'the model'}: {why}" for name, why in left.items())
        raise ValueError(f"strict is True, but these layers are left: {described}")
    if optimizer is not None:
        named = (pair for name in chosen for pair in model.get_submodule(name).named_parameters(recurse=False))
        check_follow(optimizer, [p for name, p in named if name != "feedback" and p.dim() > 1], chosen)
    with unchanged_on_error(model):
        report = Conversion(rules, list(chosen), left, _give_paths(model, chosen, init))
        if optimizer is not None:
            follow(optimizer, model)
    record_rules(model)
    _log.log(logging.WARNING if _leaves_most(model, left) else logging.INFO, "%s", report)
    for pattern in rules:
        if not any(fnmatchcase(name, pattern) for name in chosen):
            close = ", ".join(_close_names(pattern, list(chosen)))
            _log.warning(
                "the pattern %r of rule matches no layer%s", pattern, f"; the model has {close}" if close else ""
            )
    return (model, report) if return_report else model


def is_converted(model: nn.Module) -> bool:
    """Return whether :func:`convert` has given a layer of the model a rule."""
    return any(isinstance(module, FeedbackLayer) for module in model.modules())


def convert_once(model: nn.Module, rule: str | Rule | Mapping[str, str | Rule], init: Any = None) -> None:
    """Call :func:`convert`, unless the model has been converted by this rule before: its feedback weights are kept.

    Raises:
        ValueError: it has been converted by another rule.
    """
    if not is_converted(model):
        convert(model, rule, init=init)
        return
    rules, found = rules_by_pattern(rule), dict[str, Rule]()
    for name, layer in model.named_modules():
        if isinstance(layer, FeedbackLayer):
            module = name.rpartition(".")[0] if isinstance(layer, by_use.UsedWeight) else name
            found[module] = layer.unscheduled or layer.rule
    chosen, _ = _chosen_rules(model, rules)
    for name in chosen | found:
        if chosen.get(name) != found.get(name):
            given, follows = ", ".join(map(str, rules.values())), found.get(name, "no rule")
            raise ValueError(
                f"rule is {given}, but {name or 'the model'} follows {follows}, expected the rule of the earlier "
                "conversion, or None"
            )


def _give_paths(model: nn.Module, chosen: dict[str, Rule], init: Init) -> list[str]:
    """Give the layers their feedback paths, and return the activations that no longer work in place."""
    direct = None
    _drop_direct_feedback(model)
    by_use.detach(model)
    for name, follows in chosen.items():
        module: Any = model.get_submodule(name)
        for path, layer in _attach(name, module, follows, init):
            layer.full_name = path
            layer.reset_feedback(_normal_like(layer.weight))
            if follows.direct != "no":
                direct = direct or DirectFeedback(init, follows.direct == "shared")
                layer.direct = DirectInput(path, direct)
    by_use.attach_readers(model)
    if direct is not None:
        direct.attach(model)
    return _preserve_responses(model)


def _attach(name: str, module: Any, rule: Rule, init: Init) -> list[tuple[str, FeedbackLayer]]:
    """Give a module its feedback weights, and return the layers that hold them, by name."""
    if type(module) in LAYERS or isinstance(module, FeedbackLayer):
        module.__class__ = LAYERS.get(type(module), type(module))
        module.attach_feedback(rule, init.of_layer(name))
        return [(name, module)]
    found: list[tuple[str, FeedbackLayer]] = []
    for weight, is_computed in by_use.used_weights(module)[0].items():
        path = f"{name}.{weight}" if name else weight
        found.append((path, by_use.attach(module, weight, is_computed, rule, init.of_layer(path))))
    return found


def _chosen_rules(model: nn.Module, rules: dict[str, Rule]) -> tuple[dict[str, Rule], dict[str, str]]:
    """The rule of each layer that is converted, and the reason for each layer that is left, by name."""
    unsupported = _unsupported(model)
    chosen: dict[str, Rule] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if module in unsupported:
            left[name] = unsupported[module]
            continue
        if isinstance(module, (by_use.UsedWeight, ParametrizationList)):  # part of another layer
            continue
        if isinstance(module, FeedbackLayer) or (type(module) in LAYERS and _has_floats(module)):
            has_path, others = True, list[str]()
        else:
            used, others = by_use.used_weights(module)
            has_path = bool(used)
        follows = next((r for pattern, r in rules.items() if fnmatchcase(name, pattern)), None)
        if has_path and follows is not None:
            chosen[name] = follows
            left |= {f"{name}.{weight}" if name else weight: _why_left(module, [weight]) for weight in others}
        elif has_path:
            left[name] = _NO_PATTERN
        elif others:
            left[name] = f"{type(module).__name__} has weights, but {_why_left(module, others)}"
    return chosen, left


def _has_floats(module: nn.Module) -> bool:
    """Whether the layers of this package have an implementation for the dtypes of a module's weights."""
    return all(p.dtype in DTYPES for p in module.parameters(recurse=False))


def _why_left(module: nn.Module, weights: list[str]) -> str:
    """The reason why a module has no feedback path for some of its weights."""
    if any(is_lazy(getattr(module, name)) for name in weights):
        return _LAZY
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return _LIST
    unsupported = [p for p in module.parameters(recurse=False) if p.dtype not in DTYPES]
    return _DTYPE.format(unsupported[0].dtype) if unsupported else _NOT_FOUND


def _leaves_most(model: nn.Module, left: dict[str, str]) -> bool:
    """Whether more elements of weights train by plain backprop, without being meant to, than have feedback weights."""
    converted = sum(layer.weight.numel() for _, layer in feedback_layers(model) if not is_lazy(layer.weight))
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    others = 0
    for name, why in left.items():
        if why not in (_NO_PATTERN, _EMBEDDING):
            own = [weights[name]] if name in weights else modules[name].parameters(recurse=why == _PARAMETRIZED)
            others += sum(p.numel() for p in own if not is_lazy(p) and p.dim() > 1)
    return others > converted > 0


def _nothing_to_convert(model: nn.Module, rules: dict[str, Rule], left: dict[str, str]) -> str:
    """The message of the error if no layer would be converted."""
    names = [name for name, why in left.items() if why == _NO_PATTERN]
    if names:
        close = dict.fromkeys(name for pattern in rules for name in _close_names(pattern, names))
        what = f"the name of a layer, such as {', '.join(list(close or names)[:3])}"
        return f"rule has the patterns {', '.join(map(repr, rules))}, none of which matches, expected {what}"
    what = "a convolution, a linear layer or attention of torch.nn"
    reasons = "; ".join(f"{name or 'the model'}: {why}" for name, why in list(left.items())[:3])
    return f"model is a {type(model).__name__} without a layer to convert, expected {what}" + (
        f" ({reasons})" if reasons else ""
    )


def _close_names(pattern: str, names: list[str]) -> list[str]:
    """Names that are like a pattern."""
    return get_close_matches(pattern, names, n=3, cutoff=0.6)


def unconvert(model: nn.Module) -> nn.Module:
    """Remove the feedback paths from ``model``, in place: the result has plain torch.nn layers and the trained weights.

    Inference, torch.export and ONNX then do not need pyfeedback, and the state_dict is that of the plain architecture.
    The modules remain the same objects. Activations that :func:`convert` switched from working in place stay switched.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a layer is an instance of a subclass, as every parametrized layer is; nothing has been changed.
        TypeError: ``model`` is not a module.
    """
    check_model(model)
    plain = {layer: original for original, layer in LAYERS.items()}
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, FeedbackLayer) and not isinstance(module, by_use.UsedWeight)
    ]
    for name, layer in layers:
        if type(layer) not in plain:
            what = f"{name or 'the model'} is a {type(layer).__name__}"
            raise ValueError(f"{what}, expected a layer of pyfeedback.nn itself: remove its parametrizations first")
    _drop_direct_feedback(model)
    by_use.detach(model)
    for _, layer in layers:
        layer.detach_feedback()
        layer.__class__ = plain[type(layer)]
    record_rules(model)
    return model


def rules_by_pattern(rule: str | Rule | Mapping[str, str | Rule]) -> dict[str, Rule]:
    """Return the rule of each pattern of names, as :func:`convert` reads its argument ``rule``."""
    if not isinstance(rule, Mapping):
        return {"*": as_rule(rule)}
    if not rule:
        raise ValueError(f"rule is a {type(rule).__name__} without a pattern, expected one or more")
    for pattern in rule:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern of rule is {describe(pattern)}, expected a string")
    return {pattern: as_rule(r) for pattern, r in rule.items()}


def _drop_direct_feedback(model: nn.Module) -> None:
    direct = getattr(model, "direct_feedback", None)
    if isinstance(direct, DirectFeedback):
        direct.detach(model)


def _unsupported(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that have weights but cannot have a feedback path, with the reason for each."""
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            reasons[module] = _EMBEDDING
        elif is_parametrized(module) and not isinstance(module, FeedbackLayer):
            reasons[module] = _PARAMETRIZED
        elif isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention):
            if type(module) is not nn.MultiheadAttention:
                what = f"{type(module).__name__}, a subclass of MultiheadAttention"
            elif not module._qkv_same_embed_dim:
                what = "attention with kdim or vdim other than embed_dim"
            else:
                continue
            reasons[module] = f"{what} has weights, but there is no feedback layer for it"
            reasons[module.out_proj] = "its attention reads the weight without calling it"
    return reasons


def _normal_like(weight: Tensor) -> Callable[[Tensor], object]:
    """Normal with the standard deviation of the weight; for a constant weight, the initialization of a new layer."""

    def init_fn(feedback: Tensor) -> None:
        scale = weight.detach().float().std() if weight.numel() > 1 else torch.zeros(())
        if scale > 0:
            feedback.normal_(0.0, float(scale))
        else:
            default_init_(feedback)

    return init_fn


def _preserve_responses(model: nn.Module) -> list[str]:
    """Switch off in-place activations directly after a layer whose output the rule reads in the backward pass.

    Only layers without a bias are affected: with a bias, few outputs can be read as the response. The order is that of
    ``named_modules``, with each occurrence of a shared module. A response that an in-place call overwrites is computed
    again in the backward pass, which takes longer.
    """
    leaves = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if not any(m.children())]
    leaves = [(name, m) for name, m in leaves if not isinstance(m, (nn.Identity, nn.Flatten))]  # these do not copy
    switched: list[str] = []
    for (_, layer), (name, follower) in pairwise(leaves):
        if not isinstance(layer, FeedbackLayer) or layer.feedback is None or layer.bias is not None:
            continue
        reads_response = layer.rule.reads_data and needs_response(Algorithm.DIRECT, layer.rule.coefficients(1, 1))
        if reads_response and getattr(follower, "inplace", False) is True:
            follower.inplace = False
            switched.append(name)
    return switched
