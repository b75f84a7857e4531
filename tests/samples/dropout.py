"""What dropout drops, from the definition: Philox4x32-10 in unsigned 64-bit numbers of numpy, no code shared with nearfar."""

import numpy as np
import torch

LOW = np.uint64(0xFFFFFFFF)


def philox(counter, key):
    """Random words of counters and keys, sequences of 4 and of 2 arrays of 32-bit numbers."""
    x, (k0, k1) = np.broadcast_arrays(*[np.asarray(c, np.uint64) for c in counter]), [np.uint64(k) for k in key]
    for _ in range(10):
        first, second = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [second >> np.uint64(32) ^ x[1] ^ k0, second & LOW, first >> np.uint64(32) ^ x[3] ^ k1, first & LOW]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW, (k1 + np.uint64(0xBB67AE85)) & LOW
    return x


def factor(seed, p, batch, heads, num_queries, num_keys):
    """(B, Hq, N, M) float64: 0 for the weights that are dropped, 1 / (1 - p) for the others."""
    batch_head, query, key = np.ogrid[: batch * heads, :num_queries, :num_keys]
    words = philox((query, key // 4, batch_head, 0), (seed % 2**32, (seed >> 32) % 2**32))
    word = np.choose(key % 4, words)
    kept = (word >> np.uint64(1)) >= round(p * 2**31)
    return torch.from_numpy(kept / (1 - p)).reshape(batch, heads, num_queries, num_keys)


def of(sample, seed, p):
    """The same for a call."""
    q, k = sample.tensors["q"], sample.tensors["k"]
    return factor(seed, p, *q.shape[:3], k.shape[2]).to(q.device)
