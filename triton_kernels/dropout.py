"""Dropout of attention weights by counter: nearfar.reference.dropout defines which weights a seed drops.

Nothing is saved. Every kernel asks for the words of its tiles again, which come four keys at a time.
"""

import triton
import triton.language as tl


@triton.jit
def keeps(seed, batch_head, rows, first_key, drop_below, BLOCK_N: tl.constexpr):
    """(rows, BLOCK_N) mask of the weights that stay, of keys from first_key on, a multiple of 4. batch_head: b Hq + h."""
    groups = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    a, b, c, d = tl.philox(tl.load(seed), rows[:, None], groups[None, :], batch_head, 0)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # (.., 2, 2), in which the words of a group are in order
    return stays(tl.reshape(words, (rows.shape[0], BLOCK_N)), drop_below)


@triton.jit
def keeps_of(seed, batch_head, rows, keys, drop_below):
    """The same of any keys, which takes four times as long."""
    a, b, c, d = tl.philox(tl.load(seed), rows[:, None], (keys // 4)[None, :], batch_head, 0)
    place = (keys % 4)[None, :]
    return stays(tl.where(place < 2, tl.where(place == 0, a, b), tl.where(place == 2, c, d)), drop_below)


@triton.jit
def stays(words, drop_below):
    return (words >> 1).to(tl.int32, bitcast=True) >= drop_below


@triton.jit
def drop(x, kept, keep_scale):
    return tl.where(kept, x * keep_scale, 0.0)
