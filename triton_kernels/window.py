"""The pairwise skeleton in the windows of a grid (nearfar.localities.ShiftedWindow), with a relative position table.

Windows partition the tokens: the queries of a window see its keys, and no others do. In a shifted grid the first window starts
`before` cells ahead of the grid along each axis, so that windows at the borders hold cells that are none, which are masked;
nothing is rolled. 2-D grids have one plane. A program takes a tile of a window's cells and walks over those of the same window.

A table has an entry for each offset of a query from a key. Codes are linear in the place of a cell in its window, such that
code(query) - code(key) + centre is the entry; centre is the code of the last cell.

    attend          o and lse
    grad_queries    dq, delta of each row, and the gradient of log(scale)
    grad_keys       dk and dv, summed over the query heads of a group
    sum_pairs       for a part of the windows, the sums of dS of each pair of places
    grad_table      those, added along the pairs of each entry in a fixed order
"""

import triton
import triton.language as tl

from .dropout import drop, keeps_of
from .pairwise import add_row_sums, online_softmax, write_grad_queries, write_rows
from .tiles import LOG2E, at, exp2, load_tile, load_vector, program_coordinates, row_squares, store_tile


@triton.jit
def cells_of(window, lanes, layout):
    """(tokens, whether they are any, codes) of lanes of a window; a token that is none is one past the last.

    layout: shape, cells of a window, cells before the grid and windows along each axis.
    """
    shape, sizes, before, counts = layout
    t, h, w = lanes // (sizes[1] * sizes[2]), lanes // sizes[2] % sizes[1], lanes % sizes[2]
    grid_t = window // (counts[1] * counts[2]) * sizes[0] - before[0] + t
    grid_h = window // counts[2] % counts[1] * sizes[1] - before[1] + h
    grid_w = window % counts[2] * sizes[2] - before[2] + w
    inside = (grid_t >= 0) & (grid_t < shape[0]) & (grid_h >= 0) & (grid_h < shape[1]) & (grid_w >= 0) & (grid_w < shape[2])
    inside &= t < sizes[0]
    tokens = (grid_t * shape[1] + grid_h) * shape[2] + grid_w
    return tl.where(inside, tokens, shape[0] * shape[1] * shape[2]), inside, code_of(t, h, w, sizes)


@triton.jit
def code_of(t, h, w, sizes):
    return (t * (2 * sizes[1] - 1) + h) * (2 * sizes[2] - 1) + w


@triton.jit
def cells_in(sizes):
    return sizes[0] * sizes[1] * sizes[2]


@triton.jit
def position_bias(table, head, row_codes, row_inside, column_codes, column_inside, sizes, TRANSPOSED: tl.constexpr = False):
    """(rows, columns) entries of the table of a head, in base 2, 0 where there is no table or no pair.

    Rows are queries and columns keys, or TRANSPOSED the other way round.
    """
    seen = row_inside[:, None] & column_inside[None, :]
    if table is None:
        return tl.zeros(seen.shape, tl.float32), seen
    else:
        centre = code_of(sizes[0] - 1, sizes[1] - 1, sizes[2] - 1, sizes)
        offset = row_codes[:, None] - column_codes[None, :]
        entry = head * (2 * centre + 1) + centre + (-offset if TRANSPOSED else offset)
        return tl.load(table + entry, mask=seen, other=0.0) * LOG2E, seen


@triton.jit
def attend(
    q, k, v, parameter, table, o, lse, seed,
    q_strides, k_strides, v_strides, o_strides, parameter_stride, num_tokens, num_heads, group, num_tiles, tiles_of_window,
    shape, sizes, before, counts, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    window, layout = tile // tiles_of_window, (shape, sizes, before, counts)
    rows, real, codes = cells_of(window, tile % tiles_of_window * BLOCK_M + tl.arange(0, BLOCK_M), layout)
    scale = SCALE(tl.load(parameter + head * parameter_stride)) * LOG2E
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_tokens, D, BLOCK_D)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for first in range(0, cells_in(sizes), BLOCK_N):
        keys, real_keys, key_codes = cells_of(window, first + tl.arange(0, BLOCK_N), layout)
        k_tile = load_tile(k, keys, k_strides[2], num_tokens, D, BLOCK_D)
        v_tile = load_tile(v, keys, v_strides[2], num_tokens, DV, BLOCK_DV)
        bias, seen = position_bias(table, head, codes, real, key_codes, real_keys, sizes)
        score = SCORE(q_tile, k_tile, row_squares(k_tile), scale, PRECISION) + bias
        weight, decay, highest, total = online_softmax(tl.where(seen, score, float("-inf")), highest, total)
        if seed is not None:
            weight = drop(weight, keeps_of(seed, batch * num_heads + head, rows, keys, drop_below), keep_scale)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)

    write_rows(o, lse, o_strides, batch, head, num_heads, rows, num_tokens, real, highest, total, acc, DV, BLOCK_DV)


@triton.jit
def grad_queries(
    q, k, v, parameter, table, o, do, lse, dq, delta, dlog_scale, seed,
    q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides, parameter_stride,
    num_tokens, num_heads, group, num_tiles, tiles_of_window, shape, sizes, before, counts, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    window, layout = tile // tiles_of_window, (shape, sizes, before, counts)
    rows, real, codes = cells_of(window, tile % tiles_of_window * BLOCK_M + tl.arange(0, BLOCK_M), layout)
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
    for first in range(0, cells_in(sizes), BLOCK_N):
        keys, real_keys, key_codes = cells_of(window, first + tl.arange(0, BLOCK_N), layout)
        k_tile = load_tile(k, keys, k_strides[2], num_tokens, D, BLOCK_D)
        v_tile = load_tile(v, keys, v_strides[2], num_tokens, DV, BLOCK_DV)
        bias, seen = position_bias(table, head, codes, real, key_codes, real_keys, sizes)
        # The gradient of log(scale) is that of the score alone.
        log_weight = SCORE(q_tile, k_tile, row_squares(k_tile), scale * LOG2E, PRECISION) - row_lse[:, None]
        weight = tl.where(seen, exp2(log_weight + bias), 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        if seed is not None:
            dp = drop(dp, keeps_of(seed, batch * num_heads + head, rows, keys, drop_below), keep_scale)
        ds = weight * (dp - row_delta[:, None])
        marked = tl.max((weight.to(tl.int32, bitcast=True) & -BLOCK_N) | tl.arange(0, BLOCK_N)[None, :], 1)
        best, _, _ = cells_of(window, first + (marked & (BLOCK_N - 1)), layout)
        nearest = tl.where(marked > highest, best, nearest)
        highest = tl.maximum(marked, highest)
        sums = add_row_sums(sums, weight, ds, log_weight)
        rounded = ds.to(k_tile.dtype)
        rounded_total += tl.sum(rounded.to(tl.float32), 1)
        # Not tl.dot(..., acc), as in pairwise.grad_queries.
        acc += scale * tl.dot(rounded, k_tile, input_precision=PRECISION)

    write_grad_queries(
        k, dq, delta, dlog_scale, k_strides, dq_strides, batch, head, num_heads, rows, num_tokens, num_tokens,
        acc, scale * rounded_total, nearest, row_delta, sums, GRAD, D, BLOCK_D,
    )


@triton.jit
def grad_keys(
    q, k, v, parameter, table, do, lse, delta, dk, dv, seed,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, parameter_stride,
    num_tokens, num_heads, group, num_tiles, tiles_of_window, shape, sizes, before, counts, drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    tile, kv_head, batch = program_coordinates(num_tiles, num_heads // group)
    window, layout = tile // tiles_of_window, (shape, sizes, before, counts)
    keys, real_keys, key_codes = cells_of(window, tile % tiles_of_window * BLOCK_N + tl.arange(0, BLOCK_N), layout)
    k_tile = load_tile(at(k, k_strides, batch, kv_head), keys, k_strides[2], num_tokens, D, BLOCK_D)
    v_tile = load_tile(at(v, v_strides, batch, kv_head), keys, v_strides[2], num_tokens, DV, BLOCK_DV)
    k_squares = row_squares(k_tile)

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
        row_offset = (batch.to(tl.int64) * num_heads + head) * num_tokens
        for first in range(0, cells_in(sizes), BLOCK_M):
            rows, real, codes = cells_of(window, first + tl.arange(0, BLOCK_M), layout)
            q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_tokens, D, BLOCK_D)
            do_tile = load_tile(at(do, do_strides, batch, head), rows, do_strides[2], num_tokens, DV, BLOCK_DV)
            row_lse = load_vector(lse + row_offset, rows, num_tokens, 0.0)
            row_delta = load_vector(delta + row_offset, rows, num_tokens, 0.0)
            # Transposed, (keys, queries), so that the weights feed the next product from registers.
            bias, seen = position_bias(table, head, key_codes, real_keys, codes, real, sizes, True)
            score = SCORE(q_tile, k_tile, k_squares, scale * LOG2E, PRECISION, True) + bias
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

    k_tile = load_tile(at(k, k_strides, batch, kv_head), keys, k_strides[2], num_tokens, D, BLOCK_D)
    dk_tile = GRAD(dk_tile * unit, ds_total[:, None] * unit, k_tile.to(tl.float32))
    store_tile(at(dk, dk_strides, batch, kv_head), keys, dk_strides[2], num_tokens, dk_tile, D, BLOCK_D)
    store_tile(at(dv, dv_strides, batch, kv_head), keys, dv_strides[2], num_tokens, dv_tile, DV, BLOCK_DV)


@triton.jit
def sum_pairs(
    q, k, v, parameter, table, do, lse, delta, sums, seed,
    q_strides, k_strides, v_strides, do_strides, parameter_stride,
    num_tokens, num_heads, group, num_batches, num_parts, row_tiles, column_tiles, shape, sizes, before, counts,
    drop_below, keep_scale,
    SCALE: tl.constexpr, SCORE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """sums (parts, Hq, places, places): of dS of the queries and keys at these places, over every num_parts-th window."""
    tile, head, part = program_coordinates(row_tiles * column_tiles, num_heads)
    layout = (shape, sizes, before, counts)
    row_lanes = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column_lanes = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = SCALE(tl.load(parameter + head * parameter_stride)) * LOG2E
    num_windows = cells_in(counts)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(num_batches * num_windows - part, num_parts)):
        index = part + step * num_parts
        batch, window = index // num_windows, index % num_windows
        rows, real, codes = cells_of(window, row_lanes, layout)
        keys, real_keys, key_codes = cells_of(window, column_lanes, layout)
        row_offset = (batch.to(tl.int64) * num_heads + head) * num_tokens
        q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_tokens, D, BLOCK_D)
        do_tile = load_tile(at(do, do_strides, batch, head), rows, do_strides[2], num_tokens, DV, BLOCK_DV)
        k_tile = load_tile(at(k, k_strides, batch, head // group), keys, k_strides[2], num_tokens, D, BLOCK_D)
        v_tile = load_tile(at(v, v_strides, batch, head // group), keys, v_strides[2], num_tokens, DV, BLOCK_DV)
        row_lse = load_vector(lse + row_offset, rows, num_tokens, 0.0)
        row_delta = load_vector(delta + row_offset, rows, num_tokens, 0.0)
        bias, seen = position_bias(table, head, codes, real, key_codes, real_keys, sizes)
        score = SCORE(q_tile, k_tile, row_squares(k_tile), scale, PRECISION) + bias
        weight = tl.where(seen, exp2(score - row_lse[:, None]), 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        if seed is not None:
            dp = drop(dp, keeps_of(seed, batch * num_heads + head, rows, keys, drop_below), keep_scale)
        acc += weight * (dp - row_delta[:, None])

    places = cells_in(sizes)
    sums += (part.to(tl.int64) * num_heads + head) * places * places
    inside = (row_lanes < places)[:, None] & (column_lanes < places)[None, :]
    tl.store(sums + row_lanes[:, None] * places + column_lanes[None, :], acc, mask=inside)


@triton.jit
def grad_table(
    sums, dtable, num_heads, num_parts, num_blocks, sizes, ENTRIES: tl.constexpr, PLACES: tl.constexpr
):
    """A program for ENTRIES entries of a head; PLACES: a power of two that holds those of a window."""
    head, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    entry, query = block * ENTRIES + tl.arange(0, ENTRIES), tl.arange(0, PLACES)
    width, height = 2 * sizes[2] - 1, 2 * sizes[1] - 1
    count, places = (2 * sizes[0] - 1) * height * width, cells_in(sizes)
    # The key of a query for an entry: by its offset along each axis.
    t = (query // (sizes[1] * sizes[2]))[None, :] - (entry // (height * width) - sizes[0] + 1)[:, None]
    h = (query // sizes[2] % sizes[1])[None, :] - (entry // width % height - sizes[1] + 1)[:, None]
    w = (query % sizes[2])[None, :] - (entry % width - sizes[2] + 1)[:, None]
    inside = (t >= 0) & (t < sizes[0]) & (h >= 0) & (h < sizes[1]) & (w >= 0) & (w < sizes[2])
    inside &= (query < places)[None, :] & (entry < count)[:, None]
    pair = query[None, :] * places + (t * sizes[1] + h) * sizes[2] + w
    total = tl.zeros((ENTRIES, PLACES), tl.float32)
    for part in range(num_parts):
        total += tl.load(sums + (part * num_heads + head).to(tl.int64) * places * places + pair, mask=inside, other=0.0)
    tl.store(dtable + head * count + entry, tl.sum(total, 1), mask=entry < count)
