"""The monitor: its readings, its file, its picture, and its cost per step."""

import math
import subprocess
import sys

import pytest
import torch
from small_networks import perceptron
from torch.nn import functional as F

import pyfeedback
from pyfeedback.metrics import monitor as monitor_module


def network(rule="kp", layers=2):
    return pyfeedback.convert(perceptron(*[6] * layers, 3), rule)


def train(model, monitor, steps):
    """Train for some steps with the monitor; return the result of each monitor step."""
    generator = torch.Generator().manual_seed(1)
    optimizer = pyfeedback.optim.SGD(model, lr=0.1)
    found = []
    for _ in range(steps):
        x, target = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        found.append(monitor.step())
    return found


def probe():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def test_a_reading_every_n_steps_is_the_current_alignment():
    model = network()
    before = pyfeedback.alignment(model)
    monitor = pyfeedback.Monitor(model, every=3)
    found = train(model, monitor, 7)
    assert [reading is not None for reading in found] == [False, False, True, False, False, True, False]
    assert list(monitor.readings) == [0, 3, 6]
    assert monitor.readings[0] == before
    assert monitor.readings[6] == found[5] != before
    train(model, monitor, 2)
    assert monitor.readings[9] == pyfeedback.alignment(model)


def test_a_step_between_readings_reads_nothing(monkeypatch):
    monitor = pyfeedback.Monitor(network(), every=5)
    monkeypatch.setattr(monitor_module, "alignment", lambda *_: pytest.fail("read"))
    for _ in range(4):
        monitor.step()


def test_a_monitor_does_not_change_training():
    watched, alone = network("ia"), network("ia")
    train(watched, pyfeedback.Monitor(watched, every=1, batch=probe(), loss=F.cross_entropy), 5)
    train(alone, pyfeedback.Monitor(alone, every=100), 5)
    assert all(map(torch.equal, watched.state_dict().values(), alone.state_dict().values()))


def test_a_batch_gives_the_angles_of_gradients():
    model = network("fa")
    monitor = pyfeedback.Monitor(model, every=2, batch=probe(), loss=F.cross_entropy)
    train(model, monitor, 2)
    assert monitor.readings[2] == pyfeedback.alignment(model, probe(), F.cross_entropy)
    assert monitor.readings[2]["0"].gradient_angle > 0


@pytest.mark.parametrize("batch", [None, probe()], ids=["weights", "gradients"])
def test_a_saved_file_loads_unchanged(tmp_path, batch):
    model = network("fa")
    with torch.no_grad():
        model[0].feedback.zero_()  # an angle of nan
    loss = None if batch is None else F.cross_entropy
    monitor = pyfeedback.Monitor(model, every=2, batch=batch, loss=loss)
    train(model, monitor, 4)
    monitor.save(tmp_path / "alignment.csv")
    header, first, *_ = (tmp_path / "alignment.csv").read_text().splitlines()
    assert header == "step,layer,angle,norm_ratio,weight_norm,projection_angle,gradient_angle"
    assert first.startswith("0,0,nan,0.0,")

    again = pyfeedback.Monitor(model, every=2)
    again.load(tmp_path / "alignment.csv")
    assert repr(again.readings) == repr(monitor.readings)  # nan is not equal to nan
    again.step(), again.step()
    assert list(again.readings) == [0, 2, 4, 6]


def test_a_monitor_resumes_from_its_state_dict():
    model = network()
    monitor = pyfeedback.Monitor(model, every=3)
    train(model, monitor, 4)
    again = pyfeedback.Monitor(model, every=3)
    again.load_state_dict(monitor.state_dict())
    assert again.readings == monitor.readings
    assert [again.step() is not None for _ in range(2)] == [False, True]


def test_another_file_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,2.0\n")
    with pytest.raises(ValueError, match=r"metrics\.csv has columns epoch,loss, expected step,layer,angle"):
        pyfeedback.Monitor(network()).load(tmp_path / "metrics.csv")


@pytest.mark.parametrize("every", [0, -1])
def test_every_must_be_at_least_one(every):
    with pytest.raises(ValueError, match=f"every is {every}, expected 1 or more"):
        pyfeedback.Monitor(network(), every=every)


# The picture


def lines(axes):
    return [line.get_ydata().astype(float) for line in axes.get_lines()]


@pytest.mark.parametrize("layers", [3, 12], ids=["legend", "color bar"])
def test_the_picture_shows_what_was_read(tmp_path, layers):
    pytest.importorskip("matplotlib")
    model = network(layers=layers)
    monitor = pyfeedback.Monitor(model, every=2, batch=probe(), loss=F.cross_entropy)
    train(model, monitor, 6)
    panels = {axes.get_title(): axes for axes in monitor.draw(tmp_path / "a.png").axes if axes.get_title()}
    angle, ratio, growth, projection, gradient = panels.values()
    last = list(monitor.readings[6].values())
    start = list(monitor.readings[0].values())
    assert [line[-1] for line in lines(angle)] == [a.angle for a in last]
    assert [line[-1] for line in lines(ratio)] == [a.norm_ratio for a in last]
    assert [line[-1] for line in lines(growth)] == [
        a.weight_norm / b.weight_norm for a, b in zip(last, start, strict=True)
    ]
    assert [line[-1] for line in lines(projection)] == [a.projection_angle for a in last]
    assert [line[-1] for line in lines(gradient)] == [a.gradient_angle for a in last]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [0, 6])
def test_many_layers_are_rows_of_a_heatmap(tmp_path, steps):
    pytest.importorskip("matplotlib")
    monitor = pyfeedback.Monitor(network(layers=30), every=2)
    train(monitor.model, monitor, steps)
    panels = [axes for axes in monitor.draw(tmp_path / "a.svg").axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == list(monitor_module.PANELS)[:3]
    for axes, metric in zip(panels[:2], ("angle", "norm_ratio"), strict=True):
        (mesh,) = axes.collections
        grid = mesh.get_array()
        assert grid.shape == (len(monitor.latest), max(2, len(monitor.readings)))
        assert grid[:, -1].tolist() == pytest.approx([getattr(a, metric) for a in monitor.latest.values()])
        layers = list(monitor.latest)
        assert [label.get_text() for label in axes.get_yticklabels()] == [layers[0], layers[-1]]
        assert axes.yaxis_inverted()


class Scalars:
    """Like a SummaryWriter of TensorBoard."""

    def __init__(self):
        self.seen = {}

    def add_scalar(self, name, value, step):
        self.seen.setdefault(step, {})[name] = value


class Run:
    """Like a run of W&B."""

    def __init__(self):
        self.seen = {}

    def log(self, values, step):
        self.seen[step] = values


@pytest.mark.parametrize("kind", [Scalars, Run])
def test_a_writer_gets_each_reading(kind):
    writer = kind()
    monitor = pyfeedback.Monitor(network(), every=2, writer=writer)
    train(monitor.model, monitor, 4)
    assert list(writer.seen) == [0, 2, 4] == list(monitor.readings)
    for step, found in monitor.readings.items():
        names = ("angle", "norm_ratio", "weight_norm")
        assert writer.seen[step] == {f"{n}/{layer}": getattr(a, n) for layer, a in found.items() for n in names}


def test_a_writer_needs_a_method():
    with pytest.raises(TypeError, match=r"^writer is a list, expected an object with add_scalar or log"):
        pyfeedback.Monitor(network(), writer=[])


def test_without_a_batch_three_panels_and_nan_where_a_weight_was_zero():
    pytest.importorskip("matplotlib")
    model = network()
    with torch.no_grad():
        model[0].weight.zero_()
    _, _, growth = pyfeedback.Monitor(model).draw().axes
    assert math.isnan(lines(growth)[0][0])
    assert lines(growth)[1][0] == 1


def test_backprop_has_nothing_to_draw():
    with pytest.raises(ValueError, match="model has no feedback layer"):
        pyfeedback.Monitor(network("bp")).draw()


@pytest.mark.slow
def test_matplotlib_is_imported_only_to_draw(tmp_path):
    code = """
import sys, torch, pyfeedback
monitor = pyfeedback.Monitor(pyfeedback.convert(torch.nn.Linear(3, 2), "fa"), every=1)
monitor.step(), monitor.save("a.csv"), monitor.load("a.csv")
assert "matplotlib" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
