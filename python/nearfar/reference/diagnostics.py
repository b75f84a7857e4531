"""Streamed diagnostics of attention in plain PyTorch, O(N * window) memory by chunks of rows.

With the softmax P of scores s_ij = scale q_i . k_j, or by distance s_ij = -|q_i - k_j|^2 / (2 sigma^2), over the keys j that
query i may see:

    lse_i = log sum_j exp(s_ij),   entropy_i = -sum_j P_ij log P_ij,   key_mass_j = sum_i P_ij

and the selection geometry of arXiv 2602.01893, with y_j = P_ij v_j, S the top_n keys by weight, s = sum_{j in S} y_j and
D_j = |y_j - s|:

    precision = n / (n + #{j not in S: D_j <= max_{j in S} D_j}),   recall = #{j in S: D_j < min_{j not in S} D_j} / n

The queries are the last positions, and every query sees a key.
"""

import torch
from torch.nn.functional import pad

from nearfar.reference.pairwise import (
    by_chunk,
    distance_scores,
    group_heads,
    group_product,
    per_head,
    row_chunks,
    split_rows,
    top_k_mask,
)


def attention_statistics(q, k, sigma, left, right, scale):
    """Reference of `nearfar.attention_statistics`: (lse, entropy, max_weight, max_key, key_mass).

    Args:
        q: (B, Hq, N, D). k: (B, Hkv, M, D).
        sigma: (Hq,) or (1,) tensor for scores by distance, None for scaled dot products.
        left, right: inclusive sides of the window, -1 unlimited.
        scale: of the dot products.

    lse and entropy are differentiable twice; the others are constants.
    """
    num_keys = k.shape[2]

    def statistics(visible, first, scores):
        if not scores.shape[-1]:  # no keys, and therefore no queries; a maximum over nothing would raise
            none = scores.sum(-1)
            return none, none, none.detach(), none.detach().long(), scores.detach().sum(-2)
        masked = scores.masked_fill(~visible, float("-inf"))
        lse = masked.logsumexp(-1, keepdim=True)
        # Masked before the exp, which overflows where a hidden key scores far above lse.
        log_weights = (scores - lse).masked_fill(~visible, 0.0)
        weights = log_weights.exp().masked_fill(~visible, 0.0)
        entropy = -(weights * log_weights).sum(-1)
        constant, key = masked.detach(), torch.arange(first, first + scores.shape[-1], device=q.device)
        highest = constant.amax(-1, keepdim=True)
        max_key = key.where((constant == highest) | constant.isnan(), num_keys).amin(-1)
        max_weight = (highest - lse.detach()).exp().squeeze(-1)
        return lse.squeeze(-1), entropy, max_weight, max_key, weights.detach().sum(-2)

    rows, mass = [], k.new_zeros((*q.shape[:2], num_keys), dtype=torch.promote_types(q.dtype, torch.float32))
    for chunk, (*parts, received) in by_scores(statistics, q, k, sigma, left, right, scale):
        rows.append(parts)
        first, last = chunk.keys
        mass = mass + pad(received, (first, num_keys - last)).flatten(1, 2)
    per_query = (torch.cat(parts, -1).flatten(1, 2) for parts in zip(*rows, strict=True))
    return *per_query, mass


@torch.no_grad()
def selection_geometry(q, k, v, sigma, top_n, left, right, scale):
    """Reference of `nearfar.selection_geometry`: (precision, recall, f_score), each (B, Hq, N); see attention_statistics."""

    def geometry(visible, _, scores, values):
        masked = scores.masked_fill(~visible, float("-inf"))
        return separation(masked.softmax(-1), top_k_mask(masked, top_n), visible, values[:, :, None])

    rows = [parts for _, parts in by_scores(geometry, q, k, sigma, left, right, scale, v)]
    return tuple(torch.cat(parts, -1).flatten(1, 2) for parts in zip(*rows, strict=True))


def separation(weights, selected, visible, values):
    """(precision, recall, f_score) of the selected keys of each query.

    Args:
        weights: (.., rows, keys) softmax weights. selected, visible: masks that broadcast to them, selected within visible.
        values: (.., keys, Dv).

    Distances are compared as excess = (D_j^2 - |s|^2) / 2 = w_j (w_j |v_j|^2 / 2 - v_j . s), which keeps the digits of small
    weights. A query that sees a weight or a value that is not finite gets NaN; other queries are not affected.
    """
    finite = values.isfinite().all(-1)[..., None, :]
    unknown = (visible & ~(finite & weights.isfinite())).any(-1)
    values = values.masked_fill(~finite.mT, 0.0)
    s = (weights * selected) @ values
    excess = weights * (0.5 * weights * values.square().sum(-1)[..., None, :] - s @ values.mT)
    outside = visible & ~selected
    infinity = float("inf")
    farthest = excess.masked_fill(~selected, -infinity).amax(-1, keepdim=True)
    nearest = excess.masked_fill(~outside, infinity).amin(-1, keepdim=True)
    count = selected.sum(-1)
    precision = count / (count + (outside & (excess <= farthest)).sum(-1)).to(weights.dtype)
    recall = (selected & ((excess < nearest) | (nearest == infinity))).sum(-1) / count.to(weights.dtype)
    precision, recall = (share.masked_fill(unknown, float("nan")) for share in (precision, recall))
    return precision, recall, 2 * precision * recall / (precision + recall)


def by_scores(function, q, k, sigma, left, right, scale, *values):
    """Yield (chunk, function(visible, first, scores, *values)) for each chunk of queries.

    visible: the (rows, keys) mask. first: the index of the first key. scores: (B, Hkv, group, rows, keys). values: the rows of
    each of `values` for these keys.
    """
    heads_kv = k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    parameters = () if sigma is None else (per_head(sigma.to(compute), q.shape[1], heads_kv),)

    def evaluate(chunk, q_rows, *arguments):
        *sigma, k_seen = arguments[: len(parameters) + 1]
        scores = distance_scores(q_rows, k_seen, *sigma) if sigma else group_product(q_rows * scale, k_seen.mT)
        return function(chunk.visible(q.device), chunk.keys[0], scores, *arguments[len(parameters) + 1 :])

    (q_blocks,) = split_rows(group_heads(q.to(compute), heads_kv))
    key_blocks = split_rows(*(tensor.to(compute) for tensor in (k, *values)))
    for chunk in row_chunks(q.shape[2], k.shape[2], left, right):
        yield chunk, by_chunk(evaluate, chunk, (q_blocks[chunk.block], *parameters), *key_blocks)
