"""The layers under torch.func: grad and vjp through Functions with a context of their own, vmap by a loop.

torch.func needs a Function whose context is set up apart from its forward; that form costs a tiny layer a third more
(:mod:`pyfeedback.functional` has the fast one), so it is taken only inside a transform.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback.forms import Coefficients, Window, WindowNd
from pyfeedback.providers import current_backend, in_force, provide
from pyfeedback.registration import not_a_view


def convolution(
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    bias: Tensor | None,
    window: Window | WindowNd,
    rule: Coefficients,
) -> Tensor:
    """:func:`pyfeedback.functional.convolution`, transformable."""
    op = "conv2d_backward" if isinstance(window, Window) else "convolution_backward"
    return _Layer.apply(input, weight, feedback, bias, op, (window, rule), current_backend())


def linear(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, rule: Coefficients) -> Tensor:
    """:func:`pyfeedback.functional.linear`, transformable."""
    return _Layer.apply(input, weight, feedback, bias, "linear_backward", (rule,), current_backend())


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(input, weight, feedback, bias, op, options, backend):
        if op == "conv2d_backward":
            return torch.conv2d(input, weight, bias, *options[0])
        if op == "convolution_backward":
            return torch.convolution(input, weight, bias, *options[0])
        return not_a_view(F.linear(input, weight, bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, feedback, _, *ctx.call = inputs
        ctx.save_for_backward(input, weight, feedback)

    @staticmethod
    def backward(ctx, grad_output):
        grads = _Gradients.apply(grad_output, *ctx.saved_tensors, *ctx.call, ctx.needs_input_grad[:4])
        return *grads, None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        outputs = [_Layer.apply(*each) for each in _unstacked(info.batch_size, in_dims, arguments)]
        return torch.stack(outputs), 0


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(grad_output, input, weight, feedback, op, options, backend, mask):
        with in_force(backend):
            compute = provide(op, input.device.type)
            return compute(grad_output, input, weight, feedback, None, *options, mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("pyfeedback: double backward is not defined: a feedback path is no derivative")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        each = [_Gradients.apply(*a) for a in _unstacked(info.batch_size, in_dims, arguments)]
        stacked = tuple(None if grads[0] is None else torch.stack(grads) for grads in zip(*each, strict=True))
        return stacked, tuple(None if grad is None else 0 for grad in stacked)


def _unstacked(size: int, in_dims: tuple, arguments: tuple) -> list[tuple]:
    """The arguments of each element of a batch; what has no batch dimension is the same for all."""
    pairs = list(zip(arguments, in_dims, strict=True))
    return [
        tuple(a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in pairs) for i in range(size)
    ]
