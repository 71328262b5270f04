"""Device functions that several kernels share: centering, the place of a tile, and the epilogue."""

import triton
import triton.language as tl


@triton.jit
def subtract_mean(b, p_mean, o_mean, m):
    """The block minus its mean, in float32.

    Args:
        p_mean: one value for each position of a sample and each channel.
        o_mean, m: offsets into the mean, and where it is not zero; of the block's shape, or of a row or column.
    """
    return b.to(tl.float32) - tl.load(p_mean + o_mean, mask=m, other=0.0).to(tl.float32)


@triton.jit
def place_of(i_tile, BC: tl.constexpr, GEO: tl.constexpr, FLAGS: tl.constexpr):
    """The row, column and tap of a tile of a weight gradient."""
    CHANNEL_BLOCKS: tl.constexpr = (GEO.C + BC - 1) // BC
    if FLAGS.SYMMETRIC:
        # Row i has i + 1 tiles; adding 4 instead of 1 keeps the root of a square away from rounding.
        i_row = ((tl.sqrt(8.0 * i_tile + 4) - 1) / 2).to(tl.int32)
        return i_row, i_tile - i_row * (i_row + 1) // 2, 0
    else:  # noqa: RET505  # Triton would also compile what follows the branch of a constant
        # Row tiles run fastest, so that the programs of one wave read the same positions of x.
        return i_tile % FLAGS.ROWS, i_tile // FLAGS.ROWS % CHANNEL_BLOCKS, i_tile // FLAGS.ROWS // CHANNEL_BLOCKS


@triton.jit
def store_gradients(
    b_dw, b_u, o_k, o_u, o_c, i_tap, mirrored, p_dw, p_f, p_unit, p_weight, p_feedback, scale, decay, self_, tie,
    W_STRIDES: tl.constexpr, F_STRIDES: tl.constexpr, GEO: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Store dw and f = scale * unit * b_u + decay * feedback - self_ * weight + tie * dw of one tap.

    An operand with coefficient 0 is not read. dw is ``b_dw`` if HAS_A, otherwise it is loaded.

    Args:
        b_dw, b_u: the sums, in float32; not read without HAS_A and HAS_U.
        o_k, o_u, o_c: the rows of dw and of f and the channels, which broadcast to the shapes of the sums.
        mirrored: whether f is also stored with rows and channels exchanged.
    """
    i_r = i_tap // GEO.S
    i_s = i_tap % GEO.S
    m_c = o_c < GEO.C
    if FLAGS.HAS_A:
        o_dw = o_k * W_STRIDES[0] + o_c * W_STRIDES[3] + (i_r * W_STRIDES[1] + i_s * W_STRIDES[2])
        tl.store(p_dw + o_dw, b_dw.to(p_dw.dtype.element_ty), mask=(o_k < GEO.K) & m_c)
    if FLAGS.HAS_F:
        if FLAGS.HAS_U:
            b_f = b_u * scale
            if p_unit is not None:
                b_f *= tl.load(p_unit)
        else:
            o_u = o_k
            b_f = tl.full(b_dw.shape, 0.0, dtype=tl.float32)
        m_f = (o_u < FLAGS.U) & m_c
        o_f = o_u * F_STRIDES[0] + o_c * F_STRIDES[3] + (i_r * F_STRIDES[1] + i_s * F_STRIDES[2])
        if FLAGS.USE_FEEDBACK:
            b_feedback = tl.load(p_feedback + o_f, mask=m_f, other=0.0).to(tl.float32)
            if FLAGS.USE_WEIGHT:
                # Exact if decay == self_ and the feedback is close to the weight.
                b_weight = tl.load(p_weight + o_f, mask=m_f, other=0.0).to(tl.float32)
                b_f += decay * (b_feedback - b_weight) + (decay - self_) * b_weight
            else:
                b_f += decay * b_feedback
        elif FLAGS.USE_WEIGHT:
            b_f -= self_ * tl.load(p_weight + o_f, mask=m_f, other=0.0).to(tl.float32)
        if FLAGS.USE_TIE:
            if FLAGS.HAS_A:
                b_f += tie * b_dw
            else:
                b_f += tie * tl.load(p_dw + o_f, mask=m_f, other=0.0).to(tl.float32)
        tl.store(p_f + o_f, b_f.to(p_f.dtype.element_ty), mask=m_f)
        if FLAGS.SYMMETRIC and mirrored:
            o_mirror = o_u * F_STRIDES[3] + o_c * F_STRIDES[0]
            tl.store(p_f + o_mirror, b_f.to(p_f.dtype.element_ty), mask=m_f)
