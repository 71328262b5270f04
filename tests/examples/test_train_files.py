"""The training program with a full disk or a damaged checkpoint: a one-line error, and existing files are kept."""

import resource
import subprocess
import sys
import time

import pytest
import torch
from training_program import PROGRAM, part

pytestmark = pytest.mark.usefixtures("example_folder")

COMMAND = ["digits-fa", "--no-frozen", "--probe", "0", "--every", "1000", "--epochs"]


def ends_in_one_line(started):
    """The one-line error of a process that failed."""
    output, errors = started.communicate(timeout=200)
    assert started.returncode == 1, output + errors
    (line,) = errors.splitlines()
    assert line.startswith("train.py: ")
    return line


@pytest.mark.slow
@pytest.mark.parametrize("limit", [pytest.param(0, marks=pytest.mark.long), 20_000], ids=["log", "checkpoint"])
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(tmp_path, limit):
    """Limit the size of the files of the running process, so that the log or the checkpoint cannot be written."""
    path, command = tmp_path / "checkpoint.pt", [sys.executable, PROGRAM, *COMMAND, "400", "--out", tmp_path]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    patience = time.monotonic() + 120
    while not path.exists():
        assert started.poll() is None, started.stderr.read()
        assert time.monotonic() < patience
        time.sleep(0.01)
    resource.prlimit(started.pid, resource.RLIMIT_FSIZE, (limit, limit))
    line = ends_in_one_line(started)
    assert "File too large" in line
    assert ("checkpoint.pt" in line) == bool(limit)
    assert not list(tmp_path.glob("*.unfinished"))
    state = part("checkpoint").load(path)
    assert state["epoch"] >= 1
    resumed = subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert resumed.stdout.readline().startswith(f"epoch {state['epoch'] + 1:3}/400")
    resumed.kill()
    resumed.communicate()


def cut(contents, share):
    return contents[: int(len(contents) * share)]


DAMAGES = {
    "empty": lambda contents: b"",
    "short": lambda contents: contents[:10],
    "half": lambda contents: cut(contents, 0.5),
    "nearly whole": lambda contents: contents[:-5],
    "text": lambda contents: b"hello world, this is no checkpoint",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_a_one_line_error_and_is_kept(tmp_path, run_program, damage):
    run_program(*COMMAND, 1, "--out", tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(SystemExit) as left:
        run_program(*COMMAND, 1, "--out", tmp_path, "--resume")
    (line,) = str(left.value.code).splitlines()
    assert line.startswith(f"train.py: {path} is damaged, expected a whole checkpoint: ")
    assert path.read_bytes() == before


@pytest.mark.parametrize("state", [{"weights": torch.ones(2)}, [1, 2], 3], ids=["dict", "list", "number"])
def test_a_file_of_something_else_is_refused(tmp_path, run_program, state):
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as left:
        run_program(*COMMAND, 1, "--out", tmp_path, "--resume")
    assert left.value.code == "train.py: the checkpoint is that of no run, expected what state_dict returned"


def test_an_unwritable_folder_is_reported_before_training(tmp_path, run_program):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as left:
        run_program(*COMMAND, 1, "--out", tmp_path / "file")
    assert len(str(left.value.code).splitlines()) == 1


def test_an_error_other_than_a_disk_error_is_raised(tmp_path):
    """No partial file is left."""
    checkpoint = part("checkpoint")
    checkpoint.save({"step": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        checkpoint.save({"step": lambda: None}, tmp_path / "checkpoint.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert checkpoint.load(tmp_path / "checkpoint.pt") == {"step": 1}
