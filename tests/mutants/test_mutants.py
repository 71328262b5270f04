"""The list of faults matches the code, and the mutation runner tells detected faults from undetected ones."""

from pathlib import Path

import mutants
import pytest
from mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_fault_can_be_applied_to_its_file(mutant):
    """If the text no longer occurs, adapt the fault rather than remove it."""
    source = (mutants.ROOT / mutant.file).read_text()
    assert mutants.mutated(mutant, source) != source
    for test in mutant.tests:
        path, *names = test.partition("[")[0].split("::")
        written = (mutants.ROOT / path).read_text()
        assert all(f"def {name}(" in written or f"class {name}" in written for name in names), test


def test_there_are_enough_of_every_kind():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 60
    for folder, least in (("csrc", 20), ("kernels", 15), ("pyfeedback", 25)):
        assert sum(m.file.startswith(f"{folder}/") for m in MUTANTS) >= least


def test_the_list_is_read_block_by_block():
    text = (
        "# A comment\n\n# Another\nname\nfile.py\n-     a\n- b\n+\ntests/test_x.py\n\nother\nf.h\n- a\n+ - b\nt::u\nv\n"
    )
    assert mutants.read_list(text) == [
        Mutant("name", "file.py", "    a\nb", "", ("tests/test_x.py",)),
        Mutant("other", "f.h", "a", "- b", ("t::u", "v")),
    ]


def test_a_text_that_does_not_occur_exactly_once_is_an_error():
    mutant = Mutant("name", "file.py", "a + b", "a - b", ())
    assert mutants.mutated(mutant, "x = a + b") == "x = a - b"
    for source in ("x = a * b", "x = a + b; y = a + b"):
        with pytest.raises(ValueError, match=r"^name: 'a \+ b' occurs [02] times in file.py, expected once$"):
            mutants.mutated(mutant, source)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy with one module and its test, in this environment."""
    made = mutants.Copy(tmp_path)
    made.root.mkdir()
    (made.root / "small.py").write_text("def add(a, b):\n    return a + b\n")
    (made.root / "test_small.py").write_text("from small import add\n\n\ndef test_sum():\n    assert add(2, 2) == 4\n")
    monkeypatch.setattr(made, "python", Path(mutants.sys.executable))
    monkeypatch.setattr(made, "build", lambda: None)
    return made


@pytest.mark.parametrize(
    ("becomes", "killed", "by"),
    [("a - b", True, "test_small.py::test_sum"), ("a * b", False, ""), ("a +", True, "test_small.py")],
)
def test_a_fault_is_detected_or_not_and_then_reverted(copy, becomes, killed, by):
    path = copy.root / "small.py"
    before, times = path.read_text(), path.stat().st_mtime_ns
    found = mutants.judge(copy, Mutant("small", "small.py", "a + b", becomes, ("test_small.py",)))
    assert (found["killed"], found["by"]) == (killed, by)
    assert (path.read_text(), path.stat().st_mtime_ns) == (before, times)


def test_a_fault_without_a_test_is_an_error(copy):
    with pytest.raises(SystemExit, match=r"small: pytest finds nothing to run in test_small\.py::test_other"):
        mutants.judge(copy, Mutant("small", "small.py", "a + b", "a - b", ("test_small.py::test_other",)))


def test_the_table_starts_with_undetected_faults():
    first, second = MUTANTS[:2]
    results = {
        first.name: {"killed": True, "by": "tests/test_x.py::test_y", "seconds": 3},
        second.name: {"killed": False, "by": "", "seconds": 4},
    }
    lines = mutants.table(results).splitlines()
    assert "2 were tried: 1 were found by a test, 1 were not." in lines[2]
    assert lines[-2] == f"| {second.name} | `{second.file}` | **nothing** | 4 |"
    assert lines[-1] == f"| {first.name} | `{first.file}` | `tests/test_x.py::test_y` | 3 |"
