"""Dropout of attention weights by counter, in plain PyTorch: a seed drops the same weights in every backend and direction.

Word j % 4 of Philox4x32-10 decides about query i and key j, with the seed as key and the counter (i, j // 4, b Hq + h, 0) of
head h of batch element b. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
doi:10.1145/2063384.2063405.
"""

import torch

from nearfar.runtime import dropout

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF


def philox(counter, key):
    """The four random words of each counter (c0, c1, c2, c3) under a key (k0, k1): uint32 numbers, held as int64 here."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high2, low2) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def _product(x, factor):
    """The upper and the lower 32 bits of x * factor, none of whose parts exceeds an int64."""
    upper, lower = x * (factor >> 16), x * (factor & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & LOW


def dropped(weights, seed, dropout_p, queries, *keys):
    """The weights with some of them 0 and the others divided by 1 - dropout_p.

    Args:
        weights: (B, Hkv, group, rows, keys).
        seed: (1,) int64, not to be written to until the backward; None for no dropout.
        queries: the first query and the one after the last.
        keys: for each run of consecutive keys, likewise.
    """
    if seed is None:
        return weights
    device = weights.device
    batch_head = torch.arange(weights.shape[:3].numel(), device=device).reshape(*weights.shape[:3], 1, 1)
    query, key = torch.arange(*queries, device=device)[:, None], (seed & LOW, (seed >> 32) & LOW)
    words = []
    for first, last in keys:
        group = torch.arange(first // 4, -(-last // 4), device=device)
        full = torch.broadcast_tensors(*philox((query, group, batch_head, torch.zeros_like(group)), key))
        words.append(torch.stack(full, -1).flatten(-2)[..., first % 4 : first % 4 + last - first])
    below = (torch.cat(words, -1) >> (32 - dropout.WORD_BITS)) < dropout.threshold(dropout_p)
    return weights.masked_fill(below, 0.0) * dropout.keep_scale(dropout_p)
