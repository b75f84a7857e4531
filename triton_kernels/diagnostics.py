"""Streamed diagnostics of attention. Scores exist only in registers; there is no N x N object.

    squares             |x|^2 of each row: of keys for scores by distance, of values for the geometry
    statistics          lse, entropy, and the largest weight with its key, by a walk over the keys of a tile of queries
    key_mass            the column sums of the weights, by a walk over the queries of a tile of keys
    shifted_entropy     the entropy of weights with a beta, by a second walk over the keys, given lse
    statistics_grad_*   the gradients of lse and entropy, or of shifted_entropy, in q and k
    select              the largest scores of each query with their keys, a list of COUNT a round
    centre              s, the weighted sum of the selected values, and how far the selected lie from it
    separate            how near the others come: precision, recall, F

A score is c * raw with c > 0, so that raw has the order of the scores. For distances, raw = q.k - |k|^2 / 2 leaves out |q|^2,
which is the same for all keys of a query, but for float32 tokens (see raw_scores), and c is 1 / sigma^2; for dot products,
where k_squares and the parameter are None, c * raw = scale * (SIGN * q.k). All lse are those of c * raw, in nats.

Entropy is ln(total) - sum(w x) / total with x = log(w) <= 0 relative to the largest weight: two terms that do not cancel, so
that small entropies keep their digits. The geometry takes weights relative to those of the selected keys, as precision and
recall know no normaliser, and instead of distances D it compares excess = (D^2 - |s|^2) / 2 = w (w |v|^2 / 2 - v . s): the
order is the same, and keys of tiny weights do not drown in |s|^2.

Every query sees a key; the checks of the public functions see to that.
"""

import triton
import triton.language as tl

from .krause import rbf_scale
from .tiles import (
    LN2,
    LOG2E,
    at,
    exp2,
    inside,
    load_numbers,
    load_rows,
    load_tile,
    load_vector,
    position,
    program_coordinates,
    reach,
    row_squares,
    steps,
    store_tile,
    tile_ranges,
    tile_reach,
    transpose_window,
)


@triton.jit
def head_scale(parameter, parameter_stride, head, scale):
    """The positive factor c by which a head's raw scores are multiplied."""
    if parameter is None:
        return scale
    else:
        return rbf_scale(tl.load(parameter + head * parameter_stride))


@triton.jit
def rows_at(base, batch, head, num_heads, num_rows):
    """Pointer to the numbers of one (batch, head) in a contiguous (B, H, N) tensor."""
    return base + (batch.to(tl.int64) * num_heads + head) * num_rows


@triton.jit
def raw_scores(
    x_tile, y_tile, k_squares, keys, num_keys, SIGN: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr = False
):
    """Raw scores of two tiles, of rows and keys, or of keys and rows when transposed.

    Distances between float32 tokens are whole ones, taken in float64: far from the origin most of their digits cancel.
    """
    if k_squares is None:
        return tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION) * SIGN
    elif x_tile.dtype == tl.float32 and PRECISION == "ieee":
        x, y = x_tile.to(tl.float64), y_tile.to(tl.float64)
        products = tl.dot(x, tl.trans(y), out_dtype=tl.float64)
        return (products - 0.5 * tl.sum(x * x, 1)[:, None] - 0.5 * tl.sum(y * y, 1)[None, :]).to(tl.float32)
    else:
        norms = load_vector(k_squares, keys, num_keys, 0.0)
        half = 0.5 * (norms[:, None] if TRANSPOSED else norms[None, :])
        return tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION) - half


@triton.jit
def add_product(acc, weight, tile, PRECISION: tl.constexpr):
    """acc + weight tile, in float64 where acc is."""
    if acc.dtype == tl.float64:
        return tl.dot(weight.to(tl.float64), tile.to(tl.float64), acc, out_dtype=tl.float64)
    else:
        return tl.dot(weight, tile, acc, input_precision=PRECISION)


@triton.jit
def squares(x, out, strides, num_rows, num_heads, num_tiles, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """out (B, H, N) float32."""
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    x_tile = load_tile(at(x, strides, batch, head), rows, strides[2], num_rows, D, BLOCK_D)
    tl.store(rows_at(out, batch, head, num_heads, num_rows) + rows, row_squares(x_tile), mask=rows < num_rows)


@triton.jit
def statistics_tiles(
    highest, level, highest_key, total, weighted, q_tile, k, k_squares, k_stride, num_keys, tiles, begin, end, unit,
    SIGN: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """(highest, level, highest_key, total, weighted) after the whole tiles of keys, or after their edges."""
    start, stop = steps(tiles, EDGES)
    for step in range(start, stop, BLOCK_N):
        first = position(step, tiles, EDGES)
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, first, BLOCK_N, k_stride, num_keys, EDGES, D, BLOCK_D)
        raw = raw_scores(q_tile, k_tile, k_squares, keys, num_keys, SIGN, PRECISION)
        if EDGES:
            raw = tl.where(inside(keys, begin, end), raw, float("-inf"))
        tile_highest = tl.max(raw, 1)
        tile_key = tl.min(tl.where(raw == tile_highest[:, None], keys[None, :], num_keys), 1)
        # Edges before the whole tiles are visited after them.
        ahead = (tile_highest > highest) | ((tile_highest == highest) & (tile_key < highest_key))
        highest_key = tl.where(ahead, tile_key, highest_key)
        new_highest = tl.maximum(highest, tile_highest)
        new_level = new_highest * unit
        shift = new_level
        if EDGES:  # rows that have seen no key yet keep -inf; shifting them by 0 instead avoids -inf - -inf
            shift = tl.where(new_highest == float("-inf"), 0.0, new_level)
        x = raw * unit - shift[:, None]
        weight = exp2(x)
        if EDGES:
            x = tl.maximum(x, -1e30)  # 0 * -inf would be NaN
        moved = tl.where(highest == float("-inf"), 0.0, level - shift)
        decay = exp2(moved)
        weighted = (weighted + total * moved) * decay + tl.sum(weight * x, 1)
        total = total * decay + tl.sum(weight, 1)
        highest, level = new_highest, new_level
    return highest, level, highest_key, total, weighted


@triton.jit
def statistics(
    q, k, k_squares, parameter, lse, entropy, max_weight, max_key,
    q_strides, k_strides, parameter_stride, num_queries, num_keys, num_heads, group, num_tiles, window, scale,
    SIGN: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k = at(k, k_strides, batch, head // group)
    if k_squares is not None:
        k_squares = rows_at(k_squares, batch, head // group, num_heads // group, num_keys)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, None, num_queries, num_keys, window)
    tile_begin, all_begin, all_end, tile_end = tile_reach(tile * BLOCK_M, BLOCK_M, None, num_queries, num_keys, window)
    unit = head_scale(parameter, parameter_stride, head, scale) * LOG2E
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # highest * unit, rounded once: sums must be relative to exactly this number, not to the result of a fused multiply-add.
    level = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    highest_key = tl.zeros((BLOCK_M,), tl.int32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)  # sum of w x, x in base 2
    tiles = tile_ranges(tile_begin, all_begin, all_end, tile_end, BLOCK_N)
    for EDGES in tl.static_range(2):
        highest, level, highest_key, total, weighted = statistics_tiles(
            highest, level, highest_key, total, weighted, q_tile, k, k_squares, k_strides[2], num_keys, tiles, begin, end,
            unit, SIGN, EDGES, PRECISION, D, BLOCK_N, BLOCK_D,
        )

    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    here = rows < num_queries
    row_entropy = (tl.log2(total) - tl.div_rn(weighted, total)) * LN2
    tl.store(lse + row_offset + rows, (level + tl.log2(total)) * LN2, mask=here)
    tl.store(entropy + row_offset + rows, tl.where(row_entropy < 0, 0.0, row_entropy), mask=here)
    tl.store(max_weight + row_offset + rows, tl.where(total < 1, 1.0, tl.div_rn(1.0, total)), mask=here)
    tl.store(max_key + row_offset + rows, highest_key, mask=here)


@triton.jit
def key_mass_tiles(
    total, k_tile, keys, k_squares, num_keys, q, lse, alpha, q_stride, num_queries, tiles, begin, end, unit,
    SIGN: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """total plus the weights of the whole tiles of queries, or of their edges."""
    start, stop = steps(tiles, EDGES)
    for step in range(start, stop, BLOCK_M):
        first = position(step, tiles, EDGES)
        rows = first + tl.arange(0, BLOCK_M)
        q_tile = load_rows(q, first, BLOCK_M, q_stride, num_queries, EDGES, D, BLOCK_D)
        row_lse = load_numbers(lse, rows, num_queries, EDGES) * LOG2E
        raw = raw_scores(k_tile, q_tile, k_squares, keys, num_keys, SIGN, PRECISION, True)
        weight = exp2(raw * unit - row_lse[None, :])
        if alpha is not None:
            weight *= load_numbers(alpha, rows, num_queries, EDGES)[None, :]
        if EDGES:
            weight = tl.where(inside(rows, begin, end), weight, 0.0)
        total += tl.sum(weight, 1)
    return total


@triton.jit
def key_mass(
    q, k, k_squares, parameter, lse, alpha, mass,
    q_strides, k_strides, parameter_stride, num_queries, num_keys, num_heads, group, num_tiles, window, scale,
    SIGN: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """mass (B, Hq, M) float32: the sum of alpha exp(s - lse), alpha (B, Hq, N) or None for 1."""
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    q = at(q, q_strides, batch, head)
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    if alpha is not None:
        alpha += row_offset
    if k_squares is not None:
        k_squares = rows_at(k_squares, batch, head // group, num_heads // group, num_keys)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_tile = load_tile(at(k, k_strides, batch, head // group), keys, k_strides[2], num_keys, D, BLOCK_D)
    seen_by = transpose_window(window)
    begin, end = reach(keys, None, num_keys, num_queries, seen_by)
    tile_begin, all_begin, all_end, tile_end = tile_reach(tile * BLOCK_N, BLOCK_N, None, num_keys, num_queries, seen_by)
    unit = head_scale(parameter, parameter_stride, head, scale) * LOG2E

    total = tl.zeros((BLOCK_N,), tl.float32)
    tiles = tile_ranges(tile_begin, all_begin, all_end, tile_end, BLOCK_M)
    for EDGES in tl.static_range(2):
        total = key_mass_tiles(
            total, k_tile, keys, k_squares, num_keys, q, lse + row_offset, alpha, q_strides[2], num_queries, tiles,
            begin, end, unit, SIGN, EDGES, PRECISION, D, BLOCK_M, BLOCK_D,
        )
    tl.store(rows_at(mass, batch, head, num_heads, num_keys) + keys, total, mask=keys < num_keys)


@triton.jit
def sign_and_log(weight):
    """The sign of weights and log2 of their size, 0 for a weight of 0."""
    sign = (weight > 0).to(tl.float32) - (weight < 0).to(tl.float32)
    return sign, tl.log2(tl.where(weight == 0, 1.0, tl.abs(weight)))


@triton.jit
def shifted_entropy(
    q, k, k_squares, parameter, lse, alpha, beta, entropy, total,
    q_strides, k_strides, parameter_stride, num_queries, num_keys, num_heads, group, num_tiles, window, scale,
    SIGN: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """total = sum |w| and the entropy of |w| / total, w = alpha exp(s - lse) + beta; all (B, Hq, N) float32."""
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    k = at(k, k_strides, batch, head // group)
    if k_squares is not None:
        k_squares = rows_at(k_squares, batch, head // group, num_heads // group, num_keys)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, None, num_queries, num_keys, window)
    tile_begin, all_begin, all_end, tile_end = tile_reach(tile * BLOCK_M, BLOCK_M, None, num_queries, num_keys, window)
    unit = head_scale(parameter, parameter_stride, head, scale) * LOG2E
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)
    row_lse = load_vector(lse + row_offset, rows, num_queries, 0.0) * LOG2E
    row_alpha = load_vector(alpha + row_offset, rows, num_queries, 0.0)
    row_beta = load_vector(beta + row_offset, rows, num_queries, 0.0)

    sizes = tl.zeros((BLOCK_M,), tl.float32)
    logs = tl.zeros((BLOCK_M,), tl.float32)  # sum of |w| log2 |w|
    for first in range(tile_begin // BLOCK_N * BLOCK_N, tile_end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
        raw = raw_scores(q_tile, k_tile, k_squares, keys, num_keys, SIGN, PRECISION)
        weight = row_alpha[:, None] * exp2(raw * unit - row_lse[:, None]) + row_beta[:, None]
        if first < all_begin or first + BLOCK_N > all_end:
            weight = tl.where(inside(keys, begin, end), weight, 0.0)
        size = tl.abs(weight)
        sizes += tl.sum(size, 1)
        logs += tl.sum(size * tl.log2(tl.where(size == 0, 1.0, size)), 1)
    here = rows < num_queries
    tl.store(total + row_offset + rows, sizes, mask=here)
    tl.store(entropy + row_offset + rows, (tl.log2(sizes) - tl.div_rn(logs, sizes)) * LN2, mask=here)


@triton.jit
def statistics_grad_queries(
    q, k, k_squares, parameter, lse, level, slope, gain, alpha, beta, dq, weighted, of_softmax, of_weights,
    q_strides, k_strides, dq_strides, parameter_stride, num_queries, num_keys, num_heads, group, num_tiles, window, scale,
    SIGN: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """gain dS = P (level + slope log2(P)) with a level and a slope for each row; gain (B, Hkv).

    With a beta it is gain dS = alpha P dw, dw = sign(w) slope (level + log2 |w|), w = alpha P + beta, for the entropy of w;
    then of_softmax and of_weights (B, Hq, N) become the sums of P dw and of dw.

    With a parameter, weighted (B, Hq, N) becomes the sum of gain dS s / row_scale, where s are the scores. It is not taken from
    log2(P): where keys score alike, lse is mostly the logarithm of their number, which would have to cancel.
    """
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    k = at(k, k_strides, batch, head // group)
    if k_squares is not None:
        k_squares = rows_at(k_squares, batch, head // group, num_heads // group, num_keys)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, None, num_queries, num_keys, window)
    tile_begin, all_begin, all_end, tile_end = tile_reach(tile * BLOCK_M, BLOCK_M, None, num_queries, num_keys, window)
    row_scale = head_scale(parameter, parameter_stride, head, scale)
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)
    row_lse = load_vector(lse + row_offset, rows, num_queries, 0.0) * LOG2E
    row_level = load_vector(level + row_offset, rows, num_queries, 0.0)
    row_slope = load_vector(slope + row_offset, rows, num_queries, 0.0)
    if beta is not None:
        row_alpha = load_vector(alpha + row_offset, rows, num_queries, 0.0)
        row_beta = load_vector(beta + row_offset, rows, num_queries, 0.0)
        softmax_total = tl.zeros((BLOCK_M,), tl.float32)
        weight_total = tl.zeros((BLOCK_M,), tl.float32)

    BY_DISTANCE: tl.constexpr = parameter is not None
    SUMS: tl.constexpr = tl.float64 if BY_DISTANCE and q.dtype.element_ty == tl.float32 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_D), SUMS)
    ds_total = tl.zeros((BLOCK_M,), SUMS)
    row_weighted = tl.zeros((BLOCK_M,), tl.float32)
    left_out = tl.zeros((BLOCK_M,), tl.float32)  # of raw scores, see raw_scores
    if BY_DISTANCE and not (q.dtype.element_ty == tl.float32 and PRECISION == "ieee"):
        left_out = 0.5 * row_squares(q_tile)
    for first in range(tile_begin // BLOCK_N * BLOCK_N, tile_end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
        raw = raw_scores(q_tile, k_tile, k_squares, keys, num_keys, SIGN, PRECISION)
        x = raw * (row_scale * LOG2E) - row_lse[:, None]
        if beta is None:
            ds = exp2(x) * (row_level[:, None] + row_slope[:, None] * x)
        else:
            weight = exp2(x)
            sign, size = sign_and_log(row_alpha[:, None] * weight + row_beta[:, None])
            dw = sign * row_slope[:, None] * (row_level[:, None] + size)
            if first < all_begin or first + BLOCK_N > all_end:
                dw = tl.where(inside(keys, begin, end), dw, 0.0)
                weight = tl.where(inside(keys, begin, end), weight, 0.0)
            softmax_total += tl.sum(weight * dw, 1)
            weight_total += tl.sum(dw, 1)
            ds = row_alpha[:, None] * weight * dw
        ds_distance = ds * (raw - left_out[:, None])
        if first < all_begin or first + BLOCK_N > all_end:
            ds = tl.where(inside(keys, begin, end), ds, 0.0)
            ds_distance = tl.where(inside(keys, begin, end), ds_distance, 0.0)
        if weighted is not None:
            row_weighted += tl.sum(ds_distance, 1)
        ds = ds.to(k_tile.dtype)
        acc = add_product(acc, ds, k_tile, PRECISION)
        if BY_DISTANCE:
            ds_total += tl.sum(ds.to(SUMS), 1)

    if BY_DISTANCE:  # both sums must use the same rounded numbers, or they do not cancel for tokens near each other
        acc -= ds_total[:, None] * q_tile.to(SUMS)
    acc *= row_scale * SIGN / tl.load(gain + batch * (num_heads // group) + head // group)
    store_tile(at(dq, dq_strides, batch, head), rows, dq_strides[2], num_queries, acc, D, BLOCK_D)
    if weighted is not None:
        tl.store(weighted + row_offset + rows, row_weighted, mask=rows < num_queries)
    if beta is not None:
        tl.store(of_softmax + row_offset + rows, softmax_total, mask=rows < num_queries)
        tl.store(of_weights + row_offset + rows, weight_total, mask=rows < num_queries)


@triton.jit
def statistics_grad_keys(
    q, k, k_squares, parameter, lse, level, slope, gain, alpha, beta, dk,
    q_strides, k_strides, dk_strides, parameter_stride, num_queries, num_keys, num_heads, group, num_tiles, window, scale,
    SIGN: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    tile, kv_head, batch = program_coordinates(num_tiles, num_heads // group)
    k = at(k, k_strides, batch, kv_head)
    if k_squares is not None:
        k_squares = rows_at(k_squares, batch, kv_head, num_heads // group, num_keys)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
    seen_by = transpose_window(window)
    begin, end = reach(keys, None, num_keys, num_queries, seen_by)
    tile_begin, all_begin, all_end, tile_end = tile_reach(tile * BLOCK_N, BLOCK_N, None, num_keys, num_queries, seen_by)

    BY_DISTANCE: tl.constexpr = parameter is not None
    SUMS: tl.constexpr = tl.float64 if BY_DISTANCE and q.dtype.element_ty == tl.float32 else tl.float32
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), SUMS)
    ds_total = tl.zeros((BLOCK_N,), SUMS)
    # dS enters products unscaled, so that it neither underflows nor overflows in half precision. Sums are scaled per head.
    unit = head_scale(parameter, parameter_stride, kv_head * group, scale)
    for member in range(group):
        head = kv_head * group + member
        row_scale = head_scale(parameter, parameter_stride, head, scale)
        dk_tile *= unit / row_scale
        ds_total *= unit / row_scale
        unit = row_scale
        q_head = at(q, q_strides, batch, head)
        row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
        for first in range(tile_begin // BLOCK_M * BLOCK_M, tile_end, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            q_tile = load_tile(q_head, rows, q_strides[2], num_queries, D, BLOCK_D)
            row_lse = load_vector(lse + row_offset, rows, num_queries, 0.0) * LOG2E
            row_level = load_vector(level + row_offset, rows, num_queries, 0.0)
            row_slope = load_vector(slope + row_offset, rows, num_queries, 0.0)
            # Transposed, (keys, queries), so that dS feeds the next product from registers.
            raw = raw_scores(k_tile, q_tile, k_squares, keys, num_keys, SIGN, PRECISION, True)
            x = raw * (row_scale * LOG2E) - row_lse[None, :]
            if beta is None:
                ds = exp2(x) * (row_level[None, :] + row_slope[None, :] * x)
            else:
                row_alpha = load_vector(alpha + row_offset, rows, num_queries, 0.0)
                row_beta = load_vector(beta + row_offset, rows, num_queries, 0.0)
                weight = exp2(x) * row_alpha[None, :]
                sign, size = sign_and_log(weight + row_beta[None, :])
                ds = weight * sign * row_slope[None, :] * (row_level[None, :] + size)
            if first < all_begin or first + BLOCK_M > all_end:
                ds = tl.where(inside(rows, begin, end), ds, 0.0)
            ds = ds.to(q_tile.dtype)
            dk_tile = add_product(dk_tile, ds, q_tile, PRECISION)
            if BY_DISTANCE:
                ds_total += tl.sum(ds.to(SUMS), 1)

    if BY_DISTANCE:
        k_tile = load_tile(k, keys, k_strides[2], num_keys, D, BLOCK_D)
        dk_tile -= ds_total[:, None] * k_tile.to(SUMS)
    dk_tile *= unit * SIGN / tl.load(gain + batch * (num_heads // group) + kv_head)
    store_tile(at(dk, dk_strides, batch, kv_head), keys, dk_strides[2], num_keys, dk_tile, D, BLOCK_D)


@triton.jit
def insert(scores, keys, score, key):
    """The descending lists of each row with one more entry, their last ones dropped; of equal scores the first stays first."""
    new_scores, new_keys = (), ()
    carried_score, carried_key = score, key
    for t in tl.static_range(len(scores)):
        ahead = score > scores[t]
        new_scores = new_scores + (tl.where(ahead, carried_score, scores[t]),)
        new_keys = new_keys + (tl.where(ahead, carried_key, keys[t]),)
        carried_score, carried_key = tl.where(ahead, scores[t], carried_score), tl.where(ahead, keys[t], carried_key)
    return new_scores, new_keys


@triton.jit
def select(
    q, k, k_squares, scores, chosen,
    q_strides, k_strides, num_queries, num_keys, num_heads, group, num_tiles, window, top_n, first_rank,
    SIGN: tl.constexpr, PRECISION: tl.constexpr, COUNT: tl.constexpr, RESUMED: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Ranks first_rank to first_rank + COUNT - 1 of the raw scores of each row and of their keys, both (B, Hq, N, top_n).

    Equal scores rank by key. Beyond the keys of a row the scores are -inf. A round that is RESUMED goes on after the last entry
    of the round before it.
    """
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k = at(k, k_strides, batch, head // group)
    if k_squares is not None:
        k_squares = rows_at(k_squares, batch, head // group, num_heads // group, num_keys)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, None, num_queries, num_keys, window)
    tile_begin, all_begin, all_end, tile_end = tile_reach(tile * BLOCK_M, BLOCK_M, None, num_queries, num_keys, window)
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)
    entries = ((batch.to(tl.int64) * num_heads + head) * num_queries + rows) * top_n + first_rank
    here = rows < num_queries
    if RESUMED:
        last_score = tl.load(scores + entries - 1, mask=here, other=0.0)
        last_key = tl.load(chosen + entries - 1, mask=here, other=0)

    best, best_keys = (), ()
    for _ in tl.static_range(COUNT):
        best = best + (tl.full((BLOCK_M,), float("-inf"), tl.float32),)
        best_keys = best_keys + (tl.zeros((BLOCK_M,), tl.int32),)
    # Triton does not pipeline a loop that contains a loop, so the next tile of keys is prefetched here explicitly.
    first_key = tile_begin // BLOCK_N * BLOCK_N
    k_tile = load_tile(k, first_key + tl.arange(0, BLOCK_N), k_strides[2], num_keys, D, BLOCK_D)
    for first in range(first_key, tile_end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        raw = raw_scores(q_tile, k_tile, k_squares, keys, num_keys, SIGN, PRECISION)
        k_tile = load_tile(k, keys + BLOCK_N, k_strides[2], num_keys, D, BLOCK_D)
        if first < all_begin or first + BLOCK_N > all_end:
            raw = tl.where(inside(keys, begin, end), raw, float("-inf"))
        if RESUMED:
            raw = tl.where(follows(raw, keys, last_score, last_key), raw, float("-inf"))
        # Few rows find new entries in a tile, and only a few of them, so entries are inserted one by one.
        candidate = tl.max(raw, 1)
        while tl.max((candidate > best[COUNT - 1]).to(tl.int32), 0) > 0:
            key = tl.min(tl.where(raw == candidate[:, None], keys[None, :], num_keys), 1)
            best, best_keys = insert(best, best_keys, candidate, key)
            raw = tl.where(keys[None, :] == key[:, None], float("-inf"), raw)
            candidate = tl.max(raw, 1)

    for t in tl.static_range(COUNT):
        tl.store(scores + entries + t, best[t], mask=here)
        tl.store(chosen + entries + t, best_keys[t], mask=here)


@triton.jit
def follows(raw, keys, last_score, last_key):
    """The pairs that rank behind a row's entry (last_score, last_key)."""
    return (raw < last_score[:, None]) | ((raw == last_score[:, None]) & (keys[None, :] > last_key[:, None]))


@triton.jit
def load_chosen(v, stride, scores, chosen, entries, here, shift, unit, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """(weight, value) of one selected key of each row; weights are relative to 2^shift, and 0 beyond the keys of a row."""
    score = tl.load(scores + entries, mask=here, other=float("-inf"))
    key = tl.load(chosen + entries, mask=here, other=0)
    column = tl.arange(0, BLOCK_DV)[None, :]
    value = tl.load(v + key.to(tl.int64)[:, None] * stride + column, mask=column < DV, other=0.0)
    return exp2(score * unit - shift), value.to(tl.float32)


@triton.jit
def centre(
    v, parameter, scores, chosen, s, shift, excess, farthest,
    v_strides, parameter_stride, num_queries, num_heads, group, num_tiles, top_n, scale,
    DV: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """s (B, Hq, N, Dv) in the dtype of v, the excess of each selected key, and the largest of a row, farthest.

    Weights are relative to the sum of those selected, 2^shift, so that s is a mean and half precision holds it. From there on s
    counts as rounded, here and in `separate`.
    """
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    v = at(v, v_strides, batch, head // group)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    here = rows < num_queries
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    entries = (row_offset + rows) * top_n
    unit = head_scale(parameter, parameter_stride, head, scale) * LOG2E

    row_shift = tl.load(scores + entries, mask=here, other=0.0) * unit
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_DV), tl.float32)
    for t in range(top_n):
        weight, value = load_chosen(v, v_strides[2], scores, chosen, entries + t, here, row_shift, unit, DV, BLOCK_DV)
        total += weight
        acc += weight[:, None] * value
    row_shift += tl.log2(total)
    mean = tl.div_rn(acc, total[:, None]).to(v.dtype.element_ty)
    store_tile(s + row_offset * DV, rows, DV, num_queries, mean, DV, BLOCK_DV)
    tl.store(shift + row_offset + rows, row_shift, mask=here)

    mean = mean.to(tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for t in range(top_n):
        weight, value = load_chosen(v, v_strides[2], scores, chosen, entries + t, here, row_shift, unit, DV, BLOCK_DV)
        row_excess = weight * (0.5 * weight * tl.sum(value * value, 1) - tl.sum(value * mean, 1))
        absent = tl.load(scores + entries + t, mask=here, other=0.0) == float("-inf")
        tl.store(excess + entries + t, tl.where(absent, float("inf"), row_excess), mask=here)
        row_excess = tl.where(absent, float("-inf"), row_excess)
        largest = tl.maximum(largest, row_excess, propagate_nan=tl.PropagateNan.ALL)
    tl.store(farthest + row_offset + rows, largest, mask=here)


@triton.jit
def separate_tiles(
    nearest, intruders, q_tile, s_tile, row_shift, row_farthest, last_score, last_key, k, v, k_squares, v_squares,
    k_stride, v_stride, num_keys, tiles, begin, end, unit,
    SIGN: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """(nearest, intruders) after the whole tiles of keys, or after their edges."""
    start, stop = steps(tiles, EDGES)
    for step in range(start, stop, BLOCK_N):
        first = position(step, tiles, EDGES)
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, first, BLOCK_N, k_stride, num_keys, EDGES, D, BLOCK_D)
        v_tile = load_rows(v, first, BLOCK_N, v_stride, num_keys, EDGES, DV, BLOCK_DV)
        half_squares = 0.5 * load_numbers(v_squares, keys, num_keys, EDGES)
        raw = raw_scores(q_tile, k_tile, k_squares, keys, num_keys, SIGN, PRECISION)
        sv = tl.dot(s_tile, tl.trans(v_tile), input_precision=PRECISION)
        weight = exp2(raw * unit - row_shift[:, None])
        outside = tl.where(
            follows(raw, keys, last_score, last_key), weight * (weight * half_squares[None, :] - sv), float("inf")
        )
        if EDGES:
            outside = tl.where(inside(keys, begin, end), outside, float("inf"))
        nearest = tl.minimum(nearest, tl.min(outside, 1))
        intruders += tl.sum(tl.where(outside <= row_farthest[:, None], 1.0, 0.0), 1)
    return nearest, intruders


@triton.jit
def separate(
    q, k, v, k_squares, v_squares, parameter, scores, chosen, s, shift, excess, farthest, precision, recall, f_score,
    q_strides, k_strides, v_strides, parameter_stride,
    num_queries, num_keys, num_heads, group, num_tiles, window, top_n, scale,
    SIGN: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """It uses the tiles of `select`, so that every score has exactly the bits that decided its selection."""
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    if k_squares is not None:
        k_squares = rows_at(k_squares, batch, head // group, num_heads // group, num_keys)
    v_squares = rows_at(v_squares, batch, head // group, num_heads // group, num_keys)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, None, num_queries, num_keys, window)
    tile_begin, all_begin, all_end, tile_end = tile_reach(tile * BLOCK_M, BLOCK_M, None, num_queries, num_keys, window)
    unit = head_scale(parameter, parameter_stride, head, scale) * LOG2E
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    entries = (row_offset + rows) * top_n
    here = rows < num_queries
    last_score = tl.load(scores + entries + top_n - 1, mask=here, other=0.0)
    last_key = tl.load(chosen + entries + top_n - 1, mask=here, other=0)
    row_shift = load_vector(shift + row_offset, rows, num_queries, 0.0)
    row_farthest = load_vector(farthest + row_offset, rows, num_queries, 0.0)
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)
    s_tile = load_tile(s + row_offset * DV, rows, DV, num_queries, DV, BLOCK_DV)

    nearest = tl.full((BLOCK_M,), float("inf"), tl.float32)
    intruders = tl.zeros((BLOCK_M,), tl.float32)  # exact below 2^24, and cheaper to sum than integers
    tiles = tile_ranges(tile_begin, all_begin, all_end, tile_end, BLOCK_N)
    for EDGES in tl.static_range(2):
        nearest, intruders = separate_tiles(
            nearest, intruders, q_tile, s_tile, row_shift, row_farthest, last_score, last_key, k, v, k_squares, v_squares,
            k_strides[2], v_strides[2], num_keys, tiles, begin, end, unit,
            SIGN, EDGES, PRECISION, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )

    separated = tl.zeros((BLOCK_M,), tl.float32)
    for t in range(top_n):
        separated += tl.where(tl.load(excess + entries + t, mask=here, other=0.0) < nearest, 1.0, 0.0)
    selected = tl.minimum(end - begin, top_n).to(tl.float32)
    row_precision = tl.div_rn(selected, selected + intruders)
    row_recall = tl.where(nearest == float("inf"), 1.0, tl.div_rn(separated, selected))
    row_f_score = tl.div_rn(2 * row_precision * row_recall, row_precision + row_recall)
    sound = row_farthest == row_farthest
    tl.store(precision + row_offset + rows, tl.where(sound, row_precision, float("nan")), mask=here)
    tl.store(recall + row_offset + rows, tl.where(sound, row_recall, float("nan")), mask=here)
    tl.store(f_score + row_offset + rows, tl.where(sound, row_f_score, float("nan")), mask=here)
