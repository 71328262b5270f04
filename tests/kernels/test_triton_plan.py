"""What a backward launches: the plan is a pure function of sizes and options, and is read here as lists of launches."""

import pytest
import torch
import triton_cases

from pyfeedback.core.coefficients import Coefficients
from pyfeedback.kernels.geometry import Geometry, conv_geometry, layer_geometry
from pyfeedback.kernels.launch import needs
from pyfeedback.kernels.plan import Problem, plan_backward, scales
from pyfeedback.kernels.tiles import Target

pytestmark = triton_cases.MARKS[:1]

SAME = ((1, 1), (1, 1), (1, 1))  # a 3x3 convolution whose output has the size of its input
DENSE = ((1, 1), (0, 0), (1, 1))
LAYERS = {  # input, weight, convolution
    "3x3": ((256, 64, 56, 56), (64, 64, 3, 3), SAME),
    "small 3x3": ((4, 64, 7, 7), (64, 64, 3, 3), SAME),
    "1x1": ((32, 64, 56, 56), (64, 64, 1, 1), DENSE),
    "strided 1x1": ((128, 256, 55, 56), (512, 256, 1, 1), ((2, 2), (0, 0), (1, 1))),
    "1x1 of many channels": ((256, 1024, 14, 14), (1024, 1024, 1, 1), DENSE),
    "linear": ((65536, 64), (1024, 64), None),
    "small linear": ((64, 1024), (512, 1024), None),
}
WM, IA, AA = ("decay", "amp"), ("decay", "amp", "null"), ("amp", "sparse")
EVERYTHING = ("decay", "amp", "null", "sparse", "self_", "tie", "center")


def problem(layer, fields, algorithm, *, part=False, wanted=(True, True, True), dtype="bfloat16", fused=True):
    """The problem of a layer whose weight has channels innermost, on an H100; ``part`` for half of the batch."""
    input, weight, convolution = LAYERS[layer]
    geometry, rows, strided = layer_geometry(input, weight, convolution)
    g = geometry
    strides = (g.R * g.S * g.C, g.S * g.C, g.C, 1)
    samples = input[0] // 2 if part else input[0]
    return Problem(geometry, rows, samples, algorithm, fields, wanted, strides, Target(dtype), fused, strided)


def launches(*args, **options) -> list[str]:
    return [str(launch) for launch in plan_backward(problem(*args, **options)).launches]


@pytest.mark.parametrize(
    ("fields", "algorithm", "expected"),
    [
        ((), "none", ["wgrad(dW, f)", "dgrad(dx)"]),
        (("tie", "decay"), "none", ["wgrad(dW, f)", "dgrad(dx)"]),
        (WM, "direct", ["wgrad(dW, f)", "dgrad(dx)"]),
        ((*WM, "center"), "direct", ["wgrad(dW, f)", "dgrad(dx)"]),
        (AA, "direct", ["wgrad(dW, f)", "dgrad(dx)"]),
        (IA, "direct", ["dgrad(dx, z)", "wgrad(f)", "wgrad(dW)"]),
        ((*IA, "tie"), "direct", ["dgrad(dx, z)", "wgrad(dW)", "wgrad(f)"]),
        (EVERYTHING, "direct", ["wgrad(dW, f_sparse)", "dgrad(dx, z)", "wgrad(f)"]),
    ],
)
def test_whole_batch(fields, algorithm, expected):
    assert launches("3x3", fields, algorithm) == expected


@pytest.mark.parametrize(
    ("fields", "algorithm", "expected"),
    [
        (("tie", "decay"), "none", ["wgrad(dW, f)", "dgrad(dx)"]),
        (WM, "direct", ["wgrad(f)", "wgrad(dW)", "dgrad(dx)"]),
        ((*WM, "tie"), "direct", ["wgrad(dW)", "wgrad(f)", "dgrad(dx)"]),
        (IA, "direct", ["dgrad(z)", "wgrad(f)", "wgrad(dW)", "dgrad(dx)"]),
        ((*IA, "tie"), "direct", ["dgrad(z)", "wgrad(dW)", "wgrad(f)", "dgrad(dx)"]),
        (EVERYTHING, "direct", ["wgrad(dW)", "wgrad(f_sparse)", "dgrad(z)", "wgrad(f)", "dgrad(dx)"]),
    ],
)
def test_part_of_the_batch(fields, algorithm, expected):
    """Its products read other memory, so dW and dx are launched on their own."""
    assert launches("3x3", fields, algorithm, part=True) == expected


@pytest.mark.parametrize(
    ("layer", "fields", "algorithm", "expected"),
    [
        ("linear", IA, "input_gram", ["wgrad(dW, gram)", "dgrad(dx)"]),
        ("1x1 of many channels", IA, "input_gram", ["wgrad(gram)", "wgrad(dW)", "dgrad(dx)"]),
        ("1x1 of many channels", IA, "response_gram", ["wgrad(gram)", "wgrad(dW, cross)", "dgrad(dx)"]),
        ("1x1 of many channels", ("null",), "response_gram", ["wgrad(gram)", "wgrad(dW)", "dgrad(dx)"]),
    ],
)
def test_gram_matrices(layer, fields, algorithm, expected):
    assert launches(layer, fields, algorithm) == expected


@pytest.mark.parametrize(
    ("fields", "algorithm", "expected"),
    [
        ((), "none", ["joint(dW, f, dx)"]),
        (("tie", "decay"), "none", ["joint(dW, f, dx)"]),
        (WM, "direct", ["joint(dW, f, dx)"]),
        (AA, "direct", ["joint(dW, f, dx)"]),
        (IA, "direct", ["joint(dW, dx, z)", "wgrad(f)"]),
        (EVERYTHING, "direct", ["joint(dW, f_sparse, dx)", "dgrad(z)", "wgrad(f)"]),
    ],
)
def test_small_layers(fields, algorithm, expected):
    assert launches("small 3x3", fields, algorithm) == expected


def test_small_layers_whose_rule_reads_part_of_the_batch():
    assert launches("small 3x3", WM, "direct", part=True) == ["joint(f, dx)", "wgrad(dW)"]
    assert launches("small 3x3", IA, "direct", part=True) == ["joint(dW, z)", "joint(f, dx)"]


def test_small_layers_with_a_gram_matrix():
    assert launches("small linear", IA, "input_gram") == ["wgrad(gram)", "joint(dW, dx)"]
    assert launches("small linear", IA, "response_gram") == ["wgrad(gram)", "joint(dW, cross, dx)"]


@pytest.mark.parametrize(
    ("fields", "algorithm", "expected"),
    [
        ((), "none", ["pointwise(dx, dW, f)"]),
        (("tie", "decay"), "none", ["pointwise(dx, dW, f)"]),
        (WM, "direct", ["pointwise(dx, dW, f)"]),
        (AA, "direct", ["pointwise(dx, dW, f)"]),
        (IA, "direct", ["pointwise(dx, dW, f)"]),
        (IA, "response_gram", ["pointwise(dx, dW, f)"]),
        (IA, "input_gram", ["pointwise(dx, dW, gram)"]),
        (EVERYTHING, "direct", ["pointwise(dx, dW, f_sparse)", "dgrad(z)", "wgrad(f)"]),
    ],
)
def test_pointwise_layers_in_one_pass(fields, algorithm, expected):
    assert launches("1x1", fields, algorithm) == expected


def test_pointwise_layers_whose_rule_reads_part_of_the_batch():
    """The one-pass kernel takes a response of fewer samples, but no Gram matrix of them."""
    for fields in (WM, IA):
        assert launches("1x1", fields, "direct", part=True) == ["pointwise(dx, dW, f)"]
    assert launches("1x1", IA, "input_gram", part=True) == ["wgrad(gram)", "pointwise(dx, dW)"]


def test_float32_has_no_one_pass_tile():
    assert launches("1x1", IA, "direct", dtype="float32") == ["dgrad(dx, z)", "wgrad(f)", "wgrad(dW)"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((True, True, False), ["joint(dW, dx)"]),
        ((True, False, False), ["dgrad(dx)"]),
        ((False, True, False), ["wgrad(dW)"]),
        ((False, False, False), []),
        ((False, True, True), ["joint(dW, z)", "wgrad(f)"]),
        ((True, False, True), ["dgrad(dx, z)", "wgrad(f)"]),
        ((False, False, True), ["dgrad(z)", "wgrad(f)"]),
    ],
)
def test_what_is_not_wanted_is_not_launched(wanted, expected):
    assert launches("small 3x3", IA if wanted[2] else (), "direct" if wanted[2] else "none", wanted=wanted) == expected


def test_a_frozen_weight_of_a_tied_rule_has_its_gradient_computed():
    assert launches("3x3", ("tie",), "none", wanted=(False, False, True)) == ["wgrad(dW, f)"]


def test_terms_without_data_of_a_frozen_weight_are_composed():
    plan = plan_backward(problem("3x3", ("decay", "self_"), "none", wanted=(True, False, True)))
    assert ([str(launch) for launch in plan.launches], plan.finish) == (["dgrad(dx)"], "blend")


@pytest.mark.parametrize("layer", ["small 3x3", "1x1"])
def test_unfused(layer):
    for fields, algorithm in ((WM, "direct"), (("tie",), "none")):
        assert launches(layer, fields, algorithm, fused=False) == ["wgrad(dW, f)", "dgrad(dx)"]
    assert launches(layer, IA, "direct", fused=False) == ["dgrad(dx, z)", "wgrad(f)", "wgrad(dW)"]


def test_a_weight_in_another_layout_has_no_one_pass_launch():
    p = problem("1x1", WM, "direct")
    assert [str(v) for v in plan_backward(p._replace(strides=(1, 1, 1, 64))).launches] == ["wgrad(dW, f)", "dgrad(dx)"]


def means(layer, fields, algorithm, **options) -> set[str]:
    operands = plan_backward(problem(layer, fields, algorithm, **options)).operands
    return {name for name in operands if name.endswith(("mean", "shift"))}


@pytest.mark.parametrize("layer", LAYERS)
def test_one_factor_of_each_product_is_centered_by_its_mean(layer):
    """That of the smaller tensor if it may be either; the other by a shift, in float32 by its mean."""
    input, weight, _ = LAYERS[layer]
    more_outputs = weight[0] > input[1]
    assert means(layer, (*WM, "center"), "direct") == ({"x_mean", "y_shift"} if more_outputs else {"x_shift", "y_mean"})
    assert means(layer, (*WM, "center"), "direct", dtype="float32") == {"x_mean", "y_mean"}
    # If z is stored, it is computed from a centered copy of y.
    in_one_pass = launches(layer, IA, "direct") == ["pointwise(dx, dW, f)"]
    assert means(layer, (*IA, "center"), "direct") == ({"x_shift", "y_mean"} if in_one_pass else {"x_shift"})
    assert means(layer, (*AA, "center"), "direct") == {"x_shift"}  # u is the response to a centered copy of x
    for fields in (WM, IA, AA):
        assert not means(layer, fields, "direct")
    assert "x_shift" not in means(layer, ("null", "center"), "direct")  # x is not read


def test_means_of_gram_matrices():
    assert means("1x1", (*IA, "center"), "input_gram") == {"x_mean"}
    for dtype, of_x in (("bfloat16", "x_shift"), ("float32", "x_mean")):
        found = means("1x1 of many channels", (*IA, "center"), "response_gram", dtype=dtype)
        assert found == {"y_mean", of_x}


@pytest.mark.parametrize(("n", "depth"), [(256, 64), (100, 64), (48, 32), (4, 16)])
def test_a_step_of_a_centered_rule_reads_few_samples_that_do_not_exist(n, depth):
    for layer in ("3x3", "small 3x3", "1x1"):
        p = problem(layer, (*WM, "center"), "direct")
        g = p.geometry._replace(N=n * p.rows_per_sample)
        launch = plan_backward(p._replace(geometry=g, samples=n)).launches[0]
        flags = launch.constants.get("FLAGS") or launch.constants["WGRAD_FLAGS"]
        assert depth == launch.tile.BP
        assert (n % depth != 0) == flags.TAIL


def test_units_belong_to_float16():
    for dtype, units in (("float16", {"z_unit", "u_unit"}), ("bfloat16", set()), ("float32", set())):
        operands = plan_backward(problem("3x3", EVERYTHING, "direct", dtype=dtype)).operands
        assert {name for name in operands if name.endswith("unit")} == units


def test_a_launch_names_its_tensors_and_numbers():
    dgrad, wgrad, _ = plan_backward(problem("3x3", IA, "direct")).launches
    assert {k: v for k, v in dgrad.arguments.items() if v is not None} == {
        "p_dy": "dy", "p_y": "y", "p_feedback": "B", "p_x": "x", "p_dx": "dx", "p_z": "z", "N": 256,
        "z_scale": "z_scale", "x_scale": "x_scale",
    }  # fmt: skip
    assert (wgrad.arguments["p_x"], wgrad.arguments["p_u"], wgrad.arguments["scale"]) == ("z", "y", "scale")
    assert (wgrad.arguments["p_feedback"], wgrad.arguments["decay"], wgrad.arguments["p_weight"]) == (
        "feedback", "decay", None,
    )  # fmt: skip
    assert dgrad.operands["z"] == ((256, 56, 56, 64), "bfloat16")
    assert dgrad.constants["GEO"].N == 0  # one compilation for all batch sizes


@pytest.mark.parametrize("named", [{"amp": 0.7}, {"amp": 0.3, "null": 0.5}, {"amp": -0.6, "null": 0.4}, {"null": 0.5}])
def test_scales_of_the_terms_of_the_response(named):
    """scale * wgrad(z_scale * z - x_scale * x, y) is wgrad(null * z - amp * x, y) / n, with no factor above 1."""
    rule = Coefficients(**named)
    found = scales(rule, 5)
    if not rule.null:
        assert found["scale"] == -rule.amp / 5
        return
    assert found["scale"] * found["z_scale"] == pytest.approx(rule.null / 5)
    assert found["scale"] * found["x_scale"] == pytest.approx(rule.amp / 5)
    assert max(abs(found["z_scale"]), abs(found["x_scale"])) == 1


def test_scales_are_floats():
    """Triton would compile the kernels again for each value of an int."""
    for named in ({"amp": 1, "decay": 1}, {"amp": 1, "null": 2, "tie": 1}, {"sparse": 1, "amp": 1, "self_": 1}):
        assert {type(value) for value in scales(Coefficients(**named), 4).values()} == {float}


@pytest.mark.parametrize("layer", LAYERS)
def test_launches_of_a_plan_agree_on_their_operands(layer):
    """They are checked once, and share a workspace of the largest size."""
    for fields, algorithm in ((WM, "direct"), (IA, "direct"), (EVERYTHING, "direct"), ((), "none")):
        for part in (False, True):
            plan = plan_backward(problem(layer, fields, algorithm, part=part))
            needed = needs(plan.launches)
            for launch in plan.launches:
                for name, (shape, dtype) in launch.operands.items():
                    assert needed.operands[name] == (shape, getattr(torch, dtype))
                assert needed.workspace >= launch.workspace


@pytest.mark.parametrize("layer", LAYERS)
def test_consumer_blackwell_has_the_tiles_of_sm_80(layer):
    """It has less than half of the shared memory of sm_90 and sm_100."""
    tiles = {}
    for capability in (80, 90, 100, 103, 120, 121):
        p = problem(layer, IA, "direct")
        plan = plan_backward(p._replace(target=Target("bfloat16", capability=capability)))
        tiles[capability] = [launch.tile for launch in plan.launches]
    assert tiles[80] == tiles[120] == tiles[121] != tiles[90] == tiles[100] == tiles[103]


def test_a_coefficient_that_is_not_implemented_is_refused():
    with pytest.raises(ValueError, match=r"^rule.growth is not 0, expected 0: the Triton kernels do not "):
        launches("3x3", (*WM, "growth"), "direct")


@pytest.mark.parametrize(("field", "algorithm"), [("amp", "none"), ("sparse", "none"), ("sparse", "response_gram")])
def test_a_coefficient_that_the_algorithm_does_not_implement_is_refused(field, algorithm):
    message = f"^rule.{field} is not 0, expected 0: the Triton kernels do not implement it by algorithm '{algorithm}'$"
    with pytest.raises(ValueError, match=message):
        launches("1x1", (field,), algorithm)


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match=r"^algorithm is 'moment', expected one of none, direct, input_gram, resp"):
        launches("1x1", WM, "moment")


def test_a_strided_pointwise_layer():
    """Its dgrad writes the zeros of the positions that it does not read, unless the launch has z, on those it reads."""
    p = problem("strided 1x1", WM, "input_gram")
    read, whole = p.geometry, p.strided
    assert (read.N, whole.N * whole.H * whole.W) == (128 * 28 * 28, 128 * 55 * 56)
    for fields, algorithm, expected, dx in (
        ((), "none", ["wgrad(dW, f)", "dgrad(dx)"], whole),
        (WM, "input_gram", ["wgrad(gram)", "wgrad(dW)", "dgrad(dx)"], whole),
        (IA, "direct", ["dgrad(dx, z)", "wgrad(f)", "wgrad(dW)"], read),
    ):
        plan = plan_backward(problem("strided 1x1", fields, algorithm))
        assert [str(launch) for launch in plan.launches] == expected
        assert plan.dx == dx
        shapes = {name: shape for launch in plan.launches for name, (shape, _) in launch.operands.items()}
        assert shapes["dy"] == (read.N, 1, 1, 512)
        assert shapes["dx"] == (dx.N, dx.H, dx.W, 256)


def test_planning_is_cached_and_touches_no_tensor(monkeypatch):
    p = problem("3x3", IA, "direct", part=True)
    plan_backward.cache_clear()

    def touched(*_, **__):
        raise AssertionError("planning made a tensor or looked at a device")

    for name in ("empty", "empty_like", "zeros", "tensor"):
        monkeypatch.setattr(torch, name, touched)
    for name in ("is_available", "get_device_properties", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, touched)
    first = plan_backward(p)
    assert plan_backward(problem("3x3", IA, "direct", part=True)) is first
    assert not any(isinstance(v, torch.Tensor) for launch in first.launches for v in launch.arguments.values())


def test_layer_geometry():
    """Pointwise layers are linear layers over the positions that they read."""
    assert layer_geometry((3, 5, 16), (24, 16), None) == (Geometry(15, 16, 24), 5, None)
    assert layer_geometry((3, 16, 5, 4), (24, 16, 1, 1), DENSE) == (Geometry(60, 16, 24), 20, None)
    shapes, window = ((3, 16, 5, 4), (24, 16, 1, 1)), ((2, 3), (0, 0), (1, 1))
    assert layer_geometry(*shapes, window) == (Geometry(18, 16, 24), 6, conv_geometry(*shapes, *window))
    for kernel, padding in (((1, 1), (1, 0)), ((3, 3), (0, 0))):
        shapes, window = ((3, 16, 5, 4), (24, 16, *kernel)), ((2, 2), padding, (1, 1))
        assert layer_geometry(*shapes, window) == (conv_geometry(*shapes, *window), 1, None)
