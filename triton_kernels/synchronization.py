"""Selective synchronization attention (arXiv 2602.14445): o_i = sum_j S_ij v_j / (sum_j S_ij + EPS).

    S_ij = sqrt(max(0, margin)),   margin = J^2 - c_i delta2,   J^2 = exp(-2 alpha delta2),   delta2 = |w_i - w_j|^2

c_i = 1 / (K r_i)^2. There is no softmax and no running maximum: 0 <= S <= 1. A tile of tokens walks the cells of the other side
that `locking.neighbours` lists for it; those beyond the lock radius have S = 0.

    attend            o and the row sums of S
    attend_top_k      likewise with the top_k largest S of each row, all of whose keys stay in registers
    row_terms         1 / (sum + EPS) and dO . o / (sum + EPS) of each row, for the kernels of the backward
    grad_queries      dw of the queries; of each row the gradients of alpha and of K r
    grad_keys         dw and dv of the keys, summed over the query heads of a group
    grad_tokens       all of them at once, where every token is query and key and S is symmetric: one r a head, no top_k

The walks measure distance by x_ij = log2 J^2 = decay delta2, with decay = -2 log2(e) alpha, an operation a pair less; only in
the selection, where equal distances have to stay equal to the last bit, is delta2 computed first.

With dS_ij = (dO_i . v_j - dO_i . o_i) / (sum_i + EPS) and slope = dS / max(S, grad_floor) where the pair locks, else 0,

    dw_i = sum_j pull_ij (w_j - w_i),  pull = slope (2 alpha J^2 + c_i)          and likewise dw_j of the keys
    dalpha = -sum slope delta2 J^2,    d(K r_i) = c_i^1.5 sum_j slope delta2

The weights of w_j and their sum, the weight of w_i, are sums of the same rounded numbers: only so do they cancel for tokens
whose frequencies nearly agree. A token is at distance 0 from itself: S_ii = 1, with no gradient but that of v.
SELF: the keys are the queries.
"""

import triton
import triton.language as tl

from .locking import CELL, LARGEST_C
from .selection import cut_top_k, row_maximum
from .tiles import (
    LOG2E,
    WORD,
    at,
    exp2,
    load_bits,
    load_tile,
    load_vector,
    product,
    program_coordinates,
    rsqrt,
    sqrt,
    store_bits,
    store_tile,
)

EPS: tl.constexpr = tl.constexpr(1e-8)
FAR: tl.constexpr = tl.constexpr(1e30)  # squared distance of absent tokens: beyond every lock radius
NEVER: tl.constexpr = tl.constexpr(-1e30)  # x of absent tokens
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)  # sqrt and rsqrt treat smaller numbers as 0
EXACT: tl.constexpr = tl.constexpr("ieee")  # precision of products of frequencies: tf32 would lose small distances
# For float32 tokens, distances and sums of pulls are float64: far from the origin most of their digits cancel.
# Relative accuracy of squared distances and sums of pulls, to |w|^2 and |w|, in float32 and in float64.
ROUNDING: tl.constexpr = tl.constexpr(2.0**-20)
WIDE_ROUNDING: tl.constexpr = tl.constexpr(2.0**-46)


@triton.jit
def load_decay(bandwidth):
    return -2.0 * LOG2E * tl.load(bandwidth)


@triton.jit
def positive(x):
    """max(x, 0), but NaN for NaN, so that invalid inputs show in the output."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def dot(x, y, acc):
    """acc + x y, in the dtype of acc."""
    if acc.dtype == tl.float64:
        return tl.dot(x.to(tl.float64), y.to(tl.float64), acc, out_dtype=tl.float64)
    else:
        return tl.dot(x, y, acc, input_precision=EXACT)


@triton.jit
def wide_squared_distance(x_tile, y_tile):
    """Of float32 tokens, rounded once: 0 where they are equal."""
    x, y = x_tile.to(tl.float64), y_tile.to(tl.float64)
    squares = tl.sum(x * x, 1)[:, None] + tl.sum(y * y, 1)[None, :]
    delta2 = squares - 2.0 * tl.dot(x, tl.trans(y), out_dtype=tl.float64)
    return tl.where(delta2 < WIDE_ROUNDING * squares, 0.0, delta2).to(tl.float32)


@triton.jit
def squared_distance(x_tile, y_tile, squares, other_squares):
    """Of two tiles of tokens; squares are FAR of those that are not there."""
    squares, other_squares = squares[:, None], other_squares[None, :]
    if x_tile.dtype == tl.float32:
        return tl.where((squares == FAR) | (other_squares == FAR), FAR, wide_squared_distance(x_tile, y_tile))
    else:
        return positive(squares + other_squares - 2.0 * tl.dot(x_tile, tl.trans(y_tile)))


@triton.jit
def log_similarity(x_tile, y_tile, squares, other_squares, decay):
    """x, at most 0, of two tiles of tokens; squares as load_squares has them."""
    squares, other_squares = squares[:, None], other_squares[None, :]
    if x_tile.dtype == tl.float32:
        x = decay * wide_squared_distance(x_tile, y_tile)
        return tl.where((squares == NEVER) | (other_squares == NEVER), NEVER, x)
    else:
        x = squares + other_squares - (2.0 * decay) * tl.dot(x_tile, tl.trans(y_tile))
        return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_squares(squares, tokens, num_tokens, decay):
    """The contribution of each token's |w|^2 to x."""
    return tl.where(tokens < num_tokens, decay * load_vector(squares, tokens, num_tokens, 0.0), NEVER)


@triton.jit
def strength(margin):
    """S."""
    return sqrt(positive(margin))


@triton.jit
def inverse_strength(margin):
    """1 / S if the pair locks, else 0. S is this times the positive part of the margin, without another special function."""
    return tl.where(margin < SMALLEST_NORMAL, 0.0, rsqrt(margin))


@triton.jit
def steepest_of(steepest, squares, c, decay, DTYPE: tl.constexpr):
    """The bound of 1 / S in the gradients of queries: 0 where the lock radius is below the rounding of distances.

    Whether another token locks is noise there, and a pull of the size of c would multiply it. squares as load_squares has them.
    """
    part = WIDE_ROUNDING if DTYPE == tl.float32 else ROUNDING
    return tl.where(c * (squares / decay) * part > 1.0, 0.0, steepest)


@triton.jit
def cells(lists, counts, tile, head, batch, num_heads, num_tiles, num_others):
    """(list, count) of the cells that may lock with a tile."""
    index = (batch.to(tl.int64) * num_heads + head) * num_tiles + tile
    return lists + index * num_others, tl.load(counts + index)


@triton.jit
def listed(cell_list, step, BLOCK: tl.constexpr):
    """First token of a step, as the walk takes the listed cells by BLOCK tokens.

    Walks ask one step ahead: a load whose address waits for another load costs Triton's pipeline a stage.
    """
    STEPS: tl.constexpr = CELL // BLOCK
    return tl.load(cell_list + step // STEPS) * CELL + (step - step // STEPS * STEPS) * BLOCK


@triton.jit
def attend(
    w, k, v, squares, k_squares, c, bandwidth, o, total, lists, counts,
    w_strides, k_strides, v_strides, o_strides, bandwidth_stride, num_queries, num_keys, num_heads, group, num_tiles, offset,
    SELF: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    TILE: tl.constexpr = max(BLOCK_M, CELL)  # the tokens that share a list
    cell_list, count = cells(
        lists, counts, tile * BLOCK_M // TILE, head, batch, num_heads, tl.cdiv(num_queries, TILE), tl.cdiv(num_keys, CELL)
    )
    kv_index = batch.to(tl.int64) * (num_heads // group) + head // group
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    k_squares += kv_index * num_keys
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    decay = load_decay(bandwidth + head * bandwidth_stride)
    w_tile = load_tile(at(w, w_strides, batch, head), rows, w_strides[2], num_queries, D, BLOCK_D)
    row_squares = load_squares(squares + row_offset, rows, num_queries, decay)
    row_c = load_vector(c + row_offset, rows, num_queries, 1.0) / decay

    row_total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    steps = count * (CELL // BLOCK_N)
    first = listed(cell_list, 0, BLOCK_N)
    for step in range(steps):
        following = listed(cell_list, tl.minimum(step + 1, steps - 1), BLOCK_N)
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
        v_tile = load_tile(v, keys, v_strides[2], num_keys, DV, BLOCK_DV)
        x = log_similarity(w_tile, k_tile, row_squares, load_squares(k_squares, keys, num_keys, decay), decay)
        if SELF or CAUSAL:
            if first + BLOCK_N > tile * BLOCK_M + offset and (CAUSAL or first < (tile + 1) * BLOCK_M):
                x = mask_forward(x, rows[:, None] + offset, keys[None, :], NEVER, SELF, CAUSAL)
        weight = strength(exp2(x) - row_c[:, None] * x)
        row_total += tl.sum(weight, 1)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        first = following

    write_rows(o, total, o_strides, row_offset, batch, head, rows, num_queries, acc, row_total, DV, BLOCK_DV)


@triton.jit
def mask_forward(distance, positions, keys, FAR: tl.constexpr, SELF: tl.constexpr, CAUSAL: tl.constexpr):
    """Set the distance of a token from itself to exactly 0 and, when causal, hide later tokens from earlier ones."""
    if SELF:
        distance = tl.where(keys == positions, 0.0, distance)
    if CAUSAL:
        distance = tl.where(keys > positions, FAR, distance)
    return distance


@triton.jit
def mask_backward(x, positions, keys, SELF: tl.constexpr, CAUSAL: tl.constexpr):
    """As mask_forward, but a token does not see itself: its own contribution to dv, S_ii = 1, is added after the walk."""
    if SELF and CAUSAL:
        return tl.where(keys >= positions, NEVER, x)
    elif SELF:
        return tl.where(keys == positions, NEVER, x)
    else:
        return tl.where(keys > positions, NEVER, x)


@triton.jit
def write_rows(
    o, total, o_strides, row_offset, batch, head, rows, num_queries, acc, row_total, DV: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Normalise and store a tile of outputs; rows without a locked key give zeros."""
    out = acc * tl.div_rn(1.0, row_total + EPS)[:, None]
    store_tile(at(o, o_strides, batch, head), rows, o_strides[2], num_queries, out, DV, BLOCK_DV)
    tl.store(total + row_offset + rows, row_total, mask=rows < num_queries)


@triton.jit
def attend_top_k(
    w, k, v, squares, k_squares, c, bandwidth, o, total, bits,
    w_strides, k_strides, v_strides, o_strides, bandwidth_stride, num_queries, num_keys, num_heads, group, num_tiles, offset,
    top_k, SELF: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    NUM_KEY_TILES: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """SLOTS: NUM_KEY_TILES, and as many empty ones as make it a power of two."""
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    k_squares += (batch.to(tl.int64) * (num_heads // group) + head // group) * num_keys
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    decay = load_decay(bandwidth + head * bandwidth_stride)
    w_tile = load_tile(at(w, w_strides, batch, head), rows, w_strides[2], num_queries, D, BLOCK_D)
    row_squares = load_vector(squares + row_offset, rows, num_queries, FAR)
    row_c = load_vector(c + row_offset, rows, num_queries, 1.0)

    # Loops, because unrolled tiles would take too long to compile.
    slots = tl.arange(0, SLOTS)[None, :, None]
    scores = tl.full((BLOCK_M, SLOTS, BLOCK_N), float("-inf"), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.int32)
    for t in range(NUM_KEY_TILES):
        keys = t * BLOCK_N + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
        delta2 = squared_distance(w_tile, k_tile, row_squares, load_vector(k_squares, keys, num_keys, FAR))
        delta2 = mask_forward(delta2, rows[:, None] + offset, keys[None, :], FAR, SELF, CAUSAL)
        score = strength(exp2(decay * delta2) - row_c[:, None] * delta2)
        # Pairs that are not locked are no candidates; otherwise their zeros would be ties.
        count += tl.sum((score > 0.0).to(tl.int32), 1)
        score = tl.where(score == 0.0, float("-inf"), score)
        scores = tl.where(slots == t, score[:, None, :], scores)

    RING: tl.constexpr = NUM_KEY_TILES * BLOCK_N
    COLUMNS: tl.constexpr = SLOTS * BLOCK_N
    candidates = (tl.reshape(scores, (BLOCK_M, COLUMNS)),)
    highest = row_maximum(candidates)
    candidates, cut = cut_top_k(candidates, count, tl.zeros_like(count), highest, top_k, RING)
    chosen = (candidates[0] <= cut[:, None]) == 0  # also true for NaN, which must reach the output
    weights = tl.where(chosen, candidates[0], 0.0)
    row_total = tl.sum(weights, 1)

    chosen = tl.reshape(chosen.to(tl.int32), (BLOCK_M, SLOTS, BLOCK_N))
    weights = tl.reshape(weights, (BLOCK_M, SLOTS, BLOCK_N))
    bits += row_offset * (RING // WORD)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for t in range(NUM_KEY_TILES):
        keep = tl.sum(tl.where(slots == t, chosen, 0), 1) > 0
        store_bits(bits, rows, num_queries, t * BLOCK_N, RING // WORD, keep, BLOCK_M, BLOCK_N)
        weight = tl.sum(tl.where(slots == t, weights, 0.0), 1)
        v_tile = load_tile(v, t * BLOCK_N + tl.arange(0, BLOCK_N), v_strides[2], num_keys, DV, BLOCK_DV)
        acc += tl.dot(weight.to(v_tile.dtype), v_tile, input_precision=PRECISION)

    write_rows(o, total, o_strides, row_offset, batch, head, rows, num_queries, acc, row_total, DV, BLOCK_DV)


@triton.jit
def row_terms(
    o, do, total, inverse, shift, o_strides, do_strides, num_queries, num_heads, num_tiles,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_tile = load_tile(at(o, o_strides, batch, head), rows, o_strides[2], num_queries, DV, BLOCK_DV).to(tl.float32)
    do_tile = load_tile(at(do, do_strides, batch, head), rows, do_strides[2], num_queries, DV, BLOCK_DV).to(tl.float32)
    row_inverse = tl.div_rn(1.0, load_vector(total + row_offset, rows, num_queries, 1.0) + EPS)
    tl.store(inverse + row_offset + rows, row_inverse, mask=rows < num_queries)
    tl.store(shift + row_offset + rows, tl.sum(o_tile * do_tile, 1) * row_inverse, mask=rows < num_queries)


@triton.jit
def own_strength(bits, tokens, num_tokens, num_words):
    """S of tokens with themselves: 1, or 0 where the selection, at the rows of these tokens, leaves them out."""
    if bits is None:
        return tl.where(tokens < num_tokens, 1.0, 0.0)
    else:
        word = tl.load(bits + tokens * num_words + tokens // WORD, mask=tokens < num_tokens, other=0)
        return ((word >> (tokens % WORD)) & 1).to(tl.float32)


@triton.jit
def shift_error(balance, inverse, shift):
    """What a shift of rounded o lacks, by the row's sum of S dS: exactly, that sum is EPS times the shift."""
    return inverse * (balance - EPS * shift)


@triton.jit
def grad_queries(
    w, k, v, squares, k_squares, c, bandwidth, do, inverse, shift, bits, dw, dalpha, dradius, lists, counts,
    w_strides, k_strides, v_strides, do_strides, dw_strides, bandwidth_stride,
    num_queries, num_keys, num_heads, group, num_tiles, offset, num_words, steepest,
    SELF: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """Shifts of 16-bit tokens are of a rounded o. A first walk finds their errors and mends them, for grad_keys, too."""
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    TILE: tl.constexpr = max(BLOCK_M, CELL)
    cell_list, count = cells(
        lists, counts, tile * BLOCK_M // TILE, head, batch, num_heads, tl.cdiv(num_queries, TILE), tl.cdiv(num_keys, CELL)
    )
    kv_index = batch.to(tl.int64) * (num_heads // group) + head // group
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    k_squares += kv_index * num_keys
    if bits is not None:
        bits += row_offset * num_words
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    decay = load_decay(bandwidth + head * bandwidth_stride)
    w_tile = load_tile(at(w, w_strides, batch, head), rows, w_strides[2], num_queries, D, BLOCK_D)
    do_tile = load_tile(at(do, do_strides, batch, head), rows, do_strides[2], num_queries, DV, BLOCK_DV)
    row_squares = load_squares(squares + row_offset, rows, num_queries, decay)
    row_c = load_vector(c + row_offset, rows, num_queries, 1.0)
    row_inverse = load_vector(inverse + row_offset, rows, num_queries, 0.0)
    row_shift = load_vector(shift + row_offset, rows, num_queries, 0.0)
    # Pulls are in this unit, so that they do not overflow in half precision: c may be large.
    two_alpha = 2.0 * tl.load(bandwidth + head * bandwidth_stride)
    unit = two_alpha + row_c
    row_steepest = steepest_of(steepest, row_squares, row_c, decay, w.dtype.element_ty)

    SUMS: tl.constexpr = tl.float64 if w.dtype.element_ty == tl.float32 else tl.float32
    balance = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), SUMS)
    pulls = tl.zeros((BLOCK_M,), SUMS)
    row_dalpha = tl.zeros((BLOCK_M,), tl.float32)
    row_dradius = tl.zeros((BLOCK_M,), tl.float32)
    steps = count * (CELL // BLOCK_N)
    for walk in tl.static_range(1 if w.dtype.element_ty == tl.float32 else 0, 2):
        first = listed(cell_list, 0, BLOCK_N)
        for step in range(steps):
            following = listed(cell_list, tl.minimum(step + 1, steps - 1), BLOCK_N)
            keys = first + tl.arange(0, BLOCK_N)
            k_tile = load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
            v_tile = load_tile(v, keys, v_strides[2], num_keys, DV, BLOCK_DV)
            x = log_similarity(w_tile, k_tile, row_squares, load_squares(k_squares, keys, num_keys, decay), decay)
            if SELF or CAUSAL:
                if first + BLOCK_N > tile * BLOCK_M + offset and (CAUSAL or first < (tile + 1) * BLOCK_M):
                    x = mask_backward(x, rows[:, None] + offset, keys[None, :], SELF, CAUSAL)
            near = exp2(x)
            margin = near - (row_c / decay)[:, None] * x
            inverse_s = inverse_strength(margin)
            if bits is not None:
                begin = tl.zeros((BLOCK_M,), tl.int32)
                keep = load_bits(bits, rows, num_queries, begin, begin + num_keys, first, num_words, BLOCK_M, BLOCK_N)
                inverse_s = tl.where(keep, inverse_s, 0.0)
            ds = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION) * row_inverse[:, None] - row_shift[:, None]
            if walk == 0:
                balance += tl.sum(positive(margin) * inverse_s * ds, 1)
            else:
                slope = ds * tl.minimum(inverse_s, row_steepest[:, None])
                pull = (slope * (near * (two_alpha / unit)[:, None] + (row_c / unit)[:, None])).to(k_tile.dtype)
                acc = dot(pull, k_tile, acc)
                pulls += tl.sum(pull.to(pulls.dtype), 1)
                slope *= x
                row_dradius += tl.sum(slope, 1)
                row_dalpha -= tl.sum(slope * near, 1)
            first = following
        if walk == 0:
            if SELF:
                own_v = load_tile(v, rows, v_strides[2], num_keys, DV, BLOCK_DV)
                own_ds = tl.sum(do_tile.to(tl.float32) * own_v.to(tl.float32), 1) * row_inverse - row_shift
                balance += own_strength(bits, rows, num_queries, num_words) * own_ds
            row_shift += shift_error(balance, row_inverse, row_shift)
            tl.store(shift + row_offset + rows, row_shift, mask=rows < num_queries)

    acc = (acc - pulls[:, None] * w_tile.to(acc.dtype)) * unit[:, None]
    store_tile(at(dw, dw_strides, batch, head), rows, dw_strides[2], num_queries, acc, D, BLOCK_D)
    store_parameters(dalpha, dradius, row_offset, rows, num_queries, row_dalpha / decay, row_dradius / decay, row_c)


@triton.jit
def store_parameters(dalpha, dradius, row_offset, rows, num_queries, row_dalpha, row_dradius, row_c):
    """Gradients of alpha and of K r for each row. A clamped c depends on neither K nor r."""
    row_dradius = tl.where(row_c == LARGEST_C, 0.0, row_dradius * row_c * tl.sqrt(row_c))
    tl.store(dalpha + row_offset + rows, row_dalpha, mask=rows < num_queries)
    tl.store(dradius + row_offset + rows, row_dradius, mask=rows < num_queries)


@triton.jit
def grad_keys(
    w, k, v, squares, k_squares, c, bandwidth, do, inverse, shift, bits, dw, dk, dv, lists, counts,
    w_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, bandwidth_stride,
    num_queries, num_keys, num_heads, group, num_tiles, offset, num_words, steepest,
    SELF: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """dw: (B, H, N, D) float32, contiguous: the gradient of the tokens as queries, which is added to dk; None without SELF."""
    tile, kv_head, batch = program_coordinates(num_tiles, num_heads // group)
    TILE: tl.constexpr = max(BLOCK_N, CELL)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    kv_index = batch.to(tl.int64) * (num_heads // group) + kv_head
    k_tile = load_tile(at(k, k_strides, batch, kv_head), keys, k_strides[2], num_keys, D, BLOCK_D)
    v_tile = load_tile(at(v, v_strides, batch, kv_head), keys, v_strides[2], num_keys, DV, BLOCK_DV)

    SUMS: tl.constexpr = tl.float64 if w.dtype.element_ty == tl.float32 else tl.float32
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), SUMS)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    pulls = tl.zeros((BLOCK_N,), SUMS)
    for member in range(group):
        head = kv_head * group + member
        row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
        decay = load_decay(bandwidth + head * bandwidth_stride)
        two_alpha = 2.0 * tl.load(bandwidth + head * bandwidth_stride)
        key_squares = load_squares(k_squares + kv_index * num_keys, keys, num_keys, decay)
        w_head, do_head = at(w, w_strides, batch, head), at(do, do_strides, batch, head)
        cell_list, count = cells(
            lists, counts, tile * BLOCK_N // TILE, head, batch, num_heads, tl.cdiv(num_keys, TILE), tl.cdiv(num_queries, CELL)
        )
        steps = count * (CELL // BLOCK_M)
        first = listed(cell_list, 0, BLOCK_M)
        for step in range(steps):
            following = listed(cell_list, tl.minimum(step + 1, steps - 1), BLOCK_M)
            rows = first + tl.arange(0, BLOCK_M)
            w_tile = load_tile(w_head, rows, w_strides[2], num_queries, D, BLOCK_D)
            do_tile = load_tile(do_head, rows, do_strides[2], num_queries, DV, BLOCK_DV)
            row_squares = load_squares(squares + row_offset, rows, num_queries, decay)
            row_c = load_vector(c + row_offset, rows, num_queries, 1.0)
            row_inverse = load_vector(inverse + row_offset, rows, num_queries, 0.0)
            row_shift = load_vector(shift + row_offset, rows, num_queries, 0.0)
            # Transposed, (keys, queries), so that the weights feed the next product from registers.
            x = log_similarity(k_tile, w_tile, key_squares, row_squares, decay)
            if SELF or CAUSAL:
                if first + offset < (tile + 1) * BLOCK_N and (CAUSAL or first + BLOCK_M > tile * BLOCK_N):
                    x = mask_backward(x, rows[None, :] + offset, keys[:, None], SELF, CAUSAL)
            near = exp2(x)
            margin = near - (row_c / decay)[None, :] * x
            inverse_s = inverse_strength(margin)
            weight = positive(margin) * inverse_s * row_inverse[None, :]
            ds = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION) * row_inverse[None, :] - row_shift[None, :]
            slope = ds * tl.minimum(inverse_s, steepest_of(steepest, row_squares, row_c, decay, w.dtype.element_ty)[None, :])
            if bits is not None:
                begin = tl.zeros((BLOCK_M,), tl.int32)
                keep = load_bits(
                    bits + row_offset * num_words, rows, num_queries, begin, begin + num_keys, tile * BLOCK_N, num_words,
                    BLOCK_M, BLOCK_N, True,
                )
                weight = tl.where(keep, weight, 0.0)
                slope = tl.where(keep, slope, 0.0)
            dv_tile = tl.dot(weight.to(do_tile.dtype), do_tile, dv_tile, input_precision=PRECISION)
            # A unit for pulls as in grad_queries, that of the last row, as c may differ by row.
            unit = two_alpha + tl.load(c + row_offset + tl.minimum(first + BLOCK_M, num_queries) - 1)
            pull = (slope * (near * (two_alpha / unit) + (row_c / unit)[None, :])).to(w_tile.dtype)
            dk_tile += unit * dot(pull, w_tile, tl.zeros_like(dk_tile))
            pulls += unit * tl.sum(pull.to(pulls.dtype), 1)
            first = following

    dk_tile -= pulls[:, None] * k_tile.to(dk_tile.dtype)
    if SELF:
        row_offset = (batch.to(tl.int64) * num_heads + kv_head) * num_queries
        dk_tile += load_tile(dw + row_offset * D, keys, D, num_keys, D, BLOCK_D)
        own = load_vector(inverse + row_offset, keys, num_keys, 0.0)
        if bits is not None:
            own *= own_strength(bits + row_offset * num_words, keys, num_keys, num_words)
        do_tile = load_tile(at(do, do_strides, batch, kv_head), keys, do_strides[2], num_keys, DV, BLOCK_DV)
        dv_tile += own[:, None] * do_tile.to(tl.float32)
    store_tile(at(dk, dk_strides, batch, kv_head), keys, dk_strides[2], num_keys, dk_tile, D, BLOCK_D)
    store_tile(at(dv, dv_strides, batch, kv_head), keys, dv_strides[2], num_keys, dv_tile, DV, BLOCK_DV)


@triton.jit
def grad_tokens(
    w, v, squares, c, bandwidth, do, inverse, shift, dw, dv, dalpha, dradius, lists, counts,
    w_strides, v_strides, do_strides, dw_strides, dv_strides, bandwidth_stride,
    num_tokens, num_heads, num_tiles, steepest,
    PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """S_ij = S_ji, so that a pair of tiles gives dw and dv of one of them at once: five products and one S, not 7 and 2."""
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    TILE: tl.constexpr = max(BLOCK_M, CELL)
    cell_list, count = cells(
        lists, counts, tile * BLOCK_M // TILE, head, batch, num_heads, tl.cdiv(num_tokens, TILE), tl.cdiv(num_tokens, CELL)
    )
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_tokens
    w, v, do = at(w, w_strides, batch, head), at(v, v_strides, batch, head), at(do, do_strides, batch, head)
    squares += row_offset
    inverse += row_offset
    shift += row_offset
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    decay = load_decay(bandwidth + head * bandwidth_stride)
    two_alpha = 2.0 * tl.load(bandwidth + head * bandwidth_stride)
    head_c = tl.load(c + row_offset)
    unit = two_alpha + head_c
    w_tile = load_tile(w, rows, w_strides[2], num_tokens, D, BLOCK_D)
    v_tile = load_tile(v, rows, v_strides[2], num_tokens, DV, BLOCK_DV)
    do_tile = load_tile(do, rows, do_strides[2], num_tokens, DV, BLOCK_DV)
    row_squares = load_squares(squares, rows, num_tokens, decay)
    row_inverse = load_vector(inverse, rows, num_tokens, 0.0)
    row_shift = load_vector(shift, rows, num_tokens, 0.0)

    row_steepest = steepest_of(steepest, row_squares, head_c, decay, w.dtype.element_ty)

    SUMS: tl.constexpr = tl.float64 if w.dtype.element_ty == tl.float32 else tl.float32
    dw_tile = tl.zeros((BLOCK_M, BLOCK_D), SUMS)
    dv_tile = row_inverse[:, None] * do_tile.to(tl.float32)  # the pair of a token with itself, which the walk skips
    pulls = tl.zeros((BLOCK_M,), SUMS)
    row_dalpha = tl.zeros((BLOCK_M,), tl.float32)
    row_dradius = tl.zeros((BLOCK_M,), tl.float32)
    MEND: tl.constexpr = w.dtype.element_ty != tl.float32  # as in grad_queries, but not for dw, which uses all tokens' shifts
    balance = tl.sum(do_tile.to(tl.float32) * v_tile.to(tl.float32), 1) * row_inverse - row_shift  # likewise
    dalpha_by_shift = tl.zeros((BLOCK_M,), tl.float32)
    dradius_by_shift = tl.zeros((BLOCK_M,), tl.float32)
    steps = count * (CELL // BLOCK_N)
    first = listed(cell_list, 0, BLOCK_N)
    for step in range(steps):
        following = listed(cell_list, tl.minimum(step + 1, steps - 1), BLOCK_N)
        others = first + tl.arange(0, BLOCK_N)
        other_w = load_tile(w, others, w_strides[2], num_tokens, D, BLOCK_D)
        other_v = load_tile(v, others, v_strides[2], num_tokens, DV, BLOCK_DV)
        other_do = load_tile(do, others, do_strides[2], num_tokens, DV, BLOCK_DV)
        other_inverse = load_vector(inverse, others, num_tokens, 0.0)
        other_shift = load_vector(shift, others, num_tokens, 0.0)
        x = log_similarity(w_tile, other_w, row_squares, load_squares(squares, others, num_tokens, decay), decay)
        if first + BLOCK_N > tile * BLOCK_M and first < (tile + 1) * BLOCK_M:
            x = mask_backward(x, rows[:, None], others[None, :], True, False)
        near = exp2(x)
        margin = near - (head_c / decay) * x
        inverse_s = inverse_strength(margin)
        weight = positive(margin) * inverse_s
        ds = product(do_tile, tl.trans(other_v), PRECISION) * row_inverse[:, None] - row_shift[:, None]
        if MEND:
            balance += tl.sum(weight * ds, 1)
        weight *= other_inverse[None, :]
        if other_do.dtype == tl.float32:
            dv_tile += product(weight, other_do, PRECISION)
        else:
            dv_tile = tl.dot(weight.to(other_do.dtype), other_do, dv_tile, input_precision=PRECISION)
        ds += product(v_tile, tl.trans(other_do), PRECISION) * other_inverse[None, :]
        ds -= other_shift[None, :]
        steep = tl.minimum(inverse_s, row_steepest[:, None])
        pull = (ds * steep * (near * (two_alpha / unit) + head_c / unit)).to(other_w.dtype)
        dw_tile = dot(pull, other_w, dw_tile)
        pulls += tl.sum(pull.to(pulls.dtype), 1)
        steep *= x
        row_dradius += tl.sum(ds * steep, 1)
        row_dalpha -= tl.sum(ds * steep * near, 1)
        if MEND:
            dradius_by_shift += tl.sum(steep, 1)
            dalpha_by_shift -= tl.sum(steep * near, 1)
        first = following

    dw_tile = (dw_tile - pulls[:, None] * w_tile.to(dw_tile.dtype)) * unit
    store_tile(at(dw, dw_strides, batch, head), rows, dw_strides[2], num_tokens, dw_tile, D, BLOCK_D)
    store_tile(at(dv, dv_strides, batch, head), rows, dv_strides[2], num_tokens, dv_tile, DV, BLOCK_DV)
    # Every pair counts in the rows of both tokens, and so do the errors of both shifts.
    if MEND:
        error = shift_error(balance, row_inverse, row_shift)
        row_dradius -= 2.0 * error * dradius_by_shift
        row_dalpha -= 2.0 * error * dalpha_by_shift
    row_c = tl.zeros((BLOCK_M,), tl.float32) + head_c
    store_parameters(dalpha, dradius, row_offset, rows, num_tokens, 0.5 * row_dalpha / decay, 0.5 * row_dradius / decay, row_c)


@triton.jit
def head_gradients(
    dalpha, dradius, coupling, order, of_alpha, of_radius, dorder,
    coupling_stride, num_heads, num_queries, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):
    """Sums over the queries of one head, one program each, and the gradient of the order parameter.

    dalpha, dradius (B, H, N): gradients of alpha and of K r of each row. of_alpha, of_radius (B, H): the sums of dalpha, and of
    dradius r, which is that of K. PER_TOKEN: order is (B, H, N), else (B, H).
    """
    index = tl.program_id(0)
    strength = tl.load(coupling + index % num_heads * coupling_stride)
    row_offset = index.to(tl.int64) * num_queries
    alpha, radius = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_queries, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        alpha += load_vector(dalpha + row_offset, rows, num_queries, 0.0)
        row_radius = load_vector(dradius + row_offset, rows, num_queries, 0.0)
        if PER_TOKEN:
            tl.store(dorder + row_offset + rows, row_radius * strength, mask=rows < num_queries)
            row_radius *= load_vector(order + row_offset, rows, num_queries, 0.0)
        radius += row_radius
    total = tl.sum(radius, 0)
    if not PER_TOKEN:
        tl.store(dorder + index, total * strength)
        total *= tl.load(order + index)
    tl.store(of_alpha + index, tl.sum(alpha, 0))
    tl.store(of_radius + index, total)


@triton.jit
def whole_sum(total, parameter):
    """For pairwise.grad_parameter: partials of coupling and of bandwidth are those of the gradients themselves."""
    return total
