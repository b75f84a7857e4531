"""What ranks exchange: rows of their neighbours, and sums of states. Both are differentiable once.

Every sum over ranks is made on the rank that needs it, in a fixed order, from tensors that were gathered: its bits depend
neither on timing nor on the algorithm of a reduction.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from nearfar.distributed.shards import Shards, gather

# Halos begin and end at multiples of it, where the tiles of kernels and the chunks of references do in one process.
ALIGNMENT = 128

Spans = list[tuple[int, int]]


def reaches(shards: Shards, left: int, right: int) -> Spans:
    """The positions of the keys that each rank needs: those that its queries see, and those up to a multiple of ALIGNMENT.

    left, right: sides of the window, -1 unlimited.
    """

    def reach(start: int, end: int) -> tuple[int, int]:
        if start == end:
            return start, end
        first = 0 if left < 0 else max(start - left, 0)
        last = shards.total if right < 0 else min(end + right, shards.total)
        first = first // ALIGNMENT * ALIGNMENT if first < start else start
        last = min(-(-last // ALIGNMENT) * ALIGNMENT, shards.total) if last > end else end
        return first, last

    return [reach(*span) for span in shards.spans]


def with_halo(shards: Shards, spans: Spans, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors (B, H, n, _) of one dtype with the rows of this rank's span, (B, H, last - first, _)."""
    return tensors if spans == shards.spans else _Halo.apply(shards, spans, *tensors)


def summed_on_owners(shards: Shards, spans: Spans, tensor: torch.Tensor) -> torch.Tensor:
    """(B, H, n, _): for each row of this rank, the sum over ranks of what they have for it in a tensor of their span.

    The own summand comes first, then those of the other ranks in their order, in float32 for half precision.
    """
    (start, end), (first, _) = shards.spans[shards.rank], spans[shards.rank]
    own = tensor.narrow(2, start - first, end - start)
    if spans == shards.spans:
        return own
    sent, received = _overlaps(shards, spans)
    rows = [_rows_first(tensor.narrow(2, a - first, b - a)) for a, b in received]
    parts = _all_to_all(shards, rows, [b - a for a, b in sent])
    total = own.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    for (a, b), part in zip(sent, parts, strict=True):
        total[:, :, a - start : b - start] += part.movedim(0, 2)
    return total.to(tensor.dtype)


def _overlaps(shards: Shards, spans: Spans) -> tuple[Spans, Spans]:
    """For each rank, the positions that this rank sends to it and receives from it; none to and from itself."""

    def overlap(one: tuple[int, int], other: tuple[int, int], rank: int) -> tuple[int, int]:
        first, last = max(one[0], other[0]), min(one[1], other[1])
        return (first, last) if first < last and rank != shards.rank else (one[0], one[0])

    sent = [overlap(shards.spans[shards.rank], span, rank) for rank, span in enumerate(spans)]
    return sent, [overlap(spans[shards.rank], span, rank) for rank, span in enumerate(shards.spans)]


def _rows_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(2, 0)


def _all_to_all(shards: Shards, rows: list[torch.Tensor], counts: list[int]) -> tuple[torch.Tensor, ...]:
    """What each rank sends to this one, (counts[rank], B, H, _); rows: what this rank sends to each."""
    sent = torch.cat(rows)
    received = sent.new_empty((sum(counts), *sent.shape[1:]))
    dist.all_to_all_single(received, sent, counts, [len(x) for x in rows], group=shards.group)
    return received.split(counts)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: Shards, spans: Spans, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.shards, ctx.spans = shards, spans
        ctx.widths = widths = [x.shape[3] for x in tensors]
        start, _ = shards.spans[shards.rank]
        sent, received = _overlaps(shards, spans)
        rows = [torch.cat([_rows_first(x.narrow(2, a - start, b - a)) for x in tensors], -1) for a, b in sent]
        parts = _all_to_all(shards, rows, [b - a for a, b in received])
        before, after = (
            [x.movedim(0, 2).split(widths, -1) for x in side] for side in (parts[: shards.rank], parts[shards.rank + 1 :])
        )
        return tuple(torch.cat([*[x[i] for x in before], own, *[x[i] for x in after]], 2) for i, own in enumerate(tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total = summed_on_owners(ctx.shards, ctx.spans, torch.cat(gradients, -1))
        return None, None, *total.split(ctx.widths, -1)


def exchange_states(
    shards: Shards, sums: torch.Tensor, initial: torch.Tensor | None, causal: bool, with_total: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that each piece of this rank starts from, and the state after the last key of the last rank.

    States are added in a binary tree over the pieces of all ranks, so that a state has the same bits on any number of ranks
    whose shards are whole subtrees: equally many pieces each, a power of 2.

    Args:
        sums: (pieces, ..) the sum over the keys of each piece.
        initial: (..) the state before the first key of the first rank; None for zeros.
        causal: a piece starts from the sum of the pieces before it; otherwise from that of all.
        with_total: the total is used; otherwise its gradient is not exchanged.

    Returns:
        (pieces, ..) and (..). The gradient of `initial` is that of this rank's results alone.
    """
    states, total = _States.apply(shards, sums, initial, causal, with_total)
    return states, total


class _States(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shards: Shards, sums: torch.Tensor, initial: torch.Tensor | None, causal: bool, with_total: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.shards, ctx.causal, ctx.with_total, ctx.continues = shards, causal, with_total, initial is not None
        levels = tree(sums)
        ranks = tree(gather(levels[-1][0], shards))
        start = torch.zeros_like(sums[0]) if initial is None else initial
        total = start + ranks[-1][0]
        if not causal:
            return total.expand_as(sums).clone(), total
        return before(before(start, ranks)[shards.rank], levels)[: len(sums)], total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: torch.Tensor, dtotal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shards, rank = ctx.shards, ctx.shards.rank
        levels = tree(dstates)
        own = levels[-1][0]
        if not ctx.causal:
            own = own + dtotal
            of_all = tree(gather(own, shards))[-1][0]
            return None, of_all.expand_as(dstates), own if ctx.continues else None, None, None
        if ctx.with_total:
            of_ranks, of_totals = gather(torch.stack((own, dtotal)), shards).unbind(1)
            later = tree(of_totals)[-1][0]
        else:
            of_ranks, later = gather(own, shards), torch.zeros_like(own)
        dsums = after(after(later, tree(of_ranks))[rank], levels)[: len(dstates)]
        return None, dsums, own + dtotal if ctx.continues else None, None, None


def chosen_sum(shards: Shards, tensor: torch.Tensor, chosen: torch.Tensor, choosers: torch.Tensor) -> torch.Tensor:
    """The sum of the tensors of chosen ranks, zeros if there are none.

    Args:
        tensor: this rank's, of one shape on all ranks.
        chosen: (ranks,) bool, those whose tensors this rank adds.
        choosers: (ranks,) bool, those that add this rank's.
    """
    return _ChosenSum.apply(shards, tensor, chosen, choosers)


class _ChosenSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shards: Shards, tensor: torch.Tensor, chosen: torch.Tensor, choosers: torch.Tensor
    ) -> torch.Tensor:
        ctx.shards = shards
        ctx.save_for_backward(choosers)
        return _sum_of(gather(tensor, shards), chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (choosers,) = ctx.saved_tensors
        return None, _sum_of(gather(gradient, ctx.shards), choosers), None, None


def _sum_of(tensors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return tree(tensors.where(chosen.view(-1, *[1] * (tensors.dim() - 1)), 0))[-1][0]


def tree(leaves: torch.Tensor) -> list[torch.Tensor]:
    """The levels of a binary tree of sums over dimension 0, from the leaves, padded with zeros to a power of 2, to the root."""
    padding = (1 << (len(leaves) - 1).bit_length()) - len(leaves)
    levels = [torch.cat((leaves, leaves.new_zeros((padding, *leaves.shape[1:])))) if padding else leaves]
    while len(levels[-1]) > 1:
        levels.append(levels[-1][0::2] + levels[-1][1::2])
    return levels


def before(start: torch.Tensor, levels: list[torch.Tensor]) -> torch.Tensor:
    """For each leaf, `start` and the sum of the leaves before it, added from the largest subtree to the smallest."""
    sums = start[None]
    for level in levels[-2::-1]:
        sums = torch.stack((sums, sums + level[0::2]), 1).flatten(0, 1)
    return sums


def after(start: torch.Tensor, levels: list[torch.Tensor]) -> torch.Tensor:
    """For each leaf, `start` and the sum of the leaves after it: the transpose of `before`."""
    sums = start[None]
    for level in levels[-2::-1]:
        sums = torch.stack((sums + level[1::2], sums), 1).flatten(0, 1)
    return sums
