"""Python started in the root of a clone imports the package folder of the clone, which must be complete.

Each test makes a clone and an installation. setup.py installs the package without a compiler, which takes two seconds;
the compiled library of this environment is then copied to where a build would put it.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="the build needs setuptools")

from pyfeedback.backends.extension import loading

ROOT = Path(__file__).parents[2]
BUILT = loading.PACKAGE
FOLDERS = ("pyfeedback", "kernels", "csrc")
FILES = ("setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
# A clean environment: without the editable installation of this one, with the packages of the given folder.
PROGRAM = """
import site, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
for module in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[module]
sys.path.insert(1, sys.argv[1])  # after the current folder
site.addsitedir(sys.argv[1])
import torch, pyfeedback
import pyfeedback.kernels.tiles
print(pyfeedback.__file__)
print(torch.ops.pyfeedback.fa_conv2d)
print(pyfeedback.build_info())
"""

pytestmark = pytest.mark.skipif(not loading.has_cpu(), reason="no compiled library to install")


@pytest.fixture
def clone(tmp_path):
    """The sources as in git, including symbolic links."""
    folder = tmp_path / "clone"
    folder.mkdir()
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def run(folder, *arguments, **environment):
    """Run an interpreter in ``folder``."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


# Root can write to read-only files unless it drops CAP_DAC_OVERRIDE (1). PR_CAPBSET_DROP is 24.
AS_OTHERS = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def install(clone, tmp_path, hook="build_wheel", as_owner=True):
    """Install the clone into a folder of packages, without a compiler."""
    wheel, site = tmp_path / "wheel", tmp_path / "site"
    wheel.mkdir()
    code = f"import sys, build_backend; build_backend.{hook}(sys.argv[1])"
    made = run(clone, *([] if as_owner else ["-c", AS_OTHERS]), "-c", code, wheel, PATH="", CXX="")
    assert made.returncode == 0, made.stderr
    assert "pyfeedback: note: no C++ compiler (c++, g++, clang++ or $CXX) was found at the build" in made.stderr
    shutil.unpack_archive(next(wheel.glob("*.whl")), site, "zip")
    return site


@contextmanager
def read_only(folder):
    """Inside, nothing in the folder can be written."""
    for path in sorted((folder, *folder.rglob("*")), reverse=True):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    try:
        yield
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)  # pytest has to remove it


def add_library(package):
    """Copy into the package what a build with a compiler would add."""
    for name in ("_C.abi3.so", "_build_info.json"):
        shutil.copy(BUILT / name, package)


def test_a_regular_installation_works_in_the_clone_it_was_made_from(clone, tmp_path):
    site = install(clone, tmp_path)
    add_library(site / "pyfeedback")
    assert (clone / "pyfeedback.egg-info").exists()  # also a distribution, and first on sys.path
    result = run(clone, "-c", PROGRAM, site)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(clone))
    assert "pyfeedback.fa_conv2d" in result.stdout
    assert "cpu=True" in result.stdout


def test_an_installation_of_other_sources_is_refused_in_one_line(clone, tmp_path):
    site = install(clone, tmp_path)
    add_library(site / "pyfeedback")
    with open(clone / "csrc" / "cpu" / "chunks.h", "a") as file:
        file.write("// changed\n")
    result = run(clone, "-c", PROGRAM, site)
    assert result.returncode != 0
    assert "ImportError: csrc/cpu/chunks.h has changed since" in result.stderr
    assert run(clone, "-c", PROGRAM, site, PYFEEDBACK_EXTENSION="0").returncode == 0
    assert "cpu=True" in run(tmp_path, "-c", PROGRAM, site).stdout  # elsewhere, the installed package


def test_a_regular_installation_overrides_a_stale_build_of_the_clone(clone, tmp_path):
    site = install(clone, tmp_path)
    add_library(site / "pyfeedback")
    add_library(clone / "pyfeedback")
    record = json.loads((BUILT / "_build_info.json").read_text())
    stale = json.dumps({**record, "sources": {**record["sources"], "tensors.h": "0"}})
    (clone / "pyfeedback" / "_build_info.json").write_text(stale)
    assert "cpu=True" in run(clone, "-c", PROGRAM, site).stdout


def test_an_editable_installation_works_in_its_clone_and_in_other_folders(clone, tmp_path):
    site = install(clone, tmp_path, "build_editable")
    add_library(clone / "pyfeedback")
    for folder in (clone, tmp_path):
        result = run(folder, "-c", PROGRAM, site)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(str(clone))
        assert "cpu=True" in result.stdout
    alone = run(tmp_path, "-c", PROGRAM.replace("pyfeedback.kernels.tiles", "kernels"), site)
    assert "No module named 'kernels'" in alone.stderr


def test_a_source_distribution_of_a_read_only_tree_is_complete(clone, tmp_path):
    for name in ("docs", "examples"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys, build_backend; build_backend.build_sdist(sys.argv[1])"
    with read_only(clone):
        made = run(clone, "-c", AS_OTHERS, "-c", code, tmp_path)
    assert made.returncode == 0, made.stderr
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not (unpacked / "pyfeedback" / "kernels").is_symlink()
    for name in ("docs/pytorch.md", "docs/notebooks/own_rule.ipynb", "docs/two_routes.png", "examples/quickstart.py"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    site = install(unpacked, tmp_path)
    for name in ("kernels/plan.py", "backends/extension/sources.py", "py.typed"):
        assert (site / "pyfeedback" / name).exists(), name
    add_library(site / "pyfeedback")
    assert "cpu=True" in run(unpacked, "-c", PROGRAM, site).stdout


def test_a_read_only_source_tree_installs_and_is_not_modified(clone, tmp_path):
    before = sorted(clone.rglob("*"))
    with read_only(clone):
        site = install(clone, tmp_path, as_owner=False)
    assert sorted(clone.rglob("*")) == before
    assert (site / "pyfeedback" / "kernels" / "plan.py").exists()
