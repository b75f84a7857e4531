"""What every torch operator of nearfar needs: registration in both directions, and how its tensors are made and passed."""

import functools
import importlib
from contextlib import nullcontext
from typing import NamedTuple

import torch


def define(name, schema, function, fake):
    """`torch.ops.nearfar.<name>` with an implementation and a fake one, that of shapes, strides and dtypes."""
    operator = f"nearfar::{name}"
    torch.library.define(operator, schema)
    torch.library.impl(operator, ("CPU", "CUDA"), function)
    torch.library.register_fake(operator, fake)


def register(name, forward, backward, autograd, setup_context):
    """An operator and the operator of its backward, which cannot be differentiated again.

    Args:
        forward, backward: schema, function and fake of `<name>` and of `<name>_backward`.
        autograd, setup_context: as for `torch.library.register_autograd`.
    """
    define(name, *forward)
    define(f"{name}_backward", *backward)
    torch.library.register_autograd(f"nearfar::{name}", autograd, setup_context=setup_context)
    torch.library.register_autograd(f"nearfar::{name}_backward", refuse_double_backward)


def refuse_double_backward(ctx, *gradients):
    raise RuntimeError('the fused kernels have no double backward; use backend="reference" for second derivatives')


class Layout(NamedTuple):
    """All of a tensor but its values and where they are."""

    shape: torch.Size
    strides: tuple
    dtype: torch.dtype
    device: torch.device


def layouts(*tensors):
    """What checks and plans are looked up by: the fields of a Layout for each tensor, None for None."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors])


class Layouts(tuple):
    """The layouts of the tensors of a plain call: equal ones are one object, and found by identity from then on.

    What is looked up by them in a call then need not hash and compare the numbers of every tensor again.
    """

    __hash__, __eq__, __ne__ = object.__hash__, object.__eq__, object.__ne__

    @functools.cached_property
    def unit_strides(self):
        """Whether the last dimension of every tensor is contiguous, as the kernels need."""
        return all([strides[-1] == 1 for _, strides, _, _ in self])


interned = functools.lru_cache(maxsize=1024)(Layouts)


_caches, META = [], torch.device("meta")


def forgotten_with_plans(cached):
    """A function with a cache, which forget_plans empties."""
    _caches.append(cached)
    return cached


def planned(plan):
    """`plan(*tensors, *options)` as a function (layouts, *options), worked out once for each signature, on meta tensors.

    A plan holds what follows from layouts and options, which must be hashable: layouts of outputs and workspaces, and launches.
    """

    @forgotten_with_plans
    @functools.lru_cache(maxsize=1024)
    def look_up(layouts, *options):
        return plan(*allocate(layouts, META), *options)

    return look_up


def forget_plans():
    """Everything is planned anew, with what the table of launch parameters says now."""
    for cached in _caches:
        cached.cache_clear()


# torch.empty_strided without the parsing of its arguments and the dispatcher, which code that torch.compile writes calls.
empty_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def takes_the_short_way(device):
    """It allocates on the current device, and fills nothing where torch is to be deterministic, as torch.empty does."""
    return (
        empty_cuda is not None
        and device.index == torch._C._cuda_getDevice()
        and not torch._C._get_deterministic_algorithms()
    )


def allocate(layouts, device):
    """Tensors of these layouts on this device, not filled; None for None."""
    if device.type == "cuda" and takes_the_short_way(device):
        return [None if x is None else empty_cuda(tuple(x[0]), x[1], x[2]) for x in layouts]
    return [None if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device=device) for x in layouts]


def uses_tf32(tensor):
    """Whether the user allowed tf32 in the products of this tensor; plans depend on it (launch.dot_precision)."""
    return tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def device_of(tensor):
    """Context in which the device of the tensor is the current one; free when it already is."""
    if not tensor.is_cuda or tensor.get_device() == torch._C._cuda_getDevice():  # CUDA is up where there is such a tensor
        return nullcontext()
    return torch.cuda.device(tensor.device)


def current_stream(device):
    """Handle of the current stream of a CUDA device, an index, without the object that torch.cuda.current_stream makes."""
    return torch._C._cuda_getCurrentRawStream(device)


def stream_of(tensor):
    return current_stream(tensor.get_device())


def kernels(name):
    """A function that returns `nearfar.triton_kernels.<name>`: Triton comes with the first launch, not with the package."""
    return functools.cache(lambda: importlib.import_module(f"nearfar.triton_kernels.{name}"))


_launch = kernels("launch")


def launch_all(tensor, *launches):
    """Make (launch, tensors) pairs in order on the device of a tensor; on the meta device, see compile_ahead."""
    if tensor.is_meta:
        _launch().build_ahead(*launches)
        return
    with device_of(tensor):
        _launch().launch_all(*launches)


def compile_ahead(device, backward, *arguments):
    """Start to compile what `backward(*arguments)`, for meta tensors, will launch on this device; None: nothing.

    A forward whose result needs gradients calls it while it is planned, that is once for each signature, so that the kernels
    of both directions are compiled at one time. The upstream gradient is taken to be laid out as the output is; the kernels
    of another one are compiled when it comes.
    """
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            backward(*arguments)


def unit_stride(tensor):
    """The tensor itself when its last dimension is contiguous, as the kernels need, otherwise a copy."""
    return tensor if tensor.stride()[-1] == 1 else tensor.contiguous()


def unit_strides(rows, *tensors):
    """Layouts of the tensors and they themselves after unit_stride. rows: layouts before it, None where a call is not plain."""
    if rows is not None and rows.unit_strides:
        return rows, tensors
    tensors = tuple(map(unit_stride, tensors))
    return None if rows is None else interned(layouts(*tensors)), tensors


def empty_rows(like, width):
    """(B, H, N, width) in the memory order of `like`: a (B, N, H, D) projection gets its output in the same order."""
    batch, heads, length, like_width = like.shape
    if width == like_width:
        return torch.empty_like(like)
    if heads > 1 and like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, width).transpose(1, 2)
    return like.new_empty(batch, heads, length, width)
