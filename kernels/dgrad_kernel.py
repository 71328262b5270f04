"""Input gradients as an implicit GEMM: rows are input positions, columns channels, the sum runs over (r, s, k).

One sub-problem per class of input positions modulo the stride, each with its own taps only. Two row operands may
share the feedback's blocks: the output gradient, and the response, whose product has the input subtracted in place.
Names: i_ index, n_ count, o_ offsets, m_ mask, p_ pointer, b_ block; B* block sizes.
"""

import triton
import triton.language as tl

from .centering import subtract_mean


@triton.jit
def first_taps(i_class, R, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, STEP: tl.constexpr,
               INV: tl.constexpr):  # fmt: skip
    """Of the input positions i_class + STRIDE * j: the first tap that visits them, the number of taps, STEP apart,
    and o such that the first one comes from output position j + o."""
    COMMON: tl.constexpr = STRIDE // STEP
    i_shift = i_class + PAD
    first = (i_shift // COMMON * INV) % STEP
    n_taps = tl.maximum(R - first + STEP - 1, 0) // STEP
    n_taps = tl.where(i_shift % COMMON == 0, n_taps, 0)
    return first, n_taps, (i_shift - first * DIL) // STRIDE


@triton.jit
def dgrad_kernel(
    p_dy,  # [N, P, Q, K], the output gradient
    p_y,  # [N, P, Q, K], the response
    p_feedback,  # [K, R, S, C]
    p_x,  # [N, H, W, C]
    p_dx,  # [N, H, W, C]: convT(dy, feedback)
    p_z,  # [N, H, W, C]: (z_scale * convT(y, feedback) - x_scale * (x - mean)) / unit
    p_mean,  # [SAMPLE, C] float32, of x at every position of a sample
    p_unit,  # [1] float32, what a 1 in z stands for
    N,
    z_scale,
    x_scale,
    C: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    REACH_H: tl.constexpr,
    REACH_W: tl.constexpr,
    INV_H: tl.constexpr,
    INV_W: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_Z: tl.constexpr,
    USE_X: tl.constexpr,
    SAMPLE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    i_tile=None,  # where the programs of another kernel come to this one
    i_class=None,
):
    CHANNEL_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    # The rows of every class, as many as the largest class has; the others mask what they lack.
    ROWS: tl.constexpr = (H + STRIDE_H - 1) // STRIDE_H
    COLUMNS: tl.constexpr = (W + STRIDE_W - 1) // STRIDE_W
    if i_tile is None:
        i_tile = tl.program_id(0)
        i_class = tl.program_id(1)
    i_class_h = i_class // STRIDE_W
    i_class_w = i_class % STRIDE_W
    # Channel tiles run fastest: the programs of one wave then read the same output positions.
    o_c = (i_tile % CHANNEL_BLOCKS) * BC + tl.arange(0, BC)
    o_m = (i_tile // CHANNEL_BLOCKS) * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)

    o_n = o_m // (ROWS * COLUMNS)
    o_i = o_m // COLUMNS % ROWS
    o_j = o_m % COLUMNS
    o_h = o_i * STRIDE_H + i_class_h
    o_w = o_j * STRIDE_W + i_class_w
    m_m = (o_n < N) & (o_h < H) & (o_w < W)
    first_r, n_r, shift_p = first_taps(i_class_h, R, STRIDE_H, PAD_H, DIL_H, STEP_H, INV_H)
    first_s, n_s, shift_q = first_taps(i_class_w, S, STRIDE_W, PAD_W, DIL_W, STEP_W, INV_W)
    n_taps = n_r * n_s
    # A class without taps is zero. It runs one block, all of it masked: ptxas serialises the wgmma of a loop that may
    # not run at all (Triton 3.6, sm_90, warning C7515).
    n_k = tl.where(n_taps > 0, K, 0)
    n_s = tl.maximum(n_s, 1)

    b_dx = tl.full([BM, BC], 0.0, dtype=tl.float32)
    b_z = tl.full([BM, BC], 0.0, dtype=tl.float32)
    for i in range(tl.maximum(n_taps, 1) * K_BLOCKS):
        i_tap = i // K_BLOCKS
        o_kk = i % K_BLOCKS * BK + o_k
        i_r = i_tap // n_s
        i_s = i_tap % n_s
        o_p = o_i + (shift_p - i_r * REACH_H)
        o_q = o_j + (shift_q - i_s * REACH_W)
        o_pixel = (o_n * P + o_p) * Q + o_q
        if WIDE:
            o_pixel = o_pixel.to(tl.int64)
        m_pixel = m_m & (o_p >= 0) & (o_p < P) & (o_q >= 0) & (o_q < Q)
        m_y = m_pixel[:, None] & (o_kk < n_k)[None, :]
        o_y = o_pixel[:, None] * K + o_kk[None, :]
        i_kernel = (first_r + i_r * STEP_H) * S + first_s + i_s * STEP_W
        m_feedback = (o_kk < n_k)[:, None] & (o_c < C)[None, :]
        o_feedback = (o_kk[:, None] * (R * S) + i_kernel) * C + o_c[None, :]
        b_feedback = tl.load(p_feedback + o_feedback, mask=m_feedback, other=0.0)
        if HAS_DX:
            b_dy = tl.load(p_dy + o_y, mask=m_y, other=0.0)
            b_dx = tl.dot(b_dy, b_feedback, b_dx, input_precision=PRECISION)
        if HAS_Z:
            b_y = tl.load(p_y + o_y, mask=m_y, other=0.0)
            b_z = tl.dot(b_y, b_feedback, b_z, input_precision=PRECISION)

    o_pixel = (o_n * H + o_h) * W + o_w
    if WIDE:
        o_pixel = o_pixel.to(tl.int64)
    o_x = o_pixel[:, None] * C + o_c[None, :]
    m_x = m_m[:, None] & (o_c < C)[None, :]
    if HAS_DX:
        tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
    if HAS_Z:
        if p_unit is not None:
            unit = tl.load(p_unit)
            z_scale /= unit
            x_scale /= unit
        b_z *= z_scale
        if USE_X:
            b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
            if p_mean is not None:
                b_x = subtract_mean(b_x, p_mean, (o_pixel % SAMPLE)[:, None] * C + o_c[None, :], m_x)
            b_z -= x_scale * b_x
        tl.store(p_z + o_x, b_z.to(p_z.dtype.element_ty), mask=m_x)
