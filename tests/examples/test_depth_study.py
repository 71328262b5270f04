"""The depth study: its jobs and their order, a small study that is interrupted and resumed, and its tables."""

import importlib
import json
import math
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import pyfeedback

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.usefixtures("example_folder")
RESULTS = Path(__file__).parents[2] / "docs" / "depth_study"


def example(name):
    """Import a module of the examples folder, which is not a package."""
    return importlib.import_module(name)


@pytest.fixture
def study():
    return example("depth_study")


@pytest.fixture
def runs():
    return example("depth_study_runs")


def small(study, **changes):
    """A study of 64 images, with two networks and three rules."""
    cases = (
        study.Case("resnet8", rules=("bp", "sa", "wm-probes", "wm-data")),
        study.Case("plain4", rules=("bp", "sa")),
    )
    sizes = {"epochs": 1, "train_size": 64, "test_size": 20}
    return study.Scale(cases=cases, search_seeds=1, candidates=1, seeds=2, more_seeds=2, **{**sizes, **changes})


def made_up(runs, accuracy, angle=None, diverged=False):
    return runs.Outcome([10.0, accuracy], angle, None if angle is None else 1.0, diverged, 2.0)


def chosen_of(study):
    """The first candidate of each rule."""
    chosen = {name: study.candidates(name, 0.004)[0] for name in study.RULES}
    return chosen | {name: replace(chosen[name.replace("data", "probes")], name=name) for name in study.DATA_RULES}


# The jobs


def test_every_rule_has_four_different_candidates(study):
    for name in study.RULES:
        found = study.candidates(name, 0.004)
        assert len(set(found)) == 4
        assert {setting.name for setting in found} == {name}
        assert name in ("bp", "fa") or {setting.weight_decay for setting in found} == {0.004}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bp", {"transport": True}),
        ("fa", {"learns": False}),
        ("sa", {"tau": 8.0, "reads_data": False}),
        ("kp", {"tau": 8.0, "tie": 1.0}),
        ("aa", {"tau": 8.0, "reads_data": True, "center": True}),
        ("ia-probes", {"tau": 8.0, "nu": 0.5, "growth": 0.04, "source": "probes", "orthogonal": True}),
        ("wm-probes", {"tau": 8.0, "growth": 0.04, "source": "probes", "orthogonal": True}),
        ("aa-probes", {"tau": 8.0, "growth": 0.04, "source": "probes", "orthogonal": True}),
        ("ia-data", {"tau": 8.0, "nu": 0.5, "growth": 0.04, "source": "data"}),
        ("wm-data", {"tau": 8.0, "growth": 0.04, "source": "data"}),
    ],
)
def test_a_setting_gives_its_rule(runs, name, expected):
    tau, nu = 0.0 if name in ("bp", "fa") else 8.0, 0.5 if name.startswith("ia") else 0.0
    rule = runs.Setting(name, 0.004, tau, nu, growth=0.04 if "-" in name else 0.0).rule
    assert rule.name == name.removesuffix("-data")
    assert {key: getattr(rule, key) for key in expected} == expected


def test_keys_are_unique_and_survive_a_file(study, runs):
    scale, chosen = study.Scale(), chosen_of(study)
    jobs = study.jobs_of_test(scale, chosen)
    for name in study.RULES:
        jobs += [job for setting in study.candidates(name, 0.004) for job in scale.search_jobs(setting)]
    keys = [job.key for job in jobs]
    assert len(set(keys)) == len(keys) == 5 * (2 * 10 + 5 * 8) + 15 * 4 * 4 + 6 * 3 * 3 + 8 * 4 * 2
    for job in jobs:
        read = json.loads(job.key)
        assert runs.Job(**read | {"setting": runs.Setting(**read["setting"])}) == job


def test_test_runs_go_seed_by_seed(study):
    jobs = study.jobs_of_test(study.Scale(), chosen_of(study))
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    first = [job for job in jobs if job.seed == 0]
    assert list(dict.fromkeys((job.network, job.data, job.epochs) for job in first)) == [
        ("resnet8", "cluttered", 8), ("resnet20", "cluttered", 8), ("resnet14", "cluttered", 8),
        ("resnet32", "cluttered", 8), ("resnet20", "fashion-mnist", 8), ("plain7", "cluttered", 8),
        ("plain13", "cluttered", 8), ("resnet8", "cluttered", 24), ("resnet20", "cluttered", 24),
        ("resnet32", "cluttered", 24),
    ]  # fmt: skip
    assert [job.setting.name for job in first[:10]] == [*study.RULES, *study.DATA_RULES]
    assert not any(job.validation for job in jobs)


def test_the_search_reads_no_test_image(study):
    scale = study.Scale()
    jobs = [job for name in study.RULES for s in study.candidates(name, 0.004) for job in scale.search_jobs(s)]
    assert all(job.validation and job.network == "resnet8" and job.data == "cluttered" for job in jobs)


def test_the_best_candidate_on_validation_images_is_chosen(study, runs):
    scale, found = study.Scale(), runs.Runs(Path("no such file"))
    tried = study.candidates("sa", 0.004)
    for setting, accuracies in zip(tried, ((80, 90), (84, 88), (99, 60), (85, 84)), strict=True):
        for job, accuracy in zip(scale.search_jobs(setting), accuracies, strict=True):
            found.outcomes[job.key] = made_up(runs, float(accuracy))
    assert study.choose(scale, found, tried) == tried[1]
    del found.outcomes[scale.search_jobs(tried[3])[1].key]
    assert study.choose(scale, found, tried) is None


# Training


@pytest.mark.parametrize("name", ["resnet14", "plain7"])
def test_a_small_start_keeps_the_function(runs, name):
    torch.manual_seed(0)
    network = example("image_networks").build(name, 4, stride=2).train()
    x, before = torch.randn(8, 1, 32, 32), {key: value.clone() for key, value in network.state_dict().items()}
    expected = network.double()(x.double())
    pyfeedback.start_small(network, 0.1)
    torch.testing.assert_close(network(x.double()), expected, rtol=0.05, atol=0.01)  # eps of the batch norms
    ratios = {
        key: (value.norm() / before[key].norm()).item()
        for key, value in network.state_dict().items()
        if key.endswith("weight") and before[key].norm() > 0
    }
    convolutions = {f"{key}.weight" for key, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    assert {key for key, ratio in ratios.items() if ratio == pytest.approx(0.1)} == convolutions


def test_the_learning_rate_rises_linearly_and_falls_to_zero(runs):
    rates = [runs.rate(step, 744, 50) for step in range(744)]
    assert rates[0] == pytest.approx(1 / 50)
    assert rates.index(max(rates)) == 49
    assert rates[49] == pytest.approx((1 + math.cos(math.pi * 49 / 744)) / 2)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize(
    "name", ["bp", "fa", "sa", "kp", "aa", "ia-probes", "wm-probes", "aa-probes", "ia-data", "wm-data"]
)
def test_a_run_reports_accuracy_and_alignment(study, runs, name, tmp_path):
    job = small(study, epochs=2).job(chosen_of(study)[name], study.Case("resnet8"), seed=0)
    outcome = runs.train(job, tmp_path)
    assert len(outcome.accuracy) == 2
    assert all(0 <= accuracy <= 100 for accuracy in outcome.accuracy)
    assert not outcome.diverged
    if name == "bp":
        assert outcome.angle is outcome.norm_ratio is None
    else:
        assert 0 <= outcome.angle <= 180
        assert outcome.norm_ratio > 0
    assert replace(runs.train(job, tmp_path), seconds=0) == replace(outcome, seconds=0)


def test_a_run_that_diverges_ends(study, runs, tmp_path):
    job = small(study, epochs=3).job(study.candidates("bp", 0.0)[0], study.Case("plain4"), seed=0)
    outcome = runs.train(replace(job, lr=1e30, warm_up=1, train_size=192), tmp_path)
    assert outcome.diverged
    assert len(outcome.accuracy) == 1


# Resuming


def counting(calls, runs):
    """A function that takes the place of training. Each call adds a job to ``calls``."""

    def train(job, root):
        calls.append(job)
        return made_up(runs, 50.0 + job.seed)

    return train


class Pool:
    """The pool of processes, in this process."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def trained(runs, monkeypatch):
    """The jobs that are trained, in their order, without any training."""
    calls = []
    monkeypatch.setattr(runs, "train", counting(calls, runs))
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda *_: Pool())
    return calls


def test_a_study_resumes_and_repeats_no_run(study, runs, trained, tmp_path):
    scale, path = small(study), tmp_path / "runs.jsonl"
    with runs.Runs(path, workers=1) as all_runs:
        study.study(scale, all_runs, tmp_path)
    assert len(set(trained)) == len(trained) == 8 + 2 * 6
    tables = {name: (tmp_path / name).read_bytes() for name in ("results.csv", "results.md", "search.csv")}

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:40])  # as if killed while writing
    expected = trained[-2:]
    trained.clear()
    with runs.Runs(path, workers=1) as rest:
        study.study(scale, rest, tmp_path)
    assert trained == expected
    assert path.read_text() == "".join(lines)
    assert {name: (tmp_path / name).read_bytes() for name in tables} == tables


def test_a_study_stops_when_its_time_is_over(study, runs, trained, tmp_path):
    with runs.Runs(tmp_path / "runs.jsonl", workers=1, minutes=0.0) as none:
        study.study(small(study), none, tmp_path)
    assert not trained
    assert "Test accuracy" not in (tmp_path / "results.md").read_text()


def test_a_report_trains_nothing_and_leaves_the_file_as_it_is(study, runs, trained, tmp_path):
    """Another process may be appending to the file."""
    path = tmp_path / "runs.jsonl"
    job = small(study).job(study.candidates("bp", 0.0)[0], study.Case("resnet8"), 0, validation=True)
    text = json.dumps({"job": json.loads(job.key), "outcome": vars(made_up(runs, 80.0))}) + '\n{"job": {"set'
    path.write_text(text)
    with runs.Runs(path) as found:
        study.study(small(study), found, tmp_path)
    assert not trained
    assert path.read_text() == text
    assert "| bp | 0.001 |  |  |  | 1 | 80.0 | yes |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_a_small_study_trains_in_processes(study, runs, tmp_path):
    scale = small(study)
    with runs.Runs(tmp_path / "runs.jsonl", workers=2) as found:
        study.study(scale, found, tmp_path)
    assert len(runs.read(tmp_path / "runs.jsonl")) == 8 + 2 * 6
    assert {path.name for path in tmp_path.glob("*.[ps][nv]g")} == {
        f"{name}.{kind}" for name in ("accuracy", "behind_bp", "angle") for kind in ("png", "svg")
    }


# The tables


@pytest.mark.skipif(not (RESULTS / "runs.jsonl").exists(), reason="no committed results")
def test_the_committed_tables_are_those_of_the_committed_runs(study, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(example("depth_study_figures"), "_draw", lambda *_: None)
    with runs.Runs(RESULTS / "runs.jsonl") as found:
        study.study(study.Scale(), found, tmp_path)
    for name in ("results.md", "results.csv", "search.csv"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


@pytest.mark.skipif(not (RESULTS / "runs.jsonl").exists(), reason="no committed results")
def test_the_committed_leaderboard_is_that_of_the_committed_runs(monkeypatch, tmp_path):
    leaderboard = example("leaderboard")
    committed = leaderboard.PAGE.read_text()
    monkeypatch.setattr(leaderboard, "PAGE", tmp_path / "leaderboard.md")
    leaderboard.main()
    assert leaderboard.PAGE.read_text() == committed


def test_the_leaderboard_has_a_command_and_distances_for_each_cell(results):
    page = example("leaderboard").page(results)
    command = "`python examples/depth_study.py --network resnet8 --data cluttered --rule sa --epochs 8`"
    assert f"| sa | 90.0 ± 12.7 | 2.0 ± 12.7 | 2 | 1.00 | {command} |" in page
    assert "## plain-7, cluttered digits" in page
    assert "## ResNet-8, 24 epochs, cluttered digits" in page
    assert "| fa | 67.8 | 23.5 |" in page  # published for ResNet-20


@pytest.fixture
def results(runs):
    def outcomes(*accuracies, angle=None):
        return [None if a is None else made_up(runs, a, angle) for a in accuracies]

    group = example("depth_study_report").Group
    return {
        group("resnet8", "cluttered", "bp", 8): outcomes(90.0, 92.0, 94.0),
        group("resnet8", "cluttered", "sa", 8): outcomes(89.0, None, 91.0, angle=2.0),
        group("plain7", "cluttered", "sa", 8): outcomes(None, 70.0, None, angle=3.0),
        group("resnet20", "fashion-mnist", "bp", 8): outcomes(None, None, None),
        group("resnet8", "cluttered", "bp", 24): outcomes(96.0),
    }


def test_the_test_runs_can_be_limited(study):
    chosen = chosen_of(study)
    jobs = study.jobs_of_test(study.Scale(), chosen, study.Wanted(networks=["resnet20"], rules=["bp", "kp"]))
    assert {(job.network, job.data, job.setting.name) for job in jobs} == {
        ("resnet20", data, name) for data in ("cluttered", "fashion-mnist") for name in ("bp", "kp")
    }
    longer = study.jobs_of_test(study.Scale(), chosen, study.Wanted(networks=["resnet8"], epochs=[24]))
    assert {(job.setting.name, job.epochs) for job in longer} == {(name, 24) for name in ("bp", "sa", "kp")}
    assert set(study.jobs_of_test(study.Scale(), chosen)) > {*jobs, *longer}


def test_rows_have_intervals_and_paired_gaps(results):
    bp, sa, plain, longer = example("depth_study_report").rows(results)
    assert (bp["accuracy"], bp["accuracy seeds"]) == (92.0, 3)
    assert bp["accuracy interval"] == pytest.approx(4.303 * 2 / math.sqrt(3), abs=1e-3)  # t of 2 degrees of freedom
    assert bp["angle"] == bp["behind bp"] == ""
    # Seeds 0 and 2 have gaps of 1 and 3.
    assert (sa["behind bp"], sa["behind bp seeds"]) == (2.0, 2)
    assert sa["behind bp interval"] == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), abs=1e-3)
    assert (plain["accuracy"], plain["accuracy interval"], plain["behind bp seeds"]) == (70.0, "", 0)
    assert (longer["accuracy"], longer["epochs"]) == (96.0, 24)


def test_a_table_shows_what_is_there_and_the_number_of_seeds(results):
    report = example("depth_study_report")
    assert report.table(report.rows(results), "accuracy", 1) == (
        "| rule | ResNet-8 | ResNet-8, 24 epochs | plain-7 |\n"
        "| --- | --- | --- | --- |\n"
        "| bp | 92.0 ± 5.0 (3) | 96.0 (1) |  |\n"
        "| sa | 90.0 ± 12.7 (2) |  | 70.0 (1) |\n"
    )
    assert report.table(report.rows(results), "angle", 1).endswith("| sa | 2.0 ± 0.0 (2) |  | 3.0 (1) |\n")


def test_diverged_runs_are_counted(runs):
    report = example("depth_study_report")
    outcomes = [made_up(runs, 10.0, diverged=True), made_up(runs, 90.0)]
    found = report.rows({report.Group("resnet20", "fashion-mnist", "aa", 8): outcomes})
    assert "ResNet-20, fashion-mnist" in report.table(found, "accuracy", 1)
    assert "(2, 1 diverged) |" in report.table(found, "accuracy", 1)


def test_a_report_of_one_run_is_complete(runs, tmp_path):
    setting = runs.Setting("bp", 0.004)
    report = example("depth_study_report")
    results = {report.Group("resnet8", "cluttered", "bp", 8): [made_up(runs, 90.0), None]}
    report.write({setting: []}, {"bp": setting}, results, tmp_path)
    assert "| bp | 90.0 (1) |" in (tmp_path / "results.md").read_text()
    assert "| bp | 0.004 |  |  |  | 0 |  | yes |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--minutes", "0"), "--minutes"),
        (("--workers", "-1"), "--workers"),
        (("--out", __file__), "--out"),
        (("--root", "no such folder"), "--root"),
    ],
    ids=["minutes", "workers", "out", "root"],
)
def test_a_bad_argument_is_one_line(study, monkeypatch, capsys, tmp_path, arguments, named):
    monkeypatch.setattr(sys, "argv", ["depth_study.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as left:
        study.parse()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert named in error
