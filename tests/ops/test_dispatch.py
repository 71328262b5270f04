"""How the backward of a layer is planned: once, for its device, its backend and the coefficients they implement."""

import pytest
import torch

import pyfeedback
from pyfeedback import functional, nn
from pyfeedback.backends import dispatch
from pyfeedback.backends.extension import loading
from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.coefficients import COEFFICIENTS, Coefficients, Primitives
from pyfeedback.core.geometry import LINEAR, Convolution, from_arguments, to_arguments

ALL = (True, True, True, True)
X, W = torch.randn(2, 8, 6, 6), torch.randn(8, 1, 3, 3)


@pytest.fixture
def fresh_choices():
    """Choices are kept: what a test replaces is seen after this, and forgotten at its end."""
    dispatch.set_backend("auto")
    yield
    dispatch.set_backend("auto")


def missing(monkeypatch, name, coefficient):
    """The backend ``name`` without a coefficient."""
    backend = dispatch._LAYER_BACKENDS[name]
    less = backend._replace(implemented=backend.implemented - {coefficient})
    monkeypatch.setitem(dispatch._LAYER_BACKENDS, name, less)


def test_both_tables_have_the_same_coefficients():
    assert Coefficients._fields == (*COEFFICIENTS, "center", "samples", "normalize")
    assert all(getattr(Primitives(), name) == Coefficients._field_defaults[name] == 0.0 for name in COEFFICIENTS)


def test_every_backend_implements_every_coefficient():
    for name, backend in dispatch._LAYER_BACKENDS.items():
        assert backend.implemented - {"normalize"} == {*COEFFICIENTS}, name
        assert ("normalize" in backend.implemented) == (name in ("composite", "im2col"))


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_a_coefficient_that_no_backend_implements_is_refused(monkeypatch, fresh_choices, coefficient):
    for name in ("composite", "dense"):
        missing(monkeypatch, name, coefficient)
    geometry, rule = Convolution(), Coefficients(**{coefficient: 0.5})
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 2, 2)
    with pytest.raises(NotImplementedError, match=f"^{coefficient} is 0.5, expected 0: no backend"):
        dispatch.plan(geometry, x, w, rule, ALL, False)
    with pytest.raises(NotImplementedError, match=f"^{coefficient} is 0.5"):
        functional.fa_conv2d(x, w, w.clone().requires_grad_(), **{coefficient: 0.5})
    others = Coefficients(**{name: 0.5 for name in COEFFICIENTS if name != coefficient})
    assert dispatch.plan(geometry, x, w, others, ALL, False)


@pytest.mark.skipif(not pyfeedback.build_info().cpu, reason="the CPU library is not built")
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_a_layer_with_a_coefficient_that_a_backend_does_not_implement_is_composed(
    monkeypatch, fresh_choices, coefficient
):
    missing(monkeypatch, "extension", coefficient)
    geometry = Convolution(groups=8)
    compiled, composed = (dispatch._LAYER_BACKENDS[name].backward for name in ("extension", "composite"))
    for name in COEFFICIENTS:
        call = dispatch.plan(geometry, X, W, Coefficients(**{name: 0.5}), ALL, False, "extension")
        assert call.chosen.backward is (composed if name == coefficient else compiled)


def test_the_algorithm_is_chosen_once_for_a_layer(monkeypatch):
    """By the forward pass of the first step; the backward pass and later steps reuse it."""
    chosen = []
    choose = dispatch.choose_algorithm
    monkeypatch.setattr(dispatch, "choose_algorithm", lambda *a: (chosen.append(a), choose(*a))[1])
    dispatch._cached_algorithm.cache_clear()
    layer, x = nn.Conv2d(5, 7, 3, rule="ia"), torch.randn(2, 5, 6, 6)
    for _ in range(3):
        layer(x).sum().backward()
        layer.zero_grad()
    assert len(chosen) == 1
    layer(x[:1]).sum().backward()
    assert len(chosen) == 2


def test_what_a_plan_decides():
    x, w = torch.randn(4, 64, 8, 8), torch.randn(256, 64, 1, 1)
    ia = Coefficients(amp=1.0, null=1.0)
    assert dispatch.plan(Convolution(), x, w, ia, ALL, True).algorithm is Algorithm.INPUT_GRAM
    plan = dispatch.plan(Convolution(), x, torch.randn(9, 64, 3, 3), ia, ALL, True)
    assert plan.algorithm is Algorithm.DIRECT
    assert plan.reads_response
    frozen = dispatch.plan(Convolution(), x, w, ia, (True, True, False, True), True)
    assert frozen.algorithm is Algorithm.NONE
    assert not frozen.reads_response
    assert dispatch.plan(Convolution(), x[:0], w, ia, ALL, True).algorithm is Algorithm.NONE
    linear = dispatch.plan(LINEAR, torch.randn(4, 3), torch.randn(5, 3), Coefficients(tie=1.0), ALL, True)
    assert linear.algorithm is Algorithm.NONE


def test_geometries_as_arguments():
    for geometry in (LINEAR, Convolution(), Convolution((2,), (1,), (1,), True, (1,), 3)):
        arguments = to_arguments(geometry)
        assert len(arguments) == 6
        assert from_arguments(*(list(a) if isinstance(a, tuple) else a for a in arguments)) == geometry


OLD_NAMES = [("aten", "composite"), ("native", "extension"), ("triton-apart", "triton-unfused")]


@pytest.mark.parametrize(("old", "new"), OLD_NAMES)
def test_an_old_name_of_a_backend_warns(monkeypatch, old, new):
    if new == "extension" and not loading.has_cpu():
        pytest.skip("the CPU library is not built")
    if new.startswith("triton"):
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.warns(DeprecationWarning, match=f'^backend "{old}" is now "{new}"; the old name') as warned:
        pyfeedback.set_backend(old)
    assert pyfeedback.current_backend() == new
    pyfeedback.set_backend("auto")
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=warned[0].message.args[0]) as warned, pyfeedback.backend(old):
        assert pyfeedback.current_backend() == new
    assert warned[0].filename == __file__
