"""The training program: killed and resumed it ends bit by bit where an unbroken run does; data, recipes and logs."""

import csv
import importlib
import json
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

import pyfeedback
from pyfeedback.rules import PRESETS

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parent.parent / "examples"
PROGRAM = EXAMPLES / "train.py"


@pytest.fixture(autouse=True)
def example_folder(monkeypatch):
    """Where the program is found; one thread is enough for networks as small as these, here and in its processes."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def part(name):
    """A module of the program, which is no package."""
    return importlib.import_module(f"training.{name}" if name != "train" else name)


def settings(name="digits-ia", **changes):
    """Those of a configuration, made short."""
    configuration = part("configurations").CONFIGURATIONS[name]
    return replace(configuration.settings, **{"epochs": 2, "every": 5, "probe": 8, **changes})


def few_digits(training=256, test=64):
    images = part("data").load("digits", Path())
    return part("data").Images(Subset(images.training, range(training)), Subset(images.test, range(test)), 10)


def new_run(chosen, images=None, workers=0):
    return part("loop").Run(chosen, images or few_digits(), part("place").Place(torch.device("cpu")), workers)


def nothing():
    pass


@pytest.fixture
def run_program(monkeypatch):
    """The program with these arguments, in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        part("train").main()

    return run


def table(path):
    with open(path, newline="") as file:
        return [{name: v for name, v in row.items() if name != "seconds"} for row in csv.DictReader(file)]


# Interruptions


class PowerCutError(Exception):
    """Stops a run between two steps."""


def interrupted(chosen, images, at, path, workers=0):
    """A run stopped after ``at`` steps and gone on with by another that loads its checkpoint."""
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
def test_an_interrupted_run_ends_where_an_unbroken_one_does(tmp_path, at):
    unbroken = new_run(settings())
    unbroken.train(nothing, nothing)
    assert unbroken.loader.steps == 4
    assert_same(interrupted(settings(), few_digits(), at, tmp_path / "checkpoint.pt"), unbroken)


@pytest.mark.parametrize("rule", PRESETS)
def test_so_it_does_under_every_rule(tmp_path, rule):
    chosen = settings(rule=pyfeedback.rule(rule))
    unbroken = new_run(chosen)
    unbroken.train(nothing, nothing)
    assert_same(interrupted(chosen, few_digits(), 6, tmp_path / "checkpoint.pt"), unbroken)


OPTIMIZERS = [{"optimizer": "adam"}, {"optimizer": "adamw"}, {"noise": 0.1}, {"noise": 0.1, "feedback_lr": 0.01}]


@pytest.mark.parametrize("changes", OPTIMIZERS, ids=str)
def test_so_it_does_with_another_optimizer(tmp_path, changes):
    chosen = settings("digits-kp", lr=1e-3, **changes)
    unbroken = new_run(chosen)
    unbroken.train(nothing, nothing)
    assert_same(interrupted(chosen, few_digits(), 6, tmp_path / "checkpoint.pt"), unbroken)


class Noisy(Dataset):
    """Digits with an augmentation that draws from torch's generator, as torchvision's do."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return image + 0.1 * torch.randn(image.shape), label


def test_so_it_does_with_dropout_augmentation_and_workers(tmp_path, monkeypatch):
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


def test_a_checkpoint_half_written_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoint = part("checkpoint")
    checkpoint.save({"step": 1}, tmp_path / "checkpoint.pt")

    def cut(state, file):
        file.write(b"PK")
        raise PowerCutError

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(PowerCutError):
        checkpoint.save({"step": 2}, tmp_path / "checkpoint.pt")
    assert checkpoint.load(tmp_path / "checkpoint.pt") == {"step": 1}


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kill_minus_nine_within_an_epoch(tmp_path, run_program, where):
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
    """An epoch is done, and steps of the next."""
    if not path.exists():
        return False
    state = part("checkpoint").load(path)
    return state["epoch"] >= 1 and 0 < state["step"] < 18


# Order and augmentation


def test_ranks_share_each_batch_and_an_epoch_has_every_image_once():
    Order = part("order").Order
    orders = [list(Order(24, 8, 0, rank, 2)) for rank in range(2)]
    assert [len(batch) for order in orders for batch in order] == [4] * 6
    seen = [index for order in orders for batch in order for _, index in batch]
    assert sorted(seen) == list(range(24))
    alone = list(Order(24, 8, 0, 0, 1))
    assert [sorted(a + b) for a, b in zip(*orders, strict=True)] == [sorted(batch) for batch in alone]


def test_the_order_is_that_of_seed_and_epoch_wherever_it_starts():
    def order(seed=0, epoch=0, start=0):
        made = part("order").Order(30, 8, seed, 0, 1)
        made.epoch, made.start = epoch, start
        assert len(made) == 3 - start
        return [[index for _, index in batch] for batch in made]

    assert order() == order()
    assert order(start=2) == order()[2:]
    assert order(start=3) == []
    assert order(epoch=1) != order() != order(seed=1)


def test_an_image_is_augmented_alike_by_whoever_loads_it():
    data = part("data")
    images = data.Images(Noisy(TensorDataset(torch.zeros(12, 1, 2, 2), torch.zeros(12))), [0] * 4, 2)
    place = part("place").Place(torch.device("cpu"))

    def epoch(number, start=0, seed=0, workers=0):
        return list(part("order").Loader(images, 4, seed, place, workers).epoch(number, start))

    state = torch.get_rng_state()
    first = epoch(0)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (epoch(0), epoch(0, workers=2)):
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))
    assert torch.equal(epoch(0, start=2)[0][0], first[2][0])
    drawn = torch.stack([images for images, _ in first]).flatten()
    assert len(drawn.unique()) == len(drawn)  # no image like another
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(first, epoch(1), strict=True))


@pytest.mark.parametrize(("batch", "ranks", "named"), [(6, 4, "the 4 ranks"), (400, 1, "at most the 256")])
def test_a_batch_that_does_not_fit_is_named(batch, ranks, named):
    place = part("place").Place(torch.device("cpu"), 0, ranks)
    with pytest.raises(ValueError, match=f"batch is {batch}, expected .*{named}"):
        part("order").Loader(few_digits(), batch, 0, place)


# Recipes


def test_the_learning_rate_is_the_papers():
    rate = part("recipe").rate
    paper = part("settings").Settings()
    expected = {0: 0, 2.5: 0.5, 5: 1, 29.9: 1, 30: 0.1, 60: 0.01, 79.9: 0.01, 80: 0.001, 90: 0.001}
    assert {epoch: rate(paper, epoch) for epoch in expected} == pytest.approx(expected)


def test_a_cosine_goes_from_the_warm_up_to_the_end():
    cosine = part("settings").Settings(cosine=True, epochs=12, warmup=2)
    found = [part("recipe").rate(cosine, epoch) for epoch in (1, 2, 7, 12)]
    assert found == pytest.approx([0.5, 1, 0.5, 0], abs=1e-12)


def test_the_published_settings():
    found = {name: settings for name, (settings, _) in part("configurations").CONFIGURATIONS.items()}
    paper = found["imagenet-kp"]
    assert (paper.epochs, paper.batch, paper.warmup, paper.milestones) == (90, 256, 5, (30, 60, 80))
    assert (paper.momentum, paper.nesterov, paper.weight_decay) == (0.9, True, 1e-4)
    assert paper.rule.decay == paper.weight_decay  # or W and B do not meet
    he = found["cifar10"]
    steps = 50_000 // he.batch
    assert [round(epoch * steps, -3) for epoch in (*he.milestones, he.epochs)] == [32_000, 48_000, 64_000]
    biotorch = found["biotorch-cifar10-usf"]
    assert (biotorch.epochs, biotorch.batch, biotorch.lr, biotorch.milestones) == (250, 128, 0.1, (100, 150, 200))
    assert not biotorch.nesterov
    assert found["biotorch-cifar10-dfa"].lr == found["biotorch-imagenet-dfa"].lr == 0.001


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rule": pyfeedback.rule("bp")}, ["SGD"]),
        ({"feedback_lr": None}, ["SGD"]),
        ({"feedback_lr": 0.1}, ["SGD", "FeedbackSGD"]),
        ({"optimizer": "adam", "feedback_lr": None}, ["Adam"]),
        ({"optimizer": "adamw", "feedback_lr": None}, ["AdamW"]),
        ({"optimizer": "adam", "feedback_lr": 0.1}, ["Adam", "FeedbackSGD"]),
    ],
    ids=["bp", "together", "apart", "adam", "adamw", "adam apart"],
)
@pytest.mark.parametrize("rule", ["ia", "sa"])
def test_what_learns_is_stepped_by_one_optimizer(rule, changes, expected):
    run = new_run(settings(**{"rule": pyfeedback.rule(rule), **changes}))
    assert [type(optimizer).__name__ for optimizer in run.optimizers] == expected
    stepped = [id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(id(p) for p in run.network.parameters())
    before = [p.clone() for p in run.network.parameters()]
    run.train(nothing, nothing)
    assert not any(torch.equal(a, b) for a, b in zip(before, run.network.parameters(), strict=True))


def test_feedback_is_drawn_to_scale():
    one, tenth = (new_run(settings("digits-fa", feedback_scale=scale)) for scale in (1.0, 0.1))
    for a, b in zip(one.monitor.latest.values(), tenth.monitor.latest.values(), strict=True):
        assert b.norm_ratio == pytest.approx(0.1 * a.norm_ratio)


def test_noise_keeps_feedback_from_the_weight():
    angles = {}
    for noise in (0.0, 1.0):
        run = new_run(settings("digits-sa", noise=noise, epochs=4), few_digits(1024))
        run.train(nothing, nothing)
        angles[noise] = run.rows[-1]["angle"]
    assert angles[1.0] > angles[0.0] + 10


def test_kolen_pollack_aligns():
    run = new_run(settings("digits-kp", epochs=4), few_digits(1024))
    run.train(nothing, nothing)
    first, *_, last = run.monitor.readings.values()
    for layer in first:
        assert last[layer].angle < first[layer].angle - 5


# Networks


def test_the_residual_networks_of_cifar_have_the_published_sizes():
    """He et al. 2016, table 6: 0.27, 0.46 and 0.85 million parameters."""
    for depth, millions in ((20, 0.27), (32, 0.46), (56, 0.85)):
        network = part("models").build(f"resnet{depth}", 10, torch.Size([3, 32, 32]))
        layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert len(layers) == depth
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_every_layer_but_the_first_gets_feedback():
    network = part("models").convert(part("models").cifar_resnet(8, 10), pyfeedback.rule("fa"))
    names = [name for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [name for name, _ in pyfeedback.feedback_layers(network)] == names[1:]


def test_frozen_features_learn_nothing_but_their_classifier():
    run = new_run(settings(epochs=3), few_digits(1024, 512))
    before = {name: p.clone() for name, p in run.frozen.named_parameters()}
    run.train(nothing, nothing)
    changed = [name for name, p in run.frozen.named_parameters() if not torch.equal(p, before[name])]
    *_, last = (name for name, m in run.frozen.named_modules() if isinstance(m, nn.Linear))
    assert changed == [f"{last}.weight", f"{last}.bias"]
    assert run.rows[-1]["frozen_accuracy"] == run.evaluate(run.frozen)[1]
    assert 30 < run.rows[-1]["frozen_accuracy"] < run.rows[-1]["test_accuracy"]


@pytest.mark.parametrize("name", ["resnet21", "demo"])
def test_a_network_that_does_not_fit_is_named(name):
    with pytest.raises(ValueError, match=f"model is '{name}', (expected|which needs torchvision)"):
        part("models").build(name, 10, torch.Size([3, 32, 32]))


# The data sets of torchvision, in small


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))


def write_cifar(root, name):
    """The pickles of Krizhevsky's page; returns the first test image, [3, 32, 32]."""
    fine = name == "cifar100"
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir()
    names = ["train", "test"] if fine else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    classes = [str(i) for i in range(100 if fine else 10)]
    meta, key = ("meta", "fine_label") if fine else ("batches.meta", "label")
    (folder / meta).write_bytes(pickle.dumps({f"{key}_names": classes}))
    generator = numpy.random.default_rng(0)
    for file in names:
        data = generator.integers(256, size=(12, 3072), dtype=numpy.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": data, f"{key}s": [i % len(classes) for i in range(12)]}))
    return data[0].reshape(3, 32, 32)


def write_mnist(root):
    """The idx files of LeCun's page."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = numpy.random.default_rng(0)
    for side in ("train", "t10k"):
        images = generator.integers(256, size=(24, 28, 28), dtype=numpy.uint8)
        labels = numpy.arange(24, dtype=numpy.uint8) % 10
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
            (folder / f"{side}-{kind}-ubyte").write_bytes(header + values.tobytes())
    return images[:1]


def write_imagenet(root):
    """A folder of JPEG files for each class of each side; every test image is of one colour."""
    image = pytest.importorskip("PIL.Image")
    for side in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            (root / side / name).mkdir(parents=True)
            for number in range(8):
                picture = image.new("RGB", (320, 270), (200, 100, 40))
                picture.save(root / side / name / f"{number}.JPEG")
    return numpy.tile(numpy.array([200, 100, 40], dtype=numpy.uint8)[:, None, None], (1, 224, 224))


@pytest.fixture(params=["mnist", "cifar10", "cifar100", "imagenet"])
def folder(request, torchvision, tmp_path, monkeypatch):
    """Name and root of a data set, and the pixels of its first test image."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).exists())
    name = request.param
    writers = {"mnist": write_mnist, "imagenet": write_imagenet}
    pixels = writers[name](tmp_path) if name in writers else write_cifar(tmp_path, name)
    return name, tmp_path, pixels


def test_torchvision_reads_the_files_it_expects(folder):
    name, root, pixels = folder
    data = part("data")
    images = data.load(name, root)
    mean, deviation = (numpy.reshape(values, (-1, 1, 1)) for values in data.CHANNELS[name])
    expected = torch.tensor((pixels / 255 - mean) / deviation, dtype=torch.float32)
    assert images.shape == expected.shape
    tolerance = 0.05 if name == "imagenet" else 1e-5  # JPEG changes a colour a little
    assert torch.allclose(images.test[0][0], expected, atol=tolerance)
    assert images.classes == {"mnist": 10, "cifar10": 10, "cifar100": 100, "imagenet": 2}[name]
    augmented = [image for image, _ in part("order").Drawn(images.training, 0).images]
    assert {image.shape for image in augmented} == {expected.shape}


def test_the_program_trains_on_them(folder, run_program):
    name, root, _ = folder
    models = {"mnist": "resnet8", "cifar10": "resnet8", "cifar100": "mobilenet_v2", "imagenet": "resnet18"}
    run_program(
        "imagenet-sa", "--data", name, "--model", models[name], "--root", root, "--epochs", 1, "--batch", 6,
        "--probe", 4, "--warmup", 0, "--lr", 0.01, "--workers", 1, "--out", root / "run",
    )  # fmt: skip
    (row,) = table(root / "run" / "metrics.csv")
    assert math.isfinite(float(row["train_loss"]))
    assert float(row["gradient_angle"]) > 1


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet"])
def test_a_folder_without_the_data_set_is_named(torchvision, tmp_path, name):
    with pytest.raises(ValueError, match=rf"root is {tmp_path}, expected a folder with {name} for torchvision: .+"):
        part("data").load(name, tmp_path)


# Measures


def test_evaluation_counts_every_test_image():
    run = new_run(settings(batch=48))  # the last batch is smaller
    images = torch.stack([image for image, _ in few_digits().test])
    labels = torch.tensor([label for _, label in few_digits().test])
    scores = run.network.eval()(images)
    loss, accuracy = run.evaluate(run.network)
    assert loss == pytest.approx(nn.functional.cross_entropy(scores, labels).item(), rel=1e-6)
    assert accuracy == 100 * (scores.argmax(1) == labels).double().mean().item()


def test_the_moving_average_weighs_what_it_saw():
    place = part("place").Place(torch.device("cpu"))
    average = part("loop").MovingAverage(0.9, place.device)
    values = torch.randn(5, 2, dtype=torch.float64)
    for pair in values:
        average.update(pair)
    weights = 0.9 ** torch.arange(4, -1, -1, dtype=torch.float64)
    assert average.read() == average.read(place) == pytest.approx(((weights @ values) / weights.sum()).tolist())


def test_scale_growth_is_that_of_the_weights():
    run = new_run(settings())
    start = [p.detach().norm() for p in pyfeedback.forward_parameters(run.network) if p.dim() > 1]
    run.train(nothing, nothing)
    now = [p.detach().norm() for p in pyfeedback.forward_parameters(run.network) if p.dim() > 1]
    growth = sum((b / a).item() for a, b in zip(start, now, strict=True)) / len(now)
    assert run.rows[-1]["growth"] == pytest.approx(growth)


def test_a_run_that_diverges_stops():
    run = new_run(settings("digits-bp", lr=1e30, epochs=5))
    run.train(nothing, nothing)
    assert run.diverged
    assert len(run.rows) < 5


# Logs


def test_the_folder_of_a_run(tmp_path, run_program, capfd):
    run_program("digits-fa", "--epochs", "2", "--every", "6", "--resume", "--out", tmp_path / "run")
    shown = capfd.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines()[:2]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert not shown.err  # a bar is for a terminal

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
def test_a_bar_is_for_a_terminal(monkeypatch, tmp_path, capsys, terminal):
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
def test_a_configuration_is_what_it_was(monkeypatch, name):
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
    ],
    ids=["configuration", "rule", "mixture", "file", "json", "coefficients", "data", "epochs", "lr", "noise",
         "optimizer", "device", "root"],
)  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as left:
        part("train").main()
    assert named in left.value.code
    assert len(left.value.code.splitlines()) == 1


# However it runs


@pytest.mark.parametrize("how", [{"autocast": True}, {"channels_last": True}, {"frozen": False, "probe": 0}], ids=str)
def test_ways_to_run(how):
    run = new_run(settings(epochs=4, **how), few_digits(1024))
    run.train(nothing, nothing)
    assert run.rows[-1]["test_accuracy"] > 50
    if how.get("channels_last"):
        assert run.network[0][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_it_trains_as_it_does_otherwise():
    one_epoch = settings(epochs=1, frozen=False)
    plain, compiled = new_run(one_epoch), new_run(replace(one_epoch, compile=True))
    for run in (plain, compiled):
        run.train(nothing, nothing)
    assert compiled.rows[-1]["train_loss"] == pytest.approx(plain.rows[-1]["train_loss"], rel=1e-3)


def test_torchrun_runs_it_unchanged(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", PROGRAM]
    command = [*launch, "digits-ia", "--epochs", "2", "--checkpoint-every", "5", "--out", tmp_path]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [18, 36]
    assert float(rows[-1]["test_accuracy"]) > 50
    assert math.isfinite(float(rows[-1]["gradient_angle"]))
