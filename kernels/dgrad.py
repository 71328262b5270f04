"""Input gradients as an implicit GEMM: rows are input positions, columns channels, and the sum runs over (r, s, k).

There is one sub-problem for each class of input positions modulo the stride, with only the taps of that class. Two row
operands may share the blocks of the feedback: the output gradient, and the response, from whose product the input is
subtracted.
"""

import triton
import triton.language as tl

from .common import subtract_mean
from .geometry import Geometry
from .launch import Launch, make_launch
from .tiles import DgradTile, Target, choose_dgrad


@triton.jit
def first_taps(i_class, R: tl.constexpr, D: tl.constexpr, GEO: tl.constexpr, PHASES: tl.constexpr):
    """For input positions i_class + stride * j of dimension D: the first tap that reads them, the number of such taps,
    at intervals of PHASES.step, and the offset o such that the first tap belongs to output position j + o."""
    COMMON: tl.constexpr = GEO.stride[D] // PHASES.step[D]
    i_shift = i_class + GEO.padding[D]
    first = (i_shift // COMMON * PHASES.inverse[D]) % PHASES.step[D]
    n_taps = tl.maximum(R - first + PHASES.step[D] - 1, 0) // PHASES.step[D]
    n_taps = tl.where(i_shift % COMMON == 0, n_taps, 0)
    return first, n_taps, (i_shift - first * GEO.dilation[D]) // GEO.stride[D]


@triton.jit
def dgrad_kernel(
    p_dy,  # [N, P, Q, K], the output gradient
    p_y,  # [N, P, Q, K], the response
    p_feedback,  # [K, R, S, C]
    p_x,  # [N, H, W, C]
    p_dx,  # [N, H, W, C]: convT(dy, feedback)
    p_z,  # [N, H, W, C]: (z_scale * convT(y, feedback) - x_scale * (x - mean)) / unit
    p_mean,  # [SAMPLE, C] float32, of x at each position of a sample
    p_unit,  # [1] float32, the value of a 1 in z
    N,
    z_scale,
    x_scale,
    PHASES: tl.constexpr,
    GEO: tl.constexpr,
    FLAGS: tl.constexpr,
    TILE: tl.constexpr,
    i_tile=None,  # given if another kernel calls this one
    i_class=None,
):
    BM: tl.constexpr = TILE.BM
    BC: tl.constexpr = TILE.BC
    BK: tl.constexpr = TILE.BK
    CHANNEL_BLOCKS: tl.constexpr = (GEO.C + BC - 1) // BC
    K_BLOCKS: tl.constexpr = (GEO.K + BK - 1) // BK
    # Every class has the rows of the largest class; positions that do not exist are masked.
    ROWS: tl.constexpr = (GEO.H + GEO.stride[0] - 1) // GEO.stride[0]
    COLUMNS: tl.constexpr = (GEO.W + GEO.stride[1] - 1) // GEO.stride[1]
    if i_tile is None:
        i_tile = tl.program_id(0)
        i_class = tl.program_id(1)
    i_class_h = i_class // GEO.stride[1]
    i_class_w = i_class % GEO.stride[1]
    # Channel tiles run fastest, so that the programs of one wave read the same output positions.
    o_c = (i_tile % CHANNEL_BLOCKS) * BC + tl.arange(0, BC)
    o_m = (i_tile // CHANNEL_BLOCKS) * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)

    o_n = o_m // (ROWS * COLUMNS)
    o_i = o_m // COLUMNS % ROWS
    o_j = o_m % COLUMNS
    o_h = o_i * GEO.stride[0] + i_class_h
    o_w = o_j * GEO.stride[1] + i_class_w
    m_m = (o_n < N) & (o_h < GEO.H) & (o_w < GEO.W)
    first_r, n_r, shift_p = first_taps(i_class_h, GEO.R, 0, GEO, PHASES)
    first_s, n_s, shift_q = first_taps(i_class_w, GEO.S, 1, GEO, PHASES)
    n_taps = n_r * n_s
    # The gradient of a class without taps is zero. It runs one masked block: ptxas serializes the wgmma of a loop that
    # may run zero times (Triton 3.6, sm_90, warning C7515).
    n_k = tl.where(n_taps > 0, GEO.K, 0)
    n_s = tl.maximum(n_s, 1)

    b_dx = tl.full([BM, BC], 0.0, dtype=tl.float32)
    b_z = tl.full([BM, BC], 0.0, dtype=tl.float32)
    # One flat loop over taps and channel blocks: of nested loops, only the innermost would be pipelined.
    for i in range(tl.maximum(n_taps, 1) * K_BLOCKS):
        i_tap = i // K_BLOCKS
        o_kk = i % K_BLOCKS * BK + o_k
        i_r = i_tap // n_s
        i_s = i_tap % n_s
        o_p = o_i + (shift_p - i_r * PHASES.reach[0])
        o_q = o_j + (shift_q - i_s * PHASES.reach[1])
        o_pixel = (o_n * GEO.P + o_p) * GEO.Q + o_q
        if FLAGS.WIDE:
            o_pixel = o_pixel.to(tl.int64)
        m_pixel = m_m & (o_p >= 0) & (o_p < GEO.P) & (o_q >= 0) & (o_q < GEO.Q)
        m_y = m_pixel[:, None] & (o_kk < n_k)[None, :]
        o_y = o_pixel[:, None] * GEO.K + o_kk[None, :]
        i_kernel = (first_r + i_r * PHASES.step[0]) * GEO.S + first_s + i_s * PHASES.step[1]
        m_feedback = (o_kk < n_k)[:, None] & (o_c < GEO.C)[None, :]
        o_feedback = (o_kk[:, None] * (GEO.R * GEO.S) + i_kernel) * GEO.C + o_c[None, :]
        b_feedback = tl.load(p_feedback + o_feedback, mask=m_feedback, other=0.0)
        if FLAGS.HAS_DX:
            b_dy = tl.load(p_dy + o_y, mask=m_y, other=0.0)
            b_dx = tl.dot(b_dy, b_feedback, b_dx, input_precision=FLAGS.PRECISION)
        if FLAGS.HAS_Z:
            b_y = tl.load(p_y + o_y, mask=m_y, other=0.0)
            b_z = tl.dot(b_y, b_feedback, b_z, input_precision=FLAGS.PRECISION)

    o_pixel = (o_n * GEO.H + o_h) * GEO.W + o_w
    if FLAGS.WIDE:
        o_pixel = o_pixel.to(tl.int64)
    o_x = o_pixel[:, None] * GEO.C + o_c[None, :]
    m_x = m_m[:, None] & (o_c < GEO.C)[None, :]
    if FLAGS.HAS_DX:
        tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
    if FLAGS.HAS_Z:
        if p_unit is not None:
            unit = tl.load(p_unit)
            z_scale /= unit
            x_scale /= unit
        b_z *= z_scale
        if FLAGS.USE_X:
            b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
            if p_mean is not None:
                b_x = subtract_mean(b_x, p_mean, (o_pixel % FLAGS.SAMPLE)[:, None] * GEO.C + o_c[None, :], m_x)
            b_z -= x_scale * b_x
        tl.store(p_z + o_x, b_z.to(p_z.dtype.element_ty), mask=m_x)


def dgrad_launch(
    geometry: Geometry, target: Target, *, sample: int = 1, tile: DgradTile | None = None, **named: str | float | None
) -> Launch:
    """dx = convT(dy, feedback), and z = (z_scale * convT(y, feedback) - x_scale * (x - mean)) / unit.

    Args:
        sample: the number of input positions of a sample, the rows of the mean.
        named: the parameters of ``dgrad_kernel`` without ``p_``; the blocks are contiguous and have one dtype. Without
            ``dy`` or ``y``, its product is not computed; ``x`` is read if ``x_scale`` is not 0.
    """
    g, dy, y = geometry, bool(named.get("dy")), bool(named.get("y"))
    use_x = y and bool(named.get("x")) and named.get("x_scale", 0) != 0
    tile = tile or choose_dgrad(g, dy and y, target)
    # (tiles of the largest class, classes of input positions modulo the stride)
    positions = g.N * -(-g.H // g.stride[0]) * -(-g.W // g.stride[1])
    grid = (-(-positions // tile.BM) * -(-g.C // tile.BC), g.stride[0] * g.stride[1])
    read = {"x": use_x, "mean": use_x, "unit": y}
    named = {name: value for name, value in named.items() if read.get(name, True)}
    inputs, outputs = (g.N, g.H, g.W, g.C), (g.N, g.P, g.Q, g.K)
    shapes = {"dy": outputs, "y": outputs, "x": inputs, "dx": inputs, "z": inputs}
    shapes |= {"feedback": (g.K, g.R, g.S, g.C), "mean": (sample, g.C)}
    flags = {"HAS_DX": dy, "HAS_Z": y, "USE_X": use_x}
    return make_launch(dgrad_kernel, g, target, tile, grid, named, ("dx", "z"), shapes, flags, PHASES=g.phases())
