"""Selective synchronization attention as a torch operator: schema, fake and autograd."""

from typing import NamedTuple

import torch

from nearfar import _cuda
from nearfar.checks import PLAIN
from nearfar.ops.eager import Plan, start
from nearfar.ops.pairwise import no_bits, selection_words
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
    "(Tensor omega, Tensor? omega_k, Tensor v, Tensor coupling, Tensor bandwidth, Tensor order, bool causal, int? top_k,"
    ' float grad_floor, str backend="triton", str backward_backend="triton") -> (Tensor, Tensor, Tensor)'
)
_BACKWARD = (
    "(Tensor do, Tensor omega, Tensor? omega_k, Tensor v, Tensor coupling, Tensor bandwidth, Tensor order, Tensor o,"
    ' Tensor total, Tensor bits, bool causal, int? top_k, float grad_floor, str backend="triton")'
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Survey(NamedTuple):
    """What locking.survey writes about queries or keys; c (B, H, N) is None of keys."""

    squares: torch.Tensor
    c: torch.Tensor | None
    centres: torch.Tensor
    extents: torch.Tensor


def attend(repeats, rows, omega, omega_k, v, coupling, bandwidth, order, *options):
    """o (B, Hq, N, Dv). coupling, bandwidth (1,) or (Hq,), order (B, Hq) or (B, Hq, N): float32. omega_k None: omega.

    repeats: of calls with these options, or None. rows: layouts of omega, v and, where it is given, omega_k; None where the
    call is not plain. options: causal, top_k, grad_floor, and the backends of the forward and of the backward, "triton" or
    "cuda"; what "cuda" does not serve of the backward, "triton" does.
    """
    rows, (omega, v, *given) = unit_strides(rows, omega, v, *(() if omega_k is None else (omega_k,)))
    parameters = coupling, bandwidth, order.contiguous()
    tensors = omega, None if omega_k is None else given[0], v, *parameters
    if rows is None or not all([type(tensor) in PLAIN for tensor in parameters]):
        return torch.ops.nearfar.synchronization_attention(*tensors, *options)[0]
    return start(_Plan(rows, options, tensors), repeats, tensors)


_launchers = kernels("synchronization_launch")


def _empty_surveys(omega, omega_k, launch):
    """Surveys of queries and keys, not filled; one for both without omega_k."""

    def survey(w, queries):
        batch, heads, length, width = w.shape
        cells = -(-length // launch.CELL)

        def floats(*shape):
            return w.new_empty((batch, heads, *shape), dtype=torch.float32)

        return Survey(floats(length), floats(length) if queries else None, floats(cells, width), floats(cells, launch.EXTENT))

    queries = survey(omega, True)
    return queries, queries if omega_k is None else survey(omega_k, False)


def _empty_lists(omega, call, kernel, launch, cuda=None):
    """Lists and counts, not filled; for a launch in CUDA C++ a counter, too."""
    shapes = launch.lists_shapes(call, kernel, launch.list_rows(call, kernel, cuda))
    shapes = shapes if cuda is None else (*shapes, (1,))
    return tuple(omega.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _empty_outputs(omega, v, top_k):
    """o, total and bits, not filled; bits None without top_k."""
    total = omega.new_empty(omega.shape[:3], dtype=torch.float32)
    bits = None
    if top_k is not None:
        bits = omega.new_empty((*omega.shape[:3], selection_words(-1, -1, v.shape[2])), dtype=torch.int32)
    return empty_rows(omega, v.shape[3]), total, bits


def forward(rows, tensors, causal, top_k, grad_floor, backend, backward_backend, ahead=None):
    """(o, total, bits): total (B, Hq, N) are the sums of S; bits, the selection of top_k, are None without it.

    rows: layouts of omega, v and, where it is given, omega_k. tensors: omega, omega_k, v, coupling, bandwidth, order.
    ahead: see compile_ahead.
    """
    if backend == "cuda":
        omega, omega_k, v, *parameters = tensors
        rows, (omega, v) = _cuda.aligned_rows(rows, omega, v)
        tensors = omega, omega_k, v, *parameters
    return _program(rows, tensors, causal, top_k, grad_floor, backend, backward_backend, ahead)(*tensors)


def _program(rows, tensors, *options):
    omega, _, _, coupling, bandwidth, order = tensors
    return _plan_forward(rows, coupling.numel(), bandwidth.numel(), order.dim(), order.dtype, uses_tf32(omega), *options)


@planned
def _plan_forward(omega, v, *arguments):
    """The program of (o, total, bits)."""
    *omega_k, couplings, bandwidths, order_dims, dtype, _tf32, causal, top_k, grad_floor, backend, backward_backend, ahead = (
        arguments
    )
    omega_k = omega_k[0] if omega_k else None
    coupling, bandwidth = (omega.new_empty(count, dtype=dtype) for count in (couplings, bandwidths))
    order = omega.new_empty(omega.shape[:order_dims], dtype=dtype)
    launch = _launchers()
    outputs, surveys = _empty_outputs(omega, v, top_k), _empty_surveys(omega, omega_k, launch)
    call = launch.signature(omega, omega_k, v, causal)
    cuda = _cuda.SynchronizationForward(omega, v, bandwidth, outputs[0], causal) if backend == "cuda" else None
    lists = _empty_lists(omega, call, "sync_attend", launch, cuda) if top_k is None else None
    tensors = omega, omega_k, v, coupling, bandwidth, order
    launches = launch.forward_launches(*tensors, causal, top_k, outputs[0], outputs[2], cuda)
    compile_ahead(ahead, backward, outputs[0], *tensors, *outputs, causal, top_k, grad_floor, backward_backend)
    given = launch.forward(*tensors, *surveys, lists, *outputs)
    nothing = not outputs[0].numel() or not v.shape[2]
    return Program(tensors, outputs, () if nothing else [*zip(launches, given, strict=True)])


def _workspaces(omega_k, surveys):
    """The tensors of the surveys of queries and, with omega_k, of keys."""
    queries, keys = surveys
    return queries if omega_k is None else (*queries, *keys)


def _surveys(omega_k, workspaces):
    """The surveys of queries and keys, and what comes after them."""
    queries = Survey(*workspaces[:4])
    return (queries, queries, workspaces[4:]) if omega_k is None else (queries, Survey(*workspaces[4:8]), workspaces[8:])


def backward(
    do, omega, omega_k, v, coupling, bandwidth, order, o, total, bits, causal, top_k, grad_floor, backend="triton"
):  # fmt: skip
    """(domega, domega_k, dv, dcoupling, dbandwidth, dorder); domega_k None without omega_k."""
    do, bits = unit_stride(do), None if top_k is None else bits
    if backend == "cuda":
        (omega, v), do = _cuda.aligned_starts(omega, v), _cuda.aligned_boxes(do)
    tensors = omega, omega_k, v, coupling, bandwidth, order
    outputs, launches = _plan_backward(layouts(do, o, bits, *tensors), causal, grad_floor, backend, uses_tf32(omega))
    dw, dk, dv, inverse, shift, dalpha, dradius, part, *workspaces = allocate(outputs, omega.device)
    if not o.numel() or not v.shape[2]:
        dk = None if dk is None else dk.zero_()
        return dw.zero_(), dk, dv.zero_(), *(torch.zeros_like(tensor) for tensor in (coupling, bandwidth, order))
    queries, keys, lists = _surveys(omega_k, workspaces)
    query_lists, key_lists = (lists, None) if len(lists) < 4 else (lists[:2], lists[2:])
    # What tokens get as queries is kept unrounded, in part, until what they get as keys is added.
    of_queries, of_keys = (dw, dk) if part is None else (part, dw)
    given = _launchers().backward(
        *tensors, queries, keys, query_lists, key_lists, o, total, bits,
        do, inverse, shift, of_queries, of_keys, dv, dalpha, dradius,
    )  # fmt: skip
    launch_all(omega, *zip(launches, given, strict=True))
    return dw, dk, dv, *_parameters(dalpha, dradius, coupling, bandwidth, order)


def is_symmetric(causal, order):
    """Whether S is, where the keys are the queries and nothing is selected."""
    return not causal and order.dim() == 2


@planned
def _plan_backward(do, o, bits, omega, omega_k, v, coupling, bandwidth, order, causal, grad_floor, backend, _tf32):
    """Layouts of the gradients and the workspaces, and the launches."""
    launch = _launchers()
    dw, dv = empty_rows(omega, omega.shape[3]), empty_rows(v, v.shape[3])
    dk = None if omega_k is None else empty_rows(omega_k, omega_k.shape[3])
    of_rows = [omega.new_empty(omega.shape[:3], dtype=torch.float32) for _ in range(4)]
    symmetric = omega_k is None and bits is None and is_symmetric(causal, order)
    cuda = None
    if symmetric and backend == "cuda":
        cuda = _cuda.SynchronizationBackward(omega, v, bandwidth, do, dw, dv, grad_floor)
    part = None if symmetric or omega_k is not None else omega.new_empty(omega.shape, dtype=torch.float32)
    kernels = ("sync_grad_tokens",) if symmetric else ("sync_grad_queries", "sync_grad_keys")
    call = launch.signature(omega, omega_k, v, causal)
    lists = [tensor for kernel in kernels for tensor in _empty_lists(omega, call, kernel, launch, cuda)]
    of_queries, of_keys = (dw, dk) if part is None else (part, dw)
    given = omega, omega_k, v, coupling, bandwidth, order, causal, grad_floor, symmetric
    launches = launch.backward_launches(*given, o, bits, do, of_queries, of_keys, dv, cuda)
    workspaces = _workspaces(omega_k, _empty_surveys(omega, omega_k, launch))
    return layouts(dw, dk, dv, *of_rows, part, *workspaces, *lists), launches


def _parameters(dalpha, dradius, coupling, bandwidth, order):
    """Gradients of coupling, bandwidth and order from those of alpha and of K r of each row."""
    dbandwidth = dalpha.sum((0, 2)) if bandwidth.numel() > 1 else dalpha.sum().reshape(1)
    per_head = (-1, 1) if order.dim() == 3 else (-1,)
    dradius = dradius if order.dim() == 3 else dradius.sum(2)
    heads = (dradius * order).flatten(2).sum(-1).sum(0) if order.dim() == 3 else (dradius * order).sum(0)
    dcoupling = heads if coupling.numel() > 1 else heads.sum().reshape(1)
    return dcoupling, dbandwidth, dradius * coupling.reshape(per_head)


def _or_empty(tensor, like):
    """None as the empty tensor that stands for it where a schema wants a tensor."""
    return like.new_empty(0) if tensor is None else tensor


def _dispatched_forward(
    omega, omega_k, v, coupling, bandwidth, order, causal, top_k, grad_floor, backend="triton", backward_backend="triton"
):  # fmt: skip
    rows = layouts(omega, v) if omega_k is None else layouts(omega, v, omega_k)
    tensors = omega, omega_k, v, coupling, bandwidth, order
    o, total, bits = forward(rows, tensors, causal, top_k, grad_floor, backend, backward_backend)
    return o, total, no_bits(omega) if bits is None else bits


def _dispatched_backward(do, *arguments):
    dw, dk, *others = backward(do, *arguments)
    return dw, _or_empty(dk, dw), *others


def _fake_forward(omega, omega_k, v, coupling, bandwidth, order, causal, top_k, *_):
    o, total, bits = _empty_outputs(omega, v, top_k)
    return o, total, no_bits(omega) if bits is None else bits


def _fake_backward(do, omega, omega_k, v, coupling, bandwidth, order, *_):
    dk = None if omega_k is None else empty_rows(omega_k, omega_k.shape[3])
    scalars = (torch.empty_like(tensor) for tensor in (coupling, bandwidth, order))
    return empty_rows(omega, omega.shape[3]), _or_empty(dk, omega), empty_rows(v, v.shape[3]), *scalars


def _save(ctx, inputs, output):
    *tensors, causal, top_k, grad_floor, _, backward_backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.options = causal, top_k, grad_floor, backward_backend


def _given(omega_k, results):
    """The gradients of all arguments; None for an omega_k that is None and for what is no tensor."""
    dw, dk, *others = results
    return dw, None if omega_k is None else dk, *others, None, None, None, None, None


def _autograd_backward(ctx, do, *_):
    saved = ctx.saved_tensors  # to be unpacked once, as checkpointing demands
    return _given(saved[1], torch.ops.nearfar.synchronization_attention_backward(do, *saved, *ctx.options))


class _Plan(Plan):
    """A plain call."""

    program_of, forward_of = staticmethod(_program), staticmethod(forward)

    def backward(self, gradients, saved, dispatched):
        *saved, bits = saved
        causal, top_k, grad_floor, _, backend = self.options
        function = backward
        if dispatched:
            function = torch.ops.nearfar.synchronization_attention_backward
            bits = no_bits(saved[0]) if bits is None else bits
        return _given(saved[1], function(*gradients, *saved, bits, causal, top_k, grad_floor, backend))[:6]


register(
    "synchronization_attention",
    (_FORWARD, _dispatched_forward, _fake_forward),
    (_BACKWARD, _dispatched_backward, _fake_backward),
    _autograd_backward,
    _save,
)
