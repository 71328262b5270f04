"""The Triton kernels against float64. COVERED says which case takes which path."""

import pytest
import torch
import triton_cases
from triton_cases import (
    DEVICE,
    VARIANTS,
    Case,
    assert_near,
    fresh,
    inner,
    layer,
    mean_of_u,
    options,
    products,
    run_kernel,
    shuffled_programs,
    surround,
    target,
)

from pyfeedback.kernels.dgrad import dgrad_launch
from pyfeedback.kernels.geometry import Geometry
from pyfeedback.kernels.tiles import DgradTile, WgradTile, choose_dgrad, choose_wgrad
from pyfeedback.kernels.wgrad import wgrad_launch

pytestmark = triton_cases.MARKS
uninitialized_memory_is_nan = triton_cases.uninitialized_memory_is_nan


# Strides, paddings, dilations and sizes of the two dimensions differ wherever there is one.
CASES = {
    "1x1": Case((2, 16, 4, 5), (32, 16, 1, 1), splits=3),
    "1x1 ragged": Case((1, 5, 3, 5), (7, 5, 1, 1)),
    "1x1 stride 3 and 2": Case((2, 6, 7, 8), (5, 6, 1, 1), (3, 2)),
    "3x3": Case((1, 8, 4, 5), (16, 8, 3, 3), (1, 1), (1, 2)),
    "3x2 stride 2 and 1": Case((3, 16, 5, 6), (17, 16, 3, 2), (2, 1), (1, 0), splits=3),
    "3x3 dilation 2 and 1": Case((1, 3, 8, 7), (4, 3, 3, 3), (1, 1), (2, 1), (2, 1)),
    "3x3 stride 2 and 3, dilation 2": Case((1, 4, 9, 7), (3, 4, 3, 3), (2, 3), (1, 0), (2, 2)),
    "4x3 stride 3 and 2": Case((2, 4, 8, 7), (3, 4, 4, 3), (3, 2), (2, 1), splits=5),
    "5x2 stride 3 and 2": Case((2, 17, 10, 6), (9, 17, 5, 2), (3, 2), (1, 0), (2, 1)),
    "3x3 stride 4 and 1": Case((1, 4, 9, 5), (3, 4, 3, 3), (4, 1), (0, 1)),
    "3x1 of 32 samples": Case((32, 4, 3, 2), (5, 4, 3, 1), (1, 1), (1, 0), splits=3),
}

# Path of the kernels: the cases that take it.
COVERED = {
    "positions are pixels (1x1)": ["1x1", "1x1 ragged"],
    "positions are gathered": ["3x3", "4x3 stride 3 and 2", "1x1 stride 3 and 2"],
    "padding is masked": ["3x3", "3x3 dilation 2 and 1", "5x2 stride 3 and 2"],
    "a split has no work": ["4x3 stride 3 and 2"],
    "split-K reduction": ["1x1", "3x2 stride 2 and 1", "4x3 stride 3 and 2"],
    "one split": ["3x3", "1x1 ragged"],
    "row tiles, the last one ragged": ["1x1", "3x2 stride 2 and 1"],
    "channel tiles, the last one ragged": ["5x2 stride 3 and 2"],
    "the sum over channels runs over blocks": ["1x1", "3x2 stride 2 and 1"],
    "classes of unequal size (odd maps)": ["3x2 stride 2 and 1", "4x3 stride 3 and 2"],
    "classes without taps": ["1x1 stride 3 and 2", "3x3 stride 2 and 3, dilation 2", "3x3 stride 4 and 1"],
    "stride and dilation without a common factor": ["5x2 stride 3 and 2"],
    "batch of one": ["3x3", "1x1 ragged"],
    "steps of 16 samples, none of which is missing": ["3x1 of 32 samples"],
    "offsets in int64": ["3x2 stride 2 and 1"],
}


def test_every_case_covers_a_path():
    assert {name for names in COVERED.values() for name in names} == CASES.keys()


def small(case: Case, **blocks) -> WgradTile:
    return WgradTile(
        **{"BK": 16, "BU": 16, "BC": 16, "BP": 16, "splits": case.splits, "warps": 4, "stages": 2} | blocks
    )


TERMS = {"scale": -0.6, "decay": 0.3, "self_": 0.2, "tie": 0.7}


def channels_last(kernel: torch.Tensor) -> torch.Tensor:
    """The view [K, R, S, C]."""
    return kernel.permute(0, 2, 3, 1)


def run_pair(case: Case, dtype=torch.float32, tile=None, centered=False, processors=132, **terms):
    """dW and the feedback gradient of one launch, and what they are beside: composed, and in float64."""
    t = layer(case, dtype)
    both, mean, unit = options(case, centered)
    of_u, u_mean = mean_of_u(case, centered)
    terms = {"scale": 1.0, "decay": 0.0, "self_": 0.0, "tie": 0.0} | terms
    dw, f = fresh(t.weight), fresh(t.weight)
    run_kernel(
        wgrad_launch, case.geometry, x=inner(t.x), a=inner(t.dy), u=inner(t.other), dw=channels_last(dw),
        f=channels_last(f), weight=channels_last(surround(t.weight)), feedback=channels_last(surround(t.feedback)),
        tile=tile or small(case), processors=processors, **both, **of_u, **terms,
    )  # fmt: skip
    expected = []
    for wide in (dtype, torch.float64):
        wider = torch.promote_types(wide, torch.float32)
        first = products(t.x, t.weight, t.dy, case, wide)[1]
        second = products(t.x.to(wider) - mean, t.weight, t.other.to(wider) - u_mean, case, wide)[1]
        second = second.to(wider) * unit * terms["scale"] + terms["tie"] * first.to(wider)
        second += terms["decay"] * t.feedback.to(wider) - terms["self_"] * t.weight.to(wider)
        expected.append((first, second.to(wide)))
    return (dw, f), *expected


@pytest.mark.parametrize(("dtype", "centered"), VARIANTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_pair(name, dtype, centered):
    for ours, composed, oracle in zip(*run_pair(CASES[name], dtype, centered=centered, **TERMS), strict=True):
        assert_near(ours, composed, oracle)


@pytest.mark.parametrize("used", [{}, {"decay": 0.3}, {"self_": 0.2}, {"tie": 0.7}], ids=str)
def test_what_has_no_coefficient_is_not_read(used, monkeypatch):
    case = CASES["1x1 ragged"]
    t = layer(case)
    f = fresh(t.feedback)
    weight = t.weight if used.get("self_") else fresh(t.weight)
    feedback = t.feedback if used.get("decay") else fresh(t.feedback)
    dw = products(t.x, t.weight, t.dy, case, torch.float32)[1] if used.get("tie") else fresh(t.weight)
    x, u, f_, dw_, w_, b_ = (v.permute(0, 2, 3, 1).contiguous() for v in (t.x, t.other, f, dw, weight, feedback))
    run_kernel(
        wgrad_launch, case.geometry, x=x, u=u, f=f_, dw=dw_, weight=w_, feedback=b_, scale=2.0, tile=small(case), **used
    )
    oracle = 2 * products(t.x, t.weight, t.other, case)[1] + sum(
        used.get(key, 0.0) * sign * value.double()
        for key, sign, value in (("decay", 1, t.feedback), ("self_", -1, t.weight), ("tie", 1, dw))
        if used.get(key)
    )
    assert_near(f_.permute(0, 3, 1, 2), oracle.float(), oracle)


def test_feedback_gradient_without_data():
    """Kolen-Pollack and symmetric alignment: dW, and the feedback's gradient in the same launch."""
    case = CASES["3x3"]
    t = layer(case)
    dw, f, w, b = (v.permute(0, 2, 3, 1) for v in (fresh(t.weight), fresh(t.weight), t.weight, t.feedback))
    run_kernel(
        wgrad_launch, case.geometry, x=inner(t.x), a=inner(t.dy), dw=dw, f=f, weight=w, feedback=b, decay=0.3,
        self_=0.5, tie=0.7, tile=small(case),
    )  # fmt: skip
    first = products(t.x, t.weight, t.dy, case)[1].permute(0, 2, 3, 1)
    oracle = 0.7 * first + 0.3 * b.double() - 0.5 * w.double()
    assert_near(dw, first.float(), first)
    assert_near(f, oracle.float(), oracle)


def test_equal_decay_and_self_are_exact_where_the_feedback_nears_the_weight():
    case = CASES["3x3"]
    t = layer(case)
    w = inner(t.weight)
    b, f = w + 1e-6 * inner(t.feedback), fresh(w)
    run_kernel(wgrad_launch, case.geometry, x=inner(t.x), a=inner(t.dy), dw=fresh(w), f=f, weight=w, feedback=b,
               decay=0.3, self_=0.3, tile=small(case))  # fmt: skip
    assert torch.allclose(f, 0.3 * (b - w), rtol=1e-6, atol=0)


@pytest.mark.parametrize("splits", [1, 3])
def test_gram_beside_the_weight_gradient(splits):
    """G = x'x has as many rows as x has channels, and stays in float32."""
    case = CASES["1x1"]._replace(splits=splits)
    t, g = layer(case, torch.float16), case.geometry.flat()
    x, dy = inner(t.x).view(-1, 1, 1, 16), inner(t.dy).view(-1, 1, 1, 32)
    dw, gram = fresh(t.weight), fresh(t.x.new_empty(16, 1, 1, 16), torch.float32)
    run_kernel(wgrad_launch, g, x=x, a=dy, u=x, dw=dw.permute(0, 2, 3, 1), f=gram, tile=small(case, BK=32))
    flat = x.view(-1, 16)
    assert_near(gram.view(16, 16), flat.float().t() @ flat.float(), flat.double().t() @ flat.double())
    assert_near(dw, products(t.x, t.weight, t.dy, case, torch.float16)[1], products(t.x, t.weight, t.dy, case)[1])


@pytest.mark.parametrize(("splits", "processors"), [(1, 132), (3, 132), (3, 4)])
@pytest.mark.parametrize("channels", [16, 40])
def test_gram_alone(channels, splits, processors):
    """The blocks above the diagonal are mirrored, of 40 channels the last one ragged."""
    case = CASES["1x1"]._replace(input=(2, channels, 4, 5), weight=(8, channels, 1, 1), splits=splits)
    x = inner(layer(case, torch.float16).x).view(-1, 1, 1, channels)
    gram = fresh(x.new_empty(channels, 1, 1, channels), torch.float32)
    run_kernel(wgrad_launch, Geometry(40, channels, channels), x=x, u=x, f=gram, scale=0.5, tile=small(case),
               processors=processors)  # fmt: skip
    flat, gram = x.view(-1, channels), gram.view(channels, channels)
    assert_near(gram, 0.5 * (flat.float().t() @ flat.float()), 0.5 * (flat.double().t() @ flat.double()))
    assert (gram - gram.t()).tril(-16).count_nonzero() == 0


def test_many_splits():
    """More than a program of the finish reads at once."""
    case = Case((2, 16, 17, 16), (16, 16, 1, 1), splits=34)
    for ours, composed, oracle in zip(*run_pair(case, **TERMS), strict=True):
        assert_near(ours, composed, oracle)


def test_only_the_last_wave_is_split():
    """Of 12 tiles on 8 processors, the sums of 4 are split in three."""
    for ours, composed, oracle in zip(*run_pair(CASES["3x2 stride 2 and 1"], processors=8, **TERMS), strict=True):
        assert_near(ours, composed, oracle)


@pytest.mark.parametrize(
    ("positions", "c", "k", "tiles", "splits"),  # whole tiles, and those whose sum is split
    [
        (25216, 768, 3072, (132, 12), 11),  # ViT-B: a second wave of 12 tiles
        (25216, 768, 768, (0, 36), 3),
        (6272, 1408, 1536, (132, 0), 1),
        (1280, 768, 3072, (132, 12), 5),  # few positions
        (6272, 768, 2304, (108, 0), 1),
    ],
)
def test_programs_of_the_last_wave(positions, c, k, tiles, splits):
    g = Geometry(positions, c, k)
    launch = wgrad_launch(g, target(2, 90), x="x", a="a", dw="dw")
    flags = launch.constants["FLAGS"]
    whole, split = tiles
    assert (whole if split else 0, split) == (flags.WHOLE, flags.SPLIT_TILES)
    assert (launch.tile.splits, launch.grid) == (splits, (whole + split * splits, 1))
    assert (launch.finish is None) == (splits == 1)
    assert launch.workspace == split * splits * 128 * 128


@pytest.mark.parametrize("splits", [3, 5])
def test_the_order_of_programs_changes_no_bit(splits, monkeypatch):
    case = CASES["3x2 stride 2 and 1"]._replace(splits=splits)
    straight, *_ = run_pair(case, **TERMS)
    for seed in range(2):
        with shuffled_programs(monkeypatch, seed):
            permuted, *_ = run_pair(case, **TERMS)
        assert all(torch.equal(a, b) for a, b in zip(straight, permuted, strict=True))


def run_dgrad(case: Case, dtype=torch.float32, tile=None, dual=True, centered=False, **scales):
    t = layer(case, dtype)
    both, mean, unit = options(case, centered)
    scales = {"z_scale": 1.0, "x_scale": 0.0} | scales
    dx, z = fresh(inner(t.x)), fresh(inner(t.x))
    second = {"y": inner(t.other), "x": inner(t.x), "z": z, **both, **scales} if dual else {}
    tile = tile or DgradTile(16, 16, 16, 4, 2)
    run_kernel(dgrad_launch, case.geometry, feedback=inner(t.feedback), dy=inner(t.dy), dx=dx, tile=tile, **second)
    expected = []
    for wide in (dtype, torch.float64):
        first, second = (products(t.x, t.feedback, y, case, wide)[0] for y in (t.dy, t.other))
        wider = torch.promote_types(wide, torch.float32)
        second = (scales["z_scale"] * second.to(wider) - scales["x_scale"] * (t.x.to(wider) - mean)) / unit
        expected.append((inner(first), inner(second.to(wide))))
    return (dx, z), *expected


@pytest.mark.parametrize(("dtype", "centered"), VARIANTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_dual(name, dtype, centered):
    for results in zip(*run_dgrad(CASES[name], dtype, centered=centered, z_scale=-0.7, x_scale=1.5), strict=True):
        ours, composed, oracle = results
        assert_near(ours, composed, oracle)


@pytest.mark.parametrize("name", ["1x1", "3x2 stride 2 and 1"])
def test_input_gradient_alone(name):
    (dx, z), (composed, _), (oracle, _) = run_dgrad(CASES[name], dual=False)
    assert_near(dx, composed, oracle)
    assert z.isnan().all()


def test_z_alone():
    case = CASES["3x2 stride 2 and 1"]
    t = layer(case)
    z = fresh(inner(t.x))
    tile = DgradTile(16, 16, 16, 4, 2)
    run_kernel(
        dgrad_launch,
        case.geometry,
        feedback=inner(t.feedback),
        y=inner(t.other),
        x=inner(t.x),
        z=z,
        z_scale=-0.5,
        x_scale=-1.0,
        tile=tile,
    )
    oracle = inner(t.x.double() - 0.5 * products(t.x, t.feedback, t.other, case)[0])
    assert_near(z, oracle.float(), oracle)


@pytest.mark.parametrize("name", ["1x1 stride 3 and 2", "3x3 stride 4 and 1"])
def test_a_class_without_taps_is_zero_whatever_the_feedback_holds(name):
    case = CASES[name]
    t, g = layer(case), case.geometry
    dx = fresh(inner(t.x))
    run_kernel(
        dgrad_launch, g, feedback=fresh(inner(t.feedback)), dy=inner(t.dy), dx=dx, tile=DgradTile(16, 16, 16, 4, 2)
    )
    reached = inner(products(t.x, torch.ones_like(t.feedback), torch.ones_like(t.dy), case)[0]) > 0
    down, across = case.stride
    classes = [(slice(None), slice(i, None, down), slice(j, None, across)) for i in range(down) for j in range(across)]
    without_taps = [c for c in classes if not reached[c].any()]
    assert without_taps
    assert all((dx[c] == 0).all() for c in without_taps)
    assert dx[reached].isnan().all()


def test_offsets_in_int64(monkeypatch):
    """The path of tensors past 2^31 elements, on one that is not."""
    case = CASES["3x2 stride 2 and 1"]
    narrow = [t for run in (run_pair, run_dgrad) for t in run(case)[0]]
    monkeypatch.setattr(Geometry, "wide", True)
    wide = [t for run in (run_pair, run_dgrad) for t in run(case)[0]]
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_shipped_tiles(name):
    """The tiles that the launchers choose by themselves."""
    case = CASES[name]
    g = case.geometry
    runs = (
        run_pair(case, tile=choose_wgrad(g, (g.K, g.K), target(4, 90)), **TERMS),
        run_dgrad(case, tile=choose_dgrad(g, True, target(4, 90)), x_scale=0.5),
    )
    for run in runs:
        for ours, composed, oracle in zip(*run, strict=True):
            assert_near(ours, composed, oracle)


# Tile choices and arguments, without a kernel

SIZES = [(1, 1), (3, 64), (64, 64), (64, 256), (512, 128), (2048, 1000)]


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_chosen_tiles_are_powers_of_two_and_splits_have_work(itemsize, capability):
    for c, k in SIZES:
        for positions in (1, 49, 100_000):
            g = Geometry(positions, c, k)
            for rows in ((k, 0), (0, k), (k, k), (k, c)):
                tile = choose_wgrad(g, rows, target(itemsize, capability))
                blocks = (tile.BK, tile.BU, tile.BC, tile.BP)
                assert all(b >= 16 and b & (b - 1) == 0 for b in blocks)
                assert 1 <= tile.splits <= max(1, -(-positions // tile.BP))
            for dual in (False, True):
                tile = choose_dgrad(g, dual, target(itemsize, capability))
                assert all(b >= 16 and b & (b - 1) == 0 for b in (tile.BM, tile.BC, tile.BK))


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_phases(stride, dilation):
    """first_taps: by counting, every tap of every class visits the positions that it is said to."""
    phases = Geometry(1, 1, 1, stride=(stride, 1), dilation=(dilation, 1)).phases()
    step, reach, inverse = (pair[0] for pair in phases)
    common = stride // step
    for shift in range(2 * stride):
        taps = [r for r in range(7) if (shift - r * dilation) % stride == 0]
        first = shift // common * inverse % step
        assert taps == (list(range(first, 7, step)) if shift % common == 0 else [])
        outputs = [(shift - r * dilation) // stride for r in taps]
        assert outputs == [outputs[0] - i * reach for i in range(len(taps))] if taps else True


def test_arguments_that_the_kernels_do_not_read():
    case = CASES["3x3"]
    t, g = layer(case), case.geometry
    x, dy, w = inner(t.x), inner(t.dy), inner(t.weight)
    flat = x.view(-1, 1, 1, 8)
    with pytest.raises(ValueError, match=r"a has shape \(1, 4, 5, 8\), expected \(1, 4, 7, 16\)"):
        run_kernel(wgrad_launch, g, x=x, a=x, dw=w)
    with pytest.raises(ValueError, match=r"a is torch.float16, expected torch.float32"):
        run_kernel(wgrad_launch, g, x=x, a=dy.half(), dw=w)
    with pytest.raises(ValueError, match=r"dtype is float64"):
        run_kernel(wgrad_launch, g, x=x.double(), a=dy.double(), dw=w)
    with pytest.raises(ValueError, match=r"a has strides .* expected channels innermost"):
        run_kernel(wgrad_launch, g, x=x, a=t.dy.permute(0, 2, 3, 1), dw=w)
    with pytest.raises(ValueError, match=r"tie is 1.0, expected 0 if u has 8 channels"):
        run_kernel(wgrad_launch, g, x=x, a=dy, u=dy[..., :8].contiguous(), dw=w, f=w, tie=1.0)
    with pytest.raises(ValueError, match=r"expected BK == BU"):
        run_kernel(wgrad_launch, g, x=x, a=dy, u=dy, dw=w, f=w, tie=1.0, tile=small(case, BU=32))
    with pytest.raises(ValueError, match=r"expected BU == BC if the product is symmetric"):
        run_kernel(wgrad_launch, Geometry(20, 8, 8), x=flat, u=flat, f=w, tile=small(case, BC=4))
    with pytest.raises(ValueError, match="fewer than 2\\^30"):
        run_kernel(wgrad_launch, g._replace(N=2**30), x=x, a=dy, dw=w)
    with pytest.raises(ValueError, match="dy has shape"):
        run_kernel(dgrad_launch, g, feedback=w, dy=x, dx=x)


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (torch.zeros(20, 7), r"mean has shape \(20, 7\), expected \(20, 8\)"),
        (torch.zeros(10, 8), r"mean has 10 rows, .* \(a multiple of 20 that divides 40\)"),
        (torch.zeros(60, 8), r"mean has 60 rows"),
        (torch.zeros(0, 8), r"mean has 0 rows"),
        (torch.zeros(20, 8).half(), r"mean is torch.float16, expected torch.float32"),
        (torch.zeros(8, 20).t(), r"mean has strides \(1, 20\), expected channels innermost and no gaps"),
    ],
    ids=["channels", "rows", "too many rows", "no rows", "dtype", "strides"],
)
def test_means_that_the_kernels_do_not_read(mean, message):
    g = Geometry(2, 8, 8, 4, 5, 4, 5)
    x, f = (torch.zeros(s, device=DEVICE) for s in ((2, 4, 5, 8), (8, 1, 1, 8)))
    for rows in (20, 40):
        run_kernel(wgrad_launch, g, x=x, u=x, f=f, mean=torch.zeros(rows, 8, device=DEVICE), tile=small(CASES["3x3"]))
    with pytest.raises(ValueError, match=message):
        run_kernel(wgrad_launch, g, x=x, u=x, f=f, mean=mean.to(DEVICE), tile=small(CASES["3x3"]))


def test_offsets_widen_past_2_31_elements():
    assert not Geometry(2**21, 1023, 1).wide
    assert Geometry(2**21, 1024, 1).wide
    assert Geometry(2**21, 1, 1024).wide


def test_arguments_are_in_the_order_of_the_kernel():
    """A joint launch passes them by position."""
    g, device = Geometry(40, 16, 16), target(4, 90)
    for made in (wgrad_launch(g, device, x="x", a="dy", dw="dW"), dgrad_launch(g, device, dy="dy", dx="dx")):
        assert [*made.arguments] == made.kernel.arg_names[: len(made.arguments)]
        rest = made.kernel.arg_names[len(made.arguments) :]
        assert {*made.constants} == {name for name in rest if not name.startswith("i_")}
