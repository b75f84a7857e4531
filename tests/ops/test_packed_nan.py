"""Packed sequences: what is not finite in one of them, inputs and upstream gradients, reaches no bit of another."""

import math

import pytest
import torch
from harness import DEVICE, randn

import nearfar as nf

FIRST = 7  # tokens of the sequence that is broken


def hadamard(q, k, v, **options):
    return nf.hadamard_attention((q, q), (k, k), v, **options)


CALLS = {
    "softmax": nf.softmax_attention,
    "affine": nf.affine_attention,
    "linear": nf.linear_attention,
    "hadamard": hadamard,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_finite_stays_in_its_sequence(name, causal):
    tensors = {part: randn(1, 2 if part == "q" else 1, 20, 16, seed=seed) for seed, part in enumerate("qkv")}
    if name == "affine":
        tensors |= {"alpha": randn(1, 2, 20, seed=3), "beta": randn(1, 2, 20, seed=4)}
    bounds = torch.tensor([0, FIRST, 20], dtype=torch.int32, device=DEVICE)

    def results(broken=None, value=math.nan):
        given = {part: tensor.clone() for part, tensor in tensors.items()}
        do = randn(1, 2, 20, 16, seed=5)
        if broken is not None:
            (do if broken == "do" else given[broken])[:, :, 3] = value
        given = {part: tensor.requires_grad_() for part, tensor in given.items()}
        o = CALLS[name](**given, causal=causal, cu_seqlens=bounds, backend="triton")
        return [o.detach(), *torch.autograd.grad(o, list(given.values()), do)]

    sound = results()
    for broken, value in (*((part, math.nan) for part in tensors), ("v", math.inf), ("do", math.nan)):
        found = results(broken, value)
        assert not all(part[:, :, :FIRST].isfinite().all() for part in found)
        for index, (part, expected) in enumerate(zip(found, sound, strict=True)):
            assert torch.equal(part[:, :, FIRST:], expected[:, :, FIRST:]), f"{value} in {broken} reaches result {index}"
