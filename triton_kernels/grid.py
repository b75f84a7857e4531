"""The pairwise skeleton on grids: query tiles are boxes of cells, and keys are walked over a box's halo.

A grid is (T, H, W) cells in row-major order after `num_globals` global tokens; 2-D grids have T = 1. A dilation cuts each
axis into residue classes, which never see each other: boxes, halos and coordinates are those of one class. The programs of a
head are its boxes and, with global tokens, one more whose tile is these tokens and whose halo is the grid. A walk takes

    the global tokens, as a tile of their own, where there are any
    the halo, clipped to the grid, in tiles of KEY_H rows of KEY_W cells

What may be seen of a tile is told by two additions and one comparison a pair, whatever metric and dimension: a locality is a
few linear forms of the offset, each within a radius (nearfar.tiling.forms). `code` packs the forms of a token into fields of an
int32, so that code differences are offsets; bias lifts a field's radius to its guard bit, which stays set as long as the form
is not below -radius, and both signs are asked.

Grids are symmetric, so queries that see a box of keys are walked as keys that a box of queries sees.

A selection is a word for each line of cells that a query may see, bit w - w_query + radius of it for the cell at w, and one
for the global keys (`select`). Global queries have a bit for each cell, ceil(W / 32) words a line. So any kernel can address
any tile, whatever its box.
"""

import triton
import triton.language as tl

from .dropout import drop, keeps_of
from .pairwise import add_row_sums, online_softmax, write_grad_queries, write_rows
from .selection import cut_top_k, row_maximum
from .tiles import LOG2E, WORD, at, exp2, load_tile, load_vector, program_coordinates, row_squares, store_tile


@triton.jit
def halo_of(tile, shape, radius, dilation, boxes, BOX_T: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """What is known of a program's box, its residue class and its halo: whether it stands for the global tokens, and per axis

    residue, step       the class, and the cells from one of its members to the next
    start, cells        the first cell of the box, and the number of cells of the class
    begin, end          of the halo
    """
    whole = tile == boxes[0] * boxes[1] * boxes[2]
    t = along(tile // (boxes[1] * boxes[2]), whole, shape[0], radius[0], dilation[0], BOX_T)
    h = along(tile // boxes[2] % boxes[1], whole, shape[1], radius[1], dilation[1], BOX_H)
    w = along(tile % boxes[2], whole, shape[2], radius[2], dilation[2], BOX_W)
    residue, step, start = (t[0], h[0], w[0]), (t[1], h[1], w[1]), (t[2], h[2], w[2])
    return whole, residue, step, start, (t[3], h[3], w[3]), (t[4], h[4], w[4]), (t[5], h[5], w[5])


@triton.jit
def along(index, whole, size, radius, dilation, BOX: tl.constexpr):
    """The same for box `index` along one axis."""
    step = tl.where(whole, 1, dilation)
    residue = tl.where(whole, 0, index % dilation)
    start = tl.where(whole, 0, index // dilation * BOX)
    cells = (size - residue + step - 1) // step
    end = tl.where(whole, size, tl.minimum(start + BOX + radius, cells))
    return residue, step, start, cells, tl.where(whole, 0, tl.maximum(start - radius, 0)), end


@triton.jit
def position(halo, shape, num_globals, t, h, w):
    """The token of a cell."""
    _, residue, step, _, _, _, _ = halo
    line = (t * step[0] + residue[0]) * shape[1] + h * step[1] + residue[1]
    return num_globals + line * shape[2] + w * step[2] + residue[2]


@triton.jit
def box_tokens(halo, shape, num_globals, BOX_T: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """(tokens, t, h, w) of a program's own tile; a token that is none is one past the last."""
    whole, _, _, start, cells, _, _ = halo
    lane = tl.arange(0, BOX_T * BOX_H * BOX_W)
    t, h, w = start[0] + lane // (BOX_H * BOX_W), start[1] + lane // BOX_W % BOX_H, start[2] + lane % BOX_W
    tokens = tl.where(whole, lane, position(halo, shape, num_globals, t, h, w))
    valid = tl.where(whole, lane < num_globals, (t < cells[0]) & (h < cells[1]) & (w < cells[2]))
    return tl.where(valid, tokens, num_globals + shape[0] * shape[1] * shape[2]), t, h, w


@triton.jit
def first_step(halo):
    """(t, h, w) of the first tile of a walk over the halo."""
    _, _, _, _, _, begin, _ = halo
    return begin


@triton.jit
def num_steps(halo, KEY_H: tl.constexpr, KEY_W: tl.constexpr):
    _, _, _, _, _, begin, end = halo
    t, h, w = tl.maximum(end[0] - begin[0], 0), tl.maximum(end[1] - begin[1], 0), tl.maximum(end[2] - begin[2], 0)
    return t * tl.cdiv(h, KEY_H) * tl.cdiv(w, KEY_W)


@triton.jit
def next_step(step, place, halo, KEY_H: tl.constexpr, KEY_W: tl.constexpr):
    """(t, h, w) of the tile after step `step`; step -1, the global tokens, comes before the first."""
    t, h, w = place
    _, _, _, _, _, begin, end = halo
    wraps = w + KEY_W >= end[2]
    next_h = tl.where(wraps, h + KEY_H, h)
    next_w = tl.where(wraps, begin[2], w + KEY_W)
    next_t = tl.where(next_h >= end[1], t + 1, t)
    next_h = tl.where(next_h >= end[1], begin[1], next_h)
    return tl.where(step < 0, t, next_t), tl.where(step < 0, h, next_h), tl.where(step < 0, w, next_w)


@triton.jit
def step_tokens(step, place, halo, shape, num_globals, lane, KEY_W: tl.constexpr):
    """(tokens, whether they are any) of the lanes of a step of the walk; a token that is none is one past the last."""
    t, h, w = place
    _, _, stride, _, _, _, end = halo
    line, column = lane // KEY_W, lane % KEY_W
    tokens = position(halo, shape, num_globals, t, h, w) + line * (stride[1] * shape[2]) + column * stride[2]
    tokens = tl.where(step < 0, lane, tokens)
    valid = tl.where(step < 0, lane < num_globals, (line < end[1] - h) & (column < end[2] - w) & (t < end[0]))
    return tl.where(valid, tokens, num_globals + shape[0] * shape[1] * shape[2]), valid


@triton.jit
def box_codes(forms, BOX_T: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """Codes of a box's cells, from its first."""
    lane = tl.arange(0, BOX_T * BOX_H * BOX_W)
    return lane // (BOX_H * BOX_W) * forms[0] + lane // BOX_W % BOX_H * forms[1] + lane % BOX_W * forms[2]


@triton.jit
def step_codes(place, halo, forms, KEY_H: tl.constexpr, KEY_W: tl.constexpr):
    """Codes of the cells of a step of the walk, from the first of the box; 0 where they do not matter."""
    t, h, w = place
    whole, _, _, start, _, _, _ = halo
    lane = tl.arange(0, KEY_H * KEY_W)
    t, h, w = tl.where(whole, 0, t - start[0]), tl.where(whole, 0, h - start[1]), tl.where(whole, 0, w - start[2])
    return t * forms[0] + (h + lane // KEY_W) * forms[1] + (w + lane % KEY_W) * forms[2]


@triton.jit
def sees(own, others, valid, everything, forms):
    """(own, others) mask by the codes of both. valid: others that are any. everything: regardless of codes."""
    bias = forms[3]
    guards = tl.where(everything, 0, forms[4])
    wanted = tl.where(valid, guards, -1)  # which guards alone never are
    ahead, back = (bias + others)[None, :] - own[:, None], (bias - others)[None, :] + own[:, None]
    return (ahead & back & guards) == wanted[None, :]


@triton.jit
def selection_of(bits, tokens, batch, head, num_heads, shape, num_globals, words):
    """Pointers to the first word of each query of a tile. words: (those of a cell, those of a global query)."""
    num_cells = shape[0] * shape[1] * shape[2]
    per_head = num_globals * words[1] + num_cells * words[0]
    bits += (batch.to(tl.int64) * num_heads + head) * per_head
    cell = num_globals * words[1] + (tokens - num_globals).to(tl.int64) * words[0]
    return bits + tl.where(tokens < num_globals, tokens.to(tl.int64) * words[1], cell)


@triton.jit
def selection_words(queries, lines, w, are_globals, are_global_keys, shape, radius, words, WIDTH: tl.constexpr):
    """(which word of its query, bit of the word at w, whether it is any) of each query and line of keys.

    queries: (t, h, w) of each. lines: (t, h) of each, and w the first of WIDTH cells along them, or of the global keys.
    """
    query_t, query_h, query_w = queries
    line_t, line_h = lines
    dt, dh = line_t[None, :] - query_t[:, None] + radius[0], line_h[None, :] - query_h[:, None] + radius[1]
    near = (dt >= 0) & (dt <= 2 * radius[0]) & (dh >= 0) & (dh <= 2 * radius[1])
    per_line = (words[1] - 1) // (shape[0] * shape[1])
    whole = (line_t * shape[1] + line_h) * per_line + w // WORD
    word = tl.where(are_globals, whole[None, :], dt * (2 * radius[1] + 1) + dh)
    word = tl.where(are_global_keys, tl.where(are_globals, words[1], words[0]) - 1, word)
    bit = tl.where(are_globals, w % WORD, w - query_w + radius[2])[:, None]
    bit = tl.where(are_global_keys, tl.arange(0, line_t.shape[0])[None, :] * WIDTH, bit)
    return word, bit, near | are_globals | are_global_keys


@triton.jit
def clear_lines(first_words, t, h, valid, halo, radius):
    """Store no selection for the lines in sight of cells that are beyond the grid, which no walk meets."""
    whole, _, _, _, cells, _, _ = halo
    lines = 2 * radius[1] + 1
    for word in range(tl.where(whole, 0, (2 * radius[0] + 1) * lines)):
        line_t, line_h = t + word // lines - radius[0], h + word % lines - radius[1]
        outside = (line_t < 0) | (line_t >= cells[0]) | (line_h < 0) | (line_h >= cells[1])
        tl.store(first_words + word, 0, mask=outside & valid)


@triton.jit
def load_selection(first_words, word, bit, mask, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """(queries, keys) mask of the selected keys of lines of WIDTH cells, or its transpose.

    Bits before the word read as 0, and so do those after it, as only a global query's word may use bit 31, and from bit 0 on.
    """
    found = tl.load(first_words[:, None] + word, mask=mask, other=0).to(tl.uint32, bitcast=True)
    # From bit 32 of 64 on, so that one shift serves lines that begin before the word, too.
    shift = tl.minimum(tl.maximum(bit + WORD, 0), 2 * WORD - 1)
    found = ((found.to(tl.uint64) << WORD) >> shift.to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)
    ROWS: tl.constexpr = word.shape[0]
    KEYS: tl.constexpr = word.shape[1] * WIDTH
    if TRANSPOSED:
        keep = (tl.trans(found)[:, None, :] >> tl.arange(0, WIDTH)[None, :, None]) & 1
        return tl.reshape(keep, (KEYS, ROWS)) != 0
    else:
        keep = (found[:, :, None] >> tl.arange(0, WIDTH)[None, None, :]) & 1
        return tl.reshape(keep, (ROWS, KEYS)) != 0


@triton.jit
def store_selection(
    first_words, keep, step, place, halo, queries, valid, shape, radius, words, KEY_H: tl.constexpr, KEY_W: tl.constexpr
):
    """Store the selection of a step, an int32 0 or 1 for each query and key; KEY_W holds all global tokens."""
    ROWS: tl.constexpr = keep.shape[0]
    lines, any_line = step_lines(step, place, halo, KEY_H)
    word, bit, near = selection_words(queries, lines, place[2], halo[0], step < 0, shape, radius, words, KEY_W)
    places = (tl.broadcast_to(bit, (ROWS, KEY_H))[:, :, None] + tl.arange(0, KEY_W)[None, None, :]) & (WORD - 1)
    found = tl.sum(tl.reshape(keep, (ROWS, KEY_H, KEY_W)) << places, 2)
    any_line &= (step >= 0) | (tl.arange(0, KEY_H) == 0)  # the word of the global keys is that of the first line
    tl.store(first_words[:, None] + word, found, mask=near & any_line[None, :] & valid[:, None])


@triton.jit
def step_lines(step, place, halo, KEY_H: tl.constexpr):
    """((t, h) of the lines of a step, whether they are any)."""
    t, h, _ = place
    _, _, _, _, _, _, end = halo
    line = tl.arange(0, KEY_H)
    return (tl.zeros((KEY_H,), tl.int32) + t, h + line), ((line < end[1] - h) & (t < end[0])) | (step < 0)


@triton.jit
def squared_norms(
    k, k_squares, k_strides, num_tokens, num_heads, num_tiles, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr
):
    """|k|^2 (B, Hkv, N) of all keys, which many boxes see."""
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    k_tile = load_tile(at(k, k_strides, batch, head), rows, k_strides[2], num_tokens, D, BLOCK_D)
    tl.store(squares_of(k_squares, batch, head, num_heads, num_tokens) + rows, row_squares(k_tile), mask=rows < num_tokens)


@triton.jit
def squares_of(k_squares, batch, kv_head, kv_heads, num_tokens):
    return k_squares + (batch.to(tl.int64) * kv_heads + kv_head) * num_tokens


@triton.jit
def attend(
    q, k, v, k_squares, parameter, o, lse, bits, seed,
    q_strides, k_strides, v_strides, o_strides, parameter_stride, num_heads, group, num_tiles,
    shape, num_globals, radius, dilation, boxes, forms, words, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BOX_T: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
):
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    num_tokens = num_globals + shape[0] * shape[1] * shape[2]
    BLOCK_M: tl.constexpr = BOX_T * BOX_H * BOX_W
    halo = halo_of(tile, shape, radius, dilation, boxes, BOX_T, BOX_H, BOX_W)
    rows, t, h, w = box_tokens(halo, shape, num_globals, BOX_T, BOX_H, BOX_W)
    codes = box_codes(forms, BOX_T, BOX_H, BOX_W)
    if bits is not None:
        first_words = selection_of(bits, rows, batch, head, num_heads, shape, num_globals, words)
    if k_squares is not None:
        k_squares = squares_of(k_squares, batch, head // group, num_heads // group, num_tokens)
    scale = SCALE(tl.load(parameter + head * parameter_stride)) * LOG2E
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_tokens, D, BLOCK_D)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    place = first_step(halo)
    for step in range(tl.where(num_globals > 0, -1, 0), num_steps(halo, KEY_H, KEY_W)):
        keys, valid = step_tokens(step, place, halo, shape, num_globals, tl.arange(0, KEY_H * KEY_W), KEY_W)
        k_tile = load_tile(k, keys, k_strides[2], num_tokens, D, BLOCK_D)
        v_tile = load_tile(v, keys, v_strides[2], num_tokens, DV, BLOCK_DV)
        squares = row_squares(k_tile) if k_squares is None else load_vector(k_squares, keys, num_tokens, 0.0)
        score = SCORE(q_tile, k_tile, squares, scale, PRECISION)
        if bits is None:
            seen = sees(codes, step_codes(place, halo, forms, KEY_H, KEY_W), valid, halo[0] | (step < 0), forms)
        else:
            lines, any_line = step_lines(step, place, halo, KEY_H)
            word, bit, near = selection_words(
                (t, h, w), lines, place[2], halo[0], step < 0, shape, radius, words, KEY_W
            )
            mask = near & any_line[None, :] & (rows < num_tokens)[:, None]
            seen = load_selection(first_words, word, bit, mask, KEY_W)
        weight, decay, highest, total = online_softmax(tl.where(seen, score, float("-inf")), highest, total)
        if seed is not None:
            kept = keeps_of(seed, batch * num_heads + head, rows, keys, drop_below)
            weight = drop(weight, kept, keep_scale)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        place = next_step(step, place, halo, KEY_H, KEY_W)

    every = rows >= 0  # a token sees itself
    write_rows(o, lse, o_strides, batch, head, num_heads, rows, num_tokens, every, highest, total, acc, DV, BLOCK_DV)


@triton.jit
def attend_resident(
    q, k, v, parameter, o, lse, bits, seed,
    q_strides, k_strides, v_strides, o_strides, parameter_stride, num_heads, group, num_tiles, first_tile,
    shape, num_globals, radius, dilation, boxes, forms, words, top_k, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, GLOBAL_KEYS: tl.constexpr,
    KEEP_TIES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BOX_T: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
):
    """Selects, as `select`, and attends, where walks are so short that all scores of a tile stay in registers.

    STEPS: of the longest walk. GLOBAL_KEYS: the size of the tile of global keys, 0 where there are none.
    """
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    num_tokens = num_globals + shape[0] * shape[1] * shape[2]
    BLOCK_M: tl.constexpr = BOX_T * BOX_H * BOX_W
    BLOCK_N: tl.constexpr = KEY_H * KEY_W
    HAS_GLOBALS: tl.constexpr = GLOBAL_KEYS > 0
    halo = halo_of(first_tile + tile, shape, radius, dilation, boxes, BOX_T, BOX_H, BOX_W)
    rows, t, h, w = box_tokens(halo, shape, num_globals, BOX_T, BOX_H, BOX_W)
    codes = box_codes(forms, BOX_T, BOX_H, BOX_W)
    scale = SCALE(tl.load(parameter + head * parameter_stride)) * LOG2E
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_tokens, D, BLOCK_D)

    scores = ()
    count = tl.zeros((BLOCK_M,), tl.int32) + num_globals
    if HAS_GLOBALS:
        lane = tl.arange(0, GLOBAL_KEYS)
        k_tile = load_tile(k, lane, k_strides[2], num_globals, D, BLOCK_D)
        score = SCORE(q_tile, k_tile, row_squares(k_tile), scale, PRECISION)
        scores = scores + (tl.where((lane < num_globals)[None, :], score, float("-inf")),)
    place = first_step(halo)
    for step in tl.static_range(STEPS):
        keys, valid = step_tokens(step, place, halo, shape, num_globals, tl.arange(0, BLOCK_N), KEY_W)
        k_tile = load_tile(k, keys, k_strides[2], num_tokens, D, BLOCK_D)
        score = SCORE(q_tile, k_tile, row_squares(k_tile), scale, PRECISION)
        seen = sees(codes, step_codes(place, halo, forms, KEY_H, KEY_W), valid, halo[0], forms)
        count += tl.sum(seen.to(tl.int32), 1)
        scores = scores + (tl.where(seen, score, float("-inf")),)
        place = next_step(step, place, halo, KEY_H, KEY_W)

    highest = row_maximum(scores)
    COLUMNS: tl.constexpr = GLOBAL_KEYS + STEPS * BLOCK_N
    scores, cut = cut_top_k(scores, count, tl.zeros_like(count), highest, top_k, COLUMNS, KEEP_TIES)

    first_words = selection_of(bits, rows, batch, head, num_heads, shape, num_globals, words)
    clear_lines(first_words, t, h, rows < num_tokens, halo, radius)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    place = first_step(halo)
    if HAS_GLOBALS:
        chosen = (scores[0] <= cut[:, None]) == 0  # so that NaN is chosen and reaches the output
        store_selection(
            first_words, chosen.to(tl.int32), -1, place, halo, (t, h, w), rows < num_tokens, shape, radius, words,
            1, GLOBAL_KEYS,
        )
        v_tile = load_tile(v, tl.arange(0, GLOBAL_KEYS), v_strides[2], num_globals, DV, BLOCK_DV)
        weight = exp2(tl.where(chosen, scores[0] - highest[:, None], float("-inf")))
        total += tl.sum(weight, 1)
        if seed is not None:
            kept = keeps_of(seed, batch * num_heads + head, rows, tl.arange(0, GLOBAL_KEYS), drop_below)
            weight = drop(weight, kept, keep_scale)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    for step in tl.static_range(STEPS):
        score = scores[step + HAS_GLOBALS]
        chosen = (score <= cut[:, None]) == 0
        store_selection(
            first_words, chosen.to(tl.int32), step, place, halo, (t, h, w), rows < num_tokens, shape, radius, words,
            KEY_H, KEY_W,
        )
        keys, _ = step_tokens(step, place, halo, shape, num_globals, tl.arange(0, BLOCK_N), KEY_W)
        v_tile = load_tile(v, keys, v_strides[2], num_tokens, DV, BLOCK_DV)
        weight = exp2(tl.where(chosen, score - highest[:, None], float("-inf")))
        total += tl.sum(weight, 1)
        if seed is not None:
            kept = keeps_of(seed, batch * num_heads + head, rows, keys, drop_below)
            weight = drop(weight, kept, keep_scale)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        place = next_step(step, place, halo, KEY_H, KEY_W)

    every = rows >= 0  # a token sees itself
    write_rows(o, lse, o_strides, batch, head, num_heads, rows, num_tokens, every, highest, total, acc, DV, BLOCK_DV)


@triton.jit
def select(
    q, k, k_squares, parameter, bits,
    q_strides, k_strides, parameter_stride, num_heads, group, num_tiles, first_tile,
    shape, num_globals, radius, dilation, boxes, forms, words, top_k,
    SCALE: tl.constexpr, SCORE: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr,
    KEEP_TIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BOX_T: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
):
    """The selection of boxes, or, from first_tile = their number on, of the global queries.

    SLOTS: a power of two that holds the steps of every walk. Within these, tiles are in the order of keys: a tile is a line,
    or as wide as the halo, so that equal scores go to the smaller key.
    """
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k = at(k, k_strides, batch, head // group)
    num_tokens = num_globals + shape[0] * shape[1] * shape[2]
    BLOCK_M: tl.constexpr = BOX_T * BOX_H * BOX_W
    BLOCK_N: tl.constexpr = KEY_H * KEY_W
    COLUMNS: tl.constexpr = SLOTS * BLOCK_N
    halo = halo_of(first_tile + tile, shape, radius, dilation, boxes, BOX_T, BOX_H, BOX_W)
    rows, t, h, w = box_tokens(halo, shape, num_globals, BOX_T, BOX_H, BOX_W)
    codes = box_codes(forms, BOX_T, BOX_H, BOX_W)
    if k_squares is not None:
        k_squares = squares_of(k_squares, batch, head // group, num_heads // group, num_tokens)
    scale = SCALE(tl.load(parameter + head * parameter_stride)) * LOG2E
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_tokens, D, BLOCK_D)

    first = tl.where(num_globals > 0, -1, 0)
    steps = num_steps(halo, KEY_H, KEY_W)
    slots = tl.arange(0, SLOTS)[None, :, None]
    scores = tl.full((BLOCK_M, SLOTS, BLOCK_N), float("-inf"), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.int32)
    place = first_step(halo)
    for step in range(first, steps):
        keys, valid = step_tokens(step, place, halo, shape, num_globals, tl.arange(0, KEY_H * KEY_W), KEY_W)
        k_tile = load_tile(k, keys, k_strides[2], num_tokens, D, BLOCK_D)
        squares = row_squares(k_tile) if k_squares is None else load_vector(k_squares, keys, num_tokens, 0.0)
        score = SCORE(q_tile, k_tile, squares, scale, PRECISION)
        seen = sees(codes, step_codes(place, halo, forms, KEY_H, KEY_W), valid, halo[0] | (step < 0), forms)
        count += tl.sum(seen.to(tl.int32), 1)
        scores = tl.where((slots == step - first) & seen[:, None, :], score[:, None, :], scores)
        place = next_step(step, place, halo, KEY_H, KEY_W)

    candidates = (tl.reshape(scores, (BLOCK_M, COLUMNS)),)
    start = tl.zeros((BLOCK_M,), tl.int32)
    candidates, cut = cut_top_k(candidates, count, start, row_maximum(candidates), top_k, COLUMNS, KEEP_TIES)
    chosen = (candidates[0] <= cut[:, None]) == 0  # so that NaN is chosen and reaches the output
    chosen = tl.reshape(chosen.to(tl.int32), (BLOCK_M, SLOTS, BLOCK_N))

    first_words = selection_of(bits, rows, batch, head, num_heads, shape, num_globals, words)
    clear_lines(first_words, t, h, rows < num_tokens, halo, radius)
    place = first_step(halo)
    for step in range(first, steps):
        keep = tl.sum(tl.where(slots == step - first, chosen, 0), 1)
        store_selection(
            first_words, keep, step, place, halo, (t, h, w), rows < num_tokens, shape, radius, words, KEY_H, KEY_W
        )
        place = next_step(step, place, halo, KEY_H, KEY_W)


@triton.jit
def grad_queries(
    q, k, v, k_squares, parameter, o, do, lse, bits, dq, delta, dlog_scale, seed,
    q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides, parameter_stride, num_heads, group, num_tiles,
    shape, num_globals, radius, dilation, boxes, forms, words, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BOX_T: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
):
    """dq, delta of each row, and the gradient of log(scale)."""
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    num_tokens = num_globals + shape[0] * shape[1] * shape[2]
    BLOCK_M: tl.constexpr = BOX_T * BOX_H * BOX_W
    BLOCK_N: tl.constexpr = KEY_H * KEY_W
    halo = halo_of(tile, shape, radius, dilation, boxes, BOX_T, BOX_H, BOX_W)
    rows, t, h, w = box_tokens(halo, shape, num_globals, BOX_T, BOX_H, BOX_W)
    codes = box_codes(forms, BOX_T, BOX_H, BOX_W)
    if bits is not None:
        first_words = selection_of(bits, rows, batch, head, num_heads, shape, num_globals, words)
    if k_squares is not None:
        k_squares = squares_of(k_squares, batch, head // group, num_heads // group, num_tokens)
    scale = SCALE(tl.load(parameter + head * parameter_stride))
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_tokens, D, BLOCK_D)
    do_tile = load_tile(at(do, do_strides, batch, head), rows, do_strides[2], num_tokens, DV, BLOCK_DV)
    o_tile = load_tile(at(o, o_strides, batch, head), rows, o_strides[2], num_tokens, DV, BLOCK_DV)
    row_lse = load_vector(lse + (batch.to(tl.int64) * num_heads + head) * num_tokens, rows, num_tokens, 0.0)
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    rounded_total = tl.zeros((BLOCK_M,), tl.float32)
    sums = (tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32))
    highest = tl.full((BLOCK_M,), BLOCK_N - 1, tl.int32)  # bits of the greatest weight, the lowest of them its column
    nearest = tl.zeros((BLOCK_M,), tl.int32) + num_tokens  # its key
    place = first_step(halo)
    for step in range(tl.where(num_globals > 0, -1, 0), num_steps(halo, KEY_H, KEY_W)):
        keys, valid = step_tokens(step, place, halo, shape, num_globals, tl.arange(0, BLOCK_N), KEY_W)
        k_tile = load_tile(k, keys, k_strides[2], num_tokens, D, BLOCK_D)
        v_tile = load_tile(v, keys, v_strides[2], num_tokens, DV, BLOCK_DV)
        squares = row_squares(k_tile) if k_squares is None else load_vector(k_squares, keys, num_tokens, 0.0)
        log_weight = SCORE(q_tile, k_tile, squares, scale * LOG2E, PRECISION) - row_lse[:, None]
        if bits is None:
            seen = sees(codes, step_codes(place, halo, forms, KEY_H, KEY_W), valid, halo[0] | (step < 0), forms)
        else:
            lines, any_line = step_lines(step, place, halo, KEY_H)
            word, bit, near = selection_words(
                (t, h, w), lines, place[2], halo[0], step < 0, shape, radius, words, KEY_W
            )
            mask = near & any_line[None, :] & (rows < num_tokens)[:, None]
            seen = load_selection(first_words, word, bit, mask, KEY_W)
        weight = tl.where(seen, exp2(log_weight), 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        if seed is not None:
            dp = drop(dp, keeps_of(seed, batch * num_heads + head, rows, keys, drop_below), keep_scale)
        ds = weight * (dp - row_delta[:, None])
        marked = tl.max((weight.to(tl.int32, bitcast=True) & -BLOCK_N) | tl.arange(0, BLOCK_N)[None, :], 1)
        best, _ = step_tokens(step, place, halo, shape, num_globals, marked & (BLOCK_N - 1), KEY_W)
        nearest = tl.where(marked > highest, best, nearest)
        highest = tl.maximum(marked, highest)
        sums = add_row_sums(sums, weight, ds, log_weight)
        rounded = ds.to(k_tile.dtype)
        rounded_total += tl.sum(rounded.to(tl.float32), 1)
        # Not tl.dot(..., acc), as in pairwise.grad_queries.
        acc += scale * tl.dot(rounded, k_tile, input_precision=PRECISION)
        place = next_step(step, place, halo, KEY_H, KEY_W)

    write_grad_queries(
        k, dq, delta, dlog_scale, k_strides, dq_strides, batch, head, num_heads, rows, num_tokens, num_tokens,
        acc, scale * rounded_total, nearest, row_delta, sums, GRAD, D, BLOCK_D,
    )


@triton.jit
def grad_keys(
    q, k, v, parameter, do, lse, bits, delta, dk, dv, seed,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, parameter_stride, num_heads, group, num_tiles,
    shape, num_globals, radius, dilation, boxes, forms, words, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BOX_T: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, QUERY_H: tl.constexpr, QUERY_W: tl.constexpr,
):
    """dk and dv of a box of keys, or of the global ones, summed over the query heads of a group."""
    tile, kv_head, batch = program_coordinates(num_tiles, num_heads // group)
    num_tokens = num_globals + shape[0] * shape[1] * shape[2]
    BLOCK_N: tl.constexpr = BOX_T * BOX_H * BOX_W
    halo = halo_of(tile, shape, radius, dilation, boxes, BOX_T, BOX_H, BOX_W)
    whole, _, _, start, cells, _, _ = halo
    keys, _, _, _ = box_tokens(halo, shape, num_globals, BOX_T, BOX_H, BOX_W)
    codes = box_codes(forms, BOX_T, BOX_H, BOX_W)
    line = tl.arange(0, BOX_T * BOX_H)
    lines = (start[0] + line // BOX_H, start[1] + line % BOX_H)
    any_line = ((lines[0] < cells[0]) & (lines[1] < cells[1])) | whole
    k_tile = load_tile(at(k, k_strides, batch, kv_head), keys, k_strides[2], num_tokens, D, BLOCK_D)
    v_tile = load_tile(at(v, v_strides, batch, kv_head), keys, v_strides[2], num_tokens, DV, BLOCK_DV)
    k_squares = row_squares(k_tile)
    lane = tl.arange(0, QUERY_H * QUERY_W)

    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    ds_total = tl.zeros((BLOCK_N,), tl.float32)
    # dS enters its products unscaled, lest half precision lose or overflow it; the sums are in units of the head at hand.
    unit = SCALE(tl.load(parameter + kv_head * group * parameter_stride))
    for member in range(group):
        head = kv_head * group + member
        scale = SCALE(tl.load(parameter + head * parameter_stride))
        dk_tile *= unit / scale
        ds_total *= unit / scale
        unit = scale
        q_head, do_head = at(q, q_strides, batch, head), at(do, do_strides, batch, head)
        row_offset = (batch.to(tl.int64) * num_heads + head) * num_tokens
        place = first_step(halo)
        for step in range(tl.where(num_globals > 0, -1, 0), num_steps(halo, QUERY_H, QUERY_W)):
            rows, valid = step_tokens(step, place, halo, shape, num_globals, lane, QUERY_W)
            q_tile = load_tile(q_head, rows, q_strides[2], num_tokens, D, BLOCK_D)
            do_tile = load_tile(do_head, rows, do_strides[2], num_tokens, DV, BLOCK_DV)
            row_lse = load_vector(lse + row_offset, rows, num_tokens, 0.0)
            row_delta = load_vector(delta + row_offset, rows, num_tokens, 0.0)
            # Transposed, (keys, queries), so that the weights feed the next product from registers.
            score = SCORE(q_tile, k_tile, k_squares, scale * LOG2E, PRECISION, True)
            if bits is None:
                seen = sees(codes, step_codes(place, halo, forms, QUERY_H, QUERY_W), valid, whole | (step < 0), forms)
            else:
                queries = (place[0] + lane * 0, place[1] + lane // QUERY_W, place[2] + lane % QUERY_W)
                word, bit, near = selection_words(
                    queries, lines, start[2], step < 0, whole, shape, radius, words, BOX_W
                )
                first_words = selection_of(bits, rows, batch, head, num_heads, shape, num_globals, words)
                seen = load_selection(first_words, word, bit, near & any_line[None, :] & valid[:, None], BOX_W, True)
            weight = tl.where(seen, exp2(score - row_lse[None, :]), 0.0)
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
            dv_weight = weight
            if seed is not None:
                kept = tl.trans(keeps_of(seed, batch * num_heads + head, rows, keys, drop_below))
                dp, dv_weight = drop(dp, kept, keep_scale), drop(weight, kept, keep_scale)
            ds = weight * (dp - row_delta[None, :])
            dv_tile = tl.dot(dv_weight.to(do_tile.dtype), do_tile, dv_tile, input_precision=PRECISION)
            rounded = ds.to(q_tile.dtype)
            dk_tile = tl.dot(rounded, q_tile, dk_tile, input_precision=PRECISION)
            ds_total += tl.sum(rounded.to(tl.float32), 1)  # of what enters dk, so that dk depends on differences q - k alone
            place = next_step(step, place, halo, QUERY_H, QUERY_W)

    k_tile = load_tile(at(k, k_strides, batch, kv_head), keys, k_strides[2], num_tokens, D, BLOCK_D)
    dk_tile = GRAD(dk_tile * unit, ds_total[:, None] * unit, k_tile.to(tl.float32))
    store_tile(at(dk, dk_strides, batch, kv_head), keys, dk_strides[2], num_tokens, dk_tile, D, BLOCK_D)
    store_tile(at(dv, dv_strides, batch, kv_head), keys, dv_strides[2], num_tokens, dv_tile, DV, BLOCK_DV)
