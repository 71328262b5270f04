"""The examples run from the command line, and the data sets keep training and test digits apart."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Import a module of the examples folder, which is not a package."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def cluttered_digits(example):
    return example("cluttered_digits")


def test_the_quickstart_learns_the_digits_and_aligns_every_layer():
    done = subprocess.run([sys.executable, EXAMPLES / "quickstart.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *layers = done.stdout.splitlines()
    assert 92 < float(re.fullmatch(r"test accuracy: ([\d.]+)%", first)[1]) < 100
    angles = dict(re.fullmatch(r"layer (\d): ([\d.]+) degrees between B and W", line).groups() for line in layers)
    assert list(angles) == ["0", "3", "5"]
    assert all(0 < float(angle) < 15 for angle in angles.values())  # about 90 before training
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 25


@pytest.mark.slow
def test_a_short_run_writes_table_json_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    options = ["--rule", "bp", "ia", "--data", "digits", "--epochs", "1", "--seeds", "2", "--out", tmp_path]
    done = subprocess.run([sys.executable, EXAMPLES / "two_routes.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert re.search(r"bp +2 +\d+\.\d +\d+\.\d +0\.0 +1\.00", rows["bp"])
    assert len(re.findall(r"\d+", rows["ia"].split(".")[-1])) >= 7
    assert "4/4" in done.stderr

    report = json.loads((tmp_path / "two_routes.json").read_text())
    assert set(report["results"]) == {"bp", "ia"}
    first, second = report["results"]["ia"]
    assert len(first["accuracy"]) == len(first["angles"]) == 2  # before training, after the epoch
    assert len(first["angles"][0]) == 6
    assert first["setting"]["rule"]["source"] == "probes"
    assert first["loss"] != second["loss"]  # another seed
    assert report["versions"]["torch"] == torch.__version__
    assert report["times"]["bp"] == 1.0
    assert 0.5 < report["times"]["ia"] < 10.0

    picture = (tmp_path / "two_routes.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_the_table_pairs_seeds_and_counts_divergence(example):
    two_routes = example("two_routes")

    def ran(accuracy, angles, loss=1.0):
        return two_routes.Result(two_routes.SETTINGS["fa"], [10.0, accuracy], [loss], [[90.0, 90.0], angles])

    results = {
        "bp": [ran(90.0, []), ran(80.0, [])],
        "fa": [ran(70.0, [30.0, 50.0]), ran(75.0, [50.0, 70.0], float("nan"))],
    }
    bp, fa = two_routes.table(results, {"bp": 1.0, "fa": 1.04}).splitlines()[1:]
    assert bp.split() == ["bp", "2", "85.0", "7.1", "0.0", "1.00", "-", "-", "(no", "feedback", "weight)"]
    assert fa.split() == ["fa", "2", "72.5", "3.5", "12.5", "1.04", "50", "40", "60", "1", "diverged"]


def test_a_step_is_timed_as_one_of_its_age(example, cluttered_digits):
    two_routes = example("two_routes")
    training, _ = cluttered_digits.load("digits")
    batch = training.images[:4], training.labels[:4]
    trainers = {name: two_routes.Trainer(two_routes.SETTINGS[name], training, 200, seed=0) for name in ("bp", "ia")}
    for trainer in trainers.values():
        trainer.step(*batch)
    for backwards, order in ((False, ["bp", "ia"]), (True, ["ia", "bp"])):
        seconds = two_routes._round(trainers, batch, 100, backwards)
        assert list(seconds) == order
        assert min(seconds.values()) > 0
    assert trainers["ia"].optimizers[0].param_groups[0]["feedback_step"] == 100


def test_the_band_of_the_figure_is_the_range_of_the_seeds(example):
    pytest.importorskip("matplotlib")
    spread = example("demo_figure")._spread
    assert spread([[1.0, 5.0, float("nan")], [3.0]]) == [(1.0, 2.0, 3.0), (5.0, 5.0, 5.0)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--rule", "backpropagation"), "backpropagation"),
        (("--data", "mnist"), "mnist"),
        (("--epochs", "0"), "epochs"),
        (("--seeds", "none"), "seeds"),
        (("--device", "abacus"), "abacus"),
        (("--out", __file__), "--out"),
    ],
    ids=["rule", "data", "epochs", "seeds", "device", "out"],
)
def test_a_bad_argument_is_one_line(example, monkeypatch, capsys, arguments, named):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "argv", ["two_routes.py", *arguments])
    with pytest.raises(SystemExit) as left:
        example("two_routes").parse()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert named in error


@pytest.mark.parametrize(("name", "size"), [("digits", 8), ("cluttered", 32)])
def test_images(cluttered_digits, name, size):
    training, test = cluttered_digits.load(name, train_size=300, test_size=100)
    for side in (training, test):
        assert side.images.shape == (len(side.labels), 1, size, size)
        assert side.images.dtype == torch.float32
        assert 0 <= side.images.min() < side.images.max() <= 1 + 1e-6
        assert set(side.labels.tolist()) == set(range(10))
    if name == "cluttered":
        assert (len(training.images), len(test.images)) == (300, 100)


@pytest.mark.parametrize("name", ["digits", "cluttered"])
def test_no_digit_is_in_both_sets(cluttered_digits, name):
    training, test = cluttered_digits.load(name)
    assert not set(training.sources.flatten().tolist()) & set(test.sources.flatten().tolist())


def test_a_cluttered_image_depends_only_on_its_sources(cluttered_digits, monkeypatch):
    """Blanking all digits except the sources changes nothing."""
    first, _ = cluttered_digits.load("cluttered", train_size=1, test_size=1)
    digits = cluttered_digits.load_digits()
    kept = first.sources.flatten().unique().numpy()
    blanked = 0 * digits.images
    blanked[kept] = digits.images[kept]
    digits.images = blanked
    monkeypatch.setattr(cluttered_digits, "load_digits", lambda: digits)
    again, _ = cluttered_digits.load("cluttered", train_size=1, test_size=1)
    assert torch.equal(first.images, again.images)


def test_images_are_the_same_for_the_same_seed(cluttered_digits):
    def drawn(seed):
        return [side.images for side in cluttered_digits.load("cluttered", seed, train_size=20, test_size=10)]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_an_unknown_data_set_is_named(cluttered_digits):
    with pytest.raises(ValueError, match="mnist"):
        cluttered_digits.load("mnist")
