"""Streamed diagnostics of attention in plain PyTorch, O(N * window) memory by chunks of rows.

With the scores s_ij = scale q_i . k_j, or by distance s_ij = -|q_i - k_j|^2 / (2 sigma^2), over the keys j that query i keeps,
those that it sees or the top_k nearest of them:

    lse_i = log(exp(sink) + sum_j exp(s_ij)),   w_ij = alpha_i exp(s_ij - lse_i) + beta_i,   key_mass_j = sum_i w_ij
    entropy_i = -sum_j p_ij log p_ij   with the shares p_ij = |w_ij| / sum_j |w_ij|

and the selection geometry of arXiv 2602.01893, with y_j = w_ij v_j, S the top_n keys by score, s = sum_{j in S} y_j and
D_j = |y_j - s|:

    precision = n / (n + #{j not in S: D_j <= max_{j in S} D_j}),   recall = #{j in S: D_j < min_{j not in S} D_j} / n

The queries are the last positions, and every query sees a key.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nearfar.localities import Grid
from nearfar.reference.grid import row_blocks
from nearfar.reference.pairwise import (
    CHUNK,
    by_chunk,
    distance_scores,
    group_heads,
    group_product,
    per_head,
    row_chunks,
    split_rows,
    top_k_mask,
)


class Weighing(NamedTuple):
    """What makes weights of queries and keys.

    sigma: (Hq,) or (1,) for scores by distance, None for scaled dot products.
    alpha: (B, Hq, N), None for 1. beta: (B, Hq, N), None for 0. sink: (Hq,), None for none.
    left, right: inclusive sides of the window, -1 unlimited.
    locality: a grid in place of the window, None for none.
    top_k: how many of the keys in sight a query keeps, None for all.
    scale: of the dot products.
    """

    sigma: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    sink: Tensor | None
    left: int
    right: int
    locality: Grid | None
    top_k: int | None
    scale: float


class Pairs(NamedTuple):
    """The scores of a chunk of queries, (B, Hkv, group, rows, keys), and what makes weights of them."""

    scores: Tensor
    keep: Tensor  # a mask that broadcasts to the scores
    keys: Tensor  # (keys,) their positions
    alpha: Tensor | None = None  # (B, Hkv, group, rows, 1)
    beta: Tensor | None = None
    sink: Tensor | None = None  # (Hkv, group, 1, 1)

    def kept(self, x: Tensor) -> Tensor:
        """x with zeros for the pairs that are not kept."""
        return x.masked_fill(~self.keep, 0.0)

    def masked(self) -> Tensor:
        """The scores, -inf for the pairs that are not kept."""
        return self.scores.masked_fill(~self.keep, float("-inf"))

    def log_sums(self) -> tuple[Tensor, Tensor]:
        """log sum_j exp(s_ij) over the keys, and lse, which has the sink in it, too; each (.., rows, 1)."""
        of_keys = self.masked().logsumexp(-1, keepdim=True)
        return of_keys, of_keys if self.sink is None else torch.logaddexp(of_keys, self.sink)

    def scaled(self, weights: Tensor) -> Tensor:
        """alpha weights + beta, of kept pairs."""
        weights = weights if self.alpha is None else self.alpha * weights
        return weights if self.beta is None else weights + self.beta

    def weights(self, lse: Tensor) -> Tensor:
        """w_ij, zero where a key is not kept. Masked before the exp, which overflows where a hidden key scores high."""
        return self.kept(self.scaled(self.kept(self.scores - lse).exp()))


def attention_statistics(q, k, *weighing):
    """Reference of `nearfar.attention_statistics`: (lse, entropy, max_weight, max_key, key_mass, mean_logit, weight_sum).

    Args:
        q: (B, Hq, N, D). k: (B, Hkv, M, D). weighing: the fields of a Weighing.

    lse and entropy are differentiable twice; the others are constants.
    """
    num_keys = k.shape[2]

    def statistics(pairs):
        if not num_keys:  # and so no queries: nothing has a maximum
            none = pairs.scores.sum(-1)
            return none, none, none.detach(), none.detach().long(), pairs.scores.detach().sum(-2), none.detach(), none.detach()
        of_keys, lse = pairs.log_sums()
        weights = pairs.weights(lse)
        if pairs.beta is None:  # what multiplies all weights of a query changes no share
            log_shares = pairs.kept(pairs.scores - of_keys)
            entropy = -(pairs.kept(log_shares.exp()) * log_shares).sum(-1)
        else:
            entropy = entropy_of_shares(weights)
        with torch.no_grad():
            masked = pairs.masked()
            highest = masked.amax(-1, keepdim=True)
            max_key = pairs.keys.where((masked == highest) | masked.isnan(), num_keys).amin(-1)
            max_weight = pairs.scaled((highest - lse).exp()).squeeze(-1)
            mean_logit = pairs.kept(pairs.scores).sum(-1) / pairs.keep.sum(-1)
        constants = max_weight.detach(), max_key, weights.detach().sum(-2), mean_logit.detach(), weights.detach().sum(-1)
        return lse.squeeze(-1), entropy, *constants

    rows, mass = [], k.new_zeros((*q.shape[:2], num_keys), dtype=torch.promote_types(q.dtype, torch.float32))
    for keys, (*parts, received, mean_logit, weight_sum) in by_pairs(statistics, q, k, Weighing(*weighing)):
        rows.append((*parts, mean_logit, weight_sum))
        mass = mass.index_add(-1, keys, received.flatten(1, 2))
    lse, entropy, max_weight, max_key, *more = (torch.cat(parts, -1).flatten(1, 2) for parts in zip(*rows, strict=True))
    return lse, entropy, max_weight, max_key, mass, *more


def entropy_of_shares(weights):
    """-sum p log p over the last dimension with p = |w| / sum |w|; NaN where all weights are zero."""
    size = weights.abs()
    total = size.sum(-1, keepdim=True)
    log_shares = size.masked_fill(size == 0, 1.0).log() - total.log()
    return -(size / total * log_shares).sum(-1)


@torch.no_grad()
def selection_geometry(q, k, v, top_n, distance, *weighing):
    """Reference of `nearfar.selection_geometry`: (precision, recall, f_score), each (B, Hq, N); see attention_statistics.

    distance: "norm" or "cosine".
    """
    excesses = {"norm": norm_excess, "cosine": cosine_excess}[distance]

    def geometry(pairs, values):
        weights = pairs.weights(pairs.log_sums()[1])
        return separation(weights, top_k_mask(pairs.masked(), top_n), pairs.keep, values[:, :, None], excesses)

    rows = [parts for _, parts in by_pairs(geometry, q, k, Weighing(*weighing), v)]
    return tuple(torch.cat(parts, -1).flatten(1, 2) for parts in zip(*rows, strict=True))


def norm_excess(weights, values, s):
    """(D_j^2 - |s|^2) / 2 = w_j (w_j |v_j|^2 / 2 - v_j . s) of D_j = |y_j - s|, where small weights do not drown."""
    return weights * (0.5 * weights * values.square().sum(-1)[..., None, :] - s @ values.mT)


def cosine_excess(weights, values, s):
    """-cos(y_j, s), that is D_j - 1 of D_j = 1 - cos(y_j, s); the cosine with a zero is 0."""
    return -weights.sign() * (normalize(s, dim=-1) @ normalize(values, dim=-1).mT)


def separation(weights, selected, visible, values, excesses=norm_excess):
    """(precision, recall, f_score) of the selected keys of each query.

    Args:
        weights: (.., rows, keys) softmax weights. selected, visible: masks that broadcast to them, selected within visible.
        values: (.., keys, Dv).
        excesses: a function of weights, values and s, (.., rows, keys), that has the order of the distances.

    A query that sees a weight or a value that is not finite gets NaN; other queries are not affected.
    """
    finite = values.isfinite().all(-1)[..., None, :]
    unknown = (visible & ~(finite & weights.isfinite())).any(-1)
    values = values.masked_fill(~finite.mT, 0.0)
    s = (weights * selected) @ values
    excess = excesses(weights, values, s)
    outside = visible & ~selected
    infinity = float("inf")
    farthest = excess.masked_fill(~selected, -infinity).amax(-1, keepdim=True)
    nearest = excess.masked_fill(~outside, infinity).amin(-1, keepdim=True)
    count = selected.sum(-1)
    precision = count / (count + (outside & (excess <= farthest)).sum(-1)).to(weights.dtype)
    recall = (selected & ((excess < nearest) | (nearest == infinity))).sum(-1) / count.to(weights.dtype)
    precision, recall = (share.masked_fill(unknown, float("nan")) for share in (precision, recall))
    return precision, recall, 2 * precision * recall / (precision + recall)


def by_pairs(function, q, k, weighing, *values):
    """Yield (positions of the keys, function(pairs, *values of those keys)) for each chunk of queries."""
    sigma, alpha, beta, sink, left, right, locality, top_k, scale = weighing
    heads_kv, compute = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    count = 0 if locality is None else locality.global_tokens  # tokens that every query sees

    rows = {"q": q, "alpha": None if alpha is None else alpha[..., None], "beta": None if beta is None else beta[..., None]}
    rows = {name: group_heads(x.to(compute), heads_kv) for name, x in rows.items() if x is not None}
    heads = {name: x for name, x in (("sigma", sigma), ("sink", sink)) if x is not None}
    heads = {name: per_head(x.to(compute), q.shape[1], heads_kv) for name, x in heads.items()}
    tokens = [x.to(compute).split([count, x.shape[-2] - count], -2) for x in (k, *values)]

    def evaluate(chunk, *arguments):
        own = dict(zip((*rows, *heads), arguments, strict=False))
        of_all, seen = (arguments[len(own) + i : len(own) + i + len(tokens)] for i in (0, len(tokens)))
        k_seen, *v_seen = (torch.cat(parts, -2) for parts in zip(of_all, seen, strict=True))
        q_rows, sigma = own.pop("q"), own.pop("sigma", None)
        scores = group_product(q_rows * scale, k_seen.mT) if sigma is None else distance_scores(q_rows, k_seen, sigma)
        keep = chunk.visible(q.device)
        if top_k is not None:
            keep = top_k_mask(scores.detach().masked_fill(~keep, float("-inf")), top_k)
        return function(Pairs(scores, keep, positions(chunk, count, q.device), **own), *v_seen)

    chunks = row_chunks(q.shape[2], k.shape[2], left, right) if locality is None else row_blocks(locality)
    blocks = [row_blocks_of(x, count) for x in rows.values()]
    key_blocks = split_rows(*(cells for _, cells in tokens))
    for chunk, *own in zip(chunks, *blocks, strict=True):
        shared = *own, *heads.values(), *(of_all for of_all, _ in tokens)
        yield positions(chunk, count, q.device), by_chunk(evaluate, chunk, shared, *key_blocks)


def positions(chunk, count, device):
    """(keys,) positions of the keys of a chunk: the global tokens, then its own."""
    return torch.cat((torch.arange(count, device=device), count + torch.arange(*chunk.keys, device=device)))


def row_blocks_of(x, count):
    """The blocks of CHUNK rows of x, those of the first `count` rows apart."""
    first, rest = x.split([count, x.shape[-2] - count], -2)
    return [*(first.split(CHUNK, -2) if count else ()), *split_rows(rest)[0]]
