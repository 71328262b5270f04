"""Centring a block in registers, as it is loaded."""

import triton
import triton.language as tl


@triton.jit
def subtract_mean(b, p_mean, o_mean, m):
    """The block minus its mean, in float32; zero where it is masked.

    Args:
        b: the block, loaded with mask ``m`` and zeros elsewhere.
        p_mean: float32, one value for every position of a sample and every channel.
        o_mean: offsets into it, of the shape of the block.
    """
    return b.to(tl.float32) - tl.load(p_mean + o_mean, mask=m, other=0.0)
