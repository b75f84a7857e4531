"""Shared code of the decoding steps: registration of operators that update arguments in place, and checks of those arguments.

Autograd must see every write. If a step overwrites a tensor that autograd saved, the backward must raise, not compute with the
new numbers. So a step is a torch operator that declares its mutated arguments; a plain eager call bypasses the operator and
increments the version counters itself.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from nearfar.runtime import checks
from nearfar.runtime.checks import Layouts
from nearfar.runtime.private import in_forward_ad, tree_leaves, tree_map
from nearfar.runtime.tensors import Layout


def define_step(name: str, step: Callable[..., None], writes: Sequence[str]) -> Callable[..., None]:
    """Register `torch.ops.nearfar.<name>` and return `run(plain, *arguments)`, which calls it.

    Args:
        step: fills some of its arguments and returns nothing; its annotations are the schema of the operator.
        writes: names of the arguments that it writes to.

    A plain call bypasses the dispatcher, whose Python part takes longer than the kernels of a step.
    """
    operator = torch.library.custom_op(f"nearfar::{name}", step, mutates_args=writes)
    operator.register_fake(lambda *_: None)
    names = list(inspect.signature(step).parameters)
    written = [names.index(argument) for argument in writes]

    @operator.register_vmap
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[None, None]:
        """One call for each index of the mapped dimension. Mutated arguments must be contiguous at each index."""
        for index in written:
            if in_dims[index] is None:
                raise ValueError(f"vmap maps over an argument of {name}, but not over {names[index]}, which it writes to")
        for i in range(info.batch_size):
            operator(*tree_map(lambda x, dim, i=i: x if dim is None else x.select(dim, i), arguments, in_dims))
        return None, None

    def run(plain: bool, *arguments: Any) -> None:
        if in_forward_ad():
            _refuse_tangents(name, arguments)
        if plain:
            increment_version([arguments[index] for index in written])
            step(*arguments)
        else:
            with torch.no_grad():
                operator(*arguments)

    return run


def _refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name} has no derivative, in forward mode neither: pass tensors without a tangent")


def plain_layouts(*tensors: torch.Tensor) -> Layouts | None:
    """`checks.plain_layouts`, but None for meta tensors: all have address 0, and the operator writes nothing to them."""
    layouts = checks.plain_layouts(*tensors)
    return None if layouts is None or tensors[0].is_meta else layouts


def check_out(out: Layout, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Check that kernels can write to `out`: its rows are contiguous, and no two elements share memory."""
    checks.check_exactly("out", out, shape, dtype, device)
    if out.shape[-1] > 1 and out.strides[-1] != 1:
        raise ValueError(f"out must have a contiguous last dimension, got strides {tuple(out.strides)}")
    if overlaps_itself(out.shape, out.strides):
        layout = f"shape {tuple(out.shape)} with strides {tuple(out.strides)}"
        raise ValueError(f"out must have a place in memory for each of its elements, got {layout}")


def check_writes(layouts: Layouts | None, names: Sequence[str], tensors: Sequence[torch.Tensor], num_read: int) -> None:
    """Refuse the in-place writes that torch's own in-place operators refuse, and writes to memory that is also read.

    Args:
        layouts: `plain_layouts` of the tensors; None if the call is not plain, so that there are no addresses.
        num_read: how many of the tensors are only read; the others are written to.
    """
    tracked = torch.is_grad_enabled()
    inference = layouts is None or torch.is_inference_mode_enabled()
    for name, tensor in zip(names[num_read:], tensors[num_read:], strict=True):
        if name != "out" and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, as it is updated in place")
        if tracked and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but a step writes to it without a gradient: pass {name}.detach(), or decode under "
                "torch.no_grad()"
            )
        if not inference and tensor.is_inference():
            raise ValueError(f"{name} was made in inference mode, outside of which it cannot be written to; clone it first")
    if layouts is not None:
        shared = _first_shared(layouts, tuple([tensor.data_ptr() for tensor in tensors]), num_read)
        if shared is not None:
            written, other = shared
            raise ValueError(f"{names[written]} must not share memory with {names[other]}, as a step writes to it")


@functools.lru_cache(maxsize=4096)
def _first_shared(layouts: Layouts, addresses: tuple[int, ...], num_read: int) -> tuple[int, int] | None:
    """Index of a tensor that is written to and of another one that shares memory with it, or None.

    Cached, because the allocator reuses freed memory: a decoding loop sees the same addresses again and again.
    """
    ends = [address + size for address, size in zip(addresses, _extents(layouts), strict=True)]
    for written in range(num_read, len(layouts)):
        for other in range(written):
            apart = ends[other] <= addresses[written] or ends[written] <= addresses[other]
            if not apart and share_memory(layouts[written], addresses[written], layouts[other], addresses[other]):
                return written, other
    return None


@functools.lru_cache(maxsize=1024)
def _extents(layouts: Layouts) -> list[int]:
    """Size of the memory range of each tensor, in bytes."""
    return [
        0 if 0 in shape else (1 + sum([s * (n - 1) for s, n in zip(strides, shape, strict=True)])) * dtype.itemsize
        for shape, strides, dtype, _ in layouts
    ]


def share_memory(a: Any, a_address: int, b: Any, b_address: int) -> bool:
    """Whether two tensors of these layouts share a byte of memory."""
    if 0 in a[0] or 0 in b[0]:
        return False
    ranges = []
    for shape, strides, dtype, _ in (a, b):
        ranges.append([(stride * dtype.itemsize, size) for stride, size in zip(strides, shape, strict=True)])
        ranges[-1].append((1, dtype.itemsize))
    # Byte a_address + x is byte b_address + y. With y counted from the end of b, that is x + y' = the distance below.
    distance = b_address - a_address + sum([stride * (size - 1) for stride, size in ranges[1]])
    return _is_sum(distance, [*ranges[0], *ranges[1]])


def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of a tensor share memory."""
    if 0 in shape:
        return False
    dims = [(stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1]
    if all([stride > sum([s * (n - 1) for s, n in dims if s <= stride]) - stride * (size - 1) for stride, size in dims]):
        return False  # each stride exceeds the extent of all smaller ones, as in any slice or transpose of a tensor
    if any([stride == 0 for stride, _ in dims]):
        return True
    # Look for two elements that are 1 + x apart in dimension i and any distance apart in later dimensions.
    for i, (stride, size) in enumerate(dims):
        later = dims[i + 1 :]
        target = sum([s * (n - 1) for s, n in later]) - stride
        if _is_sum(target, [(stride, size - 1), *[(s, 2 * n - 1) for s, n in later]]):
            return True
    return False


def _is_sum(target: int, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether target is a sum of stride * n with 0 <= n < size, over (stride, size) of the ranges."""
    merged: dict[int, int] = {}
    for stride, size in ranges:
        if stride:
            merged[stride] = merged.get(stride, 1) + size - 1
    return _search(target, sorted(merged.items(), reverse=True))


def _search(target: int, ranges: Sequence[tuple[int, int]]) -> bool:
    if not ranges:
        return target == 0
    (stride, size), *rest = ranges
    reach = sum([s * (n - 1) for s, n in rest])
    fewest, most = max(0, -((reach - target) // stride)), min(size - 1, target // stride)
    return any(_search(target - stride * n, rest) for n in range(fewest, most + 1))
