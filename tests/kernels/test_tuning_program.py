"""`python -m pyfeedback tune` and `check`, and what they print."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tuning_cases import CPU, DIRECT, empty_folder, signature, tensors

import pyfeedback
from pyfeedback import __main__ as program
from pyfeedback import tuning
from pyfeedback.backends import choices

folder = empty_folder


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pyfeedback", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_the_program_tunes_and_checks(folder):
    done = run("tune", "--network", "resnet20", "--batch", "1", "--budget", "0.1")
    assert done.returncode == 0, done.stderr
    assert "all backward passes:" in done.stdout
    (file,) = folder.glob("*.json")
    assert len(json.loads(file.read_text())["layers"]) == 6
    done = run("check", "--network", "resnet20", "--batch", "1", "--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all are correct"


BAD_ARGUMENTS = (
    (),
    ("tune", "--batch", "0"),
    ("tune", "--budget", "-1"),
    ("check", "--dtype", "int8"),
    ("check", "--device", "tpu7"),
)


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=" ".join)
def test_the_program_refuses_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(list(arguments))
    assert "usage: python -m pyfeedback" in capsys.readouterr().err


def test_the_program_finds_a_wrong_kernel(monkeypatch, capsys):
    def off(dtype, device):
        return torch.full((4,), 1.0 if dtype == torch.float64 or pyfeedback.current_backend() == "composite" else 1.01)

    monkeypatch.setattr(program, "OPS", {"an op": off})
    monkeypatch.setitem(program.NETWORKS, "resnet20", ())
    assert program.main(["check", "--dtype", "float32", "--device", "cpu"]) == int(pyfeedback.build_info().cpu)
    printed = capsys.readouterr().out.splitlines()
    if pyfeedback.build_info().cpu:
        assert "error 1.0e-02, expected at most" in printed[-2]
        assert printed[-1] == "1 wrong"


def test_a_report_is_a_table():
    input, weight = tensors(2, 16, 3, 3)
    report = tuning.race(signature(input, weight), CPU, 0.01)
    shown = str(tuning.Report(CPU, choices.path_of(CPU), [replace(report, refused={DIRECT: "error 1"})]))
    assert "2x16x3x3 by 8x16x1x1, float32, decay+amp+null" in shown
    assert "refused composite, direct: error 1" in shown
