"""Digests of the C++ and CUDA sources: a library is loaded in a source tree only if it was built from these sources.

setup.py runs this file by its path, possibly without torch, so it must import neither torch nor the package.
"""

import hashlib
from pathlib import Path

KINDS = {".cpp", ".h", ".cu", ".cuh"}


def digests(csrc: Path) -> dict[str, str]:
    """A digest of each source that is part of a library, by its path inside the folder ``csrc``."""
    paths = sorted(path for path in csrc.rglob("*") if path.suffix in KINDS)
    relative = {path.relative_to(csrc).as_posix(): path for path in paths}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for name, path in relative.items()
        if not name.startswith("cuda_emulator/")  # only for the tests
    }


def changed(then: dict[str, str], now: dict[str, str], cuda: bool) -> str | None:
    """The first source that was changed, added or removed between two :func:`digests`; the sources of the CUDA library
    are compared only if ``cuda``.
    """
    names = sorted(then.keys() | now.keys())
    differ = (name for name in names if then.get(name) != now.get(name))
    return next((name for name in differ if cuda or not name.startswith("cuda/")), None)
