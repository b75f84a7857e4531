"""Launchers of the kernels on grids. nearfar.tiling chooses tiles; outputs come from the caller."""

import functools
import math

import torch

from nearfar.runtime.tensors import empty
from nearfar.tiling import (
    MAX_GLOBALS,
    SELECT_BLOCK,
    choose_global_selection,
    choose_resident,
    choose_selection,
    choose_tiles,
    forms,
    geometry_of,
)

from . import grid
from .launch import Launch, LaunchParameters, cdiv, width_block
from .pairwise_launch import dropout_scalars, plan_grad_parameter, signature

FEW_STEPS = 4  # of a walk, in which |k|^2 is better computed again and again


def tiled(call, geometry, kernel, selects):
    """(launch parameters, Tiles, programs of a head) of one of the kernels that attend or differentiate."""
    parameters = call.tuned(kernel)._replace(maxnreg=None)
    blocks = parameters.block_m, parameters.block_n
    tiles = choose_tiles(geometry, *(reversed(blocks) if kernel == "grad_keys" else blocks), selects)
    return parameters, tiles, programs(geometry, tiles)


def programs(geometry, tiles):
    """The boxes of a head, and one for its global tokens."""
    return math.prod(tiles.boxes(geometry)) + (geometry.num_globals > 0)


def described(geometry, tiles):
    """The arguments of every kernel that describe grid and tiles."""
    return (
        geometry.shape, geometry.num_globals, geometry.radius, geometry.dilation, tiles.boxes(geometry),
        forms(geometry, tiles), geometry.words,
    )


def sizes(call, tiles):
    """D, DV, BLOCK_D, BLOCK_DV and those of boxes and steps, with which the arguments of the kernels end."""
    return call.q_shape[3], call.v_shape[3], *call.blocks, *tiles.box, tiles.key_h, tiles.key_w


@functools.lru_cache(maxsize=1024)
def plan_attend(pair, call, geometry, o_strides, selects, dropout_p):
    parameters, tiles, count = tiled(call, geometry, "attend", selects)
    batch, heads = call.q_shape[:2]
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, call.parameter_stride, *call.geometry[2:], count,
        *described(geometry, tiles), *dropout_scalars(dropout_p), pair.scale, pair.score, call.precision,
        *sizes(call, tiles),
    )
    return Launch(grid.attend, count * batch * heads, scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_attend_resident(pair, call, geometry, o_strides, top_k, keep_ties, dropout_p, tiles, steps, first, count):
    """first, count: boxes, from one on, or the program of the global queries."""
    batch, heads = call.q_shape[:2]
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, call.parameter_stride, *call.geometry[2:], count, first,
        *described(geometry, tiles), top_k, *dropout_scalars(dropout_p), pair.scale, pair.score, call.precision,
        steps, MAX_GLOBALS if geometry.num_globals else 0, keep_ties, *sizes(call, tiles),
    )
    return Launch(grid.attend_resident, count * batch * heads, scalars, LaunchParameters(None, None, 4, 1))


@functools.lru_cache(maxsize=1024)
def plan_select(pair, call, geometry, top_k, keep_ties, of_globals):
    """of_globals: the selection of the global queries, else that of the cells."""
    tiles, slots = choose_global_selection(geometry) if of_globals else choose_selection(geometry)
    boxes, columns = math.prod(tiles.boxes(geometry)), slots * tiles.key_h * tiles.key_w
    first, count = (boxes, 1) if of_globals else (0, boxes)
    batch, heads = call.q_shape[:2]
    width = call.q_shape[3]
    scalars = (
        call.q_strides, call.k_strides, call.parameter_stride, *call.geometry[2:], count, first,
        *described(geometry, tiles), top_k, pair.scale, pair.score, call.precision, slots, keep_ties,
        width, width_block(width), *tiles.box, tiles.key_h, tiles.key_w,
    )
    parameters = LaunchParameters(math.prod(tiles.box), SELECT_BLOCK, 4 if columns <= 128 else 8, 1)
    return Launch(grid.select, count * batch * heads, scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_queries(pair, call, geometry, o_strides, do_strides, dq_strides, selects, dropout_p):
    parameters, tiles, count = tiled(call, geometry, "grad_queries", selects)
    batch, heads = call.q_shape[:2]
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, do_strides, dq_strides, call.parameter_stride,
        *call.geometry[2:], count, *described(geometry, tiles), *dropout_scalars(dropout_p),
        pair.scale, pair.score, pair.grad, call.precision, *sizes(call, tiles),
    )
    return Launch(grid.grad_queries, count * batch * heads, scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_keys(pair, call, geometry, do_strides, dk_strides, dv_strides, selects, dropout_p):
    parameters, tiles, count = tiled(call, geometry, "grad_keys", selects)
    batch, heads = call.k_shape[:2]
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, do_strides, dk_strides, dv_strides, call.parameter_stride,
        *call.geometry[2:], count, *described(geometry, tiles), *dropout_scalars(dropout_p),
        pair.scale, pair.score, pair.grad, call.precision, *sizes(call, tiles),
    )
    return Launch(grid.grad_keys, count * batch * heads, scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_squared_norms(call):
    batch, heads, num_tokens, width = call.k_shape
    parameters = LaunchParameters(64, None, 4, 1)
    tiles = cdiv(num_tokens, parameters.block_m)
    scalars = call.k_strides, num_tokens, heads, tiles, width, width_block(width), parameters.block_m
    return Launch(grid.squared_norms, tiles * batch * heads, scalars, parameters)


def squared_norms(call, geometry, k):
    """(|k|^2 (B, Hkv, N), the launches that fill it) where a pass over the keys costs less than every box's own.

    Exact float32 scores are made of differences, not of norms.
    """
    *_, tiles, _ = tiled(call, geometry, "attend", False)
    exact = call.dtype == torch.float32 and call.precision == "ieee"
    if exact or tiles.steps(geometry) < FEW_STEPS:
        return None, []
    k_squares = empty(k, k.shape[:3], torch.float32)
    return k_squares, [(plan_squared_norms(call), (k, k_squares))]


def forward_launches(pair, q, k, v, parameter, seed, locality, top_k, keep_ties, dropout_p, o, lse, bits):
    """(launch, tensors) pairs that fill o (B, Hq, N, Dv), lse (B, Hq, N) and, with top_k, bits (B, Hq, words of a head)."""
    call, geometry = signature(q, k, v, parameter, False, -1, -1), geometry_of(locality)
    resident = None if bits is None or call.dtype.itemsize > 2 else choose_resident(geometry)
    if resident:
        (cells, _), *_ = resident
        programs_of = (0, math.prod(cells.boxes(geometry))), (math.prod(resident[-1][0].boxes(geometry)), 1)
        plans = [
            plan_attend_resident(pair, call, geometry, o.stride(), top_k, keep_ties, dropout_p, *choice, *which)
            for choice, which in zip(resident, programs_of, strict=False)
        ]
        return [(plan, (q, k, v, parameter, o, lse, bits, seed)) for plan in plans]
    k_squares, launches = squared_norms(call, geometry, k)
    if bits is not None:
        for of_globals in (False, True) if geometry.num_globals else (False,):
            launches += [(plan_select(pair, call, geometry, top_k, keep_ties, of_globals), (q, k, k_squares, parameter, bits))]
    attend = plan_attend(pair, call, geometry, o.stride(), bits is not None, dropout_p)
    return [*launches, (attend, (q, k, v, k_squares, parameter, o, lse, bits, seed))]


def backward_launches(pair, q, k, v, parameter, seed, locality, dropout_p, o, lse, bits, do, dq, dk, dv, dparameter):
    """(launch, tensors) pairs that fill the gradients of q, k, v and parameter. bits None: no selection."""
    call, geometry, selects = signature(q, k, v, parameter, False, -1, -1), geometry_of(locality), bits is not None
    k_squares, launches = squared_norms(call, geometry, k)
    *_, count = tiled(call, geometry, "grad_queries", selects)
    delta, dlog_scale = empty(lse, lse.shape), empty(lse, (*lse.shape[:2], count))
    queries = plan_grad_queries(pair, call, geometry, o.stride(), do.stride(), dq.stride(), selects, dropout_p)
    keys = plan_grad_keys(pair, call, geometry, do.stride(), dk.stride(), dv.stride(), selects, dropout_p)
    return [
        *launches,
        (queries, (q, k, v, k_squares, parameter, o, do, lse, bits, dq, delta, dlog_scale, seed)),
        (keys, (q, k, v, parameter, do, lse, bits, delta, dk, dv, seed)),
        (
            plan_grad_parameter(pair.grad_parameter, *call.q_shape[:2], call.num_parameters, count),
            (dlog_scale, parameter, dparameter),
        ),
    ]
