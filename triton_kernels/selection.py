"""Exact top-k selection over score tiles that stay in registers.

A row's candidates are spread over a tuple of tiles, as wide as each other but for the first; pairs outside its window hold
-inf. The k-th largest score is bracketed by bisection on its value: each pass counts the scores above the midpoint, and a row
stops as soon as exactly k lie above it, long before the bracket closes. Where equal scores straddle the cut, a second
bisection over key order keeps those with the smaller index. Counts are held as float32 (exact below 2^24), because comparing
to a float and adding floats issue on two different pipes, where a predicate and an integer sum compete for one.
"""

import triton
import triton.language as tl

UNASKED_STEPS: tl.constexpr = tl.constexpr(12)


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
    """Number of each row's scores that exceed its threshold."""
    LAST: tl.constexpr = len(scores) - 1
    above = tl.where(scores[LAST] > threshold[:, None], 1.0, 0.0)
    for t in tl.static_range(1, LAST):
        above += tl.where(scores[t] > threshold[:, None], 1.0, 0.0)
    if LAST == 0:
        return tl.sum(above, 1)
    elif scores[0].shape[1] == scores[LAST].shape[1]:
        return tl.sum(above + tl.where(scores[0] > threshold[:, None], 1.0, 0.0), 1)
    else:
        return tl.sum(above, 1) + tl.sum(tl.where(scores[0] > threshold[:, None], 1.0, 0.0), 1)


@triton.jit
def halve(scores, k, low, high, above_low):
    """One step of the bisection. Invariant: at least k scores exceed low, fewer than k exceed high."""
    middle = 0.5 * low + 0.5 * high
    above = count_above(scores, middle)
    enough = above >= k
    return tl.where(enough, middle, low), tl.where(enough, high, middle), tl.where(enough, above, above_low)


@triton.jit
def any_open(k, low, high, above_low):
    """Whether a row still has more than k scores above low, and a number between low and high."""
    middle = 0.5 * low + 0.5 * high
    return tl.max(((above_low > k) & (middle > low) & (middle < high)).to(tl.int32), 0) > 0


@triton.jit
def drop_late_ties(scores, k, low, high, tied_row, start, RING: tl.constexpr):
    """In tied rows, whose scores in (low, high] are equal, drop the last of these in key order so that k remain."""
    needed = k - count_above(scores, high)
    limit = tl.full(k.shape, RING, tl.int32)
    short = tl.where(tied_row, 0, limit)
    while tl.max(limit - short, 0) > 1:
        middle = (short + limit) // 2
        tied_before = tl.zeros_like(k)
        for t in tl.static_range(len(scores)):
            tied = (scores[t] > low[:, None]) & (scores[t] <= high[:, None])
            tied_before += tl.sum(tl.where(tied & (key_order(scores, t, start, RING) < middle[:, None]), 1.0, 0.0), 1)
        limit = tl.where(tied_before >= needed, middle, limit)
        short = tl.where(tied_before >= needed, short, middle)
    kept = ()
    for t in tl.static_range(len(scores)):
        late = (scores[t] <= high[:, None]) & (key_order(scores, t, start, RING) >= limit[:, None])
        kept = kept + (tl.where(late, float("-inf"), scores[t]),)
    return kept


@triton.jit
def key_order(scores, tile: tl.constexpr, start, RING: tl.constexpr):
    """Rank of each candidate of a tile among its row's keys; a row's first key stands in ring column `start`."""
    WIDTH: tl.constexpr = scores[tile].shape[1]
    FIRST: tl.constexpr = 0 if tile == 0 else scores[0].shape[1] + (tile - 1) * WIDTH
    columns = FIRST + tl.arange(0, WIDTH)
    return (columns[None, :] - start[:, None] + RING) % RING


@triton.jit
def cut_top_k(scores, count, start, highest, top_k, RING: tl.constexpr, KEEP_TIES: tl.constexpr = False):
    """(scores, cut) such that exactly the min(count, top_k) largest scores of a row, ties by key order, exceed its cut.

    KEEP_TIES: that all scores not below the k-th largest exceed it, more than k where equal ones straddle the cut.

    count: candidates of each row. start: ring column of its first key. highest: its largest score. The scores come back
    unchanged but for losers of ties, which become -inf.
    """
    k = tl.minimum(count, top_k).to(tl.float32)
    lowest = row_minimum(scores)
    low = lowest - tl.abs(lowest) * 1e-6 - 1e-30
    high = highest
    above_low = count.to(tl.float32)
    # Testing whether every row is done takes a barrier. The first steps never finish a tile, so they skip the test.
    for _ in range(UNASKED_STEPS):
        low, high, above_low = halve(scores, k, low, high, above_low)
    while any_open(k, low, high, above_low):
        low, high, above_low = halve(scores, k, low, high, above_low)
        low, high, above_low = halve(scores, k, low, high, above_low)

    if not KEEP_TIES:
        tied_row = above_low > k
        if tl.max(tied_row.to(tl.int32), 0) > 0:
            scores = drop_late_ties(scores, k, low, high, tied_row, start, RING)
    # A row of NaN has no bracket: cut below all scores, so that only masked pairs are excluded.
    return scores, tl.where(low == low, low, float("-inf"))
