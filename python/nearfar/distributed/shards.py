"""The shards of a sequence on the ranks of a process group, and the check that all ranks make one and the same call."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from nearfar.runtime import checks

Group: TypeAlias = "dist.ProcessGroup | dist.DeviceMesh | None"

FACTS = "operators", "dtypes of tensors", "shapes of tensors", "options", "tensors that require gradients", "lengths of shards"

_agreed: "WeakKeyDictionary[dist.ProcessGroup, set[tuple[str, ...]]]" = WeakKeyDictionary()


class Shards(NamedTuple):
    """Contiguous shards of a sequence, one a rank, in the order of the ranks. Any of them may be empty."""

    group: "dist.ProcessGroup"
    rank: int
    lengths: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.lengths)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first position and the end of each rank's shard."""
        ends = list(accumulate(self.lengths, initial=0))
        return list(zip(ends, ends[1:], strict=False))

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)


class Argument(NamedTuple):
    """A tensor of a call, or None. sharded: its dimension 2 is that of the tokens."""

    tensor: Any
    sharded: bool = True


def agree(
    operator: str,
    check: Callable[[int], object],
    arguments: Mapping[str, Argument],
    options: Mapping[str, object],
    group: Group,
    lengths: Sequence[int] | None,
) -> Shards:
    """The shards of a call, once every rank is known to make it.

    The ranks compare digests of what has to be alike, so that each raises where one alone would wait for the others forever.
    On a CPU every call is compared. On a GPU, where reading the digests stalls the stream, calls like an earlier one are not.

    Args:
        operator: its name, for messages.
        check: called with the number of ranks; raises if the arguments do not fit on this rank.
        arguments: the tensors by name, the first of them sharded.
        options: the other arguments by name.
        group, lengths: as given to the operator.

    Raises:
        TypeError, ValueError: the arguments do not fit on some rank, or ranks disagree; on every rank.
    """
    process_group = _process_group(group)
    rank, count = process_group.rank(), process_group.size()
    facts: tuple[str, ...] | None = None
    problem: Exception | None = None
    try:
        check(count)
        shards = Shards(process_group, rank, _lengths(arguments, lengths, rank, count))
        facts = _facts(operator, arguments, options, shards.lengths)
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        problem = error
    device = next((x.tensor.device for x in arguments.values() if isinstance(x.tensor, torch.Tensor)), torch.device("cpu"))
    if count > 1 and (device.type == "cpu" or facts not in _agreed.setdefault(process_group, set())):
        _compare(operator, process_group, facts, device)
    if problem:
        raise problem
    if device.type != "cpu" and facts:
        _agreed.setdefault(process_group, set()).add(facts)
    return shards


def check_packed(cu_seqlens: torch.Tensor, q: torch.Tensor, lengths: Sequence[int] | None, count: int) -> None:
    """Check the boundaries of sequences that are packed along all shards."""
    checks.check_cu_seqlens_layout(cu_seqlens)
    checks.require(cu_seqlens.device == q.device, f"cu_seqlens must be on the device of q, {q.device}, got {cu_seqlens.device}")
    checks.require(q.shape[0] == 1, f"cu_seqlens packs sequences in a batch of 1, got a batch of {q.shape[0]}")
    if cu_seqlens.is_cpu:
        checks.check_ends(cu_seqlens, count * q.shape[2] if lengths is None else sum(lengths))


def gather(tensor: torch.Tensor, shards: Shards) -> torch.Tensor:
    """(ranks, ..): the tensors of all ranks, which have one shape and dtype."""
    return _gather(tensor, shards.group)


def _gather(tensor: torch.Tensor, group: "dist.ProcessGroup") -> torch.Tensor:
    gathered = tensor.new_empty((group.size(), *tensor.shape))
    # torch 2.13 has it under another name
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered.flatten(), tensor.contiguous().flatten(), group=group)
    return gathered


def _process_group(group: Group) -> "dist.ProcessGroup":
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group: there are no process groups before torch.distributed.init_process_group")
    if isinstance(group, dist.DeviceMesh):
        checks.require(group.ndim == 1, f"group must be a DeviceMesh of one dimension, got {group.ndim}; take a slice of it")
        return group.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        kind = type(group).__name__
        raise TypeError(f"group must be a ProcessGroup that this rank belongs to, a DeviceMesh or None, got {kind}")
    return group


def _lengths(arguments: Mapping[str, Argument], lengths: Sequence[int] | None, rank: int, count: int) -> tuple[int, ...]:
    (first, argument), *_ = arguments.items()
    own = argument.tensor.shape[2]
    for name, (tensor, sharded) in arguments.items():
        if sharded and tensor is not None and tensor.shape[2] != own:
            raise ValueError(f"{name} must have the tokens of {first}'s shard, {own}, got {tensor.shape[2]}")
    if lengths is None:
        return (own,) * count
    if not isinstance(lengths, (list, tuple)) or not all(type(n) is int and n >= 0 for n in lengths):
        raise TypeError(f"lengths must be a list of ints, the tokens of each rank's shard, or None, got {lengths!r}")
    checks.require(len(lengths) == count, f"lengths must have one number for each of the {count} ranks, got {len(lengths)}")
    if lengths[rank] != own:
        raise ValueError(f"lengths[{rank}] must be the tokens of this rank's shard, {own}, got {lengths[rank]}")
    return tuple(lengths)


def _facts(
    operator: str, arguments: Mapping[str, Argument], options: Mapping[str, object], lengths: Sequence[int]
) -> tuple[str, ...]:
    """What has to be alike on all ranks, in the order of FACTS."""
    present = {name: x for name, x in arguments.items() if x.tensor is not None}
    dtypes = {name: x.tensor.dtype for name, x in present.items()}
    shapes = {name: _shape(x) for name, x in present.items()}
    tracked = [name for name, x in present.items() if x.tensor.requires_grad and torch.is_grad_enabled()]
    texts = {name: getattr(value, "__qualname__", None) or repr(value) for name, value in options.items()}
    return operator, repr(dtypes), repr(shapes), repr(texts), repr(tracked), repr(tuple(lengths))


def _shape(argument: Argument) -> tuple[int | str, ...]:
    shape = tuple(argument.tensor.shape)
    return (*shape[:2], "tokens", *shape[3:]) if argument.sharded else shape


def _compare(operator: str, group: "dist.ProcessGroup", facts: tuple[str, ...] | None, device: torch.device) -> None:
    """Raise unless the facts of all ranks are alike; None for those of a rank that raises by itself."""
    digests = [-1] * len(FACTS) if facts is None else [_digest(fact) for fact in facts]
    of_ranks = _gather(torch.tensor(digests, device=device), group).tolist()
    if facts is None:
        return
    failed = [rank for rank, (first, *_) in enumerate(of_ranks) if first < 0]
    if failed:
        raise ValueError(f"{operator}: the arguments of ranks {failed} of the group do not fit; those ranks say why")
    for index, name in enumerate(FACTS):
        others = [rank for rank, found in enumerate(of_ranks) if found[index] != of_ranks[0][index]]
        if others:
            hint = "; pass lengths, the tokens of each rank's shard" if name == "lengths of shards" else ""
            raise ValueError(
                f"{operator}: ranks disagree on {name}: ranks {others} differ from rank 0; rank {group.rank()} has "
                f"{facts[index]}{hint}"
            )


def _digest(text: str) -> int:
    """A number from 0 to 2^63 - 1, the same in every process, as that of `hash` is not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
