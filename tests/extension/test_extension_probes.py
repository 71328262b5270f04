"""The compiled gradient of rules with orthogonal probes, against the composition by a matrix of the probes."""

import pytest
import torch
from extension_ops import DTYPES, cpu, dtype_id

from pyfeedback.backends.composite import probes as composite
from pyfeedback.backends.extension import ops
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.probes import ProbeProblem, count_probes, part_of

pytestmark = cpu

RULES = {
    "wm": Coefficients(amp=1.5, decay=1.0),
    "ia": Coefficients(amp=1.5, null=0.5, decay=1.0),
    "normalized ia": Coefficients(amp=1.5, null=0.5, decay=1.0, normalize=True),
    "aa": Coefficients(amp=1.0, sparse=1.0),
    "null alone": Coefficients(null=1.0, self_=0.5),
    "all but null": Coefficients(amp=0.3, sparse=0.5, self_=0.2, decay=0.1),
    "all": Coefficients(amp=0.3, null=0.2, sparse=0.5, self_=0.2, decay=0.1),  # composed
}
# Sizes of a basis: 4, composed; 8; 16 and 64 with unused columns; Paley's of 12, 20, 28, 36, 44 and 60.
INPUTS = (3, 8, 9, 60, 300, 576, 800, 1025, 1300, 1900)


def problem(rule, inputs, dtype=torch.float64, estimate=1, outputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, feedback = (torch.randn(2, outputs, inputs, dtype=torch.float64, generator=generator) for _ in range(2))
    count = count_probes(max(1, inputs // 3), inputs, 0.05, 1, True, 0, True, rule.sparse != 0)
    part = part_of(count, inputs, estimate)
    return ProbeProblem(weight.to(dtype), feedback.to(dtype), count.probes, rule, 5, part)


def gradient(module, given, dtype=None):
    if dtype:
        given = given._replace(weight=given.weight.to(dtype), feedback=given.feedback.to(dtype))
    (found,) = module.probe_gradients([given], 7, 2)
    return found


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("rule", RULES)
def test_gradient_is_that_of_the_composition(rule, inputs):
    for estimate in range(2):  # parts of different sizes
        given = problem(RULES[rule], inputs, estimate=estimate)
        torch.testing.assert_close(gradient(ops, given), gradient(composite, given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_operands_of_any_dtype_and_layout(dtype):
    given = problem(RULES["normalized ia"], 300, dtype)
    found = gradient(ops, given)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), gradient(composite, given, torch.float64), rtol=1e-4, atol=1e-4)
    strided = given._replace(weight=given.weight.mT.contiguous().mT, feedback=given.feedback.repeat(1, 1, 2)[..., :300])
    torch.testing.assert_close(gradient(ops, strided), found, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["wm", "aa"])
@pytest.mark.parametrize("inputs", [27, 640])
def test_rounding(rule, inputs):
    """The error is at most twice that of the composition plus a unit in the last place, at the 95th percentile."""
    errors, own, largest = [], [], 0.0
    for seed in range(40):
        given = problem(RULES[rule], inputs, torch.float32, outputs=1, seed=seed)
        exact = gradient(composite, given, torch.float64)
        errors.append((gradient(ops, given) - exact).abs().max())
        own.append((gradient(composite, given) - exact).abs().max())
        largest = max(largest, exact.abs().max().item())
    bound = 2 * torch.stack(own).quantile(0.95) + torch.finfo(torch.float32).eps * largest
    assert torch.stack(errors).quantile(0.95) <= bound


def test_the_number_of_threads_changes_nothing():
    given = problem(RULES["ia"], 576, torch.float32, outputs=100)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(gradient(ops, given))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_an_operand_without_factor_is_not_read():
    given = problem(Coefficients(amp=1.0), 64)
    nan = torch.full_like(given.feedback, float("nan"))
    torch.testing.assert_close(gradient(ops, given._replace(feedback=nan)), gradient(ops, given), rtol=0, atol=0)


def test_empty_layers():
    for shape in ((1, 0, 9), (2, 0, 64)):
        given = problem(RULES["ia"], shape[-1])._replace(weight=torch.empty(shape), feedback=torch.empty(shape))
        assert gradient(ops, given).shape == shape


OPERANDS = {
    "weight": torch.ones(4, 6),
    "feedback": torch.ones(4, 6),
    "signs": torch.ones(8),
    "rows": torch.arange(3),
    "paley": torch.ones(1, 1),
    "coefficients": [1.0, 0.0, 0.0, -1.0, 1.0],
    "need_response": True,
}
WRONG = {
    "rows[2] is 8; expected 0 to 7": {"rows": torch.tensor([0, 7, 8])},
    "rows[0] is -1": {"rows": torch.tensor([-1])},
    "rows is not a contiguous vector of int64": {"rows": torch.arange(3, dtype=torch.int32)},
    "feedback has another shape": {"feedback": torch.ones(6, 4)},
    "feedback has another dtype": {"feedback": torch.ones(4, 6, dtype=torch.float64)},
    "feedback has 2 dimensions; expected 2, contiguous": {"feedback": torch.ones(6, 4).t()},
    "weight has 16 bits": {"weight": torch.ones(4, 6).half()},
    "weight has 3 dimensions": {"weight": torch.ones(1, 4, 6), "feedback": torch.ones(1, 4, 6)},
    "signs has 4 elements": {"signs": torch.ones(4), "weight": torch.ones(4, 3), "feedback": torch.ones(4, 3)},
    "signs has 24 elements": {"signs": torch.ones(24)},
    "at least 9": {"weight": torch.ones(4, 9), "feedback": torch.ones(4, 9)},
    "paley has the wrong shape": {"paley": torch.ones(2, 2)},
    "signs has 96 elements": {"signs": torch.ones(96), "paley": torch.ones(12, 12)},
    "signs has 0 elements": {"signs": torch.ones(0), "paley": torch.ones(0, 0)},
    "coefficients has 4 values; expected 5": {"coefficients": [1.0] * 4},
}


@pytest.mark.parametrize("message", WRONG)
def test_memory_is_checked(message):
    op = torch.ops.pyfeedback.extension_probe_gradients
    found, response = op(**OPERANDS)
    assert (found.shape, response.shape) == ((4, 6), (4, 3))
    with pytest.raises(RuntimeError) as raised:
        op(**(OPERANDS | WRONG[message]))
    assert message in str(raised.value)
