"""Regimes of attention heads, with their sink and the separation of their selected keys (arXiv 2602.01893)."""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

from nearfar.localities import Locality, SlidingWindow
from nearfar.ops.diagnostics import (
    AttentionStatistics,
    Call,
    SelectionGeometry,
    attention_statistics,
    prepare_selection_geometry,
    selection_geometry,
)
from nearfar.reference.diagnostics import Pairs, separation
from nearfar.reference.pairwise import distance_scores, group_heads, group_product, per_head, top_k_mask
from nearfar.runtime.dispatch import Backend

REGIMES = ("retriever", "mixer", "reset")
UNDEFINED = -1  # instead of an index into REGIMES: the regime of a head with NaN
COUNTED_ROWS = 256  # queries of a grid whose keys are counted at once
CONTROL_ROWS = 16  # queries of the random control that are computed together


class Thresholds(NamedTuple):
    """Thresholds of the regimes [ours: the paper's are not public].

    Reset: the sink receives at least reset_mass of the head's weight, and the norm of its value is at most reset_norm times
        the mean norm of the other values.
    Retriever: the sink receives less than reset_mass, precision and recall are at least separation, F is at least that of the
        random control, and the effective support is at most support * top_n keys.
    Mixer: every other head.
    """

    reset_mass: float = 0.5
    reset_norm: float = 0.5
    separation: float = 0.5
    support: float = 4.0


class HeadRegimes(NamedTuple):
    """Result of `nearfar.head_regimes`; each (B, Hq). The sink of a head is the key that receives the most weight."""

    entropy: torch.Tensor  # mean over queries, in nats
    sink_key: torch.Tensor  # int64
    sink_mass: torch.Tensor  # its weight, the mean over queries: its share of all weight where weights add up to 1
    sink_value_norm: torch.Tensor  # |v| of the sink
    value_norm: torch.Tensor  # mean |v| of the other keys
    sink_similarity: torch.Tensor  # mean cosine of the sink's value with the others
    precision: torch.Tensor  # these three: means over the queries that see more than top_n keys
    recall: torch.Tensor
    f_score: torch.Tensor
    control_precision: torch.Tensor  # the same for top_n keys drawn at random, over a sample of these queries
    control_recall: torch.Tensor
    control_f_score: torch.Tensor
    regime: torch.Tensor  # int64 index into nearfar.diagnostics.REGIMES: 0 retriever, 1 mixer, 2 reset; -1 if a field is NaN


def head_regimes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    top_n: int = 4,
    causal: bool = False,
    scale: float | None = None,
    sigma: float | torch.Tensor | None = None,
    locality: Locality | None = None,
    top_k: int | None = None,
    alpha: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    thresholds: Thresholds = Thresholds(),  # noqa: B008
    control_queries: int = 64,
    seed: int = 0,
    backend: Backend = "auto",
) -> HeadRegimes:
    """Regime of each head, with its entropy, its sink, and the geometry of its selection beside a random control.

    Source: arXiv 2602.01893; thresholds and control are ours. Sinks and geometry come from `nearfar.attention_statistics` and
    `nearfar.selection_geometry`; only the control computes rows of weights, CONTROL_ROWS at a time. All results are constants.

    Args:
        q: (B, Hq, N, D), N at least 1. k: (B, Hkv, M, D). v: (B, Hkv, M, Dv). dtypes as for `nearfar.selection_geometry`.
        top_n: how many keys a query selects, from 1 to 256.
        causal, scale, sigma, locality, top_k, alpha, beta, sink, backend: as for `nearfar.attention_statistics`.
        thresholds: Thresholds of the regimes.
        control_queries: number of queries, drawn with the seed, for which the control draws random keys.
        seed: of the random control, which uses the same queries and keys for every head.

    Returns:
        HeadRegimes.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or the backend cannot serve the call.
    """
    keywords: dict[str, Any] = dict(
        causal=causal, scale=scale, sigma=sigma, locality=locality, top_k=top_k, alpha=alpha, beta=beta, sink=sink
    )
    return measured(q, k, v, top_n, thresholds, control_queries, seed, backend, **keywords)[0]


def measured(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    top_n: int,
    thresholds: Thresholds,
    control_queries: int = 64,
    seed: int = 0,
    backend: Backend = "auto",
    **keywords: Any,
) -> tuple[HeadRegimes, AttentionStatistics]:
    """What `head_regimes` returns, and the statistics that it is made of."""
    if not isinstance(control_queries, int) or isinstance(control_queries, bool):
        raise TypeError(f"control_queries must be an int, got {type(control_queries).__name__}")
    if control_queries < 1:
        raise ValueError(f"control_queries must be at least 1, got {control_queries}")
    with torch.no_grad():
        call = prepare_selection_geometry(q, k, v, top_n, **keywords)
        if not call.q.shape[2]:
            raise ValueError("q must have at least one query")
        found = attention_statistics(q, k, **keywords, backend=backend)
        sink = sink_of(found.key_mass, call.v, call.q.shape[2])  # type: ignore[arg-type]
        geometry = mean_geometry(q, k, v, top_n, **keywords, backend=backend)
        control = random_control(call, top_n, control_queries, seed)
        heads = HeadRegimes(found.entropy.mean(-1), *sink, *geometry, *control, regime=None)  # type: ignore[call-arg,misc,arg-type]
        return heads._replace(regime=classify(heads, top_n, thresholds)), found


def classify(heads: HeadRegimes, top_n: int, thresholds: Thresholds) -> torch.Tensor:
    """Index into REGIMES of each head, from the other fields of a HeadRegimes; -1 where one of them is NaN."""
    sinks = heads.sink_mass >= thresholds.reset_mass
    reset = sinks & (heads.sink_value_norm <= thresholds.reset_norm * heads.value_norm)
    retriever = (
        ~sinks
        & (heads.precision >= thresholds.separation)
        & (heads.recall >= thresholds.separation)
        & (heads.f_score >= heads.control_f_score)
        & (heads.entropy.exp() <= thresholds.support * top_n)
    )
    index = torch.full(reset.shape, REGIMES.index("mixer"), device=reset.device)
    index = index.masked_fill(retriever, REGIMES.index("retriever")).masked_fill(reset, REGIMES.index("reset"))
    # Comparisons with NaN are false, so a head that has diverged would otherwise be a mixer.
    undefined = torch.stack([x.isnan() for x in heads if x is not None]).any(0)
    return index.masked_fill(undefined, UNDEFINED)


def regime_name(index: int) -> str:
    return "undefined" if index == UNDEFINED else REGIMES[index]


def sink_of(key_mass: torch.Tensor, v: torch.Tensor, num_queries: int) -> tuple[torch.Tensor, ...]:
    """(sink_key, sink_mass, sink_value_norm, value_norm, sink_similarity), each (B, Hq)."""
    mass, key = key_mass.max(-1)
    others = max(v.shape[2] - 1, 1)
    group = key.shape[1] // v.shape[1]
    values = v.to(torch.promote_types(v.dtype, torch.float32))
    norms, directions = values.norm(dim=-1), normalize(values, dim=-1)

    batch, head = (torch.arange(size, device=v.device) for size in key.shape)
    index = batch[:, None], head[None, :] // group, key
    norm, direction = norms[index], directions[index]
    norm_of_others, of_others = ((x.sum(2).repeat_interleave(group, 1) - own) / others
                                 for x, own in ((norms, norm), (directions, direction)))
    return key, mass / num_queries, norm, norm_of_others, (direction * of_others).sum(-1)


def mean_geometry(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_n: int, *, backend: Backend = "auto", **keywords: Any
) -> SelectionGeometry:
    """SelectionGeometry of (B, Hq) means over the queries that keep more than top_n keys."""
    rows = telling_rows(prepare_selection_geometry(q, k, v, top_n, **keywords), top_n).to(q.device)
    found = selection_geometry(q, k, v, top_n, **keywords, backend=backend)
    return SelectionGeometry(*(part[..., rows].mean(-1) for part in found))


def visible(call: Call, rows: torch.Tensor) -> torch.Tensor:
    """(rows, M), on the CPU: which keys some queries see."""
    num_queries, num_keys = call.q.shape[2], call.k.shape[2]
    key = torch.arange(num_keys, device="cpu")
    if call.locality is not None:
        return call.locality.visible(rows[:, None], key)
    return SlidingWindow(call.left, call.right).visible(rows[:, None] + num_keys - num_queries, key)


def keys_kept(call: Call) -> torch.Tensor:
    """(N,) how many keys each query keeps."""
    num_queries, num_keys = call.q.shape[2], call.k.shape[2]
    rows = torch.arange(num_queries, device="cpu")
    if call.locality is not None:
        count = torch.cat([visible(call, part).sum(-1) for part in rows.split(COUNTED_ROWS)])
    else:
        position = rows + num_keys - num_queries
        first = torch.zeros_like(position) if call.left < 0 else (position - call.left).clamp_min(0)
        end = torch.full_like(position, num_keys) if call.right < 0 else (position + call.right + 1).clamp_max(num_keys)
        count = end - first
    return count if call.top_k is None else count.clamp_max(call.top_k)


def telling_rows(call: Call, top_n: int) -> torch.Tensor:
    """The queries that keep more than top_n keys: others select all keys, which says nothing. All queries if there are none."""
    rows = (keys_kept(call) > top_n).nonzero().squeeze(-1)
    return rows if len(rows) else torch.arange(call.q.shape[2], device="cpu")


def random_control(call: Call, top_n: int, count: int, seed: int) -> tuple[torch.Tensor, ...]:
    """(precision, recall, f_score) of keys drawn at random: (B, Hq) means over at most `count` of `telling_rows`.

    The keys in sight of a query are shuffled, alike for all heads; a head selects the first top_n of those that it keeps.
    """
    generator, rows = torch.Generator("cpu").manual_seed(seed), telling_rows(call, top_n)
    rows = rows[torch.randperm(len(rows), generator=generator, device="cpu")[:count]]
    totals: Any = 0
    for part in rows.split(CONTROL_ROWS):
        shown = visible(call, part)
        order = torch.full(shown.shape, -torch.inf, device="cpu")
        for row, own in zip(order, shown, strict=True):
            keys = own.nonzero().squeeze(-1)
            shuffled = keys[torch.randperm(len(keys), generator=generator, device="cpu")]
            row[shuffled] = -torch.arange(len(keys), dtype=row.dtype, device="cpu")
        pairs = pairs_of(call, part.to(call.q.device), shown.to(call.q.device))
        selected = top_k_mask(order.to(call.q.device).masked_fill(~pairs.keep, -torch.inf), top_n)
        weights = pairs.weights(pairs.log_sums()[1])
        values = call.v.to(weights.dtype)[:, :, None]  # type: ignore[union-attr]
        found = separation(weights, selected, pairs.keep, values)
        totals = totals + torch.stack([x.sum(-1) for x in found])
    return tuple((totals / len(rows)).flatten(2, 3))


def pairs_of(call: Call, rows: torch.Tensor, shown: torch.Tensor) -> Pairs:
    """The Pairs of some queries with all keys. shown: (rows, M), which of them they see."""
    wide, heads, heads_kv = torch.promote_types(call.q.dtype, torch.float32), call.q.shape[1], call.k.shape[1]
    q, k = group_heads(call.q[:, :, rows].to(wide), heads_kv), call.k.to(wide)
    if call.sigma is None:
        scores = group_product(q * call.scale, k.mT)
    else:
        scores = distance_scores(q, k, per_head(call.sigma, heads, heads_kv))
    keep = shown if call.top_k is None else top_k_mask(scores.masked_fill(~shown, -torch.inf), call.top_k)
    alpha, beta = (
        None if x is None else group_heads(x[:, :, rows], heads_kv)[..., None] for x in (call.alpha, call.beta)
    )
    sink = None if call.sink is None else per_head(call.sink, heads, heads_kv)
    return Pairs(scores, keep, torch.arange(call.k.shape[2], device=scores.device), alpha, beta, sink)
