"""Launchers of the kernels of softmax and affine-scaled attention. Outputs and workspaces come from the caller."""

import functools
import math

from . import affine
from .launch import Launch, LaunchParameters, cdiv, power_of_2, width_block
from .pairwise_launch import dropout_scalars, signature

__all__ = [
    "chunk", "plan_attend", "plan_grad_keys", "plan_grad_queries", "plan_grad_sink", "plan_sums", "signature", "sums_shape",
]

SMALLEST = 2.0**-126  # the smallest normal float32: a factor of 0 times the -inf of a masked product would be NaN
SHARED_BYTES = 2**24  # a third of an H100's L2; the rest is for streamed tensors


def runs(call):
    """Whether a call can use running sums over all keys before a tile: no left limit and no packed sequences."""
    return call.left < 0 and not call.packed


def heads_together(call, keys):
    """Number of heads whose programs run together: their keys and values, or queries and dO, must fit in L2."""
    num_queries, num_keys, num_heads, group = call.geometry
    row = (call.q_shape[3] + call.v_shape[3]) * call.dtype.itemsize
    if keys:
        together = group * max(1, SHARED_BYTES // max(num_keys * row, 1))
    else:
        together = max(1, SHARED_BYTES // max(group * num_queries * row, 1))
    return min(together, call.q_shape[0] * num_heads)


def chunk(call, kernel):
    """Tokens per chunk of the sums that a kernel reads: the size of its key tiles."""
    return call.tuned(kernel).block_n


def sums_shape(call, chunk):
    """Shape of the output of chunk_sums: (B, Hkv, chunks, width of v)."""
    batch, heads, length, width = call.v_shape
    return batch, heads, cdiv(length, chunk), width


@functools.lru_cache(maxsize=1024)
def plan_sums(call, chunk):
    """Launches that fill them: chunk_sums of (v, sums) and, where running sums serve, running_sums of (sums,)."""
    batch, heads, chunks, width = sums_shape(call, chunk)
    parameters = LaunchParameters(None, None, 4, 1)
    scalars = call.v_strides, call.v_shape[2], heads, chunks, width, width_block(width), chunk
    sum_chunks = Launch(affine.chunk_sums, chunks * heads * batch, scalars, parameters)
    if not runs(call):
        return (sum_chunks,)
    blocks = cdiv(width, affine.COLUMNS.value)
    return sum_chunks, Launch(affine.running_sums, blocks * heads * batch, (chunks, blocks, width), parameters)


@functools.lru_cache(maxsize=1024)
def plan_attend(call, o_strides, scale, dropout_p):
    parameters = call.tuned("softmax_attend")
    tiles = cdiv(call.q_shape[2], parameters.block_m)
    factor = max(abs(scale) * math.log2(math.e), SMALLEST)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, o_strides, *call.geometry, tiles, heads_together(call, keys=True),
        call.window, factor, *dropout_scalars(dropout_p), scale < 0, runs(call), call.precision, *call.sizes(parameters),
    )
    return Launch(affine.attend, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_queries(call, exact, u_strides, do_strides, dq_strides, scale, dropout_p):
    parameters = call.tuned("softmax_grad_queries")
    tiles = cdiv(call.q_shape[2], parameters.block_m)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, u_strides, do_strides, dq_strides, *call.geometry, tiles,
        heads_together(call, keys=True), call.window, scale, *dropout_scalars(dropout_p), runs(call), exact,
        call.precision, *call.sizes(parameters),
    )
    return Launch(affine.grad_queries, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_keys(call, do_strides, dk_strides, dv_strides, scale, dropout_p):
    parameters = call.tuned("softmax_grad_keys")
    tiles = cdiv(call.k_shape[2], parameters.block_n)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, do_strides, dk_strides, dv_strides, *call.geometry, tiles,
        heads_together(call, keys=False), call.window, scale, *dropout_scalars(dropout_p),
        call.precision, *call.sizes(parameters),
    )
    return Launch(affine.grad_keys, tiles * call.k_shape[0] * call.k_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad_sink(q_shape):
    batch, heads, length, _ = q_shape
    scalars = batch, heads, length, min(1024, power_of_2(max(length, 1)))
    return Launch(affine.grad_sink, heads, scalars, LaunchParameters(None, None, 4, 1))
