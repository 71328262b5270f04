"""The benchmarks run: each kind of them once, with a small batch and few rounds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    "test_alignment",
    "test_call_overhead",
    "test_feedback_step",
    "test_layer_steps",
    "test_optimizers",
    "test_probe_steps",
)


@pytest.mark.long
def test_the_benchmarks_run(tmp_path):
    """benchmarks/test_network_steps.py takes too long."""
    options = ["--benchmark-only", "--quick", "--batch", "1", "--budget", "0.001"]
    options += ["--network", "resnet20", "--rule", "ia", "--rule", "ia-probes"]
    files = [str(ROOT / "benchmarks" / f"{file}.py") for file in FILES]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *options],
        cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= len(FILES)
