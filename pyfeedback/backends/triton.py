"""The backward of a layer, and the gradients of rules that read probes, by the Triton kernels.

Triton is optional, and its import takes a second. The kernels are therefore imported when they are first needed.
"""

from collections.abc import Sequence

from torch import Tensor

from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.call import Gradients, LayerCall
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Convolution, Geometry
from pyfeedback.core.probes import ProbeProblem

IMPLEMENTED = frozenset({"decay", "amp", "null", "sparse", "self_", "tie"})  # coefficients
PROBES_IMPLEMENTED = frozenset({"decay", "amp", "null", "sparse", "self_", "normalize"})


def supports(geometry: Geometry, input: Tensor, weight: Tensor, rule: Coefficients, algorithm: Algorithm) -> bool:
    """Whether the kernels compute this linear layer or 2-D convolution."""
    from pyfeedback.kernels import backward

    conv2d_or_linear = not isinstance(geometry, Convolution) or geometry.is_conv2d
    return conv2d_or_linear and backward.supports(input, weight, geometry.groups)


def layer_backward(
    call: LayerCall,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    *,
    fused: bool,
) -> Gradients:
    """The gradients of a layer that :func:`supports` accepts, by fused launches or by one launch for each product."""
    from pyfeedback.kernels import backward

    geometry = call.geometry
    return backward.layer_backward(
        grad_output, input, weight, feedback, response, rule=call.rule, mask=call.mask,
        convolution=geometry[:3] if isinstance(geometry, Convolution) else None,
        algorithm=call.algorithm.value, center=call.chosen.center, fused=fused,
    )  # fmt: skip


def supports_probes(problem: ProbeProblem) -> bool:
    """Whether the kernels compute the gradient of these sizes and this dtype."""
    from pyfeedback.kernels import probe_table

    return probe_table.supports(problem.weight, problem.feedback, problem.probes)


def probe_gradients(problems: Sequence[ProbeProblem], seed: int, step: int) -> list[Tensor]:
    """The gradient of each problem that :func:`supports_probes` accepts, in the dtype of its feedback."""
    from pyfeedback.kernels import probe_table

    return probe_table.probe_gradients(problems, seed, step)
