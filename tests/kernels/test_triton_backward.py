"""The backward of a layer from the Triton kernels, against the composition and float64."""

import itertools
from typing import NamedTuple

import pytest
import torch
import triton_cases
from cases import RULES
from triton_cases import DEVICE, Case, names, record_launches
from triton_layers import ALGORITHMS, LAYERS, assert_all_near, has_algorithm, run_conv2d

import pyfeedback
from pyfeedback.core.algorithm import Algorithm, Sizes, choose_algorithm
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.kernels import backward, handles
from pyfeedback.testing import python_calls

pytestmark = triton_cases.MARKS
uninitialized_memory_is_nan = triton_cases.uninitialized_memory_is_nan


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_conv2d_backward(name, rule):
    case = LAYERS[name]
    for algorithm in ALGORITHMS if any(RULES[rule].get(p) for p in ("amp", "null", "sparse")) else [Algorithm.NONE]:
        if algorithm is Algorithm.NONE or has_algorithm(algorithm, case, RULES[rule]):
            assert_all_near(*run_conv2d(case, RULES[rule], algorithm))


@pytest.mark.parametrize("rule", ["wm-centered", "ia", "aa", "kp", "everything"])
@pytest.mark.parametrize("name", ["3x2 stride 2 and 1", "1x1"])
def test_part_of_the_batch_without_a_response_in_another_layout(name, rule):
    algorithm = Algorithm.NONE if rule == "kp" else Algorithm.DIRECT
    sampled = {**RULES[rule], "samples": 2}
    assert_all_near(*run_conv2d(LAYERS[name], sampled, algorithm, laid_out=None, respond=False))
    if algorithm is Algorithm.DIRECT and name == "1x1":
        assert_all_near(*run_conv2d(LAYERS[name], sampled, Algorithm.INPUT_GRAM))


@pytest.mark.parametrize("rule", ["fa", "wm-centered", "ia", "everything"])
def test_strided_pointwise_layer(monkeypatch, rule):
    """A launch of dx alone also writes the zeros of the positions that are not read."""
    launched = record_launches(monkeypatch, choose_joint=lambda *_: None, choose_pointwise=lambda *_: None)
    for mask in ((True,) * 4, (True, False, True, False), (True, False, False, False)):
        for algorithm in (Algorithm.NONE,) if rule == "fa" else (Algorithm.DIRECT, Algorithm.INPUT_GRAM):
            launched.clear()
            assert_all_near(*run_conv2d(LAYERS["1x1 stride 2 and 3"], RULES[rule], algorithm, mask))
            apart = [launch for launch in launched if launch.products == ("dx",)]
            assert all(launch.constants["GEO"].stride == (2, 3) for launch in apart)
            assert apart or algorithm is Algorithm.DIRECT


def test_gram_of_many_channels_is_launched_alone(monkeypatch):
    launched = record_launches(monkeypatch, SHARED_GRAM_CHANNELS=8)
    for rule in ("ia", "everything"):
        assert_all_near(*run_conv2d(LAYERS["1x1"], RULES[rule], Algorithm.INPUT_GRAM))
        assert launched.pop(0).products == ("gram",)
        launched.clear()


@pytest.mark.parametrize("rule", ["fa", "kp", "ia", "aa", "null"])
def test_masks(rule):
    """What is not asked for is not launched, and what it would have been computed with is."""
    case = LAYERS["1x1"]
    algorithm = Algorithm.NONE if rule in ("fa", "kp") else Algorithm.DIRECT
    for mask in itertools.product((True, False), repeat=3):
        assert_all_near(*run_conv2d(case, RULES[rule], algorithm, (*mask, False)))


def test_conv2d_backward_in_float16():
    for rule in ("wm", "ia", "aa"):
        assert_all_near(*run_conv2d(LAYERS["1x1"], RULES[rule], Algorithm.DIRECT, dtype=torch.float16))


@pytest.mark.parametrize("rule", RULES)
def test_linear_backward(rule):
    torch.manual_seed(0)
    x, w, b, dy = (torch.randn(s, device=DEVICE) for s in ((3, 5, 16), (24, 16), (24, 16), (3, 5, 24)))
    named, mask = RULES[rule], (True,) * 4
    problem = Sizes(15, 16, 24)
    algorithm = choose_algorithm(problem, Coefficients(**named), False)
    options = {"rule": Coefficients(**named), "mask": mask, "algorithm": algorithm.value}
    options["center"] = torch.ops.pyfeedback.center.default
    ours = backward.layer_backward(dy, x, w, b, None, convolution=None, **options)
    op = torch.ops.pyfeedback.fa_linear_backward
    composed = op(dy, x, w, b, None, **named, output_mask=mask)
    assert_all_near(ours, composed, op(*(t.double() for t in (dy, x, w, b)), None, **named, output_mask=mask))


def test_launches_are_shared(monkeypatch):
    """Weight mirror is one launch and dx, information alignment two, of which one holds dx."""
    launched = record_launches(monkeypatch, choose_joint=lambda *_: None)  # as if the layer were large
    for rule, wgrads in (("wm", 1), ("kp", 1), ("sa", 1), ("aa", 1), ("ia", 2)):
        launched.clear()
        run_conv2d(LAYERS["1x1"], RULES[rule], Algorithm.NONE if rule in ("kp", "sa") else Algorithm.DIRECT)
        assert sorted(names(launched)) == ["dgrad", *["wgrad"] * wgrads], rule


def test_layers_that_the_kernels_support():
    x, w = torch.zeros(2, 16, 4, 4, device=DEVICE), torch.zeros(16, 16, 3, 3, device=DEVICE)
    assert backward.supports(x, w)
    assert not backward.supports(x, w, groups=2)
    assert not backward.supports(x.double(), w.double())
    assert not backward.supports(x[:0], w)
    assert not backward.supports(x[:, :3], w[:, :3])
    assert not backward.supports(x, w[:1, :1, 0, 0].expand(2**16, 2**15))  # offsets into the weight are int32


class ExtendedRule(NamedTuple):
    """A rule with a coefficient of its own, and a name."""

    decay: float = 0.3
    amp: float = 0.4
    null: float = 0.0
    sparse: float = 0.0
    self_: float = 0.0
    tie: float = 0.0
    center: bool = False
    samples: int = 0
    growth: float = 0.0
    name: str = "extended"


def test_a_coefficient_that_the_kernels_do_not_implement_is_refused():
    x, dy, w, b = (torch.ones(s, device=DEVICE) for s in ((3, 16), (3, 24), (24, 16), (24, 16)))

    def run(rule, mask=(True,) * 4, algorithm="direct"):
        options = {"rule": rule, "mask": mask, "algorithm": algorithm, "center": None}
        return backward.layer_backward(dy, x, w, b, dy, convolution=None, **options)

    assert run(ExtendedRule())[2] is not None
    with pytest.raises(ValueError, match=r"^rule.growth is not 0, expected 0: the Triton kernels do not "):
        run(ExtendedRule(growth=1e-3))
    assert run(ExtendedRule(growth=1e-3), (True, True, False, True), "none")[2] is None  # nothing is computed of it


def test_each_backward_has_a_workspace_of_its_own(monkeypatch):
    """A tensor that is kept may be in the memory pool of a CUDA graph, which gives its memory to others."""
    made, real = [], handles.workspace

    def workspace(*args):
        found = real(*args)
        made.extend(found.values())
        return found

    monkeypatch.setattr(handles, "workspace", workspace)
    launched = record_launches(monkeypatch, choose_joint=lambda *_: None)
    for _ in range(2):
        run_conv2d(Case((2, 16, 9, 9), (16, 16, 3, 3), padding=(1, 1)), {"amp": 1.0}, Algorithm.DIRECT)
    assert launched[0].finish
    assert len({t.data_ptr() for t in made}) == len(made) == 2


def test_host_calls_of_a_layer(monkeypatch):
    """The plan is cached: a step prepares operands and launches kernels, in few calls of Python functions."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    real = handles.start
    monkeypatch.setattr(
        handles, "start", lambda launch, *rest: real(launch._replace(kernel={launch.grid: lambda **_: None}), *rest)
    )
    layer = pyfeedback.nn.Conv2d(16, 16, 3, padding=1, bias=False, rule="ia", device=DEVICE)
    x = torch.randn(4, 16, 5, 5, device=DEVICE, requires_grad=True)
    outputs = []
    with pyfeedback.backend("triton"):
        layer(x).sum().backward()
        forward = python_calls(lambda: outputs.append(layer(x)))
    gradient = torch.ones_like(outputs[0])
    calls = python_calls(lambda: outputs[0].backward(gradient))
    assert calls.count("kernels/launch.py start") == 2
    assert len(forward) <= 14, forward
    assert len(calls) <= 40, calls
