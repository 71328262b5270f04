"""Device functions of random signs: their bits, their products, and the sums and sizes that these kernels need.

Functions of Triton's library that are written in Triton itself, such as tl.cdiv, tl.sum and tl.philox, cannot be
interpreted if TRITON_INTERPRET was set after the import of Triton. They are therefore not used.
"""

import triton
import triton.language as tl


@triton.jit
def ceil_div(size, BLOCK: tl.constexpr):
    """The number of blocks that cover a size."""
    return (size + BLOCK - 1) // BLOCK


@triton.jit
def sum_all(b):
    """The sum of all elements of a block."""
    return tl.reduce(b, None, tl.standard._sum_combine)


@triton.jit
def draw_words(o_probe, i_chunk, index, seed_low, seed_high, step):
    """The bits of 128 elements of each probe, as four words: Philox4x32-10, as in csrc/philox.h."""
    zero = o_probe * 0
    c0, c1 = o_probe.to(tl.uint32), (zero + i_chunk).to(tl.uint32)
    c2, c3 = (zero + index).to(tl.uint32), (zero + step).to(tl.uint32)
    key0, key1 = (zero + seed_low).to(tl.uint32), (zero + seed_high).to(tl.uint32)
    factor0, factor1 = (zero - 0x2DAEE0AD).to(tl.uint32), (zero - 0x326172A9).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(factor0, c0), factor0 * c0
        high1, low1 = tl.umulhi(factor1, c2), factor1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def to_signs(b_bits, DTYPE: tl.constexpr):
    """1 where the lowest bit is set, -1 elsewhere."""
    return tl.where((b_bits & 1) != 0, 1.0, -1.0).to(DTYPE)


@triton.jit
def draw_signs(o_probe, i_chunk, index, seed_low, seed_high, step, DTYPE: tl.constexpr):
    """The signs of 128 elements of each probe: [len(o_probe), 128]."""
    w0, w1, w2, w3 = draw_words(o_probe, i_chunk, index, seed_low, seed_high, step)
    b_words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(o_probe.shape[0], 4)
    b_bits = b_words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]
    return to_signs(b_bits.reshape(o_probe.shape[0], 128), DTYPE)


@triton.jit
def dot_signs(b_a, b_x, b_sum, PARTS: tl.constexpr):
    """b_sum + b_a @ b_x for signs b_x, with the first 8 * PARTS bits of the float32 factor b_a."""
    for _ in tl.static_range(PARTS):
        b_part = (b_a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        b_sum = tl.dot(b_part.to(b_x.dtype), b_x, b_sum, input_precision="ieee")
        b_a -= b_part
    return b_sum
