"""Centered rules from the Triton kernels where the mean is large beside the spread."""

import pytest
import torch
import triton_cases
from cases import norm_error, percentile
from triton_cases import (
    Case,
    assert_near,
    bfloat16_products,
    data_terms,
    layer_backward,
    one_pass,
    target,
    terms_in_one_pass,
)

from pyfeedback.core.algorithm import Algorithm
from pyfeedback.kernels.geometry import Geometry
from pyfeedback.kernels.tiles import choose_joint, choose_pointwise, choose_wgrad

pytestmark = triton_cases.MARKS
uninitialized_memory_is_nan = triton_cases.uninitialized_memory_is_nan

RULES = {
    "wm": {"amp": 0.7},
    "ia": {"amp": 0.3, "null": 0.5},
    "ia, amp above null": {"amp": 0.6, "null": 0.4},
    "aa": {"amp": 0.5, "sparse": 0.5},
    "all three": {"amp": 0.4, "null": 0.5, "sparse": 0.6},
}
LAYERS = {
    "1x1": Case((5, 6, 2, 3), (7, 6, 1, 1)),
    "1x1 strided": Case((4, 6, 3, 4), (7, 6, 1, 1), (2, 3)),
    "2x1": Case((4, 5, 2, 2), (6, 5, 2, 1), (1, 1), (1, 0)),
    "linear": Case((5, 6, 1, 4), (7, 6, 1, 1)),
}
# Launches: the layers, rules and forms that take them.
COVERED = {
    "one pass": [
        ("1x1", "wm", Algorithm.DIRECT),
        ("linear", "ia", Algorithm.DIRECT),
        ("1x1 strided", "ia, amp above null", Algorithm.INPUT_GRAM),
    ],
    "joint": [
        ("2x1", "wm", Algorithm.DIRECT),
        ("2x1", "ia", Algorithm.DIRECT),
        ("1x1", "aa", Algorithm.DIRECT),
        ("1x1", "ia, amp above null", Algorithm.RESPONSE_GRAM),
    ],
    "unfused": [("linear", "ia, amp above null", Algorithm.INPUT_GRAM), ("1x1", "all three", Algorithm.DIRECT)],
}
MEANS = (0, 1, 30, 1000)
SEEDS = range(5)  # for each mean


def draw(case: Case, algorithm: Algorithm, mean: float, seed: int, dtype):
    """Activations, kernels and the response, which need not be the layer's where it is read: it then has no rounding
    of its own at the size of the mean."""
    generator = torch.Generator().manual_seed(seed)
    g = case.geometry
    x = torch.randn(case.input, generator=generator) + mean
    w, b = (torch.randn(case.weight, generator=generator) for _ in range(2))
    y = torch.randn(g.N, g.K, g.P, g.Q, generator=generator) + mean
    x, w, b, y = (t.to(triton_cases.DEVICE, dtype) for t in (x, w, b, y))
    return x, w, b, None if algorithm is Algorithm.INPUT_GRAM else y


def error_ratios(name: str, rule: dict, algorithm: Algorithm, dtype=torch.float32, fused=True, samples=0):
    """Of every mean and seed: our error to that of composing with both factors centered, beyond a quarter of a unit."""
    case, ratios = LAYERS[name], []
    for mean in MEANS:
        for seed in SEEDS:
            x, w, b, y = draw(case, algorithm, mean, seed, dtype)
            terms = {**rule, "center": True, "samples": samples}
            ours = layer_backward(case, x, w, b, y, terms, algorithm, fused, linear=name == "linear")[2]
            plain, exact = (data_terms(case, x, w, b, y, terms, wide) for wide in (dtype, torch.float64))
            ratios.append(norm_error(ours, exact) / (norm_error(plain, exact) + torch.finfo(dtype).eps / 4))
    assert len(ratios) >= 20
    return ratios


@pytest.mark.parametrize(("launches", "case"), [(name, case) for name in COVERED for case in COVERED[name]], ids=str)
def test_error_at_most_four_times_that_of_centering_both_factors(launches, case, monkeypatch):
    name, rule, algorithm = case
    launched = one_pass(monkeypatch) if launches == "one pass" else None
    ratios = error_ratios(name, RULES[rule], algorithm, fused=launches != "unfused")
    assert percentile(ratios, 95) <= 4, ratios
    assert launched is None or len(terms_in_one_pass(launched)) == len(ratios)


@pytest.mark.parametrize("launches", ["one pass", "joint"])
@pytest.mark.parametrize(
    ("rule", "algorithm", "dtype"),
    [
        ("wm", Algorithm.DIRECT, torch.float16),
        ("ia", Algorithm.DIRECT, torch.float16),
        ("ia", Algorithm.INPUT_GRAM, torch.float16),
        ("wm", Algorithm.DIRECT, torch.bfloat16),
        ("ia", Algorithm.DIRECT, torch.bfloat16),
    ],
)
def test_error_in_16_bits(launches, rule, algorithm, dtype, monkeypatch):
    if launches == "one pass":
        one_pass(monkeypatch)
    with bfloat16_products():
        ratios = error_ratios("1x1", RULES[rule], algorithm, dtype)
    assert percentile(ratios, 95) <= 4, ratios


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("rule", ["wm", "ia", "all three"])
def test_the_mean_is_that_of_the_samples_in_use(rule, fused):
    """The other samples lie elsewhere."""
    for name, algorithm in (
        ("1x1 strided", Algorithm.DIRECT),
        ("linear", Algorithm.INPUT_GRAM),
        ("2x1", Algorithm.DIRECT),
    ):
        case, terms = LAYERS[name], {**RULES[rule], "center": True, "samples": 3}
        x, w, b, y = draw(case, algorithm, 30, 0, torch.float32)
        x[3:] += 1000
        ours = layer_backward(case, x, w, b, y, terms, algorithm, fused, linear=name == "linear")[2]
        assert_near(ours, *(data_terms(case, x, w, b, y, terms, wide) for wide in (torch.float32, torch.float64)))


@pytest.mark.parametrize("launches", ["one pass", "joint", "unfused"])
def test_a_sample_alone_is_its_mean(launches, monkeypatch):
    if launches == "one pass":
        one_pass(monkeypatch)
    for rule in ("wm", "ia", "all three"):
        for algorithm in (Algorithm.DIRECT, Algorithm.INPUT_GRAM):
            x, w, b, y = draw(LAYERS["1x1"], algorithm, 30, 0, torch.float32)
            terms = {**RULES[rule], "center": True, "samples": 1}
            fused = launches != "unfused"
            assert (layer_backward(LAYERS["1x1"], x, w, b, y, terms, algorithm, fused)[2] == 0).all()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("capability", [80, 90])
def test_chosen_tiles(capability, itemsize):
    """Means change the positions of a step, and in one pass the largest blocks. Whether they fit, codegen.py says."""
    device = target(itemsize, capability)
    for c, k in [(16, 16), (64, 256), (256, 64), (512, 1024)]:
        for rows, symmetric in (((k, k), False), ((0, k), False), ((0, c), True)):
            plain, centered = (choose_wgrad(Geometry(10**5, c, k), rows, device, symmetric, samples=n) for n in (0, 40))
            assert centered == plain._replace(BP=min(plain.BP, 32))
            small = choose_joint(Geometry(50, c, k), rows, True, device, 40)
            assert small[0].BP == centered.BP
            assert len({(t.warps, t.stages) for t in small}) == 1
    for term in ("cross", "z", "gram"):
        tile = choose_pointwise(Geometry(10**5, 64, 64), term, target(2, capability), 128)
        assert (tile.BK, tile.BC) == (64, 64)
        depth = 64 if capability == 90 else 16 if term == "z" else 32
        assert tile == tile._replace(BP=depth)
    assert choose_pointwise(Geometry(10**5, 256, 64), "cross", target(2, 90), 128).BC == 128
    assert choose_pointwise(Geometry(10**5, 512, 256), "cross", target(2, 90), 128) is None
    assert (choose_pointwise(Geometry(10**5, 64, 256), "gram", target(2, capability), 128) is None) == (
        capability == 80
    )
