"""Launchers of the kernels in the windows of a grid. Outputs and workspaces come from the caller."""

import functools
import math
from typing import NamedTuple

from nearfar.runtime.tensors import empty

from . import window
from .launch import Launch, LaunchParameters, cdiv, power_of_2
from .pairwise_launch import dropout_scalars, plan_grad_parameter, signature

PROGRAMS = 1024  # that sum pairs of places: enough for every GPU, and few sums to keep
ENTRIES = 16  # of a table, that a program adds up


class Windows(NamedTuple):
    """A ShiftedWindow of three axes: shape, cells of a window, cells of the first window before the grid, and windows."""

    shape: tuple
    sizes: tuple
    before: tuple
    counts: tuple

    @property
    def places(self):
        return math.prod(self.sizes)

    @property
    def entries(self):
        return math.prod(2 * size - 1 for size in self.sizes)


def windows_of(locality):
    """The Windows of a ShiftedWindow."""
    axes = 3 - len(locality.shape)
    shape, sizes = (1,) * axes + locality.shape, (1,) * axes + locality.windows
    shifts = (0,) * axes + locality.shifts
    before = tuple([size - shift if shift else 0 for size, shift in zip(sizes, shifts, strict=True)])
    counts = tuple([n // size + (shift > 0) for n, size, shift in zip(shape, sizes, shifts, strict=True)])
    return Windows(shape, sizes, before, counts)


def tiled(call, windows, kernel):
    """The launch parameters of one of the kernels that attend or differentiate, with tiles no larger than a window needs."""
    parameters, needed = call.tuned(kernel), max(16, power_of_2(windows.places))
    block_m, block_n = min(parameters.block_m, needed), min(parameters.block_n, needed)
    warps = min(parameters.num_warps, max(block_m, block_n) // 16)
    return parameters._replace(block_m=block_m, block_n=block_n, num_warps=warps, maxnreg=None)


def tiles_of(windows, block):
    """(tiles of all windows, tiles of a window)."""
    of_window = cdiv(windows.places, block)
    return math.prod(windows.counts) * of_window, of_window


def described(call, windows, tiles):
    """num_tokens, num_heads, group, tiles, and the four tuples of the windows."""
    num_tokens, _, num_heads, group = call.geometry
    return num_tokens, num_heads, group, *tiles, *windows


@functools.lru_cache(maxsize=1024)
def plan_attend(pair, call, windows, o_strides, dropout_p):
    parameters = tiled(call, windows, "attend")
    tiles = tiles_of(windows, parameters.block_m)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, call.parameter_stride, *described(call, windows, tiles),
        *dropout_scalars(dropout_p), pair.scale, pair.score, call.precision, *call.sizes(parameters),
    )
    return Launch(window.attend, tiles[0] * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_queries(pair, call, windows, o_strides, do_strides, dq_strides, dropout_p):
    parameters = tiled(call, windows, "grad_queries")
    tiles = tiles_of(windows, parameters.block_m)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, do_strides, dq_strides, call.parameter_stride,
        *described(call, windows, tiles), *dropout_scalars(dropout_p), pair.scale, pair.score, pair.grad, call.precision,
        *call.sizes(parameters),
    )
    return Launch(window.grad_queries, tiles[0] * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_keys(pair, call, windows, do_strides, dk_strides, dv_strides, dropout_p):
    parameters = tiled(call, windows, "grad_keys")
    tiles = tiles_of(windows, parameters.block_n)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, do_strides, dk_strides, dv_strides, call.parameter_stride,
        *described(call, windows, tiles), *dropout_scalars(dropout_p), pair.scale, pair.score, pair.grad, call.precision,
        *call.sizes(parameters),
    )
    return Launch(window.grad_keys, tiles[0] * call.k_shape[0] * call.k_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_sum_pairs(pair, call, windows, do_strides, dropout_p):
    """(launch, parts)."""
    parameters = tiled(call, windows, "grad_queries")
    rows, columns = (tiles_of(windows, block)[1] for block in (parameters.block_m, parameters.block_n))
    batch, heads = call.q_shape[:2]
    parts = min(batch * math.prod(windows.counts), cdiv(PROGRAMS, rows * columns * heads))
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, do_strides, call.parameter_stride,
        *described(call, windows, (batch, parts, rows, columns)), *dropout_scalars(dropout_p), pair.scale, pair.score,
        call.precision, *call.sizes(parameters),
    )
    return Launch(window.sum_pairs, rows * columns * heads * parts, scalars, parameters), parts


@functools.lru_cache(maxsize=1024)
def plan_grad_table(windows, heads, parts):
    blocks, places = cdiv(windows.entries, ENTRIES), power_of_2(windows.places)
    scalars = heads, parts, blocks, windows.sizes, ENTRIES, places
    return Launch(window.grad_table, heads * blocks, scalars, LaunchParameters(None, None, 4, 1))


def forward_launches(pair, q, k, v, parameter, table, seed, locality, dropout_p, o, lse):
    """(launch, tensors) pairs that fill o (B, Hq, N, Dv) and lse (B, Hq, N). table: (Hq, entries) float32, or None."""
    call = signature(q, k, v, parameter, False, -1, -1)
    attend = plan_attend(pair, call, windows_of(locality), o.stride(), dropout_p)
    return [(attend, (q, k, v, parameter, table, o, lse, seed))]


def backward_launches(
    pair, q, k, v, parameter, table, seed, locality, dropout_p, o, lse, do, dq, dk, dv, dparameter, dtable
):
    """(launch, tensors) pairs that fill the gradients of q, k, v, parameter and table."""
    call, windows = signature(q, k, v, parameter, False, -1, -1), windows_of(locality)
    count, _ = tiles_of(windows, tiled(call, windows, "grad_queries").block_m)
    batch, heads = q.shape[:2]
    delta, dlog_scale = empty(lse, lse.shape), empty(lse, (batch, heads, count))
    queries = plan_grad_queries(pair, call, windows, o.stride(), do.stride(), dq.stride(), dropout_p)
    keys = plan_grad_keys(pair, call, windows, do.stride(), dk.stride(), dv.stride(), dropout_p)
    launches = [
        (queries, (q, k, v, parameter, table, o, do, lse, dq, delta, dlog_scale, seed)),
        (keys, (q, k, v, parameter, table, do, lse, delta, dk, dv, seed)),
        (
            plan_grad_parameter(pair.grad_parameter, batch, heads, call.num_parameters, count),
            (dlog_scale, parameter, dparameter),
        ),
    ]
    if table is not None:
        pairs, parts = plan_sum_pairs(pair, call, windows, do.stride(), dropout_p)
        sums = empty(lse, (parts, heads, windows.places, windows.places))
        launches += [
            (pairs, (q, k, v, parameter, table, do, lse, delta, sums, seed)),
            (plan_grad_table(windows, heads, parts), (sums, dtable)),
        ]
    return launches
