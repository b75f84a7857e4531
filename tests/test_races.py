"""Races between the asynchronous copies and products of pipelined kernels, which only show at the speed of a GPU.

They spoil a few rows of a large result, so that norms over the whole tensor hide them: every element is compared, on sizes
that keep all data in the L2 cache (docs/krause.md tells of one that was found so). What the compiler makes of the kernels
is looked at too, which takes no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import needs_gpu

import nearfar as nf


@needs_gpu
@pytest.mark.parametrize("length", [2048, 4096, 16384])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("top_k", [None, 96])
def test_every_element_of_every_gradient(length, width, top_k):
    generator = torch.Generator("cuda").manual_seed(length)
    shape = (1, 8, length, width)
    q, k, v, do = (torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    sigma = torch.full((8,), width**0.5, device="cuda")

    def run(backend, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v, sigma)]
        o = nf.krause_attention(*leaves, nf.SlidingWindow(127), top_k=top_k, backend=backend)
        return o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype))

    exact, first = run("reference", torch.float32), run("triton", torch.bfloat16)
    for name, got, want in zip(("o", "dq", "dk", "dv"), first, exact, strict=False):
        wrong = int(((got.float() - want).abs().amax(-1) > 0.02 * want.abs().max()).sum())
        # With top_k a row may select differently by a rounding of its scores; keys at the cut weigh little, though.
        assert wrong <= (0 if top_k is None else 2), f"{wrong} rows of {name} are wrong"
    for repeat in range(20):
        for name, got, want in zip(("o", "dq", "dk", "dv", "dsigma"), run("triton", torch.bfloat16), first, strict=True):
            assert torch.equal(got, want), f"{name} differs in repeat {repeat}"


def test_pending_products_have_buffers_to_spare():
    """A product that runs on into the next step reads a tile that the loads must not reach: one buffer for each stage."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("pipelines.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == 15 and all(kernel["products"] >= 2 for kernel in kernels)
    assert any(kernel["buffers"] for kernel in kernels)  # else nothing is looked at
    for kernel in kernels:
        assert all(buffers >= kernel["stages"] for buffers in kernel["buffers"]), kernel
