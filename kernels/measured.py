"""The layers for which the kernels were measured to be faster; the backend "auto" uses them only for these.

Each device has a file `measured/<device name>.json` with the faster path, "fused" or "unfused", of each layer.
`benchmarks/choose_kernels.py` writes it from the results of `benchmarks/gpu_check.sh`. On a device without a file, and
for a layer that is not in the file, PyTorch's own kernels are used.
"""

import json
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "measured"


def key(sizes, algorithm: str, dtype: torch.dtype) -> str:
    """The key of a layer: everything that its time depends on (sizes, the algorithm of the data terms, dtype).

    Args:
        sizes: a named tuple with positions, in_channels, out_channels, taps.
    """
    layer = f"{sizes.in_channels}-{sizes.out_channels} taps {sizes.taps} positions {sizes.positions}"
    return f"{layer} {algorithm} {str(dtype).removeprefix('torch.')}"


def devices() -> list[str]:
    """The devices with a file."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def load(device_name: str) -> dict[str, str]:
    """The faster path, "fused" or "unfused", of each key in the file of the device; empty without a file."""
    path = FOLDER / f"{device_name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def device_name(device: torch.device) -> str:
    """The vendor's name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
