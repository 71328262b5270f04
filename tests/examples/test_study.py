"""A small study runs end to end, resumes after an interruption, and makes no choice on test digits."""

import csv
import importlib
import re
from pathlib import Path

import pytest
from torch import nn

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)
ROOT = Path(__file__).parents[2]
FIGURES = {"search", "transfer", "depth", "noise", "samples", "cost"}
TABLES = FIGURES | {"settings", "demo"}


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module("study")


def runs_trained(printed: str) -> int:
    return sum(map(int, re.findall(r"^[\w ]+: (\d+) runs, \d+ found$", printed, re.MULTILINE)))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_a_small_study_writes_everything_and_resumes(study, tmp_path, capfd):
    small = study.Scale(
        search=4, seeds=1, epochs=1, width=4, repeats=(0, 1), noise=(1.0,), samples=(2,), demo_seeds=1, demo_epochs=1,
        timed_steps=2, train_size=64, test_size=20,
    )  # fmt: skip
    study.study(small, tmp_path, workers=2)
    assert {path.stem for path in tmp_path.glob("*.csv")} == {path.stem for path in tmp_path.glob("*.md")} == TABLES
    assert {path.stem for path in tmp_path.glob("*.png")} == FIGURES
    depth = rows_of(tmp_path / "depth.csv")
    assert {(row["rule"], row["layers"]) for row in depth} == {
        (rule, layers) for rule in study.RULES for layers in ("4", "7")
    }
    assert {row["seeds"] for row in depth} == {"1"}

    runs = tmp_path / "runs.jsonl"
    lines = runs.read_text().splitlines(keepends=True)
    assert runs_trained(capfd.readouterr().out) == len(set(lines)) == len(lines)
    tables = {name: (tmp_path / f"{name}.csv").read_bytes() for name in TABLES - {"cost"}}
    runs.write_text("".join(lines[:-1]) + lines[-1][:40])  # as if killed while writing
    study.study(small, tmp_path, workers=1)
    assert runs_trained(capfd.readouterr().out) == 1
    assert {name: (tmp_path / f"{name}.csv").read_bytes() for name in tables} == tables


def test_choices_on_validation_digits_involve_no_test_digit(study):
    load = study.cluttered_digits.load
    training, test = load("cluttered", train_size=3000, test_size=1000)
    fitted, held_out = load("cluttered", train_size=3000, test_size=1000, validation=True)
    training, test, fitted, held_out = (
        set(side.sources.flatten().tolist()) for side in (training, test, fitted, held_out)
    )
    assert fitted | held_out == training
    assert not fitted & held_out
    assert not training & test


@pytest.mark.parametrize("name", ["wm", "ia", "oja", "sa", "aa", "kp"])
def test_searched_settings_are_in_the_box(study, name):
    found = study.candidates(name, 8, weight_decay=0.004)
    assert len(set(found)) == 8
    for setting in found:
        for coefficient, (low, high) in study.BOXES[name].items():
            assert low <= getattr(setting.rule, coefficient) <= high
        assert setting.weight_decay == (setting.rule.decay if name == "kp" else 0.004)
        assert name != "oja" or setting.rule.amp == setting.rule.null
    assert found == study.candidates(name, 8, weight_decay=0.004)


@pytest.mark.parametrize("repeats", [0, 1, 3])
def test_layers_counts_layers_with_weights(study, repeats):
    network = study.build(32, width=4, repeats=repeats)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in network.modules()) == study.layers(repeats)


def test_the_gap_to_backprop_is_taken_seed_by_seed(study):
    Outcome = importlib.import_module("study_runs").Outcome
    runs = {
        "bp0": Outcome(90.0, None, False, 1.0),
        "bp1": Outcome(94.0, None, False, 1.0),
        "ia0": Outcome(88.0, 40.0, False, 1.0),
        "ia1": Outcome(92.0, 44.0, False, 1.0),
    }
    row = study.measured(runs, ["ia0", "ia1"], ["bp0", "bp1"])
    assert (row["accuracy (%)"], row["accuracy (%) std"]) == (90.0, 2.83)
    assert (row["behind bp (points)"], row["behind bp (points) std"]) == (2.0, 0.0)
    assert row["angle (degrees)"] == 42.0
    assert study.measured(runs, ["bp0", "bp1"], ["bp0", "bp1"])["angle (degrees)"] == ""


def test_markdown_joins_a_mean_and_its_deviation(study, tmp_path):
    study.write(tmp_path / "table", [{"rule": "ia", "x": 1.5, "x std": 0.25}, {"rule": "bp", "x": 2.0, "x std": ""}])
    assert (tmp_path / "table.md").read_text() == "| rule | x |\n| --- | --- |\n| ia | 1.5 ± 0.25 |\n| bp | 2.0 |\n"


@pytest.mark.parametrize("name", sorted(TABLES))
def test_the_tables_in_the_documentation_are_those_of_the_run(study, name):
    assert study.markdown(ROOT / "docs" / "figures" / f"study_{name}.csv") in (ROOT / "docs" / "study.md").read_text()
