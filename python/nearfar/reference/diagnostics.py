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

from nearfar.reference.pairwise import CHUNK, row_chunks, top_k_mask


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
    rows, mass = [], k.new_zeros((*q.shape[:2], num_keys), dtype=torch.promote_types(q.dtype, torch.float32))
    for scores, visible, first, _ in score_chunks(q, k, sigma, left, right, scale):
        masked = scores.masked_fill(~visible, float("-inf"))
        lse = masked.logsumexp(-1, keepdim=True)
        log_weights = (scores - lse).masked_fill(~visible, 0.0)
        weights = (scores - lse).exp().masked_fill(~visible, 0.0)
        entropy = -(weights * log_weights).sum(-1)
        constant, key = masked.detach(), torch.arange(first, first + scores.shape[-1], device=q.device)
        highest = constant.amax(-1, keepdim=True)
        max_key = key.where(constant == highest, num_keys).amin(-1)
        rows.append((lse.squeeze(-1), entropy, (highest - lse.detach()).exp().squeeze(-1), max_key))
        received = weights.detach().sum(-2)
        mass = mass + pad(received, (first, num_keys - first - received.shape[-1])).flatten(1, 2)
    per_query = (torch.cat(parts, -1).flatten(1, 2) for parts in zip(*rows, strict=True))
    return *per_query, mass


@torch.no_grad()
def selection_geometry(q, k, v, sigma, top_n, left, right, scale):
    """Reference of `nearfar.selection_geometry`: (precision, recall, f_score), each (B, Hq, N); see attention_statistics."""
    values = v.to(torch.promote_types(v.dtype, torch.float32))[:, :, None]
    rows = []
    for scores, visible, first, last in score_chunks(q, k, sigma, left, right, scale):
        masked = scores.masked_fill(~visible, float("-inf"))
        rows.append(separation(masked.softmax(-1), top_k_mask(masked, top_n), visible, values[..., first:last, :]))
    return tuple(torch.cat(parts, -1).flatten(1, 2) for parts in zip(*rows, strict=True))


def separation(weights, selected, visible, values):
    """(precision, recall, f_score) of the selected keys of each query.

    Args:
        weights: (.., rows, keys) softmax weights. selected, visible: masks that broadcast to them, selected within visible.
        values: (.., keys, Dv).

    Distances are compared as excess = (D_j^2 - |s|^2) / 2 = w_j (w_j |v_j|^2 / 2 - v_j . s), where small weights do not drown.
    """
    s = (weights * selected) @ values
    excess = weights * (0.5 * weights * values.square().sum(-1)[..., None, :] - s @ values.mT)
    outside = visible & ~selected
    infinity = float("inf")
    farthest = excess.masked_fill(~selected, -infinity).amax(-1, keepdim=True)
    nearest = excess.masked_fill(~outside, infinity).amin(-1, keepdim=True)
    count = selected.sum(-1)
    precision = count / (count + (outside & (excess <= farthest)).sum(-1)).to(weights.dtype)
    recall = (selected & ((excess < nearest) | (nearest == infinity))).sum(-1) / count.to(weights.dtype)
    return precision, recall, 2 * precision * recall / (precision + recall)


def score_chunks(q, k, sigma, left, right, scale):
    """Yield (scores, visible, first, last) for each chunk of queries: scores (B, Hkv, group, rows, keys) with the keys from
    `first` to `last` - 1, and the mask of those that each query sees."""
    heads_kv, num_keys = k.shape[1:3]
    compute = torch.promote_types(q.dtype, torch.float32)
    # Query heads of a group share their key head by broadcasting: (B, Hkv, group, N, D) against (B, Hkv, 1, M, D).
    queries = q.to(compute).unflatten(1, (heads_kv, q.shape[1] // heads_kv))
    # Blocks by split, not by slices: the gradient of a slice is as long as what it was cut from.
    q_blocks, k_blocks = queries.split(CHUNK, -2), k.to(compute)[:, :, None].split(CHUNK, -2)
    if sigma is not None:
        inverse_variance = sigma.to(compute).expand(q.shape[1]).reshape(heads_kv, -1, 1, 1).reciprocal().square()
    for block, first, last, visible in row_chunks(q.shape[2], num_keys, left, right):
        q_rows, k_seen = q_blocks[block], torch.cat(k_blocks[first:last], -2)
        scores = q_rows @ k_seen.mT
        if sigma is None:
            scores = scores * scale
        else:
            half_squares = 0.5 * k_seen.square().sum(-1)[..., None, :] + 0.5 * q_rows.square().sum(-1)[..., None]
            scores = (scores - half_squares) * inverse_variance
        yield scores, visible.to(q.device).expand(scores.shape), first * CHUNK, min(last * CHUNK, num_keys)
