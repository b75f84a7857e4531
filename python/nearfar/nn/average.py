"""The moving average of alpha in affine-scaled attention (arXiv 2602.23057, eq. 9): over ranks, and once for each forward."""

import torch
import torch.distributed as dist

from nearfar.runtime.private import current_graph_task, process_group_of

REMEMBERED = 256  # forwards of a layer that may lie between one and its recomputation


def empty_history(heads: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What `moving_average` remembers of the last forwards, none yet: a mean that none has, (REMEMBERED, 2, heads)."""
    with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside
        return torch.full((REMEMBERED, 2, heads), torch.inf, dtype=dtype, device=device)


@torch.library.custom_op("nearfar::moving_average", mutates_args=("average", "history"))
def moving_average(
    alpha: torch.Tensor,
    average: torch.Tensor,
    history: torch.Tensor,
    momentum: float,
    first: int,
    heads: int,
    group: str,
) -> torch.Tensor:
    """Eq. 9: update the average by alpha (B, H, N) and return it; in a recomputation return what the first call did.

    The mean is over the tokens of all ranks of a group ("" is the default one), which may have different numbers of them; none
    change nothing. first: which of all `heads` is the first of alpha; ranks with others add nothing to its mean. history: pairs
    (mean of the own tokens, what was returned), the last first.

    One operator that compilers and selective checkpointing do not look into: what it does depends on who calls it.
    """
    count = alpha.shape[0] * alpha.shape[2]
    sums = alpha.sum((0, 2))
    mean = sums / max(count, 1)
    if current_graph_task() != -1:  # inside a backward, which calls forward to recompute it only
        nearest = (history[:, 0] - mean).abs().sum(1).argmin()
        return history.index_select(0, nearest.view(1))[0, 1].clone()
    totals = alpha.new_zeros(2, heads)
    own = totals[:, first : first + alpha.shape[1]]
    own[0], own[1] = sums, count
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals, group=process_group_of(group) if group else None)
    sums, counts = own
    updated = average.to(alpha.dtype).lerp(sums / counts.clamp(min=1), (1 - momentum) * counts.clamp(max=1))
    average.copy_(updated)
    history.copy_(torch.cat((torch.stack((mean, updated))[None], history[:-1])))
    return updated


@moving_average.register_fake
def _(
    alpha: torch.Tensor, average: torch.Tensor, history: torch.Tensor, momentum: float, first: int, heads: int, group: str
) -> torch.Tensor:
    return alpha.new_empty(alpha.shape[1])
