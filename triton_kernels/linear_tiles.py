"""The factored skeleton: features of the keys accumulate into a state, features of the queries read it out.

With R factors the feature vector of a token is the face-splitting product of R small ones,

    f[a_1, .., a_R] = phi(x^1)[a_1] ... phi(x^R)[a_R],         P = d_1 ... d_R of them,

and o_i = f(q_i) S / (f(q_i) z + eps) with S = sum_j f(k_j) v_j^T, z = sum_j f(k_j). f never reaches device memory: a flat
index p = (outer, inner) stands for the factors before the last and the last one, and a tile of f is a few columns of the
outer factors times a tile of the inner one. The pairs of a short stretch of tokens are computed directly instead:
f(q_i).f(k_j) is the product of the R products phi(q^r_i).phi(k^r_j).

Sequences are cut into pieces. Causal attention reads the state before its piece and pairs directly inside it; bidirectional
attention reads the state of the whole sequence, or pairs directly with all of it.

    accumulate    the state of every piece, added over the query heads of a group where the state belongs to gradients
    combine       states before (or after) each piece, or of each sequence, in a fixed order; initial and final states
    read          what rows take from a state and from the columns they pair with: o from the keys, dv from the queries
    grad          gradients of the factors of rows: dq from the keys, dk from the queries

The gradients are the same two passes again: with dO' = dO / (f z + eps) and y = -(dO . o) / (f z + eps), the pair (i, j) has
dA_ij = dO'_i . v_j + y_i. So queries read (S, z) with (dO', y), and keys read T = sum_i f(q_i) (dO'_i, y_i) with (v, 1).
"""

import triton
import triton.language as tl

from .tiles import at, load_tile, load_vector, store_tile, tile_mask, tile_pointers


@triton.jit
def heads_of(xs, strides, batch, head):
    """Pointers to the first row of one (batch, head) of every factor."""
    heads = ()
    for r in tl.static_range(len(xs)):
        heads = heads + (at(xs[r], strides[r], batch, head),)
    return heads


@triton.jit
def to_bfloat16(tile):
    return tile.to(tl.bfloat16)


@triton.jit
def to_float32(tile):
    return tile.to(tl.float32)


@triton.jit
def to_tf32(tile):
    """Rounded to the ten bits that a product reads: it cuts the others off, which makes sums of positive numbers too small."""
    tile = tile.to(tl.float32)
    bits = (tile.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(tile == tile, bits.to(tl.float32, bitcast=True), tile)  # the carry could turn a NaN into 0


@triton.jit
def zero_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def load_features(base, rows, stride, num_rows, FEATURE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A float32 tile of phi(x), with zeros outside the matrix (phi(0) may differ from 0)."""
    mask = tile_mask(rows, num_rows, WIDTH, BLOCK)
    x = tl.load(tile_pointers(base, rows, stride, BLOCK), mask=mask, other=0.0)
    return tl.where(mask, FEATURE(x.to(tl.float32)), 0.0)


@triton.jit
def load_inner(base, rows, stride, num_rows, columns, FEATURE: tl.constexpr, WIDTH: tl.constexpr):
    """The same for some of the columns."""
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    return tl.where(mask, FEATURE(x.to(tl.float32)), 0.0)


@triton.jit
def load_all_features(
    xs, rows, strides, num_rows, FEATURE: tl.constexpr, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, OPERAND: tl.constexpr
):
    """The tiles of every factor, ready for products."""
    tiles = ()
    for r in tl.static_range(len(WIDTHS)):
        tile = load_features(xs[r], rows, strides[r][2], num_rows, FEATURE, WIDTHS[r], BLOCKS[r])
        tiles = tiles + (OPERAND(tile),)
    return tiles


@triton.jit
def load_outer(
    xs, rows, strides, mask, outer, FEATURE: tl.constexpr, WIDTHS: tl.constexpr, DIVISORS: tl.constexpr, SKIP: tl.constexpr
):
    """Product of the features of the factors before the last, except factor SKIP, at a flat index; operands broadcast."""
    product = tl.where(mask, 1.0, 0.0)
    for r in tl.static_range(len(DIVISORS)):
        if r != SKIP:
            column = outer // DIVISORS[r] % WIDTHS[r]
            x = tl.load(xs[r] + rows.to(tl.int64) * strides[r][2] + column, mask=mask, other=0.0)
            product *= FEATURE(x.to(tl.float32))
    return product


@triton.jit
def load_values(y, rows, stride, num_rows, factors, DV: tl.constexpr, BLOCK_DV: tl.constexpr, OPERAND: tl.constexpr):
    """A tile of values, its rows multiplied by their factors if there are any."""
    tile = load_tile(y, rows, stride, num_rows, DV, BLOCK_DV)
    if factors is not None:
        tile = tile.to(tl.float32) * load_vector(factors, rows, num_rows, 0.0)[:, None]
    return OPERAND(tile)


@triton.jit
def columns_of(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of a tile, a power of two of at most 16, as a tuple."""
    parts = (tile,)
    for level in tl.static_range(4):
        if COLUMNS >= 2 ** (level + 1):
            halves = ()
            for i in tl.static_range(2**level):
                left, right = halve_columns(parts[i], ROWS, COLUMNS // 2 ** (level + 1))
                halves = halves + (left, right)
            parts = halves
    columns = ()
    for i in tl.static_range(COLUMNS):
        columns = columns + (tl.reshape(parts[i], (ROWS,)),)
    return columns


@triton.jit
def halve_columns(tile, ROWS: tl.constexpr, HALF: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def accumulate(
    xs, y, y_factors, weights, partials, partial_norms, pieces,
    x_strides, y_strides, num_tokens, num_heads, group, num_tiles, num_pieces, piece_length,
    FEATURE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    WIDTHS: tl.constexpr, DIVISORS: tl.constexpr, NUM_OUTER: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """partials (B, H, pieces, P, Dv) and partial_norms (B, H, pieces, P): sums of f y^T and f w over the tokens of a piece.

    num_heads: heads of the state; each sums over `group` heads of the tokens. weights None: all 1. A program takes the
    features of BLOCK_OUTER outer indices, whose products share the tile of the inner factor and the tile of values.
    """
    R: tl.constexpr = len(WIDTHS)
    INNER: tl.constexpr = WIDTHS[R - 1]
    INNER_TILES: tl.constexpr = (INNER + BLOCK_INNER - 1) // BLOCK_INNER
    program = tl.program_id(0)
    tile, program = program % num_tiles, program // num_tiles
    piece, program = program % num_pieces, program // num_pieces
    head, batch = program % num_heads, program // num_heads
    begin, end = piece_span(piece, pieces, num_pieces, num_tokens, piece_length)
    first_outer = tile // INNER_TILES * BLOCK_OUTER
    inner_index = tile % INNER_TILES * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    outer = first_outer + tl.arange(0, BLOCK_OUTER)
    NORMS_BY_PRODUCT: tl.constexpr = BLOCK_OUTER >= 16  # the fewest rows of a product

    accs = ()
    for _ in tl.static_range(BLOCK_OUTER):
        accs = accs + (zero_tile(BLOCK_INNER, BLOCK_DV),)
    norms = tl.zeros((BLOCK_OUTER, BLOCK_INNER), tl.float32)
    norm_rows = ()
    for _ in tl.static_range(BLOCK_OUTER):
        norm_rows = norm_rows + (tl.zeros((BLOCK_INNER,), tl.float32),)
    for member in range(group):
        token_head = head * group + member
        x = heads_of(xs, x_strides, batch, token_head)
        row_offset = (batch.to(tl.int64) * num_heads * group + token_head) * num_tokens
        factors = None if y_factors is None else y_factors + row_offset
        for first in range(begin, end, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            inner = load_inner(x[R - 1], rows, x_strides[R - 1][2], end, inner_index, FEATURE, INNER)
            y_tile = load_values(at(y, y_strides, batch, token_head), rows, y_strides[2], end, factors, DV, BLOCK_DV, OPERAND)
            in_range = (rows < end)[:, None] & (outer < NUM_OUTER)[None, :]
            scale = load_outer(x, rows[:, None], x_strides, in_range, outer[None, :], FEATURE, WIDTHS, DIVISORS, -1)
            weight = None if weights is None else load_vector(weights + row_offset, rows, end, 0.0)
            if NORMS_BY_PRODUCT:
                weighted = scale if weights is None else scale * weight[:, None]
                norms = tl.dot(OPERAND(tl.trans(weighted)), OPERAND(inner), norms, input_precision=PRECISION)
            transposed = tl.trans(inner)
            columns = columns_of(scale, BLOCK_N, BLOCK_OUTER)
            new_accs, new_norm_rows = (), ()
            for i in tl.static_range(BLOCK_OUTER):
                features = transposed if R == 1 else transposed * columns[i][None, :]
                new_accs = new_accs + (tl.dot(OPERAND(features), y_tile, accs[i], input_precision=PRECISION),)
                if not NORMS_BY_PRODUCT:
                    weighted_row = features if weights is None else features * weight[None, :]
                    new_norm_rows = new_norm_rows + (norm_rows[i] + tl.sum(weighted_row, 1),)
            accs = new_accs
            if not NORMS_BY_PRODUCT:
                norm_rows = new_norm_rows

    state = ((batch.to(tl.int64) * num_heads + head) * num_pieces + piece) * (NUM_OUTER * INNER)
    if NORMS_BY_PRODUCT:
        pointers = partial_norms + state + outer[:, None] * INNER + inner_index[None, :]
        tl.store(pointers, norms, mask=(outer < NUM_OUTER)[:, None] & (inner_index < INNER)[None, :])
    for i in tl.static_range(BLOCK_OUTER):
        if first_outer + i < NUM_OUTER:
            if not NORMS_BY_PRODUCT:
                pointers = partial_norms + state + (first_outer + i) * INNER + inner_index
                tl.store(pointers, norm_rows[i], mask=inner_index < INNER)
            base = partials + (state + (first_outer + i) * INNER) * DV
            store_tile(base, inner_index, DV, INNER, accs[i], DV, BLOCK_DV)


@triton.jit
def combine(
    partials, partial_norms, initial, states, norms, final, first_pieces,
    num_heads, num_pieces, num_sequences,
    PREFIX: tl.constexpr, REVERSE: tl.constexpr, NUM_FEATURES: tl.constexpr, DV: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """Add the pieces of a sequence onto its initial state, the last piece first when REVERSE.

    PREFIX: states and norms get, for every piece, the sum before it was added; otherwise, for every sequence, the total.
    initial and final are (sequences, H, P, Dv + 1), the norms in the last column; each may be None.
    """
    P_TILES: tl.constexpr = (NUM_FEATURES + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    tile, program = program % P_TILES, program // P_TILES
    head, sequence = program % num_heads, program // num_heads
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    value = tl.arange(0, BLOCK_DV)
    valid = p < NUM_FEATURES
    mask = valid[:, None] & (value < DV)[None, :]
    offsets = p[:, None] * DV + value[None, :]
    packed_offsets = p[:, None] * (DV + 1) + value[None, :]
    sequence_state = (sequence.to(tl.int64) * num_heads + head) * NUM_FEATURES

    if initial is None:
        acc = tl.zeros((BLOCK_P, BLOCK_DV), tl.float32)
        acc_norms = tl.zeros((BLOCK_P,), tl.float32)
    else:
        initial += sequence_state * (DV + 1)
        acc = tl.load(initial + packed_offsets, mask=mask, other=0.0)
        acc_norms = tl.load(initial + p * (DV + 1) + DV, mask=valid, other=0.0)

    if first_pieces is None:
        first_state = sequence_state // NUM_FEATURES * num_pieces
        count = num_pieces
    else:
        first_piece = tl.load(first_pieces + sequence)
        first_state = head.to(tl.int64) * num_pieces + first_piece
        count = tl.load(first_pieces + sequence + 1) - first_piece
    for step in range(0, count, AT_ONCE):
        # Load several pieces at once; otherwise their latencies would add up.
        loaded = ()
        for i in tl.static_range(AT_ONCE):
            piece = count - 1 - (step + i) if REVERSE else step + i
            there = step + i < count
            state = (first_state + piece) * NUM_FEATURES
            part = tl.load(partials + state * DV + offsets, mask=mask & there, other=0.0)
            loaded = loaded + ((part, tl.load(partial_norms + state + p, mask=valid & there, other=0.0)),)
        for i in tl.static_range(AT_ONCE):
            if PREFIX:
                piece = count - 1 - (step + i) if REVERSE else step + i
                there = step + i < count
                state = (first_state + piece) * NUM_FEATURES
                tl.store(states + state * DV + offsets, acc.to(states.dtype.element_ty), mask=mask & there)
                tl.store(norms + state + p, acc_norms, mask=valid & there)
            acc += loaded[i][0]
            acc_norms += loaded[i][1]

    if not PREFIX:
        state = sequence_state if first_pieces is None else (head.to(tl.int64) * num_sequences + sequence) * NUM_FEATURES
        tl.store(states + state * DV + offsets, acc.to(states.dtype.element_ty), mask=mask)
        tl.store(norms + state + p, acc_norms, mask=valid)
    if final is not None:
        final += sequence_state * (DV + 1)
        tl.store(final + packed_offsets, acc, mask=mask)
        tl.store(final + p * (DV + 1) + DV, acc_norms, mask=valid)


@triton.jit
def piece_span(piece, pieces, num_pieces, num_tokens, piece_length):
    """Begin and end of the tokens of a piece; the table `pieces` is that of packing.py, None for one sequence a batch."""
    if pieces is None:
        begin = piece * piece_length
        return begin, tl.minimum(begin + piece_length, num_tokens)
    else:
        return tl.load(pieces + piece), tl.load(pieces + num_pieces + piece)


@triton.jit
def row_span(
    tile, pieces, num_pieces, num_rows, num_columns, piece_length,
    CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """(first row, end of the rows, index of their state, begin and end of the columns that some of them pair with).

    TRANSPOSED: rows are keys and columns queries, so that a row pairs with the columns from itself on.
    """
    if pieces is None and not CAUSAL:
        return tile * BLOCK_M, num_rows, 0, 0, num_columns
    else:
        tiles_of_piece = piece_length // BLOCK_M
        piece = tile // tiles_of_piece
        begin, end = piece_span(piece, pieces, num_pieces, num_rows, piece_length)
        first = begin + tile % tiles_of_piece * BLOCK_M
        if not CAUSAL:
            sequence = pieces + 2 * num_pieces + piece
            return first, end, tl.load(sequence), tl.load(sequence + num_pieces), tl.load(sequence + 2 * num_pieces)
        elif TRANSPOSED:
            return first, end, piece, first, end
        else:
            return first, end, piece, begin, tl.minimum(first + BLOCK_M, end)


@triton.jit
def pairs_mask(rows, columns, column_end, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr):
    mask = (columns < column_end)[None, :]
    if CAUSAL and TRANSPOSED:
        mask = mask & (columns[None, :] >= rows[:, None])
    elif CAUSAL:
        mask = mask & (columns[None, :] <= rows[:, None])
    return mask


@triton.jit
def similarity(x_tiles, c_tiles, PRECISION: tl.constexpr):
    """Product of the similarities of all factors: A of rows and columns."""
    weight = tl.dot(x_tiles[0], tl.trans(c_tiles[0]), input_precision=PRECISION)
    for r in tl.static_range(1, len(x_tiles)):
        weight *= tl.dot(x_tiles[r], tl.trans(c_tiles[r]), input_precision=PRECISION)
    return weight


@triton.jit
def read(
    xs, cs, ys, y_factors, states, norms, out, inverse, pieces,
    x_strides, c_strides, y_strides, out_strides,
    num_rows, num_columns, num_heads, num_column_heads, num_tiles, num_pieces, num_states, piece_length, eps,
    FEATURE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr, DIRECT: tl.constexpr,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, DIVISORS: tl.constexpr, NUM_OUTER: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """out = f(x) S + sum_j A_ij y_j, divided by its norm f(x) z + sum_j A_ij + eps where `inverse` is given.

    Rows have factors xs, columns cs and values ys. states None: nothing is read. DIRECT: rows pair with columns.
    """
    R: tl.constexpr = len(WIDTHS)
    INNER: tl.constexpr = WIDTHS[R - 1]
    program = tl.program_id(0)
    tile, program = program % num_tiles, program // num_tiles
    head, batch = program % num_heads, program // num_heads
    first, row_end, state, column_begin, column_end = row_span(
        tile, pieces, num_pieces, num_rows, num_columns, piece_length, CAUSAL, TRANSPOSED, BLOCK_M
    )
    if first >= row_end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    in_rows = rows < row_end
    x = heads_of(xs, x_strides, batch, head)
    state_heads = num_heads if TRANSPOSED else num_column_heads
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)

    if states is not None:
        state_head = batch.to(tl.int64) * state_heads + head * state_heads // num_heads
        features = (state_head * num_states + state) * (NUM_OUTER * INNER)
        for first_inner in tl.static_range(0, INNER, BLOCK_INNER):
            index = first_inner + tl.arange(0, BLOCK_INNER)
            inner = load_inner(x[R - 1], rows, x_strides[R - 1][2], row_end, index, FEATURE, INNER)
            for outer in range(NUM_OUTER):
                p = features + outer * INNER + index
                s_tile = load_tile(states, p, DV, features + outer * INNER + INNER, DV, BLOCK_DV)
                f_tile = inner
                if R > 1:
                    f_tile *= load_outer(x, rows, x_strides, in_rows, outer, FEATURE, WIDTHS, DIVISORS, -1)[:, None]
                acc = tl.dot(OPERAND(f_tile), OPERAND(s_tile), acc, input_precision=PRECISION)
            if inverse is not None:
                for first_outer in range(0, NUM_OUTER, BLOCK_OUTER):
                    outers = first_outer + tl.arange(0, BLOCK_OUTER)
                    mask = (index < INNER)[:, None] & (outers < NUM_OUTER)[None, :]
                    pointers = norms + features + outers[None, :] * INNER + index[:, None]
                    z_tile = OPERAND(tl.load(pointers, mask=mask, other=0.0))
                    mask = in_rows[:, None] & (outers < NUM_OUTER)[None, :]
                    scale = load_outer(x, rows[:, None], x_strides, mask, outers[None, :], FEATURE, WIDTHS, DIVISORS, -1)
                    norm += tl.sum(scale * tl.dot(OPERAND(inner), z_tile, input_precision=PRECISION), 1)

    if DIRECT:
        x_tiles = load_all_features(x, rows, x_strides, row_end, FEATURE, WIDTHS, BLOCKS, OPERAND)
        members = num_column_heads // num_heads if TRANSPOSED else 1
        for member in range(members):
            column_head = head * members + member if TRANSPOSED else head * num_column_heads // num_heads
            c = heads_of(cs, c_strides, batch, column_head)
            y = at(ys, y_strides, batch, column_head)
            factors = y_factors
            if y_factors is not None:
                factors += (batch.to(tl.int64) * num_column_heads + column_head) * num_columns
            for first_column in range(column_begin, column_end, BLOCK_N):
                columns = first_column + tl.arange(0, BLOCK_N)
                c_tiles = load_all_features(c, columns, c_strides, column_end, FEATURE, WIDTHS, BLOCKS, OPERAND)
                y_tile = OPERAND(load_tile(y, columns, y_strides[2], column_end, DV, BLOCK_DV))
                weight = similarity(x_tiles, c_tiles, PRECISION)
                if y_factors is not None:
                    weight *= load_vector(factors, columns, column_end, 0.0)[None, :]
                weight = tl.where(pairs_mask(rows, columns, column_end, CAUSAL, TRANSPOSED), weight, 0.0)
                norm += tl.sum(weight, 1)
                acc = tl.dot(OPERAND(weight), y_tile, acc, input_precision=PRECISION)

    if inverse is not None:
        norm += eps
        reciprocal = tl.where(norm == 0.0, 0.0, tl.div_rn(1.0, norm))
        acc *= reciprocal[:, None]
        tl.store(inverse + (batch.to(tl.int64) * num_heads + head) * num_rows + rows, reciprocal, mask=in_rows)
    store_tile(at(out, out_strides, batch, head), rows, out_strides[2], row_end, acc, DV, BLOCK_DV)


@triton.jit
def grad(
    xs, row_values, inverse, row_weights, cs, column_values, column_factors, column_weights, states, norms, dxs, pieces,
    x_strides, row_strides, c_strides, column_strides, dx_strides,
    num_rows, num_columns, num_heads, num_column_heads, num_tiles, num_pieces, num_states, piece_length,
    FEATURE: tl.constexpr, FEATURE_GRAD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr, DIRECT: tl.constexpr,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, DIVISORS: tl.constexpr, NUM_OUTER: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """Gradients of the factors of rows from dA = row value . column value + weight, the weight being that of the query.

    Rows are queries: their values are dO, to be scaled by `inverse`, and row_weights, -(dO . o) * inverse, is written here.
    TRANSPOSED: rows are keys with values v, and the columns, queries, bring their factors and weights.
    """
    R: tl.constexpr = len(WIDTHS)
    INNER: tl.constexpr = WIDTHS[R - 1]
    program = tl.program_id(0)
    tile, program = program % num_tiles, program // num_tiles
    head, batch = program % num_heads, program // num_heads
    first, row_end, state, column_begin, column_end = row_span(
        tile, pieces, num_pieces, num_rows, num_columns, piece_length, CAUSAL, TRANSPOSED, BLOCK_M
    )
    if first >= row_end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    in_rows = rows < row_end
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_rows
    x = heads_of(xs, x_strides, batch, head)
    values = at(row_values, row_strides, batch, head)

    dx_tiles = ()
    for r in tl.static_range(R):
        dx_tiles = dx_tiles + (zero_tile(BLOCK_M, BLOCKS[r]),)

    if states is not None:
        state_heads = num_heads if TRANSPOSED else num_column_heads
        state_head = batch.to(tl.int64) * state_heads + head * state_heads // num_heads
        features = (state_head * num_states + state) * (NUM_OUTER * INNER)
        inner_index = tl.arange(0, BLOCKS[R - 1])
        inner = load_features(x[R - 1], rows, x_strides[R - 1][2], row_end, FEATURE, INNER, BLOCKS[R - 1])
        for outer in range(NUM_OUTER):
            p = features + outer * INNER + inner_index
            p_end = features + outer * INNER + INNER
            slope = zero_tile(BLOCK_M, BLOCKS[R - 1])
            if TRANSPOSED:
                slope += tl.load(norms + p, mask=inner_index < INNER, other=0.0)[None, :]
            for first_value in tl.static_range(0, DV, BLOCK_VALUES):
                y_tile = OPERAND(load_tile(values + first_value, rows, row_strides[2], row_end, DV - first_value, BLOCK_VALUES))
                s_tile = load_tile(states + first_value, p, DV, p_end, DV - first_value, BLOCK_VALUES)
                slope = tl.dot(y_tile, tl.trans(OPERAND(s_tile)), slope, input_precision=PRECISION)
            dx_tiles = add_outer_gradients(
                dx_tiles, slope, x, rows, x_strides, in_rows, inner, outer, FEATURE, WIDTHS, BLOCKS, DIVISORS
            )

    if DIRECT:
        x_tiles = load_all_features(x, rows, x_strides, row_end, FEATURE, WIDTHS, BLOCKS, OPERAND)
        row_tile = OPERAND(load_tile(values, rows, row_strides[2], row_end, DV, BLOCK_DV))

    if not TRANSPOSED:
        weight = tl.zeros((BLOCK_M,), tl.float32)
        if inverse is not None:
            # Sum dO . o from the same terms that it is subtracted from: o was rounded, and for a single pair the result is 0.
            delta = tl.zeros((BLOCK_M,), tl.float32)
            if states is not None:
                delta += tl.sum(inner * dx_tiles[R - 1], 1)
            if DIRECT:
                key_head = head * num_column_heads // num_heads
                keys, key_values = heads_of(cs, c_strides, batch, key_head), at(column_values, column_strides, batch, key_head)
                for first_column in range(column_begin, column_end, BLOCK_N):
                    columns = first_column + tl.arange(0, BLOCK_N)
                    c_tiles = load_all_features(keys, columns, c_strides, column_end, FEATURE, WIDTHS, BLOCKS, OPERAND)
                    y_tile = OPERAND(load_tile(key_values, columns, column_strides[2], column_end, DV, BLOCK_DV))
                    slope = tl.dot(row_tile, tl.trans(y_tile), input_precision=PRECISION)
                    slope *= similarity(x_tiles, c_tiles, PRECISION)
                    delta += tl.sum(tl.where(pairs_mask(rows, columns, column_end, CAUSAL, TRANSPOSED), slope, 0.0), 1)
            factor = load_vector(inverse + row_offset, rows, row_end, 0.0)
            weight = -delta * factor * factor
            if states is not None:
                scaled = ()
                for r in tl.static_range(R):
                    scaled = scaled + (dx_tiles[r] * factor[:, None],)
                dx_tiles = scaled
                for outer in range(NUM_OUTER):
                    p = features + outer * INNER + inner_index
                    slope = weight[:, None] * tl.load(norms + p, mask=inner_index < INNER, other=0.0)[None, :]
                    dx_tiles = add_outer_gradients(
                        dx_tiles, slope, x, rows, x_strides, in_rows, inner, outer, FEATURE, WIDTHS, BLOCKS, DIVISORS
                    )
        tl.store(row_weights + row_offset + rows, weight, mask=in_rows)

    if DIRECT:
        members = num_column_heads // num_heads if TRANSPOSED else 1
        for member in range(members):
            column_head = head * members + member if TRANSPOSED else head * num_column_heads // num_heads
            c = heads_of(cs, c_strides, batch, column_head)
            y = at(column_values, column_strides, batch, column_head)
            column_offset = (batch.to(tl.int64) * num_column_heads + column_head) * num_columns
            for first_column in range(column_begin, column_end, BLOCK_N):
                columns = first_column + tl.arange(0, BLOCK_N)
                c_tiles = load_all_features(c, columns, c_strides, column_end, FEATURE, WIDTHS, BLOCKS, OPERAND)
                y_tile = OPERAND(load_tile(y, columns, column_strides[2], column_end, DV, BLOCK_DV))
                slope = tl.dot(row_tile, tl.trans(y_tile), input_precision=PRECISION)
                if TRANSPOSED:
                    if column_factors is not None:
                        slope *= load_vector(column_factors + column_offset, columns, column_end, 0.0)[None, :]
                    slope += load_vector(column_weights + column_offset, columns, column_end, 0.0)[None, :]
                elif inverse is not None:
                    slope = slope * factor[:, None] + weight[:, None]
                slope = tl.where(pairs_mask(rows, columns, column_end, CAUSAL, TRANSPOSED), slope, 0.0)
                dx_tiles = add_pair_gradients(dx_tiles, slope, x_tiles, c_tiles, PRECISION, OPERAND)

    for r in tl.static_range(R):
        raw = load_tile(x[r], rows, x_strides[r][2], row_end, WIDTHS[r], BLOCKS[r]).to(tl.float32)
        dx = at(dxs[r], dx_strides[r], batch, head)
        store_tile(dx, rows, dx_strides[r][2], row_end, dx_tiles[r] * FEATURE_GRAD(raw), WIDTHS[r], BLOCKS[r])


@triton.jit
def add_outer_gradients(
    dx_tiles, slope, x, rows, x_strides, in_rows, inner, outer,
    FEATURE: tl.constexpr, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, DIVISORS: tl.constexpr,
):
    """Spread slope, the gradient of f[outer, :], over the features of the factors."""
    R: tl.constexpr = len(WIDTHS)
    new_tiles = ()
    if R > 1:
        at_outer = tl.sum(inner * slope, 1)
        slope *= load_outer(x, rows, x_strides, in_rows, outer, FEATURE, WIDTHS, DIVISORS, -1)[:, None]
        for r in tl.static_range(R - 1):
            others = load_outer(x, rows, x_strides, in_rows, outer, FEATURE, WIDTHS, DIVISORS, r)
            here = tl.arange(0, BLOCKS[r]) == outer // DIVISORS[r] % WIDTHS[r]
            new_tiles = new_tiles + (dx_tiles[r] + tl.where(here[None, :], (at_outer * others)[:, None], 0.0),)
    return new_tiles + (dx_tiles[R - 1] + slope,)


@triton.jit
def add_pair_gradients(dx_tiles, slope, x_tiles, c_tiles, PRECISION: tl.constexpr, OPERAND: tl.constexpr):
    """dx^r += sum_j dA_ij (product of the other factors' similarities) c^r_j."""
    R: tl.constexpr = len(x_tiles)
    similarities = ()
    if R > 1:
        for r in tl.static_range(R):
            similarities = similarities + (tl.dot(x_tiles[r], tl.trans(c_tiles[r]), input_precision=PRECISION),)
    new_tiles = ()
    for r in tl.static_range(R):
        others = slope
        for s in tl.static_range(R):
            if s != r:
                others *= similarities[s]
        new_tiles = new_tiles + (tl.dot(OPERAND(others), c_tiles[r], dx_tiles[r], input_precision=PRECISION),)
    return new_tiles
