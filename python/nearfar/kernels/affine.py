"""Affine-scaled and softmax attention on their kernels: `torch.ops.nearfar.affine_attention`."""

from typing import Any

import torch

from nearfar import _cuda
from nearfar.runtime.backend import Backend
from nearfar.runtime.operator import Operator
from nearfar.runtime.program import Program
from nearfar.runtime.tensors import empty, empty_rows, triton_module

_packing, _launchers = triton_module("packing"), triton_module("affine_launch")


class Affine(Operator):
    """Serves `nearfar.affine_attention` and, without alpha and beta, `nearfar.softmax_attention`.

    The backward reads lse (B, Hq, N) and u, the softmax attention output. Without alpha and beta, u is o and not saved again.
    """

    name = "affine_attention"
    serves = "affine_attention and softmax_attention"
    tensors = (
        "Tensor q, Tensor k, Tensor v, Tensor? alpha, Tensor? beta, Tensor? sink, Tensor? cu_seqlens, Tensor? cu_seqlens_k, "
        "Tensor? seed"
    )
    options = "int left, int right, float scale, float dropout_p"
    rows = "q", "k", "v"
    constants = 3
    outputs = "o", "u", "lse"

    def __init__(self) -> None:
        super().__init__()
        self.backends = {"cuda": AffineCuda(), "triton": AffineTriton()}

    def empty(self, tensors: Any, *_: Any) -> Any:
        q, _, v, alpha, beta, *_ = tensors
        u = None if alpha is None and beta is None else empty(q, (*q.shape[:3], v.shape[3]))
        return empty_rows(q, v.shape[3]), u, empty(q, q.shape[:3], _precision(q))


class AffineTriton(Backend):
    def forward(self, tensors: Any, outputs: Any, left: int, right: int, scale: float, dropout_p: float) -> Program:
        q, k, v, alpha, beta, sink, cu_seqlens, cu_seqlens_k, seed = tensors
        launch, (o, *_) = _launchers(), outputs
        bounds, launches = _bounds(q, k, cu_seqlens, cu_seqlens_k)
        call = launch.signature(q, k, v, None, bounds is not None, left, right)
        sums, sum_values = _sums(call, v, beta, launch.chunk(call, "softmax_attend"))
        attend = launch.plan_attend(call, o.stride(), scale, dropout_p)
        attend = attend, (q, k, v, alpha, beta, sink, sums, *outputs, bounds, seed)
        return Program(tensors, outputs, [*launches, *sum_values, attend])

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any, left: int, right: int, scale: float, dropout_p: float
    ) -> Program:
        q, k, v, alpha, beta, sink, cu_seqlens, cu_seqlens_k, seed = tensors
        (do,), (o, u, lse), (dq, dk, dv, dalpha, dbeta, dsink, *_) = gradients, saved, results
        u, launch = o if u is None else u, _launchers()
        bounds, launches = _bounds(q, k, cu_seqlens, cu_seqlens_k)
        key_bounds, more = (bounds, []) if cu_seqlens_k is None else _bounds(k, q, cu_seqlens_k, cu_seqlens)
        call = launch.signature(q, k, v, None, bounds is not None, left, right)
        sums, sum_values = _sums(call, v, beta, launch.chunk(call, "softmax_grad_queries"))
        m = _row_terms(lse, dalpha)
        exact = q.dtype != torch.float32 and _is_exact(alpha, sink)
        queries = launch.plan_grad_queries(call, exact, u.stride(), do.stride(), dq.stride(), scale, dropout_p)
        keys = launch.plan_grad_keys(call, do.stride(), dk.stride(), dv.stride(), scale, dropout_p)
        launches += [
            *more,
            *sum_values,
            (queries, (q, k, v, alpha, dbeta, sums, u, do, lse, dq, m, bounds, seed)),
            (keys, (q, k, v, alpha, beta, do, lse, m, dk, dv, key_bounds, seed)),
            *_grad_sink(q, sink, lse, m, alpha, dsink),
        ]
        return Program((*gradients, *tensors, *saved), results, launches)


class AffineCuda(_cuda.CudaBackend):
    def forward(self, tensors: Any, outputs: Any, left: int, right: int, scale: float, *_: Any) -> Program:
        q, k, v, alpha, beta, sink, *_ = tensors
        call = _launchers().signature(q, k, v, None, False, left, right)
        sums, sum_values = _sums(call, v, beta, _cuda.extension.AFFINE_CHUNK)
        counter, (o, u, lse) = empty(q, (1,), torch.int32), outputs
        attend = _cuda.call(
            "affine_forward", _cuda.dtype_of(q),
            dict(q=q, k=k, v=v, alpha=alpha, beta=beta, sink=sink, sums=sums, o=o, u=u, lse=lse, counter=counter), "q k v o",
            **_cuda.pair_sizes(q, k), right=right, scale=scale,
        )
        return Program(tensors, outputs, [*sum_values, attend])

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any, left: int, right: int, scale: float, *_: Any
    ) -> Program:
        q, k, v, alpha, beta, sink, *_ = tensors
        (do,), (o, u, lse), (dq, dk, dv, dalpha, dbeta, dsink, *_) = gradients, saved, results
        u = o if u is None else u
        call = _launchers().signature(q, k, v, None, False, left, right)
        sums, sum_values = _sums(call, v, beta, _cuda.extension.AFFINE_CHUNK)
        m, counters = _row_terms(lse, dalpha), empty(q, (2,), torch.int32)
        tile = _cuda.extension.AFFINE_TERMS
        terms = empty(lse, (4, *q.shape[:2], -(-q.shape[2] // tile) * tile))
        grad = _cuda.call(
            "affine_backward", _cuda.dtype_of(q),
            dict(
                q=q, k=k, v=v, u=u, grad_o=do, alpha=alpha, beta=beta, sums=sums, lse=lse,
                dq=dq, dk=dk, dv=dv, m=m, dbeta=dbeta, terms=terms, counters=counters,
            ),
            "q k v u grad_o dq dk dv",
            **_cuda.pair_sizes(q, k), exact=_is_exact(alpha, sink), right=right, scale=scale,
        )
        launches = [*sum_values, grad, *_grad_sink(q, sink, lse, m, alpha, dsink)]
        return Program((*gradients, *tensors, *saved), results, launches)

    def aligned_gradient(self, gradient: torch.Tensor, *_: Any) -> torch.Tensor:
        return _cuda.aligned_boxes(gradient)


def _bounds(own: torch.Tensor, other: torch.Tensor, ends: torch.Tensor | None, other_ends: torch.Tensor | None) -> Any:
    """What each token of a packed `own` reaches in `other`, not filled, and the launches that fill it."""
    return _packing().bounds_launches(ends, own.shape[2], other_ends, other.shape[2])


def _precision(q: torch.Tensor) -> torch.dtype:
    """The dtype of lse and of sums over tiles."""
    return torch.float64 if q.dtype == torch.float32 else torch.float32


def _is_exact(alpha: torch.Tensor | None, sink: torch.Tensor | None) -> bool:
    """Whether m is a gradient (of alpha) or summed to one (of the sink), so that it must not contain the rounding of u."""
    return alpha is not None or sink is not None


def _row_terms(lse: torch.Tensor, dalpha: torch.Tensor | None) -> torch.Tensor:
    """The tensor for m = dO . u of each row (B, Hq, N): dalpha if there is one, otherwise a workspace."""
    return torch.empty(lse.shape, dtype=torch.float32, device=lse.device) if dalpha is None else dalpha


def _sums(call: Any, v: torch.Tensor, beta: torch.Tensor | None, chunk: int) -> Any:
    """(workspace of the sums of values that kernels read for beta, launches that fill it); (None, []) without beta."""
    if beta is None:
        return None, []
    launch = _launchers()
    sums = empty(v, launch.sums_shape(call, chunk), _precision(v))
    return sums, [*zip(launch.plan_sums(call, chunk), ((v, sums), (sums,)), strict=False)]


def _grad_sink(q: Any, sink: Any, lse: Any, m: Any, alpha: Any, dsink: Any) -> list[Any]:
    return [] if sink is None else [(_launchers().plan_grad_sink(q.shape), (sink, lse, m, alpha, dsink))]


affine = Affine()
