"""The one-pass backward of a pointwise layer against float64. COVERED says which case takes which path."""

from typing import NamedTuple

import pytest
import torch
import triton_cases
from cases import RULES
from triton_cases import (
    DEVICE,
    UNIT,
    VARIANTS,
    assert_near,
    fresh,
    inner,
    mean_and_unit,
    one_pass,
    run_kernel,
    shuffled_programs,
    surround,
    target,
    terms_in_one_pass,
)
from triton_layers import ALGORITHMS, LAYERS, assert_all_near, has_algorithm, run_conv2d

from pyfeedback.core.algorithm import Algorithm
from pyfeedback.kernels import plan
from pyfeedback.kernels.geometry import Geometry
from pyfeedback.kernels.pointwise import pointwise_launch
from pyfeedback.kernels.tiles import PointwiseTile, choose_pointwise

pytestmark = triton_cases.MARKS
uninitialized_memory_is_nan = triton_cases.uninitialized_memory_is_nan

TERMS = ("none", "cross", "z", "gram")
REST = {"decay": 0.3, "self_": 0.2, "tie": 0.7}


class Case(NamedTuple):
    """Positions, of which the response has the first ``used``, ``sample`` in each sample; channels; how positions and
    channels are split."""

    positions: int
    used: int
    sample: int
    C: int
    K: int
    splits: int = 1
    BC: int = 32
    BK: int = 32


CASES = {
    "whole": Case(36, 36, 9, 32, 32, splits=3),
    "ragged": Case(21, 14, 7, 19, 23, splits=5),
    "one position": Case(1, 1, 1, 16, 32),
    "steps of 16 samples": Case(64, 64, 2, 16, 16, splits=3, BC=16, BK=16),
    "channel blocks": Case(40, 24, 8, 41, 16, BC=16, BK=16, splits=3),
}

# Path of the kernel: the cases that take it.
COVERED = {
    "one split": ["one position"],
    "split-K reduction": ["whole", "ragged", "channel blocks"],
    "a split has no work": ["ragged"],
    "ragged channels": ["ragged", "channel blocks"],
    "several blocks of channels, not for a Gram matrix": ["channel blocks"],
    "the response of part of the batch": ["ragged", "channel blocks"],
    "the last block of positions ragged": ["whole", "ragged"],
    "no block of samples ragged": ["steps of 16 samples"],
}


def test_every_case_covers_a_path():
    assert {name for names in COVERED.values() for name in names} == CASES.keys()


def tensors(case: Case, dtype):
    generator = torch.Generator().manual_seed(0)
    n, used, _, c, k = case[:5]
    sizes = ((n, c), (n, k), (used, k), (k, c), (k, c))
    return [surround(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in sizes]


def expected(case: Case, term: str, dtype, scales: dict):
    """dx, dW and the term, composed in ``dtype``; sums and what is added to them in float32 or wider."""
    x, dy, y, b, w = (t.to(dtype) for t in tensors(case, scales["dtype"]))
    dx, dw = dy @ b, dy.t() @ x
    wide = torch.promote_types(dtype, torch.float32)
    mean, unit = scales["mean"].repeat(case.positions // case.sample, 1), scales["unit"]
    x, y = (x.to(wide) - mean).to(dtype), (y.to(wide) - scales["y_mean"]).to(dtype)
    if term == "gram":
        return dx, dw, x.to(wide).t() @ x.to(wide)
    rest = REST["decay"] * b.to(wide) - REST["self_"] * w.to(wide) + REST["tie"] * dw.to(wide)
    if term == "none":
        return dx, dw, rest.to(dtype)
    read = x[: case.used]
    if term == "z":
        read = (scales["z_scale"] * (y @ b) - scales["x_scale"] * read) / unit
    return dx, dw, (scales["scale"] * unit * (y.t() @ read).to(wide) + rest).to(dtype)


def run(case: Case, term: str, dtype=torch.float32, centered=False):
    x, dy, y, b, w = tensors(case, dtype)
    scales = {"scale": -0.6, "z_scale": 0.5, "x_scale": 1.5 if term == "z" else 0.0}
    block = lambda t: t.view(len(t), 1, 1, -1)  # noqa: E731
    dx, dw = fresh(x), fresh(b)
    f = fresh(x.new_empty(case.C, case.C), torch.float32) if term == "gram" else fresh(b)
    tile = PointwiseTile(case.BK, case.BC, 16, case.splits, 4, 2)
    rest = {} if term == "gram" else {**REST, "scale": scales["scale"], "weight": w}
    scales |= {"mean": torch.zeros(case.sample, case.C, device=DEVICE), "y_mean": 0.0, "unit": 1.0}
    if centered:
        both = mean_and_unit(case.sample, case.C)
        y_mean = mean_and_unit(case.sample, case.K)["mean"]
        rest |= both | {"y_mean": y_mean} if term in ("cross", "z") else {"mean": both["mean"]}
        scales |= {"mean": both["mean"], "unit": UNIT, "y_mean": y_mean.repeat(case.used // case.sample, 1)}
    run_kernel(
        pointwise_launch, Geometry(case.positions, case.C, case.K), term,
        x=block(x), dy=block(dy), dx=block(dx), dw=dw, feedback=block(b), f=f,
        y=block(y) if term in ("cross", "z") else None,
        z_scale=scales["z_scale"], x_scale=scales["x_scale"], tile=tile, **rest,
    )  # fmt: skip
    scales["dtype"] = dtype
    return (dx, dw, f), *(expected(case, term, wide, scales) for wide in (dtype, torch.float64))


def has_term(case: Case, term: str) -> bool:
    return term != "gram" or case.C <= case.BC


@pytest.mark.parametrize(("dtype", "centered"), VARIANTS, ids=str)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("name", CASES)
def test_one_pass(name, term, dtype, centered):
    if has_term(CASES[name], term):
        for ours, composed, oracle in zip(*run(CASES[name], term, dtype, centered), strict=True):
            assert_near(ours, composed, oracle)


@pytest.mark.parametrize("term", TERMS)
def test_the_order_of_programs_changes_no_bit(term, monkeypatch):
    straight, *_ = run(CASES["ragged"], term)
    for seed in range(2):
        with shuffled_programs(monkeypatch, seed):
            permuted, *_ = run(CASES["ragged"], term)
        assert all(torch.equal(a, b) for a, b in zip(straight, permuted, strict=True))


def test_offsets_in_int64(monkeypatch):
    narrow, *_ = run(CASES["ragged"], "z")
    monkeypatch.setattr(Geometry, "wide", True)
    wide, *_ = run(CASES["ragged"], "z")
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_arguments_that_the_kernel_does_not_take():
    x = torch.zeros(4, 1, 1, 600, device=DEVICE)
    w = torch.zeros(600, 1, 1, 600, device=DEVICE)
    with pytest.raises(ValueError, match="term is 'none' of 600 -> 600 channels, expected sums that fit"):
        run_kernel(pointwise_launch, Geometry(4, 600, 600), "none", x=x, dy=x, dx=x, dw=w, feedback=w)
    tile = PointwiseTile(64, 64, 16, 1, 4, 2)
    with pytest.raises(ValueError, match="expected BC >= 600 if the term is a Gram matrix"):
        run_kernel(pointwise_launch, Geometry(4, 600, 600), "gram", x=x, dy=x, dx=x, dw=w, feedback=w, f=w, tile=tile)
    with pytest.raises(ValueError, match="dy has shape"):
        run_kernel(pointwise_launch, Geometry(4, 600, 500), "none", x=x, dy=x, dx=x, dw=w, feedback=w[:500], tile=tile)


# The backward of a layer


@pytest.fixture
def launched(monkeypatch):
    """What is launched, with tiles for the interpreter."""
    return one_pass(monkeypatch)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["1x1", "1x1 stride 2 and 3"])
def test_conv2d_backward(name, rule, launched):
    """dx and dW are in one pass, whatever the rule and the algorithm."""
    reads = any(RULES[rule].get(p) for p in ("amp", "null", "sparse"))
    for algorithm in ALGORITHMS if reads else [Algorithm.NONE]:
        if algorithm is Algorithm.NONE or has_algorithm(algorithm, LAYERS[name], RULES[rule]):
            launched.clear()
            assert_all_near(*run_conv2d(LAYERS[name], RULES[rule], algorithm))
            assert len(terms_in_one_pass(launched)) == 1


@pytest.mark.parametrize(
    ("rule", "algorithm", "term"),
    [
        ("fa", Algorithm.NONE, "none"),
        ("kp", Algorithm.NONE, "none"),
        ("wm-centered", Algorithm.DIRECT, "cross"),
        ("aa", Algorithm.DIRECT, "cross"),
        ("aa", Algorithm.INPUT_GRAM, "gram"),
        ("ia", Algorithm.INPUT_GRAM, "gram"),
        ("ia", Algorithm.DIRECT, "z"),
        ("ia", Algorithm.RESPONSE_GRAM, "z"),
    ],
)
def test_terms(rule, algorithm, term, launched):
    run_conv2d(LAYERS["1x1"], RULES[rule], algorithm)
    assert terms_in_one_pass(launched) == [term]


@pytest.mark.parametrize("rule", ["wm", "ia-centered", "aa"])
def test_part_of_the_batch(rule, launched):
    for algorithm in (Algorithm.DIRECT, Algorithm.INPUT_GRAM):
        launched.clear()
        assert_all_near(*run_conv2d(LAYERS["1x1"], {**RULES[rule], "samples": 2}, algorithm, respond=False))
        assert terms_in_one_pass(launched) == [
            {"ia-centered": "z"}.get(rule, "cross") if algorithm is Algorithm.DIRECT else "none"
        ]


@pytest.mark.parametrize("mask", [(False, True, True, True), (True, False, True, True), (True, True, False, True)])
def test_masks(mask, launched):
    """Without dx or dW there is no one-pass launch."""
    assert_all_near(*run_conv2d(LAYERS["1x1"], RULES["ia"], Algorithm.DIRECT, mask))
    assert terms_in_one_pass(launched) == (["none"] if mask[:2] == (True, True) else [])


def test_a_weight_in_another_layout_is_launched_separately(launched):

    def rows_innermost(t):
        return t.permute(2, 3, 1, 0).contiguous().permute(3, 0, 1, 2) if t.shape[2:] == (1, 1) else inner(t)

    assert_all_near(*run_conv2d(LAYERS["1x1"], RULES["wm"], Algorithm.DIRECT, laid_out=rows_innermost))
    assert terms_in_one_pass(launched) == []


@pytest.mark.parametrize("rule", ["ia", "aa"])
def test_a_gram_matrix_that_does_not_fit_is_not_taken_for_a_response(rule, launched, monkeypatch):
    """On sm_80 y'x of 128 -> 64 channels is in one pass, x'x is not: the kernel would read x as K channels."""
    assert choose_pointwise(Geometry(9, 128, 64), "cross", target(2, 80, 108)) is not None
    assert choose_pointwise(Geometry(9, 128, 64), "gram", target(2, 80, 108)) is None
    every = plan.choose_pointwise
    monkeypatch.setattr(plan, "choose_pointwise", lambda g, t, *_: None if t == "gram" else every(g, t))
    assert_all_near(*run_conv2d(LAYERS["1x1"], RULES[rule], Algorithm.INPUT_GRAM))
    assert terms_in_one_pass(launched) == []


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("term", TERMS)
def test_chosen_tiles(term, capability):
    for c, k in [(16, 64), (64, 64), (64, 256), (256, 64), (100, 70), (512, 128), (2048, 64), (512, 512)]:
        for positions in (1, 49, 100_000):
            tile = choose_pointwise(Geometry(positions, c, k), term, target(2, capability))
            if tile is not None:
                assert all(b >= 32 and b & (b - 1) == 0 for b in (tile.BK, tile.BC, tile.BP))
                assert k <= tile.BK
                assert term != "gram" or c <= tile.BC
                assert 1 <= tile.splits <= max(1, -(-positions // tile.BP))
    assert choose_pointwise(Geometry(9, 64, 64), term, target(2, capability)) is not None
    assert choose_pointwise(Geometry(9, 64, 64), term, target(4, capability)) is None
    assert choose_pointwise(Geometry(9, 64, 64, 4, 4, 4, 4, 3, 3), term, target(2, capability)) is None


def test_layers_that_fit():
    fits = {(c, k): [t for t in TERMS if choose_pointwise(Geometry(10**5, c, k), t, target(2, 90))]
            for c, k in [(64, 64), (64, 256), (256, 64), (512, 512)]}  # fmt: skip
    assert fits == {(64, 64): [*TERMS], (64, 256): ["none", "cross", "gram"],
                    (256, 64): ["none", "cross", "z"], (512, 512): []}  # fmt: skip
