"""One kernel launch as a record of names and numbers, and the functions that run it with named tensors."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .geometry import Geometry
from .tiles import Target, Tile

DTYPES = ("float16", "bfloat16", "float32")
WORKSPACE = ("workspace", "semaphores")  # the names of tensors that launches with a split sum share
MOST_POSITIONS = 2**30  # positions are counted in int32, and the last block may extend past them


class Flags(NamedTuple):
    """The compile-time constants of a kernel besides geometry and tile; each kernel reads some of them."""

    HAS_A: bool = False
    HAS_U: bool = False
    HAS_F: bool = False
    HAS_DX: bool = False
    HAS_Z: bool = False
    USE_X: bool = False
    USE_FEEDBACK: bool = False
    USE_WEIGHT: bool = False
    USE_TIE: bool = False
    TERM: str = "none"  # the second sum of a pointwise layer's backward
    SYMMETRIC: bool = False  # only the blocks on and below the diagonal are computed, and mirrored
    POINTWISE: bool = False
    U: int = 0  # rows of u and f
    ROWS: int = 0  # tiles that cover the rows
    LEVELS: int = 0  # of the tree that adds the splits
    SAMPLE: int = 1  # rows of the mean
    CENTERED: bool = False  # a step reads one position of many samples
    TAIL: bool = False  # some of these samples do not exist
    WIDE: bool = False  # offsets are int64
    PRECISION: str = "ieee"


class Launch(NamedTuple):
    """One launch. An argument is the name of a tensor or number, a number, or None, or a tuple in a joint launch."""

    kernel: Any
    products: tuple[str, ...]  # names of the tensors that it writes
    grid: tuple[int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: Tile
    options: dict[str, int | bool]  # of Triton
    operands: dict[str, tuple[tuple[int, ...], str]]  # shape and dtype of the tensors that must be contiguous
    workspace: int = 0  # elements, float32
    semaphores: int = 0

    def __str__(self) -> str:
        return f"{self.kernel.__name__.removesuffix('_kernel')}({', '.join(self.products)})"


def make_launch(
    kernel,
    geometry: Geometry,
    target: Target,
    tile: Tile,
    grid: tuple[int, int],
    named: dict[str, Any],
    writes: tuple[str, ...],
    shapes: dict[str, tuple[int, ...]],
    flags: dict[str, Any],
    sums: int = 0,
    **constants,
) -> Launch:
    """The launch of a kernel.

    Args:
        named: for each parameter, without ``p_``, the name of a tensor, or the name or value of a number. By default, a
            tensor is None, a scale 1 and any other number 0.
        writes: the parameters that are written.
        shapes: of the contiguous parameters; the mean has a row for each position of a sample. A tensor whose name ends
            with "mean" is float32.
        sums: the number of elements that each program adds up, if the sum is split.

    Raises:
        ValueError: the kernels do not support the sizes or the dtype.
    """
    g, splits, inputs = geometry, getattr(tile, "splits", 1), geometry.N * geometry.H * geometry.W
    sample = shapes["mean"][0]
    if target.dtype not in DTYPES:
        raise ValueError(f"dtype is {target.dtype}, expected float16, bfloat16 or float32")
    if max(inputs, g.positions) >= MOST_POSITIONS:
        raise ValueError(f"input has {g.N} x {g.H} x {g.W} positions, expected fewer than 2^30")
    if sample != 1 and (sample < 1 or sample % (g.H * g.W) or inputs % sample):
        expected = f"one for each position of a sample (a multiple of {g.H * g.W} that divides {inputs})"
        raise ValueError(f"mean has {sample} rows, expected {expected}")
    if splits > 1:
        named = named | dict(zip(WORKSPACE, WORKSPACE, strict=True))
    defaults = {"N": g.N, "scale": 1.0, "z_scale": 1.0}
    arguments = {}  # in the order of the kernel's parameters, without constants and those of nested calls
    for parameter in kernel.arg_names:
        name = parameter.removeprefix("p_")
        if name != parameter:
            arguments[parameter] = named.get(name)
        elif name in defaults or not (name.isupper() or name.startswith("i_")):
            arguments[parameter] = named.get(name, defaults.get(name, 0.0))
    found = {named[p]: shape for p, shape in shapes.items() if named.get(p)}
    operands = {name: (shape, "float32" if name.endswith("mean") else target.dtype) for name, shape in found.items()}
    products = tuple(named[p] for p in writes if named.get(p))
    levels, programs = (splits - 1).bit_length(), grid[0] * grid[1] if splits > 1 else 0
    constants |= {"GEO": g.constants(), "TILE": tile}
    constants["FLAGS"] = Flags(LEVELS=levels, SAMPLE=sample, WIDE=g.wide, PRECISION=target.precision, **flags)
    # Multiply-add fusion is explicit because its default changes in Triton 3.10.
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return Launch(kernel, products, grid, arguments, constants, tile, options, operands, programs * sums, programs)


class Needs(NamedTuple):
    """What launches that run one after another expect of their tensors."""

    operands: dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of the tensors that must be contiguous
    workspace: int  # elements, of the launch that uses most of it
    semaphores: int


def needs(launches: Sequence[Launch]) -> Needs:
    """The needs of launches that share their operands, a workspace and semaphores."""
    operands = {
        name: (shape, getattr(torch, dtype)) for launch in launches for name, (shape, dtype) in launch.operands.items()
    }
    workspace = max((launch.workspace for launch in launches), default=0)
    return Needs(operands, workspace, max((launch.semaphores for launch in launches), default=0))


def check(needed: Needs, values: dict[str, Any]) -> None:
    """Check the operands among ``values``.

    Raises:
        ValueError: an operand does not have the shape, dtype and layout that the kernels read.
    """
    for name, (shape, dtype) in needed.operands.items():
        t = values[name]
        if t.shape != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {shape}")
        if t.dtype is not dtype:
            raise ValueError(f"{name} is {t.dtype}, expected {dtype}")
        if not t.is_contiguous():
            raise ValueError(f"{name} has strides {t.stride()}, expected channels innermost and no gaps")


def workspace(needed: Needs, device: torch.device) -> tuple[Tensor, ...]:
    """The tensors of WORKSPACE, in which split-K reductions keep partial sums and count arrivals; or none."""
    if not needed.semaphores:
        return ()
    partial_sums = torch.empty(needed.workspace, dtype=torch.float32, device=device)
    return partial_sums, semaphores(needed.semaphores, device)


def start(launch: Launch, values: dict[str, Any]) -> Any:
    """Start a launch with the tensors and numbers in ``values`` through Triton's JIT; returns the compiled kernel."""
    arguments = {}  # names are replaced by values; numbers and None are kept
    for parameter, value in launch.arguments.items():
        found = tuple(map(values.get, value, value)) if isinstance(value, tuple) else values.get(value, value)
        arguments[parameter] = found
    return launch.kernel[launch.grid](**arguments, **launch.constants, **launch.options)


def run(launch: Launch, values: dict[str, Any], device: torch.device) -> None:
    """Run one launch on ``device``, which must be the current device.

    Raises:
        ValueError: as :func:`check`.
    """
    needed = needs((launch,))
    check(needed, values)
    start(launch, values | dict(zip(WORKSPACE, workspace(needed, device), strict=False)))


@cache
def architecture(device: torch.device) -> tuple[int, int]:
    """The compute capability, such as 90, and the number of processors; those of an H100 for Triton's interpreter."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def semaphores(count: int, device: torch.device) -> Tensor:
    """Counters that are zero before and after each launch, so that the launches of one layer share them.

    They are not kept for the next call. A tensor that is kept would be in the memory pool of the call that made it.
    This may be the pool of a CUDA graph, also in the warm-up of ``mode="reduce-overhead"``, which is not a capture. The
    graph then gives the memory to other tensors; with counters that are not zero, sums are wrong.
    """
    return torch.zeros(count, dtype=torch.int32, device=device)
