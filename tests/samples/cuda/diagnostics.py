"""Samples of the CUDA kernels of statistics and geometry."""

import torch
from samples.diagnostics import geometry, random_sample, statistics

import nearfar as nf

SAMPLES = {
    "causal, grouped heads": dict(causal=True, heads=(4, 2), length=600),
    "full, fewer queries": dict(length=133, keys=900, width=128, value_width=128),
    "window": dict(locality=nf.SlidingWindow(200, 90), length=777),
    "causal, last queries": dict(length=20, keys=377, causal=True, scale=1.0, width=128, value_width=128),
    "one token": dict(length=1),
    "few keys": dict(length=50, keys=3, scale=0.3),
}


def cuda_sample(dtype=torch.bfloat16, **options):
    return random_sample(dtype, **{"width": 64, "value_width": 64, **options})


def everything(sample, top_n=4, backend="cuda"):
    return *statistics(sample, backend), *geometry(sample, top_n, backend)
