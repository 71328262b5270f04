"""Launches of the Triton kernels without a GPU, over a stub of the CUDA driver: tests/kernels/driver_stub.

The stub stays in a process, so that each test starts its own. What Triton compiles is kept in its cache.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

FOLDER = Path(__file__).parent / "driver_stub"
ROOT = FOLDER.parents[1]
FLAGS = "-shared -fPIC -O2 -std=gnu11 -Wall -Wextra -Werror -Wl,-soname,libcuda.so.1"
# Microseconds: four times what one core of an AMD EPYC took, with other programs running.
MOST_HOST_TIME = {"wm, pointwise": 40, "ia, small": 34, "ia": 54}
MOST_OF_A_LAYER = {"wm-probes, 64 layers": 20, "wm-probes, 64 layers, orthogonal": 60}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch loads a libcuda of its own"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the stub needs gcc"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("driver_stub") / "libcuda.so.1"
    subprocess.run(["gcc", *FLAGS.split(), str(FOLDER / "libcuda.c"), "-o", str(path)], check=True)
    return path


def run(script: str, library: Path, capability: int) -> str:
    """The output of a script over the stub."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / script), str(library), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_every_kernel_is_launched_as_the_device_allows(library, capability):
    """By Triton's JIT and by handles with the same arguments, which are those that were passed."""
    assert f"cases on sm_{capability}" in run("launches.py", library, capability).splitlines()[-1]


def test_host_time_of_the_launches_of_a_layer(library):
    """With handles, the launches of a layer take a fraction of the time, and a layer that reads probes adds little."""
    table = json.loads(run("host_time.py", library, 90))
    for name, (by_jit, by_handles) in table.items():
        print(f"{name:34} {by_jit:6.1f} us by Triton's JIT {by_handles:6.1f} by handles")
    for name, most in MOST_HOST_TIME.items():
        by_jit, by_handles = table[name]
        assert by_handles < min(by_jit / 2.5, most), name
    by_jit, few = table["wm-probes, 2 layers"]
    assert few < by_jit
    for name, most in MOST_OF_A_LAYER.items():
        assert (table[name][1] - few) / (64 - 2) < most, name
