"""What :func:`pyfeedback.tune` has measured: the fastest backward of a layer, for each device.

Each device has a file ``<fingerprint>.json`` in :func:`folder`. Its fingerprint covers everything that the times depend
on besides the layer: the device, the versions of torch and Triton, and the code of the backends. A file is read once in
a process. A file that is damaged, or of another fingerprint, counts as absent.
"""

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.call import Mask
from pyfeedback.core.coefficients import COEFFICIENTS, Coefficients
from pyfeedback.core.geometry import Geometry
from pyfeedback.core.values import check_choice

VARIABLE = "PYFEEDBACK_TUNE"
MODES = ("cached", "off")

_fp32_precision = torch._C._get_fp32_precision_getter


class Choice(NamedTuple):
    """A backend of a layer, and the algorithm for its data terms."""

    backend: str
    algorithm: Algorithm

    def __str__(self) -> str:
        data = "" if self.algorithm is Algorithm.NONE else f", {self.algorithm.value}"
        return f"{self.backend}{data}"


class Signature(NamedTuple):
    """Everything that the time of a layer's backward on one device depends on."""

    geometry: Geometry
    input: tuple[int, ...]
    weight: tuple[int, ...]
    dtype: torch.dtype
    layouts: tuple[str, str]  # of input and weight
    terms: tuple[str, ...]  # coefficients that are not 0, and options that are set
    samples: int
    needed: tuple[bool, ...]  # the gradients of input, weight and feedback
    response_saved: bool
    precision: str

    def __str__(self) -> str:
        """The key of the layer in a file."""
        geometry = " ".join(f"{name}={value}" for name, value in self.geometry._asdict().items())
        parts = (
            type(self.geometry).__name__, geometry, "x".join(map(str, self.input)), "x".join(map(str, self.weight)),
            str(self.dtype).removeprefix("torch."), "/".join(self.layouts), "+".join(self.terms) or "none",
            f"samples={self.samples}", "".join("01"[each] for each in self.needed),
            "saved" if self.response_saved else "computed", self.precision,
        )  # fmt: skip
        return " | ".join(part for part in parts if part)


def signature_of(
    geometry: Geometry, input: Tensor, weight: Tensor, rule: Coefficients, mask: Mask, response_saved: bool
) -> Signature:
    """The signature of a call of :func:`pyfeedback.backends.dispatch.plan`."""
    terms = [name for name in (*COEFFICIENTS, "center", "normalize") if getattr(rule, name)]
    saved = response_saved and mask[2] and bool(rule.amp or rule.null)  # by a rule that reads it
    return Signature(
        geometry, tuple(input.shape), tuple(weight.shape), input.dtype, (_layout(input), _layout(weight)),
        tuple(terms) if mask[2] else (), rule.samples, tuple(mask[:3]), saved, _precision(input),
    )  # fmt: skip


def _precision(input: Tensor) -> str:
    """``fp32_precision`` of torch.backends, by its getter: the attributes take a tenth of the time of a tiny layer."""
    if input.is_cpu:
        return _fp32_precision("mkldnn", "matmul")
    return f"{_fp32_precision('cuda', 'matmul')}/{_fp32_precision('cuda', 'conv')}" if input.is_cuda else ""


def _layout(t: Tensor) -> str:
    if t.is_contiguous():
        return "contiguous"
    return "channels_last" if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) else "strided"


def fingerprint(device: torch.device) -> dict[str, str]:
    """What identifies the device and the software."""
    found = {"torch": torch.__version__, "triton": _triton(), "code": _code()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": str(properties.multi_processor_count),
            "cuda": str(torch.version.cuda or torch.version.hip),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    else:
        capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
        found |= {"device": device.type, "machine": platform.machine(), "capability": capability}
        found["threads"] = str(torch.get_num_threads())
    return found


def _triton() -> str:
    """The version of Triton; empty without it."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


@cache
def _code() -> str:
    """A hash of the backends, the Triton kernels and the compiled library."""
    package = Path(__file__).parents[1]
    found = (path for pattern in ("backends/**/*.py", "kernels/*.py", "_C*") for path in package.glob(pattern))
    files = sorted(path for path in found if path.is_file())
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def folder() -> Path:
    """The folder of the files: PYFEEDBACK_CACHE, or ``pyfeedback`` in the user's cache."""
    chosen = os.environ.get("PYFEEDBACK_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyfeedback"


def path_of(device: torch.device) -> Path:
    """The file of a device."""
    identity = fingerprint(device)
    name = "".join(c if c.isalnum() else "-" for c in identity["device"])
    return folder() / f"{name}-{sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]}.json"


def read(device: torch.device) -> dict[str, Choice]:
    """The choices in the file of a device, by the text of their signature; none if it has no valid file."""
    try:
        content = json.loads(path_of(device).read_text())
        if content["fingerprint"] != fingerprint(device):
            return {}
        return {key: Choice(name, Algorithm(algorithm)) for key, (name, algorithm) in content["layers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(device: torch.device, found: dict[str, Choice]) -> Path:
    """Add choices to the file of a device. Other processes may do so at the same time; readers see a whole file."""
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        layers = {key: (choice.backend, choice.algorithm.value) for key, choice in (read(device) | found).items()}
        content = {"fingerprint": fingerprint(device), "layers": dict(sorted(layers.items()))}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    forget()
    return path


@contextmanager
def _locked(path: Path):
    """Hold a lock between processes."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        fcntl = None  # type: ignore[assignment]
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Table(dict[str, Choice]):
    """The choices for one device, by the text of their signature."""

    def find(self, signature: Signature) -> Choice | None:
        """The choice for a layer; None if it was not measured."""
        return self.get(str(signature))


class _Recorder(Table):
    """A table that also collects the signatures it is asked for."""

    def __init__(self, table: Table):
        super().__init__(table)
        self.signatures: dict[Signature, None] = {}

    def __bool__(self) -> bool:
        return True

    def find(self, signature: Signature) -> Choice | None:
        self.signatures[signature] = None
        return super().find(signature)


class _Tables(dict[torch.device, Table]):
    """The tables of the devices, read when they are first needed."""

    def __missing__(self, device: torch.device) -> Table:
        found = self[device] = Table(read(device) if mode() == "cached" else {})
        return found


tables = _Tables()
_found: dict[tuple, Choice | None] = {}
generation = 0  # changes with everything that decides how a layer is computed, besides the layer itself


def mode() -> str:
    """The value of PYFEEDBACK_TUNE: "cached" to use what was measured, "off" to ignore it."""
    found = os.environ.get(VARIABLE, MODES[0])
    check_choice(VARIABLE, found, MODES)
    return found


def decide_again() -> None:
    """Let every layer decide again how it is computed."""
    global generation
    generation += 1


def forget() -> None:
    """Read the files again when they are next needed."""
    decide_again()
    tables.clear()
    _found.clear()


@contextmanager
def recorded(device: torch.device) -> Iterator[dict[Signature, None]]:
    """Collect the signature of each layer that is called on a device inside the block, in their order."""
    recorder = _Recorder(tables[device])
    forget()
    tables[device] = recorder
    try:
        yield recorder.signatures
    finally:
        forget()


def find(
    geometry: Geometry, input: Tensor, weight: Tensor, rule: Coefficients, mask: Mask, response_saved: bool
) -> Choice | None:
    """The choice for a call of a layer; None if it was not measured."""
    signature = signature_of(geometry, input, weight, rule, mask, response_saved)
    key = (input.device, signature)
    try:
        return _found[key]
    except KeyError:
        found = _found[key] = tables[input.device].find(signature)
        return found
    except TypeError:  # symbolic sizes have no hash
        return None


def find_unsaved(geometry: Geometry, input: Tensor, weight: Tensor, rule: Coefficients, mask: Mask) -> Choice | None:
    """The choice for the same layer with a saved response. It is not a call, so ``recorded`` does not collect it."""
    return tables[input.device].get(str(signature_of(geometry, input, weight, rule, mask, True)))
