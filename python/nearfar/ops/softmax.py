"""Softmax attention with an affine epilogue as a torch operator: schema, fake and autograd.

`torch.ops.nearfar.affine_attention` serves `nearfar.affine_attention` and, without alpha and beta, `nearfar.softmax_attention`.
"""

import math

import torch

from nearfar import _cuda
from nearfar.checks import PLAIN
from nearfar.ops.eager import Plan, start
from nearfar.ops.program import Program
from nearfar.ops.torch_operator import (
    allocate,
    compile_ahead,
    empty_rows,
    kernels,
    launch_all,
    layouts,
    planned,
    register,
    unit_stride,
    unit_strides,
    uses_tf32,
)

_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor? alpha, Tensor? beta, Tensor? sink, Tensor? token_bounds, int left, int right,"
    ' float scale, str backend="triton", str backward_backend="triton") -> (Tensor, Tensor, Tensor)'
)
_BACKWARD = (
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? alpha, Tensor? beta, Tensor? sink, Tensor? token_bounds, Tensor o,"
    " Tensor u, Tensor lse, int left, int right, float scale, str backend=\"triton\")"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def attend(repeats, rows, q, k, v, alpha, beta, sink, token_bounds, *options):
    """o (B, Hq, N, Dv). alpha, beta (B, Hq, N), sink (Hq,): float32 or None.

    repeats: of calls with these options and without token_bounds, or None. rows: layouts of q, k and v, None where the call is
    not plain. options: left and right, -1 unlimited, scale, and the backends of the forward and of the backward.
    """
    rows, (q, k, v) = unit_strides(rows, q, k, v)
    scalars = [None if tensor is None else tensor.contiguous() for tensor in (alpha, beta, sink)]
    tensors = q, k, v, *scalars, token_bounds
    if rows is None or not all([tensor is None or type(tensor) in PLAIN for tensor in scalars]):
        return torch.ops.nearfar.affine_attention(*tensors, *options)[0]
    return start(_Plan(rows, options, tensors), repeats, tensors)


_launchers = kernels("affine_launch")


def _precision(q):
    """The dtype of lse and of sums over tiles."""
    return torch.float64 if q.dtype == torch.float32 else torch.float32


def _allocate_forward(q, v, epilogue):
    """o, u and lse, not filled; u, the plain attention output, only with an epilogue, else None."""
    u = q.new_empty((*q.shape[:3], v.shape[3])) if epilogue else None
    return empty_rows(q, v.shape[3]), u, q.new_empty(q.shape[:3], dtype=_precision(q))


def _plan_sums(launch, call, v, chunk):
    """The sums of chunks of values that a kernel reads for the bias, not filled, and the launches that fill them."""
    return v.new_empty(launch.sums_shape(call, chunk), dtype=_precision(v)), launch.plan_sums(call, chunk)


def _sum_values(launches, v, sums):
    """(launch, tensors) pairs that fill the sums of values, none where there is no bias."""
    return [(launch, tensors) for launch, tensors in zip(launches, ((v, sums), (sums,)), strict=False) if sums is not None]


def forward(rows, tensors, left, right, scale, backend, backward_backend, ahead=None):
    """(o, u, lse), u None without alpha and beta: o is the plain attention output then.

    rows: layouts of q, k and v. tensors: they, alpha, beta, sink and token_bounds. ahead: see compile_ahead.
    """
    if backend == "cuda":
        rows, (q, k, v) = _cuda.aligned_rows(rows, *tensors[:3])
        tensors = q, k, v, *tensors[3:]
    return _program(rows, tensors, left, right, scale, backend, backward_backend, ahead)(*tensors)


def _program(rows, tensors, *options):
    given = [None if x is None else x.dtype for x in tensors[3:]]
    return _plan_forward(rows, *given, uses_tf32(tensors[0]), *options)


@planned
def _plan_forward(
    q, k, v, alpha, beta, sink, token_bounds, _tf32, left, right, scale, backend, backward_backend, ahead
):  # fmt: skip
    """The program of (o, u, lse). alpha, beta, sink, token_bounds: their dtypes, or None."""
    shapes = q.shape[:3], q.shape[:3], q.shape[1:2], (2, q.shape[2])
    given = zip(shapes, (alpha, beta, sink, token_bounds), strict=True)
    alpha, beta, sink, token_bounds = [None if dtype is None else q.new_empty(shape, dtype=dtype) for shape, dtype in given]
    shifted = beta is not None
    o, u, lse = _allocate_forward(q, v, alpha is not None or shifted)
    of_backward = left, right, scale, backward_backend
    compile_ahead(ahead, backward, o, q, k, v, alpha, beta, None, token_bounds, o, u, lse, *of_backward)
    launch = _launchers()
    call = launch.signature(q, k, v, None, token_bounds is not None, left, right)
    last = token_bounds
    if backend == "cuda":
        last = q.new_empty(1, dtype=torch.int32)  # its counter, as it takes no token_bounds
        attend, chunk = _cuda.AffineForward(q, k, v, o, right, scale), _cuda.extension.AFFINE_CHUNK
    else:
        attend, chunk = launch.plan_attend(call, o.stride(), scale), launch.chunk(call, "softmax_attend")
    sums, sum_values = _plan_sums(launch, call, v, chunk) if shifted else (None, ())
    inputs = q, k, v, alpha, beta, sink, token_bounds
    launches = *_sum_values(sum_values, v, sums), (attend, (*inputs[:6], sums, o, u, lse, last))
    return Program(inputs, (o, u, lse), launches)


def backward(do, q, k, v, alpha, beta, sink, token_bounds, o, u, lse, left, right, scale, backend="triton"):
    """(dq, dk, dv, dalpha, dbeta, dsink); None where there is no input."""
    do, u = unit_stride(do), o if u is None else u
    if backend == "cuda":
        (q, k, v), do = _cuda.aligned_starts(q, k, v), _cuda.aligned_boxes(do)
    exact = q.dtype != torch.float32 and (alpha is not None or sink is not None)
    options = beta is not None, exact, token_bounds is not None, left, right, scale, backend, uses_tf32(q)
    outputs, gradients, sum_values = _plan_backward(layouts(do, q, k, v, u), *options)
    dq, dk, dv, m, dbeta, sums, terms, counters = allocate(outputs, q.device)
    if backend == "cuda":
        given = ((q, k, v, u, do, alpha, beta, sums, lse, dq, dk, dv, m, dbeta, terms, counters),)
    else:
        of_queries = q, k, v, alpha, dbeta, sums, u, do, lse, dq, m, token_bounds
        given = of_queries, (q, k, v, alpha, beta, do, lse, m, dk, dv, token_bounds)
    launch_all(q, *_sum_values(sum_values, v, sums), *zip(gradients, given, strict=True))
    dsink = None
    if sink is not None:
        # The sink is one more column of the weights, with dP = 0; rows without keys have m = 0.
        weight = torch.exp2(sink[:, None] * math.log2(math.e) - lse)
        dsink = -(weight * (m if alpha is None else m * alpha)).sum((0, 2)).to(sink.dtype)
    return dq, dk, dv, None if alpha is None else m, dbeta, dsink


@planned
def _plan_backward(do, q, k, v, u, shifted, exact, packed, left, right, scale, backend, _tf32):
    """Layouts of dq, dk, dv, m (B, Hq, N), with beta dbeta and sums of v, and workspaces; the launches that fill them."""
    gradients = dq, dk, dv = [empty_rows(x, x.shape[3]) for x in (q, k, v)]
    m = q.new_empty(q.shape[:3], dtype=torch.float32)
    launch = _launchers()
    call = launch.signature(q, k, v, None, packed, left, right)
    terms = counters = None
    if backend == "cuda":
        terms = m.new_empty(_cuda.softmax_terms_shape(q))
        counters = q.new_empty(2, dtype=torch.int32)
        launches = (_cuda.AffineBackward(q, k, v, u, do, *gradients, exact, right, scale),)
        chunk = _cuda.extension.AFFINE_CHUNK
    else:
        queries = launch.plan_grad_queries(call, exact, u.stride(), do.stride(), dq.stride(), scale)
        launches = queries, launch.plan_grad_keys(call, do.stride(), dk.stride(), dv.stride(), scale)
        chunk = launch.chunk(call, "softmax_grad_queries")
    sums, sum_values = _plan_sums(launch, call, v, chunk) if shifted else (None, ())
    dbeta = torch.empty_like(m) if shifted else None
    return layouts(*gradients, m, dbeta, sums, terms, counters), launches, sum_values


def _or_empty(tensors, like):
    """None as the empty tensor that stands for it where a schema wants a tensor."""
    return tuple(like.new_empty(0, dtype=torch.float32) if tensor is None else tensor for tensor in tensors)


def _dispatched_forward(
    q, k, v, alpha, beta, sink, token_bounds, left, right, scale, backend="triton", backward_backend="triton"
):  # fmt: skip
    tensors = q, k, v, alpha, beta, sink, token_bounds
    return _or_empty(forward(layouts(q, k, v), tensors, left, right, scale, backend, backward_backend), q)


def _dispatched_backward(do, q, k, v, alpha, beta, sink, token_bounds, o, u, *arguments):
    u = u if u.dim() == 4 else None
    return _or_empty(backward(do, q, k, v, alpha, beta, sink, token_bounds, o, u, *arguments), q)


def _fake_forward(q, k, v, alpha, beta, *_):
    return _or_empty(_allocate_forward(q, v, alpha is not None or beta is not None), q)


def _fake_backward(do, q, k, v, alpha, beta, sink, *_):
    rows = (empty_rows(tensor, tensor.shape[3]) for tensor in (q, k, v))
    scalars = (None if tensor is None else torch.empty_like(tensor) for tensor in (alpha, beta, sink))
    return _or_empty((*rows, *scalars), q)


def _save(ctx, inputs, output):
    *tensors, left, right, scale, _, backward_backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.options = left, right, scale, backward_backend


def _given(inputs, results):
    """The gradients of all arguments: what the backward returned, None for tensors that are None and for numbers."""
    gradients = (None if tensor is None else result for tensor, result in zip(inputs, results, strict=True))
    return *gradients, None, None, None, None, None, None


def _autograd_backward(ctx, do, *_):
    saved = ctx.saved_tensors  # to be unpacked once, as checkpointing demands
    return _given(saved[:6], torch.ops.nearfar.affine_attention_backward(do, *saved, *ctx.options))


class _Plan(Plan):
    """A plain call."""

    program_of, forward_of = staticmethod(_program), staticmethod(forward)

    def backward(self, gradients, saved, dispatched):
        *inputs, u, lse = saved
        left, right, scale, _, backend = self.options
        function = backward
        if dispatched:
            function, u = torch.ops.nearfar.affine_attention_backward, lse.new_empty(0) if u is None else u
        results = function(*gradients, *inputs, u, lse, left, right, scale, backend)
        return *_given(inputs[:6], results)[:6], None


register(
    "affine_attention",
    (_FORWARD, _dispatched_forward, _fake_forward),
    (_BACKWARD, _dispatched_backward, _fake_backward),
    _autograd_backward,
    _save,
    "affine_attention and softmax_attention",
)
