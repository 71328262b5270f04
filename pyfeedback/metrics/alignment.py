"""How well feedback weights align with forward weights, and how they change the gradients."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyfeedback.backends.dispatch import current_implementation
from pyfeedback.core import step_checks
from pyfeedback.core.values import check_callable, check_model, describe, refuse_non_tensor
from pyfeedback.nn import FeedbackLayer
from pyfeedback.nn.layer import warn_of_uncalled


@dataclass(frozen=True)
class LayerAlignment:
    """Alignment of one layer. Angles are in degrees: 0 same direction, 90 orthogonal, nan if one side is zero.

    Attributes:
        angle: the angle between feedback and weight.
        norm_ratio: |feedback| / |weight|; nan without a feedback weight.
        weight_norm: |weight|.
        projection_angle: the angle between the layer's input gradients through the feedback and through the weight, for
            the same output gradient (local), over all calls of the layer; nan if the layer has no feedback weight (dfa)
            or no single output (attention), None without a batch.
        gradient_angle: the angle between the weight's gradient in this network and the gradient of backprop on the same
            batch (true); nan for a frozen weight, None without a batch.
    """

    angle: float
    norm_ratio: float
    weight_norm: float
    projection_angle: float | None = None
    gradient_angle: float | None = None


def alignment(
    model: nn.Module, batch: tuple | None = None, loss: Callable[..., Tensor] | None = None
) -> dict[str, LayerAlignment]:
    """Return the alignment of each feedback layer of ``model``, by name, in the order of its modules.

    Computing the angles and norms of all weights takes one pass over memory and, on a GPU, one synchronization.

    Args:
        model: a model with feedback layers.
        batch: ``(input, target)``, for the projection and gradient angles. The model runs on it twice. The gradients of
            parameters, the buffers and the random state do not change.
        loss: ``loss(model(input), target)`` returns the scalar loss; required with ``batch``. Without a batch,
            ``loss()`` runs the model itself and returns the loss, for models with several inputs or outputs.

    Returns:
        A dict of :class:`LayerAlignment`; empty for a model without feedback layers.

    Raises:
        ValueError: ``batch`` is given without ``loss``, or a ``loss`` that takes arguments without ``batch``; or
            weights have no values (on the meta device).
        TypeError: an argument has the wrong type.
    """
    check_model(model)
    evaluate = loss_of(model, batch, loss)
    layers = {name: layer for name, layer in _layers(model) if layer.feedback is not None or layer.direct is not None}
    for name, layer in layers.items():
        _check_values(name, layer)
    warn_of_uncalled(layers)
    with torch.no_grad():
        paths = [layer.effective_feedback(random=False) for layer in layers.values()]
        feedback = [torch.zeros_like(w.weight) if b is None else b for w, b in zip(layers.values(), paths, strict=True)]
    products = inner_products(feedback, [layer.weight for layer in layers.values()])
    weights = {
        name: (angle_of(*p), math.nan if b is None else norm_ratio_of(*p), math.sqrt(p[1]))
        for name, b, p in zip(layers, paths, products, strict=True)
    }
    if evaluate is None:
        return {name: LayerAlignment(*found) for name, found in weights.items()}
    with preserving_state(model):
        gradients, projections = _gradients(layers, evaluate, observe=True)
    with preserving_state(model), weight_transport(model):
        true_gradients, _ = _gradients(layers, evaluate, observe=False)
    return {
        name: LayerAlignment(*weights[name], projections.get(name, math.nan), angle(g, t))
        for name, g, t in zip(layers, gradients, true_gradients, strict=True)
    }


def loss_of(model: nn.Module, batch: tuple | None, loss: Callable[..., Tensor] | None) -> Callable[[], Tensor] | None:
    """The function without arguments that computes the loss on a batch, and checks it; None without both."""
    if batch is None and loss is None:
        return None
    if batch is not None:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"batch is {describe(batch)}, expected a pair (input, target)")
        if loss is None:
            raise ValueError("loss is None with a batch, expected a function of the model's output and the target")
    assert loss is not None
    what = "no argument, without a batch" if batch is None else "the model's output and the target"
    check_callable("loss", loss, f"a function of {what}")
    if batch is None and _needs_arguments(loss):
        raise ValueError(
            "batch is None, expected a pair (input, target), or a loss that can be called without arguments"
        )

    def evaluate() -> Tensor:
        value = loss() if batch is None else loss(model(batch[0]), batch[1])
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"loss returned {describe(value)}, expected a tensor of one number")
        return value

    return evaluate


def _needs_arguments(function: Callable[..., Tensor]) -> bool:
    """Whether a function cannot be called without arguments; False if it has no signature."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:  # of some functions in C
        return False
    return any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()
    )


def angle(a: Tensor, b: Tensor) -> float:
    """Return the angle between two tensors of the same shape, in degrees, summed in float64; nan if one is zero.

    Raises:
        ValueError: the tensors differ in shape, dtype or device.
        TypeError: an argument is not a tensor.
    """
    for name, tensor in (("a", a), ("b", b)):
        if not isinstance(tensor, Tensor):
            refuse_non_tensor(name, tensor)
    if a.shape != b.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}, expected that of a, {tuple(a.shape)}")
    if (a.dtype, a.device) != (b.dtype, b.device):
        raise ValueError(f"b is {b.dtype} on {b.device}, expected the same as a, {a.dtype} on {a.device}")
    return angle_of(*inner_products([a], [b])[0])


@contextmanager
def weight_transport(model: nn.Module) -> Iterator[None]:
    """Send the gradients of ``model`` through the weights inside the block: plain backprop."""
    check_model(model)
    layers = [(layer, layer.feedback, layer.direct) for _, layer in _layers(model)]
    for layer, *_ in layers:
        layer.feedback = layer.direct = None
    try:
        yield
    finally:
        for layer, feedback, direct in layers:
            layer.feedback, layer.direct = feedback, direct


def _check_values(name: str, layer: FeedbackLayer) -> None:
    """Raise if the weights have no values, or are on different devices."""
    weight, feedback = layer.weight, layer.feedback
    for what, tensor in (("feedback", feedback), ("weight", weight)):
        if tensor is not None and tensor.is_meta and (feedback is None or feedback.is_meta):
            raise ValueError(f"{what} of layer {name} is on meta, expected tensors with data")
    if feedback is not None and weight.device != feedback.device:
        on = f"weight of layer {name} is on {weight.device}"
        raise ValueError(f"{on}, expected the device of its feedback, {feedback.device}")


def _layers(model: nn.Module) -> Iterator[tuple[str, FeedbackLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FeedbackLayer))


@torch.no_grad()
def inner_products(feedback: Sequence[Tensor], weight: Sequence[Tensor]) -> list[tuple[float, float, float]]:
    """<B, B>, <W, W> and <B, W> of each pair, summed in float64: one pass over the pairs of each device."""
    places: dict[torch.device, list[int]] = {}
    for i, b in enumerate(feedback):
        places.setdefault(b.device, []).append(i)
    found: dict[int, tuple[float, float, float]] = {}
    for device, here in places.items():
        pairs = [feedback[i] for i in here], [weight[i] for i in here]
        try:
            products = current_implementation("alignment_products", device.type)(*pairs)
        except RuntimeError as error:  # the compiled kernel checks the pairs itself, in a fraction of the time
            step_checks.check_pairs(*pairs)
            raise step_checks.kernel_error(error) from None
        found |= zip(here, products.tolist(), strict=True)
    return [found[i] for i in range(len(feedback))]


def angle_of(bb: float, ww: float, bw: float) -> float:
    """The angle between B and W in degrees, from their :func:`inner_products`; nan if one is zero or not finite."""
    norms = math.sqrt(bb) * math.sqrt(ww)
    return math.degrees(math.acos(min(1.0, max(-1.0, bw / norms)))) if 0 < norms < math.inf else math.nan


def norm_ratio_of(bb: float, ww: float, bw: float) -> float:
    """|B| / |W|, from their :func:`inner_products`; nan if W is zero."""
    return math.sqrt(bb / ww) if ww > 0 else math.nan


@contextmanager
def preserving_state(model: nn.Module) -> Iterator[None]:
    """Restore the buffers and the random state after the block."""
    saved = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(d.index for d in devices)), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in saved:
                buffer.copy_(value)
                setattr(module, name, buffer)  # the forward may have replaced the buffer


def _gradients(layers: dict[str, FeedbackLayer], evaluate: Callable[[], Tensor], observe: bool):
    """The weight gradients of one pass and, if ``observe``, the projection angle of each layer."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def remember(name):
        def hook(module, inputs, output):
            if module.feedback is None or not isinstance(output, Tensor):
                return None
            if not output.requires_grad:  # every parameter up to here is frozen
                output = output.detach().requires_grad_()
            calls.setdefault(name, []).append((inputs[0].detach(), output))
            return output.clone()  # the next activation may work in place; we need the gradient of its input

        return hook

    hooks = [layer.register_forward_hook(remember(name)) for name, layer in layers.items()] if observe else []
    try:
        value = evaluate()
    finally:
        for hook in hooks:
            hook.remove()
    weights = [layer.weight for layer in layers.values()]
    outputs = [output for made in calls.values() for _, output in made]
    grads = iter(gradients_of(value, weights + outputs))
    weight_grads = [next(grads) for _ in weights]
    projections = {
        name: _projection_angle(layers[name], [(x, next(grads)) for x, _ in made]) for name, made in calls.items()
    }
    return weight_grads, projections


def gradients_of(value: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of ``value``; zero for tensors that are frozen or that it does not depend on."""
    live = [t for t in tensors if t.requires_grad]
    grads = iter(torch.autograd.grad(value, live, allow_unused=True) if live else ())
    found = [next(grads) if t.requires_grad else None for t in tensors]
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def _projection_angle(layer: FeedbackLayer, calls: list[tuple[Tensor, Tensor]]) -> float:
    by_feedback = _input_gradients(layer, calls)
    feedback, layer.feedback = layer.feedback, None
    try:
        by_weight = _input_gradients(layer, calls)
    finally:
        layer.feedback = feedback
    return angle(by_feedback, by_weight)


def _input_gradients(layer: FeedbackLayer, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The layer's input gradients for each input and output gradient of ``calls``, flattened and concatenated."""
    grads: list[Tensor] = []
    for x, grad_output in calls:
        x = x.detach().requires_grad_()
        grads += torch.autograd.grad(type(layer).forward(layer, x), x, grad_output)
    return torch.cat([g.flatten() for g in grads])
