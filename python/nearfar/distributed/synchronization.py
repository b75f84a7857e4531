"""Selective synchronization attention and its order parameter, of a sequence that is sharded over ranks."""

from collections.abc import Sequence
from typing import Any

import torch

from nearfar.distributed.exchange import exchange_states, reaches, with_halo
from nearfar.distributed.shards import Argument, Group, agree
from nearfar.ops import synchronization as ops
from nearfar.reference.synchronization import modulus
from nearfar.runtime import checks
from nearfar.runtime.dispatch import Backend


def order_parameter(
    theta: torch.Tensor,
    *,
    causal: bool = False,
    backend: Backend = "auto",
    group: Group = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Compute `nearfar.order_parameter` (arXiv 2602.14445) of oscillators whose shards lie on the ranks of a group.

    Each rank sums exp(i theta) over its tokens, and the ranks gather the sums: those of all ranks, or of earlier ones when
    causal.

    Args:
        theta: (B, H, n, D) phases of this rank's n tokens in radians, any floating dtype, computed in float32 (float64 in
            float64).
        causal: average over the tokens of all ranks up to token i.
        backend: of a group of one. On more ranks plain PyTorch computes, which keeps 3 numbers in float32 for each phase.
        group: a ProcessGroup or a DeviceMesh of one dimension, whose ranks all call; None for the default group.
        lengths: the tokens of each rank's shard, the same list on every rank; None if all have as many.

    Returns:
        (B, H), the same on every rank, or (B, H, n) when causal, float32 (float64 for float64 phases); differentiable once.

    Raises:
        TypeError: theta is not a floating-point tensor on some rank.
        ValueError: theta does not have 4 dimensions on some rank, ranks disagree, or the backend cannot serve the call.
    """

    def check(_: int) -> None:
        checks.check_tensor("theta", theta)
        ops.order_parameter(theta.detach()[:0], causal=causal, backend=backend)

    options = {"causal": causal, "backend": backend}
    shards = agree("order_parameter", check, {"theta": Argument(theta)}, options, group, lengths)
    if shards.size == 1:
        return ops.order_parameter(theta, causal=causal, backend=backend)
    theta = theta.to(torch.promote_types(theta.dtype, torch.float32))
    parts = torch.stack((theta.cos(), theta.sin()))
    states, _ = exchange_states(shards, parts.sum(3)[None], None, causal, False)
    if not causal:
        return modulus(*states[0] / max(shards.total, 1)).mean(-1)
    start, end = shards.spans[shards.rank]
    counts = torch.arange(start + 1, end + 1, device=theta.device, dtype=theta.dtype)
    return modulus(*(states[0].unsqueeze(-2) + parts.cumsum(3)) / counts[:, None]).mean(-1)


def synchronization_attention(
    omega: torch.Tensor,
    v: torch.Tensor,
    coupling: float | torch.Tensor,
    bandwidth: float | torch.Tensor,
    order: torch.Tensor,
    *,
    omega_k: torch.Tensor | None = None,
    top_k: int | None = None,
    causal: bool = False,
    sort: bool = False,
    grad_floor: float = 1e-3,
    backend: Backend = "auto",
    group: Group = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Compute `nearfar.synchronization_attention` (arXiv 2602.14445) of oscillators whose shards lie on the ranks of a group.

    Rank 0 has the first tokens, rank 1 those after them, and so on. Ranks gather the frequencies and values of all ranks, or
    of the earlier ones when causal. In the backward their gradients return, which are added in the order of the ranks.

    Args:
        omega: (B, Hq, n, D), the n tokens of this rank.
        v: (B, Hkv, n, Dv). omega_k: (B, Hkv, n, D), or None for omega.
        order: (B, Hq), the same on every rank, as `nearfar.distributed.order_parameter` returns it, or (B, Hq, n).
        coupling, bandwidth, top_k, causal, grad_floor, backend: as for `nearfar.synchronization_attention`; coupling and
            bandwidth are the same on every rank.
        sort: in a group of one only.
        group: a ProcessGroup or a DeviceMesh of one dimension, whose ranks all call; None for the default group.
        lengths: the tokens of each rank's shard, the same list on every rank; None if all have as many.

    Returns:
        (B, Hq, n, Dv) in the dtype of omega, differentiable once in omega, v, omega_k, order and, where they are tensors,
        coupling and bandwidth. Gradients of what is the same on every rank are parts: their sum over ranks is the gradient.

    Raises:
        TypeError: an argument has the wrong type or dtype on some rank.
        ValueError: shapes, devices or values do not fit on some rank, ranks disagree, or the backend cannot serve the call.
    """

    def check(count: int) -> None:
        checks.require(not sort or count == 1, "sort: tokens on more than one rank are not sorted")
        call = ops.prepare(
            omega, v, coupling, bandwidth, order,
            omega_k=omega_k, top_k=top_k, causal=causal, sort=sort, grad_floor=grad_floor,
        )
        call.backends.served(backend, call.q)

    by_token = isinstance(order, torch.Tensor) and order.dim() == 3
    arguments = {"omega": Argument(omega), "v": Argument(v), "omega_k": Argument(omega_k), "order": Argument(order, by_token)}
    numbers = {"coupling": coupling, "bandwidth": bandwidth}
    arguments |= {name: Argument(x, sharded=False) for name, x in numbers.items() if isinstance(x, torch.Tensor)}
    options: dict[str, Any] = {name: x for name, x in numbers.items() if not isinstance(x, torch.Tensor)}
    options |= {"top_k": top_k, "causal": causal, "grad_floor": grad_floor, "backend": backend}
    shards = agree("synchronization_attention", check, arguments, options, group, lengths)
    if shards.size > 1:
        omega_k, v = with_halo(shards, reaches(shards, -1, 0 if causal else -1), omega if omega_k is None else omega_k, v)
    return ops.synchronization_attention(
        omega, v, coupling, bandwidth, order,
        omega_k=omega_k, top_k=top_k, causal=causal, sort=sort, grad_floor=grad_floor, backend=backend,
    )
