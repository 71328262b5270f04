"""The backward of a layer from the Triton kernels, against the composition and float64."""

import itertools

import pytest
import torch
import triton_cases
from cases import RULES
from pyfeedback.forms import Coefficients, Form, Problem, Window, choose_form
from triton_cases import DEVICE, Case, assert_near, inner, layer

from pyfeedback.kernels import ops
from pyfeedback.kernels import rule as kernel_rule

pytestmark = triton_cases.MARKS


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    assert_margins = triton_cases.fill_memory_with_nan(monkeypatch)
    yield
    assert_margins()


LAYERS = {
    "3x2 stride 2 and 1": Case((3, 16, 5, 4), (17, 16, 3, 2), (2, 1), (1, 0), (1, 2)),
    "1x1": Case((3, 16, 3, 4), (24, 16, 1, 1)),
    "1x1 stride 2 and 3": Case((3, 24, 5, 4), (16, 24, 1, 1), (2, 3)),
}
FORMS = [form for form in Form if form is not Form.NONE]


def has_form(form: Form, case: Case, rule: dict) -> bool:
    """Whether the form computes the rule's data terms of this layer."""
    if case.weight[2:] != (1, 1) and form is not Form.DIRECT:
        return False
    return form is not Form.RESPONSE_MOMENT or bool(rule.get("null") and not rule.get("sparse"))


def run_conv2d(case: Case, rule: dict, form: Form, mask=(True,) * 4, dtype=torch.float32, laid_out=inner, respond=True):
    """Gradients of the kernels, and of the composition in the same dtype and in float64."""
    t = layer(case, dtype)
    x, w, b, dy = (laid_out(v).permute(0, 3, 1, 2) if laid_out else v for v in t[:4])
    y = torch.conv2d(x.double(), w.double(), None, *case.window).to(dtype) if respond else None
    window = Window(*case.window)
    coefficients = Coefficients(**rule)
    center = torch.ops.pyfeedback.center.default
    ours = ops.conv2d_backward(dy, x, w, b, y, window, coefficients, mask, form=form.value, center=center)
    for grad, like in zip(ours[:3], (x, w, w), strict=True):
        assert grad is None or grad.stride() == torch.zeros_like(like).stride()
    op = torch.ops.pyfeedback.fa_conv2d_backward
    expected = []
    for wide in (dtype, torch.float64):
        tensors = (v if v is None else v.to(wide) for v in (dy, x, w, b, y))
        expected.append(op(*tensors, *window, **rule, output_mask=mask))
    return ours, *expected


def assert_all_near(ours, composed, oracle):
    for mine, theirs, exact in zip(ours, composed, oracle, strict=True):
        assert (mine is None) == (exact is None)
        if exact is not None:
            assert_near(mine, theirs, exact)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_conv2d_backward(name, rule):
    case = LAYERS[name]
    for form in FORMS if any(RULES[rule].get(p) for p in ("amp", "null", "sparse")) else [Form.NONE]:
        if form is Form.NONE or has_form(form, case, RULES[rule]):
            assert_all_near(*run_conv2d(case, RULES[rule], form))


@pytest.mark.parametrize("rule", ["wm-centered", "ia", "aa", "kp", "everything"])
@pytest.mark.parametrize("name", ["3x2 stride 2 and 1", "1x1"])
def test_part_of_the_batch_without_a_response_in_another_layout(name, rule):
    form = Form.NONE if rule == "kp" else Form.DIRECT
    sampled = {**RULES[rule], "samples": 2}
    assert_all_near(*run_conv2d(LAYERS[name], sampled, form, laid_out=None, respond=False))
    if form is Form.DIRECT and name == "1x1":
        assert_all_near(*run_conv2d(LAYERS[name], sampled, Form.INPUT_MOMENT))


def test_second_moment_of_many_channels_is_launched_apart(monkeypatch):
    monkeypatch.setattr(kernel_rule, "MOMENT_JOINS", 8)
    for rule in ("ia", "everything"):
        assert_all_near(*run_conv2d(LAYERS["1x1"], RULES[rule], Form.INPUT_MOMENT))


@pytest.mark.parametrize("rule", ["fa", "kp", "ia", "aa"])
def test_masks(rule):
    """What is not asked for is not launched, and what waits for it comes all the same."""
    case = LAYERS["1x1"]
    form = Form.NONE if rule in ("fa", "kp") else Form.DIRECT
    for mask in itertools.product((True, False), repeat=3):
        assert_all_near(*run_conv2d(case, RULES[rule], form, (*mask, False)))


def test_conv2d_backward_in_float16():
    for rule in ("wm", "ia", "aa"):
        assert_all_near(*run_conv2d(LAYERS["1x1"], RULES[rule], Form.DIRECT, dtype=torch.float16))


@pytest.mark.parametrize("rule", RULES)
def test_linear_backward(rule):
    torch.manual_seed(0)
    x, w, b, dy = (torch.randn(s, device=DEVICE) for s in ((3, 5, 16), (24, 16), (24, 16), (3, 5, 24)))
    named, mask = RULES[rule], (True,) * 4
    problem = Problem(15, 16, 24)
    form = choose_form(problem, Coefficients(**named), False)
    center = torch.ops.pyfeedback.center.default
    ours = ops.linear_backward(dy, x, w, b, None, Coefficients(**named), mask, form=form.value, center=center)
    op = torch.ops.pyfeedback.fa_linear_backward
    composed = op(dy, x, w, b, None, **named, output_mask=mask)
    assert_all_near(ours, composed, op(*(t.double() for t in (dy, x, w, b)), None, **named, output_mask=mask))


def test_launches_are_shared(monkeypatch):
    """Weight mirror is one launch and dx, information alignment two, of which one holds dx."""
    counted = []
    monkeypatch.setattr(kernel_rule, "choose_joint", lambda *a: None)  # as if the layer were large
    for name in ("launch_wgrad", "launch_dgrad"):
        real = getattr(kernel_rule, name)
        monkeypatch.setattr(
            kernel_rule, name, lambda *a, real=real, name=name, **k: (counted.append(name), real(*a, **k))
        )
    for rule, wgrads in (("wm", 1), ("kp", 1), ("sa", 1), ("aa", 1), ("ia", 2)):
        counted.clear()
        run_conv2d(LAYERS["1x1"], RULES[rule], Form.NONE if rule in ("kp", "sa") else Form.DIRECT)
        assert sorted(counted) == ["launch_dgrad", *["launch_wgrad"] * wgrads], rule


def test_layers_that_the_kernels_take():
    x, w = torch.zeros(2, 16, 4, 4, device=DEVICE), torch.zeros(16, 16, 3, 3, device=DEVICE)
    assert ops.takes(x, w)
    assert not ops.takes(x, w, groups=2)
    assert not ops.takes(x.double(), w.double())
    assert not ops.takes(x[:0], w)
    assert not ops.takes(x[:, :3], w[:, :3])
