"""Krause attention in plain PyTorch (arXiv 2602.11534): differentiable twice, exact in float64, O(N * window) memory."""

import torch

from nearfar.reference.pairwise import masked_softmax, row_chunks, sequences, top_k_mask


def krause_attention(q, k, v, sigma, left, right, top_k=None, cu_seqlens=None):
    """Reference of `nearfar.krause_attention`.

    Args:
        q: (B, Hq, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv).
        sigma: (Hq,) or (1,) tensor.
        left, right: inclusive sides of the window, -1 unlimited.
        top_k: how many keys of its window a query keeps, None for all.
        cu_seqlens: (S + 1,) ends of packed sequences, None for one sequence.

    Returns:
        (B, Hq, N, Dv) in the dtype of q; half precision is computed in float32.
    """
    batch, heads_q, num_queries, width = q.shape
    heads_kv, num_keys = k.shape[1:3]
    compute = torch.promote_types(q.dtype, torch.float32)
    # Query heads of a group share their key head by broadcasting: (B, Hkv, group, N, D) against (B, Hkv, 1, M, D).
    grouped = q.to(compute).reshape(batch, heads_kv, heads_q // heads_kv, num_queries, width)
    keys, values = k.to(compute)[:, :, None], v.to(compute)[:, :, None]
    inverse_variance = (
        sigma.to(compute).expand(heads_q).reshape(heads_kv, heads_q // heads_kv, 1, 1).reciprocal().square()
    )

    chunks = []
    for query_span, key_span in sequences(num_queries, num_keys, cu_seqlens):
        q_seq, k_seq, v_seq = grouped[..., query_span, :], keys[..., key_span, :], values[..., key_span, :]
        half_squares = 0.5 * k_seq.square().sum(-1)[..., None, :]
        for rows, cols, visible in row_chunks(q_seq.shape[-2], k_seq.shape[-2], left, right):
            visible = visible.to(q.device)
            products = q_seq[..., rows, :] @ k_seq[..., cols, :].transpose(-1, -2)
            scores = (products - half_squares[..., cols]) * inverse_variance
            keep = visible.expand(scores.shape)
            if top_k is not None:
                keep = top_k_mask(scores.detach().masked_fill(~visible, float("-inf")), top_k)
            chunks.append(masked_softmax(scores, keep) @ v_seq[..., cols, :])
    return torch.cat(chunks, -2).reshape(batch, heads_q, num_queries, v.shape[-1]).to(q.dtype)
