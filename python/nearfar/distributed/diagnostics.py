"""Statistics of attention whose sequence is sharded over ranks."""

from collections.abc import Sequence

import torch

from nearfar.distributed.exchange import reaches, summed_on_owners, with_halo
from nearfar.distributed.shards import Argument, Group, agree
from nearfar.localities import SlidingWindow
from nearfar.ops import diagnostics as ops
from nearfar.ops.diagnostics import AttentionStatistics
from nearfar.runtime.dispatch import Backend


def attention_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    sigma: float | torch.Tensor | None = None,
    locality: SlidingWindow | None = None,
    backend: Backend = "auto",
    group: Group = None,
    lengths: Sequence[int] | None = None,
) -> AttentionStatistics:
    """Compute `nearfar.attention_statistics` of a sequence whose shards lie on the ranks of a group.

    Rank 0 has the first tokens, rank 1 those after them, and so on. Ranks send the keys that others' queries see; the weight
    that these keys receive returns to their rank, and is added in the order of the ranks.

    Args:
        q: (B, Hq, n, D), the n tokens of this rank.
        k: (B, Hkv, n, D).
        causal, scale, sigma, backend: as for `nearfar.attention_statistics`.
        locality: None or a SlidingWindow; on more than one rank, queries see no key after their own, or all keys.
        group: a ProcessGroup or a DeviceMesh of one dimension, whose ranks all call; None for the default group.
        lengths: the tokens of each rank's shard, the same list on every rank; None if all have as many.

    Returns:
        AttentionStatistics of this rank's queries and, for key_mass (B, Hq, n), of its keys. max_key counts from the first
        token of rank 0. lse and entropy are differentiable once in q, k and sigma; the gradient of sigma is a part on each
        rank.

    Raises:
        TypeError: an argument has the wrong type or dtype on some rank.
        ValueError: shapes, devices or values do not fit on some rank, ranks disagree, or the backend cannot serve the call.
    """
    left, right = (locality.left, locality.right) if isinstance(locality, SlidingWindow) else (-1, -1)
    right = 0 if causal else right

    def check(count: int) -> None:
        call = ops.prepare_attention_statistics(q, k, causal=causal, scale=scale, sigma=sigma, locality=locality)
        call.backends.served(backend, call.q)
        if count > 1 and right != 0 and (left, right) != (-1, -1):
            raise ValueError(
                f"locality: on more than one rank queries see no key after their own, or all keys; got ({left}, {right})"
            )

    number = None if isinstance(sigma, torch.Tensor) else sigma
    arguments = {"q": Argument(q), "k": Argument(k)}
    if isinstance(sigma, torch.Tensor):
        arguments["sigma"] = Argument(sigma, sharded=False)
    options = {"causal": causal, "scale": scale, "sigma": number, "locality": locality, "backend": backend}
    shards = agree("attention_statistics", check, arguments, options, group, lengths)
    spans = reaches(shards, left, right)
    (k,) = with_halo(shards, spans, k)
    found = ops.attention_statistics(q, k, causal=causal, scale=scale, sigma=sigma, locality=locality, backend=backend)
    mass = summed_on_owners(shards, spans, found.key_mass[..., None])[..., 0]
    return found._replace(max_key=found.max_key + spans[shards.rank][0], key_mass=mass)
