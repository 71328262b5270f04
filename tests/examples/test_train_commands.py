"""The training program: its logs and its command line."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
from training_program import new_run, nothing, part, settings, table

import pyfeedback

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("example_folder")


# Logs


def test_the_folder_of_a_run(tmp_path, run_program, capfd):
    run_program("digits-fa", "--epochs", "2", "--every", "6", "--resume", "--out", tmp_path / "run")
    shown = capfd.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines()[:2]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert not shown.err  # the progress bar requires a terminal

    last = table(tmp_path / "run" / "metrics.csv")[-1]
    assert float(last["test_accuracy"]) > float(last["frozen_accuracy"]) > 10
    readings = [row for row in table(tmp_path / "run" / "alignment.csv") if row["step"] == "36"]
    for name in ("angle", "norm_ratio", "projection_angle", "gradient_angle"):
        assert float(last[name]) == pytest.approx(sum(float(row[name]) for row in readings) / len(readings))
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["rule"]["name"] == "fa"
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "run" / "alignment.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_same_numbers(tmp_path, run_program):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_program("digits-fa", "--epochs", "2", "--tensorboard", "--out", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("test_accuracy")]
    written = [(int(row["step"]), float(row["test_accuracy"])) for row in table(tmp_path / "metrics.csv")]
    assert shown == [(step, pytest.approx(value)) for step, value in written]
    angles = {
        int(row["step"]): float(row["angle"]) for row in table(tmp_path / "alignment.csv") if row["layer"] == "1.0.0"
    }
    assert {event.step: event.value for event in events.Scalars("angle/1.0.0")} == {20: pytest.approx(angles[20])}
    assert [event.step for event in events.Scalars("moving/loss")] == [20]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_requires_a_terminal(monkeypatch, tmp_path, capsys, terminal):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run = new_run(settings())
    logs = part("logs").Logs(run, tmp_path)
    run.train(logs.after_step, logs.after_epoch)
    logs.close()
    shown = capsys.readouterr()
    assert ("8/8" in shown.err) == terminal
    assert shown.out.count("epoch") == 2


# The command line


def chosen(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return part("command_line").settings_of(part("command_line").parse("train"))


def test_options_change_a_configuration(monkeypatch):
    found = chosen(
        monkeypatch, "cifar10", "--rule", "ia", "--coefficients", "amp=0.5", "center=False", "reduction=mean",
        "--lr", "1", "--milestones", "3", "4", "--no-frozen", "--feedback-lr", "0.2",
    )  # fmt: skip
    assert found.rule == pyfeedback.rule("ia", amp=0.5, center=False, reduction="mean")
    assert (found.lr, found.milestones, found.frozen, found.feedback_lr) == (1.0, (3, 4), False, 0.2)
    assert (found.data, found.model, found.batch) == ("cifar10", "resnet20", 128)


def test_a_mixture_of_rules(monkeypatch, tmp_path):
    found = chosen(monkeypatch, "digits-bp", "--rule", "1.0.0=fa", "1.[1-4].*=kp", "--weight-decay", "0.02")
    assert found.rule == {"1.0.0": pyfeedback.rule("fa"), "1.[1-4].*": pyfeedback.rule("kp", decay=0.02)}
    run = new_run(replace(found, epochs=1))
    followed = {name: layer.rule.name for name, layer in pyfeedback.feedback_layers(run.network)}
    assert followed == {"1.0.0": "fa", "1.1.0": "kp", "1.2.0": "kp", "1.3.0": "kp", "1.4.0": "kp"}
    run.train(nothing, nothing)
    part("checkpoint").save(run.state_dict(), tmp_path / "checkpoint.pt")
    new_run(replace(found, epochs=1)).load_state_dict(part("checkpoint").load(tmp_path / "checkpoint.pt"))


@pytest.mark.parametrize("name", ["digits-ia", "biotorch-imagenet-dfa", "mixture"])
def test_settings_of_another_run(monkeypatch, tmp_path, name):
    mixture = ["digits-bp", "--rule", "1.1.*=ia", "*=bp"]
    then = chosen(monkeypatch, *(mixture if name == "mixture" else [name]))
    (tmp_path / "settings.json").write_text(then.to_json())
    assert chosen(monkeypatch, str(tmp_path / "settings.json"), "--seed", "5") == replace(then, seed=5)


def test_kolen_pollack_decays_as_the_weights_do(monkeypatch):
    assert chosen(monkeypatch, "cifar10", "--rule", "kp", "--weight-decay", "0.01").rule.decay == 0.01


@pytest.mark.parametrize("name", ["digits-bp", "cifar10", "imagenet-ia", "cluttered-kp"])
def test_a_configuration_without_options_is_unchanged(monkeypatch, name):
    assert chosen(monkeypatch, name) == part("configurations").CONFIGURATIONS[name].settings


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing"], "configuration is 'nothing', expected one of those that --list shows"),
        (["digits-bp", "--rule", "backpropagation"], "rule is 'backpropagation'"),
        (["digits-bp", "--rule", "fc=ia", "*=bp", "--coefficients", "amp=1"], "expected one rule that they belong to"),
        (["missing.json"], "No such file or directory: 'missing.json'"),
        (["other.json"], "settings are '{}', expected those that a run has written"),
        (["digits-bp", "--coefficients", "gamma=1"], "coefficients are gamma, expected some of decay, amp"),
        (["digits-bp", "--data", "fashion"], "data is 'fashion', expected one of digits"),
        (["digits-bp", "--epochs", "0"], "epochs is 0, expected 1 or more"),
        (["digits-bp", "--lr", "-1"], "lr is -1.0, expected a finite number, 0 or more"),
        (["digits-kp", "--noise", "1", "--optimizer", "adam"], "noise is 1.0 with adam, expected sgd"),
        (["digits-bp", "--optimizer", "lion"], "optimizer is 'lion', expected one of sgd"),
        (["digits-bp", "--device", "abacus"], "device is 'abacus'"),
        (["cifar10", "--root", "nowhere"], "cifar10"),
        (["digits-bp", "--seed", str(2**63)], f"seed is {2**63}, expected a 64-bit int"),
        (["digits-bp", "--milestones", "0", "3"], "milestones are (0, 3), expected epochs of 1 or more"),
        (["digits-bp", "--workers", "-1"], "workers is -1, expected 0 or more"),
        (["digits-bp", "--checkpoint-every", "-1"], "checkpoint_every is -1, expected 0 or more"),
    ],
    ids=["configuration", "rule", "mixture", "file", "json", "coefficients", "data", "epochs", "lr", "noise",
         "optimizer", "device", "root", "seed", "milestones", "workers", "checkpoint"],
)  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as left:
        part("train").main()
    assert named in left.value.code
    assert len(left.value.code.splitlines()) == 1
