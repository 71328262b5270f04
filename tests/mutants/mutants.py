"""Mutation testing: apply each fault of `mutations/` to a copy of the code and run its tests. `make mutants`.

The working tree is not modified: the copy in `.cache/mutants` has its own environment on top of the current packages.
Results are cached there. A fault is tried again only if its file, its tests or the fault itself changed, so an
interrupted run resumes. First, the tests of all faults must pass on the unmodified code. The table of the results is
mutants.md, beside the copy.

    python tests/mutants/mutants.py --only "philox rounds"       # a single fault
    python tests/mutants/mutants.py --minutes 20                 # as many faults as fit in the time
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LISTS = sorted((Path(__file__).parent / "mutations").glob("*.txt"))
LONGEST = 300  # time limit of a test command in seconds
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")
FAILED = re.compile(r"^(?:FAILED|ERROR) ([^\s\[]+)", re.MULTILINE)  # without the parametrization


class Mutant(NamedTuple):
    """One fault: a text that occurs once in a file, its replacement, and the tests that should detect it."""

    name: str
    file: str
    text: str
    becomes: str
    tests: tuple[str, ...]


def read_list(text: str) -> list[Mutant]:
    """Parse a list of faults; blank lines separate them, and lines that begin with "#" are comments.

    A fault is a name, a file, the text to replace behind "- ", its replacement behind "+ ", and the narrowest tests
    that should fail, as pytest names them: a file, a class or a function, seldom with parameters. A change that only
    affects the speed is not a fault.
    """
    found = []
    for block in re.split(r"\n{2,}", text):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if lines:
            name, file, *rest = lines
            old, new = ("\n".join(line[2:] for line in rest if line[:1] == sign) for sign in "-+")
            found.append(Mutant(name, file, old, new, tuple(line for line in rest if line[:1] not in "-+")))
    return found


MUTANTS = [mutant for path in LISTS for mutant in read_list(path.read_text())]


class Copy:
    """A copy of the repository with a separate environment."""

    def __init__(self, work: Path):
        self.root, self.python = work / "code", work / "venv" / "bin" / "python"
        self.built = work / "built"  # a digest of the sources of the copy's library

    def refresh(self) -> None:
        """Update the files of the copy; unchanged files keep their modification time."""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        wanted = {name for name in names if name and ((ROOT / name).is_file() or (ROOT / name).is_symlink())}
        for path in [p for p in self.root.rglob("*") if p.suffix in SOURCES]:
            if str(path.relative_to(self.root)) not in wanted:
                path.unlink()
        for name in wanted:
            here, there = ROOT / name, self.root / name
            there.parent.mkdir(parents=True, exist_ok=True)
            if here.is_symlink():
                there.unlink(missing_ok=True)
                there.symlink_to(os.readlink(here))
            elif not there.exists() or there.read_bytes() != here.read_bytes():
                shutil.copy(here, there)
        if not self.python.exists():
            venv.create(self.python.parents[1], with_pip=False)
            packages = [path for path in (*sys.path, *site.getsitepackages()) if Path(path).name == "site-packages"]
            (folder,) = self.python.parents[1].glob("lib/python*/site-packages")
            (folder / "base.pth").write_text("\n".join(dict.fromkeys(packages)) + "\n")

    def build(self) -> None:
        """Compile the sources of the copy unless the library is up to date."""
        names = ["setup.py", "build_backend.py", "pyproject.toml"]
        sources = [
            p for p in (self.root / "csrc").rglob("*") if p.is_file() and not {"cuda", "cuda_emulator"} & set(p.parts)
        ]
        digest = digest_of(*sorted(sources), *(self.root / name for name in names))
        if self.built.exists() and self.built.read_text() == digest:
            return
        self.built.unlink(missing_ok=True)
        install = [self.python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
        path = os.pathsep.join([str(self.python.parent), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        done = self.run(install, PATH=path, PYFEEDBACK_CUDA="0")
        if done.returncode:
            raise SystemExit(f"the copy does not build: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        self.built.write_text(digest)

    def test(self, tests: tuple[str, ...], *options: str, longest: float = LONGEST) -> tuple[int, list[str]]:
        """The exit status of pytest (-1 after a timeout), and the tests that failed."""
        command = [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests]
        try:
            done = self.run(command, timeout=longest)
        except subprocess.TimeoutExpired:
            return -1, []
        return done.returncode, FAILED.findall(done.stdout)

    def run(self, command: list, timeout: float | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy."""
        variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        variables |= {"OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            command, cwd=self.root, env=variables, capture_output=True, text=True, timeout=timeout, check=False
        )

    @contextlib.contextmanager
    def holding(self, mutant: Mutant) -> Iterator[None]:
        """A context manager in which the copy has the fault."""
        path = self.root / mutant.file
        before, times = path.read_text(), path.stat()
        path.write_text(mutated(mutant, before))
        try:
            yield
        finally:
            path.write_text(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def mutated(mutant: Mutant, source: str) -> str:
    """The source with the fault.

    Raises:
        ValueError: if the text does not occur exactly once.
    """
    found = source.count(mutant.text)
    if found != 1:
        raise ValueError(f"{mutant.name}: {mutant.text!r} occurs {found} times in {mutant.file}, expected once")
    return source.replace(mutant.text, mutant.becomes)


def digest_of(*paths: Path, extra: str = "") -> str:
    """A digest of the names and contents."""
    found = hashlib.sha256(extra.encode())
    for path in paths:
        found.update(str(path).encode() + path.read_bytes())
    return found.hexdigest()


def key_of(mutant: Mutant) -> str:
    """The cache key of a result."""
    tests = {ROOT / test.partition("::")[0] for test in mutant.tests}
    return digest_of(ROOT / mutant.file, *sorted(tests), extra=repr(mutant))


def judge(copy: Copy, mutant: Mutant) -> dict[str, Any]:
    """Whether a test detects the fault, and which one."""
    start = time.monotonic()
    with copy.holding(mutant):
        copy.build()
        status, failed = copy.test(mutant.tests, "-x")
    by = failed[0] if failed else {-1: "no end", 1: "pytest"}.get(status, f"exit status {status}")
    if status in (4, 5):  # no such test
        raise SystemExit(f"{mutant.name}: pytest finds nothing to run in {', '.join(mutant.tests)}")
    return {"killed": status != 0, "by": by if status else "", "seconds": round(time.monotonic() - start)}


def check_tests(copy: Copy, mutants: list[Mutant]) -> None:
    """Raise SystemExit if a test fails on the unmodified code."""
    tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    whole = {test for test in tests if "::" not in test}
    tests = tuple(t for t in tests if t in whole or not any(t.startswith(f"{w}::") for w in whole))
    print(f"the tests of {len(mutants)} faults, on the unmodified code", flush=True)
    status, failed = copy.test(tests, longest=3600)
    if status:
        raise SystemExit(f"they must pass without a fault; failed: {', '.join(failed) or f'exit status {status}'}")


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown, undetected faults first."""
    rows = [(mutant, results[mutant.name]) for mutant in MUTANTS if mutant.name in results]
    killed = sum(result["killed"] for _, result in rows)
    lines = [
        "# Faults that the tests find",
        "",
        f"Of {len(MUTANTS)} small faults put into a copy of the code one after the other (`make mutants`, "
        f"`tests/mutants/mutations/`), {len(rows)} were tried: {killed} were found by a test, "
        f"{len(rows) - killed} were not.",
        "",
        "| fault | file | found by | seconds |",
        "|---|---|---|---|",
    ]
    for mutant, result in sorted(rows, key=lambda row: row[1]["killed"]):
        by = f"`{result['by']}`" if result["killed"] else "**nothing**"
        lines.append(f"| {mutant.name} | `{mutant.file}` | {by} | {result['seconds']} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a fault was not detected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults by name")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further fault after this time")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".cache" / "mutants", help="folder of the copy and the results"
    )
    parser.add_argument("--again", action="store_true", help="ignore cached results")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if options.only is None or mutant.name in options.only]
    if options.only and len(chosen) != len(options.only):
        parser.error(f"no such fault: {', '.join(set(options.only) - {mutant.name for mutant in chosen})}")
    for mutant in MUTANTS:
        mutated(mutant, (ROOT / mutant.file).read_text())
    end = time.monotonic() + 60 * options.minutes
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "results.json"
    known = json.loads(kept.read_text()) if kept.exists() and not options.again else {}
    results = {m.name: known[m.name] for m in MUTANTS if known.get(m.name, {}).get("key") == key_of(m)}
    left = [mutant for mutant in chosen if mutant.name not in results]
    if left:
        copy = Copy(options.work)
        copy.refresh()
        copy.build()
        check_tests(copy, left)
    for number, mutant in enumerate(left, 1):
        if time.monotonic() > end:
            print(f"{len(left) - number + 1} remain", flush=True)
            break
        results[mutant.name] = {"key": key_of(mutant), **judge(copy, mutant)}
        kept.write_text(json.dumps(results, indent=1))
        outcome = results[mutant.name]
        found = f"found by {outcome['by']}" if outcome["killed"] else "NOT FOUND"
        print(f"{number}/{len(left)} {mutant.name}: {found} ({outcome['seconds']} s)", flush=True)
    (options.work / "mutants.md").write_text(table(results))
    return int(not all(results[mutant.name]["killed"] for mutant in chosen if mutant.name in results))


if __name__ == "__main__":
    sys.exit(main())
