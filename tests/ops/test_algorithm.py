"""The cheapest algorithm by operation count is chosen, and every algorithm computes the same result."""

import itertools

import pytest
import torch
from cases import RULES, largest_error

import pyfeedback
from pyfeedback import functional, rule
from pyfeedback.backends import dispatch
from pyfeedback.backends.composite import layer
from pyfeedback.core.algorithm import Algorithm, Sizes, choose_algorithm, needs_response
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Convolution

WM, IA, AA = (rule(name).coefficients(64, 1) for name in ("wm", "ia", "aa"))
POSITIONS = 32 * 28 * 28


@pytest.mark.parametrize(
    ("coefficients", "c", "k", "algorithm"),
    [
        (WM, 64, 256, Algorithm.INPUT_GRAM),
        (WM, 256, 64, Algorithm.DIRECT),
        (IA, 64, 256, Algorithm.INPUT_GRAM),
        (IA, 128, 128, Algorithm.INPUT_GRAM),
        (IA, 256, 64, Algorithm.RESPONSE_GRAM),
        (AA, 64, 256, Algorithm.INPUT_GRAM),
        (AA, 256, 192, Algorithm.INPUT_GRAM),
        (AA, 512, 128, Algorithm.DIRECT),
        (Coefficients(decay=1.0, self_=1.0, tie=1.0), 64, 64, Algorithm.NONE),
    ],
)
def test_choice_of_pointwise_layers(coefficients, c, k, algorithm):
    assert choose_algorithm(Sizes(POSITIONS, c, k), coefficients, True) is algorithm


def test_grams_are_for_dense_pointwise_layers():
    for sizes in (
        Sizes(POSITIONS, 64, 256, taps=9, pointwise=False),
        Sizes(POSITIONS, 64, 256, groups=2),
        Sizes(16, 4096, 4096),  # fewer positions than channels: the gram matrix costs more than the layer
    ):
        assert all(choose_algorithm(sizes, r, True) is Algorithm.DIRECT for r in (WM, IA, AA))


def test_a_response_to_be_computed_again_counts():
    sizes = Sizes(POSITIONS, 256, 192)
    assert choose_algorithm(sizes, WM, True) is Algorithm.DIRECT
    assert choose_algorithm(sizes, WM, False) is Algorithm.INPUT_GRAM


def test_needs_response():
    assert needs_response(Algorithm.DIRECT, WM)
    assert needs_response(Algorithm.DIRECT, IA)
    assert not needs_response(Algorithm.DIRECT, AA)
    assert not needs_response(Algorithm.INPUT_GRAM, IA)
    assert needs_response(Algorithm.RESPONSE_GRAM, IA)


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if set(r) & {"amp", "null", "sparse"}])
@pytest.mark.parametrize("layer", ["conv", "strided conv", "linear"])
def test_every_algorithm_computes_the_same(layer, name, monkeypatch):
    torch.manual_seed(0)
    coefficients = RULES[name]
    conv = layer != "linear"
    x = torch.randn(*((3, 6, 7, 5) if conv else (3, 4, 6)), dtype=torch.float64)
    w, b = (torch.randn(4, 6, *((1, 1) if conv else ()), dtype=torch.float64, requires_grad=True) for _ in range(2))
    grads = {}
    for algorithm in (Algorithm.DIRECT, Algorithm.INPUT_GRAM, Algorithm.RESPONSE_GRAM):
        if algorithm is Algorithm.RESPONSE_GRAM and ("sparse" in coefficients or "null" not in coefficients):
            continue
        chosen = algorithm, needs_response(algorithm, Coefficients(**coefficients))
        monkeypatch.setattr(dispatch, "_cached_algorithm", lambda *args, chosen=chosen: chosen)
        if conv:
            output = functional.fa_conv2d(x, w, b, stride=2 if layer == "strided conv" else 1, **coefficients)
        else:
            output = functional.fa_linear(x, w, b, **coefficients)
        (grads[algorithm],) = torch.autograd.grad(output, b, torch.ones_like(output))
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
    with pyfeedback.backend("composite"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.fa_conv2d(x, w, b, offset, **rule(name).coefficients(2, 1)._asdict())
    assert ((2, 6, 6, 6) in saved) == (not bias and name != "aa")


def test_output_shape_is_torchs():
    for stride, padding, dilation, kernel in itertools.product((1, 2, 3), (0, 1, 2), (1, 2), (1, 2, 3)):
        geometry = Convolution((stride, 1), (padding, 0), (dilation, 1))
        x, w = torch.randn(2, 3, 9, 8), torch.randn(4, 3, kernel, 3)
        assert geometry.output_shape(x.shape, w.shape) == torch.conv2d(x, w, None, *geometry[:3]).shape


@pytest.mark.parametrize("terms", [{"sparse": 0.3, "amp": 0.3}, {"sparse": 0.3, "amp": 0.2, "null": 0.1}])
@pytest.mark.parametrize("center", [False, True])
def test_a_large_kernel_is_combined_in_blocks(terms, center, monkeypatch):
    """The gradient is the same, with blocks of three of ten outputs."""
    assert choose_algorithm(Sizes(2, 7, 10), Coefficients(**terms), True) is Algorithm.DIRECT
    generator = torch.Generator().manual_seed(0)
    x, weight, feedback = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 1, 7), (10, 7), (10, 7))
    )
    feedback.requires_grad_()
    found = []
    for block in (layer.KERNEL_BLOCK, 25):
        monkeypatch.setattr(layer, "KERNEL_BLOCK", block)
        functional.fa_linear(x, weight, feedback, **terms, center=center).sum().backward()
        found.append(feedback.grad)
        feedback.grad = None
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
