"""Launchers of the pairwise kernels: geometry, tile sizes and grids. Outputs and workspaces come from the caller."""

import math
from collections.abc import Callable
from typing import NamedTuple

import triton

from . import pairwise
from .launch import dot_precision, launch_parameters, width_block

UNBOUNDED = 1 << 30  # positions; stands for the unlimited side of a window
WORD = 32  # keys of one word of a saved selection
RESIDENT_SCORES = 16384  # scores of a query tile that fit the registers of four warps


class PairFunctions(NamedTuple):
    """What makes an operator of the skeleton: three `triton.jit` functions, described in pairwise.py, and on the host

    grad_parameter(dlog_scale, parameter): gradient of the parameter from the (Hq,) gradient of log(scale).
    """

    scale: Callable
    score: Callable
    grad_keys: Callable
    grad_parameter: Callable


def num_key_tiles(left, right, offset, slots, block_m, block_n):
    """Key tiles, aligned to block_n, that a tile of block_m queries can touch; slots: tiles that one row's window fits."""
    if left < 0 or right < 0:
        return slots
    step = math.gcd(block_m, block_n)
    misaligned = (offset - left) % step + block_n - step
    return triton.cdiv(misaligned + left + block_m + right, block_n)


def resident_tiles(q, v, left, right, offset, ring):
    """(block_m, block_n, key tiles, slots, warps): the tallest query tile whose ring of scores stays in registers."""
    wide = max(width_block(q.shape[3]), width_block(v.shape[3])) * q.element_size() > 256
    block_n = 32 if wide else 64
    for block_m in (32, 16) if wide else (64, 32, 16):
        if block_m * ring <= RESIDENT_SCORES:
            break
    slots = ring // block_n
    return block_m, block_n, num_key_tiles(left, right, offset, slots, block_m, block_n), slots, 4


def geometry(q, k, left, right):
    """num_queries, num_keys, num_heads, group, and the (offset, back, ahead) window of a query."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    back, ahead = (UNBOUNDED if side < 0 else side for side in (left, right))
    return num_queries, num_keys, q.shape[1], q.shape[1] // k.shape[1], (num_keys - num_queries, back, ahead)


def widths(q, v):
    return {"D": q.shape[3], "DV": v.shape[3], "BLOCK_D": width_block(q.shape[3]), "BLOCK_DV": width_block(v.shape[3])}


def tuned(kernel, q, v):
    return launch_parameters(kernel, max(width_block(q.shape[3]), width_block(v.shape[3])), q.element_size())


def forward(pair, q, k, v, parameter, token_bounds, left, right, top_k, o, lse, bits):
    """Fill o (B, Hq, N, Dv), lse (B, Hq, N) and, with top_k, bits (B, Hq, N, words)."""
    num_queries, num_keys, num_heads, group, window = geometry(q, k, left, right)
    precision = dot_precision(q.dtype)
    strides = q.stride(), k.stride(), v.stride(), o.stride(), parameter.stride(0) if parameter.numel() > 1 else 0
    if top_k is None:
        block_m, block_n, warps, stages = tuned("attend", q, v)
        tiles = triton.cdiv(num_queries, block_m)
        pairwise.attend[(tiles * num_heads * q.shape[0],)](
            q, k, v, parameter, o, lse, token_bounds, *strides,
            num_queries, num_keys, num_heads, group, tiles, window,
            pair.scale, pair.score, precision, **widths(q, v),
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    else:
        ring = bits.shape[-1] * WORD
        block_m, block_n, key_tiles, slots, warps = resident_tiles(q, v, left, right, window[0], ring)
        tiles = triton.cdiv(num_queries, block_m)
        pairwise.attend_resident[(tiles * num_heads * q.shape[0],)](
            q, k, v, parameter, o, lse, bits, token_bounds, *strides,
            num_queries, num_keys, num_heads, group, tiles, window, top_k,
            pair.scale, pair.score, precision, key_tiles, slots, **widths(q, v),
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
        )  # fmt: skip


def grad_query_tiles(q, v):
    """Query tiles of grad_queries: the caller sizes dlog_scale with it, one partial sum a program."""
    return triton.cdiv(q.shape[2], tuned("grad_queries", q, v).block_m)


def backward(pair, q, k, v, parameter, token_bounds, left, right, o, do, lse, bits, dq, dk, dv, delta, dlog_scale):
    """Fill dq, dk, dv, delta (B, Hq, N) and the partial sums dlog_scale (B, Hq, query tiles). bits None: no selection."""
    num_queries, num_keys, num_heads, group, window = geometry(q, k, left, right)
    precision = dot_precision(q.dtype)
    parameter_stride = parameter.stride(0) if parameter.numel() > 1 else 0
    num_words = 0 if bits is None else bits.shape[-1]

    block_m, block_n, warps, stages = tuned("grad_queries", q, v)
    tiles = triton.cdiv(num_queries, block_m)
    pairwise.grad_queries[(tiles * num_heads * q.shape[0],)](
        q, k, v, parameter, o, do, lse, bits, dq, delta, dlog_scale, token_bounds,
        q.stride(), k.stride(), v.stride(), o.stride(), do.stride(), dq.stride(), parameter_stride,
        num_queries, num_keys, num_heads, group, tiles, window, num_words,
        pair.scale, pair.score, precision, **widths(q, v),
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip

    block_m, block_n, warps, stages = tuned("grad_keys", q, v)
    tiles = triton.cdiv(num_keys, block_n)
    pairwise.grad_keys[(tiles * k.shape[1] * q.shape[0],)](
        q, k, v, parameter, do, lse, bits, delta, dk, dv, token_bounds,
        q.stride(), k.stride(), v.stride(), do.stride(), dk.stride(), dv.stride(), parameter_stride,
        num_queries, num_keys, num_heads, group, tiles, window, num_words,
        pair.scale, pair.score, pair.grad_keys, precision, **widths(q, v),
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
