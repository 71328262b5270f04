"""The gradients of all feedback weights whose rules read probes, in two launches, or three if a rule has a null term.

Notation, for one layer: x [M, d] are the probes, random signs that all groups read; W and B [R, d] the weights of all
groups, R = G K rows; y = x W'. The launches are:

    response   y [M, R], and u = x (sparse B - amp W)' if the rule is sparse; otherwise u is y
    moment     of a null term: y'y of each group, or y B if that is cheaper; and <B, y'y B> and <B, B>
    gradient   u'x, the null term and the terms without data

Every launch has one program for each tile of every layer. A program finds its layer in a table of pointers, strides and
sizes (probe_table.py). One launch for y'x would have to compute y again for every block of columns, or hold all columns
of u'x in registers. y is stored instead: it is small, [M, R].

x is never stored. Its signs are bits of Philox4x32-10: bit e % 32 of word e // 32 % 4 of the draw with the key ``seed``
and the counter (probe, e // 128, index of the layer, step) is the sign of element e. A tile draws the signs that it
reads. For orthogonal probes, such a draw has the signs of the columns of a Hadamard matrix, Paley's factor times
Sylvester's. The rows of the first are behind the table; element e of row s of the second is the parity of s & e. The
rows i of a basis are in the order s = factor i + shift, modulo the order of Sylvester's factor.

Signs are exact in bfloat16, so a float32 factor is split into three bfloat16 parts, whose products with signs are exact
and use tensor cores. Products of two weights or responses are float32, or TF32 where torch allows it.

All sums have a fixed order: partial sums of <B, y'y B> are stored for each tile and added by every program that needs
the total. Results are bitwise reproducible.
"""

import triton
import triton.language as tl

from .signs import ceil_div, dot_signs, draw_words, flip_by_basis, sum_all, to_signs, word_signs


@triton.jit
def find_problem(p_table, i_tile, FIRST: tl.constexpr, T: tl.constexpr, PROBLEMS: tl.constexpr):
    """The row of the table for a tile of the whole launch, and the index of the tile in that problem.

    Args:
        p_table: [PROBLEMS, T.COLUMNS] int64; the first tiles in column FIRST do not decrease.
    """
    b_first = tl.load(p_table + tl.arange(0, PROBLEMS) * T.COLUMNS + FIRST)
    i_problem = sum_all((b_first <= i_tile).to(tl.int32)) - 1
    p_problem = p_table + i_problem * T.COLUMNS
    return p_problem, (i_tile - tl.load(p_problem + FIRST)).to(tl.int32)


@triton.jit
def load_size(p_problem, COLUMN: tl.constexpr):
    """A size of the problem as int32."""
    return tl.load(p_problem + COLUMN).to(tl.int32)


@triton.jit
def load_stride(p_problem, COLUMN: tl.constexpr):
    """The stride of a part of the workspace as int32, a multiple of 16."""
    return load_size(p_problem, COLUMN) // 16 * 16


@triton.jit
def work_pointer(p_problem, p_work, COLUMN: tl.constexpr):
    """A part of the workspace, which begins at a multiple of 16 elements."""
    return p_work + tl.load(p_problem + COLUMN) // 16 * 16


@triton.jit
def load_number(p_problem, COLUMN: tl.constexpr):
    """A float32 of the problem, stored as the lower bits of an int64."""
    return tl.load(p_problem + COLUMN).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def kernel_pointer(p_problem, COLUMN: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a weight as a pointer."""
    p_kernel = tl.load(p_problem + COLUMN).to(tl.pointer_type(ELEMENT))
    return tl.multiple_of(p_kernel, 16) if ALIGNED else p_kernel


@triton.jit
def load_strides(p_problem, COLUMN: tl.constexpr):
    """The strides of a weight: of groups, rows and columns."""
    return load_size(p_problem, COLUMN), load_size(p_problem, COLUMN + 1), load_size(p_problem, COLUMN + 2)


@triton.jit
def kernel_offsets(strides, o_r, o_e, rows, ALIGNED: tl.constexpr, VECTOR: tl.constexpr):
    """The offsets of rows o_r and columns o_e in a weight [G, rows, d]."""
    group, row, column = strides
    if ALIGNED:
        o_row = (o_r // rows * (group // VECTOR) + o_r % rows * (row // VECTOR)) * VECTOR
        return o_row[:, None] + o_e[None, :]
    o_row = o_r // rows * group + o_r % rows * row
    return o_row[:, None] + (o_e * column)[None, :]


@triton.jit
def load_words(p_problem, o_m, i_chunk, seed_low, seed_high, step, T: tl.constexpr):
    """The bits of 128 elements of the probes o_m, as four words."""
    power, index = load_size(p_problem, T.power), load_size(p_problem, T.index)
    has_basis = power >= 0
    # The signs of the columns of a basis are those of a probe that does not exist.
    o_drawn, draw = tl.where(has_basis, -1, o_m), tl.where(has_basis, load_size(p_problem, T.draw), step)
    w0, w1, w2, w3 = draw_words(o_drawn, i_chunk, index, seed_low, seed_high, draw)
    if has_basis:
        o_row = o_m + load_size(p_problem, T.start)
        mask = (1 << power) - 1
        b_row = ((o_row & mask) * load_size(p_problem, T.factor) + load_size(p_problem, T.shift)) & mask
        b_row = b_row.to(tl.uint32)
        m_row = o_m < load_size(p_problem, T.probes)
        b_paley = tl.load(p_problem + load_size(p_problem, T.paley) + (o_row >> power), mask=m_row, other=0)
        w0 = flip_by_basis(w0, b_row, b_paley, 4 * i_chunk, power)
        w1 = flip_by_basis(w1, b_row, b_paley, 4 * i_chunk + 1, power)
        w2 = flip_by_basis(w2, b_row, b_paley, 4 * i_chunk + 2, power)
        w3 = flip_by_basis(w3, b_row, b_paley, 4 * i_chunk + 3, power)
    return w0, w1, w2, w3


@triton.jit
def response_tile(p_problem, p_work, i_tile, seed_low, seed_high, step, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr,
                  USE_FEEDBACK: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """A tile of x (u_feedback B - u_weight W)', or, in the second half of a sparse problem with null, of x W'."""
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth if ALIGNED else 1
    probes, rows = load_size(p_problem, T.probes), load_size(p_problem, T.rows)
    group_rows, inputs = load_size(p_problem, T.group_rows), load_size(p_problem, T.inputs) // VECTOR * VECTOR
    row_tiles, probe_tiles = ceil_div(rows, TILE.BR), ceil_div(probes, TILE.BM)
    of_weight = i_tile >= row_tiles * probe_tiles
    i_tile = i_tile % (row_tiles * probe_tiles)
    o_r = i_tile % row_tiles * TILE.BR + tl.arange(0, TILE.BR)
    o_m = i_tile // row_tiles * TILE.BM + tl.arange(0, TILE.BM)
    u_feedback = tl.where(of_weight, 0.0, load_number(p_problem, T.u_feedback))
    u_weight = tl.where(of_weight, -1.0, load_number(p_problem, T.u_weight))
    p_w = kernel_pointer(p_problem, T.weight, ELEMENT, ALIGNED)
    p_b = kernel_pointer(p_problem, T.feedback, ELEMENT, ALIGNED)
    b_rows = tl.where(u_feedback != 0, rows, 0)  # a weight whose coefficient is 0 is not read
    w_strides, b_strides = load_strides(p_problem, T.w_strides), load_strides(p_problem, T.b_strides)
    b_sum = tl.full([TILE.BR, TILE.BM], 0.0, dtype=tl.float32)
    for i_chunk in range(ceil_div(inputs, 128)):
        words = load_words(p_problem, o_m, i_chunk, seed_low, seed_high, step, T)
        for i_word in tl.static_range(4):
            o_e = i_chunk * 128 + i_word * 32 + tl.arange(0, 32)
            m_e = (o_e < inputs)[None, :]
            o_w = kernel_offsets(w_strides, o_r, o_e, group_rows, ALIGNED, VECTOR)
            b_a = tl.load(p_w + o_w, mask=(o_r < rows)[:, None] & m_e, other=0.0).to(tl.float32)
            if USE_FEEDBACK:
                o_b = kernel_offsets(b_strides, o_r, o_e, group_rows, ALIGNED, VECTOR)
                b_b = tl.load(p_b + o_b, mask=(o_r < b_rows)[:, None] & m_e, other=0.0).to(tl.float32)
                # Exact if both coefficients are equal and B is close to W.
                b_a = u_feedback * (b_b - b_a) + (u_feedback - u_weight) * b_a
            b_bits = words[i_word][None, :] >> tl.arange(0, 32).to(tl.uint32)[:, None]
            b_sum = dot_signs(b_a, to_signs(b_bits, TILE.SIGNS), b_sum, TILE.W_PARTS)
    p_u = work_pointer(p_problem, p_work, T.u)
    if of_weight:
        p_u = work_pointer(p_problem, p_work, T.y)
    y_stride = load_stride(p_problem, T.y_stride)
    # The padding behind the rows is 0, so that it may be read.
    m_u = (o_r < y_stride)[:, None] & (o_m < probes)[None, :]
    tl.store(p_u + o_m[None, :] * y_stride + o_r[:, None], b_sum, mask=m_u)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def response_kernel(
    p_table,  # [PROBLEMS, T.COLUMNS] int64, as probe_table.Columns describes
    p_work,  # float32, y, u, moments and partial sums of all problems
    p_out,  # the gradients of all problems, in the dtype of the weights
    seed_low,  # halves of the 64-bit seed, as signed 32-bit numbers
    seed_high,
    step,
    USE_FEEDBACK: tl.constexpr,  # whether a response reads B
    PROBLEMS: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
):
    ELEMENT: tl.constexpr = p_out.dtype.element_ty
    p_problem, i_tile = find_problem(p_table, tl.program_id(0), T.first_response, T, PROBLEMS)
    if tl.load(p_problem + T.aligned) != 0:
        response_tile(p_problem, p_work, i_tile, seed_low, seed_high, step, ELEMENT, True, USE_FEEDBACK, T, TILE)
    else:
        response_tile(p_problem, p_work, i_tile, seed_low, seed_high, step, ELEMENT, False, USE_FEEDBACK, T, TILE)


@triton.jit
def gram_tile(p_problem, p_work, i_tile, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr,
              TILE: tl.constexpr):  # fmt: skip
    """A tile of y'y, masked to the blocks of the groups: [R, K], the row r' of the group of r in column r' % K.

    Returns the tile's parts of <B, y'y B> = <y'y, B B'> and of <B, B>.
    """
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth if ALIGNED else 1
    probes, rows = load_size(p_problem, T.probes), load_size(p_problem, T.rows)
    group_rows, inputs = load_size(p_problem, T.group_rows), load_size(p_problem, T.inputs) // VECTOR * VECTOR
    column_tiles = load_size(p_problem, T.moment_columns)
    i_row, i_column = i_tile // column_tiles, i_tile % column_tiles
    first = i_row * TILE.BS // group_rows * group_rows
    o_r = i_row * TILE.BS + tl.arange(0, TILE.BS)
    o_c = first + i_column * TILE.BS + tl.arange(0, TILE.BS)
    m_r, m_c = o_r < rows, o_c < rows
    m_group = m_r[:, None] & m_c[None, :] & ((o_r // group_rows)[:, None] == (o_c // group_rows)[None, :])
    one_group = group_rows == rows
    power, square = tl.full([], 0.0, dtype=tl.float32), tl.full([], 0.0, dtype=tl.float32)
    # One group has a symmetric matrix in aligned blocks: those above the diagonal are mirrored.
    if (i_column <= i_row) | (one_group == 0):
        p_y, y_stride = work_pointer(p_problem, p_work, T.y), load_stride(p_problem, T.y_stride)
        b_gram = tl.full([TILE.BS, TILE.BS], 0.0, dtype=tl.float32)
        for i in range(ceil_div(probes, TILE.BI)):
            o_m = i * TILE.BI + tl.arange(0, TILE.BI)
            m_m = o_m < probes
            p_rows = p_y + o_m[None, :] * y_stride + o_r[:, None]
            p_columns = p_y + o_m[:, None] * y_stride + o_c[None, :]
            b_r = tl.load(p_rows, mask=(o_r < y_stride)[:, None] & m_m[None, :], other=0.0)
            b_c = tl.load(p_columns, mask=(o_c < y_stride)[None, :] & m_m[:, None], other=0.0)
            b_gram = tl.dot(b_r, b_c, b_gram, input_precision=TILE.PRECISION)
        b_gram = tl.where(m_group, b_gram, 0.0)
        if load_size(p_problem, T.normalize) != 0:
            p_b, b_strides = (
                kernel_pointer(p_problem, T.feedback, ELEMENT, ALIGNED),
                load_strides(p_problem, T.b_strides),
            )
            b_feedback = tl.full([TILE.BS, TILE.BS], 0.0, dtype=tl.float32)
            for i in range(ceil_div(inputs, TILE.BI)):
                o_e = i * TILE.BI + tl.arange(0, TILE.BI)
                m_e = (o_e < inputs)[None, :]
                o_rows = kernel_offsets(b_strides, o_r, o_e, group_rows, ALIGNED, VECTOR)
                o_columns = kernel_offsets(b_strides, o_c, o_e, group_rows, ALIGNED, VECTOR)
                b_r = tl.load(p_b + o_rows, mask=m_r[:, None] & m_e, other=0.0).to(tl.float32)
                b_c = tl.load(p_b + o_columns, mask=m_c[:, None] & m_e, other=0.0).to(tl.float32)
                b_feedback = tl.dot(b_r, tl.trans(b_c), b_feedback, input_precision=TILE.PRECISION)
            power = sum_all(b_gram * b_feedback) * tl.where(one_group & (i_column < i_row), 2.0, 1.0)
            square = sum_all(tl.where(m_group & (o_r[:, None] == o_c[None, :]), b_feedback, 0.0))
        p_moment, stride = work_pointer(p_problem, p_work, T.moment), load_stride(p_problem, T.moment_stride)
        tl.store(p_moment + o_r[:, None] * stride + (o_c % group_rows)[None, :], b_gram, mask=m_group)
        if one_group & (i_column < i_row):
            tl.store(p_moment + o_c[None, :] * stride + o_r[:, None], b_gram, mask=m_group)
    return power, square


@triton.jit
def projection_tile(p_problem, p_work, i_tile, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr,
                    TILE: tl.constexpr):  # fmt: skip
    """A tile of z = y B [M, d] of a layer with one group; its parts of <z, z> = <B, y'y B> and of <B, B>."""
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth if ALIGNED else 1
    probes, rows = load_size(p_problem, T.probes), load_size(p_problem, T.rows)
    inputs, column_tiles = load_size(p_problem, T.inputs) // VECTOR * VECTOR, load_size(p_problem, T.moment_columns)
    o_m = i_tile // column_tiles * TILE.BS + tl.arange(0, TILE.BS)
    o_e = i_tile % column_tiles * TILE.BS + tl.arange(0, TILE.BS)
    m_m, m_e = o_m < probes, o_e < inputs
    p_y, y_stride = work_pointer(p_problem, p_work, T.y), load_stride(p_problem, T.y_stride)
    p_b, b_strides = kernel_pointer(p_problem, T.feedback, ELEMENT, ALIGNED), load_strides(p_problem, T.b_strides)
    b_z = tl.full([TILE.BS, TILE.BS], 0.0, dtype=tl.float32)
    b_square = tl.full([TILE.BI, TILE.BS], 0.0, dtype=tl.float32)
    for i in range(ceil_div(rows, TILE.BI)):
        o_r = i * TILE.BI + tl.arange(0, TILE.BI)
        m_r = o_r < rows
        o_y = o_m[:, None] * y_stride + o_r[None, :]
        b_y = tl.load(p_y + o_y, mask=m_m[:, None] & (o_r < y_stride)[None, :], other=0.0)
        o_b = kernel_offsets(b_strides, o_r, o_e, rows, ALIGNED, VECTOR)
        b_b = tl.load(p_b + o_b, mask=m_r[:, None] & m_e[None, :], other=0.0).to(tl.float32)
        b_z = tl.dot(b_y, b_b, b_z, input_precision=TILE.PRECISION)
        b_square += b_b * b_b
    p_z, z_stride = work_pointer(p_problem, p_work, T.moment), load_stride(p_problem, T.moment_stride)
    m_z = m_m[:, None] & (o_e < z_stride)[None, :]  # the padding is 0 here too
    tl.store(p_z + o_m[:, None] * z_stride + o_e[None, :], b_z, mask=m_z)
    return sum_all(b_z * b_z), tl.where(i_tile < column_tiles, sum_all(b_square), 0.0)


@triton.jit
def moment_kernel(
    p_table,  # as in response_kernel
    p_work,
    p_out,
    PROBLEMS: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
):
    ELEMENT: tl.constexpr = p_out.dtype.element_ty
    p_problem, i_tile = find_problem(p_table, tl.program_id(0), T.first_moment, T, PROBLEMS)
    aligned, projects = tl.load(p_problem + T.aligned) != 0, tl.load(p_problem + T.projects) != 0
    if projects:
        if aligned:
            power, square = projection_tile(p_problem, p_work, i_tile, ELEMENT, True, T, TILE)
        else:
            power, square = projection_tile(p_problem, p_work, i_tile, ELEMENT, False, T, TILE)
    else:
        if aligned:
            power, square = gram_tile(p_problem, p_work, i_tile, ELEMENT, True, T, TILE)
        else:
            power, square = gram_tile(p_problem, p_work, i_tile, ELEMENT, False, T, TILE)
    p_partial = p_work + tl.load(p_problem + T.partials) + i_tile
    tl.store(p_partial, power)
    tl.store(p_partial + tl.load(p_problem + T.moment_tiles), square)


@triton.jit
def null_scale(p_problem, p_work, T: tl.constexpr):
    """The factor of y'y B: null / M, or null <B, B> / <B, y'y B> if the rule is normalized, 0 if that is 0 / 0."""
    scale = load_number(p_problem, T.null)
    if load_size(p_problem, T.normalize) != 0:
        tiles = load_size(p_problem, T.moment_tiles)
        p_partial = p_work + tl.load(p_problem + T.partials)
        b_power, b_square = tl.full([1024], 0.0, dtype=tl.float32), tl.full([1024], 0.0, dtype=tl.float32)
        for i in range(ceil_div(tiles, 1024)):
            o = i * 1024 + tl.arange(0, 1024)
            b_power += tl.load(p_partial + o, mask=o < tiles, other=0.0)
            b_square += tl.load(p_partial + tiles + o, mask=o < tiles, other=0.0)
        power = sum_all(b_power)
        scale *= tl.where(power > 0, sum_all(b_square) / tl.where(power > 0, power, 1.0), 0.0)
    return scale


@triton.jit
def gradient_tile(p_problem, p_work, p_out, i_tile, seed_low, seed_high, step, ALIGNED: tl.constexpr,
                  HAS_NULL: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """A tile of u_scale u'x + null_scale y'y B + decay B - self W."""
    ELEMENT: tl.constexpr = p_out.dtype.element_ty
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth if ALIGNED else 1
    probes, rows = load_size(p_problem, T.probes), load_size(p_problem, T.rows)
    group_rows, inputs = load_size(p_problem, T.group_rows), load_size(p_problem, T.inputs) // VECTOR * VECTOR
    y_stride = load_stride(p_problem, T.y_stride)
    row_tiles = ceil_div(rows, TILE.BR)
    i_row, i_chunk = i_tile % row_tiles, i_tile // row_tiles
    o_r = i_row * TILE.BR + tl.arange(0, TILE.BR)
    o_e = i_chunk * 128 + tl.arange(0, 128)
    m_r, m_f = o_r < rows, (o_r < rows)[:, None] & (o_e < inputs)[None, :]
    p_b, b_strides = kernel_pointer(p_problem, T.feedback, ELEMENT, ALIGNED), load_strides(p_problem, T.b_strides)

    b_f = tl.full([TILE.BR, 128], 0.0, dtype=tl.float32)
    u_scale = load_number(p_problem, T.u_scale)
    p_u = work_pointer(p_problem, p_work, T.u)
    for i in range(tl.where(u_scale != 0, ceil_div(probes, TILE.BP), 0)):
        o_m = i * TILE.BP + tl.arange(0, TILE.BP)
        m_u = (o_r < y_stride)[:, None] & (o_m < probes)[None, :]
        b_u = tl.load(p_u + o_m[None, :] * y_stride + o_r[:, None], mask=m_u, other=0.0)
        words = load_words(p_problem, o_m, i_chunk, seed_low, seed_high, step, T)
        b_x = word_signs(words, TILE.BP, TILE.SIGNS)
        b_f = dot_signs(b_u, b_x, b_f, TILE.Y_PARTS)
    b_f *= u_scale

    if HAS_NULL:
        scale = null_scale(p_problem, p_work, T)
        # The sum of (y'y)[i, r] B[i, e] over the rows i of the groups of this tile, or of y[i, r] z[i, e] over probes.
        projects = tl.load(p_problem + T.projects) != 0
        first = tl.where(projects, 0, i_row * TILE.BR // group_rows * group_rows)
        last = tl.minimum(((i_row + 1) * TILE.BR - 1) // group_rows * group_rows + group_rows, rows)
        last = tl.where(scale != 0, tl.where(projects, probes, last), first)
        stride, p_moment = load_stride(p_problem, T.moment_stride), work_pointer(p_problem, p_work, T.moment)
        p_left = p_moment
        if projects:
            p_left = work_pointer(p_problem, p_work, T.y)
        left_stride = tl.where(projects, y_stride, stride)
        group_terms = tl.where(projects, probes, group_rows)  # terms of the sum that belong to one group
        # Each of B and z has a mask of its own, and that of the other is false: one of both is read.
        last_row, last_probe = tl.where(projects, 0, last), tl.where(projects, last, 0)
        for i in range(ceil_div(last - first, TILE.BI)):
            o_i = first + i * TILE.BI + tl.arange(0, TILE.BI)
            m_i = o_i < last
            m_left = (o_r // group_rows)[:, None] == (o_i // group_terms)[None, :]
            o_left = o_i[None, :] * left_stride + (o_r % group_rows)[:, None]
            b_left = tl.load(p_left + o_left, mask=m_left & m_r[:, None] & m_i[None, :], other=0.0)
            m_e = (o_e < inputs)[None, :]
            o_b = kernel_offsets(b_strides, o_i, o_e, group_rows, ALIGNED, VECTOR)
            b_right = tl.load(p_b + o_b, mask=(o_i < last_row)[:, None] & m_e, other=0.0).to(tl.float32)
            m_z = (o_i < last_probe)[:, None] & (o_e < stride)[None, :]
            b_right += tl.load(p_moment + o_i[:, None] * stride + o_e[None, :], mask=m_z, other=0.0)
            b_f = tl.dot(b_left * scale, b_right, b_f, input_precision=TILE.PRECISION)

    decay, self_ = load_number(p_problem, T.decay), load_number(p_problem, T.self_)
    o_b = kernel_offsets(b_strides, o_r, o_e, group_rows, ALIGNED, VECTOR)
    o_w = kernel_offsets(load_strides(p_problem, T.w_strides), o_r, o_e, group_rows, ALIGNED, VECTOR)
    m_e = (o_e < inputs)[None, :]
    m_b, m_w = (
        (o_r < tl.where(decay != 0, rows, 0))[:, None] & m_e,
        (o_r < tl.where(self_ != 0, rows, 0))[:, None] & m_e,
    )
    b_b = tl.load(p_b + o_b, mask=m_b, other=0.0).to(tl.float32)
    p_w = kernel_pointer(p_problem, T.weight, ELEMENT, ALIGNED)
    b_w = tl.load(p_w + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_f += decay * (b_b - b_w) + (decay - self_) * b_w
    o_f = kernel_offsets(load_strides(p_problem, T.o_strides), o_r, o_e, group_rows, ALIGNED, VECTOR)
    tl.store(p_out + tl.load(p_problem + T.out) // 16 * 16 + o_f, b_f.to(ELEMENT), mask=m_f)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def gradient_kernel(
    p_table,  # as in response_kernel
    p_work,
    p_out,
    seed_low,
    seed_high,
    step,
    HAS_NULL: tl.constexpr,
    PROBLEMS: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
):
    p_problem, i_tile = find_problem(p_table, tl.program_id(0), T.first_gradient, T, PROBLEMS)
    if tl.load(p_problem + T.aligned) != 0:
        gradient_tile(p_problem, p_work, p_out, i_tile, seed_low, seed_high, step, True, HAS_NULL, T, TILE)
    else:
        gradient_tile(p_problem, p_work, p_out, i_tile, seed_low, seed_high, step, False, HAS_NULL, T, TILE)
