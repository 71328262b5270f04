"""One kernel launch as a record of names and numbers, and the functions that run it with named tensors."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .finish import finish_kernel
from .geometry import Geometry
from .tiles import Target, Tile, choose_finish

DTYPES = ("float16", "bfloat16", "float32")
WORKSPACE = "workspace"  # the name of the tensor that launches with split sums share
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
    WHOLE: int = 0  # tiles whose sum is not split; 0 if none is split
    SPLIT_TILES: int = 0  # tiles whose sum is split, which follow them
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
    finish: "Launch | None" = None  # the launch that must follow, if sums are split

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
    sums: tuple[int, int] = (0, 0),
    **constants,
) -> Launch:
    """The launch of a kernel, with the one that finishes it if its sums are split.

    Args:
        named: for each parameter, without ``p_``, the name of a tensor, or the name or value of a number. By default, a
            tensor is None, a scale 1 and any other number 0.
        writes: the parameters that are written.
        shapes: of the contiguous parameters; the mean has a row for each position of a sample. A tensor whose name ends
            with "mean" is float32.
        sums: the rows of a tile of dw and of f that are sums over positions.

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
        named = named | {WORKSPACE: WORKSPACE}
    named = {"N": g.N, "scale": 1.0, "z_scale": 1.0} | named
    found = {named[p]: shape for p, shape in shapes.items() if named.get(p)}
    operands = {name: (shape, "float32" if name.endswith("mean") else target.dtype) for name, shape in found.items()}
    products = tuple(named[p] for p in writes if named.get(p))
    flags = Flags(SAMPLE=sample, WIDE=g.wide, PRECISION=target.precision, **flags)
    constants |= {"GEO": g.constants(), "FLAGS": flags, "TILE": tile}
    launch = Launch(kernel, products, grid, _arguments(kernel, named), constants, tile, _options(tile), operands)
    if splits == 1:
        return launch
    last = choose_finish(*sums, tile.BC, splits)
    finish = launch._replace(
        kernel=finish_kernel,
        grid=(flags.SPLIT_TILES, max(sums) // last.rows),
        arguments=_arguments(finish_kernel, named),
        constants=constants | {"TILE": last},
        tile=last,
        options=_options(last),
        operands={},
        workspace=flags.SPLIT_TILES * splits * sum(sums) * tile.BC,
    )
    return launch._replace(workspace=finish.workspace, finish=finish)


def _arguments(kernel: Any, named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a kernel in the order of its parameters, without constants and what another kernel passes."""
    names = {parameter: parameter.removeprefix("p_") for parameter in kernel.arg_names}
    return {
        parameter: named.get(name, None if name != parameter else 0.0)
        for parameter, name in names.items()
        if name != parameter or parameter == "N" or not (name.isupper() or name.startswith("i_"))
    }


def _options(tile: Tile) -> dict[str, int | bool]:
    # Multiply-add fusion is explicit because its default changes in Triton 3.10.
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


class Needs(NamedTuple):
    """What launches that run one after another expect of their tensors."""

    operands: dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of the tensors that must be contiguous
    workspace: int  # elements, of the launch that uses most of it


def needs(launches: Sequence[Launch]) -> Needs:
    """The needs of launches that share their operands and a workspace."""
    operands = {
        name: (shape, getattr(torch, dtype)) for launch in launches for name, (shape, dtype) in launch.operands.items()
    }
    return Needs(operands, max((launch.workspace for launch in launches), default=0))


def in_order(launches: Sequence[Launch]) -> list[Launch]:
    """The launches, each followed by the one that finishes it."""
    return [each for launch in launches for each in (launch, launch.finish) if each is not None]


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


def workspace(needed: Needs, device: torch.device) -> dict[str, Tensor]:
    """The tensor for the partial sums of split launches, by its name; or none.

    It is not kept for the next call: it would be in the memory pool of the call that made it. This may be the pool of a
    CUDA graph, also in the warm-up of ``mode="reduce-overhead"``, which gives the memory to other tensors.
    """
    elements = needed.workspace
    return {WORKSPACE: torch.empty(elements, dtype=torch.float32, device=device)} if elements else {}


def start(launch: Launch, values: dict[str, Any]) -> Any:
    """Start a launch with the tensors and numbers in ``values`` through Triton's JIT; returns the compiled kernel."""
    arguments = {}  # names are replaced by values; numbers and None are kept
    for parameter, value in launch.arguments.items():
        found = tuple(map(values.get, value, value)) if isinstance(value, tuple) else values.get(value, value)
        arguments[parameter] = found
    return launch.kernel[launch.grid](**arguments, **launch.constants, **launch.options)


def run(launch: Launch, values: dict[str, Any], device: torch.device) -> None:
    """Run one launch, and the one that finishes it, on ``device``, which must be the current device.

    Raises:
        ValueError: as :func:`check`.
    """
    needed = needs((launch,))
    check(needed, values)
    values = values | workspace(needed, device)
    for each in in_order((launch,)):
        start(each, values)


@cache
def architecture(device: torch.device) -> tuple[int, int]:
    """The compute capability, such as 90, and the number of processors; those of an H100 for Triton's interpreter."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
