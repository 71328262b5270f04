"""The whole backward of a pointwise layer in one pass: rows are output channels, columns input channels, and the sum
runs over positions.

Each program processes a part of the positions, with a block of B in shared memory and the sums of dW and of the
feedback's gradient in registers; x, dy and y are read once. TERM selects the second sum:

    none   absent
    cross  y'x
    z      y'z, z = (z_scale * y B - x_scale * x) / unit
    gram   x'x [C, C], written without the rule's other terms

Means are subtracted from x, except in dW, and from y.
"""

import triton
import triton.language as tl

from .common import store_gradients, subtract_mean
from .geometry import Geometry
from .launch import Launch, make_launch
from .tiles import PointwiseTile, Target, choose_pointwise


@triton.jit
def pointwise_kernel(
    p_x,  # [N, C]
    p_dy,  # [N, K]
    p_y,  # [used, K]
    p_feedback,  # [K, C]
    p_weight,  # [K, C]
    p_dx,  # [N, C]: dy B
    p_dw,  # [K, C]: dy'x
    p_f,  # [K, C]: scale * unit * the second sum + the terms of store_gradients; or [C, C]
    p_mean,  # [SAMPLE, C], of x at each position of a sample
    p_y_mean,  # [SAMPLE, K], of y
    p_unit,  # [1] float32, the value of a 1 in y or z
    p_workspace,  # [channel blocks, splits, rows of both sums, BC] float32, partial sums
    N,
    used,
    z_scale,
    x_scale,
    scale,
    decay,
    self_,
    tie,
    W_STRIDES: tl.constexpr,  # of p_dw and p_f as [rows, 1, 1, C]
    F_STRIDES: tl.constexpr,
    GEO: tl.constexpr,
    FLAGS: tl.constexpr,
    TILE: tl.constexpr,
):
    BK: tl.constexpr = TILE.BK
    BC: tl.constexpr = TILE.BC
    SPLITS: tl.constexpr = TILE.splits
    TERM: tl.constexpr = FLAGS.TERM
    # Channel blocks run fastest, so that the programs that read the same positions of dy and y run together.
    i_column = tl.program_id(0)
    i_split = tl.program_id(1)
    o_k = tl.arange(0, BK)
    o_c = i_column * BC + tl.arange(0, BC)
    o_kernel = o_k[:, None] * GEO.C + o_c[None, :]
    m_kernel = (o_k < GEO.K)[:, None] & (o_c < GEO.C)[None, :]
    b_feedback = tl.load(p_feedback + o_kernel, mask=m_kernel, other=0.0)

    F_ROWS: tl.constexpr = 0 if TERM == "none" else BC if TERM == "gram" else BK
    b_dw = tl.full([BK, BC], 0.0, dtype=tl.float32)
    if F_ROWS > 0:
        b_f = tl.full([F_ROWS, BC], 0.0, dtype=tl.float32)
    if TERM == "z" and p_unit is not None:
        unit = tl.load(p_unit)
        z_scale /= unit
        x_scale /= unit
    samples = N // FLAGS.SAMPLE
    blocks = (samples + TILE.BP - 1) // TILE.BP * FLAGS.SAMPLE
    per_split = (blocks + SPLITS - 1) // SPLITS
    first = i_split * per_split
    # At least one block, even if entirely masked: ptxas serializes the wgmma of a loop that may run zero times (Triton
    # 3.6, sm_90, warning C7515).
    for i in range(tl.maximum(tl.minimum(blocks - first, per_split), 1)):
        i_block = first + i
        # One position of many samples, so that a mean is one row. Without means, every position is a sample.
        i_pixel = i_block % FLAGS.SAMPLE
        o_n = i_block // FLAGS.SAMPLE * TILE.BP + tl.arange(0, TILE.BP)
        o_p = o_n * FLAGS.SAMPLE + i_pixel
        m_p = o_n < samples
        m_y = (o_k < GEO.K)[:, None] & (m_p & (o_p < used))[None, :]
        if FLAGS.WIDE:
            o_p = o_p.to(tl.int64)
            i_pixel = i_pixel.to(tl.int64)  # of one sample, a mean is as large as the sample
        o_x = o_p[:, None] * GEO.C + o_c[None, :]
        m_x = m_p[:, None] & (o_c < GEO.C)[None, :]
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
        # Row operands are loaded through transposed pointers: transposing a loaded block spills on sm_80.
        o_y = o_p[None, :] * GEO.K + o_k[:, None]
        b_dy = tl.load(p_dy + o_y, mask=(o_k < GEO.K)[:, None] & m_p[None, :], other=0.0)
        b_dx = tl.dot(tl.trans(b_dy), b_feedback, input_precision=FLAGS.PRECISION)
        tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
        b_dw = tl.dot(b_dy, b_x, b_dw, input_precision=FLAGS.PRECISION)
        if TERM == "cross" or TERM == "z":
            b_y = tl.load(p_y + o_y, mask=m_y, other=0.0)
            if p_y_mean is not None:
                m_mean = (o_k < tl.where(i_block < blocks, GEO.K, 0))[:, None]
                b_y = subtract_mean(b_y, p_y_mean, (i_pixel * GEO.K + o_k)[:, None], m_mean).to(b_y.dtype)
                if FLAGS.TAIL:
                    b_y = tl.where(m_y, b_y, 0.0)
        if TERM == "z":
            b_z = z_scale * tl.dot(tl.trans(b_y), b_feedback, input_precision=FLAGS.PRECISION)
        b_read = b_x
        if p_mean is not None:
            m_mean = (o_c < tl.where(i_block < blocks, GEO.C, 0))[None, :]
            b_read = subtract_mean(b_x, p_mean, (i_pixel * GEO.C + o_c)[None, :], m_mean)
            if FLAGS.TAIL and TERM == "gram":
                b_read = tl.where(m_x, b_read, 0.0)
        if TERM == "cross":
            b_f = tl.dot(b_y, b_read.to(b_x.dtype), b_f, input_precision=FLAGS.PRECISION)
        elif TERM == "z":
            if FLAGS.USE_X:
                b_z -= x_scale * b_read.to(tl.float32)
            b_f = tl.dot(b_y, b_z.to(b_x.dtype), b_f, input_precision=FLAGS.PRECISION)
        elif TERM == "gram":
            b_read = b_read.to(b_x.dtype)
            b_f = tl.dot(tl.trans(b_read), b_read, b_f, input_precision=FLAGS.PRECISION)

    if SPLITS > 1:
        p_sums = p_workspace + (i_column * SPLITS + i_split) * ((BK + F_ROWS) * BC)
        tl.store(p_sums + o_k[:, None] * BC + tl.arange(0, BC)[None, :], b_dw)
        if F_ROWS > 0:
            tl.store(p_sums + (BK + tl.arange(0, F_ROWS))[:, None] * BC + tl.arange(0, BC)[None, :], b_f)
    else:
        if F_ROWS == 0:
            b_f = b_dw  # not read
        o_f = tl.arange(0, F_ROWS if F_ROWS > 0 else BK)
        store_gradients(
            b_dw, b_f, o_k[:, None], o_f[:, None], o_c[None, :], 0, False, p_dw, p_f, p_unit, p_weight, p_feedback,
            scale, decay, self_, tie, W_STRIDES, F_STRIDES, GEO, FLAGS,
        )  # fmt: skip


def pointwise_launch(
    geometry: Geometry,
    target: Target,
    term: str,
    *,
    used: int = 0,
    sample: int = 1,
    tile: PointwiseTile | None = None,
    **named: str | float | None,
) -> Launch:
    """dx = convT(dy, feedback), dw = wgrad(x, dy), and the feedback's gradient f, from one read of x, dy and y.

    Args:
        term: the sum in f, with decay, self_ and tie as in :func:`wgrad_launch`: "none" (only those terms; f may be
            absent), "cross" (scale * unit * y'x + ...), "z" (scale * unit * y'z + ..., z = (z_scale * y feedback -
            x_scale * x) / unit), or "gram" (only x'x). Means are subtracted from x and y.
        used: the number of entries of dimension N of y.
        sample: rows of the means; 1 without means.
        named: the parameters of ``pointwise_kernel`` without ``p_``. The blocks are contiguous and have one dtype; dw
            may be float32, and so is f for "gram".

    Raises:
        ValueError: no tile for these sizes fits a processor.
    """
    g, f = geometry, named.get("f") is not None
    decay, self_, tie = (f and named.get(name, 0) != 0 for name in ("decay", "self_", "tie"))
    read = {"mean": term != "none", "y_mean": term in ("cross", "z"), "weight": self_}
    named = {name: value for name, value in named.items() if read.get(name, True)} | {"used": used}
    samples = g.N // sample if named.get("mean") or named.get("y_mean") else 0
    tile = tile or choose_pointwise(g, term, target, samples)
    if tile is None:
        raise ValueError(f"term is {term!r} of {g.C} -> {g.K} channels, expected sums that fit")
    if term == "gram" and g.C > tile.BC:
        raise ValueError(f"tile is {tile}, expected BC >= {g.C} if the term is a Gram matrix")
    flags = {"TERM": term, "HAS_F": f, "USE_X": term == "z" and named.get("x_scale", 0) != 0}
    flags |= {"USE_FEEDBACK": decay, "USE_WEIGHT": self_, "USE_TIE": tie}
    flags |= {"HAS_A": True, "HAS_U": term != "none", "U": g.C if term == "gram" else g.K, "ROWS": 1}
    flags |= {"CENTERED": samples > 0, "TAIL": samples % tile.BP != 0 or used not in (0, g.N)}
    inputs = (g.N, 1, 1, g.C)
    shapes = {"x": inputs, "dx": inputs, "dy": (g.N, 1, 1, g.K), "y": (used, 1, 1, g.K)}
    shapes |= {"feedback": (g.K, 1, 1, g.C), "mean": (sample, g.C), "y_mean": (sample, g.K)}
    grid, writes = (-(-g.C // tile.BC), tile.splits), ("dx", "dw", "f")
    flags["SPLIT_TILES"] = grid[0]
    sums = (tile.BK, {"none": 0, "gram": tile.BC}.get(term, tile.BK))
    strides = dict.fromkeys(("W_STRIDES", "F_STRIDES"), (g.C, 0, 0, 1))
    return make_launch(pointwise_kernel, g, target, tile, grid, named, writes, shapes, flags, sums, **strides)
