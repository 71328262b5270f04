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
def word_signs(words, PROBES: tl.constexpr, DTYPE: tl.constexpr):
    """The signs of 128 elements of each probe: [PROBES, 128]."""
    w0, w1, w2, w3 = words
    b_words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(PROBES, 4)
    b_bits = b_words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]
    return to_signs(b_bits.reshape(PROBES, 128), DTYPE)


@triton.jit
def bit_mask(b_row, BIT: tl.constexpr, MASK: tl.constexpr):
    """MASK where a bit of the row is set."""
    return tl.where(((b_row >> BIT) & 1) != 0, MASK, 0).to(tl.uint32)


@triton.jit
def sylvester_word(b_row):
    """The bits of the first 32 elements of rows of Sylvester's matrix: element e of row r is the parity of r & e."""
    b_low = bit_mask(b_row, 0, 0xAAAAAAAA) ^ bit_mask(b_row, 1, 0xCCCCCCCC) ^ bit_mask(b_row, 2, 0xF0F0F0F0)
    return b_low ^ bit_mask(b_row, 3, 0xFF00FF00) ^ bit_mask(b_row, 4, 0xFFFF0000)


@triton.jit
def parity(b_bits):
    """1 where the number of bits that are set is odd."""
    for i in tl.static_range(5):
        b_bits ^= b_bits >> (16 >> i)
    return b_bits & 1


@triton.jit
def flip_by_basis(b_word, b_row, b_paley, i_word, power):
    """Multiply the signs of a word by those of rows of a Hadamard matrix, Paley's factor times Sylvester's.

    Args:
        b_row, b_paley: the row of Sylvester's factor, and the bits of that of Paley's.
        i_word: the index of the 32 elements, which share an element of Paley's factor.
        power: of two, the order of Sylvester's factor.
    """
    first = i_word * 32
    b_flip = parity(b_row & (first & ((1 << power) - 1)).to(tl.uint32))
    b_flip ^= ((b_paley >> tl.minimum(first >> power, 63)) & 1).to(tl.uint32)
    return b_word ^ sylvester_word(b_row) ^ (0 - b_flip)


@triton.jit
def dot_signs(b_a, b_x, b_sum, PARTS: tl.constexpr):
    """b_sum + b_a @ b_x for signs b_x, with the first 8 * PARTS bits of the float32 factor b_a."""
    for _ in tl.static_range(PARTS):
        b_part = (b_a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        b_sum = tl.dot(b_part.to(b_x.dtype), b_x, b_sum, input_precision="ieee")
        b_a -= b_part
    return b_sum
