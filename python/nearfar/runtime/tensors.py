"""Tensors as the kernels need them: layouts, allocation, alignment, devices and streams."""

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch

from nearfar.runtime.private import current_device, current_stream, empty_cuda, is_deterministic

META = torch.device("meta")


def triton_module(name: str) -> Callable[[], ModuleType]:
    """A function that returns `nearfar.triton_kernels.<name>`, imported at the first call: `import nearfar` needs no Triton."""
    return functools.cache(lambda: importlib.import_module(f"nearfar.triton_kernels.{name}"))


class Layout(NamedTuple):
    """Everything about a tensor except its values and its address."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def layouts(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The fields of a Layout for each tensor, None for None: the key of checks and plans."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors])


def allocates_directly(device: torch.device) -> bool:
    """True if `empty_cuda` may allocate: on the current device, while torch does not fill new memory (deterministic mode)."""
    return empty_cuda is not None and device.index == current_device() and not is_deterministic()


def allocate(layouts: Sequence[Any], device: torch.device) -> list[Any]:
    """Uninitialised tensors of these layouts on this device; None for None."""
    if device.type == "cuda" and allocates_directly(device):
        return [None if x is None else empty_cuda(tuple(x[0]), x[1], x[2]) for x in layouts]
    return [None if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device=device) for x in layouts]


def tf32_allowed(dtype: torch.dtype) -> bool:
    """True if the user lets torch round products of this dtype to tf32. Plans depend on it (launch.dot_precision).

    This setting reflects every switch, including the older allow_tf32 and set_float32_matmul_precision; if it is not set
    itself, it reads torch.backends.fp32_precision. allow_tf32 is not read, as it raises once new and old switches are mixed.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Context in which the device of the tensor is the current one; does nothing if it already is."""
    if not tensor.is_cuda or tensor.get_device() == current_device():  # a CUDA tensor exists, so CUDA is initialised
        return nullcontext()
    return torch.cuda.device(tensor.device)


def stream_of(tensor: torch.Tensor) -> int:
    """Handle of the current stream on the tensor's device."""
    return current_stream(tensor.get_device())


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension is contiguous, as kernels require, otherwise a contiguous copy."""
    return tensor if tensor.stride()[-1] == 1 else tensor.contiguous()


def empty(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """like.new_empty, which on the meta device, where plans are made, runs for 10 us of Python."""
    if type(like) is torch.Tensor and like.is_meta:
        return torch.empty(shape, dtype=dtype or like.dtype, device=META)
    return like.new_empty(shape, dtype=dtype)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """torch.empty_like, which on the meta device, where plans are made, runs for 100 us of Python."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META) if _is_dense_meta(x) else torch.empty_like(x)


def _is_dense_meta(x: torch.Tensor) -> bool:
    """True if the elements of a meta tensor fill its memory, in whatever order of the dimensions."""
    if type(x) is not torch.Tensor or not x.is_meta:
        return False
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != reach:
                return False
            reach *= size
    return True


def empty_rows(like: torch.Tensor, width: int) -> torch.Tensor:
    """(B, H, N, width) in the memory order of `like`: a (B, N, H, D) projection gets its output in the same order."""
    batch, heads, length, like_width = like.shape
    if width == like_width:
        return empty_like(like)
    if heads > 1 and like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, width).transpose(1, 2)
    return like.new_empty(batch, heads, length, width)
