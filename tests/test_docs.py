"""The documentation's claims stand beside the names of the tests that hold them: those tests exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def names_of_tests(path):
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_test_that_a_page_names_exists(page):
    sources = [path for room in ("tests", "benchmarks") for path in (ROOT / room).rglob("test_*.py")]
    known = {path.stem for path in sources}.union(*map(names_of_tests, sources))
    assert not set(re.findall(r"\btest_\w+", page.read_text())) - known


def test_the_table_of_peers_names_tests_that_exist():
    """Its rows are made by benchmarks/peers.py, which needs the peer."""
    named = set(re.findall(r'"(test_\w+)"', (ROOT / "benchmarks" / "peers.py").read_text()))
    assert len(named) > 10
    assert named <= set().union(*map(names_of_tests, (ROOT / "tests").rglob("test_*.py")))
