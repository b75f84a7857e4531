"""Attention of a rank's queries to keys that lie on several ranks: the operators run on [halo, own keys, halo]."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from nearfar.distributed.exchange import reaches, with_halo
from nearfar.distributed.shards import Shards


def attend_with_halo(
    operator: Callable[..., torch.Tensor],
    shards: Shards,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int,
    right: int,
    per_query: tuple[torch.Tensor | None, ...] = (),
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """operator(q, k, v, *per_query, cu_seqlens) for a rank's queries (B, Hq, n, D), and all keys that they see.

    Operators take the queries for the last positions. Keys after the last query therefore get queries of zeros, and in packed
    calls, where each key has its query, those before the first do, too. Their rows are dropped, and they have no gradient.

    Args:
        operator: returns (B, Hq, N, Dv).
        k, v: this rank's.
        left, right: sides of the window, -1 unlimited.
        per_query: tensors (B, Hq, n).
        cu_seqlens: (S + 1,) int32, ends of packed sequences along all shards.
    """
    spans = reaches(shards, left, right)
    (start, end), (first, last) = shards.spans[shards.rank], spans[shards.rank]
    k, v = with_halo(shards, spans, k, v)
    ahead = 0 if left < 0 and right < 0 else last - end  # queries that see every key have no position
    back = 0
    if cu_seqlens is not None:
        back, cu_seqlens = start - first, cu_seqlens.clamp(first, last) - first
    if back or ahead:
        q = pad(q, (0, 0, back, ahead))
        per_query = tuple(None if x is None else pad(x, (back, ahead)) for x in per_query)
    o = operator(q, k, v, *per_query, cu_seqlens)
    return o.narrow(2, back, end - start) if back or ahead else o


def check_window(left: int, right: int, cu_seqlens: Any, count: int) -> None:
    """Raise a ValueError unless packed sequences have a window that ends."""
    if cu_seqlens is not None and count > 1 and (left < 0 or right < 0):
        raise ValueError(f"cu_seqlens: sequences that cross ranks need a window that ends on both sides, got ({left}, {right})")
