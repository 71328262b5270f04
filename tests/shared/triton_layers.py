"""The backward of a layer from the Triton kernels, beside the composition and float64."""

import torch
from triton_cases import Case, assert_near, inner, layer

from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.kernels import backward

LAYERS = {
    "3x2 stride 2 and 1": Case((3, 16, 5, 4), (17, 16, 3, 2), (2, 1), (1, 0), (1, 2)),
    "1x1": Case((3, 16, 3, 4), (24, 16, 1, 1)),
    "1x1 stride 2 and 3": Case((3, 24, 5, 4), (16, 24, 1, 1), (2, 3)),
}
ALGORITHMS = [algorithm for algorithm in Algorithm if algorithm is not Algorithm.NONE]


def has_algorithm(algorithm: Algorithm, case: Case, rule: dict) -> bool:
    """Whether the algorithm computes the rule's data terms of this layer."""
    if case.weight[2:] != (1, 1) and algorithm is not Algorithm.DIRECT:
        return False
    return algorithm is not Algorithm.RESPONSE_GRAM or bool(rule.get("null") and not rule.get("sparse"))


def run_conv2d(
    case: Case, rule: dict, algorithm: Algorithm, mask=(True,) * 4, dtype=torch.float32, laid_out=inner, respond=True
):
    """Gradients of the kernels, and of the composition in the same dtype and in float64."""
    t = layer(case, dtype)
    x, w, b, dy = (laid_out(v).permute(0, 3, 1, 2) if laid_out else v for v in t[:4])
    y = torch.conv2d(x.double(), w.double(), None, *case.window).to(dtype) if respond else None
    options = {"rule": Coefficients(**rule), "mask": mask, "algorithm": algorithm.value}
    options["center"] = torch.ops.pyfeedback.center.default
    ours = backward.layer_backward(dy, x, w, b, y, convolution=case.window, **options)
    for grad, like in zip(ours[:3], (x, w, w), strict=True):
        assert grad is None or grad.stride() == torch.zeros_like(like).stride()
    op = torch.ops.pyfeedback.fa_conv2d_backward
    expected = []
    for wide in (dtype, torch.float64):
        tensors = (v if v is None else v.to(wide) for v in (dy, x, w, b, y))
        expected.append(op(*tensors, *case.window, 1, **rule, output_mask=mask))
    return ours, *expected


def assert_all_near(ours, composed, oracle):
    for mine, theirs, exact in zip(ours, composed, oracle, strict=True):
        assert (mine is None) == (exact is None)
        if exact is not None:
            assert_near(mine, theirs, exact)
