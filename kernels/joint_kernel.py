"""One launch of both gradients for layers too small to fill a GPU with either: a persistent grid, whose programs take
tiles of the weight gradient first, which are longer, and then tiles of the input gradient.
"""

import triton
import triton.language as tl

from .dgrad_kernel import dgrad_kernel
from .wgrad_kernel import wgrad_kernel


@triton.jit
def joint_kernel(
    # The arguments of wgrad_kernel, then of dgrad_kernel what is not among them: p_kernel, p_input, p_input_mean,
    # p_z_unit, n, DSAMPLE, DBC and DBK are its p_feedback, p_x, p_mean, p_unit, N, SAMPLE, BC and BK.
    p_x,
    p_a,
    p_u,
    p_dw,
    p_f,
    p_mean,
    p_unit,
    p_weight,
    p_feedback,
    p_partial,
    p_arrived,
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
    p_dy,
    p_y,
    p_kernel,
    p_input,
    p_dx,
    p_z,
    p_input_mean,
    p_z_unit,
    n,
    z_scale,
    x_scale,
    wgrad_tiles,
    dgrad_tiles,
    dgrad_classes,
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
    MOMENT: tl.constexpr,
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
    R: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    REACH_H: tl.constexpr,
    REACH_W: tl.constexpr,
    INV_H: tl.constexpr,
    INV_W: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_Z: tl.constexpr,
    USE_X: tl.constexpr,
    DSAMPLE: tl.constexpr,
    BM: tl.constexpr,
    DBC: tl.constexpr,
    DBK: tl.constexpr,
):
    n_wgrad = wgrad_tiles * SPLITS
    for i in range(tl.program_id(0), n_wgrad + dgrad_tiles * dgrad_classes, tl.num_programs(0)):
        if i < n_wgrad:
            wgrad_kernel(
                p_x, p_a, p_u, p_dw, p_f, p_mean, p_unit, p_weight, p_feedback, p_partial, p_arrived, N, scale,
                decay, self_, tie, stride_wk, stride_wc, stride_wr, stride_ws, stride_fk, stride_fc, stride_fr,
                stride_fs, C, K, U, H, W, P, Q, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, POINTWISE,
                HAS_A, HAS_U, HAS_F, USE_FEEDBACK, USE_WEIGHT, USE_TIE, SYMMETRIC, MOMENT, SAMPLE, WIDE,
                PRECISION, BK, BU, BC, BP, ROWS, SPLITS, LEVELS,
                i % wgrad_tiles, i // wgrad_tiles,
            )  # fmt: skip
        else:
            i_dgrad = i - n_wgrad
            dgrad_kernel(
                p_dy, p_y, p_kernel, p_input, p_dx, p_z, p_input_mean, p_z_unit, n, z_scale, x_scale, C, K, H, W,
                P, Q, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, STEP_H, STEP_W, REACH_H, REACH_W,
                INV_H, INV_W, HAS_DX, HAS_Z, USE_X, DSAMPLE, WIDE, PRECISION, BM, DBC, DBK,
                i_dgrad % dgrad_tiles, i_dgrad // dgrad_tiles,
            )  # fmt: skip
