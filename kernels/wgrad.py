"""Weight gradients as an implicit GEMM: rows are output channels, columns (r, s, c), and the sum runs over positions.

Two row operands may share the column operand x: the output gradient `a`, and `u`, whose product is written as the
feedback weight's gradient. Of a Gram matrix x'x, only the blocks on and below the diagonal are computed.

Names in all kernels: i_ index, o_ offsets, m_ mask, p_ pointer, b_ block; GEO, FLAGS and TILE are named tuples of
compile-time constants.
"""

import triton
import triton.language as tl

from .common import add_rule_terms, reduce_splits, subtract_mean
from .geometry import Geometry
from .launch import Launch, make_launch
from .tiles import Target, WgradTile, choose_wgrad, row_tiles, wgrad_tiles


@triton.jit
def wgrad_kernel(
    p_x,  # [N, H, W, C]
    p_a,  # [N, P, Q, K], the output gradient
    p_u,  # [N, P, Q, U]
    p_dw,  # [K, R, S, C] by its strides: wgrad(x, a)
    p_f,  # [U, R, S, C] by its strides: scale * unit * wgrad(x - mean, u - u_mean) + the terms of add_rule_terms
    p_mean,  # [SAMPLE, C], of x at each position of a sample
    p_u_mean,  # [PIXELS, U], of u
    p_unit,  # [1] float32, the value of a 1 in x or u
    p_weight,  # as p_f
    p_feedback,  # as p_f
    p_workspace,  # [tiles, splits, BK + BU, BC] float32, partial sums; without the rows of an absent operand
    p_semaphores,  # [tiles, splits] int32, zero before and after
    N,
    scale,
    decay,
    self_,
    tie,
    W_STRIDES: tl.constexpr,  # (k, r, s, c) of p_dw
    F_STRIDES: tl.constexpr,  # of p_f, p_weight and p_feedback
    GEO: tl.constexpr,
    FLAGS: tl.constexpr,
    TILE: tl.constexpr,
    i_tile=None,  # given if another kernel calls this one
    i_split=None,
):
    BK: tl.constexpr = TILE.BK
    BU: tl.constexpr = TILE.BU
    BC: tl.constexpr = TILE.BC
    SPLITS: tl.constexpr = TILE.splits
    CHANNEL_BLOCKS: tl.constexpr = (GEO.C + BC - 1) // BC
    # Of a sample: entries of dimension N, and output positions.
    ENTRIES: tl.constexpr = FLAGS.SAMPLE // (GEO.H * GEO.W) if FLAGS.CENTERED else 1
    PIXELS: tl.constexpr = ENTRIES * GEO.P * GEO.Q
    if i_tile is None:
        i_tile = tl.program_id(0)
        i_split = tl.program_id(1)
    if FLAGS.SYMMETRIC:
        # Row i has i + 1 tiles; adding 4 instead of 1 keeps the root of a square away from rounding.
        i_row = ((tl.sqrt(8.0 * i_tile + 4) - 1) / 2).to(tl.int32)
        i_column = i_tile - i_row * (i_row + 1) // 2
        i_tap = 0
    else:
        # Row tiles run fastest, so that the programs of one wave read the same positions of x.
        i_row = i_tile % FLAGS.ROWS
        i_column = i_tile // FLAGS.ROWS % CHANNEL_BLOCKS
        i_tap = i_tile // FLAGS.ROWS // CHANNEL_BLOCKS
    i_r = i_tap // GEO.S
    i_s = i_tap % GEO.S
    o_c = i_column * BC + tl.arange(0, BC)
    o_k = i_row * BK + tl.arange(0, BK)
    o_u = i_row * BU + tl.arange(0, BU)

    samples = N // ENTRIES
    if FLAGS.CENTERED:
        blocks = (samples + TILE.BP - 1) // TILE.BP * PIXELS
    else:
        blocks = (samples * PIXELS + TILE.BP - 1) // TILE.BP
    per_split = (blocks + SPLITS - 1) // SPLITS
    first = i_split * per_split
    # A split without work still runs one masked block: ptxas serializes the wgmma of a loop that may run
    # zero times (Triton 3.6, sm_90, warning C7515).
    count = tl.maximum(tl.minimum(blocks - first, per_split), 1)

    b_dw = tl.full([BK, BC], 0.0, dtype=tl.float32)
    b_du = tl.full([BU, BC], 0.0, dtype=tl.float32)
    for i in range(count):
        i_block = first + i
        if FLAGS.CENTERED:
            # One position of many samples, so that a mean is one row. Where x is not read, its mean is zero.
            i_pixel = i_block % PIXELS
            o_n = i_block // PIXELS * TILE.BP + tl.arange(0, TILE.BP)
            o_p = o_n * PIXELS + i_pixel
            m_p = o_n < samples
            i_read = i_pixel
            read = i_block < blocks
            if not FLAGS.POINTWISE:
                i_h = i_pixel // GEO.Q * GEO.stride[0] - GEO.padding[0] + i_r * GEO.dilation[0]
                i_w = i_pixel % GEO.Q * GEO.stride[1] - GEO.padding[1] + i_s * GEO.dilation[1]
                i_read = i_h * GEO.W + i_w
                read = read & (i_h >= 0) & (i_h < GEO.H) & (i_w >= 0) & (i_w < GEO.W)
            o_pixel = o_n * FLAGS.SAMPLE + i_read
            m_pixel = o_n < tl.where(read, samples, 0)
        else:
            o_p = i_block * TILE.BP + tl.arange(0, TILE.BP)
            m_p = o_p < samples * PIXELS
            if FLAGS.POINTWISE:
                o_pixel = o_p
                m_pixel = m_p
            else:
                o_rest = o_p % PIXELS
                o_h = o_rest // GEO.Q * GEO.stride[0] - GEO.padding[0] + i_r * GEO.dilation[0]
                o_w = o_rest % GEO.Q * GEO.stride[1] - GEO.padding[1] + i_s * GEO.dilation[1]
                o_pixel = (o_p // PIXELS * GEO.H + o_h) * GEO.W + o_w
                m_pixel = m_p & (o_h >= 0) & (o_h < GEO.H) & (o_w >= 0) & (o_w < GEO.W)
        if FLAGS.WIDE:
            o_p = o_p.to(tl.int64)
            o_pixel = o_pixel.to(tl.int64)
            if FLAGS.CENTERED:  # of one sample, a mean is as large as the sample
                i_read = i_read.to(tl.int64)
                i_pixel = i_pixel.to(tl.int64)
        m_x = m_pixel[:, None] & (o_c < GEO.C)[None, :]
        b_x = tl.load(p_x + o_pixel[:, None] * GEO.C + o_c[None, :], mask=m_x, other=0.0)
        # Row operands are loaded through transposed pointers: transposing a loaded block spills on sm_80.
        if FLAGS.HAS_A:
            m_a = (o_k < GEO.K)[:, None] & m_p[None, :]
            b_a = tl.load(p_a + o_p[None, :] * GEO.K + o_k[:, None], mask=m_a, other=0.0)
            b_dw = tl.dot(b_a, b_x, b_dw, input_precision=FLAGS.PRECISION)
        if FLAGS.HAS_U:
            m_u = (o_u < FLAGS.U)[:, None] & m_p[None, :]
            b_u = tl.load(p_u + o_p[None, :] * FLAGS.U + o_u[:, None], mask=m_u, other=0.0)
            if p_mean is not None:
                m_mean = (o_c < tl.where(read, GEO.C, 0))[None, :]
                b_x = subtract_mean(b_x, p_mean, (i_read * GEO.C + o_c)[None, :], m_mean).to(b_x.dtype)
            if p_u_mean is not None:
                m_mean = (o_u < tl.where(i_block < blocks, FLAGS.U, 0))[:, None]
                b_u = subtract_mean(b_u, p_u_mean, (i_pixel * FLAGS.U + o_u)[:, None], m_mean).to(b_u.dtype)
                if FLAGS.TAIL:
                    b_u = tl.where(m_u, b_u, 0.0)
            b_du = tl.dot(b_u, b_x, b_du, input_precision=FLAGS.PRECISION)

    last = True
    if SPLITS > 1:
        A_ROWS: tl.constexpr = BK if FLAGS.HAS_A else 0
        SIZE: tl.constexpr = (A_ROWS + (BU if FLAGS.HAS_U else 0)) * BC
        p_sums = p_workspace + i_tile.to(tl.int64) * SPLITS * SIZE
        o_a = tl.arange(0, BK)[:, None] * BC + tl.arange(0, BC)[None, :]
        o_b = (A_ROWS + tl.arange(0, BU))[:, None] * BC + tl.arange(0, BC)[None, :]
        if FLAGS.HAS_A:
            tl.store(p_sums + i_split * SIZE + o_a, b_dw, cache_modifier=".cg")
        if FLAGS.HAS_U:
            tl.store(p_sums + i_split * SIZE + o_b, b_du, cache_modifier=".cg")
        last = reduce_splits(p_sums, p_semaphores + i_tile * SPLITS, i_split, SIZE, SPLITS, FLAGS.LEVELS)
        if last:
            if FLAGS.HAS_A:
                b_dw = tl.load(p_sums + o_a, cache_modifier=".cg")
            if FLAGS.HAS_U:
                b_du = tl.load(p_sums + o_b, cache_modifier=".cg")

    if last:
        if FLAGS.HAS_A:
            m_dw = (o_k < GEO.K)[:, None] & (o_c < GEO.C)[None, :]
            o_tap = i_r * W_STRIDES[1] + i_s * W_STRIDES[2]
            o_dw = o_k[:, None] * W_STRIDES[0] + o_c[None, :] * W_STRIDES[3] + o_tap
            tl.store(p_dw + o_dw, b_dw.to(p_dw.dtype.element_ty), mask=m_dw)
        if FLAGS.HAS_F:
            if FLAGS.HAS_U:
                o_row = o_u
                b_f = b_du * scale
                if p_unit is not None:
                    b_f *= tl.load(p_unit)
            else:
                o_row = o_k
                b_f = tl.full([BK, BC], 0.0, dtype=tl.float32)
            m_f = (o_row < FLAGS.U)[:, None] & (o_c < GEO.C)[None, :]
            o_tap = i_r * F_STRIDES[1] + i_s * F_STRIDES[2]
            o_f = o_row[:, None] * F_STRIDES[0] + o_c[None, :] * F_STRIDES[3] + o_tap
            b_f = add_rule_terms(b_f, b_dw, p_dw, p_weight, p_feedback, o_f, m_f, decay, self_, tie, FLAGS.HAS_A, FLAGS)
            tl.store(p_f + o_f, b_f.to(p_f.dtype.element_ty), mask=m_f)
            if FLAGS.SYMMETRIC and i_row != i_column:
                o_mirror = o_row[:, None] * F_STRIDES[3] + o_c[None, :] * F_STRIDES[0]
                tl.store(p_f + o_mirror, b_f.to(p_f.dtype.element_ty), mask=m_f)


def wgrad_launch(
    geometry: Geometry,
    target: Target,
    *,
    u_channels: int | None = None,
    w_strides: tuple[int, ...] = (0, 0, 0, 0),
    f_strides: tuple[int, ...] = (0, 0, 0, 0),
    sample: int = 1,
    tile: WgradTile | None = None,
    **named: str | float | None,
) -> Launch:
    """dw = wgrad(x, a), and the gradient f of the feedback.

    f = scale * unit * wgrad(x - mean, u - u_mean) + decay * feedback - self_ * weight + tie * dw. Sums are kept in
    float32 and are bitwise reproducible.

    Args:
        u_channels: of ``u``; K by default.
        w_strides, f_strides: of dw and of f as [K, R, S, C].
        sample: the number of input positions of a sample, the rows of the mean.
        named: the parameters of ``wgrad_kernel`` without ``p_``. x, a and u are contiguous and have one dtype; dw and
            f may be float32. Without ``a``, dw is only read; without ``u``, its term is 0. If ``u`` is ``x``, it has
            the same mean. ``tie`` requires u_channels == K and equal strides.
    """
    g, a, u, f = geometry, named.get("a"), named.get("u"), named.get("f")
    u_channels, gram = u_channels or g.K, u == named["x"]
    if gram:
        named["u_mean"] = named.get("mean")
    rows = (g.K if a else 0, u_channels if u else 0)
    decay, self_, tie = (f is not None and named.get(name, 0) != 0 for name in ("decay", "self_", "tie"))
    symmetric = gram and a is None and g.pointwise and not (decay or self_ or tie)
    if tie and u_channels != g.K:
        raise ValueError(f"tie is {named['tie']}, expected 0 if u has {u_channels} channels and W {g.K} rows")
    read = {"mean": u, "u_mean": u, "unit": u, "dw": a or tie, "weight": self_, "feedback": decay}
    named = {name: value for name, value in named.items() if read.get(name, True)}
    samples = g.N * g.H * g.W // max(sample, 1) if named.get("mean") or named.get("u_mean") else 0
    if tile is None:
        tile = choose_wgrad(g, rows, target, symmetric, samples=samples)
    if tie and a and u and tile.BK != tile.BU:
        raise ValueError(f"tile is {tile}, expected BK == BU if tie uses both products")
    if symmetric and g.C > tile.BC and tile.BU != tile.BC:
        raise ValueError(f"tile is {tile}, expected BU == BC if the product is symmetric")
    flags = {"HAS_A": bool(a), "HAS_U": bool(u), "HAS_F": bool(f), "SYMMETRIC": symmetric}
    flags |= {"USE_FEEDBACK": decay, "USE_WEIGHT": self_, "USE_TIE": tie, "POINTWISE": g.pointwise, "U": u_channels}
    flags |= {"CENTERED": samples > 0, "TAIL": samples % tile.BP != 0}
    flags["ROWS"] = row_tiles(rows, (tile.BK, tile.BU))
    outputs = (g.N, g.P, g.Q)
    shapes = {"u": (*outputs, u_channels), "a": (*outputs, g.K), "x": (g.N, g.H, g.W, g.C), "mean": (sample, g.C)}
    shapes["u_mean"] = (sample // (g.H * g.W) * g.P * g.Q, u_channels)
    grid = (wgrad_tiles(g, rows, (tile.BK, tile.BU, tile.BC), symmetric), tile.splits)
    writes, sums = ("dw", "f") if a else ("f",), (tile.BK + tile.BU) * tile.BC
    strides = {"W_STRIDES": w_strides, "F_STRIDES": f_strides}
    return make_launch(wgrad_kernel, g, target, tile, grid, named, writes, shapes, flags, sums, **strides)
