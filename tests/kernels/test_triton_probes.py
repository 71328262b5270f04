"""The Triton kernels of rules that read probes: signs, gradients against float64, launches and optimizer steps."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_cases
from torch import nn
from triton_cases import DEVICE, GPU, assert_near, shuffled_programs, uninitialized_memory_is_nan  # noqa: F401

import pyfeedback
from pyfeedback.backends import dispatch
from pyfeedback.backends.composite.probes import probe_gradient
from pyfeedback.core.coefficients import COEFFICIENTS, Coefficients
from pyfeedback.core.probes import Part, ProbeCount, ProbeProblem, part_of

draw_words, word_signs = triton_cases.signs.draw_words, triton_cases.signs.word_signs
probe_table = triton_cases.probe_table

pytestmark = [*triton_cases.MARKS, pytest.mark.usefixtures("uninitialized_memory_is_nan")]

SEED, STEP = -(2**40) - 3, 2**31 + 5  # neither fits an unsigned or a signed number of 32 bits
RULES = {
    "wm": {"amp": 1.0, "decay": 1.0},
    "ia": {"amp": 2.0, "null": 1.0, "decay": 1.0},
    "oja": {"amp": 0.5, "null": 0.5},
    "aa": {"amp": 1.0, "sparse": 1.0},
    "all": {"amp": 0.7, "null": 0.3, "sparse": 0.5, "self_": 0.2, "decay": 0.1},
    "self": {"self_": 0.5, "decay": 1.0},
}
SMALL = {"BR": 16, "BM": 32, "BP": 32, "BS": 16, "BI": 32}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of which a tiny layer has several in each dimension."""
    if GPU:
        pytest.skip("the interpreter needs tiny layers")
    choose = probe_table.choose_tile
    monkeypatch.setattr(probe_table, "choose_tile", lambda *a: choose(*a)._replace(**SMALL))


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched."""
    names = []
    launches = probe_table.launches

    def recorded(*arguments):
        found = launches(*arguments)
        names.extend(launch.kernel.__name__ for launch in found)
        return found

    monkeypatch.setattr(probe_table, "launches", recorded)
    return names


# The signs


def philox(counter, key: int) -> np.ndarray:
    """Philox4x32-10 of Salmon et al. 2011: four words of 32 bits for each counter of four words."""
    c = [np.asarray(word, dtype=np.uint64) for word in np.broadcast_arrays(*counter)]
    low, shift = np.uint64(2**32 - 1), np.uint64(32)
    k0, k1 = key % 2**32, key >> 32
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [second >> shift ^ c[1] ^ np.uint64(k0), second & low, first >> shift ^ c[3] ^ np.uint64(k1), first & low]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack(c, -1)


def expected_signs(probes: int, inputs: int, index: int, step=STEP, seed=SEED, first=0) -> torch.Tensor:
    """The signs x [M, d] that the kernels draw, in float64."""
    chunks = np.arange(-(-inputs // 128))
    words = philox((first + np.arange(probes)[:, None], chunks[None], index, step % 2**32), seed % 2**64)
    bits = words[..., None] >> np.arange(32, dtype=np.uint64) & np.uint64(1)
    return torch.from_numpy(bits.reshape(probes, -1)[:, :inputs].astype(np.float64) * 2 - 1).to(DEVICE)


def signs_kernel(p_x, i_chunk, index, seed_low, seed_high, step, M: tl.constexpr):
    o_m = tl.arange(0, M)
    b_x = word_signs(draw_words(o_m, i_chunk, index, seed_low, seed_high, step), M, tl.float32)
    tl.store(p_x + o_m[:, None] * 128 + tl.arange(0, 128)[None, :], b_x)


with pytest.MonkeyPatch.context() as _patch:
    if not GPU:
        _patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is decorated
    signs_kernel = triton.jit(signs_kernel, do_not_specialize=["seed_low", "seed_high", "step"])


def drawn(probes: int, chunk: int, index: int, step=STEP, seed=SEED) -> torch.Tensor:
    x = torch.zeros(probes, 128, device=DEVICE)
    numbers = [probe_table.signed(number) for number in (seed, seed >> 32, step)]
    signs_kernel[(1,)](x, chunk, index, *numbers, M=probes)
    return x.double()


def test_the_generator_of_this_test_is_that_of_the_paper():
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # for a counter and key of zeros, from Random123
    assert philox((0, 0, 0, 0), 0).tolist() == known


def test_signs_are_bits_of_philox():
    for chunk, index, step, seed in ((0, 0, 0, 0), (3, 7, STEP, SEED), (1, 200, 1, 2**63 + 11)):
        found = drawn(32, chunk, index, step, seed)
        torch.testing.assert_close(found, expected_signs(32, 512, index, step, seed)[:, chunk * 128 :][:, :128])


def test_signs_are_white_and_independent():
    """Means and correlations of 4,096 signs deviate from 0 by less than 5 standard deviations."""
    x = drawn(32, 0, 0)
    assert x.unique().tolist() == [-1, 1]
    moments = [(x.t() @ x / 32).fill_diagonal_(0), (x @ x.t() / 128).fill_diagonal_(0)]
    assert moments[0].abs().max() < 6 / 32**0.5
    assert moments[1].abs().max() < 6 / 128**0.5
    others = [drawn(32, 1, 0), drawn(32, 0, 1), drawn(32, 0, 0, STEP + 1), drawn(32, 0, 0, STEP, SEED + 1)]
    others.append(drawn(32, 0, 0, STEP, SEED + 2**32))
    for value in (x.mean(), *((x * other).mean() for other in others)):
        assert abs(value) < 5 / 4096**0.5


def basis_rows(part: Part, inputs: int, index: int, seed=SEED) -> torch.Tensor:
    """The probes of a part of a basis [M, d] that the kernels draw, in float64."""
    columns = expected_signs(1, inputs, index, part.draw, seed, first=2**32 - 1)
    factor, shift = probe_table.row_order(seed, index, part.draw)
    rows, mask = np.arange(part.start, part.stop)[:, None], 2**part.power - 1
    e = np.arange(inputs)
    bits = (rows * factor + shift) & mask & e
    for i in (16, 8, 4, 2, 1):
        bits = bits ^ bits >> i
    paley = np.array(part.paley)[rows >> part.power] >> (e >> part.power)
    return part.scale * columns * torch.from_numpy(1.0 - 2 * ((bits ^ paley) & 1)).to(DEVICE)


@pytest.mark.parametrize("inputs", [3, 32, 40, 200, 370, 500])
def test_the_rows_of_a_basis_are_orthogonal(inputs):
    count = ProbeCount(0, 0, 0.0, sweep=3)
    parts = [basis_rows(part_of(count, inputs, 3 + i), inputs, 5) for i in range(3)]
    moment = sum(x.t() @ x / len(x) for x in parts) / 3
    torch.testing.assert_close(moment, torch.eye(inputs, dtype=torch.float64, device=DEVICE))


# The gradients


def matrices(groups: int, rows: int, inputs: int, dtype, seed: int, transposed=False, offset=0) -> torch.Tensor:
    """A weight [G, K, d]: dense, as of a transposed convolution, or at an address that is not aligned."""
    shape = (groups, inputs, rows) if transposed else (groups, rows, inputs)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    found = triton_cases.surround(values, offset)
    return found.mT if transposed else found


def problem(shape, probes: int, terms: dict, index: int, dtype=torch.float32, **options) -> ProbeProblem:
    weights = [matrices(*shape, dtype, 2 * index + i, **options) for i in range(2)]
    return ProbeProblem(*weights, probes, Coefficients(**terms), index)


LAYERS = {  # shape [G, K, d], probes and layout
    "linear 7 -> 3": ((1, 3, 7), 5, {}),
    "3x3 of 5 channels": ((1, 6, 45), 37, {}),
    "depthwise": ((20, 1, 9), 20, {}),
    "grouped": ((3, 7, 36), 21, {}),
    "transposed": ((1, 18, 5), 19, {"transposed": True}),
    "grouped transposed": ((2, 10, 4), 3, {"transposed": True}),
    "aligned": ((1, 18, 144), 33, {}),
    "not aligned": ((1, 8, 16), 9, {"offset": 1}),
    "more rows than probes": ((1, 35, 20), 4, {}),
    "one weight": ((1, 1, 1), 1, {}),
}


def check(problems, dtype, seed=SEED, step=STEP):
    found = probe_table.probe_gradients(problems, seed, step)
    for p, gradient in zip(problems, found, strict=True):
        inputs = p.weight.shape[2]
        if p.part is None:
            x = expected_signs(p.probes, inputs, p.layer_index, step, seed)
        else:
            x = basis_rows(p.part, inputs, p.layer_index, seed)
        oracle = probe_gradient(p.weight, p.feedback, x, p.rule)
        composed = probe_gradient(p.weight, p.feedback, x.float(), p.rule)
        assert gradient.dtype == dtype
        assert gradient.shape == p.weight.shape
        assert_near(gradient, composed.to(dtype), oracle)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "normalize"),
    [("wm", False), ("ia", False), ("ia", True), ("oja", False), ("aa", False), ("all", True), ("self", False)],
)
def test_gradients_of_many_layers(rule, normalize, small_tiles):
    terms = {**RULES[rule], "normalize": normalize}
    check([problem(s, m, terms, i, **o) for i, (s, m, o) in enumerate(LAYERS.values())], torch.float32)


@pytest.mark.parametrize("rule", ["wm", "ia", "all"])
def test_gradients_of_orthogonal_probes(rule, small_tiles):
    """Beside independent ones; bases without Paley's factor, and with those of orders 12 and 20."""
    layers = [problem((1, 5, 6), 4, RULES[rule], 0)]
    for index, (inputs, sweep) in enumerate([(3, 1), (3, 2), (40, 3), (370, 11), (600, 29)], 1):
        part = part_of(ProbeCount(0, 0, 0.0, sweep), inputs, 7)
        groups = 3 if index == 3 else 1
        layers.append(problem((groups, 5, inputs), 1, RULES[rule], index)._replace(part=part))
    assert {len(p.part.paley) for p in layers[1:]} == {1, 12, 20}
    check(layers, torch.float32)


def test_the_optimizer_uses_a_whole_basis(interpreter, launched):
    """One estimate of the weight mirror is then exact."""
    model = pyfeedback.convert(network(), pyfeedback.rule("wm", source="probes", orthogonal=True, tau=1.0, probes=2.0))
    with pyfeedback.backend("triton"):
        pyfeedback.optim.SGD(model, lr=0.0).step()
    assert len(launched) == 2
    for _, layer in pyfeedback.feedback_layers(model):
        torch.testing.assert_close(layer.feedback, layer.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rule", ["wm", "all"])
def test_gradients_of_16_bits(rule, dtype, small_tiles):
    terms = {**RULES[rule], "normalize": True}
    layers = [LAYERS[name] for name in ("3x3 of 5 channels", "grouped", "not aligned", "more rows than probes")]
    check([problem(s, m, terms, i, dtype, **o) for i, (s, m, o) in enumerate(layers)], dtype)


@pytest.mark.slow
def test_gradients_with_the_tiles_of_a_device():
    terms = {**RULES["all"], "normalize": True}
    shapes = [((1, 70, 133), 70), ((2, 40, 20), 66), ((1, 66, 12), 3)]
    check([problem(s, m, terms, i) for i, (s, m) in enumerate(shapes)], torch.float32)


def test_every_layer_has_its_own_rule(small_tiles):
    terms = [{**RULES[rule], "normalize": normalize} for rule in RULES for normalize in (False, True)]
    check([problem((1, 5, 8), 7, t, 5 * i) for i, t in enumerate(terms)], torch.float32)


def test_both_moments_are_used():
    """y'y where there are few rows, and y B where there are few probes."""
    tile = probe_table.choose_tile("float32", False, False)
    layers = []
    for shape, probes in (((1, 16, 200), 200), ((1, 200, 16), 20), ((2, 200, 16), 20)):
        p = problem(shape, probes, RULES["ia"], 0)
        layers.append(probe_table.Layer(0, 0, shape, p.weight.stride(), p.feedback.stride(), probes, p.rule, 0))
    plan = probe_table.make_plan(tuple(layers), 4, tile)
    projects = {(row[probe_table.T.rows], row[probe_table.T.projects]) for row in plan.table[:3]}
    assert projects == {(16, 0), (200, 1), (400, 0)}


def test_a_feedback_of_zero_has_no_null_term():
    p = problem((1, 5, 9), 20, {**RULES["ia"], "normalize": True}, 0)
    check([p._replace(feedback=torch.zeros_like(p.feedback))], torch.float32)


def test_a_weight_without_a_coefficient_is_not_read():
    """As NaN would show."""
    p = problem((1, 5, 9), 20, {"amp": 1.0}, 0)
    check([p._replace(feedback=torch.full_like(p.feedback, torch.nan))], torch.float32)


def test_the_difference_of_close_weights_is_exact():
    """Under aa, and in the terms without data."""
    p = problem((1, 20, 30), 40, {**RULES["aa"], "self_": 1.0, "decay": 1.0}, 0)
    close = p._replace(feedback=p.weight * (1 + 2**-20))
    (gradient,) = probe_table.probe_gradients([close], SEED, STEP)
    oracle = probe_gradient(close.weight, close.feedback, expected_signs(40, 30, 0), close.rule)
    assert (gradient.double() - oracle).abs().max() < 1e-5 * oracle.abs().max()


def test_dtypes_are_launched_apart(launched):
    problems = [problem((1, 4, 6), 8, RULES["wm"], i, t) for i, t in enumerate([torch.float32, torch.float16] * 2)]
    found = probe_table.probe_gradients(problems, SEED, STEP)
    assert [g.dtype for g in found] == [p.weight.dtype for p in problems]
    assert len(launched) == 4
    for p, gradient in zip(problems, found, strict=True):
        (alone,) = probe_table.probe_gradients([p], SEED, STEP)
        torch.testing.assert_close(gradient, alone, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["wm", "ia"])
def test_equal_calls_give_equal_bits_in_any_order_of_programs(rule, monkeypatch, small_tiles):
    terms = {**RULES[rule], "normalize": True}
    problems = [problem(s, m, terms, i, **o) for i, (s, m, o) in enumerate(list(LAYERS.values())[2:4])]
    first = probe_table.probe_gradients(problems, SEED, STEP)
    torch.testing.assert_close(probe_table.probe_gradients(problems, SEED, STEP), first, rtol=0, atol=0)
    other = probe_table.probe_gradients(problems, SEED, STEP + 1)
    assert not torch.equal(first[0], other[0])
    with shuffled_programs(monkeypatch, 1):
        torch.testing.assert_close(probe_table.probe_gradients(problems, SEED, STEP), first, rtol=0, atol=0)


# The launches


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["wm", "wm", "aa"], ["response", "gradient"]),
        (["ia", "ia"], ["response", "moment", "gradient"]),
        (["wm", "ia", "all"], ["response", "moment", "gradient"]),
        (["self"], ["gradient"]),
    ],
)
def test_number_of_launches(rules, expected, launched):
    check([problem((1, 4, 6), 8, RULES[rule], i) for i, rule in enumerate(rules)], torch.float32)
    assert launched == [f"{name}_kernel" for name in expected]


def test_the_table_is_built_again_if_an_address_or_a_size_changes(monkeypatch):
    built = []
    make = probe_table.make_plan
    monkeypatch.setattr(probe_table, "make_plan", lambda *a: (built.append(a), make(*a))[1])
    probe_table._table.cache_clear()
    p = problem((1, 4, 6), 8, RULES["wm"], 0)
    check([p], torch.float32)
    check([p], torch.float32, step=STEP + 1)
    assert len(built) == 1
    check([p._replace(weight=p.weight.clone())], torch.float32)
    check([p._replace(probes=9)], torch.float32)
    assert len(built) == 3


def test_parts_of_a_factor():
    """Three bfloat16 numbers hold a float32, one a bfloat16; 16 bits are more than TF32 or float16 has."""
    tiles = [probe_table.choose_tile(*a) for a in (("float32", False, False), ("float32", True, False),
             ("bfloat16", False, False), ("bfloat16", False, True), ("float16", False, False))]  # fmt: skip
    assert probe_table.choose_tile("bfloat16", False, False, amd=True).PRECISION == "ieee"
    assert [(t.W_PARTS, t.Y_PARTS, t.PRECISION) for t in tiles] == [
        (3, 3, "ieee"), (2, 2, "tf32"), (1, 2, "tf32"), (2, 2, "tf32"), (2, 2, "tf32"),
    ]  # fmt: skip


# Dispatch and the optimizer's step


@pytest.fixture
def interpreter(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_what_the_kernels_do_not_implement_is_composed(interpreter, launched, monkeypatch):
    monkeypatch.setattr(dispatch.triton, "PROBES_IMPLEMENTED", frozenset({"amp", "decay"}))
    given = problem((1, 4, 6), 8, RULES["wm"], 0)
    with pyfeedback.backend("triton"):
        dispatch.probe_gradients([given], SEED, STEP)
        assert len(launched) == 2
        for name in ({*COEFFICIENTS, "normalize"}) - {"amp", "decay"}:
            refused = given._replace(rule=given.rule._replace(**{name: True if name == "normalize" else 0.5}))
            found = dispatch.probe_gradients([refused], SEED, STEP)
            torch.testing.assert_close(found, dispatch.probes.probe_gradients([refused], SEED, STEP))
        double = problem((1, 4, 6), 8, RULES["wm"], 0, torch.float64)
        assert dispatch.probe_gradients([double, given], SEED, STEP)[0].dtype == torch.float64
    assert len(launched) == 4
    dispatch.probe_gradients([given], SEED, STEP) if not GPU else None
    with pyfeedback.backend("composite"):
        dispatch.probe_gradients([given], SEED, STEP)
    assert len(launched) == 4


def test_nothing_unmeasured_is_chosen_automatically():
    for device in ("cpu", "cuda"):
        assert dispatch.implementation("probe_gradients", device, "auto") is not dispatch.triton.probe_gradients


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, groups=2), nn.ConvTranspose2d(4, 3, 2), nn.Flatten(), nn.Linear(3 * 9, 5)
    return nn.Sequential(*layers).to(DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["wm-probes", "ia-probes"])
def test_an_optimizer_aligns_the_feedback(rule, interpreter, launched):
    model = pyfeedback.convert(
        network(), pyfeedback.rule(rule, probes=4.0, orthogonal=False, every=1, growth=0.0, nu=0.2, tau=4.0)
    )
    optimizer = pyfeedback.optim.SGD(model, lr=0.0)
    steps = 8
    with pyfeedback.backend("triton"):
        for _ in range(steps):
            optimizer.step()
    assert len(launched) == steps * (2 if rule == "wm-probes" else 3)
    for name, found in pyfeedback.alignment(model).items():
        assert found.angle < 35, (name, found.angle)
