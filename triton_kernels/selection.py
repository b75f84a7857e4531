"""Exact top-k selection over score tiles that stay in registers.

A row's candidates are spread over a tuple of (BLOCK_M, BLOCK_N) tiles; masked pairs hold -inf. The k-th largest score is
bracketed by bisection on its value: each pass counts the scores above the midpoint, and a row stops as soon as exactly
k lie above it, long before the bracket closes. Where equal scores straddle the cut, a second bisection over key positions
keeps those with the smaller index. Counts are held as float32 (exact below 2^24): compare-to-float and add issue on two
different pipes, compare-to-predicate and integer add share one.
"""

import triton
import triton.language as tl


@triton.jit
def count_above(scores, threshold):
    """How many of each row's scores exceed its threshold."""
    total = tl.where(scores[0] > threshold[:, None], 1.0, 0.0)
    for t in tl.static_range(1, len(scores)):
        total += tl.where(scores[t] > threshold[:, None], 1.0, 0.0)
    return tl.sum(total, 1)


@triton.jit
def count_tied_before(scores, low, high, column, BLOCK_N: tl.constexpr):
    """How many of each row's scores lie in (low, high] and stand before its column."""
    total = tl.zeros_like(low)
    for t in tl.static_range(len(scores)):
        columns = t * BLOCK_N + tl.arange(0, BLOCK_N)
        tied = (scores[t] > low[:, None]) & (scores[t] <= high[:, None]) & (columns[None, :] < column[:, None])
        total += tl.sum(tl.where(tied, 1.0, 0.0), 1)
    return total


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
def bracket_top_k(scores, count, top_k, highest, BLOCK_N: tl.constexpr):
    """Bracket (low, high] and column such that a key is selected iff score > high, or score > low and it stands before column.

    count: candidates of each row; highest: largest score of each row.
    Invariant: at least k scores exceed low, fewer than k exceed high. A row of NaN gets low = -inf: masked keys stay out.
    """
    k = tl.minimum(count, top_k).to(tl.float32)
    lowest = row_minimum(scores)
    low = lowest - tl.abs(lowest) * 1e-6 - 1e-30
    high = highest
    above_low = count.to(tl.float32)
    above_high = tl.zeros_like(high)
    searching = (above_low > k) & (lowest < highest)
    while tl.max(searching.to(tl.int32), 0) > 0:
        middle = 0.5 * low + 0.5 * high
        above = count_above(scores, middle)
        raise_low = searching & (above >= k)
        lower_high = searching & (above < k)
        low = tl.where(raise_low, middle, low)
        above_low = tl.where(raise_low, above, above_low)
        high = tl.where(lower_high, middle, high)
        above_high = tl.where(lower_high, above, above_high)
        middle = 0.5 * low + 0.5 * high
        searching = (above_low > k) & (middle > low) & (middle < high)

    # Rows still above k hold equal scores at the cut: find the column before which just enough of them stand.
    needed = k - above_high
    column = tl.full(count.shape, len(scores) * BLOCK_N, tl.int32)
    short = tl.where(above_low > k, 0, column)
    while tl.max(column - short, 0) > 1:
        middle_column = (short + column) // 2
        enough = count_tied_before(scores, low, high, middle_column, BLOCK_N) >= needed
        column = tl.where(enough, middle_column, column)
        short = tl.where(enough, short, middle_column)
    return tl.where(low == low, low, float("-inf")), high, column


@triton.jit
def is_selected(score, low, high, column, columns):
    """The mask that bracket_top_k describes, written with <= so that a NaN score is kept and reaches the output."""
    behind = columns[None, :] >= column[:, None]
    return ((score <= low[:, None]) | ((score <= high[:, None]) & behind)) == 0
