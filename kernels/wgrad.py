"""Weight gradients as an implicit GEMM: rows are output channels, columns (r, s, c), and the sum runs over positions.

Two row operands may share the column operand x: the output gradient `a`, and `u`, whose product is written as the
feedback weight's gradient. Of a Gram matrix x'x, only the blocks on and below the diagonal are computed.

Names in all kernels: i_ index, o_ offsets, m_ mask, p_ pointer, b_ block; GEO, FLAGS and TILE are named tuples of
compile-time constants.
"""

import triton
import triton.language as tl

from .common import place_of, store_gradients, subtract_mean
from .geometry import Geometry
from .launch import Launch, make_launch
from .tiles import Target, WgradTile, choose_wgrad, row_tiles, wgrad_tiles


@triton.jit
def wgrad_kernel(
    p_x,  # [N, H, W, C]
    p_a,  # [N, P, Q, K], the output gradient
    p_u,  # [N, P, Q, U]
    p_dw,  # [K, R, S, C] by its strides: wgrad(x, a)
    p_f,  # [U, R, S, C] by its strides: scale * unit * wgrad(x - mean, u - u_mean) + the terms of store_gradients
    p_mean,  # [SAMPLE, C], of x at each position of a sample
    p_u_mean,  # [PIXELS, U], of u
    p_unit,  # [1] float32, the value of a 1 in x or u
    p_weight,  # as p_f
    p_feedback,  # as p_f
    p_workspace,  # [SPLIT_TILES, splits, BK + BU, BC] float32, partial sums; without the rows of an absent operand
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
    i_program=None,  # given if another kernel calls this one
):
    BK: tl.constexpr = TILE.BK
    BU: tl.constexpr = TILE.BU
    BC: tl.constexpr = TILE.BC
    SPLITS: tl.constexpr = TILE.splits
    # Of a sample: entries of dimension N, and output positions.
    ENTRIES: tl.constexpr = FLAGS.SAMPLE // (GEO.H * GEO.W) if FLAGS.CENTERED else 1
    PIXELS: tl.constexpr = ENTRIES * GEO.P * GEO.Q
    if i_program is None:
        i_program = tl.program_id(0)
    # Whole tiles run first, then the splits of the others.
    i_split = 0
    if SPLITS > 1:
        i_split = tl.maximum(i_program - FLAGS.WHOLE, 0) // FLAGS.SPLIT_TILES
    i_tile = i_program - i_split * FLAGS.SPLIT_TILES
    i_row, i_column, i_tap = place_of(i_tile, BC, GEO, FLAGS)
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
    per_split = blocks
    if SPLITS > 1:
        per_split = tl.where(i_tile < FLAGS.WHOLE, blocks, (blocks + SPLITS - 1) // SPLITS)
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

    if SPLITS > 1 and (FLAGS.WHOLE == 0 or i_tile >= FLAGS.WHOLE):
        A_ROWS: tl.constexpr = BK if FLAGS.HAS_A else 0
        SIZE: tl.constexpr = (A_ROWS + (BU if FLAGS.HAS_U else 0)) * BC
        p_sums = p_workspace + ((i_tile - FLAGS.WHOLE) * SPLITS + i_split) * SIZE
        if FLAGS.HAS_A:
            tl.store(p_sums + tl.arange(0, BK)[:, None] * BC + tl.arange(0, BC)[None, :], b_dw)
        if FLAGS.HAS_U:
            tl.store(p_sums + (A_ROWS + tl.arange(0, BU))[:, None] * BC + tl.arange(0, BC)[None, :], b_du)
    else:
        store_gradients(
            b_dw, b_du, o_k[:, None], o_u[:, None], o_c[None, :], i_tap, i_row != i_column, p_dw, p_f, p_unit,
            p_weight, p_feedback, scale, decay, self_, tie, W_STRIDES, F_STRIDES, GEO, FLAGS,
        )  # fmt: skip


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
    tiles = wgrad_tiles(g, rows, (tile.BK, tile.BU, tile.BC), symmetric)
    split = tiles % target.processors if tile.splits > 1 else 0
    tile = tile._replace(splits=tile.splits if split else 1)
    flags |= {"WHOLE": tiles - split if split else 0, "SPLIT_TILES": split}
    grid = (tiles + split * (tile.splits - 1), 1)
    writes, sums = ("dw", "f") if a else ("f",), (tile.BK if a else 0, tile.BU if u else 0)
    strides = {"W_STRIDES": w_strides, "F_STRIDES": f_strides}
    return make_launch(wgrad_kernel, g, target, tile, grid, named, writes, shapes, flags, sums, **strides)
