"""The pairwise skeleton: walk the tiles of keys that a tile of queries may see, score them, normalise by softmax.

An operator hangs four pair functions on it, passed as `tl.constexpr`: SCALE turns a head's parameter into the scale of its
scores, SCORE turns tiles of q and k and the squared norms |k|^2 into scores, GRAD turns the reductions of dS over the others
into the gradient of q or of k, GRAD_PARAMETER the gradient of log(scale) into that of the parameter. Scores are
proportional to the scale; the kernels fold log2(e) into it, so that every exponential is a bare exp2.

    attend            forward, any number of keys: online softmax; k_squares, (B, Hkv, M) float32, spares computing |k|^2
                      again for every tile of queries; bits, a selection, leave out the others
    attend_resident   forward, few keys: all scores of the tile stay in registers, hence exact top-k selection
    select            the selection alone, for attend
    grad_queries      dq, delta of each row, and the gradient of log(scale)
    grad_keys         dk and dv, summed over the query heads of a group
    grad_parameter    the partial sums of grad_queries, added in a fixed order and brought to the parameter

lse is in base 2. Rows without keys and rows beyond the last have o = dO = delta = 0, so their dS vanishes whatever lse is.

dS = P (dP - delta) sums to zero in a row. delta = dO.o is off by what o lost when it was rounded, so each gradient is written
such that this error cancels: dq by differences of keys (GRAD), that of log(scale) as the covariance of dP and the score.

Dropout (seed) multiplies the weights of the product with the values, and so dP, by Z: 0 or 1 / (1 - p). The sum of a row's
P Z dP is still dO.o.

In packed calls NaN of one sequence stays there: weights and dS of pairs that do not see each other are 0, and the matrices that
they are multiplied with have 0 where they are not finite, as 0 times NaN is NaN.
"""

import triton
import triton.language as tl

from .dropout import drop, keeps
from .selection import cut_top_k, row_maximum
from .tiles import (
    LN2,
    LOG2E,
    WORD,
    at,
    exp2,
    finite_or_zero,
    inside,
    load_bits,
    load_tile,
    load_tiles,
    load_vector,
    poison,
    program_coordinates,
    reach,
    row_squares,
    store_bits,
    store_tile,
    tile_reach,
    transpose_window,
)


@triton.jit
def attend(
    q, k, v, k_squares, parameter, o, lse, bits, token_bounds, seed,
    q_strides, k_strides, v_strides, o_strides, parameter_stride,
    num_queries, num_keys, num_heads, group, num_tiles, window, num_words, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, token_bounds, num_queries, num_keys, window)
    tile_begin, all_begin, all_end, tile_end = tile_reach(
        tile * BLOCK_M, BLOCK_M, token_bounds, num_queries, num_keys, window
    )
    if k_squares is not None:
        k_squares += (batch.to(tl.int64) * (num_heads // group) + head // group) * num_keys
    if bits is not None:
        bits += (batch.to(tl.int64) * num_heads + head) * num_queries * num_words
    scale = SCALE(tl.load(parameter + head * parameter_stride)) * LOG2E
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for first in range(tile_begin // BLOCK_N * BLOCK_N, tile_end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
        v_tile = load_tile(v, keys, v_strides[2], num_keys, DV, BLOCK_DV)
        squares = row_squares(k_tile) if k_squares is None else load_vector(k_squares, keys, num_keys, 0.0)
        score = SCORE(q_tile, k_tile, squares, scale, PRECISION)
        if bits is not None:
            seen = load_bits(bits, rows, num_queries, begin, end, first, num_words, BLOCK_M, BLOCK_N)
            score = tl.where(seen, score, float("-inf"))
        elif token_bounds is not None:
            seen = inside(keys, begin, end)
            score = tl.where(seen, score, float("-inf"))
        elif first < all_begin or first + BLOCK_N > all_end:
            score = tl.where(inside(keys, begin, end), score, float("-inf"))
        weight, decay, highest, total = online_softmax(score, highest, total)
        if seed is not None:
            kept = keeps(seed, batch * num_heads + head, rows, first, drop_below, BLOCK_N)
            weight = drop(weight, kept, keep_scale)
        if token_bounds is not None:
            weight = tl.where(seen, weight + poison(v_tile)[None, :], 0.0)
            v_tile = finite_or_zero(v_tile)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)

    write_rows(o, lse, o_strides, batch, head, num_heads, rows, num_queries, begin < end, highest, total, acc, DV, BLOCK_DV)


@triton.jit
def online_softmax(score, highest, total):
    """(weights, factor for earlier sums, highest, total) after one more tile of scores."""
    new_highest = tl.maximum(highest, tl.max(score, 1))
    # Rows that have seen no key yet keep -inf; shifting them by 0 instead avoids -inf - -inf.
    shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weight = exp2(score - shift[:, None])
    decay = exp2(highest - shift)
    return weight, decay, new_highest, total * decay + tl.sum(weight, 1)


@triton.jit
def attend_resident(
    q, k, v, parameter, o, lse, bits, token_bounds, seed,
    q_strides, k_strides, v_strides, o_strides, parameter_stride,
    num_queries, num_keys, num_heads, group, num_tiles, window, top_k, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, PRECISION: tl.constexpr, NUM_KEY_TILES: tl.constexpr, NUM_SLOTS: tl.constexpr,
    AT_ONCE: tl.constexpr, KEEP_TIES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, token_bounds, num_queries, num_keys, window)
    tile_begin, _, _, _ = tile_reach(tile * BLOCK_M, BLOCK_M, token_bounds, num_queries, num_keys, window)
    first_key = tile_begin // BLOCK_N * BLOCK_N
    scale = SCALE(tl.load(parameter + head * parameter_stride)) * LOG2E
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)

    if AT_ONCE:
        k_tiles = load_tiles(k, first_key, k_strides[2], num_keys, NUM_KEY_TILES, BLOCK_N, D, BLOCK_D)
    # A row's window fits a ring of NUM_SLOTS tiles: key tiles that are a ring apart share a slot, since no row sees both.
    scores = ()
    for slot in tl.static_range(NUM_SLOTS):
        merged = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
        for t in tl.static_range(slot, NUM_KEY_TILES, NUM_SLOTS):
            keys = first_key + t * BLOCK_N + tl.arange(0, BLOCK_N)
            k_tile = k_tiles[t] if AT_ONCE else load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
            score = SCORE(q_tile, k_tile, row_squares(k_tile), scale, PRECISION)
            merged = tl.where(inside(keys, begin, end), score, merged)
        scores = scores + (merged,)

    RING: tl.constexpr = NUM_SLOTS * BLOCK_N
    highest = row_maximum(scores)
    count = tl.maximum(end - begin, 0)
    scores, cut = cut_top_k(scores, count, (begin - first_key) % RING, highest, top_k, RING, KEEP_TIES)

    if AT_ONCE:
        v_tiles = load_tiles(v, first_key, v_strides[2], num_keys, NUM_KEY_TILES, BLOCK_N, DV, BLOCK_DV)
    bits += (batch.to(tl.int64) * num_heads + head) * num_queries * (RING // WORD)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for slot in tl.static_range(NUM_SLOTS):
        chosen = (scores[slot] <= cut[:, None]) == 0  # also true for NaN, which must reach the output
        store_bits(bits, rows, num_queries, first_key + slot * BLOCK_N, RING // WORD, chosen, BLOCK_M, BLOCK_N)
        for t in tl.static_range(slot, NUM_KEY_TILES, NUM_SLOTS):
            keys = first_key + t * BLOCK_N + tl.arange(0, BLOCK_N)
            # The key of a ring column is the first one at or after the row's begin.
            mine = chosen
            if t > slot:
                mine &= keys[None, :] < begin[:, None] + RING
            if t + NUM_SLOTS < NUM_KEY_TILES:
                mine &= (keys[None, :] < begin[:, None]) == 0
            weight = exp2(tl.where(mine, scores[slot] - shift[:, None], float("-inf")))
            total += tl.sum(weight, 1)
            if seed is not None:
                kept = keeps(seed, batch * num_heads + head, rows, first_key + t * BLOCK_N, drop_below, BLOCK_N)
                weight = drop(weight, kept, keep_scale)
            v_tile = v_tiles[t] if AT_ONCE else load_tile(v, keys, v_strides[2], num_keys, DV, BLOCK_DV)
            if token_bounds is not None:
                weight = tl.where(mine, weight + poison(v_tile)[None, :], 0.0)
                v_tile = finite_or_zero(v_tile)
            acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)

    write_rows(o, lse, o_strides, batch, head, num_heads, rows, num_queries, begin < end, highest, total, acc, DV, BLOCK_DV)


@triton.jit
def select(
    q, k, parameter, bits, token_bounds,
    q_strides, k_strides, parameter_stride,
    num_queries, num_keys, num_heads, group, num_tiles, window, top_k,
    SCALE: tl.constexpr, SCORE: tl.constexpr, PRECISION: tl.constexpr, NUM_KEY_TILES: tl.constexpr, NUM_SLOTS: tl.constexpr,
    SLOTS: tl.constexpr, KEEP_TIES: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """SLOTS: NUM_SLOTS, the tiles of the ring, and as many empty ones as make it a power of two."""
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k = at(k, k_strides, batch, head // group)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, token_bounds, num_queries, num_keys, window)
    tile_begin, _, _, _ = tile_reach(tile * BLOCK_M, BLOCK_M, token_bounds, num_queries, num_keys, window)
    first_key = tile_begin // BLOCK_N * BLOCK_N
    scale = SCALE(tl.load(parameter + head * parameter_stride)) * LOG2E
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)

    # Loops, because unrolled tiles would take too long to compile.
    slots = tl.arange(0, SLOTS)[None, :, None]
    scores = tl.full((BLOCK_M, SLOTS, BLOCK_N), float("-inf"), tl.float32)
    for t in range(NUM_KEY_TILES):
        keys = first_key + t * BLOCK_N + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
        score = SCORE(q_tile, k_tile, row_squares(k_tile), scale, PRECISION)
        mine = (slots == t % NUM_SLOTS) & inside(keys, begin, end)[:, None, :]
        scores = tl.where(mine, score[:, None, :], scores)

    RING: tl.constexpr = NUM_SLOTS * BLOCK_N
    COLUMNS: tl.constexpr = SLOTS * BLOCK_N
    candidates = (tl.reshape(scores, (BLOCK_M, COLUMNS)),)
    count = tl.maximum(end - begin, 0)
    highest = row_maximum(candidates)
    candidates, cut = cut_top_k(candidates, count, (begin - first_key) % RING, highest, top_k, RING, KEEP_TIES)
    chosen = (candidates[0] <= cut[:, None]) == 0  # also true for NaN, which must reach the output
    chosen = tl.reshape(chosen.to(tl.int32), (BLOCK_M, SLOTS, BLOCK_N))
    bits += (batch.to(tl.int64) * num_heads + head) * num_queries * (RING // WORD)
    for slot in range(NUM_SLOTS):
        keep = tl.sum(tl.where(slots == slot, chosen, 0), 1) > 0
        store_bits(bits, rows, num_queries, first_key + slot * BLOCK_N, RING // WORD, keep, BLOCK_M, BLOCK_N)


@triton.jit
def write_rows(
    o, lse, o_strides, batch, head, num_heads, rows, num_queries, sees_a_key, highest, total, acc,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """Normalise and store a tile of outputs; rows without keys give zeros."""
    inverse = tl.where(sees_a_key, tl.div_rn(1.0, total), 0.0)  # `/` is off by up to two units in the last place
    out = acc * inverse[:, None]
    store_tile(at(o, o_strides, batch, head), rows, o_strides[2], num_queries, out, DV, BLOCK_DV)
    lse += (batch.to(tl.int64) * num_heads + head) * num_queries
    tl.store(lse + rows, tl.where(sees_a_key, highest + tl.log2(total), 0.0), mask=rows < num_queries)


@triton.jit
def grad_queries(
    q, k, v, parameter, o, do, lse, bits, dq, delta, dlog_scale, token_bounds, seed,
    q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides, parameter_stride,
    num_queries, num_keys, num_heads, group, num_tiles, window, num_words, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, token_bounds, num_queries, num_keys, window)
    tile_begin, all_begin, all_end, tile_end = tile_reach(
        tile * BLOCK_M, BLOCK_M, token_bounds, num_queries, num_keys, window
    )
    scale = SCALE(tl.load(parameter + head * parameter_stride))
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)
    do_tile = load_tile(at(do, do_strides, batch, head), rows, do_strides[2], num_queries, DV, BLOCK_DV)
    o_tile = load_tile(at(o, o_strides, batch, head), rows, o_strides[2], num_queries, DV, BLOCK_DV)
    row_lse = load_vector(lse + row_offset, rows, num_queries, 0.0)
    if bits is not None:
        bits += row_offset * num_words
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    rounded_total = tl.zeros((BLOCK_M,), tl.float32)
    sums = (tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32))
    highest = tl.full((BLOCK_M,), BLOCK_N - 1, tl.int32)  # bits of the greatest weight, the lowest of them its column
    nearest = tl.zeros((BLOCK_M,), tl.int32) + num_keys  # its key
    for first in range(tile_begin // BLOCK_N * BLOCK_N, tile_end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
        v_tile = load_tile(v, keys, v_strides[2], num_keys, DV, BLOCK_DV)
        log_weight = SCORE(q_tile, k_tile, row_squares(k_tile), scale * LOG2E, PRECISION) - row_lse[:, None]
        weight = exp2(log_weight)
        if bits is not None:
            seen = load_bits(bits, rows, num_queries, begin, end, first, num_words, BLOCK_M, BLOCK_N)
            weight = tl.where(seen, weight, 0.0)
        elif token_bounds is not None:
            seen = inside(keys, begin, end)
            weight = tl.where(seen, weight, 0.0)
        elif first < all_begin or first + BLOCK_N > all_end:
            weight = tl.where(inside(keys, begin, end), weight, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        if seed is not None:
            kept = keeps(seed, batch * num_heads + head, rows, first, drop_below, BLOCK_N)
            dp = drop(dp, kept, keep_scale)
        ds = weight * (dp - row_delta[:, None])
        if token_bounds is not None:
            ds, log_weight, k_tile = tl.where(seen, ds, 0.0), tl.where(seen, log_weight, 0.0), finite_or_zero(k_tile)
        marked = tl.max((weight.to(tl.int32, bitcast=True) & -BLOCK_N) | tl.arange(0, BLOCK_N)[None, :], 1)
        nearest = tl.where(marked > highest, first + (marked & (BLOCK_N - 1)), nearest)
        highest = tl.maximum(marked, highest)
        sums = add_row_sums(sums, weight, ds, log_weight)
        rounded = ds.to(k_tile.dtype)
        rounded_total += tl.sum(rounded.to(tl.float32), 1)
        # Not tl.dot(..., acc): Triton (3.6, sm_90) then lets the product run on into the next step, but as k_tile also goes
        # through registers for |k|^2, it gives it no extra buffer, and the next load overwrites it: wrong dq, now and then.
        acc += scale * tl.dot(rounded, k_tile, input_precision=PRECISION)

    write_grad_queries(
        k, dq, delta, dlog_scale, k_strides, dq_strides, batch, head, num_heads, rows, num_queries, num_keys,
        acc, scale * rounded_total, nearest, row_delta, sums, GRAD, D, BLOCK_D,
    )


@triton.jit
def add_row_sums(sums, weight, ds, log_weight):
    """(sum of dS, of dS log P, of P log P) of each row after one more tile."""
    ds_total, ds_score, mean_score = sums
    return ds_total + tl.sum(ds, 1), ds_score + tl.sum(ds * log_weight, 1), mean_score + tl.sum(weight * log_weight, 1)


@triton.jit
def write_grad_queries(
    k, dq, delta, dlog_scale, k_strides, dq_strides, batch, head, num_heads, rows, num_queries, num_keys,
    acc, ds_total_rounded, nearest, row_delta, sums, GRAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Store dq and delta of a tile of queries, and what it adds to the gradient of log(scale).

    ds_total_rounded: of the dS that are in acc, in its units. nearest: the key of the greatest weight of each row.
    """
    ds_total, ds_score, mean_score = sums
    # dq is taken relative to a point; with the nearest key, the terms of a row cancel best.
    centre = load_tile(k, nearest, k_strides[2], num_keys, D, BLOCK_D)
    dq_tile = GRAD(acc, ds_total_rounded[:, None], centre.to(tl.float32))
    store_tile(at(dq, dq_strides, batch, head), rows, dq_strides[2], num_queries, dq_tile, D, BLOCK_D)
    # The sum of dS is the error of delta: grad_keys gets the corrected delta.
    delta += (batch.to(tl.int64) * num_heads + head) * num_queries
    tl.store(delta + rows, row_delta + ds_total, mask=rows < num_queries)
    # d log(scale) = sum dS * score, with any number taken off the scores of a row; off the mean, an error of delta cancels.
    dlog_row = ds_score - ds_total * mean_score
    tl.store(dlog_scale + tl.program_id(0), tl.sum(tl.where(rows < num_queries, dlog_row, 0.0), 0) * LN2)


@triton.jit
def grad_keys(
    q, k, v, parameter, do, lse, bits, delta, dk, dv, token_bounds, seed,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, parameter_stride,
    num_queries, num_keys, num_heads, group, num_tiles, window, num_words, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    tile, kv_head, batch = program_coordinates(num_tiles, num_heads // group)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_tile = load_tile(at(k, k_strides, batch, kv_head), keys, k_strides[2], num_keys, D, BLOCK_D)
    v_tile = load_tile(at(v, v_strides, batch, kv_head), keys, v_strides[2], num_keys, DV, BLOCK_DV)
    k_squares = row_squares(k_tile)
    seen_by = transpose_window(window)
    tile_begin, all_begin, all_end, tile_end = tile_reach(
        tile * BLOCK_N, BLOCK_N, token_bounds, num_keys, num_queries, seen_by
    )

    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    ds_total = tl.zeros((BLOCK_N,), tl.float32)
    # dS enters products unscaled, so that it neither underflows nor overflows in half precision. Sums are scaled per head.
    unit = SCALE(tl.load(parameter + kv_head * group * parameter_stride))
    for member in range(group):
        head = kv_head * group + member
        scale = SCALE(tl.load(parameter + head * parameter_stride))
        dk_tile *= unit / scale
        ds_total *= unit / scale
        unit = scale
        q_head, do_head = at(q, q_strides, batch, head), at(do, do_strides, batch, head)
        row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
        for first in range(tile_begin // BLOCK_M * BLOCK_M, tile_end, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            q_tile = load_tile(q_head, rows, q_strides[2], num_queries, D, BLOCK_D)
            do_tile = load_tile(do_head, rows, do_strides[2], num_queries, DV, BLOCK_DV)
            row_lse = load_vector(lse + row_offset, rows, num_queries, 0.0)
            row_delta = load_vector(delta + row_offset, rows, num_queries, 0.0)
            # Transposed, (keys, queries), so that the weights feed the next product from registers.
            score = SCORE(q_tile, k_tile, k_squares, scale * LOG2E, PRECISION, True)
            weight = exp2(score - row_lse[None, :])
            if bits is not None:
                begin, end = reach(rows, token_bounds, num_queries, num_keys, window)
                seen = load_bits(
                    bits + row_offset * num_words, rows, num_queries, begin, end, tile * BLOCK_N, num_words,
                    BLOCK_M, BLOCK_N, True,
                )
                weight = tl.where(seen, weight, 0.0)
            elif token_bounds is not None:
                begin, end = reach(rows, token_bounds, num_queries, num_keys, window)
                seen = inside(keys, begin, end, True)
                weight = tl.where(seen, weight, 0.0)
            elif first < all_begin or first + BLOCK_M > all_end:
                begin, end = reach(rows, token_bounds, num_queries, num_keys, window)
                weight = tl.where(inside(keys, begin, end, True), weight, 0.0)
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
            dv_weight = weight
            if seed is not None:
                kept = keeps(seed, batch * num_heads + head, rows, tile * BLOCK_N, drop_below, BLOCK_N)
                kept = tl.trans(kept)
                dp, dv_weight = drop(dp, kept, keep_scale), drop(weight, kept, keep_scale)
            ds = weight * (dp - row_delta[None, :])
            if token_bounds is not None:
                dv_weight = tl.where(seen, dv_weight + poison(do_tile)[None, :], 0.0)
                ds, q_tile, do_tile = tl.where(seen, ds, 0.0), finite_or_zero(q_tile), finite_or_zero(do_tile)
            dv_tile = tl.dot(dv_weight.to(do_tile.dtype), do_tile, dv_tile, input_precision=PRECISION)
            rounded = ds.to(q_tile.dtype)
            dk_tile = tl.dot(rounded, q_tile, dk_tile, input_precision=PRECISION)
            ds_total += tl.sum(rounded.to(tl.float32), 1)  # of what enters dk, so that dk depends on differences q - k alone

    k_tile = load_tile(at(k, k_strides, batch, kv_head), keys, k_strides[2], num_keys, D, BLOCK_D)
    dk_tile = GRAD(dk_tile * unit, ds_total[:, None] * unit, k_tile.to(tl.float32))
    store_tile(at(dk, dk_strides, batch, kv_head), keys, dk_strides[2], num_keys, dk_tile, D, BLOCK_D)
    store_tile(at(dv, dv_strides, batch, kv_head), keys, dv_strides[2], num_keys, dv_tile, DV, BLOCK_DV)


@triton.jit
def grad_parameter(
    dlog_scale, parameter, dparameter, num_batches, num_parameters, num_partials,
    GRAD_PARAMETER: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program a parameter; dlog_scale is (batches, parameters, partials), all heads of a shared one in its partials."""
    index = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for batch in range(num_batches):
        partials = dlog_scale + (batch * num_parameters + index) * num_partials
        for first in range(0, num_partials, BLOCK):
            total += load_vector(partials, first + tl.arange(0, BLOCK), num_partials, 0.0)
    gradient = GRAD_PARAMETER(tl.sum(total, 0), tl.load(parameter + index))
    tl.store(dparameter + index, gradient)
