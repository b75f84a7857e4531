"""Samples of the CUDA kernels of linear attention, and of causal Hadamard attention."""

import torch
from harness import DEVICE, Sample
from samples.linear import flat, random_state, random_tensors

import nearfar as nf


def cuda_sample(width=64, heads=(2, 1), length=777, keys=None, batch=1, state=False, causal=True, **options):
    """width: of q, k and v, or TWO_FACTORS."""
    widths, width = ((16, 16), 64) if width == TWO_FACTORS else ((width,), width)
    shapes = (batch, heads[0], length), (batch, heads[1], keys or length)
    tensors = random_tensors(widths, width, *shapes, torch.bfloat16, numbered=len(widths) > 1)
    sequences = batch
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32, device=DEVICE)
        sequences = options["cu_seqlens"].numel() - 1
    if state:
        tensors["initial_state"] = random_state((sequences, heads[1], *widths, width + 1), torch.bfloat16)
        options["return_state"] = True
    return Sample(tensors, dict(causal=causal, **options))


TWO_FACTORS = "two factors"  # of 16 features each


def attention(sample):
    return nf.linear_attention if "q" in sample.tensors else flat


ONE_FACTOR = {
    "pieces": dict(),
    "one piece": dict(heads=(128, 128), length=300),
    "one token": dict(batch=3, length=1),
    "128 wide": dict(width=128, batch=2, length=500),
    "heads share keys": dict(heads=(6, 2), batch=2, length=400, feature_map="softplus"),
    "not normalised": dict(length=400, normalize=False, feature_map="identity"),
    "weights of zero": dict(length=400, feature_map="relu", eps=0.5),
    "states": dict(state=True, feature_map="exp"),
    "packed": dict(length=1000, cu_seqlens=[0, 0, 7, 300, 301, 1000]),
    "packed, states, 128 wide": dict(width=128, length=1000, cu_seqlens=[0, 0, 7, 300, 301, 1000], state=True),
}
FULL = {
    f"full, {name}": dict(causal=False, **options)
    for name, options in {
        "pieces": dict(),
        "pieces, 128 wide": dict(width=128, batch=2, length=1111),
        "many heads": dict(heads=(300, 300), length=100),
        "heads share keys": dict(heads=(6, 2), batch=2, length=400, feature_map="softplus"),
        "more keys": dict(length=300, keys=1001, feature_map="exp"),
        "more queries, 128 wide": dict(width=128, length=1001, keys=70),
        "not normalised": dict(length=400, normalize=False, feature_map="identity"),
        "weights of zero, 128 wide": dict(width=128, length=400, feature_map="relu", eps=0.5),
        "states": dict(state=True, length=1500, keys=700),
        "packed": dict(length=1000, cu_seqlens=[0, 0, 7, 300, 301, 1000]),
        "packed, states, 128 wide": dict(width=128, length=1000, cu_seqlens=[0, 0, 7, 300, 301, 1000], state=True),
    }.items()
}
SAMPLES = ONE_FACTOR | FULL | {
    "two factors, pieces": dict(width=TWO_FACTORS),
    "two factors, one piece": dict(width=TWO_FACTORS, heads=(128, 128), length=300),
    "two factors, heads share keys": dict(
        width=TWO_FACTORS, heads=(6, 2), batch=2, length=400, feature_map="softplus", normalize=False
    ),
    "two factors, states": dict(width=TWO_FACTORS, state=True, feature_map="relu", eps=0.5),
    "two factors, packed": dict(width=TWO_FACTORS, length=1000, cu_seqlens=[0, 0, 7, 300, 301, 1000]),
}
