"""Device functions that several kernels share: centering, the split-K reduction and the rule's terms without data."""

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
def reduce_splits(p_workspace, p_semaphores, i_split, SIZE: tl.constexpr, SPLITS: tl.constexpr, LEVELS: tl.constexpr):
    """Split-K reduction: add the partial sums of all splits to those of split 0. Returns True in the one program that
    may read the total there.

    The additions form a binary tree. At each node, the second of two programs to arrive adds both halves. The halves do
    not depend on the order of arrival, so the result is bitwise reproducible.

    Args:
        p_workspace: [SPLITS, SIZE] float32, the partial sums.
        p_semaphores: [SPLITS] int32, zero before and after; a node uses that of its right half's first split.
    """
    STEP: tl.constexpr = 2048
    last = i_split >= 0
    width = 1
    for _ in range(LEVELS):
        i_right = (i_split // width | 1) * width
        if last & (i_right < SPLITS):
            # The writes of every thread must be visible before one of them increments the semaphore.
            tl.debug_barrier()
            last = tl.atomic_add(p_semaphores + i_right, 1, sem="acq_rel") == 1
            if last:
                p_right = p_workspace + i_right * SIZE
                p_left = p_right - width * SIZE
                for i in range(0, SIZE, STEP):
                    o = i + tl.arange(0, STEP)
                    b_left = tl.load(p_left + o, mask=o < SIZE, cache_modifier=".cg")
                    b_right = tl.load(p_right + o, mask=o < SIZE, cache_modifier=".cg")
                    tl.store(p_left + o, b_left + b_right, mask=o < SIZE, cache_modifier=".cg")
                tl.store(p_semaphores + i_right, 0)
        width *= 2
    tl.debug_barrier()
    return last


@triton.jit
def add_rule_terms(b_f, b_dw, p_dw, p_weight, p_feedback, o_f, m_f, decay, self_, tie, HAS_DW: tl.constexpr,
                   FLAGS: tl.constexpr):  # fmt: skip
    """b_f + decay * feedback - self_ * weight + tie * dw; an operand with coefficient 0 is not read.

    dw is ``b_dw`` if HAS_DW, otherwise it is loaded.
    """
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
        if HAS_DW:
            b_f += tie * b_dw
        else:
            b_f += tie * tl.load(p_dw + o_f, mask=m_f, other=0.0).to(tl.float32)
    return b_f
