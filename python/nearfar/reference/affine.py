"""Affine-scaled and softmax attention in plain PyTorch (arXiv 2602.23057): differentiable twice, O(N * window) memory.

    o_i = alpha_i sum_j p_ij v_j + beta_i c_i,    p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij)),    s_ij = scale q_i . k_j

with j over the keys that query i may see and c_i the sum of their values, computed without a second N x N product.
"""

import functools

import torch
from torch.nn.functional import pad

from nearfar.reference.dropout import dropped
from nearfar.reference.pairwise import (
    by_chunk,
    group_heads,
    group_product,
    masked_softmax,
    row_chunks,
    sequence_lengths,
    split_rows,
)


def affine_attention(
    q, k, v, alpha, beta, sink, left, right, scale, cu_seqlens=None, cu_seqlens_k=None, seed=None, dropout_p=0.0
):
    """Reference of `nearfar.affine_attention`, and with alpha and beta None of `nearfar.softmax_attention`.

    Args:
        q: (B, Hq, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv).
        alpha: (B, Hq, N), None for 1. beta: (B, Hq, N), None for 0.
        sink: (Hq,) logits in the denominator, None for none.
        left, right: inclusive sides of the window, -1 unlimited.
        cu_seqlens: (S + 1,) ends of packed sequences, None for one sequence.
        cu_seqlens_k: those of the keys and values, None for the same.
        seed, dropout_p: of the p_ij, see nearfar.reference.dropout; None for no dropout.

    Returns:
        (B, Hq, N, Dv) in the dtype of q; half precision is computed in float32. A query that sees no key returns zeros.
    """
    heads_kv = k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    sinks = () if sink is None else (sink.to(compute).reshape(heads_kv, -1, 1, 1),)

    def attend(first_query, first_key, chunk, q_rows, *arguments):
        *sinks, k_seen, v_seen = arguments
        weights = sink_softmax(group_product(q_rows, k_seen.mT), chunk.visible(q.device), *sinks)
        queries, keys = [first_query + x for x in chunk.rows], [first_key + x for x in chunk.keys]
        return group_product(dropped(weights, seed, dropout_p, queries, keys), v_seen)

    tensors = group_heads(q.to(compute), heads_kv) * scale, k.to(compute), v.to(compute)
    ends_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    ends = cu_seqlens, ends_k, ends_k
    sequences = [tensor.split(sequence_lengths(tensor.shape[-2], x), -2) for tensor, x in zip(tensors, ends, strict=True)]
    outputs, sums, end, first_key = [], [], 0, 0
    for q_seq, k_seq, v_seq in zip(*sequences, strict=True):
        end += q_seq.shape[-2]
        # Queries are the last positions among their keys: position 0 is that of query end - len(k_seq).
        attend_at = functools.partial(attend, end - k_seq.shape[-2], first_key)
        first_key += k_seq.shape[-2]
        q_blocks, *key_blocks = split_rows(q_seq, k_seq, v_seq)
        for chunk in row_chunks(q_seq.shape[-2], k_seq.shape[-2], left, right):
            outputs.append(by_chunk(attend_at, chunk, (q_blocks[chunk.block], *sinks), *key_blocks))
        if beta is not None:
            sums.append(window_sums(v_seq, q_seq.shape[-2], left, right)[:, :, None])
    o = torch.cat(outputs, -2)
    if alpha is not None:
        o = o * group_heads(alpha.to(compute), heads_kv)[..., None]
    if beta is not None:
        o = o + group_heads(beta.to(compute), heads_kv)[..., None] * torch.cat(sums, -2)
    return o.flatten(1, 2).to(q.dtype)


def sink_softmax(scores, visible, sink=None):
    """Weights (B, Hkv, group, rows, keys). A sink is one more key that every query sees; its weight is dropped."""
    if sink is None:
        return masked_softmax(scores, visible)
    # Concatenated, not padded: Inductor (torch 2.13) generates invalid C++ for padding a bool tensor.
    every = torch.ones_like(visible[..., :1])
    scores = torch.cat((scores, sink.expand(*scores.shape[:-1], 1)), -1)
    return masked_softmax(scores, torch.cat((visible, every), -1))[..., :-1]


def window_sums(v, num_queries, left, right):
    """Sum of v (.., M, Dv) over the keys that each query may see: (.., num_queries, Dv), in O(N + M) additions.

    Padded with zeros, the window of query i is rows i to i + size - 1. Split into blocks of `size` rows, a window is the end of
    one block and the beginning of the next. So a sum contains only values that its query sees; a difference of prefix sums over
    all keys would contain rounding errors of the others.
    """
    num_keys = v.shape[-2]
    farthest = max(num_keys - 1, 0), max(num_queries - 1, 0)  # distance before the last query, and after the first
    left, right = (reach if side < 0 else min(side, reach) for side, reach in zip((left, right), farthest, strict=True))
    if (left, right) == farthest:
        return v.sum(-2, keepdim=True).expand(*v.shape[:-2], num_queries, v.shape[-1])
    size = left + right + 1
    rows = num_queries + size - 1
    before = num_queries - num_keys + left  # rows of padding; negative if no query sees the first keys
    padded = pad(v, (0, 0, before, -rows % size + rows - before - num_keys))
    blocks = padded.unflatten(-2, (-(-rows // size), size))
    begun = blocks.cumsum(-2).flatten(-3, -2)
    ended = blocks.flip(-2).cumsum(-2).flip(-2).flatten(-3, -2)
    whole = torch.arange(num_queries, device=v.device)[:, None] % size == 0
    return ended[..., :num_queries, :] + begun[..., size - 1 : rows, :].masked_fill(whole, 0)
