"""Tile choices: pure functions of a problem and an architecture.

Nothing here was measured. Block sizes are the largest that compile without spills (benchmarks/codegen.py checks it),
split counts fill the processors once.
"""

from dataclasses import dataclass

from .geometry import Geometry

RESIDENT = 2  # programs of a joint launch for each processor
MOST_WAVES = 4  # of small blocks of dx: a layer with more fills the processors by itself
FEWEST_BLOCKS = 4  # of positions per split, so that the pipeline fills


@dataclass(frozen=True)
class WgradTile:
    """BK and BU rows of the two operands, BC channels of one tap, BP positions per step; splits of the positions."""

    BK: int
    BU: int
    BC: int
    BP: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DgradTile:
    """BM input positions, BC channels, BK output channels per step."""

    BM: int
    BC: int
    BK: int
    warps: int
    stages: int


@dataclass(frozen=True)
class SingleTile:
    """BK rows that hold every output channel, BC input channels, BP positions per step; splits of the positions."""

    BK: int
    BC: int
    BP: int
    splits: int
    warps: int
    stages: int


def choose_wgrad(
    geometry: Geometry,
    rows: tuple[int, int],
    itemsize: int,
    capability: int,
    processors: int,
    symmetric: bool = False,
    small: bool = False,
    means: int = 0,
) -> WgradTile:
    """``rows`` are the channels of the operands a and u, 0 where one is absent; ``capability`` is 80, 90, ...;
    ``symmetric`` where half of the blocks are computed; ``small`` for blocks that a joint launch takes; ``means`` is
    the number of operands of f that are centred while they are loaded, x or x and u."""
    dual = 0 not in rows
    if itemsize == 4:
        # Without wgmma on float32 (K-major operands only) and with FMA in full precision: small blocks.
        most, columns, depth, stages = 64, 64, 16, 3
    elif capability >= 90:
        most, columns, depth, stages = 128, 128, 64, 3 if dual else 4
        if means:
            # Each block of a mean, in float32, takes twice the shared memory of the block that it centres.
            stages = 4 - means
    else:
        # Dual 128x128 spills on sm_80, and so does one whose operands are both centred; so do steps of 32 positions
        # where the epilogue is long (Triton 3.6).
        most = columns = 64 if dual or means == 2 else 128
        depth, stages = 64, 3
    if small:
        most, columns, stages = 64, 64, 3
    if means and itemsize == 4:
        columns = 32  # 64 spill on sm_90
        most = columns if symmetric else most
    smallest = 64 if capability >= 90 and itemsize == 2 else 16
    bk, bu = (_block(r, smallest, most) if r else 16 for r in rows)
    bc = _block(geometry.C, 16, columns)
    warps = 8 if max(bk if rows[0] else 0, bu if rows[1] else 0) * bc >= 128 * 128 else 4
    tiles = wgrad_tiles(geometry, rows, (bk, bu, bc), symmetric)
    blocks = -(-geometry.positions // depth)
    splits = max(min(processors // tiles, blocks // FEWEST_BLOCKS), 1)
    return WgradTile(bk, bu, bc, depth, splits, warps, stages)


def wgrad_tiles(geometry: Geometry, rows: tuple[int, int], blocks: tuple[int, int, int], symmetric: bool) -> int:
    """Output tiles of one launch, for ``rows`` channels of a and u in blocks BK, BU, BC."""
    down = row_tiles(rows, blocks[:2])
    return down * (down + 1) // 2 if symmetric else down * geometry.R * geometry.S * -(-geometry.C // blocks[2])


def row_tiles(rows: tuple[int, int], blocks: tuple[int, int]) -> int:
    """Tiles that cover the rows of both operands, each in its own blocks."""
    return max(-(-r // b) for r, b in zip(rows, blocks, strict=True) if r)


def choose_dgrad(
    geometry: Geometry, dual: bool, itemsize: int, capability: int, small: bool = False
) -> DgradTile:  # fmt: skip
    """``dual`` where both products are computed; ``capability`` is 80, 90, ...; ``small`` as in choose_wgrad."""
    if itemsize == 4:
        most, columns, depth, stages = 64, 64, 16, 3
    elif capability >= 90:
        most, columns, depth, stages = 128, 128, 64, 3 if dual else 4
    else:
        # 128x128 spills on sm_80, dual or not.
        most, columns, depth, stages = (64 if dual else 128), 64, 32, 3
    if small:
        most, columns, stages = 64, 64, 3
    bc = _block(geometry.C, 16, columns)
    bk = _block(geometry.K, 16, depth)
    return DgradTile(most, bc, bk, 8 if most * bc >= 128 * 128 else 4, stages)


def choose_joint(
    geometry: Geometry,
    rows: tuple[int, int],
    dual: bool,
    itemsize: int,
    capability: int,
    processors: int,
    means: int = 0,
) -> tuple[WgradTile, DgradTile] | None:
    """Both tiles of a joint launch, of as many warps and stages; None where the layer is not small."""
    if MOST_WAVES * processors < -(-geometry.N * geometry.H * geometry.W // 64) * -(-geometry.C // 64):
        return None
    return (
        choose_wgrad(geometry, rows, itemsize, capability, processors, small=True, means=means),
        choose_dgrad(geometry, dual, itemsize, capability, small=True),
    )


def choose_single(
    geometry: Geometry, term: str, itemsize: int, capability: int, processors: int, centered: bool = False
) -> SingleTile | None:
    """The single pass of a pointwise layer, ``term`` as in ``single_kernel``; None where its sums do not fit.

    ``centered`` where x is centred while it is loaded.
    """
    c, k = _block(geometry.C, 64, 512), _block(geometry.K, 64, 512)
    hopper = capability >= 90
    # The largest blocks of dW without spills; z, x'x and a mean take registers besides.
    if term == "moment":
        bc = c if c <= (128 if hopper else 64) and k <= (256 if hopper or not centered else 128) else 0
    elif term == "projection":
        bc = 64 * 128 // k if hopper or k == 64 else 0
    else:
        bc = (64 * 256 if hopper else 64 * 128) // k
    bc = min(bc, c, 128 if centered else 512)
    if itemsize == 4 or bc < 64 or not geometry.pointwise or max(geometry.C, geometry.K) > 512:
        return None
    small = k * bc == 64 * 64
    warps, stages = (4 if small else 8), (3 if small or not hopper else 2)
    columns, blocks = -(-geometry.C // bc), -(-geometry.positions // 64)
    # Two programs of four warps, or one of eight, for each processor.
    splits = max(min(processors * (2 if small else 1) // columns, blocks // FEWEST_BLOCKS), 1)
    return SingleTile(k, bc, 64 if hopper else 32, splits, warps, stages)


def _block(size: int, smallest: int, most: int) -> int:
    """The smallest power of two that covers ``size``, within the limits."""
    return min(max(1 << (size - 1).bit_length(), smallest), most)
