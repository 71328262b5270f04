"""The benchmarks run: each kind of them once, with a small batch and few rounds."""

import json
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
    out = run(FILES, "--batch", "1", "--network", "resnet20", "--rule", "ia", "--rule", "ia-probes")
    assert int(re.search(r"(\d+) passed", out)[1]) >= len(FILES)


@pytest.mark.slow
def test_whole_steps_are_measured_listed_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--network", "gpt", "--network", "convnext", "--rule", "fa", "--rule", "ia-probes"]
    out = run(["test_network_steps", "test_probe_steps"], *options, "--benchmark-json", tmp_path / "steps.json")
    last = out.partition("time of a whole training step relative to backprop")[2].splitlines()
    assert last[1].split() == ["fa", "ia-probes"]
    assert [line.partition(",")[0].strip() for line in last[2:4]] == ["convnext", "gpt"]
    records = [each["extra_info"] for each in json.loads((tmp_path / "steps.json").read_text())["benchmarks"]]
    assert {(r["network"], r["rule"]) for r in records} == {
        (n, r) for n in ("convnext", "gpt") for r in ("fa", "ia-probes")
    }
    found = {r["network"]: r["ratio_to_plain"] for r in records if r["rule"] == "fa"}
    assert [line.split()[-2] for line in last[2:4]] == [f"{found[name]:.2f}" for name in ("convnext", "gpt")]

    figure = ["step_figure.py", tmp_path / "steps.json", "--out", tmp_path / "steps.png"]
    subprocess.run([sys.executable, *figure], cwd=ROOT / "benchmarks", check=True)
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def run(files, *options):
    """Run files of the benchmarks with small batches and few rounds; return what they print."""
    paths = [str(ROOT / "benchmarks" / f"{file}.py") for file in files]
    always = ["-q", "-p", "no:cacheprovider", "--benchmark-only", "--quick", "--budget", "0.001"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *always, *paths, *map(str, options)],
        cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout
