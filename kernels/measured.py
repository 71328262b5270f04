"""Where the kernels were measured faster than the composition: what is taken without being asked for.

One file for each device, `measured/<device name>.json`, the path of each layer, "joined" or "apart", written by
`benchmarks/choose_kernels.py` from the results of `benchmarks/gpu_check.sh`. A device without a file, or a layer that
is not in it, gets PyTorch's own kernels.
"""

import json
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "measured"


def key(problem, form: str, dtype: torch.dtype) -> str:
    """The layer by what its time depends on: sizes, how the rule's terms are computed, dtype.

    Args:
        problem: a named tuple with positions, in_channels, out_channels, taps.
    """
    sizes = f"{problem.in_channels}-{problem.out_channels} taps {problem.taps} positions {problem.positions}"
    return f"{sizes} {form} {str(dtype).removeprefix('torch.')}"


def devices() -> list[str]:
    """The devices that have a file."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def load(device_name: str) -> dict[str, str]:
    """The faster path of each layer that the kernels are faster on, by its key; none for an unknown device."""
    path = FOLDER / f"{device_name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def device_name(device: torch.device) -> str:
    """What the vendor calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
