"""Streamed diagnostics of attention: statistics of its weights, and geometry of the selected keys (arXiv 2602.01893)."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from nearfar import _cuda
from nearfar.kernels import diagnostics as _kernels  # noqa: F401  (registers the torch operators)
from nearfar.kernels.krause_grid import decoded
from nearfar.localities import (
    UNLIMITED,
    Grid,
    GridNeighborhood,
    Locality,
    ShiftedWindow,
    SlidingWindow,
    check_length,
    within_reach,
)
from nearfar.reference import diagnostics as reference
from nearfar.runtime import checks, choices, dispatch
from nearfar.runtime.dispatch import Backend
from nearfar.runtime.opaque import opaque
from nearfar.runtime.tensors import Layout, unit_stride

MAX_TOP_N = 256
Queries = Literal["all", "last"]
Distance = Literal["norm", "cosine"]

DISTANCES_REASON = "the CUDA kernels score by dot products: leave sigma out"
GRID_REASON = "no kernel of the diagnostics serves grids yet"
TOP_K_REASON = "no kernel of the diagnostics selects top_k keys yet"
WEIGHING_REASON = "the CUDA kernels of the diagnostics know no alpha, beta or sink"
COSINE_REASON = "the kernels compare norms of differences, not cosines"
BETA_REASON = "no kernel of the geometry knows weights with a beta yet"

_WEIGHING = "Tensor? sigma, Tensor? alpha, Tensor? beta, Tensor? sink"
_REACH = "int left, int right, str? locality, int? top_k, float scale"


def _per_query(q: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return q.new_empty(q.shape[:3], dtype=dtype or torch.promote_types(q.dtype, torch.float32))


def _empty_statistics(q: torch.Tensor, k: torch.Tensor, *_: object) -> tuple[torch.Tensor, ...]:
    lse, entropy, max_weight, mean_logit, weight_sum = (_per_query(q) for _ in range(5))
    mass = lse.new_empty((*q.shape[:2], k.shape[2]))
    return lse, entropy, max_weight, _per_query(q, torch.int64), mass, mean_logit, weight_sum


def _decoded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the reference that takes its locality as text, as torch operators do."""

    def call(*arguments: Any) -> Any:
        *first, locality, top_k, scale = arguments
        return function(*first, None if locality is None else decoded(locality), top_k, scale)

    return call


_reference_statistics = opaque(
    "attention_statistics",
    f"(Tensor q, Tensor k, {_WEIGHING}, {_REACH}) -> ({', '.join(7 * ['Tensor'])})",
    _decoded(reference.attention_statistics),
    _empty_statistics,
    differentiable=2,
)
_reference_geometry = opaque(
    "selection_geometry",
    f"(Tensor q, Tensor k, Tensor v, int top_n, str distance, {_WEIGHING}, {_REACH}) -> (Tensor, Tensor, Tensor)",
    _decoded(reference.selection_geometry),
    lambda q, *_: tuple(_per_query(q) for _ in range(3)),
    differentiable=0,
)


class AttentionStatistics(NamedTuple):
    """Result of `nearfar.attention_statistics`. lse and entropy are differentiable, the others are constants."""

    lse: torch.Tensor  # (B, Hq, N) log of the sum of exp(score), that of the sink included, in nats
    entropy: torch.Tensor  # (B, Hq, N) of a query's shares |weight| / sum of |weight|, in nats
    max_weight: torch.Tensor  # (B, Hq, N) the weight of the key that scores highest
    max_key: torch.Tensor  # (B, Hq, N) int64, that key, of equal ones the first
    key_mass: torch.Tensor  # (B, Hq, M) the weight that a key receives from all queries
    mean_logit: torch.Tensor  # (B, Hq, N) mean score of the keys that a query keeps
    weight_sum: torch.Tensor  # (B, Hq, N) sum of a query's weights: 1 without alpha, beta and sink

    @property
    def effective_support(self) -> torch.Tensor:
        """exp(entropy), (B, Hq, N): from 1 (one key has all weight) to the number of keys kept (equal weights)."""
        return self.entropy.exp()

    def first_mass(self, count: int = 1) -> torch.Tensor:
        """(B, Hq): the weight that the first `count` keys receive together, the mean over queries."""
        return self.key_mass[..., :count].sum(-1) / self.lse.shape[-1]


class SelectionGeometry(NamedTuple):
    """Result of `nearfar.selection_geometry`; each (B, Hq, N), from 0 to 1."""

    precision: torch.Tensor
    recall: torch.Tensor
    f_score: torch.Tensor


class Call(NamedTuple):
    """A checked call: what every backend computes with. From sigma to scale: the fields of the reference's Weighing."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    sigma: torch.Tensor | None
    alpha: torch.Tensor | None
    beta: torch.Tensor | None
    sink: torch.Tensor | None
    left: int
    right: int
    locality: Grid | None
    top_k: int | None
    scale: float
    backends: dispatch.Backends

    def weighing(self) -> tuple[Any, ...]:
        """What makes weights of queries and keys, as torch operators of the reference take it."""
        *tensors, left, right, locality, top_k, scale = self[3:12]
        return *tensors, left, right, None if locality is None else locality.text, top_k, scale


def attention_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    sigma: float | torch.Tensor | None = None,
    locality: Locality | None = None,
    top_k: int | None = None,
    alpha: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    queries: Queries = "all",
    backend: Backend = "auto",
) -> AttentionStatistics:
    """Log-sum-exp, entropy, largest and summed weight of each query's attention, and the weight that each key receives.

    Entropy shows how far gradient flow has concentrated the weights (source: arXiv 2603.06248), received weight shows attention
    sinks. The weights are those of `nearfar.softmax_attention`, `nearfar.affine_attention` and `nearfar.krause_attention` with
    the same arguments. Scores s_ij are scale q_i . k_j or, with sigma, -|q_i - k_j|^2 / (2 sigma_h^2). Over the keys j that
    query i keeps, those that it sees or the top_k best of them,

        lse_i = log(exp(sink_h) + sum_j exp(s_ij))        w_ij = alpha_i exp(s_ij - lse_i) + beta_i

    Entropy and effective support are those of the shares |w_ij| / sum_j |w_ij|, which add up to 1 whatever the weights add up
    to: a sink takes part in no share. Where beta makes all weights of a query 0 its entropy is NaN.

    Nothing of size N x M is allocated. Query heads share key heads when Hq is a multiple of Hkv (grouped-query attention).
    Under autocast q and k are cast to the autocast dtype.

    Args:
        q: (B, Hq, N, D), float32, float16 or bfloat16 (float64 on the reference); any strides.
        k: (B, Hkv, M, D), dtype and device of q.
        causal: a query sees the keys up to its own position; with more keys than queries, the queries are the last N positions.
        scale: factor of the dot products, a finite number; None for D^-0.5. Not with sigma.
        sigma: bandwidth of scores by distance, positive: a float, a 0-d or a (Hq,) tensor; None for dot products. A CUDA tensor
            is not checked: a sigma that is not positive makes the floating-point results of its head NaN.
        locality: which keys a query sees: None for all, a SlidingWindow, or on the reference a GridNeighborhood or a
            ShiftedWindow of N = M tokens.
        top_k: how many of the keys that it sees a query keeps, those of the highest scores, of equal ones the first; None for
            all. The selection is a constant in the backward.
        alpha: (B, Hq, N), the factor of the softmax weights, any floating dtype; None for 1.
        beta: (B, Hq, N), what is added to the weights of all kept keys, likewise; None for 0.
        sink: (Hq,), logits of an attention sink; None for no sink.
        queries: "all", or "last" for the last query alone, as if q and alpha and beta had no other; not with a grid.
        backend: "auto", "cuda", "triton" or "reference"; `nearfar.explain` reports which one serves a call. Triton's kernels
            compute the gradients of "cuda".

    Returns:
        AttentionStatistics: lse, entropy, max_weight, max_key, mean_logit and weight_sum (B, Hq, N), key_mass (B, Hq, M), in
        float32 (float64 for float64 inputs); max_key is int64. max_key is the key that scores highest, and max_weight its
        weight: the largest one unless alpha is negative. lse and mean_logit are those of the whole score,
        -|q|^2 / (2 sigma^2) included. lse and entropy are differentiable in q, k, sigma, alpha, beta and sink (twice on the
        reference), for entropy regularisation; the others are constants.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, a query sees no key (there are none, or fewer keys than queries with
            causal or a locality), or the backend cannot serve the call.
    """
    call = prepare_attention_statistics(
        q, k, causal=causal, scale=scale, sigma=sigma, locality=locality, top_k=top_k, alpha=alpha, beta=beta, sink=sink,
        queries=queries,
    )
    served, _ = call.backends.served(backend, call.q)
    if served == "reference":
        return AttentionStatistics(*_reference_statistics(call.q, call.k, *call.weighing()))
    return _kernel_statistics(call, served)


def _kernel_statistics(call: Call, served: str) -> AttentionStatistics:
    """What the kernels compute; they know the sink and beta in what is constant, and lse and entropy without both."""
    tensors, reach = (unit_stride(call.q), unit_stride(call.k), call.sigma), (call.left, call.right, call.scale)
    weighing = [None if x is None else x.detach() for x in (call.alpha, call.beta, call.sink)]
    found = AttentionStatistics(*torch.ops.nearfar.attention_statistics(*tensors, *weighing, *reach, served))
    if call.sink is not None:
        found = found._replace(lse=torch.logaddexp(found.lse, call.sink[:, None]))
    if call.beta is not None:
        alpha = torch.ones_like(call.beta) if call.alpha is None else call.alpha
        entropy, _ = torch.ops.nearfar.shifted_entropy(*tensors, alpha, call.beta, found.lse, *reach)
        found = found._replace(entropy=entropy)
    return found


def selection_geometry(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    top_n: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    sigma: float | torch.Tensor | None = None,
    locality: Locality | None = None,
    top_k: int | None = None,
    alpha: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    queries: Queries = "all",
    distance: Distance = "norm",
    backend: Backend = "auto",
) -> SelectionGeometry:
    """How well the top_n keys of each query are separated from the others, as precision, recall and F.

    Source: arXiv 2602.01893. With weights w_ij of the keys that a query keeps (`nearfar.attention_statistics`), y_j = w_ij v_j,
    S the top_n keys by score (of equal ones the first), s = sum_{j in S} y_j and D_j = |y_j - s|:

        precision = n / (n + #{j not in S: D_j <= max_{j in S} D_j})      n = |S|
        recall = #{j in S: D_j < min_{j not in S} D_j} / n
        F = 2 precision recall / (precision + recall)

    With distance="cosine", on the reference, D_j = 1 - cos(y_j, s) instead; the cosine with a zero vector is 0.

    A query that keeps at most top_n keys selects them all: each result is 1. Sinks, and alpha without beta, multiply all
    weights of a query by one number, which changes no result. The results are constants, for monitoring. Kernels allocate
    12 top_n bytes per query and head. They read the keys twice, and once more for every 8 of top_n beyond 8.

    Args:
        q: (B, Hq, N, D), float32, float16 or bfloat16 (float64 on the reference); any strides.
        k: (B, Hkv, M, D), dtype and device of q.
        v: (B, Hkv, M, Dv), dtype and device of q.
        top_n: how many keys a query selects, from 1 to 256.
        distance: "norm" for |y_j - s|, "cosine" for 1 - cos(y_j, s).
        causal, scale, sigma, locality, top_k, alpha, beta, sink, queries, backend: as for `nearfar.attention_statistics`.

    Returns:
        SelectionGeometry: precision, recall and f_score, each (B, Hq, N) in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, a query sees no key, or the backend cannot serve the call.
    """
    call = prepare_selection_geometry(
        q, k, v, top_n, causal=causal, scale=scale, sigma=sigma, locality=locality, top_k=top_k, alpha=alpha, beta=beta,
        sink=sink, queries=queries, distance=distance,
    )
    served, _ = call.backends.served(backend, call.q)
    if served == "reference":
        return SelectionGeometry(*_reference_geometry(*call[:3], top_n, distance, *call.weighing()))
    tensors = (unit_stride(x).detach() for x in call[:3])  # type: ignore[arg-type]
    sigma = None if call.sigma is None else call.sigma.detach()
    found = torch.ops.nearfar.selection_geometry(*tensors, sigma, top_n, call.left, call.right, call.scale, served)
    return SelectionGeometry(*found)


def prepare_attention_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    sigma: float | torch.Tensor | None = None,
    locality: Locality | None = None,
    top_k: int | None = None,
    alpha: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    queries: Queries = "all",
) -> Call:
    """Check the arguments of attention_statistics and return its Call."""
    return _prepare("attention_statistics", q, k, None, causal, scale, sigma, locality, top_k, alpha, beta, sink, queries)


def prepare_selection_geometry(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    top_n: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    sigma: float | torch.Tensor | None = None,
    locality: Locality | None = None,
    top_k: int | None = None,
    alpha: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    queries: Queries = "all",
    distance: Distance = "norm",
) -> Call:
    """Check the arguments of selection_geometry and return its Call."""
    if not isinstance(top_n, int) or isinstance(top_n, bool):
        raise TypeError(f"top_n must be an int, got {type(top_n).__name__}")
    if not 1 <= top_n <= MAX_TOP_N:
        raise ValueError(f"top_n must be from 1 to {MAX_TOP_N}, got {top_n}")
    if distance not in ("norm", "cosine"):
        raise ValueError(f'distance must be "norm" or "cosine", got {distance!r}')
    checks.meta("v", v)
    call = _prepare("selection_geometry", q, k, v, causal, scale, sigma, locality, top_k, alpha, beta, sink, queries)
    return call if distance == "norm" else call._replace(backends=dispatch.Backends(COSINE_REASON, COSINE_REASON))


def _prepare(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    sigma: float | torch.Tensor | None,
    locality: Locality | None,
    top_k: int | None,
    alpha: torch.Tensor | None,
    beta: torch.Tensor | None,
    sink: torch.Tensor | None,
    queries: Queries,
) -> Call:
    q, k, *values = checks.autocast(q, k) if v is None else checks.autocast(q, k, v)
    left, right, grid = _window(causal, locality)
    checks.check_top_k(top_k)
    if queries not in ("all", "last"):
        raise ValueError(f'queries must be "all" or "last", got {queries!r}')
    if queries == "last":
        q, alpha, beta = _last(q, alpha, beta, grid)
    tensors = q, k, *values
    layouts = checks.plain_layouts(*tensors)
    kernel_reason, cuda_reason, orders = _checked(layouts, "qkv", tensors, left >= 0 or right >= 0, name)
    if grid is not None:
        check_length(grid, q.shape[2], k.shape[2])
    if sigma is not None:
        checks.require(scale is None, "scale is for dot products: leave it out with a sigma")
        sigma = checks.positive_per_head("sigma", sigma, q, q.shape[1])
        scale, scale_reason = 1.0, DISTANCES_REASON
    else:
        scale = checks.default_scale(q.shape[3]) if scale is None else checks.finite_scale(scale)
        scale_reason = _cuda.scale_reason(scale)
    rows = q.shape[:3]
    alpha = checks.numbers_of("alpha", alpha, rows, "(B, Hq, N), one number per query and head", q)
    beta = checks.numbers_of("beta", beta, rows, "(B, Hq, N), one number per query and head", q)
    sink = checks.numbers_of("sink", sink, rows[1:2], "(Hq,), one logit per query head", q)
    if name == "selection_geometry" and beta is None:
        alpha = sink = None  # which multiply all weights of a query by one number
    reason = (GRID_REASON if grid else None) or (TOP_K_REASON if top_k else None)
    if name == "selection_geometry":
        reason = reason or (None if beta is None else BETA_REASON)
    weighs = any(x is not None for x in (alpha, beta, sink))
    cuda_reason = reason or (WEIGHING_REASON if weighs else None) or cuda_reason or scale_reason
    backends = dispatch.Backends(cuda_reason, reason or kernel_reason, orders)
    v = values[0] if values else None
    return Call(q, k, v, sigma, alpha, beta, sink, left, right, grid, top_k, scale, backends)  # type: ignore[arg-type]


def _last(
    q: torch.Tensor, alpha: torch.Tensor | None, beta: torch.Tensor | None, grid: Grid | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """q, alpha and beta of the last query."""
    checks.require(grid is None, 'queries="last" is for sequences: a grid has no last query')
    if len(checks.meta("q", q).shape) != 4:
        return q, alpha, beta  # for the checks to meet
    checks.require(q.shape[2], 'queries="last": q must have at least one query')
    for name, numbers in (("alpha", alpha), ("beta", beta)):
        checks.numbers_of(name, numbers, q.shape[:3], "(B, Hq, N), one number per query and head", q)
    of_last = [None if x is None else x[:, :, -1:] for x in (alpha, beta)]
    return q[:, :, -1:], *of_last  # type: ignore[return-value]


@checks.once
def _checked(metas: list[Layout], limited: bool, name: str) -> tuple[str | None, str | None, dispatch.Orders]:
    """(why no kernel can serve these layouts, why no CUDA kernel can, orders for "auto"); None instead of a reason if one can.

    limited: whether causality or a locality limits the keys that a query sees.
    """
    q, k, *values = metas
    checks.check_qkv(q, k, *(values or [k]))  # type: ignore[arg-type]
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries and not num_keys:
        raise ValueError("k must have at least one key: statistics of no weights are undefined")
    if limited and num_keys < num_queries:
        raise ValueError(
            f"k must be at least as long as q, {num_queries}, where causality or a locality counts positions: "
            f"the first queries would see no key; got {num_keys}"
        )
    reason = checks.kernel_width_reason("q", q.shape[3])
    reason = reason or next((checks.kernel_width_reason("v", v.shape[3]) for v in values), None)
    orders = choices.orders(name, q.device, head_dim=int(q.shape[3]))
    cuda_reason = reason or _cuda.hopper_reason(dict(zip("qkv"[: len(metas)], metas, strict=True)))
    return reason, cuda_reason, orders


def _window(causal: bool, locality: Locality | None) -> tuple[int, int, Grid | None]:
    """(left, right, grid): the sides with the 0 that causal puts on the right, unlimited beside a grid."""
    if isinstance(locality, (GridNeighborhood, ShiftedWindow)):
        checks.require(not causal, f"causal is for sequences: a {type(locality).__name__} has no order")
        return UNLIMITED, UNLIMITED, locality
    if not (locality is None or isinstance(locality, SlidingWindow)):
        kinds = "a SlidingWindow, a GridNeighborhood or a ShiftedWindow"
        raise TypeError(f"locality must be None, {kinds}, got {type(locality).__name__}")
    left, right = (UNLIMITED, UNLIMITED) if locality is None else (locality.left, locality.right)
    if causal and right > 0:
        raise ValueError(f"causal sees no key after the query: locality must have a right of -1 or 0, got {right}")
    return *within_reach(left, 0 if causal else right), None
