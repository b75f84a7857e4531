"""Tile helpers shared by every kernel: program coordinates, masked loads and stores, locality arithmetic, selection bits."""

import triton
import triton.language as tl

from nearfar.runtime.private import knobs

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
WORD: tl.constexpr = tl.constexpr(32)  # bits per word of a saved selection
INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)  # the interpreter does not support inline assembly


@triton.jit
def program_coordinates(num_tiles, num_heads):
    """(tile, head, batch) of this program in a one-dimensional grid, tiles fastest so that neighbours share keys in L2."""
    program = tl.program_id(0)
    tile = program % num_tiles
    head = (program // num_tiles) % num_heads
    batch = program // num_tiles // num_heads
    return tile, head, batch


@triton.jit
def shared_coordinates(num_tiles, num_heads, together):
    """The same where each program reads all that its head has: `together` heads at a time, whose tokens fit in L2.

    Of those, the programs of one tile start before the programs of the next.
    """
    program = tl.program_id(0)
    first = program // (together * num_tiles) * together
    heads = tl.minimum(together, tl.num_programs(0) // num_tiles - first)
    rest = program - first * num_tiles
    index = first + rest % heads
    return rest // heads, index % num_heads, index // num_heads


@triton.jit
def at(base, strides, batch, head):
    """Pointer to the first row of one (batch, head); products are taken in int64 because they may pass 2^31."""
    return base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def tile_mask(rows, num_rows, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    mask = (rows < num_rows)[:, None]
    if WIDTH != BLOCK_WIDTH:
        mask = mask & (tl.arange(0, BLOCK_WIDTH) < WIDTH)[None, :]
    return mask


@triton.jit
def tile_pointers(base, rows, stride, BLOCK_WIDTH: tl.constexpr):
    return base + rows.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_WIDTH)[None, :]


@triton.jit
def load_tile(base, rows, stride, num_rows, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows of a (num_rows, WIDTH) matrix as a (len(rows), BLOCK_WIDTH) tile, with zeros outside the matrix."""
    mask = tile_mask(rows, num_rows, WIDTH, BLOCK_WIDTH)
    return tl.load(tile_pointers(base, rows, stride, BLOCK_WIDTH), mask=mask, other=0.0)


@triton.jit
def load_rows(
    base, first, COUNT: tl.constexpr, stride, num_rows, EDGES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """COUNT rows from `first` on as a tile; EDGES: some may be beyond num_rows."""
    rows = tl.arange(0, COUNT)
    base += first.to(tl.int64) * stride
    if EDGES or WIDTH != BLOCK_WIDTH:
        return load_tile(base, rows, stride, num_rows - first, WIDTH, BLOCK_WIDTH)
    else:
        return tl.load(tile_pointers(base, rows, stride, BLOCK_WIDTH))


@triton.jit
def load_tiles(
    base, first, stride, num_rows, COUNT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """COUNT tiles of BLOCK consecutive rows from `first` on, all in flight at once."""
    tiles = ()
    for t in tl.static_range(COUNT):
        rows = first + t * BLOCK + tl.arange(0, BLOCK)
        tiles = tiles + (load_tile(base, rows, stride, num_rows, WIDTH, BLOCK_WIDTH),)
    return tiles


@triton.jit
def store_tile(base, rows, stride, num_rows, tile, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    mask = tile_mask(rows, num_rows, WIDTH, BLOCK_WIDTH)
    tl.store(tile_pointers(base, rows, stride, BLOCK_WIDTH), tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(base, rows, num_rows, other):
    return tl.load(base + rows, mask=rows < num_rows, other=other)


@triton.jit
def load_numbers(base, rows, num_rows, EDGES: tl.constexpr):
    """A number for each row; EDGES: some may be beyond num_rows."""
    if EDGES:
        return load_vector(base, rows, num_rows, 0.0)
    else:
        return tl.load(base + rows)


@triton.jit
def row_squares(tile):
    """Float32 squared norms of the rows of a tile, from the same rounded inputs that enter the products."""
    wide = tile.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a times b. Exact float32 products use float64 tensor cores; without tensor cores they are far slower (H200)."""
    if a.dtype == tl.float32 and PRECISION == "ieee":
        return tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def finite_or_zero(tile):
    """The tile with infinities and NaN replaced by 0. Hidden pairs have weight 0, but 0 times NaN would be NaN."""
    return tl.where(tl.abs(tile) < float("inf"), tile, 0.0).to(tile.dtype)


@triton.jit
def poison(tile):
    """NaN for each row of a tile that contains infinities or NaN, otherwise 0; added to the weights of visible pairs."""
    wide = tile.to(tl.float32)
    return tl.sum(wide - wide, 1)


@triton.jit
def reach(index, token_bounds, num_tokens, num_targets, window):
    """Half-open interval of targets that a token reaches. window: (offset, back, ahead) in positions.

    With the window of a query it gives keys; with transpose_window the queries that see a key. Packed sequences have an offset
    each. Where their tokens reach nothing, the interval is empty at their begin, lest it leave the order of the tokens.
    """
    offset, back, ahead = window
    if token_bounds is None:
        return tl.maximum(0, index + offset - back), tl.minimum(num_targets, index + offset + ahead + 1)
    else:
        start = load_vector(token_bounds, index, num_tokens, 0)
        stop = load_vector(token_bounds + num_tokens, index, num_tokens, 0)
        position = index + load_vector(token_bounds + 2 * num_tokens, index, num_tokens, 0)
        return tl.maximum(start, position - back), tl.maximum(start, tl.minimum(stop, position + ahead + 1))


@triton.jit
def transpose_window(window):
    offset, back, ahead = window
    return -offset, ahead, back


@triton.jit
def tile_reach(first, BLOCK: tl.constexpr, token_bounds, num_tokens, num_targets, window):
    """(begin, all_begin, all_end, end) of the tile of tokens from `first` on, as reach is monotone:

    some token reaches the targets in [begin, end), every token those in [all_begin, all_end), which may be empty.
    """
    last = tl.minimum(first + BLOCK, num_tokens) - 1
    begin, all_end = reach(first, token_bounds, num_tokens, num_targets, window)
    all_begin, end = reach(last, token_bounds, num_tokens, num_targets, window)
    return begin, all_begin, all_end, end


@triton.jit
def tile_ranges(begin, all_begin, all_end, end, BLOCK: tl.constexpr):
    """(first, whole_first, whole_stop, stop), multiples of BLOCK, from what tile_reach returns.

    The tiles of BLOCK targets from `first` to `stop` hold all that some token reaches; every token reaches all of those from
    `whole_first` to `whole_stop`, which need no mask. Those before and after are edges.
    """
    first = begin // BLOCK * BLOCK
    stop = tl.maximum(tl.cdiv(end, BLOCK) * BLOCK, first)
    whole_first = tl.minimum(tl.maximum(tl.cdiv(all_begin, BLOCK) * BLOCK, first), stop)
    whole_stop = tl.minimum(tl.maximum(all_end // BLOCK * BLOCK, whole_first), stop)
    return first, whole_first, whole_stop, stop


@triton.jit
def steps(ranges, EDGES: tl.constexpr):
    """(start, stop) of the loop over the edges of tile_ranges, or over its whole tiles. `position` maps a step to its tile."""
    first, whole_first, whole_stop, stop = ranges
    if EDGES:
        return first, stop - (whole_stop - whole_first)
    else:
        return whole_first, whole_stop


@triton.jit
def position(step, ranges, EDGES: tl.constexpr):
    if EDGES:
        _, whole_first, whole_stop, _ = ranges
        return step + tl.where(step >= whole_first, whole_stop - whole_first, 0)
    else:
        return step


@triton.jit
def inside(targets, begin, end, TRANSPOSED: tl.constexpr = False):
    """(rows, targets) mask of the pairs that the rows' intervals [begin, end) allow; (targets, rows) when transposed."""
    if TRANSPOSED:
        return (targets[:, None] >= begin[None, :]) & (targets[:, None] < end[None, :])
    else:
        return (targets[None, :] >= begin[:, None]) & (targets[None, :] < end[:, None])


@triton.jit
def exp2(x):
    """2^x in one special-function instruction. Results below 2^-126 flush to zero; tl.exp2 takes four more instructions."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def sqrt(x):
    """The square root of x >= 0 in one special-function instruction."""
    if INTERPRETED:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def rsqrt(x):
    """1 / sqrt(x) in one special-function instruction: infinity at 0, NaN for negative x."""
    if INTERPRETED:
        return tl.rsqrt(x)
    else:
        return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def ring_words(bits, rows, first_key, num_words, BLOCK_N: tl.constexpr):
    """(rows, words) pointers to the selection bits of the keys from first_key on.

    A row owns a ring of 32 * num_words bits, at least as many as its window has keys; key j is bit j modulo that number.
    So any kernel can address any tile of the selection, whatever its tile sizes.
    """
    column = (first_key // WORD + tl.arange(0, BLOCK_N // WORD)) % num_words
    return bits + rows.to(tl.int64)[:, None] * num_words + column[None, :]


@triton.jit
def store_bits(bits, rows, num_rows, first_key, num_words, keep, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pack the (BLOCK_M, BLOCK_N) mask of the keys from first_key on into int32 words, one bit a key."""
    bit = tl.full((WORD,), 1, tl.int32) << tl.arange(0, WORD)
    words = tl.sum(tl.where(tl.reshape(keep, (BLOCK_M, BLOCK_N // WORD, WORD)), bit[None, None, :], 0), 2)
    tl.store(ring_words(bits, rows, first_key, num_words, BLOCK_N), words, mask=(rows < num_rows)[:, None])


@triton.jit
def bits_from(position):
    """int32 words whose bits from `position` on are set: all of them up to 0, none from 32 on."""
    return tl.where(position < WORD, tl.full(position.shape, -1, tl.int32) << tl.maximum(position, 0), 0)


@triton.jit
def load_bits(
    bits, rows, num_rows, begin, end, first_key, num_words,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):
    """(BLOCK_M, BLOCK_N) mask of the selected keys from first_key on, or its transpose; False outside [begin, end)."""
    words = tl.load(ring_words(bits, rows, first_key, num_words, BLOCK_N), mask=(rows < num_rows)[:, None], other=0)
    # Bits outside a row's interval belong to other keys of the ring. Clearing them a word at a time is cheap, except where
    # the words lie across the registers of the tile.
    if TRANSPOSED:
        keep = tl.reshape((tl.trans(words)[:, None, :] >> tl.arange(0, WORD)[None, :, None]) & 1, (BLOCK_N, BLOCK_M))
        return (keep != 0) & inside(first_key + tl.arange(0, BLOCK_N), begin, end, True)
    else:
        word_key = first_key + tl.arange(0, BLOCK_N // WORD) * WORD
        words &= bits_from(begin[:, None] - word_key[None, :]) & ~bits_from(end[:, None] - word_key[None, :])
        return tl.reshape((words[:, :, None] >> tl.arange(0, WORD)[None, None, :]) & 1, (BLOCK_M, BLOCK_N)) != 0
