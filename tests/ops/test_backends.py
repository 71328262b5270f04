"""Backends that are forced, and what "auto" takes: every random layer by the Triton kernels, on the interpreter."""

import pytest
import torch
import triton_cases
from cases import RULES, conv_tensors, fresh, gradients, random_conv
from triton_cases import DEVICE, assert_near, fill_memory_with_nan, names, record_launches

import pyfeedback
from pyfeedback import functional
from pyfeedback.backends import dispatch
from pyfeedback.core.algorithm import Algorithm, choose_algorithm
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Convolution
from pyfeedback.kernels import backward as kernels

pytestmark = triton_cases.MARKS


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def widened(case):
    """The same layer with as many channels as the kernels ask for, in a smaller map; None where it has groups."""
    if case.groups > 1:
        return None
    (n, c, h, w), (k, _, *kernel) = case.input, case.weight
    c, k = c + kernels.FEWEST_CHANNELS - 1, k + kernels.FEWEST_CHANNELS
    reach = [d * (r - 1) + 1 - 2 * p for d, r, p in zip(case.dilation, kernel, case.padding, strict=True)]
    size = [max(r, min(s, 6)) for r, s in zip(reach, (h, w), strict=True)]
    return case._replace(input=(n, c, *size), weight=(k, c, *kernel))


CASES = {number: case for number in range(90) if (case := widened(random_conv(number)))}


def backward(backend, case, tensors, rule):
    leaves = [t if t is None else t.to(DEVICE) for t in tensors]
    leaves = [t if t is None else t.detach().requires_grad_() for t in leaves]
    with pyfeedback.backend(backend):
        output = functional.fa_conv2d(*leaves, *case.window, **rule)
        torch.manual_seed(1)
        output.backward(torch.randn(output.shape).to(DEVICE, output.dtype))
    return gradients(leaves)


@pytest.mark.parametrize("number", CASES)
def test_random_layers(number, monkeypatch):
    """Each number one rule after the other, float16 at every third; every second time of a part of the batch."""
    fill_memory_with_nan(monkeypatch)
    case, rule = CASES[number], RULES[list(RULES)[number % len(RULES)]]
    dtype = torch.float16 if number % 3 == 2 else torch.float32
    if number % 2 and case.input[0] > 1:
        rule = {**rule, "samples": case.input[0] - 1}
    tensors = conv_tensors(case, number, dtype)
    taken = []
    real = kernels.layer_backward
    monkeypatch.setattr(kernels, "layer_backward", lambda *a, **k: (taken.append(k["algorithm"]), real(*a, **k))[1])
    results = [backward("triton", case, tensors, rule), backward("composite", case, tensors, rule)]
    assert len(taken) == 1
    oracle = backward("composite", case, fresh(tensors, torch.float64), rule)
    for ours, composed, exact in zip(*results, oracle, strict=True):
        assert_near(ours, composed, exact)


def test_the_random_layers_cover_every_algorithm_and_window():
    seen = set()
    for number, case in CASES.items():
        rule = Coefficients(**RULES[list(RULES)[number % len(RULES)]])
        geometry = Convolution(*case.window[:3], groups=case.groups)
        sizes = geometry.sizes(case.input, case.weight, rule.samples)
        seen |= {choose_algorithm(sizes, rule, True), ("stride", max(case.stride)), ("taps", case.weight[2] > 1)}
        seen |= {("dilation", max(case.dilation)), ("batch", case.input[0]), ("ragged", case.weight[0] % 16 != 0)}
    assert seen >= {*Algorithm} - {Algorithm.RESPONSE_GRAM}
    assert seen >= {("stride", 1), ("stride", 2), ("stride", 3), ("dilation", 2), ("batch", 1), ("ragged", True)}
    assert seen >= {("taps", True), ("taps", False)}


def test_what_the_kernels_do_not_take_is_composed():
    for number in (0, 1, 5, 10):  # few channels, groups
        case = random_conv(number)
        tensors = conv_tensors(case, number)
        both = [backward(name, case, tensors, RULES["ia"]) for name in ("triton", "composite")]
        for ours, composed in zip(*both, strict=True):
            torch.testing.assert_close(ours, composed, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["fa", "ia-centered", "everything"])
def test_linear_layers(rule):
    torch.manual_seed(0)
    tensors = [torch.randn(s) for s in ((3, 5, 16), (24, 16), (24, 16), (24,))]
    results = []
    for backend, dtype in (("triton", torch.float32), ("composite", torch.float32), ("composite", torch.float64)):
        leaves = [t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors]
        with pyfeedback.backend(backend):
            functional.fa_linear(*leaves, **RULES[rule]).square().sum().backward()
        results.append(gradients(leaves))
    for ours, composed, exact in zip(*results, strict=True):
        assert_near(ours, composed, exact)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break(compiler):
    layer = pyfeedback.nn.Conv2d(16, 16, 1, rule="ia", device=DEVICE)
    x = torch.randn(2, 16, 3, 3, device=DEVICE)
    grads = []
    for model in (layer, torch.compile(layer, fullgraph=True, backend=compiler)):
        layer.zero_grad()
        with pyfeedback.backend("triton"):
            model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


# What "auto" takes


def test_fused_and_unfused_launches_agree(monkeypatch):
    """What backend("triton") computes in one launch, backend("triton-unfused") computes in several."""
    launched = record_launches(monkeypatch)
    case = CASES[next(number for number in CASES if number % len(RULES) == 0)]
    tensors = conv_tensors(case, 0, torch.float32)
    results = [backward(name, case, tensors, RULES["wm"]) for name in ("triton-unfused", "composite")]
    assert launched
    assert {*names(launched)} <= {"wgrad", "dgrad"}
    oracle = backward("composite", case, fresh(tensors, torch.float64), RULES["wm"])
    for ours, composed, exact in zip(*results, oracle, strict=True):
        assert_near(ours, composed, exact)
    launched.clear()
    backward("triton", case, tensors, RULES["wm"])
    assert {*names(launched)} & {"joint", "pointwise"}


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match='backend is "triton", expected a GPU, or TRITON_INTERPRET=1'):
        pyfeedback.set_backend("triton")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match='backend is "triton", expected triton to be installed'):
        pyfeedback.set_backend("triton")
    assert pyfeedback.current_backend() == "auto"
