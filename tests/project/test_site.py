"""The pages of the site: its reference has every public object, and its links lead to files of the repository.

`make docs` checks the rest: it fails for a page, a link, an anchor or a name in a docstring that does not exist.
"""

import importlib
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from public_things import public_things

import pyfeedback
from pyfeedback.ops.schemas import SCHEMAS

ROOT = Path(__file__).parents[2]
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
LISTED = re.findall(r"^::: pyfeedback\.(\S+)$", "\n".join(page.read_text() for page in REFERENCE), re.MULTILINE)
NAMES = (
    "nn",
    "optim",
    "metrics",
    "schedules",
    "integrations",
    "init",
    "functional",
    "rules",
    "reference",
    "testing",
    "tuning",
)
MODULES = [pyfeedback, *(importlib.import_module(f"pyfeedback.{name}") for name in NAMES)]


def public_of(module):
    """The public objects of a module: those it exports by ``__all__``, or the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return [getattr(module, name) for name in module.__all__]
    return [thing for thing, _ in public_things(module)]


def test_a_name_is_in_the_reference_once():
    things = [attrgetter(name)(pyfeedback) for name in LISTED]
    assert len({id(thing) for thing in things}) == len(things) > 60


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module):
    listed = [attrgetter(name)(pyfeedback) for name in LISTED]
    assert public_of(module)
    assert [thing for thing in public_of(module) if thing not in listed and thing not in MODULES] == []


def test_the_reference_has_the_schema_of_every_op():
    page = (ROOT / "docs" / "reference" / "ops.md").read_text()
    table, schemas = page.split("## Schemas")
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(SCHEMAS)
    shown = [" ".join(schema.split()) for schema in re.split(r"\n\n", schemas.strip())]
    real = [str(getattr(torch.ops.pyfeedback, name).default._schema) for name in SCHEMAS]
    assert shown == [schema.removeprefix("pyfeedback::") for schema in real]


def links():
    pages = [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *(ROOT / "docs").rglob("*.*")]
    pages = [page for page in pages if page.suffix in (".md", ".ipynb")]
    for page in sorted(pages):
        for target in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", page.read_text()):
            if not re.match(r"\w+:", target):
                yield page.relative_to(ROOT), target


def test_links_between_files_lead_to_files():
    found = list(links())
    assert len(found) > 50
    assert [(str(page), target) for page, target in found if not (ROOT / page.parent / target).is_file()] == []


def test_every_page_is_in_the_navigation():
    nav = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.*")]
    pages = {str(path.with_suffix(".md")) for path in pages if path.suffix in (".md", ".ipynb")}
    made = {"index.md", "changelog.md", "contributing.md", "architecture.md", "adding_a_rule.md", "adding_a_kernel.md"}
    assert sorted(nav) == sorted(pages | made)
