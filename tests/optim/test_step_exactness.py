"""Bit-exact updates: the random stream, rounding of ties, misaligned operands, and skipped steps."""

import ctypes
import subprocess
from pathlib import Path

import cuda_emulator
import pytest
import torch
from extension_ops import IMPLEMENTATIONS, PARAMETERS

import pyfeedback
from pyfeedback import Rule, functional
from pyfeedback.optim import AdamW

CSRC = Path(__file__).parents[2] / "csrc"

# Known answers of philox4x32-10 from Random123 (kat_vectors): counter, key, result.
PHILOX = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.fixture(scope="module")
def philox(tmp_path_factory):
    """philox4x32_10 of csrc/philox.h."""
    if cuda_emulator.COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("philox")
    (folder / "philox.cpp").write_text(
        '#include "philox.h"\n'
        'extern "C" void draw(const uint32_t* c, uint64_t key, uint32_t* out) {\n'
        "  const auto drawn = pyfeedback::philox4x32_10({{c[0], c[1], c[2], c[3]}}, key);\n"
        "  for (int i = 0; i < 4; ++i) out[i] = drawn.word[i];\n"
        "}\n"
    )
    library = folder / "philox.so"
    command = [
        *cuda_emulator.COMPILER.split(),
        "-std=c++17",
        "-shared",
        "-fPIC",
        f"-I{CSRC}",
        folder / "philox.cpp",
        "-o",
        library,
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).draw


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX, ids=["zeros", "ones", "digits of pi"])
def test_philox_gives_the_published_answers(philox, counter, key, answer):
    words, drawn = (ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 4)()
    philox(words, ctypes.c_uint64(key[0] | key[1] << 32), drawn)
    assert list(drawn) == answer


@pytest.fixture(params=PARAMETERS)
def ops(request):
    return IMPLEMENTATIONS[request.param]


STEP = {"decay": [0.0], "self_": [0.0], "tie": [1.0], "lr": 1.0}


@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_bfloat16_rounds_ties_to_even(ops, layout):
    """1 + k / 128 minus half a unit is a tie. torch rounds it to the neighbor whose last bit is 0."""
    feedback = (1 + torch.arange(1, 65).float() / 128).bfloat16()
    grad = torch.full((64,), 2**-8).bfloat16()
    expected = (feedback.float() - grad.float()).bfloat16()
    assert (expected != feedback).sum() == 32
    if layout == "strided":
        spread = torch.zeros(128, dtype=torch.bfloat16)
        spread[::2] = feedback
        feedback = spread[::2]
    ops.extension_feedback_step_([feedback], [], [grad], [], **STEP)
    assert torch.equal(feedback, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("misaligned", ["feedback", "weight", "grad", "momentum_buffer"])
def test_one_misaligned_operand(ops, misaligned, dtype):
    """Vectors of sixteen bytes are read only if all operands are aligned to them."""
    names = ("feedback", "weight", "grad", "momentum_buffer")
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype) for name in names}
    operands = {}
    for name in names:
        storage = torch.full((1016,), float("nan"), dtype=dtype)
        start = (-storage.data_ptr() % 16) // storage.element_size() + (name == misaligned)
        operands[name] = storage[start : start + 1000].copy_(drawn[name])
    options = {"decay": [0.2], "self_": [0.3], "tie": [0.5], "lr": 0.1, "momentum": 0.9}
    ops.extension_feedback_step_(*([operands[name]] for name in names), **options)
    wide = {name: t.double() for name, t in drawn.items()}
    buffer = 0.9 * wide["momentum_buffer"] + 0.2 * wide["feedback"] - 0.3 * wide["weight"] + 0.5 * wide["grad"]
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(operands["momentum_buffer"].double(), buffer, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        operands["feedback"].double(), wide["feedback"] - 0.1 * buffer, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_operands_that_are_dense_in_unlike_orders(ops, momentum):
    """Each fills its memory without gaps, none is contiguous, and element i of one is not element i of another."""
    generator = torch.Generator().manual_seed(0)
    orders = [(2, 0, 1), (1, 2, 0), (0, 2, 1), (2, 1, 0)]  # of the dimensions in memory
    drawn = [torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in orders]
    feedback, weight, grad, buffer = (
        t.permute(order).contiguous().permute([order.index(d) for d in range(3)])
        for t, order in zip(drawn, orders, strict=True)
    )
    numbers = {"decay": [0.2], "self_": [0.3], "tie": [0.5], "lr": 0.1, "momentum": momentum}
    ops.extension_feedback_step_([feedback], [weight], [grad], [buffer] if momentum else [], **numbers)
    direction = 0.2 * drawn[0] - 0.3 * drawn[1] + 0.5 * drawn[2] + momentum * drawn[3]
    torch.testing.assert_close(feedback, drawn[0] - 0.1 * direction, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("misaligned", [0, 1], ids=["feedback", "weight"])
def test_alignment_of_one_misaligned_operand(ops, misaligned):
    pair = []
    for k in range(2):
        storage = torch.full((1016,), float("nan"))
        start = (-storage.data_ptr() % 16) // 4 + (k == misaligned)
        pair.append(storage[start : start + 1000].copy_(torch.randn(1000, generator=torch.Generator().manual_seed(k))))
    b, w = (t.double() for t in pair)
    (products,) = ops.extension_alignment_products([pair[0]], [pair[1]])
    torch.testing.assert_close(products, torch.stack([b.dot(b), w.dot(w), b.dot(w)]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["composite", "extension"])
@pytest.mark.parametrize("bad", ["weight", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skip_nonfinite_looks_at_all_that_is_read(backend, bad, value):
    operands = {name: [torch.ones(5), torch.ones(3)] for name in ("feedback", "weight", "grad", "momentum_buffer")}
    operands[bad][1][2] = value
    options = {"decay": [0.1] * 2, "self_": [0.2] * 2, "tie": [0.3] * 2, "lr": 0.1, "momentum": 0.9}
    with pyfeedback.backend(backend):
        functional.feedback_step_(**operands, **options, skip_nonfinite=True)
        for name in ("feedback", "momentum_buffer"):
            assert all(torch.equal(t, torch.ones_like(t)) for t in operands[name])
        unread = {"self_" if bad == "weight" else "tie": [0.2, 0.0]}
        functional.feedback_step_(**operands, **(options | unread), skip_nonfinite=True)
    assert all(t.isfinite().all() and not torch.equal(t, torch.ones_like(t)) for t in operands["feedback"])


@pytest.mark.parametrize("backend", ["composite", "extension"])
@pytest.mark.parametrize("terms", [{"tie": 1.0, "self_": 0.2}, {"self_": 0.2}, {"tie": 1.0}], ids=str)
def test_adamw_decays_by_the_gradient_but_for_kolen_pollack(terms, backend):
    """The decay of a rule is part of its gradient, except for Kolen-Pollack, where it is decoupled like W's."""
    torch.manual_seed(0)
    layer = pyfeedback.nn.Linear(4, 3, rule=Rule(decay=0.3, **terms))
    own = AdamW(layer, lr=0.01, weight_decay=0.3)
    layer.weight.grad = torch.randn_like(layer.weight)
    b, w, g = (t.detach().clone() for t in (layer.feedback, layer.weight, layer.weight.grad))
    reference = torch.nn.Parameter(b.clone())
    tied = "self_" not in terms
    theirs = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.3 if tied else 0.0)
    with pyfeedback.backend(backend):
        for _ in range(3):
            made = terms.get("tie", 0.0) * g - terms.get("self_", 0.0) * layer.weight.detach()
            reference.grad = made if tied else made + 0.3 * reference.detach()
            own.step()
            theirs.step()
    torch.testing.assert_close(layer.feedback.detach(), reference.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(layer.weight, w)
