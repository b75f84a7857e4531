"""Steps of Krause attention at any position of a sequence, with the cache that the tokens before it leave behind."""

import torch
from harness import DEVICE, Sample, generator, randn

import nearfar as nf


def sample_of(
    window, length=None, dtype=torch.float32, batch=2, heads=4, kv_heads=2, width=32, value_width=32, high=None, top_k=None
):
    """A whole sequence. high: q and k of integers up to it, whose scores are exact, so that ties are ties."""
    length = 3 * window + 2 if length is None else length

    def numbers(*shape, seed):
        if high is None:
            return randn(*shape, dtype=dtype, seed=seed)
        return torch.randint(-high, high + 1, shape, generator=generator(seed)).to(DEVICE, dtype)

    tensors = {
        "q": numbers(batch, heads, length, width, seed=1),
        "k": numbers(batch, kv_heads, length, width, seed=2),
        "v": randn(batch, kv_heads, length, value_width, dtype=dtype, seed=3),
        "sigma": torch.linspace(0.6, 1.2, heads, device=DEVICE) * width**0.5,
    }
    return Sample(tensors, {"locality": nf.SlidingWindow(window - 1), "top_k": top_k})


def garbage(window, k, v):
    """A cache whose slots hold what memory may hold."""
    empty = nf.KrauseCache.empty(
        k.shape[0], k.shape[1], window, k.shape[3], v.shape[3], dtype=k.dtype, device=k.device
    )
    return empty._replace(k=empty.k.fill_(float("nan")), v=empty.v.fill_(float("nan")))


def cache_before(sample, positions):
    """The cache that the tokens before position positions[b] of sequence b leave behind."""
    _, k, v, _ = sample.tensors.values()
    window = sample.options["locality"].left + 1
    cache = garbage(window, k, v)
    for b, position in enumerate(positions):
        for p in range(max(0, position - window), position):
            cache.k[b, :, p % window], cache.v[b, :, p % window] = k[b, :, p], v[b, :, p]
        cache.length[b] = position
    return cache


def token(sample, positions):
    """q, k and v of position positions[b] of sequence b."""
    return [
        torch.stack([sample.tensors[name][b, :, p : p + 1] for b, p in enumerate(positions)]) for name in ("q", "k", "v")
    ]


def step(sample, positions, cache, backend, **keywords):
    top_k = sample.options["top_k"]
    return nf.krause_attention_step(
        *token(sample, positions), cache, sample.tensors["sigma"], top_k=top_k, backend=backend, **keywords
    )


FORMS = {
    "whole window": dict(window=20),
    "ties": dict(window=20, top_k=4, high=1),
    "one key": dict(window=20, top_k=1, high=2),
    "one slot": dict(window=1, top_k=1),
    "as many as there are": dict(window=20, top_k=2**31),
    "several tiles": dict(window=300, length=640, top_k=96, high=2),
    "no group": dict(window=33, heads=2, kv_heads=2, top_k=5, high=2),
    "more than a tile of heads": dict(window=16, heads=18, kv_heads=1, top_k=5, high=2),
    "other widths": dict(window=24, width=40, value_width=72, top_k=5, high=2),
    "narrow": dict(window=24, width=16, value_width=16),
    "wide": dict(window=130, width=128, value_width=128, top_k=9, high=2),
    "medium": dict(window=64, width=64, value_width=64, heads=7, kv_heads=1, top_k=9, high=2),
    "the widest window": dict(window=1024, length=1100, heads=1, kv_heads=1, top_k=64, high=2),
}


def positions_of(window, length=None, **_):
    """Sequences stand at the start, before, at and after the ends of the ring's rounds."""
    length = 3 * window + 2 if length is None else length
    if window > 100 and DEVICE == "cpu":
        return [window // 2, length - 1]
    return [0, window // 2, window - 1, window, min(length, 2 * window) - 1, length - 1]
