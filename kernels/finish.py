"""The launch that follows one whose sums over positions are split: it adds the partial sums and applies the epilogue.

The order of the additions is fixed, so results are bitwise reproducible.
"""

import triton
import triton.language as tl

from .common import place_of, store_gradients


@triton.jit
def sum_splits(p_sums, o, m, SIZE: tl.constexpr, TILE: tl.constexpr):
    """The sum of all splits at offsets ``o`` where ``m``: of interleaved splits first, then of those sums."""
    b = tl.full([TILE.BS, TILE.rows * TILE.BC], 0.0, dtype=tl.float32)
    SPLITS: tl.constexpr = TILE.splits  # Triton 3.6 does not accept a field of a named tuple in static_range
    BS: tl.constexpr = TILE.BS
    for i in tl.static_range(0, SPLITS, BS):
        o_split = i + tl.arange(0, TILE.BS)
        m_split = (o_split < TILE.splits)[:, None] & m[None, :]
        b += tl.load(p_sums + o_split[:, None] * SIZE + o[None, :], mask=m_split, other=0.0)
    return tl.reduce(b, 0, tl.standard._sum_combine)


@triton.jit
def finish_kernel(
    p_workspace,  # [SPLIT_TILES, splits, BK + BU, BC] float32, partial sums
    p_dw,  # these as in wgrad_kernel
    p_f,
    p_unit,
    p_weight,
    p_feedback,
    scale,
    decay,
    self_,
    tie,
    W_STRIDES: tl.constexpr,
    F_STRIDES: tl.constexpr,
    GEO: tl.constexpr,
    FLAGS: tl.constexpr,
    TILE: tl.constexpr,
):
    BK: tl.constexpr = TILE.BK
    BU: tl.constexpr = TILE.BU
    BC: tl.constexpr = TILE.BC
    SIZE: tl.constexpr = (BK + BU) * BC
    p_sums = p_workspace + tl.program_id(0) * TILE.splits * SIZE
    o = tl.program_id(1) * (TILE.rows * BC) + tl.arange(0, TILE.rows * BC)
    i_row, i_column, i_tap = place_of(FLAGS.WHOLE + tl.program_id(0), BC, GEO, FLAGS)
    m_dw = o < BK * BC
    m_u = o < BU * BC
    b_dw = tl.full([TILE.rows * BC], 0.0, dtype=tl.float32)
    b_u = b_dw
    if FLAGS.HAS_A:
        b_dw = sum_splits(p_sums, o, m_dw, SIZE, TILE)
    if FLAGS.HAS_U:
        b_u = sum_splits(p_sums + BK * BC, o, m_u, SIZE, TILE)
    # A row that only the other sum has is past the last.
    o_k = tl.where(m_dw, i_row * BK + o // BC, GEO.K)
    o_u = tl.where(m_u, i_row * BU + o // BC, FLAGS.U)
    store_gradients(
        b_dw, b_u, o_k, o_u, i_column * BC + o % BC, i_tap, i_row != i_column, p_dw, p_f, p_unit, p_weight, p_feedback,
        scale, decay, self_, tie, W_STRIDES, F_STRIDES, GEO, FLAGS,
    )  # fmt: skip
