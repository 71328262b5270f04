"""Python started in a clone's root imports the clone's own folder, which must be complete there.

Each test makes an installation and a clone of its own. The package is installed by setup.py, without a compiler, which
takes two seconds; the library that this environment has is then put where the build would have put it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="the build needs setuptools")

from pyfeedback import native

ROOT = Path(__file__).parents[1]
BUILT = Path(native.__file__).parent
FOLDERS = ("pyfeedback", "kernels", "csrc")
FILES = ("setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
# A fresh environment: without this one's own editable installation, with the packages of the folder that is given.
PROGRAM = """
import site, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
for module in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[module]
sys.path.insert(1, sys.argv[1])  # behind the current folder
site.addsitedir(sys.argv[1])
import torch, pyfeedback
import pyfeedback.kernels.measured
print(pyfeedback.__file__)
print(torch.ops.pyfeedback.fa_conv2d)
print(pyfeedback.build_info())
"""

pytestmark = pytest.mark.skipif(not native.has_cpu(), reason="no compiled library to install")


@pytest.fixture
def clone(tmp_path):
    """The sources as git has them, symbolic links among them."""
    folder = tmp_path / "clone"
    folder.mkdir()
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def run(folder, *arguments, **environment):
    """An interpreter inside ``folder``."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


# Root may write to what is read-only, until it gives up CAP_DAC_OVERRIDE (1): PR_CAPBSET_DROP is 24.
AS_OTHERS = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def install(clone, tmp_path, hook="build_wheel", as_owner=True):
    """A folder of packages with the clone installed in it, without a compiler."""
    wheel, site = tmp_path / "wheel", tmp_path / "site"
    wheel.mkdir()
    code = f"import sys, build_backend; build_backend.{hook}(sys.argv[1])"
    made = run(clone, *([] if as_owner else ["-c", AS_OTHERS]), "-c", code, wheel, PATH="", CXX="")
    assert made.returncode == 0, made.stderr
    shutil.unpack_archive(next(wheel.glob("*.whl")), site, "zip")
    return site


def add_library(package):
    """What a build with a compiler puts into the package."""
    for name in ("_C.abi3.so", "_build_info.json"):
        shutil.copy(BUILT / name, package)


def test_an_ordinary_installation_serves_the_clone_it_was_made_of(clone, tmp_path):
    site = install(clone, tmp_path)
    add_library(site / "pyfeedback")
    assert (clone / "pyfeedback.egg-info").exists()  # a distribution as well, and the first on the path
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
    assert run(clone, "-c", PROGRAM, site, PYFEEDBACK_NATIVE="0").returncode == 0
    assert "cpu=True" in run(tmp_path, "-c", PROGRAM, site).stdout  # elsewhere it is the installed package


def test_an_ordinary_installation_goes_before_a_stale_build_of_the_clone(clone, tmp_path):
    site = install(clone, tmp_path)
    add_library(site / "pyfeedback")
    add_library(clone / "pyfeedback")
    record = json.loads((BUILT / "_build_info.json").read_text())
    stale = json.dumps({**record, "sources": {**record["sources"], "tensors.h": "0"}})
    (clone / "pyfeedback" / "_build_info.json").write_text(stale)
    assert "cpu=True" in run(clone, "-c", PROGRAM, site).stdout


def test_an_editable_installation_serves_its_clone_and_every_other_folder(clone, tmp_path):
    site = install(clone, tmp_path, "build_editable")
    add_library(clone / "pyfeedback")
    for folder in (clone, tmp_path):
        result = run(folder, "-c", PROGRAM, site)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(str(clone))
        assert "cpu=True" in result.stdout
    alone = run(tmp_path, "-c", PROGRAM.replace("pyfeedback.kernels.measured", "kernels"), site)
    assert "No module named 'kernels'" in alone.stderr


def test_a_source_distribution_is_complete(clone, tmp_path):
    code = "import sys, build_backend; build_backend.build_sdist(sys.argv[1])"
    made = run(clone, "-c", code, tmp_path)
    assert made.returncode == 0, made.stderr
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not (unpacked / "pyfeedback" / "kernels").is_symlink()
    site = install(unpacked, tmp_path)
    for name in ("kernels/rule.py", "sources.py", "py.typed"):
        assert (site / "pyfeedback" / name).exists(), name
    add_library(site / "pyfeedback")
    assert "cpu=True" in run(unpacked, "-c", PROGRAM, site).stdout


def test_a_read_only_source_tree_installs_and_stays_as_it_was(clone, tmp_path):
    for path in sorted((clone, *clone.rglob("*")), reverse=True):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    before = sorted(clone.rglob("*"))
    try:
        site = install(clone, tmp_path, as_owner=False)
    finally:
        for path in (clone, *clone.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)  # pytest removes it
    assert sorted(clone.rglob("*")) == before
    assert (site / "pyfeedback" / "kernels" / "rule.py").exists()
