"""Samples of the CUDA kernels of synchronization attention."""

import torch
from harness import DEVICE, Sample, randn, run
from samples.synchronization import parameters

import nearfar as nf

FLOOR = 0.1  # grad_floor: the allowed 4 eps of the terms do not cover the factor 1 / S^2 at the lock boundary
SAMPLES = {
    "all lock": dict(length=700, spread=0.03),
    "about half lock": dict(length=330, batch=2, spread=0.12),
    "clusters": dict(length=900, clusters=3),
    "whole tiles": dict(length=768),
    "causal": dict(length=500, causal=True, by_token=True),
    "order by token": dict(length=200, by_token=True),
    "one token": dict(length=1, batch=3),
}


def cuda_sample(
    dtype=torch.bfloat16, length=300, batch=1, heads=2, clusters=1, spread=0.05, by_token=False, device=DEVICE, **options
):
    """Tokens around centres that are too far apart to lock; those of a cell of 64 share one."""
    centre = 0.6 * randn(clusters, 64, seed=3, device=device)[torch.arange(length, device=device) // 64 % clusters]
    tensors = {
        "omega": (centre + spread * randn(batch, heads, length, 64, seed=1, device=device)).to(dtype),
        "v": randn(batch, heads, length, 64, dtype=dtype, seed=2, device=device),
    }
    rows = (batch, heads, length) if by_token else (batch, heads)
    return Sample(tensors | parameters(rows, device=device), {"grad_floor": FLOOR, **options})


def run_cuda(sample, do=None):
    return run(nf.synchronization_attention, sample, do, backend="cuda")
