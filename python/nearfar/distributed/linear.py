"""Linear and Hadamard attention of a sequence that is sharded over ranks. States are plain sums: ranks exchange one each."""

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from nearfar.distributed.exchange import chosen_sum, exchange_states
from nearfar.distributed.shards import Argument, Group, Shards, agree, check_packed
from nearfar.ops import linear as ops
from nearfar.ops.linear import FeatureMap
from nearfar.runtime.checks import require
from nearfar.runtime.dispatch import Backend

PIECE = 1024  # tokens of a piece whose state has up to STATE rows; a float32 state takes an eighth of its values in float32
STATE = 128


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    causal: bool = False,
    eps: float = 1e-6,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
    group: Group = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute `nearfar.linear_attention` (arXiv 2602.12128) of a sequence whose shards lie on the ranks of a group.

    It is `nearfar.distributed.hadamard_attention` with one factor.

    Args:
        q: (B, Hq, n, D), the n tokens of this rank.
        k: (B, Hkv, n, D). v: (B, Hkv, n, Dv).
        feature_map, normalize, causal, eps, initial_state, return_state, cu_seqlens, backend, group, lengths: as for
            `nearfar.distributed.hadamard_attention`.

    Returns:
        o (B, Hq, n, Dv) in the dtype of q, or (o, state).

    Raises:
        TypeError, ValueError: as `nearfar.distributed.hadamard_attention`.
    """
    options: dict[str, Any] = dict(
        feature_map=feature_map, normalize=normalize, causal=causal, eps=eps, return_state=return_state
    )
    prepare = functools.partial(ops.prepare_linear_attention, q, k, v, **options)
    tensors = {"q": Argument(q), "k": Argument(k), "v": Argument(v)}
    shards = _agree("linear_attention", prepare, tensors, initial_state, options, cu_seqlens, backend, group, lengths)
    return _attend(shards, (q,), (k,), v, initial_state, cu_seqlens, backend, **options)


def hadamard_attention(
    qs: Sequence[torch.Tensor],
    ks: Sequence[torch.Tensor],
    v: torch.Tensor,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    causal: bool = False,
    eps: float = 1e-6,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
    group: Group = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute `nearfar.hadamard_attention` (arXiv 2602.12128) of a sequence whose shards lie on the ranks of a group.

    Rank 0 has the first tokens, rank 1 those after them, and so on. Each rank sums the states of its pieces, the ranks gather
    one state each, and each rank computes its pieces from the states before them. The backward gathers one gradient of a state
    each.

    Args:
        qs: R tensors (B, Hq, n, d_r), the n tokens of this rank.
        ks: R tensors (B, Hkv, n, d_r). v: (B, Hkv, n, Dv).
        initial_state: (B, Hkv, d_1, .., d_R, Dv + 1) float32 (float64 for float64 inputs): the state before the first token of
            rank 0, the same on every rank.
        return_state: return (o, state) with the state after the last token of the last rank, on every rank.
        feature_map, normalize, causal, eps, backend: as for `nearfar.hadamard_attention`.
        cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed along the shards of all ranks, the same on every rank.
            On more than one rank only causal, and without states.
        group: a ProcessGroup or a DeviceMesh of one dimension, whose ranks all call; None for the default group.
        lengths: the tokens of each rank's shard, the same list on every rank; None if all have as many.

    Returns:
        o (B, Hq, n, Dv) in the dtype of qs[0], or (o, state); differentiable once in qs, ks, v and initial_state. The gradient
        of initial_state is a part on each rank: their sum over ranks is the gradient, as for parameters.

    Raises:
        TypeError: an argument has the wrong type or dtype on some rank.
        ValueError: shapes, devices or values do not fit on some rank, ranks disagree, or the backend cannot serve the call.
    """
    options: dict[str, Any] = dict(
        feature_map=feature_map, normalize=normalize, causal=causal, eps=eps, return_state=return_state
    )
    prepare = functools.partial(ops.prepare_hadamard_attention, qs, ks, v, **options)
    tensors = {"v": Argument(v)}
    for name, factors in (("qs", qs), ("ks", ks)):
        if isinstance(factors, (list, tuple)):  # as is checked, on all ranks alike
            tensors |= {f"{name}[{r}]": Argument(x) for r, x in enumerate(factors)}
    shards = _agree("hadamard_attention", prepare, tensors, initial_state, options, cu_seqlens, backend, group, lengths)
    return _attend(shards, tuple(qs), tuple(ks), v, initial_state, cu_seqlens, backend, **options)


def _agree(
    operator: str,
    prepare: Any,
    tensors: dict[str, Argument],
    initial_state: torch.Tensor | None,
    options: dict[str, Any],
    cu_seqlens: torch.Tensor | None,
    backend: Backend,
    group: Group,
    lengths: Sequence[int] | None,
) -> Shards:
    def check(count: int) -> None:
        if cu_seqlens is None or count == 1:
            call = prepare(initial_state=initial_state, cu_seqlens=cu_seqlens)
        else:
            call = prepare()
            require(options["causal"], "cu_seqlens: sequences that cross ranks are causal")
            stateless = initial_state is None and not options["return_state"]
            require(stateless, "cu_seqlens: sequences that cross ranks take no initial_state and return no state")
            check_packed(cu_seqlens, call.v, lengths, count)
        call.backends.served(backend, call.v)

    shared = {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
    arguments = tensors | {name: Argument(x, sharded=False) for name, x in shared.items()}
    return agree(operator, check, arguments, {**options, "backend": backend}, group, lengths)


def _attend(
    shards: Shards,
    qs: tuple[torch.Tensor, ...],
    ks: tuple[torch.Tensor, ...],
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    backend: Backend,
    *,
    feature_map: FeatureMap,
    normalize: bool,
    causal: bool,
    eps: float,
    return_state: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if callable(feature_map):  # once, although the keys are used twice
        qs, ks, feature_map = tuple(map(feature_map, qs)), tuple(map(feature_map, ks)), "identity"
    attend: Any = functools.partial(
        ops.hadamard_attention, feature_map=feature_map, normalize=normalize, eps=eps, backend=backend
    )
    if shards.size > 1 and cu_seqlens is not None:
        return _attend_packed(attend, shards, qs, ks, v, cu_seqlens)
    pieces = num_pieces(v.shape[2], [k.shape[3] for k in ks])
    if shards.size == 1 and (pieces == 1 or cu_seqlens is not None):
        return attend(
            qs, ks, v, causal=causal, cu_seqlens=cu_seqlens, initial_state=initial_state, return_state=return_state
        )
    batch = v.shape[0]
    qs, ks, (v,) = (tuple([_cut(x, pieces) for x in tensors]) for tensors in (qs, ks, (v,)))
    no_keys, no_values = [k.detach()[:, :, :0] for k in ks], v.detach()[:, :, :0]
    _, sums = attend(no_keys, ks, v, return_state=True)
    states, state = exchange_states(shards, sums.unflatten(0, (pieces, batch)), initial_state, causal, return_state)
    keys = (ks, v) if causal else (no_keys, no_values)
    o = attend(qs, *keys, causal=causal, initial_state=states.flatten(0, 1))
    o = o.unflatten(0, (pieces, batch)).movedim(0, 2).flatten(2, 3)
    return (o, state) if return_state else o


def _attend_packed(
    attend: Any,
    shards: Shards,
    qs: tuple[torch.Tensor, ...],
    ks: tuple[torch.Tensor, ...],
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Causal attention. A rank gives the state of the sequence that goes on after its shard, and starts from those of the ranks
    before it that the sequence of its own first token covers."""
    rank, (start, end) = shards.rank, shards.spans[shards.rank]
    edges = _edges(shards.lengths, v.device)
    sequences = torch.searchsorted(cu_seqlens, edges, right=True) - 1
    begins = cu_seqlens[sequences]  # of the sequence that each edge lies in
    # The operator builds states of packed keys beside rows of as many queries only: any queries, of which nothing is used.
    halves = torch.cat((edges[:1], begins[rank + 1 : rank + 2].clamp(start, end) - start, edges[:1] + (end - start)))
    _, sums = attend([k.detach() for k in ks], ks, v, cu_seqlens=halves.int(), return_state=True)
    others = torch.arange(shards.size, device=v.device)
    chosen = (edges[1:] > begins[rank]) & (others < rank)
    choosers = (edges[rank + 1] > begins[:-1]) & (others > rank)
    state = chosen_sum(shards, sums[1], chosen, choosers)
    count = cu_seqlens.numel() - 1
    continued = torch.arange(count, device=v.device) == sequences[rank]
    states = state.where(continued.view(-1, *[1] * state.dim()), 0)
    local = cu_seqlens.clamp(start, end) - start
    return attend(qs, ks, v, causal=True, initial_state=states, cu_seqlens=local)


@functools.lru_cache(maxsize=64)
def _edges(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(ranks + 1,) int32: the first positions of the shards, and the end of the last one."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def num_pieces(length: int, widths: Sequence[int]) -> int:
    """Into how many pieces a shard is cut.

    Their length depends on the widths alone, not on the number of ranks, and grows with the state. A shard that is not a
    multiple of it is one piece.
    """
    piece = PIECE * max(1, (1 << (math.prod(widths) - 1).bit_length()) // STATE)
    return length // piece if length and length % piece == 0 else 1


def _cut(x: torch.Tensor, pieces: int) -> torch.Tensor:
    """(B, H, n, D) as (pieces B, H, n / pieces, D): a view of one batch element."""
    return x.unflatten(2, (pieces, -1)).movedim(2, 0).flatten(0, 1) if pieces > 1 else x
