"""Races between the asynchronous copies and products of pipelined kernels, which only show at the speed of a GPU.

They spoil a few rows of a large result, so that norms over the whole tensor hide them: every element is compared, on sizes
that keep all data in the L2 cache (docs/notes/krause.md tells of one that was found so). What the compiler makes of the kernels
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

SHARED_MEMORY = 227 * 1024  # bytes a block may have on sm_90


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


def bfloat16_as_float32(call, tensors, rows):
    """Every row in bfloat16 against the float32 kernels, whose products and pipelines are others, and 20 times the same bits.

    tensors: the first `rows` and the gradient of the output, the last, are rounded to bfloat16.
    """
    tensors = [tensor.bfloat16() if i < rows or tensor is tensors[-1] else tensor for i, tensor in enumerate(tensors)]

    def run(dtype):
        leaves = [tensor.to(dtype if i < rows else tensor.dtype).requires_grad_() for i, tensor in enumerate(tensors[:-1])]
        o = call(*leaves)
        return o.detach(), *torch.autograd.grad(o, leaves, tensors[-1].to(dtype))

    exact, first = run(torch.float32), run(torch.bfloat16)
    for index, (got, want) in enumerate(zip(first[: rows + 1], exact, strict=False)):
        # Rows of a causal sequence differ in size by orders of magnitude: the largest element near a row is its measure. The
        # plain formulas in bfloat16 are off by up to 0.038 of it (linear attention, dq), and a kernel may be by twice that.
        largest = torch.nn.functional.max_pool1d(want.abs().amax(-1)[0], 129, stride=1, padding=64)
        wrong = int(((got.float() - want).abs().amax(-1)[0] > 0.08 * largest).sum())
        assert wrong == 0, f"{wrong} rows of result {index} are wrong"
    for repeat in range(20):
        for index, (got, want) in enumerate(zip(run(torch.bfloat16), first, strict=True)):
            assert torch.equal(got, want), f"result {index} differs in repeat {repeat}"


def randn(seed, *shapes):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]


@needs_gpu
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("factors, width", [((64,), 64), ((128,), 128), ((16, 16), 64), ((64, 64), 128)], ids=str)
def test_every_element_of_linear_attention(factors, width, causal):
    tensors, count = randn(width, *((1, 4, 4096, d) for d in (*factors, *factors, width, width))), len(factors)

    def call(*leaves):
        return nf.hadamard_attention(leaves[:count], leaves[count:-1], leaves[-1], causal=causal, backend="triton")

    bfloat16_as_float32(call, tensors, rows=2 * count + 1)


@needs_gpu
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("width", [64, 128])
def test_every_element_of_affine_attention(width, causal):
    q, k, v, do, alpha, beta = randn(width, *4 * [(1, 4, 4096, width)], *2 * [(1, 4, 4096)])
    bfloat16_as_float32(
        lambda *leaves: nf.affine_attention(*leaves, causal=causal, backend="triton"), [q, k, v, alpha, beta / 64, do], rows=3
    )


@needs_gpu
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("width", [64, 128])
def test_every_element_of_synchronization_attention(width, causal):
    """Frequencies so close that every pair locks, well within the lock radius."""
    omega, v, do = randn(width, *3 * [(1, 4, 4096, width)])
    coupling, bandwidth = torch.full((1,), 2.0, device="cuda"), torch.full((4,), 0.2, device="cuda")
    order = torch.ones((1, 4, 4096) if causal else (1, 4), device="cuda")

    def call(omega, v, coupling, bandwidth, order):
        return nf.synchronization_attention(omega, v, coupling[0], bandwidth, order, causal=causal, backend="triton")

    bfloat16_as_float32(call, [omega * 0.3 * width**-0.5, v, coupling, bandwidth, order, do], rows=2)


# The kernels of each operator that multiply on tensor cores, those first of which products run on into the next step.
PIPELINED = {
    "krause": ({"attend", "grad_keys"}, {"grad_queries"}),
    "hadamard": ({"accumulate", "read"}, {"grad", "walk_read", "walk_grad_queries", "walk_grad_keys"}),
    "affine": ({"attend", "grad_queries", "grad_keys"}, set()),
    "synchronization": ({"attend", "grad_tokens", "grad_queries", "grad_keys"}, set()),
    "statistics": ({"statistics_grad_queries", "statistics_grad_keys"}, {"statistics", "key_mass"}),
    "geometry": (set(), {"select", "separate"}),
}


def compiled(calls):
    """What pipelines.py prints of the calls whose names start so."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("pipelines.py")
    environment["PYTHONPATH"] = str(script.parents[2])  # of bench
    command = [sys.executable, script, calls]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("operator", PIPELINED)
def test_pending_products_have_buffers_to_spare(operator):
    """A product that runs on into the next step reads a tile that the loads must not reach: one buffer for each stage."""
    kernels = compiled(operator)
    pending, awaited = PIPELINED[operator]
    assert {kernel["kernel"] for kernel in kernels if kernel["products"]} == pending | awaited
    assert {kernel["kernel"] for kernel in kernels if kernel["buffers"]} == pending  # else what is looked at is not there
    for kernel in kernels:
        assert all(buffers >= kernel["stages"] for buffers in kernel["buffers"]), kernel
        assert kernel["shared"] <= SHARED_MEMORY, kernel


def test_the_longest_kernels_are_short():
    """Compilers take about a second for 2,500 instructions; one unrolled tile after another made 37,000 of them."""
    kernels = compiled("longest")
    assert {kernel["kernel"] for kernel in kernels} >= {"select", "attend", "attend_top_k", "grad_queries", "grad_keys"}
    for kernel in kernels:
        assert kernel["instructions"] <= 15_000, kernel
        assert kernel["shared"] <= SHARED_MEMORY, kernel


@pytest.mark.parametrize("operator", ["krause", "affine"])
def test_the_machine_code_of_packed_calls_writes_registers_before_it_reads_them(operator):
    """ptxas 12.8 did not for tiles with rows of 32 bytes, see docs/notes/faults.md."""
    kernels = compiled(f"packed {operator}")
    assert {kernel["kernel"] for kernel in kernels if kernel["products"]} == {"attend", "grad_queries", "grad_keys"}
    assert all(not kernel["unwritten"] for kernel in kernels), kernels
