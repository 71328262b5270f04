"""The single pass of a pointwise layer against float64. COVERED says which case takes which path."""

from typing import NamedTuple

import pytest
import torch
import triton_cases
from cases import RULES
from pyfeedback.forms import Form
from test_triton_backward import FORMS, LAYERS, assert_all_near, has_form, run_conv2d
from triton_cases import DEVICE, UNIT, VARIANTS, assert_near, fresh, inner, mean_and_unit, shuffled_programs, surround

from pyfeedback.kernels import rule as kernel_rule
from pyfeedback.kernels import single
from pyfeedback.kernels.geometry import Geometry
from pyfeedback.kernels.tiles import SingleTile, choose_single

pytestmark = triton_cases.MARKS

TERMS = ("none", "response", "projection", "moment")
REST = {"decay": 0.3, "self_": 0.2, "tie": 0.7}


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    assert_margins = triton_cases.fill_memory_with_nan(monkeypatch)
    yield
    assert_margins()


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
    "channel blocks": Case(40, 24, 8, 41, 16, BC=16, BK=16, splits=3),
}

# Path of the kernel: the cases that take it.
COVERED = {
    "one split": ["one position"],
    "splits are summed in a tree": ["whole", "ragged", "channel blocks"],
    "a split has no work": ["ragged"],
    "ragged channels": ["ragged", "channel blocks"],
    "several blocks of channels, not for a moment": ["channel blocks"],
    "the response of part of the batch": ["ragged", "channel blocks"],
    "the last block of positions ragged": ["whole", "ragged"],
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
    x = (x.to(wide) - mean).to(dtype)
    if term == "moment":
        return dx, dw, x.to(wide).t() @ x.to(wide)
    rest = REST["decay"] * b.to(wide) - REST["self_"] * w.to(wide) + REST["tie"] * dw.to(wide)
    if term == "none":
        return dx, dw, rest.to(dtype)
    read = x[: case.used]
    if term == "projection":
        read = (scales["z_scale"] * (y @ b) - scales["x_scale"] * read) / unit
    return dx, dw, (scales["scale"] * unit * (y.t() @ read).to(wide) + rest).to(dtype)


def run(case: Case, term: str, dtype=torch.float32, centered=False):
    x, dy, y, b, w = tensors(case, dtype)
    scales = {"scale": -0.6, "z_scale": 0.5, "x_scale": 1.5 if term == "projection" else 0.0}
    block = lambda t: t.view(len(t), 1, 1, -1)  # noqa: E731
    dx, dw = fresh(x), fresh(b)
    f = fresh(x.new_empty(case.C, case.C), torch.float32) if term == "moment" else fresh(b)
    tile = SingleTile(case.BK, case.BC, 16, case.splits, 4, 2)
    rest = {} if term == "moment" else {**REST, "scale": scales["scale"], "weight": w}
    scales |= {"mean": torch.zeros(case.sample, case.C, device=DEVICE), "unit": 1.0}
    if centered:
        both = mean_and_unit(case.sample, case.C)
        rest |= both if term in ("response", "projection") else {"mean": both["mean"]}
        scales |= {"mean": both["mean"], "unit": UNIT}
    single.launch_single(
        block(x), Geometry(case.positions, case.C, case.K), term, dy=block(dy), dx=block(dx), dw=dw, feedback=b, f=f,
        y=block(y) if term in ("response", "projection") else None,
        z_scale=scales["z_scale"], x_scale=scales["x_scale"], tile=tile, **rest,
    )  # fmt: skip
    scales["dtype"] = dtype
    return (dx, dw, f), *(expected(case, term, wide, scales) for wide in (dtype, torch.float64))


def has_term(case: Case, term: str) -> bool:
    return term != "moment" or case.C <= case.BC


@pytest.mark.parametrize(("dtype", "centered"), VARIANTS, ids=str)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("name", CASES)
def test_single_pass(name, term, dtype, centered):
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


def test_arrivals_are_left_at_zero(monkeypatch):
    arrived = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(single, "arrivals", lambda count, device: arrived)
    first, *_ = run(CASES["channel blocks"], "response")
    assert not arrived.any()
    again, *_ = run(CASES["channel blocks"], "response")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_offsets_in_int64(monkeypatch):
    narrow, *_ = run(CASES["ragged"], "projection")
    monkeypatch.setattr(single, "wide", lambda geometry: True)
    wide, *_ = run(CASES["ragged"], "projection")
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_arguments_that_the_kernel_does_not_take():
    x = torch.zeros(4, 1, 1, 600, device=DEVICE)
    w = torch.zeros(600, 600, device=DEVICE)
    with pytest.raises(ValueError, match="term is 'none' of 600 -> 600 channels, expected sums that fit"):
        single.launch_single(x, Geometry(4, 600, 600), "none", dy=x, dx=x, dw=w, feedback=w)
    tile = SingleTile(64, 64, 16, 1, 4, 2)
    with pytest.raises(ValueError, match="expected BC >= 600 where the term is a moment"):
        single.launch_single(x, Geometry(4, 600, 600), "moment", dy=x, dx=x, dw=w, feedback=w, f=w, tile=tile)
    with pytest.raises(ValueError, match="dy has shape"):
        single.launch_single(x, Geometry(4, 600, 500), "none", dy=x, dx=x, dw=w, feedback=w)


# The backward of a layer


@pytest.fixture
def small_tiles(monkeypatch):
    """The terms that were launched."""
    return triton_cases.single_passes(monkeypatch)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["1x1", "1x1 stride 2 and 3"])
def test_conv2d_backward(name, rule, small_tiles):
    """dx and dW are in a single pass, whatever the rule and the form."""
    reads = any(RULES[rule].get(p) for p in ("amp", "null", "sparse"))
    for form in FORMS if reads else [Form.NONE]:
        if form is Form.NONE or has_form(form, LAYERS[name], RULES[rule]):
            small_tiles.clear()
            assert_all_near(*run_conv2d(LAYERS[name], RULES[rule], form))
            assert len(small_tiles) == 1


@pytest.mark.parametrize(
    ("rule", "form", "term"),
    [
        ("fa", Form.NONE, "none"),
        ("kp", Form.NONE, "none"),
        ("wm-centered", Form.DIRECT, "response"),
        ("aa", Form.DIRECT, "response"),
        ("aa", Form.INPUT_MOMENT, "moment"),
        ("ia", Form.INPUT_MOMENT, "moment"),
        ("ia", Form.DIRECT, "projection"),
        ("ia", Form.RESPONSE_MOMENT, "projection"),
    ],
)
def test_terms(rule, form, term, small_tiles):
    run_conv2d(LAYERS["1x1"], RULES[rule], form)
    assert small_tiles == [term]


@pytest.mark.parametrize("rule", ["wm", "ia-centered", "aa"])
def test_part_of_the_batch(rule, small_tiles):
    for form in (Form.DIRECT, Form.INPUT_MOMENT):
        small_tiles.clear()
        assert_all_near(*run_conv2d(LAYERS["1x1"], {**RULES[rule], "samples": 2}, form, respond=False))
        assert small_tiles == [{"ia-centered": "projection"}.get(rule, "response") if form is Form.DIRECT else "none"]


@pytest.mark.parametrize("mask", [(False, True, True, True), (True, False, True, True), (True, True, False, True)])
def test_masks(mask, small_tiles):
    """Without dx or dW there is no single pass."""
    assert_all_near(*run_conv2d(LAYERS["1x1"], RULES["ia"], Form.DIRECT, mask))
    assert small_tiles == (["none"] if mask[:2] == (True, True) else [])


def test_a_weight_in_another_layout_is_launched_apart(small_tiles):

    def rows_innermost(t):
        return t.permute(2, 3, 1, 0).contiguous().permute(3, 0, 1, 2) if t.shape[2:] == (1, 1) else inner(t)

    assert_all_near(*run_conv2d(LAYERS["1x1"], RULES["wm"], Form.DIRECT, laid_out=rows_innermost))
    assert small_tiles == []


@pytest.mark.parametrize("rule", ["ia", "aa"])
def test_a_moment_that_does_not_fit_is_not_taken_for_a_response(rule, small_tiles, monkeypatch):
    """On sm_80 y'x of 128 -> 64 channels is in a single pass, x'x is not: the kernel would read x as K channels."""
    assert choose_single(Geometry(9, 128, 64), "response", 2, 80, 108) is not None
    assert choose_single(Geometry(9, 128, 64), "moment", 2, 80, 108) is None
    every = kernel_rule.choose_single
    monkeypatch.setattr(kernel_rule, "choose_single", lambda g, t, *_: None if t == "moment" else every(g, t))
    assert_all_near(*run_conv2d(LAYERS["1x1"], RULES[rule], Form.INPUT_MOMENT))
    assert small_tiles == []


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("term", TERMS)
def test_chosen_tiles(term, capability):
    for c, k in [(16, 64), (64, 64), (64, 256), (256, 64), (100, 70), (512, 128), (2048, 64), (512, 512)]:
        for positions in (1, 49, 100_000):
            tile = choose_single(Geometry(positions, c, k), term, 2, capability, 132)
            if tile is not None:
                assert all(b >= 32 and b & (b - 1) == 0 for b in (tile.BK, tile.BC, tile.BP))
                assert k <= tile.BK
                assert term != "moment" or c <= tile.BC
                assert 1 <= tile.splits <= max(1, -(-positions // tile.BP))
    assert choose_single(Geometry(9, 64, 64), term, 2, capability, 132) is not None
    assert choose_single(Geometry(9, 64, 64), term, 4, capability, 132) is None
    assert choose_single(Geometry(9, 64, 64, 4, 4, 4, 4, 3, 3), term, 2, capability, 132) is None


def test_layers_that_fit():
    fits = {(c, k): [t for t in TERMS if choose_single(Geometry(10**5, c, k), t, 2, 90, 132)]
            for c, k in [(64, 64), (64, 256), (256, 64), (512, 512)]}  # fmt: skip
    assert fits == {(64, 64): [*TERMS], (64, 256): ["none", "response", "moment"],
                    (256, 64): ["none", "response", "projection"], (512, 512): []}  # fmt: skip
