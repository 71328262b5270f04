"""float16 in the Triton kernels: sums and intermediates that exceed 65504 where the gradient itself does not."""

import pytest
import torch
import triton_cases
from cases import norm_error, percentile
from triton_cases import DEVICE, Case, data_terms, layer_backward, one_pass, products, record_launches

from pyfeedback.core.algorithm import Algorithm
from pyfeedback.kernels import dgrad, wgrad
from pyfeedback.kernels.backward import unit_of
from pyfeedback.kernels.tiles import DgradTile, PointwiseTile, WgradTile

pytestmark = triton_cases.MARKS
uninitialized_memory_is_nan = triton_cases.uninitialized_memory_is_nan

LARGEST = torch.finfo(torch.float16).max
RULES = {
    "wm": {"amp": 0.7},
    "ia": {"amp": 0.3, "null": 0.5},
    "aa": {"amp": 0.5, "sparse": 0.5},
    "all three": {"amp": 0.4, "null": 0.5, "sparse": 0.6},
}
POINTWISE = Case((4, 6, 2, 4), (7, 6, 1, 1))
WINDOW = Case((3, 5, 3, 2), (6, 5, 2, 1), (1, 1), (1, 0))
COEFFICIENT = 1e-6  # of every term
SHRUNK = 2.0**-10  # activations that the composition in float16 can take


def scaled(terms: dict, factor: float) -> dict:
    return {name: value if name == "center" else value * factor for name, value in terms.items()}


def draw(case: Case, seed: int):
    """x, W, B and the response: large activations, and a feedback weight beside which W is small."""
    generator = torch.Generator().manual_seed(seed)
    g = case.geometry
    sizes = (case.input, case.weight, case.weight, (g.N, g.K, g.P, g.Q))
    factors = (2000, 0.01, 20, 2000)
    return [(torch.randn(s, generator=generator) * f).half().to(DEVICE) for s, f in zip(sizes, factors, strict=True)]


@pytest.mark.parametrize(
    ("launches", "case", "rule", "algorithm", "over"),
    [
        ("one pass", POINTWISE, "wm", Algorithm.DIRECT, "sum"),
        ("one pass", POINTWISE, "ia", Algorithm.DIRECT, "z"),
        ("one pass", POINTWISE, "aa", Algorithm.DIRECT, "u"),
        ("joint", WINDOW, "ia", Algorithm.DIRECT, "z"),
        ("joint", POINTWISE, "ia", Algorithm.RESPONSE_GRAM, "sum"),
        ("unfused", POINTWISE, "ia", Algorithm.INPUT_GRAM, "sum"),
        ("unfused", WINDOW, "aa", Algorithm.DIRECT, "u"),
        ("unfused", POINTWISE, "all three", Algorithm.DIRECT, "z"),
    ],
)
def test_error_at_most_twice_pytorchs_on_activations_that_float16_can_take(
    launches, case, rule, algorithm, over, monkeypatch
):
    """Multiplying the activations by a power of two changes nothing but the exponent of what is to come out."""
    if launches == "one pass":
        one_pass(monkeypatch)
    terms = {**RULES[rule], "center": launches != "one pass"}
    ratios = []
    for seed in range(20):
        x, w, b, y = draw(case, seed)
        y = None if algorithm is Algorithm.INPUT_GRAM else y
        read = torch.conv2d(x, w, None, *case.window) if y is None else y
        u = torch.conv2d(x.double(), b.double(), None, *case.window)
        exceeds = {"sum": products(x, w, read, case)[1], "z": products(x, b, read, case)[0], "u": u}
        assert exceeds[over].abs().max() > LARGEST
        fused = launches != "unfused"
        ours = layer_backward(case, x, w, b, y, scaled(terms, COEFFICIENT), algorithm, fused)[2]
        exact = data_terms(case, x, w, b, y, scaled(terms, COEFFICIENT), torch.float64)
        assert exact.abs().max() < LARGEST
        plain = data_terms(case, x * SHRUNK, w, b, y if y is None else y * SHRUNK, terms, torch.float16)
        plain = plain.double() * (COEFFICIENT / SHRUNK**2)
        ratios.append(norm_error(ours, exact) / norm_error(plain, exact))
    assert percentile(ratios, 95) <= 2, ratios


@pytest.mark.parametrize("launches", ["one pass", "unfused"])
@pytest.mark.parametrize(("rule", "channels"), [("null", (2, 24)), ("sparse", (24, 2))])
def test_activations_at_the_edge_of_float16_that_align_with_the_feedback(rule, channels, launches, monkeypatch):
    """The largest intermediate that there is, of a kernel with a few long sums and many short ones."""
    if launches == "one pass":
        one_pass(monkeypatch)
    c, k = channels
    case = Case((2, c, 1, 3), (k, c, 1, 1))
    x, w, b, y = draw(case, 0)
    aligned = (b.sign() * 60000)[..., 0, 0]
    x[:] = aligned[0].view(1, c, 1, 1)
    y[:] = aligned[:, 0].view(1, k, 1, 1)
    terms = {rule: 1e-12}
    ours = layer_backward(case, x, w, b, y, terms, Algorithm.DIRECT, launches != "unfused", dy=y * 0)[2]
    exact = data_terms(case, x, w, b, y, terms, torch.float64)
    assert norm_error(ours, exact) <= 2 * norm_error(exact.half(), exact)


def large_tiles(monkeypatch, single: bool, samples: int):
    """Few steps for the interpreter, of a layer of real size."""
    tile = PointwiseTile(16, 16, samples, 1, 4, 2) if single else None
    record_launches(monkeypatch, choose_joint=lambda *_: None, choose_pointwise=lambda *_: tile)
    monkeypatch.setattr(wgrad, "choose_wgrad", lambda *_, **__: WgradTile(16, 16, 16, samples, 1, 4, 2))
    monkeypatch.setattr(dgrad, "choose_dgrad", lambda *_: DgradTile(8192, 16, 16, 4, 2))


@pytest.mark.parametrize(
    ("input", "single", "rule", "algorithm"),
    [
        ((8192, 8, 1, 13), True, "ia", Algorithm.DIRECT),
        ((8192, 8, 1, 13), False, "wm", Algorithm.DIRECT),
        ((4096, 4, 7, 7), True, "wm", Algorithm.INPUT_GRAM),
        ((4096, 4, 7, 7), False, "ia", Algorithm.DIRECT),
    ],
    ids=["linear", "linear unfused", "1x1", "1x1 unfused"],
)
def test_statistics_at_the_size_of_a_layer(input, single, rule, algorithm, monkeypatch):
    """The sums pass 65504 by far; what remains is one rounding of the result, and of z, which averages out."""
    large_tiles(monkeypatch, single, input[0])
    case = Case(input, (8, input[1], 1, 1))
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(input, generator=generator) + 1).half().to(DEVICE)
    w, b = (torch.randn(case.weight, generator=generator).half().to(DEVICE) / input[1] ** 0.5 for _ in range(2))
    y = None if algorithm is Algorithm.INPUT_GRAM else torch.conv2d(x.float(), w.float()).half()
    terms = {**scaled(RULES[rule], 1e-3 / (input[2] * input[3])), "center": True}
    nothing = torch.zeros(input[0], 8, *input[2:], dtype=torch.float16, device=DEVICE)
    mask = (single, single, True, False)
    ours = layer_backward(case, x, w, b, y, terms, algorithm, linear=input[2] == 1, mask=mask, dy=nothing)[2]
    exact = data_terms(case, x, w, b, y, terms, torch.float64)
    assert norm_error(ours, exact) <= 2 * norm_error(exact.half(), exact)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's, as dW is written
@pytest.mark.parametrize("samples", [0, 2])
def test_a_tie_to_a_gradient_of_the_weight_that_is_infinite(samples):
    """The term is finite: it is not made of the rounded gradient."""
    case = POINTWISE
    x, w, b, y = draw(case, 0)
    dy = torch.full_like(y, 2000)
    terms = {"amp": COEFFICIENT, "tie": COEFFICIENT, "samples": samples}
    for algorithm in (Algorithm.DIRECT, Algorithm.INPUT_GRAM):
        _, grad_weight, grad_feedback, _ = layer_backward(case, x, w, b, y, terms, algorithm, dy=dy)
        read = y if algorithm is Algorithm.DIRECT else None
        exact = products(x, w, dy, case)[1]
        assert grad_weight.dtype == grad_feedback.dtype == torch.float16
        assert torch.equal(grad_weight, exact.half())
        assert grad_weight.isinf().any()
        exact = data_terms(case, x, w, b, read, terms, torch.float64) + COEFFICIENT * exact
        assert norm_error(grad_feedback, exact) <= 2 * norm_error(exact.half(), exact)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("dim", [0, 1])
def test_in_its_unit_a_response_fits(dim, scale):
    """Whatever the signs of the activations are."""
    kernel = torch.randn(6, 5, 3, 2, generator=torch.Generator().manual_seed(0)) * scale
    unit = unit_of(kernel, dim)
    assert (unit.shape, unit.dtype, unit.log2().frac().item()) == ((1,), torch.float32, 0)
    sums = kernel.abs().transpose(0, dim).flatten(1).sum(1)
    most = sums.max() + (2 if dim == 1 else 0)
    assert unit / 2 < most <= unit
    assert unit_of(torch.zeros(6, 5), 0) > 0
