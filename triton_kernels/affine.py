"""Softmax attention and affine-scaled attention (arXiv 2602.23057): o_i = alpha_i softmax(..)_i V + beta_i c_i.

c_i is the sum of the values that query i may see. It needs no pass over pairs: tiles of keys that a whole tile of queries sees
enter by their sums, chunks here, and only those at the ends of its windows are multiplied by their mask.

    chunk_sums       sums of values over chunks of as many tokens as the tiles of keys have
    running_sums     those of all chunks up to each
    attend           o, the plain attention output u, and lse
    grad_queries     dq, m = dO . u of each row, which is dalpha, and dbeta = dO . c
    grad_keys        dk and dv, summed over the query heads of a group
    grad_sink        the gradient of the sink's logits

With P = softmax and dP = dO v^T, dS = alpha P (dP - m), and dv gets dO by the weights alpha P + beta. A sink adds its logit to
the denominator only. lse is in base 2, and float64 where the inputs are float32. Rows without keys have u = c = m = 0. Dropout
(seed) multiplies P in u, and so dP, by 0 or 1 / (1 - p), and leaves beta alone.
"""

import triton
import triton.language as tl

from .dropout import drop, keeps
from .tiles import (
    LOG2E,
    at,
    exp2,
    finite_or_zero,
    inside,
    load_numbers,
    load_rows,
    load_tile,
    load_vector,
    poison,
    position,
    program_coordinates,
    reach,
    shared_coordinates,
    steps,
    store_tile,
    tile_ranges,
    tile_reach,
    transpose_window,
)

CHUNKS_AT_ONCE: tl.constexpr = tl.constexpr(16)  # chunks summed together if there are no running sums
RUN: tl.constexpr = tl.constexpr(128)  # chunks that running_sums sums together
COLUMNS: tl.constexpr = tl.constexpr(16)  # columns per program of running_sums


@triton.jit
def chunk_sums(
    values, sums, strides, num_rows, num_heads, num_chunks,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):
    """sums (B, H, chunks, width): the sum of the values of each chunk, in float32."""
    chunk, head, batch = program_coordinates(num_chunks, num_heads)
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    tile = load_tile(at(values, strides, batch, head), rows, strides[2], num_rows, WIDTH, BLOCK_WIDTH)
    column = tl.arange(0, BLOCK_WIDTH)
    sums += ((batch.to(tl.int64) * num_heads + head) * num_chunks + chunk) * WIDTH
    tl.store(sums + column, tl.sum(tile.to(tl.float32), 0), mask=column < WIDTH)


@triton.jit
def running_sums(sums, num_chunks, num_blocks, WIDTH: tl.constexpr):
    """sums (B, H, chunks, width) of single chunks become those of all chunks up to each, in place, some columns a program."""
    program = tl.program_id(0)
    column = program % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    sums += (program // num_blocks).to(tl.int64) * num_chunks * WIDTH
    before = tl.zeros((COLUMNS,), sums.dtype.element_ty)
    for first in range(0, num_chunks, RUN):
        chunk = first + tl.arange(0, RUN)
        places = sums + chunk.to(tl.int64)[:, None] * WIDTH + column[None, :]
        mask = (chunk < num_chunks)[:, None] & (column < WIDTH)[None, :]
        tile = tl.load(places, mask=mask, other=0.0)
        tl.store(places, before[None, :] + tl.cumsum(tile, 0), mask=mask)
        before += tl.sum(tile, 0)


@triton.jit
def sum_whole_tiles(
    sums, batch, head, num_heads, num_keys, tiles, SUM: tl.constexpr,
    RUNNING: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """(BLOCK_DV,) sum of the values of the keys in the whole tiles. RUNNING: sums are running ones, and no window has a begin.

    Where windows have one the chunks are added up, as in a difference of running sums what a row cannot see would leave its
    roundings.
    """
    sums += (batch.to(tl.int64) * num_heads + head) * tl.cdiv(num_keys, BLOCK_N) * DV
    start, stop = steps(tiles, False)
    if RUNNING:
        column = tl.arange(0, BLOCK_DV)
        last = (stop // BLOCK_N - 1).to(tl.int64)
        return tl.load(sums + last * DV + column, mask=(column < DV) & (last >= 0), other=0.0)
    else:
        total = tl.zeros((BLOCK_DV,), SUM)
        for step in range(start // BLOCK_N, stop // BLOCK_N, CHUNKS_AT_ONCE):
            chunk = step + tl.arange(0, CHUNKS_AT_ONCE)
            total += tl.sum(load_tile(sums, chunk, DV, stop // BLOCK_N, DV, BLOCK_DV), 0)
        return total


@triton.jit
def shift_and_factor(lse):
    """2^-lse as factor * 2^-shift with a float32 shift; where lse is float32 the factor is 1, and left out.

    Where scores are in the thousands, float32 rounds lse to 2^-12, by which all weights of a row are off then.
    """
    shift = lse.to(tl.float32)
    return shift, exp2((shift - lse).to(tl.float32))


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b. float32 inputs get float64 sums: over 64k tokens a float32 sum has an error of a dozen roundings."""
    if acc.dtype == tl.float64:
        return acc + tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def only_seen(weight, sees, tile):
    """(weights, tile) for a product in packed calls: what is not finite in a row of the tile reaches those alone who see it."""
    return tl.where(sees, weight + poison(tile)[None, :], 0.0), finite_or_zero(tile)


@triton.jit
def attend_tiles(
    highest, norm, acc, bias, q_tile, k, v, k_stride, v_stride, num_keys, tiles, begin, end, factor,
    seed, batch_head, rows, drop_below, keep_scale,
    NEGATIVE: tl.constexpr, SHIFTED: tl.constexpr, PACKED: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """Online softmax over the whole tiles of keys, or over their edges: (highest, norm, acc, bias).

    SHIFTED: bias gets the sums of the values that each row sees, at the edges. PACKED: there are other sequences at the edges.

    Products are scaled where they enter the exponent, by one fused multiply-add. That takes a positive factor: NEGATIVE says
    that its sign has to go to them. highest is scaled and rounded once: what is added up is relative to this very number.
    """
    start, stop = steps(tiles, EDGES)
    for step in range(start, stop, BLOCK_N):
        first = position(step, tiles, EDGES)
        k_tile = load_rows(k, first, BLOCK_N, k_stride, num_keys, EDGES, D, BLOCK_D)
        v_tile = load_rows(v, first, BLOCK_N, v_stride, num_keys, EDGES, DV, BLOCK_DV)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if NEGATIVE:
            product = -product
        if EDGES:
            sees = inside(first + tl.arange(0, BLOCK_N), begin, end)
            if SHIFTED:
                # Asking for the products, too, leaves the mask where they are, in registers; alone it goes through shared
                # memory, as large as a tile. A row with a NaN among its products is NaN anyway.
                mask, values = tl.where(sees & (product == product), 1.0, 0.0), v_tile
                if PACKED:
                    mask, values = only_seen(mask, sees, v_tile)
                bias = add_product(bias, mask.to(v_tile.dtype), values, PRECISION)
            product = tl.where(sees, product, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(product, 1) * factor)
        shift = new_highest
        if EDGES:  # rows that have seen no key yet keep -inf; shifting them by 0 instead avoids -inf - -inf
            shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weight = exp2(product * factor - shift[:, None])
        decay = exp2(highest - shift)
        norm = norm * decay + tl.sum(weight, 1)
        if seed is not None:
            weight = drop(weight, keeps(seed, batch_head, rows, first, drop_below, BLOCK_N), keep_scale)
        if EDGES and PACKED:
            weight, v_tile = only_seen(weight, sees, v_tile)
        acc = add_product(acc * decay[:, None], weight.to(v_tile.dtype), v_tile, PRECISION)
        highest = new_highest
    return highest, norm, acc, bias


@triton.jit(do_not_specialize=["together"])
def attend(
    q, k, v, alpha, beta, sink, sums, o, u, lse, token_bounds, seed,
    q_strides, k_strides, v_strides, o_strides,
    num_queries, num_keys, num_heads, group, num_tiles, together, window, factor, drop_below, keep_scale,
    NEGATIVE: tl.constexpr, RUNNING: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """u None: o is u. sums: see sum_whole_tiles. factor: of q . k in the exponent of 2, without its sign."""
    tile, head, batch = shared_coordinates(num_tiles, num_heads, together)
    tile = num_tiles - 1 - tile  # the longest rows of a causal call first, so that short ones fill up the end
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, token_bounds, num_queries, num_keys, window)
    tile_begin, all_begin, all_end, tile_end = tile_reach(
        tile * BLOCK_M, BLOCK_M, token_bounds, num_queries, num_keys, window
    )
    tiles = tile_ranges(tile_begin, all_begin, all_end, tile_end, BLOCK_N)
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)
    SUM: tl.constexpr = lse.dtype.element_ty
    # Prefetch the inputs of the epilogue, which has no other work to hide their latency.
    if alpha is not None:
        row_alpha = load_vector(alpha + row_offset, rows, num_queries, 0.0)
    if beta is not None:
        row_beta = load_vector(beta + row_offset, rows, num_queries, 0.0)
        whole = sum_whole_tiles(
            sums, batch, head // group, num_heads // group, num_keys, tiles, SUM, RUNNING, DV, BLOCK_N, BLOCK_DV
        )

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), SUM)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), SUM)
    bias = tl.zeros((BLOCK_M, BLOCK_DV), SUM)
    for EDGES in tl.static_range(2):
        if EDGES and beta is not None:
            bias += whole[None, :]
        highest, norm, acc, bias = attend_tiles(
            highest, norm, acc, bias, q_tile, k, v, k_strides[2], v_strides[2], num_keys, tiles, begin, end, factor,
            seed, batch * num_heads + head, rows, drop_below, keep_scale,
            NEGATIVE, beta is not None, token_bounds is not None, EDGES, PRECISION, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )

    sees_a_key = begin < end
    top = tl.where(sees_a_key, highest, 0.0)
    if sink is not None:
        logit = tl.load(sink + head) * LOG2E
        highest_score, top = top, tl.maximum(top, logit)
        decay = exp2(highest_score - top)
        norm = norm * decay + exp2(logit - top)
        acc *= decay[:, None]
    norm = norm.to(tl.float32)
    acc *= tl.where(sees_a_key, tl.div_rn(1.0, norm), 0.0)[:, None]
    level = tl.where(sees_a_key, top.to(SUM) + tl.log2(norm), 0.0)
    tl.store(lse + row_offset + rows, level, mask=rows < num_queries)
    if u is not None:
        u += row_offset * DV
        store_tile(u, rows, DV, num_queries, acc, DV, BLOCK_DV)
    if alpha is not None:
        acc *= row_alpha[:, None]
    if beta is not None:
        acc += row_beta[:, None] * bias
    store_tile(at(o, o_strides, batch, head), rows, o_strides[2], num_queries, acc, DV, BLOCK_DV)


@triton.jit
def grad_queries_tiles(
    acc, dbeta, mean, q_tile, do_tile, shift, row_m, k, v, k_stride, v_stride, num_keys, tiles, begin, end, factor,
    seed, batch_head, rows, drop_below, keep_scale,
    SHIFTED: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """acc plus sum_j P_ij (dP_ij - m_i) k_j over the whole tiles of keys, or over their edges.

    SHIFTED: dbeta gets the sums of dP, at the edges. EXACT: mean gets sum_j P_ij dP_ij.
    """
    start, stop = steps(tiles, EDGES)
    for step in range(start, stop, BLOCK_N):
        first = position(step, tiles, EDGES)
        k_tile = load_rows(k, first, BLOCK_N, k_stride, num_keys, EDGES, D, BLOCK_D)
        v_tile = load_rows(v, first, BLOCK_N, v_stride, num_keys, EDGES, DV, BLOCK_DV)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        weight = exp2(product * factor - shift[:, None])
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        if EDGES:
            sees = inside(first + tl.arange(0, BLOCK_N), begin, end)
            weight = tl.where(sees, weight, 0.0)
            if SHIFTED:
                dbeta += tl.sum(tl.where(sees, dp, 0.0), 1)
        if seed is not None:
            dp = drop(dp, keeps(seed, batch_head, rows, first, drop_below, BLOCK_N), keep_scale)
        if EXACT:
            share = weight * dp
            if EDGES:
                share = tl.where(sees, share, 0.0)
            mean += tl.sum(share, 1)
        ds = weight * (dp - row_m[:, None])
        if EDGES and PACKED:
            ds, k_tile = only_seen(ds, sees, k_tile)
        acc = add_product(acc, ds.to(k_tile.dtype), k_tile, PRECISION)
    return acc, dbeta, mean


@triton.jit(do_not_specialize=["together"])
def grad_queries(
    q, k, v, alpha, dbeta, sums, u, do, lse, dq, m, token_bounds, seed,
    q_strides, k_strides, v_strides, u_strides, do_strides, dq_strides,
    num_queries, num_keys, num_heads, group, num_tiles, together, window, scale, drop_below, keep_scale,
    RUNNING: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """dbeta None: there is no bias. sums: see sum_whole_tiles.

    m is dO . u or, EXACT, sum_j P_ij dP_ij: the same number without what weights and u lost when they were rounded, which the
    gradients of alpha and of the sink would keep.
    """
    tile, head, batch = shared_coordinates(num_tiles, num_heads, together)
    tile = num_tiles - 1 - tile  # the longest rows of a causal call first, so that short ones fill up the end
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    k, v = at(k, k_strides, batch, head // group), at(v, v_strides, batch, head // group)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = reach(rows, token_bounds, num_queries, num_keys, window)
    tile_begin, all_begin, all_end, tile_end = tile_reach(
        tile * BLOCK_M, BLOCK_M, token_bounds, num_queries, num_keys, window
    )
    tiles = tile_ranges(tile_begin, all_begin, all_end, tile_end, BLOCK_N)
    u_tile = load_tile(at(u, u_strides, batch, head), rows, u_strides[2], num_queries, DV, BLOCK_DV)
    do_tile = load_tile(at(do, do_strides, batch, head), rows, do_strides[2], num_queries, DV, BLOCK_DV)
    row_m = tl.sum(u_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    q_tile = load_tile(at(q, q_strides, batch, head), rows, q_strides[2], num_queries, D, BLOCK_D)
    shift, rest = shift_and_factor(load_vector(lse + row_offset, rows, num_queries, 0.0))
    if alpha is not None:
        row_alpha = load_vector(alpha + row_offset, rows, num_queries, 0.0)

    SUM: tl.constexpr = lse.dtype.element_ty
    row_dbeta = tl.zeros((BLOCK_M,), SUM)
    if dbeta is not None:
        whole = sum_whole_tiles(
            sums, batch, head // group, num_heads // group, num_keys, tiles, SUM, RUNNING, DV, BLOCK_N, BLOCK_DV
        )
        row_dbeta += tl.sum(do_tile.to(tl.float32) * whole[None, :], 1)
    acc = tl.zeros((BLOCK_M, BLOCK_D), SUM)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    for EDGES in tl.static_range(2):
        acc, row_dbeta, mean = grad_queries_tiles(
            acc, row_dbeta, mean, q_tile, do_tile, shift, row_m, k, v, k_strides[2], v_strides[2], num_keys, tiles, begin, end,
            scale * LOG2E, seed, batch * num_heads + head, rows, drop_below, keep_scale,
            dbeta is not None, EXACT, token_bounds is not None, EDGES, PRECISION, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )
    tl.store(m + row_offset + rows, mean if EXACT else row_m, mask=rows < num_queries)
    if lse.dtype.element_ty == tl.float64:
        acc *= rest[:, None]
    if alpha is not None:
        acc *= row_alpha[:, None]
    store_tile(at(dq, dq_strides, batch, head), rows, dq_strides[2], num_queries, acc * scale, D, BLOCK_D)
    if dbeta is not None:
        tl.store(dbeta + row_offset + rows, row_dbeta, mask=rows < num_queries)


@triton.jit
def grad_keys_tiles(
    dk_tile, dv_tile, of_all, k_tile, v_tile, q, do, lse, m, alpha, beta, q_stride, do_stride, num_queries, tiles, begin,
    end, factor, seed, batch_head, first_key, drop_below, keep_scale,
    PACKED: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """(dk_tile, dv_tile, of_all) plus what the whole tiles of queries of one head give them, or their edges.

    of_all: what beta and whole tiles give to all keys alike, where sums are float64: in a row's product of float32 numbers, a
    beta larger than the weights would make its roundings differ from key to key.
    """
    start, stop = steps(tiles, EDGES)
    for step in range(start, stop, BLOCK_M):
        first = position(step, tiles, EDGES)
        rows = first + tl.arange(0, BLOCK_M)
        q_tile = load_rows(q, first, BLOCK_M, q_stride, num_queries, EDGES, D, BLOCK_D)
        do_tile = load_rows(do, first, BLOCK_M, do_stride, num_queries, EDGES, DV, BLOCK_DV)
        shift, rest = shift_and_factor(load_numbers(lse, rows, num_queries, EDGES))
        row_m = load_numbers(m, rows, num_queries, EDGES)
        # Transposed, (keys, queries), so that the weights feed the next product from registers.
        product = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        weight = exp2(product * factor - shift[None, :])
        if lse.dtype.element_ty == tl.float64:
            weight *= rest[None, :]
        if EDGES:
            sees = inside(rows, begin, end)
            weight = tl.where(sees, weight, 0.0)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
        dv_weight = weight
        if seed is not None:
            kept = tl.trans(keeps(seed, batch_head, rows, first_key, drop_below, k_tile.shape[0]))
            dp, dv_weight = drop(dp, kept, keep_scale), drop(weight, kept, keep_scale)
        if alpha is not None:  # a factor of dp and m, not of the weights, makes one fused multiply-add of each of two lines
            row_alpha = load_numbers(alpha, rows, num_queries, EDGES)
            dv_weight *= row_alpha[None, :]
            dp *= row_alpha[None, :]
            row_m *= row_alpha
        if beta is not None:
            row_beta = load_numbers(beta, rows, num_queries, EDGES)
            if EDGES:
                dv_weight = tl.where(sees, dv_weight + row_beta[None, :], 0.0)
            elif of_all.dtype == tl.float64:
                of_all += tl.sum(row_beta.to(tl.float64)[:, None] * do_tile.to(tl.float64), 0)
            else:
                dv_weight += row_beta[None, :]
        ds = weight * (dp - row_m[None, :])
        if EDGES and PACKED:
            dv_weight, do_tile = only_seen(dv_weight, sees, do_tile)
            ds, q_tile = only_seen(ds, sees, q_tile)
        dv_tile = add_product(dv_tile, dv_weight.to(do_tile.dtype), do_tile, PRECISION)
        dk_tile = add_product(dk_tile, ds.to(q_tile.dtype), q_tile, PRECISION)
    return dk_tile, dv_tile, of_all


@triton.jit(do_not_specialize=["together"])
def grad_keys(
    q, k, v, alpha, beta, do, lse, m, dk, dv, token_bounds, seed,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    num_queries, num_keys, num_heads, group, num_tiles, together, window, scale, drop_below, keep_scale,
    PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    tile, kv_head, batch = shared_coordinates(num_tiles, num_heads // group, together)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_tile = load_tile(at(k, k_strides, batch, kv_head), keys, k_strides[2], num_keys, D, BLOCK_D)
    v_tile = load_tile(at(v, v_strides, batch, kv_head), keys, v_strides[2], num_keys, DV, BLOCK_DV)
    seen_by = transpose_window(window)
    begin, end = reach(keys, token_bounds, num_keys, num_queries, seen_by)
    tile_begin, all_begin, all_end, tile_end = tile_reach(
        tile * BLOCK_N, BLOCK_N, token_bounds, num_keys, num_queries, seen_by
    )
    tiles = tile_ranges(tile_begin, all_begin, all_end, tile_end, BLOCK_M)

    SUM: tl.constexpr = lse.dtype.element_ty
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), SUM)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_DV), SUM)
    of_all = tl.zeros((BLOCK_DV,), SUM)
    for member in range(group):
        head = kv_head * group + member
        q_head, do_head = at(q, q_strides, batch, head), at(do, do_strides, batch, head)
        row_offset = (batch.to(tl.int64) * num_heads + head) * num_queries
        alpha_head = None if alpha is None else alpha + row_offset
        beta_head = None if beta is None else beta + row_offset
        for EDGES in tl.static_range(2):
            dk_tile, dv_tile, of_all = grad_keys_tiles(
                dk_tile, dv_tile, of_all, k_tile, v_tile, q_head, do_head, lse + row_offset, m + row_offset, alpha_head,
                beta_head, q_strides[2], do_strides[2], num_queries, tiles, begin, end, scale * LOG2E,
                seed, batch * num_heads + head, tile * BLOCK_N, drop_below, keep_scale,
                token_bounds is not None, EDGES, PRECISION, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
            )

    store_tile(at(dk, dk_strides, batch, kv_head), keys, dk_strides[2], num_keys, dk_tile * scale, D, BLOCK_D)
    store_tile(at(dv, dv_strides, batch, kv_head), keys, dv_strides[2], num_keys, dv_tile + of_all[None, :], DV, BLOCK_DV)


@triton.jit
def grad_sink(sink, lse, m, alpha, dsink, num_batches, num_heads, num_queries, BLOCK: tl.constexpr):
    """One program a head. The sink is one more column of the weights, with dP = 0."""
    head = tl.program_id(0)
    logit = tl.load(sink + head) * LOG2E
    total = tl.zeros((BLOCK,), lse.dtype.element_ty)
    row_offset = head.to(tl.int64) * num_queries
    for _ in range(num_batches):
        for first in range(0, num_queries, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            weight = tl.exp2(logit - load_vector(lse + row_offset, rows, num_queries, float("inf")))
            gradient = load_vector(m + row_offset, rows, num_queries, 0.0)
            if alpha is not None:
                gradient *= load_vector(alpha + row_offset, rows, num_queries, 0.0)
            total -= weight * gradient
        row_offset += num_heads * num_queries
    tl.store(dsink + head, tl.sum(total, 0))
