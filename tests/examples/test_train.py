"""The training program: a resumed run is bit for bit an uninterrupted one; ways to run it."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_program import PROGRAM, Noisy, few_digits, new_run, nothing, part, settings, table

import pyfeedback
from pyfeedback.rules import PRESETS

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("example_folder")


# Interruptions


class PowerCutError(Exception):
    """Stops a run between two steps."""


def interrupted(chosen, images, at, path, workers=0):
    """A run that is stopped after ``at`` steps and continued by another one from its checkpoint."""
    first = new_run(chosen, images, workers)

    def stop():
        if first.steps == at:
            part("checkpoint").save(first.state_dict(), path)
            raise PowerCutError

    with pytest.raises(PowerCutError):
        first.train(stop, nothing)
    torch.manual_seed(77)
    second = new_run(chosen, images, workers)
    torch.manual_seed(78)
    second.load_state_dict(part("checkpoint").load(path))
    second.train(nothing, nothing)
    return second


def outcome(run):
    rows = [{name: v for name, v in row.items() if name != "seconds"} for row in run.rows]
    return repr(rows), repr(run.monitor.readings)


def assert_same(run, other):
    assert outcome(run) == outcome(other)
    for network, twin in ((run.network, other.network), (run.frozen, other.frozen)):
        assert all(map(torch.equal, network.state_dict().values(), twin.state_dict().values()))


@pytest.mark.parametrize("at", [2, 4, 6], ids=["in the first epoch", "after its last step", "in the second epoch"])
def test_resuming_is_exact(tmp_path, at):
    unbroken = new_run(settings())
    unbroken.train(nothing, nothing)
    assert unbroken.loader.steps == 4
    assert_same(interrupted(settings(), few_digits(), at, tmp_path / "checkpoint.pt"), unbroken)


@pytest.mark.parametrize("rule", PRESETS)
def test_resuming_is_exact_under_every_rule(tmp_path, rule):
    chosen = settings(rule=pyfeedback.rule(rule))
    unbroken = new_run(chosen)
    unbroken.train(nothing, nothing)
    assert_same(interrupted(chosen, few_digits(), 6, tmp_path / "checkpoint.pt"), unbroken)


OPTIMIZERS = [{"optimizer": "adam"}, {"optimizer": "adamw"}, {"noise": 0.1}, {"noise": 0.1, "feedback_lr": 0.01}]


@pytest.mark.parametrize("changes", OPTIMIZERS, ids=str)
def test_resuming_is_exact_with_other_optimizers(tmp_path, changes):
    chosen = settings("digits-kp", lr=1e-3, **changes)
    unbroken = new_run(chosen)
    unbroken.train(nothing, nothing)
    assert_same(interrupted(chosen, few_digits(), 6, tmp_path / "checkpoint.pt"), unbroken)


def test_resuming_is_exact_with_dropout_augmentation_and_workers(tmp_path, monkeypatch):
    build = part("models").build
    monkeypatch.setattr(
        part("models"), "build", lambda *a: nn.Sequential(build(*a)[0], nn.Dropout(0.3), *build(*a)[1:])
    )
    images = few_digits()
    images = images._replace(training=Noisy(images.training))
    unbroken = new_run(settings(model="resnet8"), images)
    unbroken.train(nothing, nothing)
    again = interrupted(settings(model="resnet8"), images, 6, tmp_path / "checkpoint.pt", workers=1)
    assert_same(again, unbroken)


def test_settings_of_another_run_are_refused():
    state = new_run(settings()).state_dict()
    with pytest.raises(ValueError, match=r"lr is 0\.1, and was 0\.05 in the checkpoint, expected the same settings"):
        new_run(settings(lr=0.1)).load_state_dict(state)


def test_another_number_of_ranks_is_refused():
    run = new_run(settings())
    with pytest.raises(ValueError, match="ranks is 1, and was 4 in the checkpoint, expected the same"):
        run.load_state_dict({**run.state_dict(), "ranks": 4})


def test_a_half_written_checkpoint_leaves_the_previous_one(tmp_path, monkeypatch):
    checkpoint = part("checkpoint")
    checkpoint.save({"step": 1}, tmp_path / "checkpoint.pt")

    def cut(state, file):
        file.write(b"PK")
        raise PowerCutError

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(PowerCutError):
        checkpoint.save({"step": 2}, tmp_path / "checkpoint.pt")
    assert checkpoint.load(tmp_path / "checkpoint.pt") == {"step": 1}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_killed_run_resumes_exactly(tmp_path, run_program, where):
    command = ["digits-ia", "--epochs", "6", "--checkpoint-every", "4", "--device", where, "--deterministic", "--out"]
    run_program(*command, tmp_path / "unbroken")

    broken = tmp_path / "broken"
    running = subprocess.Popen([sys.executable, PROGRAM, *command, broken], stdout=subprocess.DEVNULL)
    patience = time.monotonic() + 120
    while not _within_an_epoch(broken / "checkpoint.pt"):
        assert running.poll() is None, "it ended before it was killed"
        assert time.monotonic() < patience
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert len(table(broken / "metrics.csv")) < 6

    with pytest.raises(SystemExit, match="which holds a run: expected --resume"):
        run_program(*command, broken)
    resumed = subprocess.run([sys.executable, PROGRAM, *command, broken, "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert len(table(broken / "metrics.csv")) == 6
    assert table(broken / "metrics.csv") == table(tmp_path / "unbroken" / "metrics.csv")
    assert (broken / "alignment.csv").read_bytes() == (tmp_path / "unbroken" / "alignment.csv").read_bytes()


def _within_an_epoch(path):
    """Whether the checkpoint is within the second epoch or later."""
    if not path.exists():
        return False
    state = part("checkpoint").load(path)
    return state["epoch"] >= 1 and 0 < state["step"] < 18


# Ways to run


AUTOCAST = pytest.param({"autocast": True}, marks=pytest.mark.long)


@pytest.mark.parametrize("how", [AUTOCAST, {"channels_last": True}, {"frozen": False, "probe": 0}], ids=str)
def test_ways_to_run(how):
    run = new_run(settings(epochs=4, **how), few_digits(1024))
    run.train(nothing, nothing)
    assert run.rows[-1]["test_accuracy"] > 50
    if how.get("channels_last"):
        assert run.network[0][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_run_has_the_same_loss():
    one_epoch = settings(epochs=1, frozen=False)
    plain, compiled = new_run(one_epoch), new_run(replace(one_epoch, compile=True))
    for run in (plain, compiled):
        run.train(nothing, nothing)
    assert compiled.rows[-1]["train_loss"] == pytest.approx(plain.rows[-1]["train_loss"], rel=1e-3)


@pytest.mark.slow
def test_torchrun_runs_it_unchanged(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", PROGRAM]
    command = [*launch, "digits-ia", "--epochs", "2", "--checkpoint-every", "5", "--out", tmp_path]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [18, 36]
    assert float(rows[-1]["test_accuracy"]) > 50
    assert math.isfinite(float(rows[-1]["gradient_angle"]))
