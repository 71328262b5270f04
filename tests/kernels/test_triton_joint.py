"""Both gradients of a small layer in one launch, against float64. COVERED says which case takes which path."""

import pytest
import torch
import triton_cases
from cases import RULES
from triton_cases import (
    VARIANTS,
    Case,
    assert_near,
    described,
    fresh,
    inner,
    layer,
    mean_of_u,
    names,
    options,
    products,
    record_launches,
    shuffled_programs,
    surround,
    target,
)
from triton_layers import LAYERS, assert_all_near, run_conv2d

from pyfeedback.core.algorithm import Algorithm
from pyfeedback.kernels import launch
from pyfeedback.kernels.dgrad import dgrad_launch
from pyfeedback.kernels.geometry import Geometry
from pyfeedback.kernels.joint import joint_launch
from pyfeedback.kernels.tiles import DgradTile, WgradTile, choose_joint
from pyfeedback.kernels.wgrad import wgrad_launch

pytestmark = triton_cases.MARKS
uninitialized_memory_is_nan = triton_cases.uninitialized_memory_is_nan


CASES = {
    "1x1": Case((1, 16, 4, 5), (17, 16, 1, 1), splits=3),
    "3x2 stride 2 and 1": Case((2, 17, 5, 4), (16, 17, 3, 2), (2, 1), (1, 0)),
    "3x2 stride 2 and 3, dilation 3 and 2": Case((2, 4, 8, 5), (5, 4, 3, 2), (2, 3), (0, 1), (3, 2), splits=5),
}

# Path of the kernel: the cases that take it.
COVERED = {
    "splits of one tile in different programs": ["1x1", "3x2 stride 2 and 3, dilation 3 and 2"],
    "one split": ["3x2 stride 2 and 1"],
    "a program has tiles of both gradients": ["1x1"],
    "several classes of input positions": ["3x2 stride 2 and 1", "3x2 stride 2 and 3, dilation 3 and 2"],
}


def test_every_case_covers_a_path():
    assert {name for names in COVERED.values() for name in names} == CASES.keys()


def run(case: Case, dtype=torch.float32, programs=None, centered=False):
    """dW, the feedback's gradient, dx and z; what they are beside, composed and in float64.

    The second one's mean and unit are not those of the first.
    """
    t, g = layer(case, dtype), case.geometry
    both, mean, unit = options(case, centered)
    of_u, u_mean = mean_of_u(case, centered)
    others = {name: surround(-2 * value) for name, value in both.items()}
    x, y, dy, kernel = (inner(v) for v in (t.x, t.other, t.dy, t.feedback))
    dw, f, dx, z = fresh(kernel), fresh(kernel), fresh(x), fresh(x)
    first, values = described(
        wgrad_launch, g, x=x, a=dy, u=y, dw=dw, f=f, scale=0.5, feedback=kernel, decay=0.3, **both, **of_u,
        tile=WgradTile(16, 16, 16, 16, case.splits, 4, 2),
    )  # fmt: skip
    second, others = described(
        dgrad_launch, g, prefix="other ", feedback=kernel, dy=dy, dx=dx, y=y, z=z, x=x, x_scale=1.5, **others,
        tile=DgradTile(16, 16, 16, 4, 2),
    )  # fmt: skip
    launch.run(joint_launch(first, second, 132, programs), values | others, x.device)
    expected = []
    for wide in (dtype, torch.float64):
        wider = torch.promote_types(wide, torch.float32)
        dx_, dw_ = products(t.x, t.feedback, t.dy, case, wide)
        z_ = products(t.x, t.feedback, t.other, case, wide)[0]
        f_ = products(t.x.to(wider) - mean, t.feedback, t.other.to(wider) - u_mean, case, wide)[1]
        f_ = 0.5 * unit * f_.to(wider) + 0.3 * t.feedback.to(wider)
        z_ = (z_.to(wider) - 1.5 * (t.x.to(wider) + 2 * mean)) / (-2 * unit if centered else 1.0)
        expected.append([inner(v.to(wide)) for v in (dw_, f_, dx_, z_)])
    return (dw, f, dx, z), *expected


@pytest.mark.parametrize(("dtype", "centered"), VARIANTS, ids=str)
@pytest.mark.parametrize("programs", [1, 3, None])
@pytest.mark.parametrize("name", CASES)
def test_both_gradients(name, programs, dtype, centered):
    for ours, composed, oracle in zip(*run(CASES[name], dtype, programs, centered), strict=True):
        assert_near(ours, composed, oracle)


@pytest.mark.parametrize("programs", [4, None])
def test_the_order_of_programs_changes_no_bit(programs, monkeypatch):
    case = CASES["1x1"]
    straight, *_ = run(case, programs=programs)
    for seed in range(2):
        with shuffled_programs(monkeypatch, seed):
            permuted, *_ = run(case, programs=programs)
        assert all(torch.equal(a, b) for a, b in zip(straight, permuted, strict=True))


# The backward of a layer


@pytest.fixture
def launched(monkeypatch):
    """What is launched; every layer is small."""
    return record_launches(monkeypatch)


@pytest.mark.parametrize(
    ("rule", "algorithm", "expected"),
    [
        ("fa", Algorithm.NONE, ["joint"]),
        ("kp", Algorithm.NONE, ["joint"]),
        ("wm-centered", Algorithm.DIRECT, ["joint"]),
        ("aa", Algorithm.DIRECT, ["joint"]),
        ("aa-centered", Algorithm.DIRECT, ["joint"]),
        ("ia", Algorithm.DIRECT, ["joint", "wgrad"]),
        ("ia", Algorithm.INPUT_GRAM, ["joint"]),
        ("ia", Algorithm.RESPONSE_GRAM, ["wgrad", "joint"]),
    ],
)
def test_launches(rule, algorithm, expected, launched):
    """dW and dx are in one launch, whatever the rule and the algorithm."""
    assert_all_near(*run_conv2d(LAYERS["1x1"], RULES[rule], algorithm))
    assert names(launched) == expected


@pytest.mark.parametrize("rule", RULES)
def test_conv2d_backward_of_part_of_the_batch(rule, launched):
    algorithm = Algorithm.DIRECT if any(RULES[rule].get(p) for p in ("amp", "null", "sparse")) else Algorithm.NONE
    assert_all_near(*run_conv2d(LAYERS["3x2 stride 2 and 1"], {**RULES[rule], "samples": 2}, algorithm))
    assert "joint" in names(launched)


def test_masks(launched):
    """Without dx there is no joint launch; without dW, dx shares one with the feedback's gradient."""
    for mask, name in (((False, True, True, True), "wgrad"), ((True, False, True, True), "joint")):
        launched.clear()
        assert_all_near(*run_conv2d(LAYERS["3x2 stride 2 and 1"], RULES["wm"], Algorithm.DIRECT, mask))
        assert names(launched) == [name]


def test_small_layers():
    """7x7 maps at a batch of 32, and those of CIFAR; with blocks of one size for both gradients."""
    small = Geometry(32, 512, 512, 7, 7, 7, 7, 3, 3, (1, 1), (1, 1))
    for capability in (80, 90):
        for itemsize in (2, 4):
            first, second = choose_joint(small, (512, 512), True, target(itemsize, capability))
            assert (first.warps, first.stages) == (second.warps, second.stages)
    assert choose_joint(small._replace(N=256), (512, 512), True, target(2, 90)) is None
    assert choose_joint(Geometry(128, 64, 64, 8, 8, 8, 8, 3, 3), (64, 0), False, target(2, 90)) is not None
