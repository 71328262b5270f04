"""The backward of a layer from the Triton kernels where they apply, composed of PyTorch's own elsewhere.

Triton is optional: this module is imported when the first layer asks for it.
"""

from torch import Tensor

from pyfeedback import aten
from pyfeedback.forms import Coefficients, Form, Problem, Window, choose_form, conv2d_problem, linear_problem
from pyfeedback.kernels import measured, ops


def conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    window: Window,
    rule: Coefficients,
    mask,
    *,
    center,
    only_measured: bool = False,
):
    """As :func:`pyfeedback.aten.conv2d_backward`.

    Args:
        center: center(t, n) is t[:n] minus its mean over dimension 0.
        only_measured: take the kernels only for layers they were measured faster on, on this device.
    """
    if ops.takes(input, weight, window.groups):
        problem = conv2d_problem(input.shape, weight.shape, window, rule.samples)
        form = choose_form(problem, rule, response is not None) if mask[2] else Form.NONE
        if not only_measured or _is_faster(input, problem, form):
            return ops.conv2d_backward(
                grad_output, input, weight, feedback, response, window, rule, mask, form=form.value, center=center
            )
    return aten.conv2d_backward(grad_output, input, weight, feedback, response, window, rule, mask)


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    rule: Coefficients,
    mask,
    *,
    center,
    only_measured: bool = False,
):
    """As :func:`pyfeedback.aten.linear_backward`; the others as in :func:`conv2d_backward`."""
    if ops.takes(input, weight):
        problem = linear_problem(input.shape, weight.shape, rule.samples)
        form = choose_form(problem, rule, response is not None) if mask[2] else Form.NONE
        if not only_measured or _is_faster(input, problem, form):
            return ops.linear_backward(
                grad_output, input, weight, feedback, response, rule, mask, form=form.value, center=center
            )
    return aten.linear_backward(grad_output, input, weight, feedback, response, rule, mask)


def _is_faster(input: Tensor, problem: Problem, form: Form) -> bool:
    table = measured.load(measured.device_name(input.device))
    return measured.key(problem, form.value, input.dtype) in table
