"""Samples of the CUDA kernels of bidirectional Hadamard attention."""

import torch
from harness import Sample, run
from samples.linear import flat, random_state, random_tensors

SAMPLES = {
    "ragged": dict(length=1501),
    "128 wide": dict(width=128, length=2100, feature_map="softplus"),
    "heads share keys": dict(heads=(6, 2), length=1400, batch=2, feature_map="exp"),
    "fewer queries than keys": dict(length=900, keys=3000),
    "not normalised": dict(length=1400, normalize=False, feature_map="identity"),
    "weights of zero": dict(length=1400, feature_map="relu", eps=0.5),
    "states": dict(length=1500, heads=(4, 2), state=True),
    "more spans than multiprocessors": dict(width=128, length=4500, heads=(9, 9)),
}


def cuda_sample(width=64, heads=(2, 2), length=1500, keys=None, batch=1, state=False, **options):
    keys = length if keys is None else keys
    tensors = random_tensors((64, 64), width, (batch, heads[0], length), (batch, heads[1], keys), torch.bfloat16)
    if state:
        tensors["initial_state"] = random_state((batch, heads[1], 64, 64, width + 1), torch.bfloat16)
        options["return_state"] = True
    return Sample(tensors, options)


def run_cuda(sample, do=None):
    return run(flat, sample, do, backend="cuda")
