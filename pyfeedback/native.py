"""The compiled libraries: loads what the build made and tells what that was.

Loading registers the C++ implementations of the `native_*` ops; their schemas stand in `pyfeedback.schemas`, and
either may come first. PYFEEDBACK_NATIVE=0 leaves the libraries alone: every op then runs its Python implementation.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent
CPU_LIBRARY = PACKAGE / "_C.abi3.so"
CUDA_LIBRARY = PACKAGE / "_C_cuda.abi3.so"


@dataclass(frozen=True)
class BuildInfo:
    """What was built and what of it is loaded.

    cpu, cuda             the library was built and is loaded
    cuda_architectures    e.g. ("8.0", "9.0+PTX"); empty where CUDA was not built
    torch_target          the oldest torch whose stable ABI the libraries need
    built_with_torch      version of the torch they were compiled against; "" where nothing was compiled
    compiler              first line of the C++ compiler's --version; "" where nothing was compiled
    missing               one sentence on what is not there and why; "" when nothing is
    """

    version: str
    cpu: bool
    cuda: bool
    cuda_architectures: tuple[str, ...]
    torch_target: str
    built_with_torch: str
    compiler: str
    missing: str


def _recorded() -> dict[str, Any]:
    """What the build wrote down; a source tree that was never built says so."""
    record = PACKAGE / "_build_info.json"
    if record.exists():
        contents: dict[str, Any] = json.loads(record.read_text())
        return contents
    unbuilt = "this source tree was never built: run `pip install .`"
    return {
        "version": "unbuilt",
        "cpu": False,
        "cuda": False,
        "cuda_architectures": [],
        "torch_target": "2.10",
        "built_with_torch": "",
        "compiler": "",
        "missing_cpu": unbuilt,
        "missing_cuda": unbuilt,
    }


def _load(library: Path) -> bool:
    """Load one library that the build made; ImportError when it does not load, never less than was built."""
    changed = newer_source(library, PACKAGE.parent / "csrc")
    if changed is not None:  # in a source tree: a kernel of another schema would return wrong values without a word
        raise ImportError(f"{changed} is newer than {library.name}: build it again with `pip install -e .`")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"{library.name} was built but does not load with torch {torch.__version__}: {error}. "
            "Reinstall pyfeedback, or set PYFEEDBACK_NATIVE=0 to do without."
        ) from error
    return True


def newer_source(library: Path, sources: Path) -> Path | None:
    """A C++ or CUDA source that has changed since ``library`` was built, if there is one."""
    built = library.stat().st_mtime
    kinds = {".cpp", ".h", ".cu", ".cuh"}
    apart = {"simt", "cuda"} if library.name == CPU_LIBRARY.name else {"simt"}
    parts = (path for path in sources.rglob("*") if path.suffix in kinds and not apart & set(path.parts))
    return next((path for path in parts if path.stat().st_mtime > built), None)


def _load_all() -> BuildInfo:
    record = _recorded()
    without = {"CPU": record.pop("missing_cpu"), "CUDA": record.pop("missing_cuda")}
    cpu, cuda = record["cpu"], record["cuda"]
    if os.environ.get("PYFEEDBACK_NATIVE") == "0":
        cpu = cuda = False
        without = dict.fromkeys(without, "PYFEEDBACK_NATIVE=0")
    if torch.version.cuda is None:
        # Nothing to miss: tensors on a CUDA device cannot exist, and the library would not find its symbols.
        cuda = False
        without["CUDA"] = ""
    record["cpu"] = cpu and _load(CPU_LIBRARY)
    record["cuda"] = cuda and _load(CUDA_LIBRARY)
    record["cuda_architectures"] = tuple(record["cuda_architectures"])
    missing = "; ".join(f"no {device} library: {reason}" for device, reason in without.items() if reason)
    return BuildInfo(**record, missing=missing)


_INFO = _load_all()


def build_info() -> BuildInfo:
    """What was built and what of it is loaded, decided once at import."""
    return _INFO


def has_cpu() -> bool:
    """Whether the `native_*` ops have a compiled CPU implementation."""
    return _INFO.cpu


def has_cuda() -> bool:
    """Whether the `native_*` ops have a compiled CUDA implementation."""
    return _INFO.cuda
