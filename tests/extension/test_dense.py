"""The compiled kernel of small layers without groups against the paper's regularizers in float64."""

import pytest
import torch
from cases import RULES, conv_tensors, fresh, gradients, largest_error, norm_error, percentile, random_conv

import pyfeedback
from pyfeedback import functional, reference
from pyfeedback.backends import dispatch
from pyfeedback.backends.extension import dense, loading
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import LINEAR, Convolution

pytestmark = pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")

DATA_RULES = [name for name, rule in RULES.items() if Coefficients(**rule).reads_data]
ALL = (True, True, True, True)
LINEAR_SHAPES = {"matrix": (5, 7), "tokens": (3, 4, 7), "one sample": (1, 7)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel."""
    found, real = [], dense._backward
    monkeypatch.setattr(dense, "_backward", lambda *arguments: found.append(1) or real(*arguments))
    return found


def step(op, tensors, window, rule):
    output = op(*tensors, *window, **rule)
    output, penalty = output if isinstance(output, tuple) else (output, None)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).to(output))
    if penalty is not None:
        penalty.backward()
    return gradients(tensors)


@pytest.mark.parametrize("number", [n for n in range(100) if random_conv(n).groups == 1])
def test_random_convolutions(number, calls):
    case, rule = random_conv(number), dict(RULES[DATA_RULES[number % len(DATA_RULES)]])
    if number % 4 == 1 and case.input[0] > 1:
        rule["samples"] = case.input[0] - 1
    tensors = conv_tensors(case, number)
    ours = step(functional.fa_conv2d, fresh(tensors), case.window, rule)
    oracle = step(reference.conv2d, fresh(tensors), case.window, rule)
    assert largest_error(ours, oracle) < 1e-12
    x = tensors[0]
    is_dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    assert bool(calls) == is_dense


@pytest.mark.parametrize("rule", DATA_RULES)
@pytest.mark.parametrize("shape", LINEAR_SHAPES.values(), ids=list(LINEAR_SHAPES))
def test_linear_layers(shape, rule, calls):
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in (shape, (6, 7), (6, 7), (6,))]
    for samples in {0, shape[0] - 1}:
        options = {**RULES[rule], "samples": samples}
        ours = step(functional.fa_linear, fresh(tensors), (), options)
        assert largest_error(ours, step(reference.linear, fresh(tensors), (), options)) < 1e-12
    assert calls


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rule", ["ia-centered", "everything"])
def test_rounding(rule, dtype, calls):
    """The error of every gradient is at most twice that of the plain composition, at the 95th percentile."""
    ratios, unit = [], torch.finfo(dtype).eps
    for seed in range(40):
        torch.manual_seed(seed)
        shapes = ((3, 8, 8, 8), (8, 8, 3, 3), (8, 8, 3, 3), (8,))
        tensors = [(torch.randn(s) + (s is shapes[0])).to(dtype) for s in shapes]
        working = (functional.fa_conv2d, dtype), (reference.conv2d, dtype), (reference.conv2d, torch.float64)
        results = [step(op, fresh(tensors, d), ((1, 1), (1, 1), (1, 1), 1), RULES[rule]) for op, d in working]
        for ours, plain, exact in zip(*results, strict=True):
            error = max(0.0, norm_error(ours, exact) - unit)
            ratios.append(error / max(norm_error(plain, exact), unit / 8))
    assert percentile(ratios, 95) <= 2, sorted(ratios)[-5:]
    assert len(calls) == 40


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_have_the_strides_of_their_tensors_and_only_those_needed(last):
    x, w, b = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    if last:
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    geometry = Convolution()
    for mask in (ALL, (False, True, True, False), (True, False, True, True)):
        call = dispatch.plan(geometry, x, w, Coefficients(**RULES["everything"]), mask, True)
        assert call.chosen.backward is dense.backward
        assert not call.reads_response
        grads = call.chosen.backward(call, torch.randn(2, 4, 3, 3), x, w, b, None)
        assert tuple(grad is not None for grad in grads) == mask
        for grad, like in zip(grads, (x, w, w), strict=False):
            assert grad is None or (grad.shape == like.shape and grad.stride() == like.stride())


def test_which_layers_it_computes():
    amp = Coefficients(amp=1.0)

    def chosen(geometry, x, w, rule=amp):
        return dispatch.plan(geometry, torch.empty(x), torch.empty(w), rule, ALL, True).chosen.backward

    assert chosen(LINEAR, (8, 64), (64, 64)) is dense.backward
    assert chosen(Convolution(), (2, 8, 8, 8), (8, 8, 3, 3)) is dense.backward
    others = (
        chosen(LINEAR, (64, 64), (64, 64)),
        chosen(LINEAR, (2, 2, 2, 8), (8, 8)),
        chosen(LINEAR, (0, 8), (8, 8)),
        chosen(LINEAR, (8, 64), (64, 64), Coefficients(decay=1.0)),
        chosen(LINEAR, (8, 64), (64, 64), Coefficients(amp=1.0, normalize=True)),
        chosen(Convolution(), (8, 16, 16, 16), (16, 16, 3, 3)),
        chosen(Convolution((1,), (0,), (1,), False, (0,)), (2, 8, 8), (8, 8, 3)),
        chosen(Convolution(transposed=True), (2, 8, 8, 8), (8, 8, 3, 3)),
    )
    assert dense.backward not in others
    with pyfeedback.backend("composite"):
        assert chosen(LINEAR, (8, 64), (64, 64)) is not dense.backward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_output": (2, 4, 4, 3)}, "grad_output has the wrong shape"),
        ({"feedback": (4, 3, 3, 2)}, "feedback has the wrong shape"),
        ({"weight": (4, 2, 3, 3)}, "groups is 1"),
        ({"weight": (4, 3)}, "input and weight have 4 and 2 dimensions"),
        ({"input": (2, 3, 5, 5, 5)}, "dimensions"),
        ({"weight": (4, 3, 7, 7)}, "kernel is larger"),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(change, message):
    """Only by calls of the op itself: a layer checks its tensors before."""
    shapes = {"grad_output": (2, 4, 3, 3), "input": (2, 3, 5, 5), "weight": (4, 3, 3, 3), "feedback": (4, 3, 3, 3)}
    tensors = [torch.randn(shape) for shape in (shapes | change).values()]
    for samples, expected in ((2, message), (3, "samples is 3|" + message)):
        with pytest.raises(RuntimeError, match=expected):
            dense._backward(*tensors, (1, 1), (0, 0), (1, 1), [0.0, 1.0, 0.0, 0.0, 0.0, 0.0], True, samples, *ALL)
