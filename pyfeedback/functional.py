"""The ops as functions: what `torch.ops.pyfeedback` computes, documented, by the road with the least overhead.

Each function equals the op of its name. Inside, a plain `torch.autograd.Function` calls the provider directly: on a
tiny layer that costs two thirds of what the dispatcher's road costs. Under `torch.compile` the op itself is one node of
the graph: what a compiler makes of an autograd.Function that carries symbolic numbers differs between releases, and
torch 2.10 makes a wrong gradient of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback import arguments, registration, step_arguments, transforms
from pyfeedback import scheduled as scheduled  # defines ops
from pyfeedback.forms import Coefficients, Window, WindowNd
from pyfeedback.providers import current_backend, in_force, provide, saves_response


def fa_conv2d(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    decay: float = 0.0,
    amp: float = 0.0,
    null: float = 0.0,
    sparse: float = 0.0,
    self_: float = 0.0,
    tie: float = 0.0,
    center: bool = False,
    samples: int = 0,
) -> Tensor:
    """2-D convolution whose input gradient goes through ``feedback``, and whose ``feedback.grad`` is the rule's.

    Forward it is ``F.conv2d(input, weight, bias, stride, padding, dilation, groups)``. Backward::

        grad_input    = conv_transpose2d(grad_output, feedback)        # the one difference from backprop
        grad_feedback = dR/dB + tie * grad_weight                      # nothing spent if feedback needs no gradient
        R(B) = decay/2 |B|^2 - self_ <B, W>
               + 1/n sum_i [ -amp <conv(x_i, B), y_i> + null/2 |conv_transpose(y_i, B)|^2 + sparse/2 |conv(x_i, B)|^2 ]

    with B the feedback, W the weight, y = conv(x, W) without bias, and x and y constants in R.

    Args:
        input: [N, C, H, W], float64, float32, bfloat16 or float16, any memory format, kept by the gradients.
        weight: [K, C/groups, R, S].
        feedback: [K, C/groups, R, S], the layout of ``weight``.
        bias: [K] or None.
        decay, amp, null, sparse, self_, tie: coefficients of the primitives.
        center: amp, null and sparse see x and y minus their means over the samples, position by position.
        samples: R uses the first ``samples`` of the batch; 0 is all of them.

    Returns:
        [N, K, P, Q]. It differentiates once: double backward raises.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected, before anything is computed.

    Source: Kunin et al., ICML 2020 (arXiv 2003.01513), section 3; tie: Akrout et al., NeurIPS 2019 (arXiv 1904.05391).
    """
    window = Window(_for_each(2, stride), _for_each(2, padding), _for_each(2, dilation), groups)
    rule = Coefficients(decay, amp, null, sparse, self_, tie, center, samples)
    arguments.check_coefficients(rule, input)
    return convolution(input, weight, feedback, bias, window, rule)


def fa_convolution(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    **rule,
) -> Tensor:
    """Convolution of any number of dimensions, or its transpose, whose input gradient goes through ``feedback``.

    Forward it is ``torch.convolution``. Backward and rule are those of :func:`fa_conv2d`, with the transpose in the
    place of the convolution, and the other way round, where ``transposed``.

    Args:
        input: [N, C, ...].
        weight, feedback: [K, C/groups, ...]; [C, K/groups, ...] where ``transposed``.
        bias: [K] or None.
        stride, padding, dilation, output_padding: one number for all dimensions, or one for each.
        rule: decay, amp, null, sparse, self_, tie, center, samples, as in :func:`fa_conv2d`.

    Returns:
        [N, K, ...].

    Raises, Source: as :func:`fa_conv2d`.
    """
    spatial = max(weight.dim() - 2, 0) if isinstance(weight, Tensor) else 0
    stride, padding, dilation, output_padding = (
        _for_each(spatial, n) for n in (stride, padding, dilation, output_padding)
    )
    coefficients = arguments.coefficients_of(rule)
    arguments.check_coefficients(coefficients, input)
    window = WindowNd(stride, padding, dilation, transposed, output_padding, groups)
    return convolution(input, weight, feedback, bias, window, coefficients)


def fa_linear(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None = None,
    *,
    decay: float = 0.0,
    amp: float = 0.0,
    null: float = 0.0,
    sparse: float = 0.0,
    self_: float = 0.0,
    tie: float = 0.0,
    center: bool = False,
    samples: int = 0,
) -> Tensor:
    """Linear layer whose input gradient is ``grad_output @ feedback``: the 1x1 case of :func:`fa_conv2d`.

    Args:
        input: [N, ..., C]; n counts dimension 0.
        weight, feedback: [K, C].
        bias: [K] or None.
        decay, amp, null, sparse, self_, tie, center, samples: as in :func:`fa_conv2d`.

    Returns:
        [N, ..., K], ``F.linear(input, weight, bias)``.

    Raises, Source: as :func:`fa_conv2d`.
    """
    rule = Coefficients(decay, amp, null, sparse, self_, tie, center, samples)
    arguments.check_coefficients(rule, input)
    return linear(input, weight, feedback, bias, rule)


def feedback_step_(
    feedback: Sequence[Tensor],
    weight: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor] = (),
    *,
    decay: Sequence[float],
    self_: Sequence[float],
    tie: Sequence[float],
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    noise: float = 0.0,
    seed: int = 0,
    skip_nonfinite: bool = False,
    dynamic: Tensor | None = None,
) -> None:
    """One step of SGD for the feedback weights of a whole model, in place, in one pass over memory.

    For each tensor i, elementwise, with xi standard normal::

        g = decay[i] * feedback[i] - self_[i] * weight[i] + tie[i] * grad[i] + noise * xi
        momentum_buffer[i] = momentum * momentum_buffer[i] + g
        feedback[i] -= lr * (g + momentum * momentum_buffer[i] if nesterov else momentum_buffer[i])

    weight and grad are constants: autograd follows nothing through a step, and as torch's own ops in place it is
    refused where a tensor that it writes requires grad, outside ``torch.no_grad()``.

    Args:
        feedback: tensors of any shapes, floating dtypes and memory formats.
        weight: one for each, of the same shape, dtype and device; may be empty where every ``self_`` is 0.
        grad: likewise; may be empty where every ``tie`` is 0. weight[i] and grad[i] are not read where their
            coefficient is 0. ``tie`` 1 with the feedback's own gradient is plain SGD.
        momentum_buffer: likewise; may be empty where ``momentum`` is 0, and is left alone then.
        noise: standard deviation of Gaussian noise added to g, the same for the same ``seed`` and backend.
        skip_nonfinite: write nothing at all if an element that is read of grad or weight is infinite or nan.
        dynamic: [5] float64 on the device of feedback: factors of ``lr``, ``decay``, ``self_`` and ``tie``, and a whole
            number to add to ``seed``. Read there when the step runs, so that a captured CUDA graph follows it.

    A tensor that is written has memory of its own. One exception: feedback[i] may be the weight or the gradient of its
    own row, or of the rows right before it where each of them shares a weight or a gradient with the next. They read it
    as it was, so that a layer's W can be stepped in the row behind its B.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written.
        RuntimeError: a tensor that is written requires grad, and grad mode is on.
    """
    step = registration.feedback_step_
    if torch.compiler.is_compiling():
        if not feedback:  # nothing to dispatch on
            return
        if torch.is_grad_enabled():
            written = {"feedback": feedback, "momentum_buffer": momentum_buffer if momentum else ()}
            step_arguments.check_in_place(written)
        step = torch.ops.pyfeedback.feedback_step_.default
    step(
        feedback, weight, grad, momentum_buffer, decay=decay, self_=self_, tie=tie, lr=lr, momentum=momentum,
        nesterov=nesterov, noise=noise, seed=seed, skip_nonfinite=skip_nonfinite, dynamic=dynamic,
    )  # fmt: skip


def convolution(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None,
    window: Window | WindowNd,
    rule: Coefficients,
) -> Tensor:
    """:func:`fa_conv2d`, or :func:`fa_convolution`, for coefficients already checked: the layers' road."""
    if torch._C._is_any_autocast_enabled() and _autocasts(input.device.type):
        input, weight, feedback, bias = _cast(input, weight, feedback, bias)
    if isinstance(window, Window):
        arguments.check_conv2d(input, weight, feedback, bias, window)
        op = torch.ops.pyfeedback.fa_conv2d
    else:
        arguments.check_convolution(input, weight, feedback, bias, window)
        op = torch.ops.pyfeedback.fa_convolution
    if torch._C._are_functorch_transforms_active():
        return transforms.convolution(input, weight, feedback, bias, window, rule)
    if torch.compiler.is_compiling():
        return op.default(input, weight, feedback, bias, *window, **rule._asdict())
    return _Convolution.apply(input, weight, feedback, bias, (window, rule))


def linear(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, rule: Coefficients) -> Tensor:
    """:func:`fa_linear` for coefficients already checked: the layers' road."""
    if torch._C._is_any_autocast_enabled() and _autocasts(input.device.type):
        input, weight, feedback, bias = _cast(input, weight, feedback, bias)
    arguments.check_linear(input, weight, feedback, bias)
    if torch._C._are_functorch_transforms_active():
        return transforms.linear(input, weight, feedback, bias, rule)
    if torch.compiler.is_compiling():
        return torch.ops.pyfeedback.fa_linear.default(input, weight, feedback, bias, **rule._asdict())
    return _Linear.apply(input, weight, feedback, bias, (rule,))


def scheduled_convolution(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None,
    coefficients: Tensor,
    window: Window | WindowNd,
    **rule,
) -> Tensor:
    """:func:`convolution` with a tensor of six coefficients, on the CPU: a compiled layer's road under a schedule."""
    if torch.is_autocast_enabled(input.device.type):
        input, weight, feedback, bias = _cast(input, weight, feedback, bias)
    ops = torch.ops.pyfeedback
    op = ops.scheduled_conv2d if isinstance(window, Window) else ops.scheduled_convolution
    return op.default(input, weight, feedback, bias, coefficients, *window, **rule)


def scheduled_linear(
    input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, coefficients: Tensor, **rule
) -> Tensor:
    """:func:`linear` likewise."""
    if torch.is_autocast_enabled(input.device.type):
        input, weight, feedback, bias = _cast(input, weight, feedback, bias)
    return torch.ops.pyfeedback.scheduled_linear.default(input, weight, feedback, bias, coefficients, **rule)


def _for_each(dimensions: int, number) -> tuple:
    """One number for each dimension; a sequence has them already."""
    return tuple(number) if isinstance(number, (tuple, list)) else (number,) * dimensions


def _autocasts(device_type: str) -> bool:
    """Whether autocast is on; the meta device has none, and torch raises when asked about it."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _cast(input: Tensor, *tensors: Tensor | None) -> tuple:
    """The arguments in the autocast dtype: the cast stands outside the function, so that autograd takes it back."""
    device_type = input.device.type
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(registration.cast_to(t, dtype, device_type) for t in (input, *tensors))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, feedback, bias, options):
        window, rule = options
        convolve = torch.conv2d if isinstance(window, Window) else torch.convolution
        output = convolve(input, weight, bias, *window)
        keep = ctx.needs_input_grad[2] and saves_response(input, weight, bias, window, rule)
        ctx.save_for_backward(input, weight, feedback, output if keep else None)
        ctx.options, ctx.backend = options, current_backend()
        return output

    @staticmethod
    def backward(ctx, grad_output):
        op = "conv2d_backward" if isinstance(ctx.options[0], Window) else "convolution_backward"
        return *_backward(op, ctx, grad_output), None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, feedback, bias, options):
        output = F.linear(input, weight, bias)
        if output._is_view():
            output = output.data  # as registration.not_a_view, which costs 3 microseconds
        keep = ctx.needs_input_grad[2] and saves_response(input, weight, bias, None, *options)
        ctx.save_for_backward(input, weight, feedback, output if keep else None)
        ctx.options, ctx.backend = options, current_backend()
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return *_backward("linear_backward", ctx, grad_output), None


def _backward(op: str, ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The four gradients. Wrapped only where it must be: each wrapper costs a tenth of a tiny layer's step."""
    if ctx.backend != current_backend():
        with in_force(ctx.backend):
            return _backward(op, ctx, grad_output)
    device_type = "cpu" if grad_output.is_cpu else grad_output.device.type  # this makes a string, of 5 microseconds
    if torch.is_grad_enabled():  # create_graph=True
        with torch.no_grad():
            grads = _compute(ctx, op, device_type, grad_output)
        return _NotAgain.apply(*grads, grad_output, *ctx.saved_tensors)
    # Called inside an autocast region, products keep their dtype.
    if torch._C._is_any_autocast_enabled() and _autocasts(device_type):
        with torch.autocast(device_type, enabled=False):
            return _compute(ctx, op, device_type, grad_output)
    return _compute(ctx, op, device_type, grad_output)


def _compute(ctx, op: str, device_type: str, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    compute = provide(op, device_type)
    return compute(grad_output, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad)


class _NotAgain(torch.autograd.Function):
    """Hands four gradients on as functions of all that made them, and refuses to differentiate them."""

    @staticmethod
    def forward(ctx, *tensors):
        return tensors[:4]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("pyfeedback: double backward is not defined: a feedback path is no derivative")
