"""pyfeedback.status, and the rule in a state_dict."""

import copy
import logging
import math

import pytest
import torch
from small_networks import perceptron
from torch import nn

import pyfeedback


def mixed():
    """A model with a layer of each kind of path."""
    model = nn.ModuleDict({
        "learns": nn.Linear(4, 4), "fixed": nn.Conv1d(4, 4, 1), "backprop": nn.Linear(4, 4), "direct": nn.Linear(4, 4),
        "idle": nn.Linear(4, 4), "left": nn.Bilinear(4, 4, 4), "norm": nn.LayerNorm(4),
    })  # fmt: skip
    rules = {"learns": "ia", "fixed": "fa", "backprop": "bp", "direct": "dfa", "idle": "kp"}
    return pyfeedback.convert(model, rules)


def run(model, x):
    x = model["learns"](x)
    x = model["fixed"](x.unsqueeze(-1)).squeeze(-1)
    return model["norm"](model["left"](model["direct"](model["backprop"](x)), x))


def test_the_status_of_each_layer():
    torch.manual_seed(0)
    model = mixed()
    names = ["learns", "fixed", "backprop", "direct", "idle", "left"]
    assert [(row.name, row.path) for row in pyfeedback.status(model)] == [
        *((name, "not called") for name in names[:-1]), ("left", "weight"),
    ]  # fmt: skip
    run(model, torch.randn(3, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    found = pyfeedback.status(model)
    assert [(row.name, row.kind, row.rule, row.path, row.stepped) for row in found] == [
        ("learns", "Linear", "ia", "feedback", True), ("fixed", "Conv1d", "fa", "feedback", None),
        ("backprop", "Linear", "bp", "weight", None), ("direct", "Linear", "dfa", "output", None),
        ("idle", "Linear", "kp", "not called", False), ("left", "Bilinear", "", "weight", None),
    ]  # fmt: skip
    readings = pyfeedback.alignment(model)
    for row in found:
        if row.name in ("learns", "fixed", "idle"):
            assert (row.angle, row.norm_ratio) == (readings[row.name].angle, readings[row.name].norm_ratio)
        else:
            assert math.isnan(row.angle)
            assert math.isnan(row.norm_ratio)


def test_the_table():
    torch.manual_seed(0)
    lines = str(pyfeedback.status(mixed())).splitlines()
    assert lines[0].split() == ["layer", "kind", "rule", "path", "B", "stepped", "angle", "|B|/|W|", "tau"]
    assert lines[1].split()[:6] == ["learns", "Linear", "ia", "not", "called", "no"]
    assert lines[-1].split() == ["left", "Bilinear", "-", "weight"]
    assert len(lines) == 7
    assert str(pyfeedback.status(nn.Linear(2, 2))).splitlines()[1].split() == ["(model)", "Linear", "-", "weight"]


def test_time_constants_come_from_the_rule_or_the_optimizer():
    model = pyfeedback.convert(perceptron(4, 4, 4), {"0": "ia", "2": pyfeedback.rule("sa", tau=4.0)})
    first, second = pyfeedback.status(model)
    assert math.isnan(first.tau)
    assert second.tau == 4.0
    optimizer = pyfeedback.optim.SGD(pyfeedback.convert(perceptron(4, 4, 4), "sa"), lr=0.5)
    model = pyfeedback.convert(perceptron(4, 4, 4), "sa")
    optimizer = pyfeedback.optim.SGD(model, lr=0.5)
    assert [row.tau for row in pyfeedback.status(model, optimizer)] == [pytest.approx(1 / (0.5 * 2e-3))] * 2


def test_a_feedback_weight_has_not_stepped_after_it_was_drawn_loaded_or_copied():
    model = pyfeedback.convert(perceptron(4, 4, 4), "ia")
    optimizer = pyfeedback.optim.SGD(model, lr=0.1)

    def stepped(model):
        return [row.stepped for row in pyfeedback.status(model)]

    assert stepped(model) == [False, False]
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert stepped(model) == [True, True]
    assert stepped(copy.deepcopy(model)) == [False, False]
    model.load_state_dict(model.state_dict())
    assert stepped(model) == [False, False]
    optimizer.step()
    assert stepped(model) == [True, True]
    model[0].reset_feedback()
    assert stepped(model) == [False, True]


class OwnProduct(nn.Module):
    """A module that multiplies one of its two weights with its input."""

    def __init__(self):
        super().__init__()
        self.matrix, self.table = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.matrix + self.table[0]


def test_a_weight_that_a_module_multiplies_itself():
    model = pyfeedback.convert(nn.Sequential(OwnProduct()), "ia", optimizer=None)
    optimizer = pyfeedback.optim.SGD(model, lr=0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    table, matrix = pyfeedback.status(model)
    assert (matrix.name, matrix.kind) == ("0.matrix_feedback", "OwnProduct.matrix")
    assert (matrix.path, matrix.stepped) == ("feedback", True)
    assert (table.name, table.kind, table.path) == ("0", "OwnProduct", "weight")


def test_bad_arguments():
    with pytest.raises(TypeError, match="model is"):
        pyfeedback.status(torch.zeros(2))
    with pytest.raises(ValueError, match="on meta"):
        pyfeedback.status(pyfeedback.convert(nn.Linear(2, 2, device="meta"), "ia"))
    model = pyfeedback.convert(nn.Linear(2, 2), "ia")
    with pytest.raises(
        TypeError, match=r"optimizer is a torch\.optim\.sgd\.SGD, expected one of pyfeedback\.optim, or"
    ):
        pyfeedback.status(model, torch.optim.SGD(model.parameters()))


# The rule in a state_dict


def test_a_state_dict_of_another_rule_is_refused():
    saved, model = (pyfeedback.convert(perceptron(4, 4, 4), rule) for rule in ("kp", "ia"))
    before = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(
        RuntimeError, match=r"feedback weights of the rule kp, but 0 follows ia: convert .* dict\("
    ) as e:
        model.load_state_dict(saved.state_dict())
    assert str(e.value).count("follows") == 1
    for key in ("0.weight", "0.feedback", "2.weight", "2.feedback"):
        torch.testing.assert_close(model.state_dict()[key], before[key], rtol=0, atol=0)
    model.load_state_dict(dict(saved.state_dict()))
    assert torch.equal(model[0].feedback, saved[0].feedback)


def test_a_saved_state_dict_carries_the_rule(tmp_path):
    saved, model = (pyfeedback.convert(perceptron(4, 4, 4), rule) for rule in ("kp", "ia"))
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    with pytest.raises(RuntimeError, match="of the rule kp"):
        model.load_state_dict(loaded)
    pyfeedback.convert(model, pyfeedback.rule("kp", decay=0.5)).load_state_dict(loaded)  # the same rule
    assert torch.equal(model[2].feedback, saved[2].feedback)


@pytest.mark.parametrize("rule", [None, "bp"])
def test_a_state_dict_without_feedback_loads_into_every_rule(rule, caplog):
    plain = perceptron(4, 4, 4)
    if rule is not None:
        pyfeedback.convert(plain, rule)
    model = pyfeedback.convert(perceptron(4, 4, 4), "ia")
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(plain.state_dict())
    assert torch.equal(model[0].weight, plain[0].weight)
    assert len(caplog.messages) == 2
