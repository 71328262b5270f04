"""The choice of tiles: pure functions of a problem and an architecture.

Nothing here was measured. Block sizes are the largest that compile without spills, as benchmarks/codegen.py checks.
Sums are split so that the programs of the last wave fill the processors.
"""

from typing import NamedTuple

from .geometry import Geometry

PROGRAMS_PER_PROCESSOR = 2  # of a joint launch
MOST_WAVES = 4  # of small blocks of dx; with more, dx alone fills the processors
FEWEST_BLOCKS = 4  # of positions in each split, so that the pipeline fills
SPLITS_AT_ONCE, SUMS_AT_ONCE = 32, 2048  # of a program that adds partial sums: small, so that they fill the processors


class Target(NamedTuple):
    """The target of a compilation: the name of the operands' dtype, and the device."""

    dtype: str
    tf32: bool = False  # float32 products may be rounded to TensorFloat-32
    capability: int = 90
    processors: int = 132

    @property
    def large(self) -> bool:
        """Whether tiles of sm_90 fit: 227 KB of shared memory, and products that the threads do not wait for.

        Consumer Blackwell, sm_12x, has 99 KB and the tensor cores of sm_80.
        """
        return 90 <= self.capability < 120

    @property
    def itemsize(self) -> int:
        """The size of an element in bytes."""
        return 4 if self.dtype == "float32" else 2

    @property
    def precision(self) -> str:
        """The precision of products; both values are equivalent for 16-bit operands."""
        return "tf32" if self.tf32 and self.dtype == "float32" else "ieee"


class WgradTile(NamedTuple):
    """BK and BU rows of the two operands, BC channels of one tap, BP positions per step.

    Of the tiles of the last wave that does not fill the processors, the positions are divided into ``splits``.
    """

    BK: int
    BU: int
    BC: int
    BP: int
    splits: int
    warps: int
    stages: int


class DgradTile(NamedTuple):
    """BM input positions, BC channels, BK output channels per step."""

    BM: int
    BC: int
    BK: int
    warps: int
    stages: int


class PointwiseTile(NamedTuple):
    """BK rows that hold every output channel, BC input channels, BP positions per step; splits of the positions."""

    BK: int
    BC: int
    BP: int
    splits: int
    warps: int
    stages: int


class FinishTile(NamedTuple):
    """The tile of a split sum: BK and BU rows of both sums, BC channels.

    A program adds BS splits of ``rows`` rows at once.
    """

    BK: int
    BU: int
    BC: int
    splits: int
    BS: int
    rows: int
    warps: int = 4
    stages: int = 1


Tile = WgradTile | DgradTile | PointwiseTile | FinishTile


def choose_wgrad(
    geometry: Geometry, rows: tuple[int, int], target: Target, symmetric=False, small=False, samples: int = 0
) -> WgradTile:
    """The tile of a weight gradient.

    Args:
        rows: the channels of the operands a and u, 0 if one is absent.
        symmetric: whether only half of the blocks are computed.
        small: whether to use the blocks of a joint launch.
        samples: of the batch, if means are subtracted; 0 if not.
    """
    dual = 0 not in rows
    if target.itemsize == 4:
        # Small blocks: wgmma reads float32 only K-major, and full precision uses FMA.
        most, columns, depth, stages = 64, 64, 16, 3
    elif target.large:
        most, columns, depth, stages = 128, 128, 64, 3 if dual else 4
    else:
        # On sm_80 these spill: dual 128x128, and steps of 32 positions with a long epilogue (Triton 3.6).
        most = columns = 64 if dual else 128
        depth, stages = 64, 3
    if small:
        most, columns, stages = 64, 64, 3
    depth = _depth(samples, depth)
    smallest = 64 if target.large and target.itemsize == 2 else 16
    bk, bu = (_block(r, smallest, most) if r else 16 for r in rows)
    bc = _block(geometry.C, 16, columns)
    warps = 8 if max(bk if rows[0] else 0, bu if rows[1] else 0) * bc >= 128 * 128 else 4
    tiles = wgrad_tiles(geometry, rows, (bk, bu, bc), symmetric)
    last = tiles if small else tiles % target.processors or tiles  # in a joint launch, dx fills the last wave
    blocks = -(-geometry.positions // depth)
    splits = max(min(target.processors // last, blocks // FEWEST_BLOCKS), 1)
    return WgradTile(bk, bu, bc, depth, splits, warps, stages)


def wgrad_tiles(geometry: Geometry, rows: tuple[int, int], blocks: tuple[int, int, int], symmetric: bool) -> int:
    """The number of output tiles of one launch, for ``rows`` channels of a and u in blocks BK, BU, BC."""
    down = row_tiles(rows, blocks[:2])
    return down * (down + 1) // 2 if symmetric else down * geometry.R * geometry.S * -(-geometry.C // blocks[2])


def choose_finish(bk: int, bu: int, bc: int, splits: int) -> FinishTile:
    """How the partial sums of a tile are added: BK rows of dw and BU of f."""
    most = 1 << (splits - 1).bit_length()
    bs = min(most, SPLITS_AT_ONCE)
    return FinishTile(bk, bu, bc, splits, bs, min(max(SUMS_AT_ONCE // (bs * bc), 1), max(bk, bu)))


def row_tiles(rows: tuple[int, int], blocks: tuple[int, int]) -> int:
    """The number of tiles that cover the rows of both operands, each in blocks of its own size."""
    return max(-(-r // b) for r, b in zip(rows, blocks, strict=True) if r)


def choose_dgrad(geometry: Geometry, dual: bool, target: Target, small: bool = False) -> DgradTile:
    """The tile of an input gradient; ``dual`` if both products are computed, ``small`` as in choose_wgrad."""
    if target.itemsize == 4:
        most, columns, depth, stages = 64, 64, 16, 3
    elif target.large:
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
    geometry: Geometry, rows: tuple[int, int], dual: bool, target: Target, samples: int = 0
) -> tuple[WgradTile, DgradTile] | None:
    """Both tiles of a joint launch, with equal warps and stages; None if the layer is not small."""
    if MOST_WAVES * target.processors < -(-geometry.N * geometry.H * geometry.W // 64) * -(-geometry.C // 64):
        return None
    wgrad = choose_wgrad(geometry, rows, target, small=True, samples=samples)
    dgrad = choose_dgrad(geometry, dual, target, small=True)
    if 0 not in rows and target.dtype == "float32" and not target.tf32:  # with two products by FMA, 4 warps spill
        return wgrad._replace(warps=8), dgrad._replace(warps=8)
    return wgrad, dgrad


def choose_pointwise(geometry: Geometry, term: str, target: Target, samples: int = 0) -> PointwiseTile | None:
    """The tile of a one-pass pointwise backward; None if its sums do not fit a processor.

    Args:
        term: as in ``pointwise_launch``.
        samples: of the batch, if means are subtracted; 0 if not.
    """
    c, k = _block(geometry.C, 64, 512), _block(geometry.K, 64, 512)
    hopper = target.large
    # The largest blocks of dW without spills; z, x'x and means need further registers.
    if term == "gram":
        bc = c if c <= (128 if hopper else 64) and k <= (256 if hopper or not samples else 128) else 0
    elif term == "z":
        bc = 64 * 128 // k if hopper or k == 64 else 0
    else:
        bc = (64 * 256 if hopper else 64 * 128) // k
    depth = 64 if hopper else 32
    if samples:  # 128 channels with z spill on sm_90, steps of 32 with z on sm_80, and 256 rows of y minus its mean
        most = 64 if term == "z" and hopper else 128 if term != "cross" or k <= 128 else 0
        depth = _depth(samples, 16 if term == "z" and k * min(bc, c) == 64 * 64 and not hopper else depth)
        bc = min(bc, most)
    bc = min(bc, c)
    if target.itemsize == 4 or bc < 64 or not geometry.pointwise or max(geometry.C, geometry.K) > 512:
        return None
    small = k * bc == 64 * 64
    warps, stages = (4 if small else 8), (3 if small or not hopper else 2)
    columns, blocks = -(-geometry.C // bc), -(-geometry.positions // 64)
    # Two programs of four warps, or one of eight, for each processor.
    splits = max(min(target.processors * (2 if small else 1) // columns, blocks // FEWEST_BLOCKS), 1)
    return PointwiseTile(k, bc, depth, splits, warps, stages)


def _depth(samples: int, most: int) -> int:
    """The rows of a step: ``most``, or if they are samples the largest power of two of which there are as many."""
    return min(most, max(1 << (samples.bit_length() - 1), 16)) if samples else most


def _block(size: int, smallest: int, most: int) -> int:
    """The smallest power of two that covers ``size``, within the limits."""
    return min(max(1 << (size - 1).bit_length(), smallest), most)
