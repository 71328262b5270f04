"""A pointwise layer's whole backward in one pass: rows are output channels, columns input channels, the sum runs over
positions.

Each program walks over its share of the positions with B in reach and the sums of dW and of the feedback's gradient in
registers; x, dy and y are read once. TERM says what the second sum is:

    none        nothing
    response    y'x
    projection  y'z, z = (z_scale * y B - x_scale * x) / unit
    moment      x'x [C, C], written alone

where x is minus its mean if there is one; dW is of x itself.

Names: i_ index, o_ offsets, m_ mask, p_ pointer, b_ block; B* block sizes.
"""

import triton
import triton.language as tl

from .centering import subtract_mean
from .epilogue import add_rule_terms, sum_splits


@triton.jit
def single_kernel(
    p_x,  # [positions, C]
    p_dy,  # [positions, K]
    p_y,  # [used, K]
    p_feedback,  # [K, C]
    p_weight,  # [K, C]
    p_dx,  # [positions, C]: dy B
    p_dw,  # [K, C]: dy'x
    p_f,  # [K, C]: scale * unit * the second sum + decay * feedback - self_ * weight + tie * dw; or [C, C]
    p_mean,  # [SAMPLE, C] float32, of x at every position of a sample
    p_unit,  # [1] float32, what a 1 in y or z stands for
    p_partial,  # [channel blocks, SPLITS, rows of both sums, BC] float32
    p_arrived,  # [channel blocks, SPLITS] int32, zero before and after
    positions,
    used,
    z_scale,
    x_scale,
    scale,
    decay,
    self_,
    tie,
    C: tl.constexpr,
    K: tl.constexpr,
    TERM: tl.constexpr,
    HAS_F: tl.constexpr,
    USE_X: tl.constexpr,
    USE_WEIGHT: tl.constexpr,
    USE_FEEDBACK: tl.constexpr,
    USE_TIE: tl.constexpr,
    SAMPLE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    SPLITS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    # Channel blocks run fastest: the programs that read the same positions of dy and y then run together.
    i_column = tl.program_id(0)
    i_split = tl.program_id(1)
    o_k = tl.arange(0, BK)
    o_c = i_column * BC + tl.arange(0, BC)
    o_kernel = o_k[:, None] * C + o_c[None, :]
    m_kernel = (o_k < K)[:, None] & (o_c < C)[None, :]
    b_feedback = tl.load(p_feedback + o_kernel, mask=m_kernel, other=0.0)

    F_ROWS: tl.constexpr = 0 if TERM == "none" else BC if TERM == "moment" else BK
    b_dw = tl.full([BK, BC], 0.0, dtype=tl.float32)
    if F_ROWS > 0:
        b_f = tl.full([F_ROWS, BC], 0.0, dtype=tl.float32)
    if TERM == "projection" and p_unit is not None:
        unit = tl.load(p_unit)
        z_scale /= unit
        x_scale /= unit
    blocks = (positions + BP - 1) // BP
    per_split = (blocks + SPLITS - 1) // SPLITS
    first = i_split * per_split
    # At least one block, all of it masked: ptxas serialises the wgmma of a loop that may not run (Triton 3.6, sm_90).
    for i in range(tl.maximum(tl.minimum(blocks - first, per_split), 1)):
        o_p = (first + i) * BP + tl.arange(0, BP)
        m_p = o_p < positions
        m_y = (o_k < K)[:, None] & (o_p < used)[None, :]
        if WIDE:
            o_p = o_p.to(tl.int64)
        o_x = o_p[:, None] * C + o_c[None, :]
        m_x = m_p[:, None] & (o_c < C)[None, :]
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
        # Row operands are loaded through transposed pointers: the transpose of a loaded block spills on sm_80.
        o_y = o_p[None, :] * K + o_k[:, None]
        b_dy = tl.load(p_dy + o_y, mask=(o_k < K)[:, None] & m_p[None, :], other=0.0)
        b_dx = tl.dot(tl.trans(b_dy), b_feedback, input_precision=PRECISION)
        tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
        b_dw = tl.dot(b_dy, b_x, b_dw, input_precision=PRECISION)
        if TERM == "response" or TERM == "projection":
            b_y = tl.load(p_y + o_y, mask=m_y, other=0.0)
        if TERM == "projection":
            b_z = z_scale * tl.dot(tl.trans(b_y), b_feedback, input_precision=PRECISION)
        b_read = b_x
        if p_mean is not None:
            b_read = subtract_mean(b_x, p_mean, (o_p % SAMPLE)[:, None] * C + o_c[None, :], m_x)
        if TERM == "response":
            b_f = tl.dot(b_y, b_read.to(b_x.dtype), b_f, input_precision=PRECISION)
        elif TERM == "projection":
            if USE_X:
                b_z -= x_scale * b_read.to(tl.float32)
            b_f = tl.dot(b_y, b_z.to(b_x.dtype), b_f, input_precision=PRECISION)
        elif TERM == "moment":
            b_read = b_read.to(b_x.dtype)
            b_f = tl.dot(tl.trans(b_read), b_read, b_f, input_precision=PRECISION)

    last = True
    if SPLITS > 1:
        SLOT: tl.constexpr = (BK + F_ROWS) * BC
        p_slots = p_partial + i_column * SPLITS * SLOT
        o_dw = tl.arange(0, BK)[:, None] * BC + tl.arange(0, BC)[None, :]
        tl.store(p_slots + i_split * SLOT + o_dw, b_dw, cache_modifier=".cg")
        if F_ROWS > 0:
            o_f = (BK + tl.arange(0, F_ROWS))[:, None] * BC + tl.arange(0, BC)[None, :]
            tl.store(p_slots + i_split * SLOT + o_f, b_f, cache_modifier=".cg")
        last = sum_splits(p_slots, p_arrived + i_column * SPLITS, i_split, SLOT, SPLITS, LEVELS)
        if last:
            b_dw = tl.load(p_slots + o_dw, cache_modifier=".cg")
            if F_ROWS > 0:
                b_f = tl.load(p_slots + o_f, cache_modifier=".cg")

    if last:
        tl.store(p_dw + o_kernel, b_dw.to(p_dw.dtype.element_ty), mask=m_kernel)
        if TERM == "moment":
            o_r = tl.arange(0, BC)
            m_f = (o_r < C)[:, None] & (o_c < C)[None, :]
            tl.store(p_f + o_r[:, None] * C + o_c[None, :], b_f, mask=m_f)
        elif HAS_F:
            b_rule = tl.full([BK, BC], 0.0, dtype=tl.float32) if TERM == "none" else b_f * scale
            if p_unit is not None:
                b_rule *= tl.load(p_unit)
            b_rule = add_rule_terms(
                b_rule, b_dw, p_dw, p_weight, p_feedback, o_kernel, m_kernel, decay, self_, tie,
                True, USE_WEIGHT, USE_FEEDBACK, USE_TIE,
            )  # fmt: skip
            tl.store(p_f + o_kernel, b_rule.to(p_f.dtype.element_ty), mask=m_kernel)
