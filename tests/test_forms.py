"""The choice of the algebraic form is the cheapest by operation count, and every form computes the same result."""

import itertools

import pytest
import torch
from cases import RULES, largest_error

from pyfeedback import functional, rule
from pyfeedback.aten import backward
from pyfeedback.forms import Coefficients, Form, Problem, Window, choose_form, needs_response

WM, IA, AA = (rule(name).coefficients(64, 1) for name in ("wm", "ia", "aa"))
POSITIONS = 32 * 28 * 28


@pytest.mark.parametrize(
    ("coefficients", "c", "k", "form"),
    [
        (WM, 64, 256, Form.INPUT_MOMENT),
        (WM, 256, 64, Form.DIRECT),
        (IA, 64, 256, Form.INPUT_MOMENT),
        (IA, 128, 128, Form.INPUT_MOMENT),
        (IA, 256, 64, Form.RESPONSE_MOMENT),
        (AA, 64, 256, Form.INPUT_MOMENT),
        (AA, 256, 192, Form.INPUT_MOMENT),
        (AA, 512, 128, Form.DIRECT),
        (Coefficients(decay=1.0, self_=1.0, tie=1.0), 64, 64, Form.NONE),
    ],
)
def test_choice_of_pointwise_layers(coefficients, c, k, form):
    assert choose_form(Problem(POSITIONS, c, k), coefficients, True) is form


def test_moments_are_for_dense_pointwise_layers():
    for problem in (
        Problem(POSITIONS, 64, 256, taps=9, pointwise=False),
        Problem(POSITIONS, 64, 256, groups=2),
        Problem(16, 4096, 4096),  # fewer positions than channels: the Gram matrix costs more than the layer
    ):
        assert all(choose_form(problem, r, True) is Form.DIRECT for r in (WM, IA, AA))


def test_a_response_to_be_computed_again_counts():
    problem = Problem(POSITIONS, 256, 192)
    assert choose_form(problem, WM, True) is Form.DIRECT
    assert choose_form(problem, WM, False) is Form.INPUT_MOMENT


def test_needs_response():
    assert needs_response(Form.DIRECT, WM)
    assert needs_response(Form.DIRECT, IA)
    assert not needs_response(Form.DIRECT, AA)
    assert not needs_response(Form.INPUT_MOMENT, IA)
    assert needs_response(Form.RESPONSE_MOMENT, IA)


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if set(r) & {"amp", "null", "sparse"}])
@pytest.mark.parametrize("layer", ["conv", "strided conv", "linear"])
def test_every_form_computes_the_same(layer, name, monkeypatch):
    torch.manual_seed(0)
    coefficients = RULES[name]
    conv = layer != "linear"
    x = torch.randn(*((3, 6, 7, 5) if conv else (3, 4, 6)), dtype=torch.float64)
    w, b = (torch.randn(4, 6, *((1, 1) if conv else ()), dtype=torch.float64, requires_grad=True) for _ in range(2))
    grads = {}
    for form in (Form.DIRECT, Form.INPUT_MOMENT, Form.RESPONSE_MOMENT):
        if form is Form.RESPONSE_MOMENT and ("sparse" in coefficients or "null" not in coefficients):
            continue
        monkeypatch.setattr(backward, "choose_form", lambda *args, form=form: form)
        if conv:
            output = functional.fa_conv2d(x, w, b, stride=2 if layer == "strided conv" else 1, **coefficients)
        else:
            output = functional.fa_linear(x, w, b, **coefficients)
        (grads[form],) = torch.autograd.grad(output, b, torch.ones_like(output))
    assert len(grads) >= 2
    for first, second in itertools.combinations(grads.values(), 2):
        assert largest_error([first], [second]) < 1e-12


@pytest.mark.parametrize("name", ["wm", "ia", "aa"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_response_is_saved_only_where_it_is_read(name, bias):
    """A layer with a bias recomputes its response, so an in-place activation may follow it."""
    saved = []

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    x, offset = torch.randn(2, 4, 8, 8), torch.randn(6) if bias else None
    w, b = (torch.randn(6, 4, 3, 3, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.fa_conv2d(x, w, b, offset, **rule(name).coefficients(2, 1)._asdict())
    assert ((2, 6, 6, 6) in saved) == (not bias and name != "aa")


def test_output_shape_is_torchs():
    for stride, padding, dilation, kernel in itertools.product((1, 2, 3), (0, 1, 2), (1, 2), (1, 2, 3)):
        window = Window((stride, 1), (padding, 0), (dilation, 1))
        x, w = torch.randn(2, 3, 9, 8), torch.randn(4, 3, kernel, 3)
        assert window.output_shape(x.shape, w.shape) == torch.conv2d(x, w, None, *window).shape
