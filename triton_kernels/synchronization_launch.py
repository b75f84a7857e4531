"""Launchers of the kernels of selective synchronization attention. Outputs and workspaces come from the caller."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from nearfar.runtime.tensors import empty

from . import locking, pairwise_launch, synchronization
from .launch import Launch, LaunchParameters, cdiv, power_of_2, width_block
from .locking import CELL as _CELL
from .pairwise_launch import WORD, plan_grad_parameter, selection_parameters

CELL = _CELL.value
EXTENT = locking.EXTENT.value
FEW_ROWS = LaunchParameters(64, None, 4, 1)


def signature(omega, omega_k, v, causal):
    """omega_k: None if the keys are the queries."""
    k = omega if omega_k is None else omega_k
    return pairwise_launch.signature(omega, k, v, None, False, -1, 0 if causal else -1)


def stride(parameter):
    """The stride of a parameter with one number per head (1), or with one for all heads (0)."""
    return 1 if parameter.numel() > 1 else 0


def options(call, self):
    """SELF, CAUSAL, PRECISION."""
    return self, call.right == 0, call.precision


def own_block(call, kernel):
    """Tokens per program of a kernel."""
    parameters = call.tuned(kernel)
    return parameters.block_n if kernel == "sync_grad_keys" else parameters.block_m


def list_rows(call, kernel, cuda=None):
    """Tokens that share a list of cells. cuda: the InPlace of a kernel in CUDA C++, or None."""
    return max(own_block(call, kernel), CELL) if cuda is None else cuda.rows


def members(cuda=None):
    """The first bit of a list entry that flags cells of a tile; Triton's kernels do not use these flags."""
    return None if cuda is None else cuda.members


def lists_shapes(call, kernel, rows):
    """Shapes of the lists of cells for the tiles of a kernel, of `rows` tokens each, and of their counts."""
    own, other = call.q_shape[2], call.k_shape[2]
    if kernel == "sync_grad_keys":
        own, other = other, own
    tiles = cdiv(own, rows)
    return (*call.q_shape[:2], tiles, cdiv(other, CELL)), (*call.q_shape[:2], tiles)


@functools.lru_cache(maxsize=1024)
def plan_survey(shape, strides, coupling_stride, bandwidth_stride, order_per_token):
    batch, heads, length, width = shape
    cells = cdiv(length, CELL)
    scalars = (
        strides, coupling_stride, bandwidth_stride, length, heads, cells, order_per_token, width, width_block(width)
    )
    return Launch(locking.survey, cells * heads * batch, scalars, LaunchParameters(None, None, 4, 1))


@functools.lru_cache(maxsize=1024)
def plan_neighbours(call, kernel, rows, members=None):
    queries = kernel != "sync_grad_keys"
    num_queries, num_keys, heads, group = call.geometry
    own, other = (num_queries, num_keys) if queries else (num_keys, num_queries)
    tiles = lists_shapes(call, kernel, rows)[1][2]
    width = call.q_shape[3]
    scalars = (
        own, cdiv(own, CELL), cdiv(other, CELL), heads, *((1, group) if queries else (group, 1)), tiles,
        call.window[0], queries, call.right == 0, rows // CELL, members, width, width_block(width),
    )
    return Launch(locking.neighbours, tiles * heads * call.q_shape[0], scalars, LaunchParameters(None, None, 4, 1))


@functools.lru_cache(maxsize=1024)
def plan_attend(call, self, o_strides, bandwidth_stride):
    parameters = call.tuned("sync_attend")
    tiles = cdiv(call.q_shape[2], parameters.block_m)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, bandwidth_stride, *call.geometry, tiles, call.window[0],
        *options(call, self), *call.sizes(parameters),
    )
    return Launch(synchronization.attend, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_attend_top_k(call, self, o_strides, bandwidth_stride, top_k, ring):
    parameters = selection_parameters(ring)
    tiles, slots = cdiv(call.q_shape[2], parameters.block_m), ring // parameters.block_n
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, bandwidth_stride, *call.geometry, tiles, call.window[0],
        top_k, *options(call, self), slots, power_of_2(slots), *call.sizes(parameters),
    )
    return Launch(synchronization.attend_top_k, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_row_terms(shape, o_strides, do_strides):
    batch, heads, length, width = shape
    tiles = cdiv(length, FEW_ROWS.block_m)
    scalars = o_strides, do_strides, length, heads, tiles, width, FEW_ROWS.block_m, width_block(width)
    return Launch(synchronization.row_terms, tiles * heads * batch, scalars, FEW_ROWS)


@functools.lru_cache(maxsize=1024)
def plan_grad_queries(call, self, do_strides, dw_strides, bandwidth_stride, num_words, steepest):
    parameters = call.tuned("sync_grad_queries")
    tiles = cdiv(call.q_shape[2], parameters.block_m)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, do_strides, dw_strides, bandwidth_stride, *call.geometry, tiles,
        call.window[0], num_words, steepest, *options(call, self), *call.sizes(parameters),
    )
    return Launch(synchronization.grad_queries, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_keys(call, self, do_strides, dk_strides, dv_strides, bandwidth_stride, num_words, steepest):
    parameters = call.tuned("sync_grad_keys")
    tiles = cdiv(call.k_shape[2], parameters.block_n)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, do_strides, dk_strides, dv_strides, bandwidth_stride, *call.geometry,
        tiles, call.window[0], num_words, steepest, *options(call, self), *call.sizes(parameters),
    )
    return Launch(synchronization.grad_keys, tiles * call.k_shape[0] * call.k_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_tokens(call, do_strides, dw_strides, dv_strides, bandwidth_stride, steepest):
    parameters = call.tuned("sync_grad_tokens")
    num_tokens, _, num_heads, _ = call.geometry
    tiles = cdiv(num_tokens, parameters.block_m)
    scalars = (
        call.q_strides, call.v_strides, do_strides, dw_strides, dv_strides, bandwidth_stride, num_tokens, num_heads, tiles,
        steepest, call.precision, *call.sizes(parameters),
    )
    return Launch(synchronization.grad_tokens, tiles * call.q_shape[0] * num_heads, scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_head_gradients(rows, coupling_stride, per_token):
    batch, heads, length = rows
    scalars = coupling_stride, heads, length, per_token, min(1024, power_of_2(length))
    return Launch(synchronization.head_gradients, heads * batch, scalars, FEW_ROWS)


class InPlace(NamedTuple):
    """A CUDA C++ kernel that replaces one of Triton's.

    rows: tokens that share a list of cells. members: see `members`. call: (launch, tensors) from the tensors that are worked
    out here, by name: squares, c, lists, counts, a counter; for a backward inverse, shift, dalpha and dradius, too.
    """

    rows: int
    members: int
    call: Callable


class Survey(NamedTuple):
    """What locking.survey writes about queries or keys; c (B, H, N) is None of keys."""

    squares: torch.Tensor
    c: torch.Tensor | None
    centres: torch.Tensor
    extents: torch.Tensor


def survey(w, queries):
    """An uninitialised Survey."""
    batch, heads, length, width = w.shape
    cells = cdiv(length, CELL)

    def floats(*shape):
        return empty(w, (batch, heads, *shape), torch.float32)

    return Survey(floats(length), floats(length) if queries else None, floats(cells, width), floats(cells, EXTENT))


def survey_launches(omega, omega_k, coupling, bandwidth, order):
    """Surveys of queries and keys, one for both without omega_k, and the (launch, tensors) pairs that fill them."""
    strides = stride(coupling), stride(bandwidth), order.dim() == 3
    of_queries = survey(omega, True)
    of_keys = of_queries if omega_k is None else survey(omega_k, False)
    launches = []
    for w, found in ((omega, of_queries), (omega_k, of_keys)):
        if w is not None:
            launches.append((plan_survey(w.shape, w.stride(), *strides), (w, coupling, bandwidth, order, *found)))
    return of_queries, of_keys, launches


def list_launches(call, kernel, own, others, cuda=None):
    """(lists, counts), for a launch in CUDA C++ a counter, too, and the pair that fills the first two.

    own, others: the surveys. cuda: an InPlace, or None.
    """
    rows = list_rows(call, kernel, cuda)
    shapes = lists_shapes(call, kernel, rows)
    lists = [empty(own.squares, shape, torch.int32) for shape in (*shapes, *([] if cuda is None else [(1,)]))]
    launch = plan_neighbours(call, kernel, rows, members(cuda))
    return lists, (launch, (own.centres, own.extents, others.centres, others.extents, *lists[:2]))


def forward_launches(omega, omega_k, v, coupling, bandwidth, order, causal, top_k, o, total, bits, cuda=None):
    """The pairs that fill o (B, Hq, N, Dv), total (B, Hq, N) and, with top_k, bits (B, Hq, N, words).

    cuda: an InPlace of `attend`, or None.
    """
    call, self = signature(omega, omega_k, v, causal), omega_k is None
    queries, keys, launches = survey_launches(omega, omega_k, coupling, bandwidth, order)
    given = omega, omega if self else omega_k, v, queries.squares, keys.squares, queries.c, bandwidth, o, total
    if top_k is not None:
        attend = plan_attend_top_k(call, self, o.stride(), stride(bandwidth), top_k, bits.shape[-1] * WORD)
        return [*launches, (attend, (*given, bits))]
    lists, fill = list_launches(call, "sync_attend", queries, keys, cuda)
    if cuda is None:
        attend = plan_attend(call, self, o.stride(), stride(bandwidth)), (*given, *lists)
    else:
        attend = cuda.call(squares=queries.squares, c=queries.c, **named(lists))
    return [*launches, fill, attend]


def named(lists):
    """Lists, counts and a counter by name, for an InPlace."""
    return dict(zip(("lists", "counts", "counter"), lists, strict=True))


def backward_launches(
    omega, omega_k, v, coupling, bandwidth, order, causal, grad_floor, o, total, bits, do,
    dw, dk, dv, dcoupling, dbandwidth, dorder, cuda=None,
):
    """The pairs that fill the gradients; dw is that of omega, as queries and as keys where omega_k is None.

    cuda: an InPlace of `grad_tokens`, or None.
    """
    call, self = signature(omega, omega_k, v, causal), omega_k is None
    steepest, by_head = 1.0 / grad_floor, stride(bandwidth)
    queries, keys, launches = survey_launches(omega, omega_k, coupling, bandwidth, order)
    inverse, shift, dalpha, dradius = [empty(total, total.shape) for _ in range(4)]
    launches.append((plan_row_terms(o.shape, o.stride(), do.stride()), (o, do, total, inverse, shift)))
    if is_symmetric(omega_k, bits, causal, order):
        lists, fill = list_launches(call, "sync_grad_tokens", queries, keys, cuda)
        if cuda is None:
            plan = plan_grad_tokens(call, do.stride(), dw.stride(), dv.stride(), by_head, steepest)
            given = omega, v, queries.squares, queries.c, bandwidth, do, inverse, shift, dw, dv, dalpha, dradius, *lists
            launches += [fill, (plan, given)]
        else:
            rows = dict(inverse=inverse, shift=shift, dalpha=dalpha, dradius=dradius)
            launches += [fill, cuda.call(squares=queries.squares, c=queries.c, **rows, **named(lists))]
    else:
        num_words = 0 if bits is None else bits.shape[-1]
        # The gradient of tokens as queries stays unrounded until their gradient as keys is added.
        of_queries, of_keys = (empty(omega, omega.shape, torch.float32), dw) if self else (dw, dk)
        given = (
            omega, omega if self else omega_k, v, queries.squares, keys.squares, queries.c, bandwidth, do, inverse, shift, bits,
        )
        query_lists, fill_query_lists = list_launches(call, "sync_grad_queries", queries, keys)
        key_lists, fill_key_lists = list_launches(call, "sync_grad_keys", keys, queries)
        grad_queries = plan_grad_queries(call, self, do.stride(), of_queries.stride(), by_head, num_words, steepest)
        grad_keys = plan_grad_keys(call, self, do.stride(), of_keys.stride(), dv.stride(), by_head, num_words, steepest)
        launches += [
            fill_query_lists,
            (grad_queries, (*given, of_queries, dalpha, dradius, *query_lists)),
            fill_key_lists,
            (grad_keys, (*given, of_queries if self else None, of_keys, dv, *key_lists)),
        ]
    (batch, heads, _), per_token = total.shape, order.dim() == 3
    of_alpha, of_radius = empty(total, (batch, heads)), empty(total, (batch, heads))
    of_heads = plan_head_gradients(total.shape, stride(coupling), per_token)
    return [
        *launches,
        (of_heads, (dalpha, dradius, coupling, order, of_alpha, of_radius, dorder)),
        *[
            (plan_grad_parameter(synchronization.whole_sum, batch, heads, x.numel(), 1), (partials, x, dx))
            for partials, x, dx in ((of_alpha, bandwidth, dbandwidth), (of_radius, coupling, dcoupling))
        ],
    ]


def is_symmetric(omega_k, bits, causal, order):
    """Whether S is symmetric: keys are the queries, all see all, no selection, and one order parameter per head."""
    return omega_k is None and bits is None and not causal and order.dim() == 2
