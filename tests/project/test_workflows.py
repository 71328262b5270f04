"""The workflows of .github call what the Makefile has, with the versions that pyproject.toml names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} == {"ci", "wheels", "release"}


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_every_target_that_a_workflow_makes_exists(path):
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for names in targets for name in names.split()}
    made = set(re.findall(r"(?:run: |^\s*)make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert made <= targets
    assert made or path.stem == "release"


def test_the_tests_run_on_each_supported_version():
    project, workflow = ((ROOT / name).read_text() for name in ("pyproject.toml", ".github/workflows/ci.yml"))
    oldest = re.search(r'requires-python = ">=([\d.]+)"', project)[1], re.search(r'"torch>=([\d.]+)"', project)[1]
    tested = re.findall(r'python: "([\d.]+)", torch: "torch(?:==([\d.]+)\.\*)?"', workflow)
    assert tested[0] == oldest
    assert tested[-1][1] == ""  # the newest
    assert len({python for python, _ in tested}) == len(tested) == 5


def test_hooks_have_the_versions_of_make_lint():
    named = set(re.findall(r"additional_dependencies: \[(\S+)\]", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert named == set(re.findall(r'"((?:ruff|clang-format)==[\d.]+)"', (ROOT / "pyproject.toml").read_text()))
