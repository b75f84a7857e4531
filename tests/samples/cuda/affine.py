"""Samples of the CUDA kernels of softmax and affine attention."""

import torch
from harness import Sample, randn, run
from samples.affine import attention

SAMPLES = {
    "causal": dict(length=700, causal=True),
    "plain, grouped heads": dict(length=700, heads=(4, 2), causal=True, affine=False),
    "128 wide, grouped heads, sink": dict(width=128, heads=(6, 2), length=500, causal=True, sink=True),
    "full": dict(length=70, keys=700, batch=2),
    "full, whole tiles": dict(length=256, keys=512, width=128),
    "last queries": dict(length=40, keys=900, causal=True, sink=True),
    "some keys ahead": dict(length=450, window_size=(-1, 70)),
    "queries without keys": dict(length=500, keys=160, causal=True, sink=True),
    "one token": dict(length=1, causal=True, batch=3),
    "more spans than multiprocessors": dict(length=300, heads=(24, 6), batch=2, causal=True),
    "sharp weights": dict(length=340, scale=2.0, causal=True, affine=False),
}


def cuda_sample(
    dtype=torch.bfloat16, width=64, heads=(2, 2), length=300, keys=None, batch=1, affine=True, sink=False, **options
):
    keys = length if keys is None else keys
    shapes = (("q", heads[0], length), ("k", heads[1], keys), ("v", heads[1], keys))
    tensors = {name: randn(batch, *shape, width, dtype=dtype, seed=seed) for seed, (name, *shape) in enumerate(shapes)}
    if affine:
        tensors |= {name: randn(batch, heads[0], length, seed=7 + seed) for seed, name in enumerate(("alpha", "beta"))}
    if sink:
        tensors["sink"] = randn(heads[0], seed=9)
    return Sample(tensors, options)


def run_cuda(sample, do=None):
    return run(attention(sample), sample, do, backend="cuda")
