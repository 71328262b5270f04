"""Weight gradients as an implicit GEMM: rows are output channels, columns (r, s, c), the sum runs over positions.

Two row operands may share the column operand x: the output gradient `a`, and `u`, whose product is written as the
feedback weight's gradient. Of a second moment only the blocks on and below the diagonal are computed.
Names: i_ index, o_ offsets, m_ mask, p_ pointer, b_ block; B* block sizes.
"""

import triton
import triton.language as tl

from .centering import subtract_mean
from .epilogue import add_rule_terms, sum_splits


@triton.jit
def wgrad_kernel(
    p_x,  # [N, H, W, C]
    p_a,  # [N, P, Q, K], the output gradient
    p_u,  # [N, P, Q, U]
    p_dw,  # [K, R, S, C] by its strides: wgrad(x, a)
    p_f,  # [U, R, S, C] by its strides: scale * unit * wgrad(x - mean, u) + the rule's other terms, see epilogue.py
    p_mean,  # [SAMPLE, C] float32, of x at every position of a sample
    p_unit,  # [1] float32, what a 1 in x or u stands for
    p_weight,  # as p_f
    p_feedback,  # as p_f
    p_partial,  # [tiles, SPLITS, BK + BU, BC] float32, the sums of each split; without what is absent
    p_arrived,  # [tiles, SPLITS] int32, zero before and after
    N,
    scale,
    decay,
    self_,
    tie,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    stride_fk,
    stride_fc,
    stride_fr,
    stride_fs,
    C: tl.constexpr,
    K: tl.constexpr,
    U: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_F: tl.constexpr,
    USE_FEEDBACK: tl.constexpr,
    USE_WEIGHT: tl.constexpr,
    USE_TIE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MOMENT: tl.constexpr,  # u is x, and centred with it
    SAMPLE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BU: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEVELS: tl.constexpr,
    i_tile=None,  # where the programs of another kernel come to this one
    i_split=None,
):
    CHANNEL_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    if i_tile is None:
        i_tile = tl.program_id(0)
        i_split = tl.program_id(1)
    if SYMMETRIC:
        # Row i has i + 1 tiles; 4 in the place of 1 keeps the root of a square clear of rounding.
        i_row = ((tl.sqrt(8.0 * i_tile + 4) - 1) / 2).to(tl.int32)
        i_column = i_tile - i_row * (i_row + 1) // 2
        i_tap = 0
    else:
        # Row tiles run fastest: the programs of one wave then read the same positions of x.
        i_row = i_tile % ROWS
        i_column = i_tile // ROWS % CHANNEL_BLOCKS
        i_tap = i_tile // ROWS // CHANNEL_BLOCKS
    i_r = i_tap // S
    i_s = i_tap % S
    o_c = i_column * BC + tl.arange(0, BC)
    o_k = i_row * BK + tl.arange(0, BK)
    o_u = i_row * BU + tl.arange(0, BU)

    positions = N * P * Q
    blocks = (positions + BP - 1) // BP
    per_split = (blocks + SPLITS - 1) // SPLITS
    first = i_split * per_split
    # A split without work still runs one block, all of it masked: ptxas serialises the wgmma of a loop that may not
    # run at all (Triton 3.6, sm_90, warning C7515).
    count = tl.maximum(tl.minimum(blocks - first, per_split), 1)

    b_dw = tl.full([BK, BC], 0.0, dtype=tl.float32)
    b_du = tl.full([BU, BC], 0.0, dtype=tl.float32)
    for i in range(count):
        o_p = (first + i) * BP + tl.arange(0, BP)
        m_p = o_p < positions
        if POINTWISE:
            o_pixel = o_p
            m_pixel = m_p
        else:
            o_rest = o_p % (P * Q)
            o_h = o_rest // Q * STRIDE_H - PAD_H + i_r * DIL_H
            o_w = o_rest % Q * STRIDE_W - PAD_W + i_s * DIL_W
            o_pixel = (o_p // (P * Q) * H + o_h) * W + o_w
            m_pixel = m_p & (o_h >= 0) & (o_h < H) & (o_w >= 0) & (o_w < W)
        if WIDE:
            o_p = o_p.to(tl.int64)
            o_pixel = o_pixel.to(tl.int64)
        m_x = m_pixel[:, None] & (o_c < C)[None, :]
        b_x = tl.load(p_x + o_pixel[:, None] * C + o_c[None, :], mask=m_x, other=0.0)
        # Row operands are loaded through transposed pointers: the transpose of a loaded block spills on sm_80.
        if HAS_A:
            m_a = (o_k < K)[:, None] & m_p[None, :]
            b_a = tl.load(p_a + o_p[None, :] * K + o_k[:, None], mask=m_a, other=0.0)
            b_dw = tl.dot(b_a, b_x, b_dw, input_precision=PRECISION)
        if HAS_U:
            m_u = (o_u < U)[:, None] & m_p[None, :]
            b_u = tl.load(p_u + o_p[None, :] * U + o_u[:, None], mask=m_u, other=0.0)
            if p_mean is not None:
                o_mean = o_pixel % SAMPLE
                b_x = subtract_mean(b_x, p_mean, o_mean[:, None] * C + o_c[None, :], m_x).to(b_x.dtype)
                if MOMENT:
                    b_u = subtract_mean(b_u, p_mean, o_mean[None, :] * C + o_u[:, None], m_u).to(b_u.dtype)
            b_du = tl.dot(b_u, b_x, b_du, input_precision=PRECISION)

    last = True
    if SPLITS > 1:
        A_ROWS: tl.constexpr = BK if HAS_A else 0
        SLOT: tl.constexpr = (A_ROWS + (BU if HAS_U else 0)) * BC
        p_slots = p_partial + i_tile.to(tl.int64) * SPLITS * SLOT
        o_a = tl.arange(0, BK)[:, None] * BC + tl.arange(0, BC)[None, :]
        o_b = (A_ROWS + tl.arange(0, BU))[:, None] * BC + tl.arange(0, BC)[None, :]
        if HAS_A:
            tl.store(p_slots + i_split * SLOT + o_a, b_dw, cache_modifier=".cg")
        if HAS_U:
            tl.store(p_slots + i_split * SLOT + o_b, b_du, cache_modifier=".cg")
        last = sum_splits(p_slots, p_arrived + i_tile * SPLITS, i_split, SLOT, SPLITS, LEVELS)
        if last:
            if HAS_A:
                b_dw = tl.load(p_slots + o_a, cache_modifier=".cg")
            if HAS_U:
                b_du = tl.load(p_slots + o_b, cache_modifier=".cg")

    if last:
        if HAS_A:
            m_dw = (o_k < K)[:, None] & (o_c < C)[None, :]
            o_dw = o_k[:, None] * stride_wk + o_c[None, :] * stride_wc + i_r * stride_wr + i_s * stride_ws
            tl.store(p_dw + o_dw, b_dw.to(p_dw.dtype.element_ty), mask=m_dw)
        if HAS_F:
            if HAS_U:
                o_row = o_u
                b_f = b_du * scale
                if p_unit is not None:
                    b_f *= tl.load(p_unit)
            else:
                o_row = o_k
                b_f = tl.full([BK, BC], 0.0, dtype=tl.float32)
            m_f = (o_row < U)[:, None] & (o_c < C)[None, :]
            o_f = o_row[:, None] * stride_fk + o_c[None, :] * stride_fc + i_r * stride_fr + i_s * stride_fs
            b_f = add_rule_terms(
                b_f, b_dw, p_dw, p_weight, p_feedback, o_f, m_f, decay, self_, tie,
                HAS_A, USE_WEIGHT, USE_FEEDBACK, USE_TIE,
            )  # fmt: skip
            tl.store(p_f + o_f, b_f.to(p_f.dtype.element_ty), mask=m_f)
            if SYMMETRIC and i_row != i_column:
                o_mirror = o_row[:, None] * stride_fc + o_c[None, :] * stride_fk
                tl.store(p_f + o_mirror, b_f.to(p_f.dtype.element_ty), mask=m_f)
