"""Krause attention in plain PyTorch (arXiv 2602.11534): differentiable twice, exact in float64, O(N * window) memory."""

import functools
import itertools

import torch

from nearfar.reference.dropout import dropped
from nearfar.reference.pairwise import (
    by_chunk,
    distance_scores,
    group_heads,
    group_product,
    masked_softmax,
    per_head,
    row_chunks,
    sequence_lengths,
    split_rows,
    top_k_mask,
)


def krause_attention(
    q, k, v, sigma, left, right, top_k=None, keep_ties=False, cu_seqlens=None, seed=None, dropout_p=0.0
):
    """Reference of `nearfar.krause_attention`.

    Args:
        q: (B, Hq, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv).
        sigma: (Hq,) or (1,) tensor.
        left, right: inclusive sides of the window, -1 unlimited.
        top_k: how many keys of its window a query keeps, None for all.
        keep_ties: whether it also keeps keys that score as its top_k-th.
        cu_seqlens: (S + 1,) ends of packed sequences, None for one sequence.
        seed, dropout_p: see nearfar.reference.dropout; None for no dropout.

    Returns:
        (B, Hq, N, Dv) in the dtype of q; half precision is computed in float32, distances in float64.
    """
    compute = torch.promote_types(q.dtype, torch.float32)

    def attend(start, offset, chunk, sigma, q_rows, k_seen, v_seen):
        scores = distance_scores(q_rows, k_seen, sigma)
        keep = chunk.visible(q.device)
        if top_k is not None:
            keep = top_k_mask(scores.detach().masked_fill(~keep, float("-inf")), top_k, keep_ties)
        queries, keys = [start - offset + x for x in chunk.rows], [start + x for x in chunk.keys]
        return group_product(dropped(masked_softmax(scores, keep), seed, dropout_p, queries, keys), v_seen)

    sigma = per_head(sigma.to(compute), q.shape[1], k.shape[1])
    tensors = group_heads(q.to(compute), k.shape[1]), k.to(compute), v.to(compute)
    spans = [tensor.split(sequence_lengths(tensor.shape[-2], cu_seqlens), -2) for tensor in tensors]
    outputs = []
    starts = itertools.accumulate((x.shape[-2] for x in spans[1]), initial=0)
    for start, q_seq, k_seq, v_seq in zip(starts, *spans, strict=False):
        attend_at = functools.partial(attend, start, k_seq.shape[-2] - q_seq.shape[-2])
        q_blocks, *key_blocks = split_rows(q_seq, k_seq, v_seq)
        for chunk in row_chunks(q_seq.shape[-2], k_seq.shape[-2], left, right):
            outputs.append(by_chunk(attend_at, chunk, (sigma, q_blocks[chunk.block]), *key_blocks))
    return torch.cat(outputs, -2).flatten(1, 2).to(q.dtype)


def krause_attention_step(q, k, v, cache, sigma, top_k=None):
    """Reference of `nearfar.krause_attention_step`. It fills the slots of the new tokens; the caller updates cache.length.

    Args:
        q: (B, Hq, 1, D). k: (B, Hkv, 1, D). v: (B, Hkv, 1, Dv).
        cache: a KrauseCache of W slots.
        sigma: (Hq,) or (1,) tensor.
        top_k: how many of the last W keys a query keeps, None for all.

    Returns:
        (B, Hq, 1, Dv) in the dtype of q, without gradient; half precision is computed in float32, distances in float64.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    heads_kv, window = cache.k.shape[1:3]
    with torch.no_grad():
        position = cache.length.clamp(min=0).long()
        sequence = torch.arange(q.shape[0], device=q.device)
        cache.k[sequence, :, position % window] = k[:, :, 0]
        cache.v[sequence, :, position % window] = v[:, :, 0]

        # Order the keys by position, because position decides ties. The slot of the oldest key depends on the sequence.
        rank = torch.arange(window, device=q.device)
        oldest = (position + 1 - window).clamp(min=0)
        slots = ((oldest[:, None] + rank) % window)[:, None, :, None]
        visible = (rank <= position[:, None])[:, None, None, None]
        keys, values = (x.take_along_dim(slots, 2).to(compute) for x in (cache.k, cache.v))
        values = values.masked_fill(~visible[:, 0].mT, 0.0)  # slots that were never filled may contain NaN

        sigma = per_head(sigma.to(compute), q.shape[1], heads_kv)
        scores = distance_scores(group_heads(q.to(compute), heads_kv), keys, sigma)
        keep = visible if top_k is None else top_k_mask(scores.masked_fill(~visible, float("-inf")), top_k)
        return group_product(masked_softmax(scores, keep), values).flatten(1, 2).to(q.dtype)
