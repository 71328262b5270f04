"""What the launchers share: the device's facts, and the checks of what the kernels read."""

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .geometry import Geometry
from .tiles import DgradTile, SingleTile, WgradTile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_POSITIONS = 2**30  # positions are counted in int32, and the last block may run past them

_arrivals: dict[tuple[torch.device, int], Tensor] = {}


@cache
def architecture(device: torch.device) -> tuple[int, int]:
    """(compute capability such as 90, number of processors); for Triton's interpreter, those of an H100."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """How products are multiplied; for 16-bit operands both words mean the same."""
    return "tf32" if tf32 and dtype is torch.float32 else "ieee"


def options(tile: DgradTile | SingleTile | WgradTile) -> dict[str, int | bool]:
    """Launch options; multiply-add fusion is named since Triton is about to change its default (3.10)."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


class Plan(NamedTuple):
    """One launch: its grid, and the arguments of the kernel by name."""

    grid: tuple[int, int]
    arguments: dict[str, Any]
    constants: dict[str, int | bool | str]
    tile: DgradTile | SingleTile | WgradTile

    def launch(self, kernel, device: torch.device) -> None:
        """Launch it on the device, since Triton launches on the current one."""
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[self.grid](**self.arguments, **self.constants, **options(self.tile))


def wide(geometry: Geometry) -> bool:
    """True where offsets need int64."""
    return geometry.largest >= 2**31


def require(geometry: Geometry, **operands: Tensor | None) -> None:
    """ValueError that names the operand which the kernels cannot read."""
    sizes = {
        "x": (geometry.N, geometry.H, geometry.W, geometry.C),
        "a": (geometry.N, geometry.P, geometry.Q, geometry.K),
    }
    given = {name: t for name, t in operands.items() if t is not None}
    dtype = next(iter(given.values())).dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected float16, bfloat16 or float32")
    if max(geometry.N * geometry.H * geometry.W, geometry.positions) >= MOST_POSITIONS:
        raise ValueError(f"input has {geometry.N} x {geometry.H} x {geometry.W} positions, expected fewer than 2^30")
    for name, t in given.items():
        expected = sizes["x" if name in ("x", "dx", "z") else "a"]
        if name == "u":
            expected = (*expected[:3], t.shape[-1])
        if tuple(t.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {expected}")
        if t.dtype is not dtype:
            raise ValueError(f"{name} is {t.dtype}, expected {dtype}")
        if not t.is_contiguous():
            raise ValueError(f"{name} has strides {t.stride()}, expected channels innermost and no gaps")


def sample_size(geometry: Geometry, mean: Tensor | None) -> int:
    """The positions of one sample, for each of which ``mean`` has a row; 1 where there is no mean."""
    if mean is None:
        return 1
    rows, channels = mean.shape
    place = geometry.H * geometry.W
    if channels != geometry.C or rows == 0 or rows % place or geometry.N * place % rows:
        raise ValueError(
            f"mean has shape {tuple(mean.shape)}, expected a row for each position of a sample (a multiple of {place} "
            f"that divides {geometry.N * place}) and {geometry.C} columns"
        )
    if mean.dtype is not torch.float32 or not mean.is_contiguous():
        raise ValueError(f"mean is {mean.dtype} with strides {mean.stride()}, expected float32 without gaps")
    return rows


def arrivals(count: int, device: torch.device) -> Tensor:
    """Counters at zero, which every launch leaves at zero; launches of one stream follow one another and share them."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        # Memory of the graph, zeroed by the graph: neither may outlive it.
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    found = _arrivals.get(key)
    if found is None or found.numel() < count:
        found = _arrivals[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return found
