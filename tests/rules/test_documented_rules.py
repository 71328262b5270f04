"""docs/rules.md: its table has every rule, and its rules of your own do what it says."""

import re
from pathlib import Path

import torch
from rule_networks import gradients, network

from pyfeedback.rules import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()


def documented():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        assert len(block.splitlines()) < 20
        exec(block, names)
    return names


def test_the_table_has_every_rule():
    assert sorted(re.findall(r"^\| `([\w-]+)`", PAGE, re.MULTILINE)) == sorted(PRESETS)


def test_documented_rule_takes_fewer_samples_in_aligned_layers():
    model = network("ia")
    with torch.no_grad():
        model[3].feedback.copy_(model[3].weight)
    documented()["attend"](model)
    assert [model[i].rule.samples for i in (0, 3, 5)] == [0, 0.0625, 0]


def test_documented_rule_adds_its_term():
    plain, model = network("wm"), network("wm")
    model.load_state_dict(plain.state_dict())
    documented()["normalize"](model, strength=0.5)
    gradients(plain), gradients(model)
    b, w = model[3].feedback.detach(), model[3].weight.detach()
    torch.testing.assert_close(model[3].feedback.grad, plain[3].feedback.grad + 0.5 * b * (1 - w.norm() / b.norm()))
