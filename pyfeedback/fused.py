"""The backward of a layer from the Triton kernels where they apply, composed of PyTorch's own elsewhere.

Triton is optional: this module is imported when the first layer asks for it.
"""

from torch import Tensor

from pyfeedback import aten
from pyfeedback.forms import Coefficients, Form, Problem, Window, choose_form, conv2d_problem, linear_problem
from pyfeedback.kernels import backward, measured


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
    path: str | None = "fused",
):
    """As :func:`pyfeedback.aten.conv2d_backward`.

    Args:
        center: center(t, n) is t[:n] minus its mean over dimension 0.
        path: "fused" or "unfused", as the kernels' own; None for the one that was measured faster on this device.
    """
    if backward.supports(input, weight, window.groups):
        problem = conv2d_problem(input.shape, weight.shape, window, rule.samples)
        form = choose_form(problem, rule, response is not None) if mask[2] else Form.NONE
        path = path or _faster_path(input, problem, form)
        if path:
            return backward.layer_backward(
                grad_output,
                input,
                weight,
                feedback,
                response,
                convolution=tuple(window[:3]),
                rule=rule,
                mask=mask,
                algorithm=form.algorithm,
                center=center,
                fused=path == "fused",
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
    path: str | None = "fused",
):
    """As :func:`pyfeedback.aten.linear_backward`; the others as in :func:`conv2d_backward`."""
    if backward.supports(input, weight):
        problem = linear_problem(input.shape, weight.shape, rule.samples)
        form = choose_form(problem, rule, response is not None) if mask[2] else Form.NONE
        path = path or _faster_path(input, problem, form)
        if path:
            return backward.layer_backward(
                grad_output,
                input,
                weight,
                feedback,
                response,
                convolution=None,
                rule=rule,
                mask=mask,
                algorithm=form.algorithm,
                center=center,
                fused=path == "fused",
            )
    return aten.linear_backward(grad_output, input, weight, feedback, response, rule, mask)


def _faster_path(input: Tensor, problem: Problem, form: Form) -> str | None:
    table = measured.load(measured.device_name(input.device))
    return table.get(measured.key(problem, form.algorithm, input.dtype))
