"""Selective synchronization attention as a torch operator: schema, fake and autograd."""

import importlib
from typing import NamedTuple

import torch

from nearfar.checks import is_plain
from nearfar.ops.pairwise import selection_words
from nearfar.ops.torch_operator import device_of, empty_rows, register, unit_stride

_FORWARD = (
    "(Tensor omega, Tensor? omega_k, Tensor v, Tensor coupling, Tensor bandwidth, Tensor order, bool causal, int? top_k,"
    " float grad_floor) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor do, Tensor omega, Tensor? omega_k, Tensor v, Tensor coupling, Tensor bandwidth, Tensor order, Tensor o,"
    " Tensor total, Tensor bits, bool causal, int? top_k, float grad_floor)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Survey(NamedTuple):
    """What locking.survey writes about queries or keys; c (B, H, N) is None of keys."""

    squares: torch.Tensor
    c: torch.Tensor | None
    centres: torch.Tensor
    extents: torch.Tensor


def attend(omega, omega_k, v, coupling, bandwidth, order, causal, top_k, grad_floor):
    """o (B, Hq, N, Dv). coupling, bandwidth (1,) or (Hq,), order (B, Hq) or (B, Hq, N): float32. omega_k None: omega."""
    omega, v = unit_stride(omega), unit_stride(v)
    omega_k = None if omega_k is None else unit_stride(omega_k)
    arguments = omega, omega_k, v, coupling, bandwidth, order.contiguous(), causal, top_k, grad_floor
    tensors = [tensor for tensor in arguments[:6] if tensor is not None]
    if not is_plain(*tensors):
        return torch.ops.nearfar.synchronization_attention(*arguments)[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Eager.apply(*arguments)
    return forward(*arguments)[0]


def _launchers():
    """Triton is imported with the first launch, not with the package."""
    return importlib.import_module("nearfar.triton_kernels.synchronization_launch")


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


def _empty_lists(call, kernel, launch):
    return tuple(torch.empty(shape, dtype=torch.int32, device=call.device) for shape in launch.lists_shapes(call, kernel))


def _empty_outputs(omega, omega_k, v, top_k):
    """o, total and bits, not filled; bits are empty without top_k."""
    words = 0 if top_k is None else selection_words(-1, -1, v.shape[2])
    shape = (0,) if top_k is None else (*omega.shape[:3], words)
    total = omega.new_empty(omega.shape[:3], dtype=torch.float32)
    return empty_rows(omega, v.shape[3]), total, omega.new_empty(shape, dtype=torch.int32)


def forward(omega, omega_k, v, coupling, bandwidth, order, causal, top_k, grad_floor):
    """(o, total, bits): total (B, Hq, N) are the sums of S; bits, the selection of top_k, are empty without it."""
    o, total, bits = _empty_outputs(omega, omega_k, v, top_k)
    if not o.numel() or not v.shape[2]:
        return o.zero_(), total.zero_(), bits
    launch = _launchers()
    queries, keys = _empty_surveys(omega, omega_k, launch)
    lists = None
    if top_k is None:
        lists = _empty_lists(launch.signature(omega, omega_k, v, causal), "sync_attend", launch)
    with device_of(omega):
        launch.forward(
            omega, omega_k, v, coupling, bandwidth, order, causal, top_k, queries, keys, lists, o, total, bits
        )  # fmt: skip
    return o, total, bits


def backward(do, omega, omega_k, v, coupling, bandwidth, order, o, total, bits, causal, top_k, grad_floor):
    """(domega, domega_k, dv, dcoupling, dbandwidth, dorder); domega_k None without omega_k."""
    do = unit_stride(do)
    dw, dv = empty_rows(omega, omega.shape[3]), empty_rows(v, v.shape[3])
    dk = None if omega_k is None else empty_rows(omega_k, omega_k.shape[3])
    if not o.numel() or not v.shape[2]:
        dk = None if dk is None else dk.zero_()
        return dw.zero_(), dk, dv.zero_(), *(torch.zeros_like(tensor) for tensor in (coupling, bandwidth, order))
    launch = _launchers()
    call = launch.signature(omega, omega_k, v, causal)
    queries, keys = _empty_surveys(omega, omega_k, launch)
    inverse, shift, dalpha, dradius = (torch.empty_like(total) for _ in range(4))
    symmetric = omega_k is None and top_k is None and not causal and order.dim() == 2
    key_lists, of_queries, of_keys = None, dw, dk
    if not symmetric:
        key_lists = _empty_lists(call, "sync_grad_keys", launch)
        if omega_k is None:  # what tokens get as queries is kept unrounded until what they get as keys is added
            of_queries, of_keys = torch.empty(omega.shape, dtype=torch.float32, device=omega.device), dw
    query_lists = _empty_lists(call, "sync_grad_tokens" if symmetric else "sync_grad_queries", launch)
    with device_of(omega):
        launch.backward(
            omega, omega_k, v, coupling, bandwidth, order, causal, grad_floor, queries, keys, query_lists, key_lists,
            o, total, None if top_k is None else bits, do, inverse, shift, of_queries, of_keys, dv, dalpha, dradius,
        )  # fmt: skip
        return dw, dk, dv, *_parameters(dalpha, dradius, coupling, bandwidth, order)


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


def _dispatched_backward(do, *arguments):
    dw, dk, *others = backward(do, *arguments)
    return dw, _or_empty(dk, dw), *others


def _fake_forward(omega, omega_k, v, coupling, bandwidth, order, causal, top_k, grad_floor):
    return _empty_outputs(omega, omega_k, v, top_k)


def _fake_backward(do, omega, omega_k, v, coupling, bandwidth, order, *_):
    dk = None if omega_k is None else empty_rows(omega_k, omega_k.shape[3])
    scalars = (torch.empty_like(tensor) for tensor in (coupling, bandwidth, order))
    return empty_rows(omega, omega.shape[3]), _or_empty(dk, omega), empty_rows(v, v.shape[3]), *scalars


def _save(ctx, inputs, output):
    *tensors, causal, top_k, grad_floor = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.options = causal, top_k, grad_floor


def _given(omega_k, results):
    """The gradients of all arguments; None for an omega_k that is None and for what is no tensor."""
    dw, dk, *others = results
    return dw, None if omega_k is None else dk, *others, None, None, None


def _autograd_backward(ctx, do, *_):
    saved = ctx.saved_tensors  # to be unpacked once, as checkpointing demands
    return _given(saved[1], torch.ops.nearfar.synchronization_attention_backward(do, *saved, *ctx.options))


class _Eager(torch.autograd.Function):
    """The autograd of a plain eager call, without the dispatcher."""

    @staticmethod
    def forward(ctx, *arguments):
        output = forward(*arguments)
        _save(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx, do):
        if torch.is_grad_enabled():  # with create_graph the torch operator runs, because it refuses to be differentiated again
            return _autograd_backward(ctx, do)
        saved = ctx.saved_tensors
        return _given(saved[1], backward(do, *saved, *ctx.options))


register(
    "synchronization_attention",
    (_FORWARD, forward, _fake_forward),
    (_BACKWARD, _dispatched_backward, _fake_backward),
    _autograd_backward,
    _save,
)
