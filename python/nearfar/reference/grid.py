"""Krause, softmax and affine attention on grids in plain PyTorch: differentiable twice, O(N * span) memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nearfar.localities import Grid
from nearfar.reference.affine import sink_softmax
from nearfar.reference.dropout import dropped
from nearfar.reference.pairwise import (
    CHUNK,
    by_chunk,
    distance_scores,
    group_heads,
    group_product,
    masked_softmax,
    per_head,
    split_rows,
    top_k_mask,
)


class Rows(NamedTuple):
    """A block of queries and the blocks of cells, from `first` to `last` - 1, that they may see besides the global tokens."""

    locality: Grid
    queries: tuple[int, int]  # (begin, end) positions in the sequence
    first: int
    last: int
    keys: tuple[int, int]  # (begin, end) cells of the blocks, not counting global tokens

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of the queries, (rows, 1), and of the keys, (1, keys), global tokens first."""
        count = self.locality.global_tokens
        keys = torch.cat((torch.arange(count, device=device), count + torch.arange(*self.keys, device=device)))
        return torch.arange(*self.queries, device=device)[:, None], keys[None, :]

    def dropped(self, weights: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
        """The weights after dropout, see nearfar.reference.dropout."""
        count = self.locality.global_tokens
        return dropped(weights, seed, dropout_p, self.queries, (0, count), [count + key for key in self.keys])

    def visible(self, device: torch.device) -> Tensor:
        """The (rows, keys) mask of the allowed pairs."""
        return self.locality.visible(*self.positions(device))


def row_blocks(locality: Grid) -> Iterator[Rows]:
    """Yield the Rows of each CHUNK of global tokens, then of each CHUNK of cells."""
    count, cells = locality.global_tokens, locality.num_tokens - locality.global_tokens
    for start in range(0, count, CHUNK):
        yield Rows(locality, (start, min(start + CHUNK, count)), 0, -(-cells // CHUNK), (0, cells))
    for start in range(0, cells, CHUNK):
        stop = min(start + CHUNK, cells)
        begin, end = locality.key_span(start, stop)
        first, last = begin // CHUNK, -(-end // CHUNK)
        yield Rows(locality, (count + start, count + stop), first, last, (first * CHUNK, min(last * CHUNK, cells)))


def attend_by_rows(
    attend: Callable[..., Tensor], locality: Grid, shared: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Call attend(rows, *shared, q of the rows, k and v that they may see) for all Rows; concatenate along the queries.

    q: (B, Hkv, group, N, D). k: (B, Hkv, N, D). v: (B, Hkv, N, Dv).
    """
    count = locality.global_tokens
    sizes = [count, q.shape[-2] - count]
    (q_global, q_cells), (k_global, k_cells), (v_global, v_cells) = (x.split(sizes, -2) for x in (q, k, v))
    q_blocks, k_blocks, v_blocks = split_rows(q_cells, k_cells, v_cells)
    q_blocks = [*(q_global.split(CHUNK, -2) if count else ()), *q_blocks]

    def with_global_keys(rows: Rows, *arguments: Tensor) -> Tensor:
        *first, k_first, v_first, k_seen, v_seen = arguments
        return attend(rows, *first, torch.cat((k_first, k_seen), -2), torch.cat((v_first, v_seen), -2))

    outputs = []
    for rows, q_rows in zip(row_blocks(locality), q_blocks, strict=True):
        outputs.append(by_chunk(with_global_keys, rows, (*shared, q_rows, k_global, v_global), k_blocks, v_blocks))
    return torch.cat(outputs, -2)


def krause_attention(q, k, v, sigma, locality, top_k=None, keep_ties=False, bias=None, seed=None, dropout_p=0.0):
    """Reference of `nearfar.krause_attention` on a grid.

    Args:
        q: (B, Hq, N, D). k: (B, Hkv, N, D). v: (B, Hkv, N, Dv).
        sigma: (Hq,) or (1,) tensor.
        locality: a GridNeighborhood or a ShiftedWindow of N tokens.
        top_k: how many of the keys in sight a query keeps, None for all.
        keep_ties: whether it also keeps keys that score as its top_k-th.
        bias: (Hq, locality.bias_size), added to the scores before the selection; None for none.
        seed, dropout_p: see nearfar.reference.dropout; None for no dropout.

    Returns:
        (B, Hq, N, Dv) in the dtype of q; half precision is computed in float32, distances in float64.
    """
    compute, heads_kv = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    biases = () if bias is None else (bias.to(compute).unflatten(0, (heads_kv, -1)),)

    def attend(rows, sigma, *arguments):
        *biases, q_rows, k_seen, v_seen = arguments
        scores = distance_scores(q_rows, k_seen, sigma)
        for table in biases:
            scores = scores + table[..., locality.bias_index(*rows.positions(q.device))]
        keep = rows.visible(q.device)
        if top_k is not None:
            keep = top_k_mask(scores.detach().masked_fill(~keep, float("-inf")), top_k, keep_ties)
        return group_product(rows.dropped(masked_softmax(scores, keep), seed, dropout_p), v_seen)

    shared = per_head(sigma.to(compute), q.shape[1], heads_kv), *biases
    tensors = group_heads(q.to(compute), heads_kv), k.to(compute), v.to(compute)
    return attend_by_rows(attend, locality, shared, *tensors).flatten(1, 2).to(q.dtype)


def affine_attention(q, k, v, alpha, beta, sink, locality, scale, seed=None, dropout_p=0.0):
    """Reference of `nearfar.affine_attention` on a grid, and with alpha and beta None of `nearfar.softmax_attention`.

    Args:
        q: (B, Hq, N, D). k: (B, Hkv, N, D). v: (B, Hkv, N, Dv).
        alpha: (B, Hq, N), None for 1. beta: (B, Hq, N), None for 0.
        sink: (Hq,) logits in the denominator, None for none.
        locality: a GridNeighborhood or a ShiftedWindow of N tokens.
        seed, dropout_p: of the softmax weights, see nearfar.reference.dropout; None for no dropout.

    Returns:
        (B, Hq, N, Dv) in the dtype of q; half precision is computed in float32.
    """
    compute, heads_kv = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    sinks = () if sink is None else (sink.to(compute).reshape(heads_kv, -1, 1, 1),)

    def attend(rows, *arguments):
        *sinks, q_rows, k_seen, v_seen = arguments
        visible = rows.visible(q.device)
        weights = sink_softmax(group_product(q_rows, k_seen.mT), visible, *sinks)
        u = group_product(rows.dropped(weights, seed, dropout_p), v_seen)
        sums = (visible.to(v_seen.dtype) @ v_seen)[:, :, None].expand_as(u)
        return torch.cat((u, sums), -1)

    tensors = group_heads(q.to(compute), heads_kv) * scale, k.to(compute), v.to(compute)
    o, sums = attend_by_rows(attend, locality, sinks, *tensors).tensor_split((v.shape[3],), -1)
    if alpha is not None:
        o = o * group_heads(alpha.to(compute), heads_kv)[..., None]
    if beta is not None:
        o = o + group_heads(beta.to(compute), heads_kv)[..., None] * sums
    return o.flatten(1, 2).to(q.dtype)
