"""Launchers of the kernels of selective synchronization attention. Outputs and workspaces come from the caller."""

import functools

import triton

from . import locking, pairwise_launch, synchronization
from .launch import Launch, LaunchParameters, width_block
from .locking import CELL as _CELL
from .pairwise_launch import WORD, resident_parameters

CELL = _CELL.value
EXTENT = locking.EXTENT.value
FEW_ROWS = LaunchParameters(64, None, 4, 1)


def signature(omega, omega_k, v, causal):
    """omega_k None: the keys are the queries."""
    k = omega if omega_k is None else omega_k
    return pairwise_launch.signature(omega, k, v, None, False, -1, 0 if causal else -1)


def stride(parameter):
    """Of a parameter with one number a head, or one for all."""
    return 1 if parameter.numel() > 1 else 0


def options(call, self):
    """SELF, CAUSAL, PRECISION."""
    return self, call.right == 0, call.precision


def own_block(call, kernel):
    """Tokens that one program of a kernel works for."""
    parameters = call.tuned(kernel)
    return parameters.block_n if kernel == "sync_grad_keys" else parameters.block_m


def list_rows(call, kernel, cuda=None):
    """Tokens that share a list of cells. cuda: the launch in CUDA C++ that takes the place of the kernel's, or None."""
    return max(own_block(call, kernel), CELL) if cuda is None else cuda.rows


def members(cuda=None):
    """The first bit in the lists' entries that tells of a tile's cells, of which Triton's kernels want to know nothing."""
    return None if cuda is None else cuda.members


def lists_shapes(call, kernel, rows):
    """Shapes of the lists of cells for the tiles of a kernel, of `rows` tokens each, and of their counts."""
    own, other = call.q_shape[2], call.k_shape[2]
    if kernel == "sync_grad_keys":
        own, other = other, own
    tiles = triton.cdiv(own, rows)
    return (*call.q_shape[:2], tiles, triton.cdiv(other, CELL)), (*call.q_shape[:2], tiles)


@functools.lru_cache(maxsize=1024)
def plan_survey(shape, strides, coupling_stride, bandwidth_stride, order_per_token):
    batch, heads, length, width = shape
    cells = triton.cdiv(length, CELL)
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
        own, triton.cdiv(own, CELL), triton.cdiv(other, CELL), heads, *((1, group) if queries else (group, 1)), tiles,
        call.window[0], queries, call.right == 0, rows // CELL, members, width, width_block(width),
    )
    return Launch(locking.neighbours, tiles * heads * call.q_shape[0], scalars, LaunchParameters(None, None, 4, 1))


@functools.lru_cache(maxsize=1024)
def plan_attend(call, self, o_strides, bandwidth_stride):
    parameters = call.tuned("sync_attend")
    tiles = triton.cdiv(call.q_shape[2], parameters.block_m)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, bandwidth_stride, *call.geometry, tiles, call.window[0],
        *options(call, self), *call.sizes(parameters),
    )
    return Launch(synchronization.attend, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_attend_top_k(call, self, o_strides, bandwidth_stride, top_k, ring):
    parameters = resident_parameters(call, ring)
    tiles = triton.cdiv(call.q_shape[2], parameters.block_m)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, bandwidth_stride, *call.geometry, tiles, call.window[0],
        top_k, *options(call, self), ring // parameters.block_n, *call.sizes(parameters),
    )
    return Launch(synchronization.attend_top_k, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_row_terms(shape, o_strides, do_strides):
    batch, heads, length, width = shape
    tiles = triton.cdiv(length, FEW_ROWS.block_m)
    scalars = o_strides, do_strides, length, heads, tiles, width, FEW_ROWS.block_m, width_block(width)
    return Launch(synchronization.row_terms, tiles * heads * batch, scalars, FEW_ROWS)


@functools.lru_cache(maxsize=1024)
def plan_grad_queries(call, self, do_strides, dw_strides, bandwidth_stride, num_words, steepest):
    parameters = call.tuned("sync_grad_queries")
    tiles = triton.cdiv(call.q_shape[2], parameters.block_m)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, do_strides, dw_strides, bandwidth_stride, *call.geometry, tiles,
        call.window[0], num_words, steepest, *options(call, self), *call.sizes(parameters),
    )
    return Launch(synchronization.grad_queries, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_keys(call, self, do_strides, dk_strides, dv_strides, bandwidth_stride, num_words, steepest):
    parameters = call.tuned("sync_grad_keys")
    tiles = triton.cdiv(call.k_shape[2], parameters.block_n)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, do_strides, dk_strides, dv_strides, bandwidth_stride, *call.geometry,
        tiles, call.window[0], num_words, steepest, *options(call, self), *call.sizes(parameters),
    )
    return Launch(synchronization.grad_keys, tiles * call.k_shape[0] * call.k_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_tokens(call, do_strides, dw_strides, dv_strides, bandwidth_stride, steepest):
    parameters = call.tuned("sync_grad_tokens")
    num_tokens, _, num_heads, _ = call.geometry
    tiles = triton.cdiv(num_tokens, parameters.block_m)
    scalars = (
        call.q_strides, call.v_strides, do_strides, dw_strides, dv_strides, bandwidth_stride, num_tokens, num_heads, tiles,
        steepest, call.precision, *call.sizes(parameters),
    )
    return Launch(synchronization.grad_tokens, tiles * call.q_shape[0] * num_heads, scalars, parameters)


def forward_launches(omega, omega_k, v, coupling, bandwidth, order, causal, top_k, o, bits, cuda):
    """The launches of `forward`, in order. cuda: the launch in CUDA C++ that takes the place of `attend`, or None."""
    call, self = signature(omega, omega_k, v, causal), omega_k is None
    launches = survey_launches(omega, omega_k, coupling, bandwidth, order)
    if top_k is None:
        neighbours = plan_neighbours(call, "sync_attend", list_rows(call, "sync_attend", cuda), members(cuda))
        return *launches, neighbours, cuda or plan_attend(call, self, o.stride(), stride(bandwidth))
    return *launches, plan_attend_top_k(call, self, o.stride(), stride(bandwidth), top_k, bits.shape[-1] * WORD)


def backward_launches(
    omega, omega_k, v, coupling, bandwidth, order, causal, grad_floor, symmetric, o, bits, do, dw, dk, dv, cuda
):
    """The launches of `backward`, in order; symmetric: S is, and dw is the gradient of omega as queries and as keys.

    cuda: the launch in CUDA C++ that takes the place of `grad_tokens`, or None.
    """
    call, self = signature(omega, omega_k, v, causal), omega_k is None
    steepest, by_head = 1.0 / grad_floor, stride(bandwidth)
    surveys = survey_launches(omega, omega_k, coupling, bandwidth, order)
    launches = *surveys, plan_row_terms(o.shape, o.stride(), do.stride())
    if symmetric:
        rows = list_rows(call, "sync_grad_tokens", cuda)
        tokens = cuda or plan_grad_tokens(call, do.stride(), dw.stride(), dv.stride(), by_head, steepest)
        return *launches, plan_neighbours(call, "sync_grad_tokens", rows, members(cuda)), tokens
    num_words = 0 if bits is None else bits.shape[-1]
    return (
        *launches,
        plan_neighbours(call, "sync_grad_queries", list_rows(call, "sync_grad_queries")),
        plan_grad_queries(call, self, do.stride(), dw.stride(), by_head, num_words, steepest),
        plan_neighbours(call, "sync_grad_keys", list_rows(call, "sync_grad_keys")),
        plan_grad_keys(call, self, do.stride(), dk.stride(), dv.stride(), by_head, num_words, steepest),
    )


def survey_launches(omega, omega_k, coupling, bandwidth, order):
    """The launches of `surveys`."""
    strides = stride(coupling), stride(bandwidth), order.dim() == 3
    return tuple(plan_survey(w.shape, w.stride(), *strides) for w in (omega, omega_k) if w is not None)


def surveys(omega, omega_k, coupling, bandwidth, order, queries, keys):
    """What the launches that fill the surveys of queries and, with omega_k, of keys are given."""
    of_queries = omega, coupling, bandwidth, order, *queries
    return (of_queries,) if omega_k is None else (of_queries, (omega_k, coupling, bandwidth, order, *keys))


def neighbours(own, other, lists):
    """What the launch that fills (lists, counts, ..) is given."""
    return own.centres, own.extents, other.centres, other.extents, *lists[:2]


def forward(omega, omega_k, v, coupling, bandwidth, order, queries, keys, lists, o, total, bits):
    """What `forward_launches` are given to fill o (B, Hq, N, Dv), total (B, Hq, N) and bits (B, Hq, N, words) or lists."""
    k = omega if omega_k is None else omega_k
    inputs = omega, k, v, queries.squares, keys.squares, queries.c, bandwidth, o, total
    given = surveys(omega, omega_k, coupling, bandwidth, order, queries, keys)
    if lists is None:
        return *given, (*inputs, bits)
    return *given, neighbours(queries, keys, lists), (*inputs, *lists)


def backward(
    omega, omega_k, v, coupling, bandwidth, order, queries, keys, query_lists, key_lists, o, total, bits,
    do, inverse, shift, dw, dk, dv, dalpha, dradius,
):
    """What `backward_launches` are given to fill dw, dk, dv, and dalpha and dradius (B, Hq, N).

    key_lists None: where S is symmetric, dw is that of queries and keys. Without omega_k, dk is the gradient of omega, and
    dw (B, H, N, D) float32 that of its part as queries.
    """
    k = omega if omega_k is None else omega_k
    given = *surveys(omega, omega_k, coupling, bandwidth, order, queries, keys), (o, do, total, inverse, shift)
    if key_lists is None:
        tensors = omega, v, queries.squares, queries.c, bandwidth, do, inverse, shift, dw, dv, dalpha, dradius, *query_lists
        return *given, neighbours(queries, keys, query_lists), tensors
    inputs = omega, k, v, queries.squares, keys.squares, queries.c, bandwidth, do, inverse, shift, bits
    return (
        *given,
        neighbours(queries, keys, query_lists),
        (*inputs, dw, dalpha, dradius, *query_lists),
        neighbours(keys, queries, key_lists),
        (*inputs, dw if omega_k is None else None, dk, dv, *key_lists),
    )
