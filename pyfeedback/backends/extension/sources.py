"""Digests of the C++ and CUDA sources: a library loads in a source tree only if it was built from what is there.

setup.py runs this file by its path, where there may be no torch: it imports neither torch nor the package.
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
        if not name.startswith("cuda_emulator/")  # for the tests alone
    }


def changed(then: dict[str, str], now: dict[str, str], cuda: bool) -> str | None:
    """The first source that was changed, added or removed between two :func:`digests`; with ``cuda`` false those of
    the CUDA library do not count.
    """
    names = sorted(then.keys() | now.keys())
    differ = (name for name in names if then.get(name) != now.get(name))
    return next((name for name in differ if cuda or not name.startswith("cuda/")), None)
