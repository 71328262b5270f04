"""The study of transformers: its models, its text, a few steps of each rule, and its tables."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pyfeedback

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.usefixtures("example_folder")
DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "transformers"
IN_A_BLOCK = ("attention", "attention.out_proj", "mlp.0", "mlp.2")


def example(name):
    """Import a module of the examples folder, which is not a package."""
    return importlib.import_module(name)


@pytest.fixture
def models():
    return example("transformer_models")


@pytest.fixture
def runs():
    return example("transformer_runs")


@pytest.fixture
def study():
    return example("transformer_study")


def build(models, name):
    """A small model and an input for it."""
    torch.manual_seed(0)
    if name == "gpt":
        return models.GPT(30, context=12, width=16, depth=2), torch.randint(30, (3, 12))
    return models.ViT(5, size=8, width=16, depth=2), torch.randn(3, 1, 8, 8)


def small(runs, model, rule, **changes):
    data = "text" if model == "gpt" else "digits"
    tau = {"sa": 4.0, "kp": 60.0}.get(rule, 0.0)
    return runs.Job(model, rule, 0, tau, data, steps=40, width=16, depth=1, warm_up=5, measurements=2, **changes)


def made_up(runs, loss, angle=None):
    angles = {} if angle is None else dict.fromkeys(("head", *(f"blocks.0.{layer}" for layer in IN_A_BLOCK)), angle)
    return runs.Outcome([4.0, loss], [1.0, 50.0], 3.0, angles, angles, 1.0)


# The models


@pytest.mark.parametrize(("name", "shape"), [("gpt", (3, 12, 30)), ("vit", (3, 5))])
@pytest.mark.parametrize("rule", ["bp", "kp"])
def test_shapes(models, runs, name, shape, rule):
    model, x = build(models, name)
    runs.convert(model, small(runs, name, rule))
    assert model(x).shape == shape


@pytest.mark.parametrize("rule", ["bp", "ia-probes"])
def test_the_gpt_reads_no_later_character(models, runs, rule):
    model, x = build(models, "gpt")
    runs.convert(model, small(runs, "gpt", rule))
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 30
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax((0, 2)).min() > 0


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_every_projection_has_a_feedback_weight_and_no_embedding(models, runs, name):
    model, _ = build(models, name)
    runs.convert(model, small(runs, name, "fa"))
    expected = {f"blocks.{i}.{layer}" for i in range(2) for layer in IN_A_BLOCK} | {"head"}
    assert set(pyfeedback.alignment(model)) == expected
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1 and "feedback" not in name}
    others = {"positions.weight", "characters.weight" if name == "gpt" else "patches.weight"}
    of_layers = {f"{layer}.{'in_proj_' if layer.endswith('attention') else ''}weight" for layer in expected}
    assert matrices == of_layers | others


# The data


def test_no_paragraph_of_the_test_text_is_in_the_training_text(models, runs):
    characters, vocabulary = models.text()
    assert len(characters) > 200_000
    training, test = (
        {" ".join(p.split()) for p in "".join(vocabulary[i] for i in side.tolist()).split("\n\n")}
        for side in runs.split(characters, validation=False)
    )
    assert len(test) > 50
    assert not (test & training) - {""}


def test_the_validation_text_is_in_the_training_text(models, runs):
    characters, _ = models.text()
    training, _ = runs.split(characters, validation=False)
    torch.testing.assert_close(torch.cat(runs.split(characters, validation=True)), training)


def test_entropy(models):
    assert models.entropy(torch.tensor([0, 0, 1, 1, 3, 3, 4, 4])) == pytest.approx(torch.tensor(4.0).log().item())


def test_batches_depend_only_on_the_seed(runs, tmp_path):
    for model in runs.TASKS:
        first, other = (runs.TASKS[model](small(runs, model, rule), tmp_path) for rule in ("fa", "sa"))
        for _ in range(2):
            for a, b in zip(next(first.batches), next(other.batches), strict=True):
                torch.testing.assert_close(a, b)


# Training


@pytest.mark.parametrize("model", ["gpt", "vit"])
@pytest.mark.parametrize("rule", ["bp", "fa", "sa", "kp", "ia-probes"])
def test_a_few_steps_lower_the_loss(runs, model, rule, tmp_path):
    outcome = runs.train(small(runs, model, rule, lr=0.005), tmp_path)
    assert len(outcome.loss) == len(outcome.accuracy) == 3
    assert outcome.loss[-1] < outcome.loss[0] - 0.1
    assert outcome.accuracy[-1] > outcome.accuracy[0]
    assert len(outcome.angles) == (0 if rule == "bp" else 5)


def test_a_small_start_scales_all_projections(models, runs):
    for name in runs.TASKS:
        model, _ = build(models, name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        runs.start_small(model, 0.5)
        scaled = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
        weights = [
            f"blocks.{i}.{layer}"
            for i in range(2)
            for layer in ("attention.in_proj_", *(f"{e}." for e in IN_A_BLOCK[1:]))
        ]
        assert scaled == {*(f"{layer}weight" for layer in weights), "head.weight"}


# The study


def test_every_rule_has_the_same_setting_in_both_models(study):
    jobs = study.Scale().test_jobs(chosen=0.2)
    assert len({job.key for job in jobs}) == len(jobs) == 3 * 2 * 6
    settings = [{(job.label, job.lr, job.weight_decay) for job in jobs if job.model == model} for model in study.TASKS]
    assert settings[0] == settings[1]
    assert {job.label for job in jobs} == {"bp", "fa", "sa, tau 20", "kp, tau 20", "kp, tau 200", "ia-probes"}


def test_the_time_constant_is_chosen_on_validation_data(study, runs, tmp_path):
    scale, found = study.Scale(), runs.Runs(tmp_path / "none")
    assert study.choose(scale, found) is None
    for tau in study.KP_TAUS:
        for job in scale.search_jobs(tau):
            assert job.validation
            found.outcomes[job.key] = made_up(runs, abs(tau - 0.2))
    assert study.choose(scale, found) == 0.2


def test_a_study_keeps_its_runs(study, runs, monkeypatch, tmp_path):
    trained = []

    def train(job, root):
        trained.append(job)
        return made_up(runs, 2.0 + job.tau, None if job.rule == "bp" else 10.0 + job.seed)

    monkeypatch.setattr(runs, "train", train)
    executor = "ProcessPoolExecutor"
    monkeypatch.setattr(example("depth_study_runs"), executor, lambda workers, *_: ThreadPoolExecutor(workers))
    for _ in range(2):
        with runs.Runs(tmp_path / "runs.jsonl", workers=1) as found:
            study.study(replace(study.Scale(), seeds=2), found, tmp_path)
    assert len(trained) == len(set(trained)) == 8 + 2 * 2 * 5 + 4
    assert "| sa, tau 20 | 22.000 ± 0.000 | 20.000 ± 0.000 | 50.0 ± 0.0 |" in (tmp_path / "results.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"runs.jsonl", "results.md", "loss.png", "loss.svg"}


@pytest.mark.skipif(not (RESULTS / "runs.jsonl").exists(), reason="no committed results")
def test_the_committed_tables_are_those_of_the_committed_runs(study, runs, monkeypatch, tmp_path):
    (tmp_path / "runs.jsonl").write_text((RESULTS / "runs.jsonl").read_text())
    monkeypatch.setattr(sys, "argv", ["transformer_study.py", "--report", "--out", str(tmp_path)])
    study.main()
    text = (tmp_path / "results.md").read_text()
    assert text == (RESULTS / "results.md").read_text()
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 6
    assert all(table.strip() in (DOCS / "transformers.md").read_text() for table in tables)


@pytest.mark.parametrize("arguments", [("--workers", "0"), ("--root", "no such folder"), ("--out", __file__)])
def test_a_bad_argument_is_one_line(study, monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.setattr(sys, "argv", ["transformer_study.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="2"):
        study.parse()
    error = capsys.readouterr().err
    assert arguments[0] in error
    assert error.count("\n") == 1
