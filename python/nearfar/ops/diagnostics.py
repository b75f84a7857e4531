"""Streamed diagnostics of attention: statistics of its weights, and geometry of the selected keys (arXiv 2602.01893)."""

from typing import NamedTuple

import torch

from nearfar import _cuda
from nearfar.kernels import diagnostics as _kernels  # noqa: F401  (registers the torch operators)
from nearfar.localities import UNLIMITED, SlidingWindow, within_reach
from nearfar.reference import diagnostics as reference
from nearfar.runtime import checks, choices, dispatch
from nearfar.runtime.dispatch import Backend
from nearfar.runtime.opaque import opaque
from nearfar.runtime.tensors import Layout, unit_stride

MAX_TOP_N = 256

DISTANCES_REASON = "the CUDA kernels score by dot products: leave sigma out"


def _per_query(q: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return q.new_empty(q.shape[:3], dtype=dtype or torch.promote_types(q.dtype, torch.float32))


def _empty_statistics(q: torch.Tensor, k: torch.Tensor, *_: object) -> tuple[torch.Tensor, ...]:
    lse, entropy, max_weight = (_per_query(q) for _ in range(3))
    return lse, entropy, max_weight, _per_query(q, torch.int64), lse.new_empty((*q.shape[:2], k.shape[2]))


_reference_statistics = opaque(
    "attention_statistics",
    "(Tensor q, Tensor k, Tensor? sigma, int left, int right, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.attention_statistics,
    _empty_statistics,
    differentiable=2,
)
_reference_geometry = opaque(
    "selection_geometry",
    "(Tensor q, Tensor k, Tensor v, Tensor? sigma, int top_n, int left, int right, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    reference.selection_geometry,
    lambda q, *_: tuple(_per_query(q) for _ in range(3)),
    differentiable=0,
)


class AttentionStatistics(NamedTuple):
    """Result of `nearfar.attention_statistics`. lse and entropy are differentiable, the others are constants."""

    lse: torch.Tensor  # (B, Hq, N) log of the sum of exp(score), in nats
    entropy: torch.Tensor  # (B, Hq, N) of a query's weights, in nats
    max_weight: torch.Tensor  # (B, Hq, N) the largest weight of a query
    max_key: torch.Tensor  # (B, Hq, N) int64, the key of the largest weight; of equal ones the first
    key_mass: torch.Tensor  # (B, Hq, M) the weight that a key receives from all queries

    @property
    def effective_support(self) -> torch.Tensor:
        """exp(entropy), (B, Hq, N): from 1 (one key has all weight) to the number of visible keys (equal weights)."""
        return self.entropy.exp()


class SelectionGeometry(NamedTuple):
    """Result of `nearfar.selection_geometry`; each (B, Hq, N), from 0 to 1."""

    precision: torch.Tensor
    recall: torch.Tensor
    f_score: torch.Tensor


class Call(NamedTuple):
    """A checked call: the arguments that every backend takes."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    sigma: torch.Tensor | None
    left: int
    right: int
    scale: float
    backends: dispatch.Backends


def attention_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    sigma: float | torch.Tensor | None = None,
    locality: SlidingWindow | None = None,
    backend: Backend = "auto",
) -> AttentionStatistics:
    """Log-sum-exp, entropy and largest weight of each query's attention, and the weight that each key receives.

    Entropy shows how far gradient flow has concentrated the weights (source: arXiv 2603.06248), received weight shows attention
    sinks. The weights are the softmax of scale q_i . k_j or, with sigma, of Krause attention's scores -|q_i - k_j|^2 / (2
    sigma_h^2), over the keys that query i sees. Nothing of size N x M is allocated. Query heads share key heads when Hq is a
    multiple of Hkv (grouped-query attention). Under autocast q and k are cast to the autocast dtype.

    Args:
        q: (B, Hq, N, D), float32, float16 or bfloat16 (float64 on the reference); any strides.
        k: (B, Hkv, M, D), dtype and device of q.
        causal: a query sees the keys up to its own position; with more keys than queries, the queries are the last N positions.
        scale: factor of the dot products, a finite number; None for D^-0.5. Not with sigma.
        sigma: bandwidth of scores by distance, positive: a float, a 0-d or a (Hq,) tensor; None for dot products. A CUDA tensor
            is not checked: a sigma that is not positive makes the floating-point results of its head NaN.
        locality: which keys a query sees: None for all, or a SlidingWindow.
        backend: "auto", "cuda", "triton" or "reference"; `nearfar.explain` reports which one serves a call. Triton's kernels
            compute the gradients of "cuda".

    Returns:
        AttentionStatistics: lse, entropy, max_weight, max_key (B, Hq, N) and key_mass (B, Hq, M), in float32 (float64 for
        float64 inputs); max_key is int64. lse is that of the whole score, -|q|^2 / (2 sigma^2) included. lse and entropy are
        differentiable in q, k and sigma (twice on the reference), for entropy regularisation; the others are constants.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, a query sees no key (there are none, or fewer keys than queries with
            causal or a locality), or the backend cannot serve the call.
    """
    call = prepare_attention_statistics(q, k, causal=causal, scale=scale, sigma=sigma, locality=locality)
    q, k, sigma, options = call.q, call.k, call.sigma, call[4:7]
    served, _ = call.backends.served(backend, q)
    if served == "reference":
        return AttentionStatistics(*_reference_statistics(q, k, sigma, *options))
    found = torch.ops.nearfar.attention_statistics(unit_stride(q), unit_stride(k), sigma, *options, served)
    return AttentionStatistics(*found)


def selection_geometry(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    top_n: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    sigma: float | torch.Tensor | None = None,
    locality: SlidingWindow | None = None,
    backend: Backend = "auto",
) -> SelectionGeometry:
    """How well the top_n keys of each query are separated from the others, as precision, recall and F.

    Source: arXiv 2602.01893. With weights alpha_ij, y_j = alpha_ij v_j, S the top_n keys by weight (of equal ones the first),
    s = sum_{j in S} y_j and D_j = |y_j - s|:

        precision = n / (n + #{j not in S: D_j <= max_{j in S} D_j})      n = |S|
        recall = #{j in S: D_j < min_{j not in S} D_j} / n
        F = 2 precision recall / (precision + recall)

    A query that sees at most top_n keys selects them all: each result is 1. Scores and keywords are those of
    `nearfar.attention_statistics`. The results are constants, for monitoring. Kernels allocate 12 top_n bytes per query and
    head. They read the keys twice, and once more for every 8 of top_n beyond 8.

    Args:
        q: (B, Hq, N, D), float32, float16 or bfloat16 (float64 on the reference); any strides.
        k: (B, Hkv, M, D), dtype and device of q.
        v: (B, Hkv, M, Dv), dtype and device of q.
        top_n: how many keys a query selects, from 1 to 256.
        causal, scale, sigma, locality, backend: as for `nearfar.attention_statistics`.

    Returns:
        SelectionGeometry: precision, recall and f_score, each (B, Hq, N) in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, a query sees no key, or the backend cannot serve the call.
    """
    call = prepare_selection_geometry(q, k, v, top_n, causal=causal, scale=scale, sigma=sigma, locality=locality)
    sigma, options = call.sigma, call[4:7]
    served, _ = call.backends.served(backend, call.q)
    if served == "reference":
        return SelectionGeometry(*_reference_geometry(*call[:4], top_n, *options))
    tensors = (unit_stride(x).detach() for x in call[:3])  # type: ignore[arg-type]
    sigma = None if sigma is None else sigma.detach()
    return SelectionGeometry(*torch.ops.nearfar.selection_geometry(*tensors, sigma, top_n, *options, served))


def prepare_attention_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    sigma: float | torch.Tensor | None = None,
    locality: SlidingWindow | None = None,
) -> Call:
    """Check the arguments of attention_statistics and return its Call."""
    return _prepare("attention_statistics", q, k, None, causal, scale, sigma, locality)


def prepare_selection_geometry(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    top_n: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    sigma: float | torch.Tensor | None = None,
    locality: SlidingWindow | None = None,
) -> Call:
    """Check the arguments of selection_geometry and return its Call."""
    if not isinstance(top_n, int) or isinstance(top_n, bool):
        raise TypeError(f"top_n must be an int, got {type(top_n).__name__}")
    if not 1 <= top_n <= MAX_TOP_N:
        raise ValueError(f"top_n must be from 1 to {MAX_TOP_N}, got {top_n}")
    checks.meta("v", v)
    return _prepare("selection_geometry", q, k, v, causal, scale, sigma, locality)


def _prepare(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    sigma: float | torch.Tensor | None,
    locality: SlidingWindow | None,
) -> Call:
    q, k, *values = checks.autocast(q, k) if v is None else checks.autocast(q, k, v)
    left, right = _window(causal, locality)
    tensors = q, k, *values
    layouts = checks.plain_layouts(*tensors)
    kernel_reason, cuda_reason, orders = _checked(layouts, "qkv", tensors, left >= 0 or right >= 0, name)
    if sigma is not None:
        checks.require(scale is None, "scale is for dot products: leave it out with a sigma")
        sigma = checks.positive_per_head("sigma", sigma, q, q.shape[1])
        scale, scale_reason = 1.0, DISTANCES_REASON
    else:
        scale = checks.default_scale(q.shape[3]) if scale is None else checks.finite_scale(scale)
        scale_reason = _cuda.scale_reason(scale)
    backends = dispatch.Backends(cuda_reason or scale_reason, kernel_reason, orders)
    return Call(q, k, values[0] if values else None, sigma, left, right, scale, backends)  # type: ignore[arg-type]


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


def _window(causal: bool, locality: SlidingWindow | None) -> tuple[int, int]:
    """(left, right), with the 0 that causal puts on the right."""
    if not (locality is None or isinstance(locality, SlidingWindow)):
        raise TypeError(f"locality must be None or a SlidingWindow, got {type(locality).__name__}")
    left, right = (UNLIMITED, UNLIMITED) if locality is None else (locality.left, locality.right)
    if causal and right > 0:
        raise ValueError(f"causal sees no key after the query: locality must have a right of -1 or 0, got {right}")
    return within_reach(left, 0 if causal else right)
