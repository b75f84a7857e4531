"""Samples of the CUDA kernels of Krause attention."""

import torch
from harness import DEVICE, Sample, randn

import nearfar as nf

CAUSAL = nf.SlidingWindow(127)


def cuda_sample(dtype, width=64, heads=(2, 1), length=333, keys=None, batch=1, seed=0, **options):
    keys = length if keys is None else keys
    tensors = {
        "q": randn(batch, heads[0], length, width, dtype=dtype, seed=seed + 1),
        "k": randn(batch, heads[1], keys, width, dtype=dtype, seed=seed + 2),
        "v": randn(batch, heads[1], keys, width, dtype=dtype, seed=seed + 3),
        "sigma": torch.linspace(0.6, 1.2, heads[0], device=DEVICE) * width**0.5,
    }
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32, device=DEVICE)
    return Sample(tensors, options)


SAMPLES = {
    "causal": dict(locality=CAUSAL, top_k=96),
    "whole window": dict(locality=CAUSAL),
    "narrow": dict(width=32, locality=nf.SlidingWindow(40, 20), top_k=9),
    "narrow whole": dict(width=32, locality=nf.SlidingWindow(0, 63)),
    "wide": dict(width=128, locality=nf.SlidingWindow(64, 63), top_k=64),
    "wide whole": dict(width=128, locality=nf.SlidingWindow(31)),
    "heads share keys": dict(heads=(6, 2), batch=2, length=150, locality=nf.SlidingWindow(100), top_k=1),
    "packed": dict(cu_seqlens=[0, 0, 21, 22, 90, 90, 333], locality=nf.SlidingWindow(60, 40), top_k=20),
    "more keys": dict(length=70, keys=391, locality=nf.SlidingWindow(80, 9), top_k=33),
    "fewer keys": dict(length=300, keys=130, locality=nf.SlidingWindow(29), top_k=7),
    "one query": dict(batch=3, length=1, keys=200, locality=CAUSAL, top_k=50),
    "its own key only": dict(length=65, locality=nf.SlidingWindow(0), top_k=1),
}
