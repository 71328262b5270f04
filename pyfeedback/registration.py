"""Registers what the dispatcher needs of each op: its implementation, fake, autograd formula and autocast.

Implementations check their arguments and hand over to the provider table. Fakes and autograd know nothing but
`torch.ops.pyfeedback`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback import arguments, step_arguments
from pyfeedback.forms import Coefficients, Window, WindowNd
from pyfeedback.providers import current_backend, in_force, provide, saves_response
from pyfeedback.schemas import LIBRARY

ALL = (True, True, True, True)  # of the gradients

_ops = torch.ops.pyfeedback


def fa_conv2d(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    **rule,
) -> Tensor:
    """The op's implementation: arguments are checked, the forward is torch's."""
    window = _window(stride, padding, dilation, groups)
    arguments.check_conv2d(input, weight, feedback, bias, window)
    arguments.check_coefficients(Coefficients(**rule), input)
    return torch.conv2d(input, weight, bias, *window)


def fa_convolution(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, *window, **rule) -> Tensor:
    """The op's implementation: arguments are checked, the forward is torch's."""
    arguments.check_convolution(input, weight, feedback, bias, _window_nd(*window))
    arguments.check_coefficients(Coefficients(**rule), input)
    return torch.convolution(input, weight, bias, *window)


def fa_linear(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None = None, **rule) -> Tensor:
    """The op's implementation: arguments are checked, the forward is torch's."""
    arguments.check_linear(input, weight, feedback, bias)
    arguments.check_coefficients(Coefficients(**rule), input)
    return not_a_view(F.linear(input, weight, bias))


def not_a_view(output: Tensor) -> Tensor:
    """The same memory as a tensor of its own: autograd refuses work in place on a view that a custom function returns.

    F.linear returns one where the input has more than two dimensions.
    """
    return torch.ops.aten._unsafe_view.default(output, output.shape) if output._is_view() else output


def check_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *,
    output_mask: Sequence[bool] = ALL,
    **rule,
) -> tuple:
    """The arguments of the op as those of its implementations."""
    window, coefficients = _window(stride, padding, dilation, groups), Coefficients(**rule)
    arguments.check_conv2d(input, weight, feedback, None, window)
    arguments.check_coefficients(coefficients, input)
    arguments.check_backward(grad_output, window.output_shape(input.shape, weight.shape), input, response, output_mask)
    return grad_output, input, weight, feedback, response, window, coefficients, output_mask


def check_convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    *window,
    output_mask: Sequence[bool] = ALL,
    **rule,
) -> tuple:
    """The arguments of the op as those of its implementations."""
    place, coefficients = _window_nd(*window), Coefficients(**rule)
    arguments.check_convolution(input, weight, feedback, None, place)
    arguments.check_coefficients(coefficients, input)
    arguments.check_backward(grad_output, place.output_shape(input.shape, weight.shape), input, response, output_mask)
    return grad_output, input, weight, feedback, response, place, coefficients, output_mask


def check_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None = None,
    *,
    output_mask: Sequence[bool] = ALL,
    **rule,
) -> tuple:
    """The arguments of the op as those of its implementations."""
    coefficients = Coefficients(**rule)
    arguments.check_linear(input, weight, feedback, None)
    arguments.check_coefficients(coefficients, input)
    output_shape = (*input.shape[:-1], weight.shape[0])
    arguments.check_backward(grad_output, output_shape, input, response, output_mask)
    return grad_output, input, weight, feedback, response, coefficients, output_mask


def _backward(op: str, check: Callable[..., tuple]) -> Callable:
    """The implementation of a backward op, by the provider of the device."""

    def backward(grad_output: Tensor, input: Tensor, *others, **options):
        """The op's implementation: arguments are checked, the provider of the device computes."""
        checked = check(grad_output, input, *others, **options)
        return provide(op, input.device.type)(*checked)

    return backward


def _fake_backward(check: Callable[..., tuple]) -> Callable:
    def backward(*inputs, output_mask=ALL, **rule):
        check(*inputs, output_mask=output_mask, **rule)
        return fake_gradients(*inputs, output_mask=output_mask)

    return backward


fa_conv2d_backward = _backward("conv2d_backward", check_conv2d_backward)
fa_convolution_backward = _backward("convolution_backward", check_convolution_backward)
fa_linear_backward = _backward("linear_backward", check_linear_backward)


def feedback_step_(feedback, weight, grad, momentum_buffer, *, decay, self_, tie, lr, momentum=0.0, nesterov=False,
                    noise=0.0, seed=0, skip_nonfinite=False, dynamic=None) -> None:  # fmt: skip
    """The op's implementation; eager callers come here at once, since a dispatch costs more than a small step."""
    if not isinstance(feedback, (list, tuple)) or not all(isinstance(t, Tensor) for t in feedback[:1]):
        step_arguments.refuse_list("feedback", feedback)
    coefficients = {"decay": decay, "self_": self_, "tie": tie}
    scalars = {"lr": lr, "momentum": momentum, "noise": noise}
    switches = {"nesterov": nesterov, "skip_nonfinite": skip_nonfinite, "seed": seed}
    step_arguments.check_step_numbers(len(feedback), coefficients, scalars, switches)
    if not feedback:
        return
    if torch.is_grad_enabled():
        step_arguments.check_in_place({"feedback": feedback, "momentum_buffer": momentum_buffer if momentum else ()})
    provide("feedback_step_", feedback[0].device.type)(
        feedback, weight, grad, momentum_buffer, **coefficients, **scalars, **switches, dynamic=dynamic
    )


def _center(input: Tensor, samples: int) -> Tensor:
    arguments.check_center(input, samples)
    step_arguments.check_storage("input", input)
    return provide("center", input.device.type)(input, samples)


def _add_centered_(self: Tensor, input: Tensor, beta: float, alpha: float) -> None:
    arguments.check_add_centered(self, input)
    provide("add_centered_", input.device.type)(self, input, beta, alpha)


def mix(mixing: Tensor, feedback: Tensor, decay: float) -> Tensor:
    """A feedback that is a product, [K, M] times [M, ...]; ``decay`` acts on the second factor, in its gradient."""
    arguments.check_mix(mixing, feedback, decay)
    return (mixing @ feedback.flatten(1)).view(mixing.shape[0], *feedback.shape[1:])


for _name, _implementation in {
    "fa_conv2d": fa_conv2d,
    "fa_convolution": fa_convolution,
    "fa_linear": fa_linear,
    "fa_conv2d_backward": fa_conv2d_backward,
    "fa_convolution_backward": fa_convolution_backward,
    "fa_linear_backward": fa_linear_backward,
    "feedback_step_": feedback_step_,
    "mix": mix,
    "center": _center,
    "add_centered_": _add_centered_,
}.items():
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


# Fakes: shapes and strides without values. A gradient has the memory format of what it is the gradient of.


def fake_gradients(grad_output, input, weight, feedback, *args, output_mask=ALL, **rule):
    """Empty gradients, for any of the backward ops."""
    like = (input, weight, weight)
    channels = grad_output.shape[-1] if weight.dim() == 2 else grad_output.shape[1]
    grads = [torch.empty_like(t) if need else None for t, need in zip(like, output_mask, strict=False)]
    return (*grads, weight.new_empty(channels) if output_mask[3] else None)


def _fake_step(feedback, weight, grad, momentum_buffer, *, decay, self_, tie, lr, momentum=0.0, nesterov=False,
               noise=0.0, seed=0, skip_nonfinite=False, dynamic=None) -> None:  # fmt: skip
    coefficients = {"decay": decay, "self_": self_, "tie": tie}
    scalars = {"lr": lr, "momentum": momentum, "noise": noise}
    switches = {"nesterov": nesterov, "skip_nonfinite": skip_nonfinite, "seed": seed}
    step_arguments.check_step_numbers(len(feedback), coefficients, scalars, switches)
    step_arguments.check_step_tensors(feedback, weight, grad, momentum_buffer, coefficients, scalars, dynamic, False)
    step_arguments.refuse_meta({"feedback": feedback})


def _fake_native_step(feedback, weight, grad, momentum_buffer, **options) -> None:
    """The leaf takes one number for all rows, too."""
    for name in ("decay", "self_", "tie"):
        options[name] = list(options[name]) * (len(feedback) if len(options[name]) == 1 else 1)
    _fake_step(feedback, weight, grad, momentum_buffer, **options)


def _fake_products(feedback: Sequence[Tensor], weight: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(feedback), 3, dtype=torch.float64, device=feedback[0].device)


def _fake_depthwise(grad_output, input, weight, feedback, *args) -> tuple[Tensor, ...]:
    step_arguments.refuse_meta({"grad_output": grad_output, "input": input, "weight": weight, "feedback": feedback})
    like = (input, weight, weight, weight.new_empty(weight.shape[0]))
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(like, args[-4:], strict=True))


def _fake_add_centered_(self: Tensor, input: Tensor, beta: float, alpha: float) -> None:
    arguments.check_add_centered(self, input)


def _fake_center(input: Tensor, samples: int) -> Tensor:
    return torch.empty_like(input[:samples])


torch.library.register_fake("pyfeedback::fa_conv2d", fa_conv2d, lib=LIBRARY)
torch.library.register_fake("pyfeedback::fa_convolution", fa_convolution, lib=LIBRARY)
torch.library.register_fake("pyfeedback::fa_linear", fa_linear, lib=LIBRARY)
torch.library.register_fake("pyfeedback::fa_conv2d_backward", _fake_backward(check_conv2d_backward), lib=LIBRARY)
torch.library.register_fake(
    "pyfeedback::fa_convolution_backward", _fake_backward(check_convolution_backward), lib=LIBRARY
)
torch.library.register_fake("pyfeedback::fa_linear_backward", _fake_backward(check_linear_backward), lib=LIBRARY)
torch.library.register_fake("pyfeedback::feedback_step_", _fake_step, lib=LIBRARY)
torch.library.register_fake("pyfeedback::native_feedback_step_", _fake_native_step, lib=LIBRARY)
torch.library.register_fake("pyfeedback::mix", mix, lib=LIBRARY)
torch.library.register_fake("pyfeedback::native_depthwise_backward", _fake_depthwise, lib=LIBRARY)
torch.library.register_fake("pyfeedback::center", _fake_center, lib=LIBRARY)
torch.library.register_fake("pyfeedback::add_centered_", _fake_add_centered_, lib=LIBRARY)
torch.library.register_fake("pyfeedback::native_add_centered_", _fake_add_centered_, lib=LIBRARY)
torch.library.register_fake("pyfeedback::native_alignment_products", _fake_products, lib=LIBRARY)
torch.library.register_fake("pyfeedback::native_center", _fake_center, lib=LIBRARY)


# Autograd: the forward ops differentiate into the backward ops, which do not differentiate again.


def _save(ctx, inputs, keyword_only_inputs, output: Tensor) -> None:
    input, weight, feedback, bias, *window = inputs
    ctx.window, ctx.rule, ctx.backend = window, keyword_only_inputs, current_backend()
    place = None if not window else _window_nd(*window) if len(window) == 6 else _window(*window)
    saved = ctx.needs_input_grad[2] and saves_response(input, weight, bias, place, Coefficients(**ctx.rule))
    ctx.save_for_backward(input, weight, feedback, output if saved else None)


def _differentiate(backward_op):
    def backward(ctx, grad_output: Tensor):
        # The dispatcher drops trailing arguments that have their default, from what it asks for too.
        asked = len(ctx.needs_input_grad)
        mask = [*ctx.needs_input_grad, False][:4]
        with in_force(ctx.backend):
            grads = backward_op(grad_output, *ctx.saved_tensors, *ctx.window, **ctx.rule, output_mask=mask)
        return (*grads, *(None for _ in ctx.window))[:asked]

    return backward


def refuse_double_backward(ctx, *grads):
    """The formula of a backward op."""
    raise RuntimeError("pyfeedback: double backward is not defined: a feedback path is no derivative")


for _name, _op in {
    "fa_conv2d": _ops.fa_conv2d_backward.default,
    "fa_convolution": _ops.fa_convolution_backward.default,
    "fa_linear": _ops.fa_linear_backward.default,
}.items():
    torch.library.register_autograd(f"pyfeedback::{_name}", _differentiate(_op), setup_context=_save, lib=LIBRARY)
    torch.library.register_autograd(f"pyfeedback::{_name}_backward", refuse_double_backward, lib=LIBRARY)


def _save_factors(ctx, inputs, output: Tensor) -> None:
    mixing, feedback, ctx.decay = inputs
    ctx.save_for_backward(mixing, feedback)


def _differentiate_mix(ctx, grad: Tensor):
    mixing, feedback = ctx.saved_tensors
    pulled = (mixing.t() @ grad.flatten(1)).view(feedback.shape)
    return None, pulled + ctx.decay * feedback, None


torch.library.register_autograd("pyfeedback::mix", _differentiate_mix, setup_context=_save_factors, lib=LIBRARY)


# Autocast: the forward ops run in the autocast dtype, as torch's convolution and linear layer do.


def _autocast(op, device_type: str):
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def cast(*args, **rule):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(cast_to(a, dtype, device_type) for a in args), **rule)

    return cast


def cast_to(value, dtype: torch.dtype, device_type: str):
    """What autocast does to one argument: floating tensors of the device, float64 apart, take ``dtype``."""
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    return value.to(dtype) if eligible and value.device.type == device_type else value


for _name in ("fa_conv2d", "fa_convolution", "fa_linear"):
    for _device_type in ("cpu", "cuda"):
        _op = getattr(_ops, _name).default
        LIBRARY.impl(_name, _autocast(_op, _device_type), f"Autocast{_device_type.upper()}")


def _window(stride, padding, dilation, groups) -> Window:
    return Window(tuple(stride), tuple(padding), tuple(dilation), groups)


def _window_nd(stride, padding, dilation, transposed, output_padding, groups) -> WindowNd:
    return WindowNd(tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)
