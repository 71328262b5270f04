"""The ops `scheduled_*`: `fa_conv2d` and `fa_linear` with the coefficients as a tensor.

A compiler bakes numbers into its graph, and would make a new graph for each step of a schedule. A tensor on the CPU
is an input of the graph: :class:`pyfeedback.schedules.Schedule` writes to it, and the backward reads it when it runs.
Only compiled layers under a schedule come here.
"""

import torch
from torch import Tensor

from pyfeedback import arguments, registration
from pyfeedback.forms import COEFFICIENTS
from pyfeedback.providers import current_backend, in_force
from pyfeedback.schemas import LIBRARY

PER_POSITION = ("amp", "null", "sparse")

_ops = torch.ops.pyfeedback


def _forward(plain):
    def forward(input, weight, feedback, bias, coefficients, *window, center, samples, positions):
        arguments.check_scheduled(coefficients, positions)
        return plain(input, weight, feedback, bias, *window, center=center, samples=samples)

    return forward


def _backward(plain):
    def backward(grad_output, input, weight, feedback, response, coefficients, *window, positions, **options):
        rule = dict(zip(COEFFICIENTS, coefficients.tolist(), strict=True))
        rule |= {name: rule[name] / positions for name in PER_POSITION}
        return plain(grad_output, input, weight, feedback, response, *window, **options, **rule)

    return backward


def _save(ctx, inputs, keyword_only_inputs, output: Tensor) -> None:
    input, weight, feedback, bias, coefficients, *ctx.window = inputs
    ctx.rule, ctx.backend = keyword_only_inputs, current_backend()
    # Which form the coefficients will ask for is not known yet: the response is kept wherever it is at hand.
    response = output if ctx.needs_input_grad[2] and bias is None else None
    ctx.save_for_backward(input, weight, feedback, response, coefficients)


def _differentiate(backward_op):
    def backward(ctx, grad_output: Tensor):
        mask = list(ctx.needs_input_grad[:4])
        with in_force(ctx.backend):
            grads = backward_op(grad_output, *ctx.saved_tensors, *ctx.window, **ctx.rule, output_mask=mask)
        return *grads, None, *(None for _ in ctx.window)

    return backward


for _name, _plain, _plain_backward in (
    ("scheduled_conv2d", registration.fa_conv2d, registration.fa_conv2d_backward),
    ("scheduled_convolution", registration.fa_convolution, registration.fa_convolution_backward),
    ("scheduled_linear", registration.fa_linear, registration.fa_linear_backward),
):
    LIBRARY.impl(_name, _forward(_plain), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{_name}_backward", _backward(_plain_backward), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyfeedback::{_name}", _forward(_plain), lib=LIBRARY)
    torch.library.register_fake(f"pyfeedback::{_name}_backward", registration.fake_gradients, lib=LIBRARY)
    _formula = _differentiate(getattr(_ops, f"{_name}_backward").default)
    torch.library.register_autograd(f"pyfeedback::{_name}", _formula, setup_context=_save, lib=LIBRARY)
    torch.library.register_autograd(
        f"pyfeedback::{_name}_backward", registration.refuse_double_backward, lib=LIBRARY
    )  # fmt: skip
