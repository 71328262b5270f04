"""The checks of the model zoo find what they should, its table is that of its results, and a sample of it passes."""

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
import torch
import zoo
import zoo_checks as checks
from small_networks import normalized_convnet
from torch import nn
from torch.nn import functional as F
from zoo_models import MODELS

import pyfeedback

SAMPLE = (
    "torchvision.densenet", "torchvision.efficientnet", "torchvision.swin_v2", "torchvision.mvit",
    "timm.pvt_v2_b0", "timm.ghostnet_050", "timm.poolformer", "timm.levit_128s",
    "transformers.Llama", "transformers.T5", "transformers.Mamba", "transformers.Whisper",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_of_another_package(name):
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"needs {name.partition('.')[0]}")
    results = []
    zoo.check(name, results.append)
    assert zoo.faults(results[-1]) == []
    assert results[-1]["conversion"]["converted"]


# The checks


class Parts(nn.Module):
    """A layer of each kind: used, never called, of a constant, without a gradient, and left."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.unused = (nn.Linear(4, 4) for _ in range(3))
        self.of_constant, self.detached = nn.Linear(4, 4), nn.Linear(4, 4)
        self.own = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.randn(1, 4))

    def forward(self, x):
        y = self.first(x) @ self.own * self.scale + self.of_constant(torch.ones(4))
        return self.last(y), self.detached(y).detach()


def parts():
    torch.manual_seed(0)
    return Parts(), {"x": torch.randn(3, 4)}


def test_the_reason_of_each_feedback_weight_without_influence():
    found = checks.influence(*parts())
    assert found["dead"] == {
        "unused": "not called",
        "of_constant": "its input needs no gradient",
        "detached": "no gradient reaches its output",
    }


def test_a_layer_that_is_called_without_its_feedback_is_found(monkeypatch):
    def forward(self, x):
        self.called = True
        return F.linear(x, self.weight, self.bias)

    monkeypatch.setattr(pyfeedback.nn.Linear, "forward", forward)
    found = checks.influence(nn.Sequential(nn.Linear(4, 4)), {"input": torch.randn(2, 4)})
    assert found == {"tried": 1, "dead": {"0": "NO INFLUENCE, though called"}}
    assert zoo.faults({"influence": found}) == ["the feedback weight has no influence: 0"]


class Products(nn.Module):
    """Weights in products of every kind, behind views and a standardization; and one that only scales."""

    def __init__(self):
        super().__init__()
        for name, shape in {"a": (4, 4), "b": (4, 4), "c": (4, 4, 3), "d": (2, 4, 4), "scale": (1, 4)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.embedding, self.layer, self.lstm = nn.Embedding(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4)

    def forward(self, x):
        x = F.linear(x, self.a - self.a.mean(1, keepdim=True)) @ self.b.t() * self.scale
        x = F.conv1d(x.unsqueeze(-1), self.c, padding=1).squeeze(-1)
        x = (x.expand(2, -1, -1) @ self.d).sum(0)
        return self.layer(x) @ self.embedding(torch.arange(4)) + self.scale


def test_weights_in_products_are_found_and_scales_and_feedback_layers_are_not(monkeypatch):
    plain, inputs = Products(), {"x": torch.randn(3, 4)}
    monkeypatch.setattr(pyfeedback, "convert", only_the_linear_layer)
    assert set(checks.weights_that_carry_gradients(plain, inputs)) == {"a", "b", "c", "d"}


def only_the_linear_layer(model, rule):
    from pyfeedback.conversion import convert

    convert(model.layer, rule)
    return model


def test_gradients_that_are_not_those_of_the_reference_are_found(monkeypatch):
    plain, inputs = normalized_convnet(), {"input": torch.randn(4, 2, 4, 4)}
    assert checks.gradient_error(plain, inputs)[0] < 1e-12
    compute = checks.functional.layer

    def wrong(geometry, rule, input, weight, feedback, bias):
        return compute(geometry, rule, input, weight, feedback * 1.001, bias)

    monkeypatch.setattr(checks.functional, "layer", wrong)
    assert checks.gradient_error(plain, inputs)[0] > 1e-6


@pytest.mark.parametrize("rule", checks.STEP_RULES)
def test_a_step_moves_the_feedback_weights_that_learn(rule):
    found = checks.step(normalized_convnet(), {"input": torch.randn(4, 2, 4, 4)}, rule)
    assert zoo.faults({f"step {rule}": found}) == []


def test_a_loss_is_the_same_at_each_call_and_has_the_gradient_of_every_output():
    model, inputs = parts()
    assert checks.loss_of(model, inputs) == checks.loss_of(model, inputs)

    class Two(nn.Module):
        def forward(self, x, y):
            return {"a": [x * 2], "b": (y, None, 3)}

    x, y = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    checks.loss_of(Two(), {"x": x, "y": y}).backward()
    assert x.grad.all()
    assert y.grad.all()


def test_the_model_has_no_dropout():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2), nn.AlphaDropout()))
    assert checks.without_dropout(model)[0].p == model[1][1].p == 0.0


# The program


def end_at_once(name, keep):
    keep({"parameters": 3})
    if name == "crash":
        os._exit(7)
    if name == "hang":
        time.sleep(60)
    if name == "error":
        raise RuntimeError("first\nsecond")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fine", None),
        ("crash", "the process ended with exit code 7"),
        ("hang", "no end within 5.0 s"),
        ("error", "RuntimeError: first"),
    ],
)
def test_a_model_that_does_not_end_well_is_a_result(name, error):
    worker = zoo.Worker()
    for each, expected in ((name, error), ("fine", None)):
        result = worker.result(end_at_once, each, 5.0)
        assert result.pop("seconds") < 30
        assert result.pop("error", None) == expected
        assert result == ({} if each == "error" else {"parameters": 3})
    worker.process.kill()


def result_of(**changes):
    fine = {
        "conversion": {
            "converted": ["a", "b"],
            "left": {"c": "an embedding has no input gradient", "d": "Conv1D has weights, but", "e": "X has weights"},
            "forgotten": [],
        },
        "influence": {"tried": 2, "dead": {"b": "not called"}},
        "through_weights": ["d.weight"],
        "gradient_error": [1e-15, "a"],
        "step kp": {"losses": [1.0, 0.9], "finite": True, "still": ["b"], "wrongly_moved": [], "warnings": []},
    }
    return fine | changes


def test_the_faults_of_a_model():
    assert zoo.faults(result_of()) == []
    step = result_of()["step kp"]
    for changes, fault in (
        ({"through_weights": ["b.weight", "x"]}, "the layer is converted, but its weight carries gradients back: b"),
        ({"gradient_error": [1e-3, "a"]}, "gradients differ"),
        ({"compiled": 1e-3}, "compiled gradients differ"),
        ({"compiled": {"error": "Unsupported: x"}}, "compiled: Unsupported: x"),
        ({"error": "no end within 9 s"}, "no end"),
        ({"step kp": step | {"losses": [1.0, float("nan")]}}, "kp: a loss or parameter is not finite"),
        ({"step kp": step | {"still": ["a", "b"]}}, "kp: feedback weights that learn did not move: a"),
        ({"step fa": step | {"wrongly_moved": ["a", "b"]}}, "fa: fixed feedback weights moved: a and 1 more"),
        ({"conversion": {"converted": [], "left": {}, "forgotten": []}}, "no layer is converted"),
        ({"conversion": {"converted": ["a"], "left": {}, "forgotten": ["x"]}}, "neither converted nor reported: x"),
    ):
        (found,) = zoo.faults(result_of(**changes))
        assert found.startswith(fault)


def test_the_table_lists_failures_first():
    first, second = list(MODELS)[:2]
    page = zoo.table({first: result_of(), second: result_of(compiled=1.0)}, {"torch": "2.13.0"})
    rows = [line for line in page.splitlines() if line.startswith("|")][2:]
    package, _, name = first.partition(".")
    left, weights = "1 embedding, 1 Conv1D, 1 other", "1: `d.weight`"
    cells = [name, package, "2", "1 not called", left, weights, "not tried", "partly"]
    assert rows[1] == f"| {' | '.join(cells)} |"
    assert rows[0].endswith("| yes | **compiled gradients differ from the eager ones by 1e+00** |")
    assert "**1 of 2 models pass**, 1 of them with weights that carry gradients back as in\nbackprop. 4 layers" in page
    assert "4 layers are converted. 0 of the 1 models that were compiled have the\nsame gradients." in page


def test_the_committed_table_is_that_of_the_committed_results():
    saved = json.loads(Path(zoo.KEPT).read_text())
    assert zoo.TABLE.read_text() == zoo.table(saved["models"], saved["versions"])
    assert saved["models"].keys() <= MODELS.keys()
    assert len(saved["models"]) >= 100


def test_a_sample_names_models_of_the_zoo():
    assert len(set(SAMPLE)) == 12
    assert set(SAMPLE) <= MODELS.keys()
