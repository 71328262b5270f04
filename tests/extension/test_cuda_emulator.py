"""The emulator that runs CUDA kernels on the CPU: what it computes, and what it refuses."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import cuda_emulator
import pytest
import torch

pytestmark = pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no C++ compiler")
KERNELS = [
    "indices", "reverse", "reverse_without_barrier", "shuffles", "sum_of_warps", "sum_of_warps_without_barrier",
    "halves", "last_block", "votes", "atomics", "early_return", "divergent_warps", "absent_lane", "outside_its_mask",
    "to_bfloat16", "to_float16", "wide_load",
]  # fmt: skip


class Index(ctypes.Structure):
    _fields_ = tuple((axis, ctypes.c_uint) for axis in "xyz")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = cuda_emulator.build(
        tmp_path_factory.mktemp("cuda_emulator"), [Path(__file__).with_name("cuda_emulator_kernels.cu")]
    )
    library.run.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=cuda_emulator.ORDERS)
def run(request, library):
    """run(kernel, out, grid, block) under every order of the threads; the error, "" for none."""
    return launcher(library, cuda_emulator.ORDERS.index(request.param))


def launcher(library, order):
    def run(kernel, out, grid=(1,), block=(32,)):
        sizes = (Index(*size, *(1,) * (3 - len(size))) for size in (grid, block))
        error = library.run(KERNELS.index(kernel), *sizes, order, ctypes.c_void_p(out.data_ptr()))
        return error.decode()

    return run


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_every_thread_of_every_block_runs_once_and_knows_its_place(run):
    out = torch.zeros(24, 30, dtype=torch.int32)
    assert run("indices", out, (2, 3, 4), (5, 3, 2)) == ""
    assert torch.equal(out, 1000 * torch.arange(24, dtype=torch.int32)[:, None] + torch.arange(30, dtype=torch.int32))


def test_a_barrier_makes_shared_memory_visible(run):
    out = torch.arange(256, dtype=torch.int32)
    assert run("reverse", out, block=(256,)) == ""
    assert torch.equal(out, torch.arange(255, -1, -1, dtype=torch.int32))


def test_the_order_of_threads_shows_a_missing_barrier(library):
    found = []
    for order in range(len(cuda_emulator.ORDERS)):
        out = torch.arange(256, dtype=torch.int32)
        launcher(library, order)("reverse_without_barrier", out, block=(256,))
        found.append(out)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_shuffles(run):
    own = torch.randint(100, (64,), dtype=torch.int32)
    out = torch.cat([own, torch.zeros(192, dtype=torch.int32)])
    for warp in own.split(32):
        out[:32] = warp
        assert run("shuffles", out) == ""
        sums, below, following, fifth = out[:128].view(32, 4).unbind(1)
        assert (sums == warp.sum()).all()
        assert torch.equal(below, warp.cumsum(0).int())
        assert torch.equal(following, torch.cat([warp[1:], warp[-1:]]))
        assert (fifth == warp[5]).all()


def test_a_shuffle_is_no_barrier_of_the_block(run):
    for kernel, right in (("sum_of_warps", True), ("sum_of_warps_without_barrier", False)):
        out = torch.cat([torch.arange(256, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)])
        assert run(kernel, out, block=(256,)) == ""
        assert (out[256:].tolist() == [32 * 28] * 2) == right
        run(kernel, torch.zeros(258, dtype=torch.int32), block=(256,))  # nothing is left in shared memory for the next


def test_lanes_of_a_mask_meet_without_the_others(run):
    out = torch.arange(32, dtype=torch.int32)
    assert run("halves", out) == ""
    assert torch.equal(out, ints(240, 256).repeat(16))


@pytest.mark.parametrize("blocks", [1, 2, 77])
def test_the_last_block_sees_what_the_others_wrote(run, blocks):
    out = torch.zeros(2 + blocks, dtype=torch.int32)
    assert run("last_block", out, (blocks,), (64,)) == ""
    assert out[:2].tolist() == [blocks * 2016, blocks]


def test_votes_of_a_block(run):
    out = torch.zeros(100, dtype=torch.int32)
    assert run("votes", out, block=(100,)) == ""
    assert (out == 2 * 34 + 1).all()


def test_atomics(run):
    out = torch.zeros(3 + 65, dtype=torch.int32)
    out[-1] = -1
    assert run("atomics", out, block=(64,)) == ""
    assert out[0] == 63
    assert 1 <= out[1] <= 64
    assert out[2] == 1
    assert sorted(out[3:].tolist()) == list(range(-1, 64))  # each got what another had left


def test_returned_threads_are_not_waited_for(run):
    out = torch.zeros(64, dtype=torch.int32)
    assert run("early_return", out, block=(64,)) == ""
    assert out.sum() == 40


@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        ("divergent_warps", "never reach"),
        ("absent_lane", "reads a lane that its mask leaves out"),
        ("outside_its_mask", "mask leaves it out"),
    ],
)
def test_what_cuda_leaves_undefined_is_an_error(run, kernel, error):
    assert error in run(kernel, torch.zeros(4, dtype=torch.int32))
    assert run("early_return", torch.zeros(64, dtype=torch.int32)) == ""  # and the next launch is not harmed


@pytest.mark.parametrize(("grid", "block"), [((0,), (32,)), ((1,), (0,)), ((1,), (1025,))])
def test_an_impossible_grid_is_an_error(run, grid, block):
    assert run("indices", torch.zeros(1, dtype=torch.int32), grid, block)


def test_a_misaligned_access_ends_the_process(library):
    code = f"""
import ctypes, torch, test_cuda_emulator
run = test_cuda_emulator.launcher(ctypes.CDLL({library._name!r}), 0)
run("wide_load", torch.zeros(8, dtype=torch.int32), block=(1,))
"""
    folders = [str(Path(file).parent) for file in (__file__, cuda_emulator.__file__)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "misaligned address" in result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_conversions_are_torchs(library, dtype):
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65504.0, 65520.0, 1e-8, 6e-8, 3e38, 1.00390625]
    values = torch.cat([torch.tensor(special), torch.randn(500) * 10 ** torch.empty(500).uniform_(-8, 5)])
    out = values.clone()
    assert launcher(library, 0)(f"to_{str(dtype).removeprefix('torch.')}", out, block=(values.numel(),)) == ""
    torch.testing.assert_close(out, values.to(dtype).float(), equal_nan=True, rtol=0, atol=0)
