"""Krause attention of a sequence that is sharded over ranks."""

from collections.abc import Sequence

import torch

from nearfar.distributed.attend import attend_with_halo, check_window
from nearfar.distributed.shards import Argument, Group, agree, check_packed
from nearfar.localities import UNLIMITED, Locality, SlidingWindow
from nearfar.ops import krause as ops
from nearfar.runtime.dispatch import Backend


def krause_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: float | torch.Tensor,
    locality: Locality | None = None,
    *,
    top_k: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    backend: Backend = "auto",
    group: Group = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Compute `nearfar.krause_attention` (arXiv 2602.11534) of a sequence whose shards lie on the ranks of a group.

    Rank 0 has the first tokens, rank 1 those after them, and so on. Ranks send the keys and values that others' queries see,
    and in the backward their gradients return, which are added in the order of the ranks.

    Args:
        q: (B, Hq, n, D), the n tokens of this rank.
        k: (B, Hkv, n, D). v: (B, Hkv, n, Dv).
        locality: None for all keys, or a SlidingWindow; a group of one takes grids, too.
        sigma, top_k, bias, backend: as for `nearfar.krause_attention`; sigma is the same on every rank.
        cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed along the shards of all ranks, the same on every rank.
            It needs a window with a limit on both sides.
        group: a ProcessGroup or a DeviceMesh of one dimension, whose ranks all call; None for the default group.
        lengths: the tokens of each rank's shard, the same list on every rank; None if all have as many.

    Returns:
        (B, Hq, n, Dv) in the dtype of q, differentiable once in q, k, v and a tensor sigma. The gradient of sigma is a part on
        each rank: their sum over ranks is the gradient.

    Raises:
        TypeError: an argument has the wrong type or dtype on some rank.
        ValueError: shapes, devices or values do not fit on some rank, ranks disagree, or the backend cannot serve the call.
    """
    left, right = (locality.left, locality.right) if isinstance(locality, SlidingWindow) else (UNLIMITED, UNLIMITED)

    def check(count: int) -> None:
        if count > 1 and not (locality is None or isinstance(locality, SlidingWindow)):
            raise ValueError(f"locality must be None or a SlidingWindow on more than one rank, got {type(locality).__name__}")
        call = ops.prepare(q, k, v, sigma, locality, top_k=top_k, bias=bias)
        call.backends.served(backend, call.q)
        if cu_seqlens is not None:
            check_window(left, right, cu_seqlens, count)
            check_packed(cu_seqlens, q, lengths, count)

    shared = {"sigma": sigma if isinstance(sigma, torch.Tensor) else None, "bias": bias, "cu_seqlens": cu_seqlens}
    arguments = {"q": Argument(q), "k": Argument(k), "v": Argument(v)}
    arguments |= {name: Argument(x, sharded=False) for name, x in shared.items()}
    number = None if isinstance(sigma, torch.Tensor) else sigma
    options = {"sigma": number, "locality": locality, "top_k": top_k, "backend": backend}
    shards = agree("krause_attention", check, arguments, options, group, lengths)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        return ops.krause_attention(
            q, k, v, sigma, locality, top_k=top_k, cu_seqlens=cu_seqlens, bias=bias, backend=backend
        )

    if shards.size == 1:
        return attend(q, k, v, cu_seqlens)
    return attend_with_halo(attend, shards, q, k, v, left, right, cu_seqlens=cu_seqlens)
