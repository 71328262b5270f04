"""Bad input: a one-line error that names the argument, its value and the expected value, before any computation."""

import math

import pytest
import torch

import pyfeedback
from pyfeedback import functional

X, W, B, BIAS = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3), torch.randn(6)
GOOD = {"input": X, "weight": W, "feedback": B, "bias": BIAS}
LINEAR = {"input": torch.randn(2, 3, 4), "weight": torch.randn(6, 4), "feedback": torch.randn(6, 4), "bias": BIAS}

# The change to a valid call, and the error: the argument, its value, the expected value.
CONV_CASES = {
    "input rank 2": ({"input": X[0, 0]}, "input has rank 2, shape (6, 6), expected rank 4"),
    "input rank 5": ({"input": X[None]}, "input has rank 5, shape (1, 2, 4, 6, 6), expected rank 4"),
    "weight rank 3": ({"weight": W[0]}, "weight has rank 3, shape (4, 3, 3), expected rank 4"),
    "feedback shape": ({"feedback": B[:5]}, "feedback has shape (5, 4, 3, 3), expected that of weight, (6, 4, 3, 3)"),
    "feedback transposed": ({"feedback": B.transpose(0, 1)}, "feedback has shape (4, 6, 3, 3), expected"),
    "channels": ({"input": X[:, :3]}, "input has 3 channels, shape (2, 3, 6, 6), expected 4 = 4 of weight * 1 groups"),
    "channels of groups": ({"groups": 2}, "input has 4 channels, shape (2, 4, 6, 6), expected 8 = 4 of weight * 2"),
    "bias shape": ({"bias": BIAS[:5]}, "bias has shape (5,), expected (6,), the output channels of weight"),
    "bias rank": ({"bias": BIAS[None]}, "bias has shape (1, 6), expected (6,)"),
    "input integer": ({"input": X.long()}, "input has dtype torch.int64, expected float64, float32, bfloat16 or"),
    "input bool": ({"input": X > 0}, "input has dtype torch.bool, expected float64"),
    "input complex": ({"input": X.to(torch.complex64)}, "input has dtype torch.complex64, expected float64"),
    "weight dtype": ({"weight": W.double()}, "weight has dtype torch.float64, expected that of input, torch.float32"),
    "feedback dtype": ({"feedback": B.half()}, "feedback has dtype torch.float16, expected that of input"),
    "bias dtype": ({"bias": BIAS.bfloat16()}, "bias has dtype torch.bfloat16, expected that of input"),
    "input sparse": ({"input": X.to_sparse()}, "input has layout torch.sparse_coo, expected torch.strided"),
    "bias sparse": ({"bias": BIAS.to_sparse()}, "bias has layout torch.sparse_coo, expected torch.strided"),
    "weight sparse": ({"weight": W.to_sparse()}, "weight has layout torch.sparse_coo, expected torch.strided"),
    "stride zero": ({"stride": 0}, "stride is (0, 0), expected 1 or more"),
    "stride negative": ({"stride": (1, -2)}, "stride is (1, -2), expected 1 or more"),
    "padding negative": ({"padding": (0, -1)}, "padding is (0, -1), expected 0 or more"),
    "dilation zero": ({"dilation": 0}, "dilation is (0, 0), expected 1 or more"),
    "groups zero": ({"groups": 0}, "input has 4 channels, shape (2, 4, 6, 6), expected 0 = 4 of weight * 0 groups"),
    "groups of outputs": (
        {"groups": 4, "weight": W[:, :1], "feedback": B[:, :1]},
        "groups is 4, expected a divisor of the 6 output channels of weight",
    ),
    "kernel too large": ({"dilation": 3}, "input has a padded size of (6, 6), expected at least (7, 7), that of the"),
    "kernel empty": ({"weight": W[:, :, :0], "feedback": B[:, :, :0]}, "weight has shape (6, 4, 0, 3), expected a"),
    "samples negative": ({"samples": -1}, "samples is -1, expected 0 (all) to 2, the size of the batch"),
    "samples too many": ({"samples": 3}, "samples is 3, expected 0 (all) to 2, the size of the batch"),
    **{
        f"{name} {value}": ({name: value}, f"{name} is {value}, expected a finite number")
        for name in ("decay", "amp", "null", "sparse", "self_", "tie")
        for value in (math.nan, math.inf)
    },
}  # fmt: skip
LINEAR_CASES = {
    "input rank 1": ({"input": LINEAR["input"][0, 0]}, "input has rank 1, shape (4,), expected rank 2 or more"),
    "weight rank": ({"weight": W}, "weight has rank 4, shape (6, 4, 3, 3), expected rank 2, [K, C]"),
    "features": ({"input": torch.randn(2, 5)}, "input has 5 channels, shape (2, 5), expected 4"),
    "feedback shape": ({"feedback": LINEAR["feedback"].t()}, "feedback has shape (4, 6), expected that of weight"),
    "bias shape": ({"bias": BIAS[:2]}, "bias has shape (2,), expected (6,)"),
    "integer": ({"input": LINEAR["input"].int()}, "input has dtype torch.int32, expected float64"),
    "mixed": ({"weight": LINEAR["weight"].double()}, "weight has dtype torch.float64, expected that of input"),
    "samples": ({"samples": 9}, "samples is 9, expected 0 (all) to 2"),
    "coefficient": ({"null": -math.inf}, "null is -inf, expected a finite number"),
}


@pytest.mark.parametrize("api", [functional, torch.ops.pyfeedback], ids=["function", "dispatcher"])
@pytest.mark.parametrize("case", CONV_CASES)
def test_conv2d(case, api):
    change, message = CONV_CASES[case]
    refuses(lambda: api.fa_conv2d(**{**GOOD, **change}), message)


@pytest.mark.parametrize("api", [functional, torch.ops.pyfeedback], ids=["function", "dispatcher"])
@pytest.mark.parametrize("case", LINEAR_CASES)
def test_linear(case, api):
    change, message = LINEAR_CASES[case]
    refuses(lambda: api.fa_linear(**{**LINEAR, **change}), message)


@pytest.mark.parametrize("api", [functional, torch.ops.pyfeedback], ids=["function", "dispatcher"])
def test_device(api):
    with pytest.raises((ValueError, RuntimeError), match="feedback is on meta, expected the device of input, cpu"):
        api.fa_linear(**{**LINEAR, "feedback": LINEAR["feedback"].to("meta")})


BACKWARD_CASES = {
    "grad_output shape": (
        {"grad_output": torch.randn(2, 6, 4, 5)},
        "grad_output has shape (2, 6, 4, 5), expected that",
    ),
    "grad_output dtype": ({"grad_output": torch.randn(2, 6, 4, 4).double()}, "grad_output has dtype torch.float64"),
    "response shape": ({"response": torch.randn(2, 6, 6, 6)}, "response has shape (2, 6, 6, 6), expected that of the"),
    "response dtype": ({"response": torch.randn(2, 6, 4, 4).half()}, "response has dtype torch.float16, expected"),
    "feedback shape": ({"feedback": B[:2]}, "feedback has shape (2, 4, 3, 3), expected that of weight"),
    "samples": ({"samples": 7}, "samples is 7, expected 0 (all) to 2"),
}


@pytest.mark.parametrize("case", BACKWARD_CASES)
def test_backward(case):
    change, message = BACKWARD_CASES[case]
    good = {"grad_output": torch.randn(2, 6, 4, 4), "input": X, "weight": W, "feedback": B, "response": None}
    refuses(lambda: torch.ops.pyfeedback.fa_conv2d_backward(**{**good, **change}), message)


STEP = {"feedback": [torch.ones(3)], "weight": [torch.ones(3)], "grad": [torch.ones(3)], "momentum_buffer": [],
        "decay": [0.1], "self_": [0.1], "tie": [0.1], "lr": 0.1}  # fmt: skip
STEP_CASES = {
    "weight missing": ({"weight": []}, "weight has 0 tensors, expected 1, one for each feedback"),
    "grad missing": ({"grad": []}, "grad has 0 tensors, expected 1"),
    "momentum buffer missing": ({"momentum": 0.9}, "momentum_buffer has 0 tensors, expected 1"),
    "too many weights": ({"weight": [torch.ones(3)] * 2}, "weight has 2 tensors, expected 1"),
    "weight shape": ({"weight": [torch.ones(4)]}, "weight[0] is (4,) torch.float32 on cpu, expected the same as"),
    "grad dtype": ({"grad": [torch.ones(3).double()]}, "grad[0] is (3,) torch.float64 on cpu, expected the same as"),
    "feedback integer": (
        {"feedback": [torch.ones(3).int()], "weight": [], "grad": [], "self_": [0.0], "tie": [0.0]},
        "feedback[0] is torch.int32, torch.strided, expected a strided floating-point tensor",
    ),
    "coefficients": ({"decay": [0.1, 0.2]}, "decay has 2 numbers, expected 1, one for each feedback"),
    "coefficient nan": ({"tie": [math.nan]}, "tie[0] is nan, expected a finite number"),
    "lr": ({"lr": math.inf}, "lr is inf, expected a finite number, 0 or more"),
    "noise": ({"noise": -1.0}, "noise is -1.0, expected a finite number, 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("case", STEP_CASES)
def test_feedback_step_writes_nothing(case):
    change, message = STEP_CASES[case]
    arguments = {**STEP, **change}
    before = [t.clone() for t in arguments["feedback"]]
    refuses(lambda: functional.feedback_step_(**arguments), message)
    assert all(torch.equal(t, b) for t, b in zip(arguments["feedback"], before, strict=True))


PYTHON_CASES = {
    "rule name": (lambda: pyfeedback.rule("xy"), "rule is 'xy', expected one of bp, fa, wm, ia, sa, aa, kp"),
    "rule type": (lambda: pyfeedback.rule(3), "rule is 3, expected a name or a pyfeedback.Rule"),
    "rule coefficient": (lambda: pyfeedback.rule("wm", amp=math.nan), "amp is nan, expected a finite number"),
    "rule center": (lambda: pyfeedback.rule("ia", center="no"), "center is 'no', expected True or False"),
    "rule samples": (lambda: pyfeedback.rule("wm", samples=1.5), "samples is 1.5, expected an int of 0 or more, or"),
    "rule reduction": (lambda: pyfeedback.rule("wm", reduction="sum"), "reduction is 'sum', expected one of batch"),
    "backend": (lambda: pyfeedback.set_backend("cudnn"), "backend is 'cudnn', expected one of auto, composite, exten"),
    "layer rule": (lambda: pyfeedback.nn.Linear(2, 2, rule="x"), "rule is 'x', expected one of"),
    "convert": (lambda: pyfeedback.convert(torch.nn.Linear(2, 2), None), "rule is None, expected a name or"),
    "optimizer model": (lambda: pyfeedback.optim.FeedbackSGD(torch.nn.Linear(2, 2), 0.1), "model has no layer with a"),
    "optimizer lr": (lambda: pyfeedback.optim.FeedbackSGD(pyfeedback.nn.Linear(2, 2), -1.0), "lr is -1.0, expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", PYTHON_CASES)
def test_python_api(case):
    refuses(*PYTHON_CASES[case])


def refuses(call, message):
    with pytest.raises((ValueError, TypeError)) as refused:
        call()
    text = str(refused.value)
    assert "\n" not in text
    assert message in text
