"""Softmax attention with an affine epilogue as a torch operator: schema, fake and autograd.

`torch.ops.nearfar.affine_attention` serves `nearfar.affine_attention` and, without alpha and beta, `nearfar.softmax_attention`.
"""

import importlib
import math

import torch

from nearfar.checks import is_plain
from nearfar.ops.torch_operator import device_of, empty_rows, register, unit_stride

_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor? alpha, Tensor? beta, Tensor? sink, Tensor? token_bounds, int left, int right,"
    " float scale) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? alpha, Tensor? beta, Tensor? sink, Tensor? token_bounds, Tensor o,"
    " Tensor u, Tensor lse, int left, int right, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def attend(q, k, v, alpha, beta, sink, token_bounds, left, right, scale):
    """o (B, Hq, N, Dv). alpha, beta (B, Hq, N), sink (Hq,): float32 or None. left, right: -1 unlimited."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    alpha, beta, sink = (None if tensor is None else tensor.contiguous() for tensor in (alpha, beta, sink))
    arguments = q, k, v, alpha, beta, sink, token_bounds, left, right, scale
    tensors = [tensor for tensor in arguments[:6] if tensor is not None]
    if not is_plain(*tensors):
        return torch.ops.nearfar.affine_attention(*arguments)[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Eager.apply(*arguments)
    return forward(*arguments)[0]


def _launchers():
    """Triton is imported with the first launch, not with the package."""
    return importlib.import_module("nearfar.triton_kernels.affine_launch")


def _empty_sums(values, launch):
    """What chunk_sums fills: sums over chunks of values (B, H, N, width)."""
    batch, heads, length, width = values.shape
    return values.new_empty((batch, heads, launch.num_chunks(length), width), dtype=torch.float32)


def _allocate_forward(q, v, epilogue):
    """o, u and lse, not filled; u, the plain attention output, only with an epilogue, else None."""
    u = q.new_empty((*q.shape[:3], v.shape[3])) if epilogue else None
    precision = torch.float64 if q.dtype == torch.float32 else torch.float32
    return empty_rows(q, v.shape[3]), u, q.new_empty(q.shape[:3], dtype=precision)


def forward(q, k, v, alpha, beta, sink, token_bounds, left, right, scale):
    """(o, u, lse), u None without alpha and beta: o is the plain attention output then."""
    o, u, lse = _allocate_forward(q, v, alpha is not None or beta is not None)
    launch = _launchers()
    with device_of(q):
        sums = None if beta is None else _empty_sums(v, launch)
        launch.forward(q, k, v, alpha, beta, sink, token_bounds, left, right, scale, sums, o, u, lse)
    return o, u, lse


def backward(do, q, k, v, alpha, beta, sink, token_bounds, o, u, lse, left, right, scale):
    """(dq, dk, dv, dalpha, dbeta, dsink); None where there is no input."""
    do = unit_stride(do)
    dq, dk, dv = empty_rows(q, q.shape[3]), empty_rows(k, k.shape[3]), empty_rows(v, v.shape[3])
    m = torch.empty_like(lse, dtype=torch.float32)
    dbeta = value_sums = do_sums = None
    launch = _launchers()
    with device_of(q):
        if beta is not None:
            dbeta, value_sums, do_sums = torch.empty_like(beta), _empty_sums(v, launch), _empty_sums(do, launch)
        launch.backward(
            q, k, v, alpha, beta, token_bounds, left, right, scale, value_sums, do_sums, o if u is None else u, do, lse,
            dq, dk, dv, dbeta, m,
        )  # fmt: skip
    dsink = None
    if sink is not None:
        # The sink is one more column of the weights, with dP = 0; rows without keys have m = 0.
        weight = torch.exp2(sink[:, None] * math.log2(math.e) - lse)
        dsink = -(weight * (m if alpha is None else m * alpha)).sum((0, 2)).to(sink.dtype)
    return dq, dk, dv, None if alpha is None else m, dbeta, dsink


def _or_empty(tensors, like):
    """None as the empty tensor that stands for it where a schema wants a tensor."""
    return tuple(like.new_empty(0, dtype=torch.float32) if tensor is None else tensor for tensor in tensors)


def _dispatched_forward(q, *arguments):
    return _or_empty(forward(q, *arguments), q)


def _dispatched_backward(do, q, k, v, alpha, beta, sink, token_bounds, o, u, lse, left, right, scale):
    u = u if u.dim() == 4 else None
    return _or_empty(backward(do, q, k, v, alpha, beta, sink, token_bounds, o, u, lse, left, right, scale), q)


def _fake_forward(q, k, v, alpha, beta, *_):
    return _or_empty(_allocate_forward(q, v, alpha is not None or beta is not None), q)


def _fake_backward(do, q, k, v, alpha, beta, sink, *_):
    rows = (empty_rows(tensor, tensor.shape[3]) for tensor in (q, k, v))
    scalars = (None if tensor is None else torch.empty_like(tensor) for tensor in (alpha, beta, sink))
    return _or_empty((*rows, *scalars), q)


def _save(ctx, inputs, output):
    *tensors, left, right, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.options = left, right, scale


def _given(inputs, results):
    """The gradients of all arguments: what the backward returned, None for tensors that are None and for numbers."""
    gradients = (None if tensor is None else result for tensor, result in zip(inputs, results, strict=True))
    return *gradients, None, None, None, None


def _autograd_backward(ctx, do, *_):
    saved = ctx.saved_tensors  # to be unpacked once, as checkpointing demands
    return _given(saved[:6], torch.ops.nearfar.affine_attention_backward(do, *saved, *ctx.options))


class _Eager(torch.autograd.Function):
    """The autograd of a plain eager call, without the dispatcher."""

    @staticmethod
    def forward(ctx, *arguments):
        output = forward(*arguments)
        _save(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx, do):
        *inputs, u, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph the torch operator runs, because it refuses to be differentiated again
            u = lse.new_empty(0) if u is None else u
            results = torch.ops.nearfar.affine_attention_backward(do, *inputs, u, lse, *ctx.options)
        else:
            results = backward(do, *inputs, u, lse, *ctx.options)
        return _given(inputs[:6], results)


register(
    "affine_attention",
    (_FORWARD, _dispatched_forward, _fake_forward),
    (_BACKWARD, _dispatched_backward, _fake_backward),
    _autograd_backward,
    _save,
)
