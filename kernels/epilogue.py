"""What ends a weight gradient: the sums of its splits added up, and the terms of the rule that read no data."""

import triton
import triton.language as tl


@triton.jit
def sum_splits(p_partial, p_arrived, i_split, SLOT: tl.constexpr, SPLITS: tl.constexpr, LEVELS: tl.constexpr):
    """Adds what every split left in its slot; True in the one program that then finds all of it in slot 0.

    A binary tree: of the two programs that come to a node, the second adds both halves. Which halves are added does not
    depend on who comes first, so the result is the same bit for bit however the programs are scheduled.

    Args:
        p_partial: [SPLITS, SLOT] float32.
        p_arrived: [SPLITS] int32, zero before and after; a node has the number of its right half's first split.
    """
    STEP: tl.constexpr = 2048
    last = i_split >= 0
    width = 1
    for _ in range(LEVELS):
        i_right = (i_split // width | 1) * width
        if last & (i_right < SPLITS):
            # What every thread wrote must be there before one of them announces it.
            tl.debug_barrier()
            last = tl.atomic_add(p_arrived + i_right, 1, sem="acq_rel") == 1
            if last:
                p_right = p_partial + i_right * SLOT
                p_left = p_right - width * SLOT
                for i in range(0, SLOT, STEP):
                    o = i + tl.arange(0, STEP)
                    b_left = tl.load(p_left + o, mask=o < SLOT, cache_modifier=".cg")
                    b_right = tl.load(p_right + o, mask=o < SLOT, cache_modifier=".cg")
                    tl.store(p_left + o, b_left + b_right, mask=o < SLOT, cache_modifier=".cg")
                tl.store(p_arrived + i_right, 0)
        width *= 2
    tl.debug_barrier()
    return last


@triton.jit
def add_rule_terms(b_f, b_dw, p_dw, p_weight, p_feedback, o_f, m_f, decay, self_, tie, HAS_DW: tl.constexpr,
                   USE_WEIGHT: tl.constexpr, USE_FEEDBACK: tl.constexpr, USE_TIE: tl.constexpr):  # fmt: skip
    """b_f + decay * feedback - self_ * weight + tie * dw; what has no coefficient is not read."""
    if USE_FEEDBACK:
        b_feedback = tl.load(p_feedback + o_f, mask=m_f, other=0.0).to(tl.float32)
        if USE_WEIGHT:
            # Exact where decay == self_ and the feedback nears the weight.
            b_weight = tl.load(p_weight + o_f, mask=m_f, other=0.0).to(tl.float32)
            b_f += decay * (b_feedback - b_weight) + (decay - self_) * b_weight
        else:
            b_f += decay * b_feedback
    elif USE_WEIGHT:
        b_f -= self_ * tl.load(p_weight + o_f, mask=m_f, other=0.0).to(tl.float32)
    if USE_TIE:
        if HAS_DW:
            b_f += tie * b_dw
        else:
            b_f += tie * tl.load(p_dw + o_f, mask=m_f, other=0.0).to(tl.float32)
    return b_f
