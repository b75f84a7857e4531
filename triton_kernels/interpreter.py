"""Known faults of Triton's interpreter, which runs the kernels for CPU tensors."""

import functools

import torch
import triton
import triton.language as tl

SIZE = 16  # the smallest product


@triton.jit
def product(x, o, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(x + places)
    tl.store(o + places, tl.dot(tile, tile))


@functools.cache
def multiplies_bfloat16():
    """Whether products of bfloat16 are right. Up to Triton 3.6 the interpreter multiplies the raw bits as integers."""
    halves = torch.full((SIZE, SIZE), 0.5, dtype=torch.bfloat16, device="cpu")
    o = torch.empty((SIZE, SIZE), dtype=torch.float32, device="cpu")
    product[(1,)](halves, o, SIZE)
    return bool((o == SIZE / 4).all())
