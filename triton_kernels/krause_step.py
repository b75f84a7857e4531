"""The decoding step of Krause attention (arXiv 2602.11534): a query a sequence against the last W keys, in slots of a ring."""

import functools

import triton
import triton.language as tl

from .krause import rbf_scale, rbf_score
from .launch import Launch, LaunchParameters, cdiv, dot_precision, power_of_2, width_block
from .selection import cut_top_k, row_maximum
from .tiles import LOG2E, at, exp2, row_squares, store_tile, tile_pointers

ROWS = 16  # query heads of a group that are scored together: the smallest size of a product
TILE_BYTES = 16384  # of a tile of keys, or of values


@triton.jit
def decode(
    q, k, v, cached_k, cached_v, length, sigma, out,
    q_strides, k_strides, v_strides, out_strides, sigma_stride, num_heads, group, top_k,
    PRECISION: tl.constexpr, SELECT: tl.constexpr, WINDOW: tl.constexpr, NUM_TILES: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """Put the new key and value of a key head into their slot, and attend with the query heads that share it."""
    program = tl.program_id(0)
    head, batch = program % num_heads, program // num_heads
    position = tl.maximum(tl.load(length + batch), 0)
    slot = position % WINDOW
    count = tl.minimum(position, WINDOW - 1) + 1
    oldest = tl.where(count == WINDOW, (slot + 1) % WINDOW, 0)
    cached_k += program.to(tl.int64) * WINDOW * D
    cached_v += program.to(tl.int64) * WINDOW * DV
    k, v = at(k, k_strides, batch, head), at(v, v_strides, batch, head)
    # The new slot is written here but not read again: threads of a program do not see each other's stores.
    copy_row(cached_k + slot * D, k, D, BLOCK_D)
    copy_row(cached_v + slot * DV, v, DV, BLOCK_DV)

    # All scores of a row stay in registers, by tile: loops instead of one unrolled tile after another, which spills.
    tile = tl.arange(0, NUM_TILES)[None, :, None]
    num_tiles = tl.cdiv(count, BLOCK_N)
    for first in range(0, group, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        member = tl.minimum(rows, group - 1)  # rows beyond the group repeat its last head, and search no longer than it does
        q_pointers = tile_pointers(at(q, q_strides, batch, head * group), member, q_strides[1], BLOCK_D)
        q_tile = tl.load(q_pointers, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
        scale = rbf_scale(tl.load(sigma + (head * group + member) * sigma_stride)) * LOG2E

        scores = tl.full((BLOCK_M, NUM_TILES, BLOCK_N), float("-inf"), tl.float32)
        for t in range(num_tiles):
            slots = t * BLOCK_N + tl.arange(0, BLOCK_N)
            k_tile = load_slots(cached_k, slots, slot, count, k, D, BLOCK_D)
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            score = rbf_score(qk, row_squares(k_tile)[None, :], scale[:, None])
            score = tl.where((slots < count)[None, :], score, float("-inf"))
            scores = tl.where(tile == t, score[:, None, :], scores)
        scores = (tl.reshape(scores, (BLOCK_M, NUM_TILES * BLOCK_N)),)
        highest = row_maximum(scores)
        cut = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        if SELECT:
            counts, starts = tl.zeros_like(member) + count, tl.zeros_like(member) + oldest
            scores, cut = cut_top_k(scores, counts, starts, highest, top_k, WINDOW)

        chosen = (scores[0] <= cut[:, None]) == 0  # also true for NaN, which must reach the output
        weights = exp2(tl.where(chosen, scores[0] - highest[:, None], float("-inf")))
        total = tl.sum(weights, 1)
        weights = tl.reshape(weights, (BLOCK_M, NUM_TILES, BLOCK_N))
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        for t in range(num_tiles):
            v_tile = load_slots(cached_v, t * BLOCK_N + tl.arange(0, BLOCK_N), slot, count, v, DV, BLOCK_DV)
            weight = tl.sum(tl.where(tile == t, weights, 0.0), 1)
            # Added after the product: accumulating onto acc would be one chain with a rounding for every key.
            acc += tl.dot(weight.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        acc *= tl.div_rn(1.0, total)[:, None]
        store_tile(at(out, out_strides, batch, head * group), rows, out_strides[1], group, acc, DV, BLOCK_DV)


@triton.jit
def copy_row(to, row, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    column = tl.arange(0, BLOCK_WIDTH)
    tl.store(to + column, tl.load(row + column, mask=column < WIDTH), mask=column < WIDTH)


@triton.jit
def load_slots(cached, slots, new_slot, count, new_row, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows of a contiguous cache as a tile, with new_row for new_slot; slots from `count` on are zero."""
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    rows = tl.where(slots == new_slot, new_row, cached + slots * WIDTH)
    return tl.load(rows[:, None] + column, mask=(slots < count)[:, None] & (column < WIDTH), other=0.0)


@functools.lru_cache(maxsize=1024)
def plan(q_shape, cache_shape, value_width, itemsize, strides, sigma_stride, top_k, precision):
    batch, heads, window, width = cache_shape
    blocks = width_block(width), width_block(value_width)
    block_n = max(16, min(power_of_2(window), 128, TILE_BYTES // (max(blocks) * itemsize)))
    num_tiles = cdiv(power_of_2(window), block_n)
    scalars = (
        *strides, sigma_stride, heads, q_shape[1] // heads, 0 if top_k is None else top_k,
        precision, top_k is not None, window, num_tiles, width, value_width, ROWS, block_n, *blocks,
    )
    warps = 8 if window > 256 else 4  # with 4, the scores of wide windows would spill
    return Launch(decode, batch * heads, scalars, LaunchParameters(ROWS, block_n, num_warps=warps, num_stages=3))


def step(q, k, v, cache, sigma, top_k, out):
    """Fill out (B, Hq, 1, Dv) and the slots of the new tokens. cache.length is not updated, because all programs read it."""
    strides = q.stride(), k.stride(), v.stride(), out.stride()
    launch = plan(
        q.shape, cache.k.shape, v.shape[3], q.dtype.itemsize, strides, int(sigma.numel() > 1), top_k, dot_precision(q.dtype)
    )
    launch(q, k, v, *cache, sigma, out)
