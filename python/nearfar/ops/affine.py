"""Affine-scaled attention (arXiv 2602.23057), and softmax attention, its case of alpha = 1 and beta = 0."""

from typing import NamedTuple

import torch

from nearfar import _cuda
from nearfar.kernels.affine import affine
from nearfar.kernels.krause_grid import decoded
from nearfar.localities import (
    UNLIMITED,
    GridNeighborhood,
    Locality,
    ShiftedWindow,
    SlidingWindow,
    check_length,
    check_not_packed,
    within_reach,
)
from nearfar.ops.grid import CUDA_REASON
from nearfar.reference.affine import affine_attention as reference_affine_attention
from nearfar.reference.grid import affine_attention as reference_on_grid
from nearfar.runtime import checks, choices, dispatch, dropout, plans
from nearfar.runtime.dispatch import Backend
from nearfar.runtime.observed import observed
from nearfar.runtime.opaque import opaque
from nearfar.runtime.tensors import Layout

_reference = opaque(
    "affine_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? alpha, Tensor? beta, Tensor? sink, int left, int right, float scale,"
    " Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? seed, float dropout_p) -> Tensor",
    reference_affine_attention,
    lambda q, k, v, *_: q.new_empty((*q.shape[:3], v.shape[3])),
)


def _decoded_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor | None,
    beta: torch.Tensor | None,
    sink: torch.Tensor | None,
    seed: torch.Tensor | None,
    locality: str,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    return reference_on_grid(q, k, v, alpha, beta, sink, decoded(locality), scale, seed, dropout_p)


_reference_on_grid = opaque(
    "affine_attention_grid",
    "(Tensor q, Tensor k, Tensor v, Tensor? alpha, Tensor? beta, Tensor? sink, Tensor? seed, str locality, float scale,"
    " float dropout_p) -> Tensor",
    _decoded_reference,
    lambda q, k, v, *_: q.new_empty((*q.shape[:3], v.shape[3])),
)


class Call(NamedTuple):
    """A checked call: what every backend computes with. plain: q, k and v are those of a plain eager call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    alpha: torch.Tensor | None
    beta: torch.Tensor | None
    sink: torch.Tensor | None
    left: int
    right: int
    scale: float
    cu_seqlens: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seed: torch.Tensor | None
    backends: dispatch.Backends
    plain: bool


@observed
def affine_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor | None,
    beta: torch.Tensor | None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    locality: Locality | None = None,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Softmax attention scaled and shifted per query: o_i = alpha_i softmax(scale q_i . k_j)_i V + beta_i sum_j v_j.

    Source: arXiv 2602.23057. Both terms run over the keys j that query i sees; the second needs no N x N product. Query heads
    share key heads when Hq is a multiple of Hkv (grouped-query attention). With more keys than queries, the queries are the
    last N positions; with fewer, the first N - M queries come before every key. A query that sees no key returns zeros, even
    with a sink. Under autocast q, k and v are cast to the autocast dtype, as in scaled_dot_product_attention. Keys that a query
    cannot see change no bit of its row, as long as they are finite and no score exceeds 2^29 in absolute value: float32 rounds
    such scores to multiples of 32, and the kernels' weights may overflow to NaN.

    Args:
        q: (B, Hq, N, D), float32, float16 or bfloat16 (float64 on the reference); any strides.
        k: (B, Hkv, M, D), dtype and device of q.
        v: (B, Hkv, M, Dv), dtype and device of q.
        alpha: (B, Hq, N), the factor of the softmax term, any floating dtype, computed in float32; None for 1.
        beta: (B, Hq, N), the factor of the sum of values, likewise; None for 0.
        causal: a query sees the keys up to its own position.
        window_size: (left, right), how many keys before and after its own a query sees, as in flash-attn: both inclusive, -1
            for all of them. causal sets right to 0.
        locality: which keys a query sees, in place of window_size and causal: None for what these say, a SlidingWindow, a
            GridNeighborhood or a ShiftedWindow. No kernel serves grids yet: the reference does.
        scale: factor of the products q . k, a finite number; None for D^-0.5.
        sink: (Hq,), logits of an attention sink, which adds exp(sink) to the softmax denominators of its head; None for no
            sink.
        cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed along N in a batch of 1, starting with 0.
        cu_seqlens_k: the boundaries of the keys of the same S sequences, packed along M; None if they are those of the
            queries. In each sequence the queries are the last positions, as they are without packing.
        dropout_p: the share of the softmax weights that are set to 0, in [0, 1), the others being divided by 1 - dropout_p, as
            in scaled_dot_product_attention. What beta adds to them is not dropped, so that it stays a sum of values; of the
            authors' code we know no dropout to follow. CUDA C++ has none, so "auto" takes Triton for it.
        seed: an int, or an int64 tensor of one number on the device of q, which decides what is dropped: the same
            weights in every backend and in the backward. None draws it from torch's generator of that device.
        backend: "auto", "cuda", "triton" or "reference"; `nearfar.explain` reports which one serves a call.

    Returns:
        (B, Hq, N, Dv) in the dtype of q, differentiable in q, k, v, alpha, beta and sink (twice on the reference).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or the backend cannot serve the call.
    """
    seed = dropout.seed_of(dropout_p, seed, q) if dropout_p or seed is not None else None
    packing = cu_seqlens, cu_seqlens_k
    return _attend(q, k, v, alpha, beta, causal, window_size, locality, scale, sink, *packing, seed, dropout_p, backend)


@observed
def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    locality: Locality | None = None,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Softmax attention, o_i = softmax(scale q_i . k_j)_i V, with windows, packed sequences and an optional attention sink.

    Source: arXiv 1706.03762. It is `nearfar.affine_attention` with alpha = 1 and beta = 0, and treats grouped heads, unequal
    lengths, queries without keys and autocast in the same way.

    Args:
        q: (B, Hq, N, D), float32, float16 or bfloat16 (float64 on the reference); any strides.
        k: (B, Hkv, M, D), dtype and device of q.
        v: (B, Hkv, M, Dv), dtype and device of q.
        causal, window_size, locality, scale, sink, cu_seqlens, cu_seqlens_k, dropout_p, seed, backend: as for
            `nearfar.affine_attention`.

    Returns:
        (B, Hq, N, Dv) in the dtype of q, differentiable in q, k, v and sink (twice on the reference).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or the backend cannot serve the call.
    """
    seed = dropout.seed_of(dropout_p, seed, q) if dropout_p or seed is not None else None
    packing = cu_seqlens, cu_seqlens_k
    return _attend(q, k, v, None, None, causal, window_size, locality, scale, sink, *packing, seed, dropout_p, backend)


def prepare_affine_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor | None,
    beta: torch.Tensor | None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    locality: Locality | None = None,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> Call:
    """Check the arguments of affine_attention and return its Call."""
    seed = dropout.seed_of(dropout_p, 0 if seed is None else seed, q)  # nothing is drawn
    return _prepare(q, k, v, alpha, beta, causal, window_size, locality, scale, sink, cu_seqlens, cu_seqlens_k, seed, dropout_p)


def prepare_softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    locality: Locality | None = None,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> Call:
    """Check the arguments of softmax_attention and return its Call."""
    seed = dropout.seed_of(dropout_p, 0 if seed is None else seed, q)
    return _prepare(q, k, v, None, None, causal, window_size, locality, scale, sink, cu_seqlens, cu_seqlens_k, seed, dropout_p)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor | None,
    beta: torch.Tensor | None,
    causal: bool,
    window_size: tuple[int, int],
    locality: Locality | None,
    scale: float | None,
    sink: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    backend: Backend,
) -> torch.Tensor:
    tensors = q, k, v, alpha, beta, sink, cu_seqlens, cu_seqlens_k, seed
    absent = tuple([x is None for x in tensors])
    repeats = plans.repeats(affine, causal, window_size, locality, scale, dropout_p, absent, backend)
    if repeats and (plan := repeats.find(*[x for x in tensors if x is not None])):
        return plan(*tensors)
    packing = cu_seqlens, cu_seqlens_k
    call = _prepare(q, k, v, alpha, beta, causal, window_size, locality, scale, sink, *packing, seed, dropout_p)
    *checked, left, right, scale, cu_seqlens, cu_seqlens_k, seed, backends, plain = call
    dropout_p = float(dropout_p)
    forward, backward = backends.served(backend, call.q)
    if isinstance(locality, (GridNeighborhood, ShiftedWindow)):
        return _reference_on_grid(*checked, seed, locality.text, scale, dropout_p)
    if forward == "reference":
        return _reference(*checked, left, right, scale, cu_seqlens, cu_seqlens_k, seed, dropout_p)
    given = *checked, *packing, seed
    return affine(repeats, plain, given, left, right, scale, dropout_p, forward, backward)


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor | None,
    beta: torch.Tensor | None,
    causal: bool,
    window_size: tuple[int, int],
    locality: Locality | None,
    scale: float | None,
    sink: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
) -> Call:
    q, k, v = checks.autocast(q, k, v)
    if locality is not None:
        window_size, causal = _window_of(locality, window_size, causal), False
    left, right = _window(window_size, causal)
    layouts = checks.plain_layouts(q, k, v)
    scale = checks.finite_scale(scale)
    dropout.check_dropout(dropout_p)
    scale, backends = _checked(layouts, "qkv", (q, k, v), left, scale, cu_seqlens is not None, seed is not None)
    if isinstance(locality, (GridNeighborhood, ShiftedWindow)):
        check_length(locality, q.shape[2], k.shape[2])
        check_not_packed(locality, cu_seqlens)
        backends = dispatch.Backends(CUDA_REASON, "no kernel of softmax and affine attention serves grids yet")
    rows = q.shape[:3]
    alpha = checks.numbers_of("alpha", alpha, rows, "(B, Hq, N), one number per query and head", q)
    beta = checks.numbers_of("beta", beta, rows, "(B, Hq, N), one number per query and head", q)
    sink = checks.numbers_of("sink", sink, rows[1:2], "(Hq,), one logit per query head", q)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q, k, cu_seqlens_k)
    elif cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k needs cu_seqlens, the boundaries of the queries")
    return Call(q, k, v, alpha, beta, sink, left, right, scale, cu_seqlens, cu_seqlens_k, seed, backends, layouts is not None)


@checks.once
def _checked(
    metas: list[Layout], left: int, scale: float | None, packed: bool, drops: bool = False
) -> tuple[float, dispatch.Backends]:
    """The scale and the backends of these layouts."""
    q, k, v = metas
    checks.check_qkv(q, k, v)
    reason = checks.kernel_width_reason("q", q.shape[3]) or checks.kernel_width_reason("v", v.shape[3])
    orders = choices.orders("affine_attention", q.device, head_dim=int(q.shape[3]), keys=k.shape[2])
    scale = checks.default_scale(q.shape[3]) if scale is None else scale
    reason_of_dropout = dropout.CUDA_REASON if drops else None
    cuda_reason = reason or reason_of_dropout or _cuda.affine_reason(q, k, v, left, packed) or _cuda.scale_reason(scale)
    return scale, dispatch.Backends(cuda_reason, reason, orders)


def _window(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """(left, right), with the 0 that causal puts on the right."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right) of ints, got {window_size!r}")
    left, right = window_size
    if not (type(left) is type(right) is int and left >= UNLIMITED and right >= UNLIMITED):
        _check_side("left", left)
        _check_side("right", right)
    if causal and right > 0:
        raise ValueError(f"causal sees no key after the query: window_size must have a right of -1 or 0, got {right}")
    return within_reach(left, 0 if causal else right)


def _window_of(locality: Locality, window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """The window_size of a locality that no other argument contradicts; a grid has none."""
    if not isinstance(locality, (SlidingWindow, GridNeighborhood, ShiftedWindow)):
        kinds = "a SlidingWindow, a GridNeighborhood or a ShiftedWindow"
        raise TypeError(f"locality must be None, {kinds}, got {type(locality).__name__}")
    if causal or tuple(window_size) != (UNLIMITED, UNLIMITED):
        raise ValueError("locality determines which keys a query sees: leave window_size and causal out")
    return (locality.left, locality.right) if isinstance(locality, SlidingWindow) else window_size


def _check_side(side: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"window_size must be a pair of ints, got {type(value).__name__} for its {side}")
    if value < UNLIMITED:
        raise ValueError(f"window_size: {side}={value} would hide the query's own key; use 0 or more, or -1 for unlimited")
