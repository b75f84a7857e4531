"""Launchers of the pairwise kernels: geometry, tile sizes and grids. Outputs and workspaces come from the caller."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nearfar.runtime import dropout
from nearfar.runtime.tensors import empty

from . import pairwise
from .launch import Launch, LaunchParameters, cdiv, dot_precision, launch_parameters, power_of_2, width_block

UNBOUNDED = 1 << 30  # positions; stands for the unlimited side of a window
WORD = 32  # keys per word of a saved selection
AT_ONCE_BYTES = 24576  # most bytes of keys, or of values, of a query tile that are loaded before the first is used
RESIDENT_SCORES = 16384  # scores of a query tile that fit in the registers of four warps, and easily in those of eight


@dataclass(frozen=True, eq=False)
class PairFunctions:
    """The `triton.jit` functions that turn the skeleton into an operator; pairwise.py documents their arguments."""

    scale: Callable
    score: Callable
    grad: Callable
    grad_parameter: Callable


class Signature(NamedTuple):
    """Everything that determines the launches of a call, except addresses."""

    q_shape: tuple
    k_shape: tuple
    v_shape: tuple
    q_strides: tuple
    k_strides: tuple
    v_strides: tuple
    dtype: torch.dtype
    num_parameters: int
    packed: bool
    left: int
    right: int
    precision: str

    @property
    def geometry(self):
        """num_queries, num_keys, num_heads, group."""
        (_, num_heads, num_queries, _), (_, kv_heads, num_keys, _) = self.q_shape, self.k_shape
        return num_queries, num_keys, num_heads, num_heads // kv_heads

    @property
    def window(self):
        """(offset, back, ahead) of a query, in positions."""
        back, ahead = (UNBOUNDED if side < 0 else side for side in (self.left, self.right))
        return self.k_shape[2] - self.q_shape[2], back, ahead

    @property
    def parameter_stride(self):
        return 1 if self.num_parameters > 1 else 0

    @property
    def blocks(self):
        """BLOCK_D, BLOCK_DV.

        Packed calls have no blocks of 16: their tiles pass through registers, and ptxas 12.8 (Triton 3.6, sm_90) takes the
        address of such a tile of 32-byte rows from a register that it has not written.
        """
        smallest = 32 if self.packed else 16
        return tuple([max(smallest, width_block(shape[3])) for shape in (self.q_shape, self.v_shape)])

    @property
    def widest_block(self):
        return max(self.blocks)

    def sizes(self, parameters):
        """D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, with which the arguments of every kernel end."""
        return self.q_shape[3], self.v_shape[3], parameters.block_m, parameters.block_n, *self.blocks

    def tuned(self, kernel):
        return launch_parameters(kernel, self.widest_block, self.dtype.itemsize)


def signature(q, k, v, parameter, packed, left, right):
    """parameter: one number per head or for all heads; None if there is none."""
    return Signature(
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype,
        0 if parameter is None else parameter.numel(), packed, left, right, dot_precision(q.dtype),
    )


def num_key_tiles(left, right, offset, slots, block_m, block_n):
    """Key tiles, aligned to block_n, that a tile of block_m queries can touch; slots: tiles of the ring."""
    if left < 0 or right < 0 or left + right + 1 > slots * block_n:
        return slots
    step = math.gcd(block_m, block_n)
    misaligned = (offset - left) % step + block_n - step
    return cdiv(misaligned + left + block_m + right, block_n)


def attends_resident(call, ring):
    """Whether one kernel selects and attends.

    Every tile of its ring is code of its own. Of wider rings, and of products without tensor cores, that would take a
    compiler too long: there one kernel selects and another attends, which scores the keys once more.
    """
    return ring <= 128 and call.dtype.itemsize == 2


def resident_parameters(call, ring):
    """The tallest query tile whose ring of scores stays in registers."""
    for block_m in (32, 16) if call.widest_block * call.dtype.itemsize > 256 else (64, 32, 16):
        if block_m * ring <= RESIDENT_SCORES:
            break
    # Three blocks a multiprocessor hide latency better than two, even at the price of a few spilled registers.
    return LaunchParameters(block_m, 32, num_warps=4, num_stages=1, maxnreg=168 if block_m * ring <= 8192 else None)


def selection_parameters(ring):
    """The tallest query tile whose ring of scores stays in registers, held by loops; of wide rings, by twice the warps."""
    block_m = min(32, RESIDENT_SCORES // power_of_2(ring))
    return LaunchParameters(block_m, 64, num_warps=4 if ring <= 128 else 8, num_stages=1)


@functools.lru_cache(maxsize=1024)
def plan_attend(pair, call, o_strides, num_words, dropout_p):
    parameters = call.tuned("attend")
    tiles = cdiv(call.q_shape[2], parameters.block_m)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, call.parameter_stride,
        *call.geometry, tiles, call.window, num_words, *dropout_scalars(dropout_p),
        pair.scale, pair.score, call.precision, *call.sizes(parameters),
    )
    return Launch(pairwise.attend, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_attend_resident(pair, call, o_strides, top_k, keep_ties, ring, dropout_p):
    parameters = resident_parameters(call, ring)
    tiles = cdiv(call.q_shape[2], parameters.block_m)
    slots = ring // parameters.block_n
    key_tiles = num_key_tiles(call.left, call.right, call.window[0], slots, parameters.block_m, parameters.block_n)
    # Loading every key and value tile before the first is used hides all latencies but one, while registers can hold them.
    at_once = key_tiles * parameters.block_n * call.widest_block * call.dtype.itemsize <= AT_ONCE_BYTES
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, call.parameter_stride,
        *call.geometry, tiles, call.window, top_k, *dropout_scalars(dropout_p),
        pair.scale, pair.score, call.precision, key_tiles, slots, at_once, keep_ties, *call.sizes(parameters),
    )
    return Launch(pairwise.attend_resident, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_select(pair, call, top_k, keep_ties, ring):
    parameters = selection_parameters(ring)
    tiles = cdiv(call.q_shape[2], parameters.block_m)
    slots = ring // parameters.block_n
    key_tiles = num_key_tiles(call.left, call.right, call.window[0], slots, parameters.block_m, parameters.block_n)
    width = call.q_shape[3]
    scalars = (
        call.q_strides, call.k_strides, call.parameter_stride, *call.geometry, tiles, call.window, top_k,
        pair.scale, pair.score, call.precision, key_tiles, slots, power_of_2(slots),
        keep_ties, width, parameters.block_m, parameters.block_n, width_block(width),
    )
    return Launch(pairwise.select, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_queries(pair, call, o_strides, do_strides, dq_strides, num_words, dropout_p):
    parameters = call.tuned("grad_queries")
    tiles = grad_query_tiles(call)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, do_strides, dq_strides, call.parameter_stride,
        *call.geometry, tiles, call.window, num_words, *dropout_scalars(dropout_p),
        pair.scale, pair.score, pair.grad, call.precision, *call.sizes(parameters),
    )
    return Launch(pairwise.grad_queries, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_keys(pair, call, do_strides, dk_strides, dv_strides, num_words, dropout_p):
    parameters = call.tuned("grad_keys")
    tiles = cdiv(call.k_shape[2], parameters.block_n)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, do_strides, dk_strides, dv_strides, call.parameter_stride,
        *call.geometry, tiles, call.window, num_words, *dropout_scalars(dropout_p),
        pair.scale, pair.score, pair.grad, call.precision, *call.sizes(parameters),
    )
    return Launch(pairwise.grad_keys, tiles * call.k_shape[0] * call.k_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_parameter(gradient, batch, heads, num_parameters, count):
    """gradient: a `triton.jit` function of the sum of all partials and the parameter. count: partial sums of a head."""
    partials = count * heads // num_parameters
    scalars = batch, num_parameters, partials, gradient, min(4096, power_of_2(partials))
    return Launch(pairwise.grad_parameter, num_parameters, scalars, LaunchParameters(None, None, 4, 1))


def dropout_scalars(dropout_p):
    """(drop_below, keep_scale) of every kernel that takes a seed."""
    return dropout.threshold(dropout_p), dropout.keep_scale(dropout_p)


def grad_query_tiles(call):
    """Query tiles of grad_queries, each of which writes one partial sum of dlog_scale."""
    return cdiv(call.q_shape[2], call.tuned("grad_queries").block_m)


def forward_launches(
    pair, q, k, v, k_squares, parameter, token_bounds, seed, left, right, top_k, keep_ties, dropout_p, o, lse, bits
):
    """(launch, tensors) pairs that fill o (B, Hq, N, Dv), lse (B, Hq, N) and, with top_k, bits (B, Hq, N, words).

    seed: (1,) int64, None without dropout.
    """
    call = signature(q, k, v, parameter, token_bounds is not None, left, right)
    num_words = 0 if bits is None else bits.shape[-1]
    attend = plan_attend(pair, call, o.stride(), num_words, dropout_p)
    attend = attend, (q, k, v, k_squares, parameter, o, lse, bits, token_bounds, seed)
    if bits is None:
        return [attend]
    ring = num_words * WORD
    if attends_resident(call, ring):
        resident = plan_attend_resident(pair, call, o.stride(), top_k, keep_ties, ring, dropout_p)
        return [(resident, (q, k, v, parameter, o, lse, bits, token_bounds, seed))]
    return [(plan_select(pair, call, top_k, keep_ties, ring), (q, k, parameter, bits, token_bounds)), attend]


def backward_launches(
    pair, q, k, v, parameter, token_bounds, seed, left, right, dropout_p, o, lse, bits, do, dq, dk, dv, dparameter
):
    """(launch, tensors) pairs that fill the gradients. bits None: no selection."""
    call = signature(q, k, v, parameter, token_bounds is not None, left, right)
    num_words = 0 if bits is None else bits.shape[-1]
    delta, dlog_scale = empty(lse, lse.shape), empty(lse, (*lse.shape[:2], grad_query_tiles(call)))
    queries = plan_grad_queries(pair, call, o.stride(), do.stride(), dq.stride(), num_words, dropout_p)
    keys = plan_grad_keys(pair, call, do.stride(), dk.stride(), dv.stride(), num_words, dropout_p)
    return [
        (queries, (q, k, v, parameter, o, do, lse, bits, dq, delta, dlog_scale, token_bounds, seed)),
        (keys, (q, k, v, parameter, do, lse, bits, delta, dk, dv, token_bounds, seed)),
        (
            plan_grad_parameter(pair.grad_parameter, *call.q_shape[:2], call.num_parameters, grad_query_tiles(call)),
            (dlog_scale, parameter, dparameter),
        ),
    ]
