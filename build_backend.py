"""PEP 517 backend: setuptools, building against the torch that the target environment already has.

An isolated build environment hides the installed torch and would download another one, which may be
another version or another CUDA build. The hooks below make the installed torch importable instead, and ask
for one only where there is none. Without a C++ compiler nothing is compiled and torch is not needed at all.
A source tree that is read-only is copied and built in the copy.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import get_requires_for_build_sdist, prepare_metadata_for_build_editable

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "find_compiler",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
    "torch_requirement",
]

TORCH_MINIMUM = (2, 10)
COMPILERS = ("c++", "g++", "clang++")

ConfigSettings = dict[str, Any] | None


def find_compiler() -> str | None:
    """The C++ compiler command: $CXX as it stands, otherwise the first of COMPILERS on the path, or None."""
    if os.environ.get("CXX"):
        return os.environ["CXX"]
    return next((name for name in COMPILERS if shutil.which(name)), None)


def target_site_directories() -> list[str]:
    """Where packages of the target environment live, in the search order of its interpreter.

    pip builds with the interpreter of that environment, and hides its packages by an overlay, which is left out here.
    uv builds in an environment of its own. It installs into the active one or into .venv, which come last.
    """
    directories = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        directories.append(site.getusersitepackages())
    scheme = "posix_prefix" if os.name == "posix" else "nt"
    for prefix in other_environments():
        bases = {"base": str(prefix), "platbase": str(prefix)}
        directories += [sysconfig.get_path(name, scheme, bases) for name in ("purelib", "platlib")]
    return [path for path in dict.fromkeys(directories) if os.path.isdir(path)]


def other_environments() -> list[Path]:
    """The virtual environments on the path, that of conda, and .venv in the current folder or above it."""
    here = Path.cwd()
    found = [Path(folder).parent for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    found = [prefix for prefix in found if (prefix / "pyvenv.cfg").is_file()]
    if os.environ.get("CONDA_PREFIX"):
        found.append(Path(os.environ["CONDA_PREFIX"]))
    nearby = (folder / ".venv" for folder in (here, *here.parents))
    return found + [prefix for prefix in nearby if (prefix / "pyvenv.cfg").is_file()][:1]


def installed_torch() -> str | None:
    """Version of a torch that the build can use: in the build environment or in the target one; None if too old."""
    for distribution in distributions(name="torch", path=[*sys.path, *target_site_directories()]):
        numbers = re.match(r"(\d+)\.(\d+)", distribution.version)
        if numbers and tuple(map(int, numbers.groups())) >= TORCH_MINIMUM:
            return distribution.version
        return None
    return None


def torch_requirement() -> list[str]:
    """What the build needs beyond setuptools and ninja: nothing, or a torch."""
    if find_compiler() is None or installed_torch():
        return []
    return [f"torch>={'.'.join(map(str, TORCH_MINIMUM))}"]


def expose_target_environment() -> None:
    """Let `import torch` find the installed torch; appended, so that the build environment's own tools win."""
    if importlib.util.find_spec("torch") is None:
        sys.path.extend(path for path in target_site_directories() if path not in sys.path)
        importlib.invalidate_caches()


@contextmanager
def writable_tree() -> Iterator[None]:
    """Inside, the current folder is one that setuptools can write to: a copy of it where it is read-only."""
    here = Path.cwd()
    if os.access(here, os.W_OK):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "pyfeedback")
        made_by_builds = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so")
        shutil.copytree(here, copy, ignore=made_by_builds, copy_function=shutil.copyfile)
        for path in (copy, *copy.rglob("*")):
            if path.is_dir():  # copied with its mode
                path.chmod(path.stat().st_mode | stat.S_IWUSR)
        os.chdir(copy)
        try:
            yield
        finally:
            os.chdir(here)


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    return torch_requirement()


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    return torch_requirement()


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: ConfigSettings = None) -> str:
    with writable_tree():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_sdist(sdist_directory: str, config_settings: ConfigSettings = None) -> str:
    with writable_tree():
        return build_meta.build_sdist(sdist_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    expose_target_environment()
    with writable_tree():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    expose_target_environment()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
