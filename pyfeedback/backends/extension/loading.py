"""Loading of the compiled libraries, and information on how they were built.

Loading registers the C++ implementations of the `extension_*` ops, before or after `pyfeedback.ops.schemas` defines
their schemas. If PYFEEDBACK_EXTENSION=0, no library is loaded, and every op uses its Python implementation.

If Python is started in the root of a clone, it imports the folder `pyfeedback` of the clone instead of the installed
package. This folder has no library unless it was built in place (`pip install -e .`). The libraries of the installed
package are then loaded if they were built from the sources of the clone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfeedback.backends.extension import sources
from pyfeedback.core.deprecation import warn_renamed

PACKAGE = Path(__file__).parents[2]
RECORD = "_build_info.json"
CPU_LIBRARY = "_C.abi3.so"
CUDA_LIBRARY = "_C_cuda.abi3.so"


@dataclass(frozen=True)
class BuildInfo:
    """The libraries that were built, and which of them are loaded.

    Attributes:
        version: the version of the package.
        cpu, cuda: whether the library was built and is loaded.
        cuda_architectures: e.g. ("8.0", "9.0+PTX"); empty if CUDA was not built.
        torch_target: the oldest torch whose stable ABI the libraries support.
        built_with_torch: the version of torch they were compiled with; "" if nothing was compiled.
        compiler: the first line of the C++ compiler's --version; "" if nothing was compiled.
        missing: the libraries that are missing and why, in one sentence; "" if none is.
    """

    version: str
    cpu: bool
    cuda: bool
    cuda_architectures: tuple[str, ...]
    torch_target: str
    built_with_torch: str
    compiler: str
    missing: str


def _builds(package: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folder and the record of each build for ``package``: its own and, in a clone, the installed ones.

    A pyfeedback.egg-info that a build left in the current folder is also a distribution, but has no record.
    """
    folders = [package]
    if _is_clone(package):
        installed = importlib.metadata.distributions(name="pyfeedback")
        folders += [Path(str(distribution.locate_file("pyfeedback"))) for distribution in installed]
    for folder in folders:
        if (folder / RECORD).exists():
            yield folder, json.loads((folder / RECORD).read_text())


def _is_clone(package: Path) -> bool:
    return (package.parent / "build_backend.py").exists() and (package.parent / "csrc").exists()


def _unbuilt() -> dict[str, Any]:
    """The record of a source tree that was never built."""
    missing = "this source tree was never built: run `pip install .`"
    return {
        "version": "unbuilt",
        "cpu": False,
        "cuda": False,
        "cuda_architectures": [],
        "torch_target": "2.10",
        "built_with_torch": "",
        "compiler": "",
        "missing_cpu": missing,
        "missing_cuda": missing,
        "sources": {},
    }


def _choose(package: Path, cuda: bool) -> tuple[Path, dict[str, Any]]:
    """The folder and the record of the build to load.

    Raises:
        ImportError: in a clone, no build matches the sources. A kernel with another schema would return wrong values
            without an error.
    """
    builds = list(_builds(package))
    if not builds:
        return package, _unbuilt()
    if not _is_clone(package):
        return builds[0]
    now = sources.digests(package.parent / "csrc")
    for folder, record in builds:
        if not record["cpu"] or sources.changed(record.get("sources", {}), now, cuda and record["cuda"]) is None:
            return folder, record
    folder, record = builds[0]
    changed = sources.changed(record.get("sources", {}), now, cuda and record["cuda"])
    raise ImportError(
        f"csrc/{changed} has changed since {folder / CPU_LIBRARY} was built: build it again with `pip install -e .`, "
        "or set PYFEEDBACK_EXTENSION=0 to do without"
    )


def _load(library: Path) -> bool:
    """Load a library that was built; raise ImportError if it does not load."""
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"{library.name} was built but does not load with torch {torch.__version__}: {error}. "
            "Reinstall pyfeedback, or set PYFEEDBACK_EXTENSION=0 to do without."
        ) from error
    return True


def _load_all() -> BuildInfo:
    disabled = os.environ.get("PYFEEDBACK_EXTENSION") == "0"
    if os.environ.get("PYFEEDBACK_NATIVE") == "0":
        warn_renamed("PYFEEDBACK_NATIVE=0", "PYFEEDBACK_EXTENSION=0")
        disabled = True
    if disabled:
        folder, record = next(_builds(PACKAGE), (PACKAGE, _unbuilt()))
    else:
        folder, record = _choose(PACKAGE, cuda=torch.version.cuda is not None)
    record.pop("sources", None)
    without = {"CPU": record.pop("missing_cpu"), "CUDA": record.pop("missing_cuda")}
    cpu, cuda = record["cpu"], record["cuda"]
    if disabled:
        cpu = cuda = False
        without = dict.fromkeys(without, "PYFEEDBACK_EXTENSION=0")
    if torch.version.cuda is None:
        # Not reported as missing: there are no CUDA tensors, and the symbols of the library cannot be resolved.
        cuda = False
        without["CUDA"] = ""
    record["cpu"] = cpu and _load(folder / CPU_LIBRARY)
    record["cuda"] = cuda and _load(folder / CUDA_LIBRARY)
    record["cuda_architectures"] = tuple(record["cuda_architectures"])
    missing = "; ".join(f"no {device} library: {reason}" for device, reason in without.items() if reason)
    return BuildInfo(**record, missing=missing)


_INFO = _load_all()


def build_info() -> BuildInfo:
    """The libraries that were built and which of them are loaded, determined once at import."""
    return _INFO


def has_cpu() -> bool:
    """Whether the `extension_*` ops have a compiled CPU implementation."""
    return _INFO.cpu


def has_cuda() -> bool:
    """Whether the `extension_*` ops have a compiled CUDA implementation."""
    return _INFO.cuda
