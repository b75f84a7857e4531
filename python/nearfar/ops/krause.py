"""Krause attention (arXiv 2602.11534, "Krause Synchronization Transformers"): localized, distance-based, sparse."""

import functools
from typing import NamedTuple

import torch

from nearfar import _cuda
from nearfar.kernels.krause import MAX_CANDIDATES, krause, selection_words
from nearfar.localities import UNLIMITED, GridNeighborhood, Locality, ShiftedWindow, SlidingWindow, keys_in_window, within_reach
from nearfar.ops import grid
from nearfar.reference.krause import krause_attention as reference_krause_attention
from nearfar.runtime import checks, choices, dispatch, dropout, plans
from nearfar.runtime.dispatch import Backend, Ties
from nearfar.runtime.observed import observed
from nearfar.runtime.opaque import opaque
from nearfar.runtime.tensors import Layout

_reference = opaque(
    "krause_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor sigma, int left, int right, int? top_k, bool keep_ties,"
    " Tensor? cu_seqlens, Tensor? seed, float dropout_p) -> Tensor",
    reference_krause_attention,
    lambda q, k, v, *_: q.new_empty((*q.shape[:3], v.shape[3])),
)


class Call(NamedTuple):
    """A checked call: the tensors every backend computes with. plain: q, k and v are those of a plain eager call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sigma: torch.Tensor
    left: int
    right: int
    keep_ties: bool
    seed: torch.Tensor | None
    backends: dispatch.Backends
    plain: bool


@observed
def krause_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: float | torch.Tensor,
    locality: Locality | None = None,
    *,
    top_k: int | None = None,
    ties: Ties = "index",
    cu_seqlens: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Attention by distance: softmax of -|q_i - k_j|^2 / (2 sigma_h^2) over the nearest keys of each query's locality.

    Source: arXiv 2602.11534. The selection of keys is a constant in the backward, as in the authors' code. Query heads share
    key heads when Hq is a multiple of Hkv (grouped-query attention). With more keys than queries, the queries are the last N
    positions. A query that sees no key returns zeros. Under autocast q, k and v are cast to the autocast dtype, as in
    scaled_dot_product_attention. Keys that a query cannot see change no bit of its row, as long as they and their products are
    finite in float32.

    Args:
        q: (B, Hq, N, D), float32, float16 or bfloat16 (float64 on the reference); any strides.
        k: (B, Hkv, M, D), dtype and device of q.
        v: (B, Hkv, M, Dv), dtype and device of q.
        sigma: bandwidth in units of |q - k|, positive: a float, a 0-d or a (Hq,) tensor. A CUDA tensor is not checked, as that
            would stall the stream: a sigma that is not positive makes the output of its head NaN.
        locality: which keys a query sees: None for all, a SlidingWindow, a GridNeighborhood, or a ShiftedWindow.
        top_k: how many keys of its locality a query keeps, None for all. With it, kernels take localities of up to 1,024 keys.
        ties: what the selection does with equal scores at its cut. "index" keeps exactly top_k keys, those of smaller index, as
            the authors' image models do; "keep" all keys that do not score below the top_k-th, as their language model does,
            which also rounds scores to bfloat16 before that, and so finds far more ties than there are.
        cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed along N in a batch of 1, starting with 0.
            Grids cannot be packed.
        bias: (Hq, locality.bias_size), the relative position table of a ShiftedWindow: added to the scores, before the
            selection, by the offset of the query from the key, row-major from 1 - window along each axis.
        dropout_p: the share of the weights that are set to 0, in [0, 1), the others being divided by 1 - dropout_p, as in
            scaled_dot_product_attention. CUDA C++ has no dropout, so "auto" takes Triton for it.
        seed: an int, or an int64 tensor of one number on the device of q, which decides what is dropped: the same
            weights in every backend and in the backward. None draws it from torch's generator of that device.
        backend: "auto", "cuda", "triton" or "reference"; `nearfar.explain` reports which one serves a call.

    Returns:
        (B, Hq, N, Dv) in the dtype of q, differentiable in q, k, v, a tensor sigma and bias (twice on the reference).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or the backend cannot serve the call.
    """
    seed = dropout.seed_of(dropout_p, seed, q) if dropout_p or seed is not None else None
    if isinstance(locality, (GridNeighborhood, ShiftedWindow)):
        return grid.krause_attention(q, k, v, sigma, locality, top_k, ties, cu_seqlens, bias, dropout_p, seed, backend)
    options = locality, top_k, ties, dropout_p, cu_seqlens is None, backend
    repeats = plans.repeats(krause, *options) if bias is None else None
    if repeats:
        sigma = checks.parameter(sigma, q)
        others = [x for x in (cu_seqlens, seed) if x is not None]
        if plan := repeats.find(q, k, v, sigma, *others):
            return plan(q, k, v, sigma, cu_seqlens, seed)
    call = _prepare(q, k, v, sigma, locality, top_k, ties, cu_seqlens, bias, dropout_p, seed)
    q, k, v, sigma, left, right, keep_ties, seed, backends, plain = call
    dropout_p = float(dropout_p)
    forward, backward = backends.served(backend, q)
    if forward == "reference":
        return _reference(q, k, v, sigma, left, right, top_k, keep_ties, cu_seqlens, seed, dropout_p)
    tensors = q, k, v, sigma, cu_seqlens, seed
    return krause(repeats, plain, tensors, left, right, top_k, keep_ties, dropout_p, forward, backward)


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: float | torch.Tensor,
    locality: Locality | None = None,
    *,
    top_k: int | None = None,
    ties: Ties = "index",
    cu_seqlens: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> Call | grid.Call:
    """Check the arguments of krause_attention and return its Call."""
    seed = dropout.seed_of(dropout_p, 0 if seed is None else seed, q)  # nothing is drawn
    if isinstance(locality, (GridNeighborhood, ShiftedWindow)):
        return grid.prepare(q, k, v, sigma, locality, top_k, ties, cu_seqlens, bias, dropout_p, seed)
    return _prepare(q, k, v, sigma, locality, top_k, ties, cu_seqlens, bias, dropout_p, seed)


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: float | torch.Tensor,
    locality: SlidingWindow | None,
    top_k: int | None,
    ties: Ties,
    cu_seqlens: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> Call:
    q, k, v = checks.autocast(q, k, v)
    checks.require(bias is None, "bias is a table of a ShiftedWindow's offsets; this call has no such locality")
    checks.check_top_k(top_k)
    checks.check_ties(ties)
    dropout.check_dropout(dropout_p)
    keep_ties = ties == "keep" and top_k is not None
    if not (locality is None or isinstance(locality, SlidingWindow)):
        kinds = "a SlidingWindow, a GridNeighborhood or a ShiftedWindow"
        raise TypeError(f"locality must be None, {kinds}, got {type(locality).__name__}")
    rows = checks.plain_layouts(q, k, v)
    left, right, backends = _checked(rows, "qkv", (q, k, v), locality, top_k, keep_ties, seed is not None)
    sigma = checks.positive_per_head("sigma", sigma, q, q.shape[1])
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q, k)
    return Call(q, k, v, sigma, left, right, keep_ties, seed, backends, rows is not None)


@checks.once
def _checked(
    metas: list[Layout], locality: SlidingWindow | None, top_k: int | None, keep_ties: bool = False, drops: bool = False
) -> tuple[int, int, dispatch.Backends]:
    """left, right, and the backends of these layouts."""
    q, k, v = metas
    checks.check_qkv(q, k, v)
    left, right = (UNLIMITED, UNLIMITED) if locality is None else within_reach(locality.left, locality.right)
    reason = checks.kernel_width_reason("q", q.shape[3]) or checks.kernel_width_reason("v", v.shape[3])
    words = selection_words(left, right, MAX_CANDIDATES)
    orders = choices.orders(
        "krause_attention", q.device, head_dim=int(q.shape[3]), selection_words=words, selects=top_k is not None
    )
    ties_reason = 'the CUDA kernels select by ties="index" only' if keep_ties else None
    dropout_reason = dropout.CUDA_REASON if drops else None
    cuda_reason = reason or ties_reason or dropout_reason or _cuda.krause_reason(q, k, v, left, right)
    too_many = functools.partial(_candidates_reason, left, right, k.shape[2], top_k)
    return left, right, dispatch.Backends(cuda_reason, reason, orders, too_many)


def _candidates_reason(left: int, right: int, num_keys: int, top_k: int | None) -> str | None:
    candidates = keys_in_window(left, right, num_keys)
    if top_k is not None and candidates > MAX_CANDIDATES:
        return f"top_k over {candidates} candidate keys a query; kernels take at most {MAX_CANDIDATES} (a narrower locality)"
    return None
