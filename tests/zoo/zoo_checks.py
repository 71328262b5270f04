"""What the model zoo checks of one model; see zoo.py.

The checks do not rely on what convert reports: that a layer is reached is seen in the gradients of a pass with NaN for
its feedback weight, and that no other weight carries gradients back is seen in the autograd graph.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import pyfeedback
from pyfeedback import functional
from pyfeedback.testing import by_reference

Inputs = dict[str, Any]
STEP_RULES = ("fa", "ia", "kp", "ia-probes")
TOLERANCE = 1e-6  # of the gradients of a layer, relative to the largest; parts of some models are always float32
TRIED = 3  # how many of the layers that seem to have an influence are tried


# A model as a function of its inputs


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The mean square of the distance to random targets, with the same random numbers at each call."""
    torch.manual_seed(1)
    outputs = [t for t in tensors_in(model(**inputs)) if t.requires_grad or not torch.is_grad_enabled()]
    if len(outputs) == 1 and outputs[0].dim() == 0:
        return outputs[0]  # the model computes a loss
    targets = torch.Generator().manual_seed(2)
    return torch.stack(
        [(t - torch.randn(t.shape, generator=targets, dtype=t.dtype)).square().mean() for t in outputs]
    ).sum()


def tensors_in(value: object) -> Iterator[Tensor]:
    """The floating-point tensors in an output: a tensor, or any container of outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with floating-point tensors in ``dtype``, which require gradients."""
    return {
        name: x.to(dtype).requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def without_dropout(model: nn.Module) -> nn.Module:
    """The model in training mode, without layers that drop units or samples."""
    for module in model.train().modules():
        for name in ("p", "drop_prob", "layerdrop", "layer_drop"):
            if isinstance(getattr(module, name, None), float) and "drop" in f"{type(module).__name__} {name}".lower():
                setattr(module, name, 0.0)
    return model


def leaves(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """What has a gradient in a pass, apart from feedback weights."""
    feedback = {id(p) for p in pyfeedback.feedback_parameters(model)}
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in feedback}
    return found | {f"input {n}": x for n, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}


# (a) Every layer


def conversion(plain: nn.Module) -> dict[str, Any]:
    """What convert does: the layers with feedback, and those that are left with weights."""
    model, report = pyfeedback.convert(copy.deepcopy(plain), "fa", return_report=True)
    layers = [name for name, _ in pyfeedback.feedback_layers(model)]
    accounted = {*report.changed, *report.left}
    forgotten = [
        name
        for name, module in plain.named_modules()
        for key, p in module.named_parameters(recurse=False)
        if p.dim() > 1 and not accounted & {name, f"{name}.{key}", key}
    ]
    return {"converted": layers, "left": report.left, "forgotten": forgotten}


def influence(plain: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Which feedback weights reach no gradient, and why.

    A layer is alive if one of its calls has an input that needs a gradient and an output that gets one. A few of them,
    and all others, are tried: a pass with NaN in the feedback weight has NaN in a gradient if the weight is used.
    """
    model = pyfeedback.convert(copy.deepcopy(plain), "fa")
    inputs = cast(inputs, torch.float32)
    of = list(leaves(model, inputs).values())
    with recorded_calls() as calls:
        grads = torch.autograd.grad(loss_of(model, inputs), of, allow_unused=True)
    if has_nan(grads):
        raise ValueError("a gradient is NaN before any feedback weight is")
    layers = dict(pyfeedback.feedback_layers(model))
    status = {row.name: row.path for row in pyfeedback.status(model)}
    calls_of = {name: calls.get(storage_of(layer.feedback), []) for name, layer in layers.items()}
    alive = [name for name in layers if any(call["input"] and call["gradient"] for call in calls_of[name])]
    others = [name for name in layers if name not in alive]
    some = alive[:: -(-len(alive) // TRIED) or 1]

    def reach(names: list[str]) -> bool:
        """Whether NaN in these feedback weights reaches a gradient."""
        drawn = [layers[name].feedback.detach().clone() for name in names]
        for name in names:
            layers[name].feedback.detach().fill_(torch.nan)
        grads = torch.autograd.grad(loss_of(model, inputs), of, allow_unused=True)
        for name, values in zip(names, drawn, strict=True):
            layers[name].feedback.detach().copy_(values)
        return has_nan(grads)

    suspects = others if others and reach(others) else []
    dead = [name for name in others if name not in suspects]
    dead += [name for name in (*suspects, *some) if not reach([name])]
    reasons = {name: why_dead(layers[name], status[name], calls_of[name]) for name in dead}
    return {"tried": len(others) + len(some), "dead": reasons}


def why_dead(layer: Any, path: str, calls: list[dict[str, bool]]) -> str:
    """Why a feedback weight has no influence, from the calls of its layer."""
    if not layer.called or path == "not called":
        return "not called"
    if calls and not any(call["input"] for call in calls):
        return "its input needs no gradient"
    if calls and not any(call["gradient"] for call in calls):
        return "no gradient reaches its output"
    return "NO INFLUENCE, though called"


@contextmanager
def recorded_calls() -> Iterator[dict[int, list[dict[str, bool]]]]:
    """The calls of layers inside the block, by the memory of the feedback weight."""
    calls: dict[int, list[dict[str, bool]]] = {}
    compute = functional.layer

    def layer(geometry, rule, input, weight, feedback, bias):
        output = compute(geometry, rule, input, weight, feedback, bias)
        call = {"input": input.requires_grad, "gradient": False}
        calls.setdefault(storage_of(feedback), []).append(call)
        if output.requires_grad:
            output.register_hook(lambda grad: call.update(gradient=bool(grad.any())))
        return output

    with mock.patch.object(functional, "layer", layer):
        yield calls


def storage_of(x: Tensor) -> int:
    """The address of the memory of a tensor, the same for its views."""
    return x.untyped_storage().data_ptr()


def has_nan(grads: Iterable[Tensor | None]) -> bool:
    """Whether one of the gradients is not finite."""
    return any(not bool(g.sum().isfinite()) for g in grads if g is not None)


# The positions of the factors among the inputs of PyTorch's nodes that are products
FACTORS = {
    "MmBackward0": (0, 1), "AddmmBackward0": (1, 2), "BmmBackward0": (0, 1), "BaddbmmBackward0": (1, 2),
    "MvBackward0": (0, 1), "AddmvBackward0": (1, 2), "ConvolutionBackward0": (0, 1), "GroupedMmBackward0": (0, 1),
    "LinearBackward0": (0, 1), "MkldnnRnnLayerBackward0": (0, 1, 2), "AddbmmBackward0": (1, 2),
}  # fmt: skip
LOOKUPS = ("EmbeddingBackward0", "EmbeddingBagBackward0")  # their output is data, not a weight


def weights_that_carry_gradients(plain: nn.Module, inputs: Inputs) -> list[str]:
    """The parameters that a product of the converted model multiplies its data's gradient with, as in backprop.

    Under ia, the layers with feedback are nodes of their own. In every other product of the autograd graph, a factor
    that depends on parameters only is a weight, and the gradient of the other factor is computed from it.
    """
    model = pyfeedback.convert(copy.deepcopy(plain), "ia")
    names = {id(p): name for name, p in model.named_parameters()}
    root = loss_of(model, cast(inputs, torch.float32)).grad_fn
    sources: dict[Any, frozenset[str] | None] = {None: frozenset()}  # the parameters behind a node; None for data
    found: dict[str, None] = {}
    for node in in_order(root):
        below = [sources[child] for child, _ in node.next_functions]
        if hasattr(node, "variable"):
            name = names.get(id(node.variable))
            sources[node] = None if name is None else frozenset([name])
        elif node.name() in LOOKUPS or is_feedback_layer(node):
            sources[node] = None
        else:
            sources[node] = None if None in below else frozenset().union(*below)
        if node.name() in FACTORS:
            factors = [below[i] for i in FACTORS[node.name()] if node.next_functions[i][0] is not None]
            if len(factors) > 1:
                found.update(dict.fromkeys(name for f in factors if f for name in sorted(f)))
            sources[node] = None
    return list(found)


def is_feedback_layer(node: Any) -> bool:
    """Whether a node of the graph is one of this package."""
    return any(word in node.name() for word in ("EagerLayer", "TransformableLayer", "pyfeedback"))


def in_order(root: Any) -> Iterator[Any]:
    """The nodes of an autograd graph, each after those it depends on."""
    seen, waiting = {None}, [(root, False)]
    while waiting:
        node, is_done = waiting.pop()
        if is_done:
            yield node
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(child, False) for child, _ in node.next_functions if child not in seen]


# (b) Gradients, (c) steps, (d) compilation


def gradient_error(plain: nn.Module, inputs: Inputs, rule: str = "ia") -> tuple[float, str]:
    """The largest error of a layer's gradients against the reference in float64, and the layer.

    The error of a module is relative to the largest gradient of its parameters: the gradient of a bias before a
    normalization is zero.
    """
    model = pyfeedback.convert(copy.deepcopy(plain).double(), rule)
    twin = copy.deepcopy(model)
    inputs = cast(inputs, torch.float64)
    loss_of(model, inputs).backward()
    with by_reference() as penalties:
        loss = loss_of(twin, inputs)
    (loss + sum(penalties)).backward()
    errors: dict[str, list[float]] = {}
    feedback = {id(p) for p in pyfeedback.feedback_parameters(model)}
    for (name, ours), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.grad is None and id(ours) in feedback:
            continue  # no gradient reaches the layer, but the reference has its regularizer all the same
        if (ours.grad is None) != (expected.grad is None):
            unused = ours.grad if expected.grad is None else expected.grad
            if unused is not None and unused.any():
                return float("inf"), name
        elif ours.grad is not None and expected.grad is not None:
            error, size = errors.setdefault(name.rpartition(".")[0], [0.0, 0.0])
            found = [(ours.grad - expected.grad).abs().max().item(), expected.grad.abs().max().item()]
            errors[name.rpartition(".")[0]] = [max(error, found[0]), max(size, found[1])]
    floor = 1e-12 * max(size for _, size in errors.values())
    relative = {name: error / max(size, floor) for name, (error, size) in errors.items()}
    worst = max(relative, key=relative.__getitem__)
    return relative[worst], worst


def step(plain: nn.Module, inputs: Inputs, rule: str) -> dict[str, Any]:
    """The loss before and after a step of SGD, and the layers whose feedback weight has not moved though it learns."""
    torch.manual_seed(3)
    model = pyfeedback.convert(copy.deepcopy(plain), rule)
    optimizer = pyfeedback.optim.SGD(model, lr=0.01)
    layers = dict(pyfeedback.feedback_layers(model))
    before = {name: layer.feedback.detach().clone() for name, layer in layers.items()}
    inputs = cast(inputs, torch.float32)
    with warnings_of_the_package() as messages:
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = loss_of(model, inputs)
        losses = [loss.item(), after.item()]
    moved = {name for name, layer in layers.items() if not torch.equal(layer.feedback, before[name])}
    expected = {name for name, layer in layers.items() if layer.rule.learns}
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return {
        "losses": losses,
        "finite": finite,
        "still": sorted(expected - moved),
        "wrongly_moved": sorted(moved - expected),
        "warnings": messages,
    }


@contextmanager
def warnings_of_the_package() -> Iterator[list[str]]:
    """The messages that the package logs as warnings inside the block."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logger = logging.getLogger("pyfeedback")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def compiled_error(plain: nn.Module, inputs: Inputs, rule: str = "ia") -> float:
    """The largest difference between the gradients of the compiled model and the eager one, in float64.

    It is relative to the largest gradient of each tensor, or a millionth of the largest of the model.
    """
    model = pyfeedback.convert(copy.deepcopy(plain).double(), rule)
    twin = copy.deepcopy(model)
    inputs = cast(inputs, torch.float64)
    torch._dynamo.reset()
    compiled: Callable = torch.compile(model, backend="aot_eager")
    losses = [loss_of(each, inputs) for each in (compiled, twin)]
    for loss in losses:
        loss.backward()
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True) if q.grad is not None]
    floor = 1e-6 * max(expected.abs().max().item() for _, expected in pairs)
    errors = [abs(losses[0].item() - losses[1].item())]
    for found, expected in pairs:
        found = torch.zeros_like(expected) if found is None else found
        errors.append((found - expected).abs().max().item() / max(expected.abs().max().item(), floor))
    return max(errors)
