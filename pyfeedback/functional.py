"""The ops of `torch.ops.pyfeedback` as documented functions, with the least overhead.

Each function computes the same as the op of its name, but a plain `torch.autograd.Function` calls the backend directly.
On a tiny layer this takes two thirds of the dispatcher's time; :mod:`pyfeedback.ops.autograd` says when it is used.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyfeedback.backends.dispatch import current_backend
from pyfeedback.core import step_checks
from pyfeedback.core.coefficients import Coefficients, from_keywords
from pyfeedback.core.geometry import LINEAR, Convolution, Geometry, to_arguments
from pyfeedback.core.layer_checks import check_coefficients, check_layer, check_lengths
from pyfeedback.ops import autograd, library
from pyfeedback.ops.recalled import Recalled as Recalled


def fa_conv2d(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    **coefficients,
) -> Tensor:
    """2-D convolution that sends its input gradient through ``feedback``, which learns by a rule.

    The forward pass is ``F.conv2d(input, weight, bias, stride, padding, dilation, groups)``. The backward pass is::

        grad_input    = conv_transpose2d(grad_output, feedback)        # the only difference from backprop
        grad_feedback = dR/dB + tie * grad_weight                      # not computed if feedback needs no gradient
        R(B) = decay/2 |B|^2 - self_ <B, W>
               + 1/n sum_i [ -amp <conv(x_i, B), y_i> + null/2 |conv_transpose(y_i, B)|^2 + sparse/2 |conv(x_i, B)|^2 ]

    where B is the feedback, W the weight and y = conv(x, W) without bias; x and y are constants in R.

    Args:
        input: [N, C, H, W], float64, float32, bfloat16 or float16, in any memory format; the gradients keep it.
        weight: [K, C/groups, R, S].
        feedback: [K, C/groups, R, S], like ``weight``.
        bias: [K] or None.
        decay, amp, null, sparse, self_, tie: coefficients of the primitives.
        center: in amp, null and sparse, subtract from x and y their means over the samples, for each position.
        samples: the number of samples that R uses, from the start of the batch; 0 means all of them.

    Returns:
        [N, K, P, Q]. Double backward is not supported.

    Raises:
        ValueError, TypeError: an argument is invalid. The message names the argument, its value and what was expected,
            and nothing has been computed.

    Source: Kunin et al., ICML 2020 (arXiv 2003.01513), section 3; tie: Akrout et al., NeurIPS 2019 (arXiv 1904.05391).
    """
    rule = _checked_coefficients(coefficients, input)
    stride, padding, dilation = (_for_each(2, n) for n in (stride, padding, dilation))
    geometry = Convolution(stride, padding, dilation, groups=groups)
    check_lengths(geometry, 2)
    return layer(geometry, rule, input, weight, feedback, bias)


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
    **coefficients,
) -> Tensor:
    """Convolution in any number of dimensions, or its transpose, that sends its input gradient through ``feedback``.

    The forward pass is ``torch.convolution``. The backward pass and the rule are those of :func:`fa_conv2d`; if
    ``transposed``, the convolution and its transpose are swapped in them.

    Args:
        input: [N, C, ...].
        weight, feedback: [K, C/groups, ...], or [C, K/groups, ...] if ``transposed``.
        bias: [K] or None.
        stride, padding, dilation, output_padding: one number for all dimensions, or one for each.
        coefficients: decay, amp, null, sparse, self_, tie, center, samples, as in :func:`fa_conv2d`.

    Returns:
        [N, K, ...].

    Raises, Source: as :func:`fa_conv2d`.
    """
    spatial = max(weight.dim() - 2, 0) if isinstance(weight, Tensor) else 0
    stride, padding, dilation, output_padding = (
        _for_each(spatial, n) for n in (stride, padding, dilation, output_padding)
    )
    rule = _checked_coefficients(coefficients, input)
    geometry = Convolution(stride, padding, dilation, transposed, output_padding, groups)
    check_lengths(geometry, spatial)
    return layer(geometry, rule, input, weight, feedback, bias)


def fa_linear(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None = None,
    **coefficients,
) -> Tensor:
    """Linear layer whose input gradient is ``grad_output @ feedback``: the 1x1 case of :func:`fa_conv2d`.

    Args:
        input: [N, ..., C]; n in R is the size of dimension 0.
        weight, feedback: [K, C].
        bias: [K] or None.
        decay, amp, null, sparse, self_, tie, center, samples: as in :func:`fa_conv2d`.

    Returns:
        [N, ..., K], ``F.linear(input, weight, bias)``.

    Raises, Source: as :func:`fa_conv2d`.
    """
    return layer(LINEAR, _checked_coefficients(coefficients, input), input, weight, feedback, bias)


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
    """Take one step of SGD for the feedback weights of a whole model, in place, in one pass over memory.

    For each tensor i, elementwise, with xi drawn from the standard normal distribution::

        g = decay[i] * feedback[i] - self_[i] * weight[i] + tie[i] * grad[i] + noise * xi
        momentum_buffer[i] = momentum * momentum_buffer[i] + g
        feedback[i] -= lr * (g + momentum * momentum_buffer[i] if nesterov else momentum_buffer[i])

    Autograd does not differentiate through a step. Like PyTorch's in-place ops, the step raises if a tensor that it
    writes requires grad, unless it is called under ``torch.no_grad()``.

    Args:
        feedback: tensors of any shapes, floating dtypes and memory formats.
        weight: one for each feedback, of the same shape, dtype and device; may be empty if every ``self_`` is 0.
        grad: as ``weight``; may be empty if every ``tie`` is 0. weight[i] and grad[i] are not read if their coefficient
            is 0. ``tie`` 1 with the feedback's own gradient is plain SGD.
        momentum_buffer: as ``weight``; if ``momentum`` is 0 it may be empty and is not written.
        noise: standard deviation of the Gaussian noise added to g. The noise depends only on ``seed`` and the backend.
        skip_nonfinite: write nothing if any element of grad or weight that the step reads is infinite or nan.
        dynamic: [5] float64 on the device of feedback: factors of ``lr``, ``decay``, ``self_`` and ``tie``, and an
            integer to add to ``seed``. It is read on the device when the step runs, so a captured CUDA graph uses its
            current values.

    A tensor that is written must not share memory with another one, with one exception: feedback[i] may be the weight
    or the gradient of its own row, or of rows directly before it if each of them shares a weight or a gradient with the
    next. These rows read the old values, so a layer's W can be updated in the row after its B.

    Raises:
        ValueError, TypeError: an argument is invalid. The message names it, and nothing has been written.
        RuntimeError: a tensor that is written requires grad, and grad mode is enabled.
    """
    step = library.feedback_step_
    if torch.compiler.is_compiling():
        if not feedback:  # the dispatcher needs at least one tensor
            return
        if torch.is_grad_enabled():
            written = {"feedback": feedback, "momentum_buffer": momentum_buffer if momentum else ()}
            step_checks.check_in_place(written)
        step = torch.ops.pyfeedback.feedback_step_.default
    step(
        feedback, weight, grad, momentum_buffer, decay=decay, self_=self_, tie=tie, lr=lr, momentum=momentum,
        nesterov=nesterov, noise=noise, seed=seed, skip_nonfinite=skip_nonfinite, dynamic=dynamic,
    )  # fmt: skip


def layer(
    geometry: Geometry, rule: Coefficients, input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None
) -> Tensor:
    """Call any of the layers above with coefficients that were checked before; used by :mod:`pyfeedback.nn`."""
    if torch._C._is_any_autocast_enabled() and autograd.autocasts(input.device.type):
        input, weight, feedback, bias = _cast(input, weight, feedback, bias)
    check_layer(geometry, input, weight, feedback, bias)
    if not weight.numel():  # there is no feedback
        return geometry.fprop(input, weight, bias)
    # torch.jit.trace records only ops, not a Function.
    by_op = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    eager = not by_op and not torch._C._are_functorch_transforms_active()
    if eager and not feedback.requires_grad:
        output = autograd.forward_with_feedback(geometry, input, weight, feedback, bias)
        if output is not None:
            return output
    if torch._C._are_functorch_transforms_active():
        return autograd.TransformableLayer.apply(input, weight, feedback, bias, geometry, rule, current_backend())
    if by_op:
        ops, tensors, options = torch.ops.pyfeedback, (input, weight, feedback, bias), rule._asdict()
        if not isinstance(geometry, Convolution):
            return ops.fa_linear.default(*tensors, **options)
        if geometry.is_conv2d:
            stride, padding, dilation, _, _, groups = geometry
            return ops.fa_conv2d.default(*tensors, stride, padding, dilation, groups, **options)
        return ops.fa_convolution.default(*tensors, *geometry, **options)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return geometry.fprop(input, weight, bias)
    return autograd.EagerLayer.apply(input, weight, feedback, bias, geometry, rule)


def scheduled_layer(
    geometry: Geometry,
    coefficients: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None,
    **options,
) -> Tensor:
    """Call :func:`layer` with a CPU tensor of coefficients; used by compiled layers under a schedule."""
    if torch.is_autocast_enabled(input.device.type):
        input, weight, feedback, bias = _cast(input, weight, feedback, bias)
    op = torch.ops.pyfeedback.scheduled_layer.default
    return op(input, weight, feedback, bias, coefficients, *to_arguments(geometry), **options)


def mix(mixing: Tensor, feedback: Tensor, decay: float) -> Tensor:
    """Call the op ``mix``, the product [K, ...] of a fixed factor [K, M] and a feedback weight [M, ...] (pfa)."""
    if torch._C._are_functorch_transforms_active():
        return library.TransformableMix.apply(mixing, feedback, decay)
    return torch.ops.pyfeedback.mix.default(mixing, feedback, decay)


def _checked_coefficients(keywords: dict[str, Any], input: Tensor) -> Coefficients:
    """The coefficients of a call, checked."""
    rule = from_keywords(keywords)
    check_coefficients(rule, input)
    return rule


def _for_each(dimensions: int, number) -> tuple:
    """Repeat a single number for each dimension; convert a sequence to a tuple."""
    return tuple(number) if isinstance(number, (tuple, list)) else (number,) * dimensions


def _cast(input: Tensor, *tensors: Tensor | None) -> tuple:
    """Cast the arguments to the autocast dtype, outside of the Function, so that autograd reverses the cast."""
    device_type = input.device.type
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(library.cast_to(t, dtype, device_type) for t in (input, *tensors))


for _function in (fa_conv2d, fa_convolution, fa_linear):  # help() and editors show the coefficients as keywords
    _signature = inspect.signature(_function)
    _keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(default))
        for name, default in Coefficients._field_defaults.items()
    ]
    _positional = list(_signature.parameters.values())[:-1]
    setattr(_function, "__signature__", _signature.replace(parameters=[*_positional, *_keywords]))  # noqa: B010
