"""A damaged checkpoint and a full disk end the training program in one line, and cost nothing that was written."""

import errno
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
PROGRAM = Path(__file__).parent.parent / "examples" / "train.py"
SHORT = ["digits-kp", "--epochs", "1", "--every", "100", "--batch", "256"]


def train(out, *options, limit=""):
    """One run of the program; ``limit`` is a shell command before it."""
    command = " ".join(map(str, [sys.executable, PROGRAM, *SHORT, "--out", out, *options]))
    return subprocess.run(["bash", "-c", f"{limit} exec {command}"], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run = train(out)
    assert run.returncode == 0, run.stderr
    return (out / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_checkpoint_is_named(tmp_path, finished, damage):
    contents = {"truncated": finished[: len(finished) // 2], "empty": b"", "text": b"no checkpoint\n"}[damage]
    (tmp_path / "checkpoint.pt").write_bytes(contents)
    run = train(tmp_path, "--resume")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        f"train.py: {tmp_path / 'checkpoint.pt'} is damaged, expected a whole checkpoint: remove it to start again"
    )
    assert "Traceback" not in run.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == contents


def test_a_full_disk_ends_in_one_line(tmp_path, finished):
    """A limit on the size of a file stands in for a full disk: writing fails half way."""
    run = train(tmp_path, limit=f"trap '' XFSZ; ulimit -f {len(finished) // 1024 // 2};")
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert (
        last == f"train.py: {tmp_path / 'checkpoint.pt'} was not written, File too large: what was there before stays"
    )
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.glob("checkpoint.*"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    checkpoint = importlib.import_module("training.checkpoint")
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"steps": 1}, path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"checkpoint\.pt was not written, No space left on device: what was there"):
        checkpoint.save({"steps": 2}, path)
    assert checkpoint.load(path) == {"steps": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
