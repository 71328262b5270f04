"""PEP 517 backend: setuptools, building against the torch that the target environment already has.

An isolated build environment hides the installed torch and would download another one, which may be
another version or another CUDA build. The hooks below make the installed torch importable instead, and ask
for one only where there is none. Without a C++ compiler nothing is compiled and torch is not needed at all.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import sys
import sysconfig
from importlib.metadata import distributions
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

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
    """Where packages of the running interpreter live, in its own search order, an isolating overlay left out."""
    directories = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        directories.append(site.getusersitepackages())
    return [path for path in dict.fromkeys(directories) if os.path.isdir(path)]


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


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    return torch_requirement()


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    return torch_requirement()


def build_wheel(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    expose_target_environment()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    expose_target_environment()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
