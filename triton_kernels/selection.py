"""Exact top-k selection over score tiles that stay in registers.

A row's candidates are spread over a tuple of (BLOCK_M, BLOCK_N) tiles; pairs outside its window hold -inf. The k-th largest
score is bracketed by bisection on its value: each pass counts the scores above the midpoint, and a row stops as soon as
exactly k lie above it, long before the bracket closes. Where equal scores straddle the cut, a second bisection over key
order keeps those with the smaller index. Counts are held as float32 (exact below 2^24), because comparing to a float and
adding floats issue on two different pipes, where a predicate and an integer sum compete for one.
"""

import triton
import triton.language as tl


@triton.jit
def row_maximum(scores):
    largest = tl.max(scores[0], 1)
    for t in tl.static_range(1, len(scores)):
        largest = tl.maximum(largest, tl.max(scores[t], 1))
    return largest


@triton.jit
def row_minimum(scores):
    """Smallest score of each row that is not masked."""
    smallest = tl.min(tl.where(scores[0] == float("-inf"), float("inf"), scores[0]), 1)
    for t in tl.static_range(1, len(scores)):
        smallest = tl.minimum(smallest, tl.min(tl.where(scores[t] == float("-inf"), float("inf"), scores[t]), 1))
    return smallest


@triton.jit
def count_above(scores, threshold):
    """How many of each row's scores exceed its threshold."""
    above = tl.where(scores[0] > threshold[:, None], 1.0, 0.0)
    for t in tl.static_range(1, len(scores)):
        above += tl.where(scores[t] > threshold[:, None], 1.0, 0.0)
    return tl.sum(above, 1)


@triton.jit
def key_order(tile: tl.constexpr, start, BLOCK_N: tl.constexpr, RING: tl.constexpr):
    """(BLOCK_M, BLOCK_N) rank of each candidate among its row's keys; a row's first key stands in ring column `start`."""
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return (columns[None, :] - start[:, None] + RING) % RING


@triton.jit
def count_tied(scores, start, low, high, limit, BLOCK_N: tl.constexpr, RING: tl.constexpr):
    """How many of each row's scores lie in (low, high] and rank before limit."""
    total = tl.zeros_like(low)
    for t in tl.static_range(len(scores)):
        tied = (scores[t] > low[:, None]) & (scores[t] <= high[:, None])
        before = key_order(t, start, BLOCK_N, RING) < limit[:, None]
        total += tl.sum(tl.where(tied & before, 1.0, 0.0), 1)
    return total


@triton.jit
def keep_top_k(scores, count, start, highest, top_k, BLOCK_N: tl.constexpr, RING: tl.constexpr):
    """The scores with everything but each row's top_k largest replaced by -inf.

    count: candidates of each row. start: ring column of its first key. highest: its largest score.
    """
    k = tl.minimum(count, top_k).to(tl.float32)
    # Invariant of the bisection: at least k scores exceed low, fewer than k exceed high.
    lowest = row_minimum(scores)
    low = lowest - tl.abs(lowest) * 1e-6 - 1e-30
    high = highest
    above_low = count.to(tl.float32)
    above_high = tl.zeros_like(high)
    searching = (above_low > k) & (lowest < highest)
    while tl.max(searching.to(tl.int32), 0) > 0:
        middle = 0.5 * low + 0.5 * high
        above = count_above(scores, middle)
        up = searching & (above >= k)
        down = searching & (above < k)
        low = tl.where(up, middle, low)
        above_low = tl.where(up, above, above_low)
        high = tl.where(down, middle, high)
        above_high = tl.where(down, above, above_high)
        middle = 0.5 * low + 0.5 * high
        searching = (above_low > k) & (middle > low) & (middle < high)

    # Rows that still keep too many have equal scores in (low, high]: find how far in key order these may stay.
    needed = k - above_high
    limit = tl.full(count.shape, RING, tl.int32)
    short = tl.where(above_low > k, 0, limit)
    while tl.max(limit - short, 0) > 1:
        middle_limit = (short + limit) // 2
        enough = count_tied(scores, start, low, high, middle_limit, BLOCK_N, RING) >= needed
        limit = tl.where(enough, middle_limit, limit)
        short = tl.where(enough, short, middle_limit)

    kept = ()
    for t in tl.static_range(len(scores)):
        # Written with <= so that NaN is kept and reaches the output.
        dropped = scores[t] <= low[:, None]
        late = (scores[t] <= high[:, None]) & (key_order(t, start, BLOCK_N, RING) >= limit[:, None])
        kept = kept + (tl.where(dropped | late, float("-inf"), scores[t]),)
    return kept
