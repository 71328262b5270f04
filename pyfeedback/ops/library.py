"""The implementation, fake, autograd formula and autocast of every op, registered with PyTorch.

Each implementation checks its arguments and calls the backend that :mod:`pyfeedback.backends.dispatch` chooses.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfeedback.backends.dispatch import current_implementation, plan
from pyfeedback.core import layer_checks, step_checks
from pyfeedback.core.coefficients import COEFFICIENTS, READ_DATA, Coefficients
from pyfeedback.core.geometry import LINEAR, Convolution, Geometry, from_arguments
from pyfeedback.core.step_options import StepOptions
from pyfeedback.ops.autograd import not_a_view, register_formula
from pyfeedback.ops.schemas import LIBRARY

ALL = (True, True, True, True)  # output_mask: compute all gradients

_ops = torch.ops.pyfeedback


# The layers. The arguments of an op after its tensors define its geometry; the same functions implement all layers.


def _conv2d_geometry(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) -> Convolution:
    return Convolution(tuple(stride), tuple(padding), tuple(dilation), groups=groups)


def _linear_geometry() -> Geometry:
    return LINEAR


def _forward(geometry_of: Callable[..., Geometry]) -> Callable[..., Tensor]:
    def forward(input, weight, feedback, bias=None, *arguments, **rule):
        geometry = geometry_of(*arguments)
        if geometry_of is from_arguments:
            layer_checks.check_lengths(geometry, weight.dim() - 2)
        layer_checks.check_layer(geometry, input, weight, feedback, bias)
        layer_checks.check_coefficients(Coefficients(**rule), input)
        return not_a_view(geometry.fprop(input, weight, bias))

    return forward


def _check_backward(geometry_of, arguments, rule, grad_output, input, weight, feedback, response, mask) -> tuple:
    """Check the arguments of a backward op, and return its geometry and coefficients."""
    geometry, coefficients = geometry_of(*arguments), Coefficients(**rule)
    if geometry_of is from_arguments:
        layer_checks.check_lengths(geometry, weight.dim() - 2)
    layer_checks.check_layer(geometry, input, weight, feedback, None)
    layer_checks.check_coefficients(coefficients, input)
    output_shape = geometry.output_shape(input.shape, weight.shape)
    layer_checks.check_backward(grad_output, output_shape, input, response, mask)
    return geometry, coefficients


def _backward(geometry_of: Callable[..., Geometry]) -> Callable:
    def backward(grad_output, input, weight, feedback, response=None, *arguments, output_mask=ALL, **rule):
        tensors = grad_output, input, weight, feedback, response
        geometry, coefficients = _check_backward(geometry_of, arguments, rule, *tensors, output_mask)
        call = plan(geometry, input, weight, coefficients, output_mask, response is not None)
        return call.chosen.backward(call, *tensors)

    return backward


def _fake_backward(geometry_of: Callable[..., Geometry]) -> Callable:
    def backward(grad_output, input, weight, feedback, response=None, *arguments, output_mask=ALL, **rule):
        _check_backward(geometry_of, arguments, rule, grad_output, input, weight, feedback, response, output_mask)
        return _empty_gradients(grad_output, input, weight, output_mask)

    return backward


def _empty_gradients(grad_output: Tensor, input: Tensor, weight: Tensor, mask: Sequence[bool]) -> tuple:
    """Uninitialized gradients, each in the memory format of its tensor."""
    channels = grad_output.shape[-1] if weight.dim() == 2 else grad_output.shape[1]
    grads = [torch.empty_like(t) if need else None for t, need in zip((input, weight, weight), mask, strict=False)]
    return (*grads, weight.new_empty(channels) if mask[3] else None)


# The layers with a tensor of coefficients. In a compiled graph, numbers are constants, so each step of a schedule would
# recompile. A CPU tensor is an input of the graph. pyfeedback.schedules.Schedule writes to it, and the backward pass
# reads it.


def _scheduled(input, weight, feedback, bias, coefficients, *arguments, positions, **options) -> Tensor:
    layer_checks.check_scheduled(coefficients, positions)
    forward = _forward(from_arguments)
    return forward(input, weight, feedback, bias, *arguments, **options)


def _scheduled_backward(
    grad_output, input, weight, feedback, response, coefficients, *arguments, positions, output_mask=ALL, **options
):
    rule = dict(zip(COEFFICIENTS, coefficients.tolist(), strict=True))
    rule |= {name: rule[name] / positions for name in READ_DATA}
    backward = _backward(from_arguments)
    tensors = grad_output, input, weight, feedback, response
    return backward(*tensors, *arguments, output_mask=output_mask, **options, **rule)


def _fake_scheduled_backward(grad_output, input, weight, *others, output_mask=ALL, **options):
    return _empty_gradients(grad_output, input, weight, output_mask)


# The multi-tensor step, centering and mixing


def feedback_step_(feedback, weight, grad, momentum_buffer, *, decay, self_, tie, **options) -> None:
    """The op's implementation. Eager code calls it directly, because the dispatcher costs more than a small step."""
    if not isinstance(feedback, (list, tuple)) or not all(isinstance(t, Tensor) for t in feedback[:1]):
        step_checks.refuse_list("feedback", feedback)
    coefficients, given = {"decay": decay, "self_": self_, "tie": tie}, StepOptions(**options)
    step_checks.check_step_numbers(len(feedback), coefficients, given)
    if not feedback:
        return
    if torch.is_grad_enabled():
        step_checks.check_in_place({"feedback": feedback, "momentum_buffer": momentum_buffer if given.momentum else ()})
    step = current_implementation("feedback_step_", feedback[0].device.type)
    step(feedback, weight, grad, momentum_buffer, coefficients, given)


def _center(input: Tensor, samples: int) -> Tensor:
    layer_checks.check_center(input, samples)
    step_checks.check_storage("input", input)
    return current_implementation("center", input.device.type)(input, samples)


def _add_centered_(self: Tensor, input: Tensor, beta: float, alpha: float) -> None:
    layer_checks.check_add_centered(self, input)
    current_implementation("add_centered_", input.device.type)(self, input, beta, alpha)


def mix(mixing: Tensor, feedback: Tensor, decay: float) -> Tensor:
    """Compute the feedback as a product, [K, M] times [M, ...]; ``decay`` is part of the second factor's gradient."""
    layer_checks.check_mix(mixing, feedback, decay)
    return (mixing @ feedback.flatten(1)).view(mixing.shape[0], *feedback.shape[1:])


for _name, _implementation in {
    "feedback_step_": feedback_step_,
    "mix": mix,
    "center": _center,
    "add_centered_": _add_centered_,
}.items():
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


# Fakes: shapes and strides without values


def _fake_step(feedback, weight, grad, momentum_buffer, *, decay, self_, tie, **options) -> None:
    coefficients, given = {"decay": decay, "self_": self_, "tie": tie}, StepOptions(**options)
    step_checks.check_step_numbers(len(feedback), coefficients, given)
    step_checks.check_step_tensors(feedback, weight, grad, momentum_buffer, coefficients, given, memory=False)
    step_checks.refuse_meta({"feedback": feedback})


def _fake_extension_step(feedback, weight, grad, momentum_buffer, **options) -> None:
    """Unlike ``feedback_step_``, this op also accepts one number for all rows."""
    for name in ("decay", "self_", "tie"):
        options[name] = list(options[name]) * (len(feedback) if len(options[name]) == 1 else 1)
    _fake_step(feedback, weight, grad, momentum_buffer, **options)


def _fake_products(feedback: Sequence[Tensor], weight: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(feedback), 3, dtype=torch.float64, device=feedback[0].device)


def _fake_depthwise(grad_output, input, weight, feedback, *args) -> tuple[Tensor, ...]:
    step_checks.refuse_meta({"grad_output": grad_output, "input": input, "weight": weight, "feedback": feedback})
    like = (input, weight, weight, weight.new_empty(weight.shape[0]))
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(like, args[-4:], strict=True))


def _fake_add_centered_(self: Tensor, input: Tensor, beta: float, alpha: float) -> None:
    layer_checks.check_add_centered(self, input)


def _fake_center(input: Tensor, samples: int) -> Tensor:
    return torch.empty_like(input[:samples])


_fakes: dict[str, Any] = {
    "feedback_step_": _fake_step,
    "extension_feedback_step_": _fake_extension_step,
    "mix": mix,
    "extension_depthwise_backward": _fake_depthwise,
    "center": _fake_center,
    "extension_center": _fake_center,
    "add_centered_": _fake_add_centered_,
    "extension_add_centered_": _fake_add_centered_,
    "extension_alignment_products": _fake_products,
}
for _name, _fake in _fakes.items():
    torch.library.register_fake(f"pyfeedback::{_name}", _fake, lib=LIBRARY)


def _save_factors(ctx, inputs, output: Tensor) -> None:
    mixing, feedback, ctx.decay = inputs
    ctx.save_for_backward(mixing, feedback)


def _differentiate_mix(ctx, grad: Tensor):
    mixing, feedback = ctx.saved_tensors
    pulled = (mixing.t() @ grad.flatten(1)).view(feedback.shape)
    return None, pulled + ctx.decay * feedback, None


class TransformableMix(torch.autograd.Function):
    """The op ``mix`` under torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mixing, feedback, decay):
        return mix(mixing, feedback, decay)

    setup_context = staticmethod(_save_factors)
    backward = staticmethod(_differentiate_mix)


torch.library.register_autograd("pyfeedback::mix", _differentiate_mix, setup_context=_save_factors, lib=LIBRARY)


# Autocast: the forward ops run in the autocast dtype, like torch's convolution and linear layers.


def _autocast(op, device_type: str):
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def cast(*args, **rule):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(cast_to(a, dtype, device_type) for a in args), **rule)

    return cast


def cast_to(value, dtype: torch.dtype, device_type: str):
    """Cast an argument as autocast does: floating-point tensors on the device, except float64, to ``dtype``."""
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    return value.to(dtype) if eligible and value.device.type == device_type else value


_geometries: dict[str, Any] = {
    "fa_conv2d": _conv2d_geometry,
    "fa_convolution": from_arguments,
    "fa_linear": _linear_geometry,
}
for _name, _geometry_of in _geometries.items():
    LIBRARY.impl(_name, _forward(_geometry_of), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{_name}_backward", _backward(_geometry_of), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyfeedback::{_name}", _forward(_geometry_of), lib=LIBRARY)
    torch.library.register_fake(f"pyfeedback::{_name}_backward", _fake_backward(_geometry_of), lib=LIBRARY)
    register_formula(_name, _geometry_of, _forward(_geometry_of))
    for _device_type in ("cpu", "cuda"):
        _op = getattr(_ops, _name).default
        LIBRARY.impl(_name, _autocast(_op, _device_type), f"Autocast{_device_type.upper()}")

LIBRARY.impl("scheduled_layer", _scheduled, "CompositeExplicitAutograd")
LIBRARY.impl("scheduled_layer_backward", _scheduled_backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyfeedback::scheduled_layer", _scheduled, lib=LIBRARY)
torch.library.register_fake("pyfeedback::scheduled_layer_backward", _fake_scheduled_backward, lib=LIBRARY)
register_formula("scheduled_layer", from_arguments, _scheduled, scheduled=True)
