"""Affine-scaled and softmax attention of a sequence that is sharded over ranks."""

from collections.abc import Sequence

import torch

from nearfar.distributed.attend import attend_with_halo, check_window
from nearfar.distributed.shards import Argument, Group, agree, check_packed
from nearfar.localities import Locality, SlidingWindow
from nearfar.ops import affine as ops
from nearfar.runtime.dispatch import Backend


def affine_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor | None,
    beta: torch.Tensor | None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    locality: Locality | None = None,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
    group: Group = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Compute `nearfar.affine_attention` (arXiv 2602.23057) of a sequence whose shards lie on the ranks of a group.

    Rank 0 has the first tokens, rank 1 those after them, and so on. Ranks send the keys and values that others' queries see: a
    halo for a window, those of all earlier ranks when causal without a window, otherwise all. In the backward their gradients
    return, which are added in the order of the ranks.

    Args:
        q: (B, Hq, n, D), the n tokens of this rank.
        k: (B, Hkv, n, D). v: (B, Hkv, n, Dv).
        alpha, beta: (B, Hq, n), as for `nearfar.affine_attention`.
        causal, window_size, scale, sink, backend: as for `nearfar.affine_attention`; sink is the same on every rank.
        locality: a SlidingWindow in place of window_size and causal; a group of one takes grids, too.
        cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed along the shards of all ranks, the same on every rank.
            It needs a window with a limit on both sides.
        group: a ProcessGroup or a DeviceMesh of one dimension, whose ranks all call; None for the default group.
        lengths: the tokens of each rank's shard, the same list on every rank; None if all have as many.

    Returns:
        (B, Hq, n, Dv) in the dtype of q, differentiable once in q, k, v, alpha, beta and sink. The gradient of sink is a part
        on each rank: their sum over ranks is the gradient.

    Raises:
        TypeError: an argument has the wrong type or dtype on some rank.
        ValueError: shapes, devices or values do not fit on some rank, ranks disagree, or the backend cannot serve the call.
    """
    return _attend(
        "affine_attention", q, k, v, alpha, beta, causal, window_size, locality, scale, sink, cu_seqlens, backend, group,
        lengths,
    )


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    locality: Locality | None = None,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
    group: Group = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Compute `nearfar.softmax_attention` (arXiv 1706.03762) of a sequence whose shards lie on the ranks of a group.

    It is `nearfar.distributed.affine_attention` with alpha = 1 and beta = 0.

    Args:
        q: (B, Hq, n, D), the n tokens of this rank.
        k: (B, Hkv, n, D). v: (B, Hkv, n, Dv).
        causal, window_size, locality, scale, sink, cu_seqlens, backend, group, lengths: as for
            `nearfar.distributed.affine_attention`.

    Returns:
        (B, Hq, n, Dv) in the dtype of q, differentiable once in q, k, v and sink.

    Raises:
        TypeError, ValueError: as `nearfar.distributed.affine_attention`.
    """
    return _attend(
        "softmax_attention", q, k, v, None, None, causal, window_size, locality, scale, sink, cu_seqlens, backend, group,
        lengths,
    )


def _attend(
    operator: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor | None,
    beta: torch.Tensor | None,
    causal: bool,
    window_size: tuple[int, int],
    locality: Locality | None,
    scale: float | None,
    sink: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    backend: Backend,
    group: Group,
    lengths: Sequence[int] | None,
) -> torch.Tensor:
    options = dict(causal=causal, window_size=window_size, locality=locality, scale=scale)

    def check(count: int) -> None:
        if count > 1 and not (locality is None or isinstance(locality, SlidingWindow)):
            raise ValueError(f"locality must be None or a SlidingWindow on more than one rank, got {type(locality).__name__}")
        call = ops.prepare_affine_attention(q, k, v, alpha, beta, sink=sink, **options)  # type: ignore[arg-type]
        call.backends.served(backend, call.q)
        if cu_seqlens is not None:
            check_window(call.left, call.right, cu_seqlens, count)
            check_packed(cu_seqlens, q, lengths, count)

    arguments = {"q": Argument(q), "k": Argument(k), "v": Argument(v), "alpha": Argument(alpha), "beta": Argument(beta)}
    arguments |= {name: Argument(x, sharded=False) for name, x in {"sink": sink, "cu_seqlens": cu_seqlens}.items()}
    shards = agree(operator, check, arguments, {**options, "backend": backend}, group, lengths)

    def attend(*tensors: torch.Tensor | None) -> torch.Tensor:
        *rows, cu_seqlens = tensors
        return ops.affine_attention(*rows, **options, sink=sink, cu_seqlens=cu_seqlens, backend=backend)  # type: ignore

    if shards.size == 1:
        return attend(q, k, v, alpha, beta, cu_seqlens)
    left, right = (locality.left, locality.right) if isinstance(locality, SlidingWindow) else window_size
    return attend_with_halo(attend, shards, q, k, v, left, 0 if causal else right, (alpha, beta), cu_seqlens)
