"""The Python blocks of the README, the pages of docs/ and the notebooks run as they are, and print what they show.

The blocks of a page run in order in one namespace, which starts with the names of ``GIVEN`` that a page uses without
defining them. A block ```text after a block of Python is its output, like what a cell of a notebook has printed: the
words are equal, and the numbers nearly so.
"""

import ast
import contextlib
import io
import json
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback.backends import choices

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
NOTEBOOKS = {page.name: page for page in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))}
# Results of training depend on the order of sums on a processor: the absolute difference allowed.
TRAINED = {"quickstart.md": 3.0, "weight_transport.ipynb": 15.0, "alignment.ipynb": 15.0}
SLOW = {"quickstart.md", "metrics.md", "weight_transport.ipynb", "own_rule.ipynb", "alignment.ipynb"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def batches():
    return [(torch.randn(8, 2, 6, 6), torch.randn(8, 3)) for _ in range(20)]


# What a page may use without defining it.
GIVEN = {
    "model": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(64, 3)),
    "data": batches,
    "loader": batches,
    "x": lambda: torch.randn(8, 2, 6, 6),
    "target": lambda: torch.randn(8, 3),
    "loss_function": lambda: F.mse_loss,
    "W": lambda: torch.randn(4, 2, 3, 3, requires_grad=True),
    "B": lambda: torch.randn(4, 2, 3, 3, requires_grad=True),
    "bias": lambda: torch.randn(4, requires_grad=True),
}

# Blocks that are compiled but not run: page, a part of their text, and the reason.
NOT_RUN = {
    ("training.md", 'image_data.load("fashion-mnist"'): "reads files that have to be downloaded",
    ("pytorch.md", "from_pretrained("): "needs packages that are not installed",
    ("kernels.md", 'pyfeedback.backend("triton")'): "needs a GPU",
}


def blocks(page):
    """The (language, text) of each block of a page."""
    return BLOCK.findall(PAGES[page].read_text()) if page in PAGES else list(cells(NOTEBOOKS[page]))


def cells(notebook):
    """The (language, text) of each cell of code, and of what it has printed."""
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "python", "".join(cell["source"])
            yield "text", "".join(line for output in cell["outputs"] for line in output.get("text", []))


def is_run(page, text):
    return not any(page == of and part in text for of, part in NOT_RUN)


def executed():
    """The pages with a block that is run."""
    for page in (*PAGES, *NOTEBOOKS):
        if any(language == "python" and is_run(page, text) for language, text in blocks(page)):
            yield pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())


def same_output(found, shown, difference=0.0):
    """Whether two texts have the same words, and numbers that differ by 10 %, one unit of the last digit, or less."""
    if NUMBER.sub("0", found).split() != NUMBER.sub("0", shown).split():
        return False
    numbers = zip(NUMBER.findall(found), NUMBER.findall(shown), strict=True)
    allowed = (max(difference, 0.1 * abs(float(b)), 1.01 * last_digit(b)) for b in NUMBER.findall(shown))
    return all(abs(float(a) - float(b)) <= most for (a, b), most in zip(numbers, allowed, strict=True))


def last_digit(number):
    return 10.0 ** -len(number.partition(".")[2])


@pytest.fixture
def names(monkeypatch, tmp_path):
    """The names of GIVEN, in an empty folder, where `pyfeedback.tune` may write. The examples can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("PYFEEDBACK_CACHE", str(tmp_path))
    monkeypatch.delenv("PYFEEDBACK_TUNE", raising=False)
    choices.forget()
    torch.manual_seed(0)
    yield {name: make() for name, make in GIVEN.items()}
    choices.forget()


def test_outputs_are_compared():
    assert same_output("a 1.52 b\n", "a 1.5 b\n")
    assert not same_output("a 1.8 b", "a 1.5 b")
    assert same_output("a 1.8 b", "a 1.5 b", 0.5)
    assert not same_output("a 1.5 c", "a 1.5 b")
    assert not same_output("a 1.5", "a 1.5 1.5")


@pytest.mark.parametrize("page", [*executed()])
def test_the_blocks_of_a_page_run_and_print_what_they_show(page, names):
    output = ""
    for i, (language, text) in enumerate(blocks(page)):
        if language == "python" and is_run(page, text):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(text, f"{page}, block {i}", "exec"), names)
            output = printed.getvalue()
        elif language == "text":
            assert same_output(output, text, TRAINED.get(page, 0.0)), f"block {i} of {page} prints:\n{output}"


def test_the_blocks_that_are_not_run_are_python_with_names_that_exist():
    for page, part in NOT_RUN:
        texts = [text for language, text in blocks(page) if language == "python" and part in text]
        assert texts
        for node in (node for text in texts for node in ast.walk(ast.parse(text))):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pyfeedback."):
                attrgetter(ast.unparse(node).removeprefix("pyfeedback."))(pyfeedback)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_with_a_fence_have_a_language(page):
    """Python, and its output, is between fences; commands and formulas are indented."""
    assert {language for language, _ in blocks(page)} <= {"python", "text"}


@pytest.mark.parametrize("page", PAGES)
def test_the_names_of_pyfeedback_in_a_text_exist(page):
    text = BLOCK.sub("", PAGES[page].read_text())
    for name in re.findall(r"(?<![\w./])pyfeedback((?:\.[A-Za-z_]\w*)+)", text.replace("torch.ops.pyfeedback", "")):
        attrgetter(name.removeprefix("."))(pyfeedback)
