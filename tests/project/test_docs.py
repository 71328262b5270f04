"""The tests that the documentation names exist, and the examples of the README run."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyfeedback

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@cache
def names_of_tests(path):
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_test_that_a_page_names_exists(page):
    sources = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("test_*.py")]
    known = {path.stem for path in sources}.union(*map(names_of_tests, sources))
    assert not set(re.findall(r"\btest_\w+", page.read_text())) - known


def test_the_table_of_peers_names_tests_that_exist():
    """benchmarks/peers.py prints its rows, but needs BioTorch."""
    named = set(re.findall(r'"(test_\w+)"', (ROOT / "benchmarks" / "peers.py").read_text()))
    assert len(named) > 10
    assert named <= set().union(*map(names_of_tests, (ROOT / "tests").rglob("test_*.py")))


# The examples of the README


def example(number):
    """The Python block of the README with this number."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[number]


def setting():
    """The variables that the first example uses, the same for each call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(64, 3))
    data = [(torch.randn(8, 2, 6, 6), torch.randn(8, 3)) for _ in range(20)]
    return {"model": model, "data": data, "loss_function": F.mse_loss, "torch": torch}


def test_the_first_example_trains_and_aligns():
    names = setting()
    before = [p.detach().clone() for p in names["model"].parameters()]
    exec(example(0), names)
    after = pyfeedback.forward_parameters(names["model"])
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert all(layer.angle < 45 for layer in pyfeedback.alignment(names["model"]).values())  # 90 without the rule
    assert not any(p.grad is not None for p in names["model"].parameters())


def assert_trained_alike(found, model, optimizer, data):
    """Train ``model`` with its optimizer, and compare its parameters with those of ``found``."""
    for x, target in data:
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, expected in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["ia-probes", "ia", "sa", "kp"])
def test_an_optimizer_that_is_followed_trains_as_that_of_the_package(rule):
    code, names = example(1), {**setting(), "pyfeedback": pyfeedback}
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": pyfeedback.rule(rule).decay if rule == "kp" else 0.0}
    for theirs, ours in (("AdamW", "SGD"), ("lr=1e-3", f"**{options}"), ('"ia-probes"', f'"{rule}"')):
        assert theirs in code
        code = code.replace(theirs, ours)
    exec(code, names)
    given = setting()
    model = pyfeedback.convert(given["model"], rule)
    for x, target in names["data"]:
        F.mse_loss(names["model"](x), target).backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
    optimizer = pyfeedback.optim.SGD(model, **options)
    assert_trained_alike(names["model"], model, optimizer, given["data"])


def test_two_optimizers_train_as_one_does():
    code = (ROOT / "docs" / "optimizers.md").read_text().split("With two optimizers,")[1].split("```")[1]
    names = {**setting(), "pyfeedback": pyfeedback}
    pyfeedback.convert(names["model"], "sa")
    exec(code.removeprefix("python"), names)
    for x, target in names["data"]:
        F.mse_loss(names["model"](x), target).backward()
        names["rule"].step(), names["task"].step()
        names["rule"].zero_grad(), names["task"].zero_grad()
    given = setting()
    model = pyfeedback.convert(given["model"], "sa")
    optimizer = pyfeedback.optim.SGD(model, lr=0.1, momentum=0.9)
    assert_trained_alike(names["model"], model, optimizer, given["data"])


def test_the_example_of_the_op():
    shapes = {"x": (2, 3, 8, 8), "W": (4, 3, 3, 3), "B": (4, 3, 3, 3), "bias": (4,)}
    names = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()} | {"torch": torch}
    eval(example(2), names).sum().backward()
    assert names["B"].grad.norm() > 0
