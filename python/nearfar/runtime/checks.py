"""Checks of public arguments. Each raises a ValueError or TypeError that names the argument and states what is accepted."""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch.amp import is_autocast_available

from nearfar.runtime.private import (
    autocast_enabled,
    dispatch_modes,
    in_forward_ad,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    transform_level,
)
from nearfar.runtime.tensors import Layout, layouts, stream_of

is_compiling = torch.compiler.is_compiling

PLAIN = (torch.Tensor, torch.nn.Parameter)  # exact types: subclasses such as fake or distributed tensors are not plain
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CAST = (torch.float16, torch.bfloat16, torch.float32)  # the dtypes that autocast casts


Result = TypeVar("Result")


def require(condition: object, message: str, error: type[Exception] = ValueError) -> None:
    """Raise error(message) unless the condition holds. Not for the hot path: the message is built in every call."""
    if not condition:
        raise error(message)


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def same_shape(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two shapes are equal. Compares number by number, as Dynamo finds equal tuples of symbolic sizes unequal."""
    return len(first) == len(second) and all([a == b for a, b in zip(first, second, strict=True)])


def meta(name: str, tensor: torch.Tensor) -> Layout:
    """The Layout of a tensor, all that a cached check may read. Raises TypeError if it is not a tensor."""
    check_tensor(name, tensor)
    return Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class Layouts(tuple[Any, ...]):
    """The interned layouts of a plain call's tensors: equal layouts are one object, so hash and comparison use identity."""

    __hash__, __eq__, __ne__ = object.__hash__, object.__eq__, object.__ne__


_interned = functools.lru_cache(maxsize=1024)(Layouts)


def plain_layouts(*tensors: torch.Tensor) -> Layouts | None:
    """The Layouts of a plain call's tensors. None for other calls, whose sizes may be symbolic and cannot be a cache key."""
    return _interned(layouts(*tensors)) if is_plain(*tensors) else None


def once(check: Callable[..., Result]) -> Callable[..., Result]:
    """Turn `check(metas, *options)` into a function (layouts, names, tensors, *options), cached per signature of plain calls.

    layouts: `plain_layouts` of the tensors. Options must be hashable, and their types checked before: 1, 1.0 and True are the
    same key. The check must depend on its arguments only.
    """

    @functools.lru_cache(maxsize=1024)
    def look_up(layouts: Layouts, *options: Any) -> Result:
        return check([Layout(*layout) for layout in layouts], *options)

    @functools.wraps(check)
    def checked(layouts: Layouts | None, names: Sequence[str], tensors: Sequence[torch.Tensor], *options: Any) -> Result:
        if layouts is None:
            return check(list(map(meta, names, tensors)), *options)
        return look_up(layouts, *options)

    return checked


def check_qkv(q: Layout, k: Layout, v: Layout, names: Sequence[str] = ("q", "k", "v")) -> None:
    """Check q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv): one dtype, one device, Hq a multiple of Hkv."""
    q_name, k_name, v_name = names
    for name, tensor in zip(names, (q, k, v), strict=True):
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if len(tensor.shape) != 4:
            raise ValueError(f"{name} must have 4 dimensions (B, H, N, D), got shape {tuple(tensor.shape)}")
    for name, tensor in ((k_name, k), (v_name, v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of {q_name}, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of {q_name}, {q.device}, got {tensor.device}")
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have the batch size of {q_name}, {q.shape[0]}, got {tensor.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"{k_name} must have the width of {q_name}, {q.shape[3]}, got {k.shape[3]}")
    if not same_shape(v.shape[1:3], k.shape[1:3]):
        raise ValueError(
            f"{v_name} must have the heads and length of {k_name}, {tuple(k.shape[1:3])}, got {tuple(v.shape[1:3])}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q_name} must have a multiple of the {k.shape[1]} heads of {k_name} and v, got {q.shape[1]}")


def check_like(name: str, tensor: Layout, other_name: str, other: Layout) -> None:
    """Check that two tensors differ in their last dimension only."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")
    if not same_shape(tensor.shape[:-1], other.shape[:-1]):
        raise ValueError(
            f"{name} must have the shape of {other_name} but for its width, {(*other.shape[:-1], '*')}, "
            f"got {tuple(tensor.shape)}"
        )


def check_exactly(name: str, tensor: Layout, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Check shape, dtype and device."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if not same_shape(tensor.shape, shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether a call is plain eager PyTorch: not compiled, traced or transformed, no tensor subclass or lazy negation."""
    if is_compiling() or dispatch_modes() or transform_level() or in_forward_ad():
        return False
    for tensor in tensors:
        if type(tensor) not in PLAIN or is_legacy_batchedtensor(tensor) or tensor.is_neg():
            return False
    return True


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor can be read: not under tracing, and not under vmap."""
    if is_compiling() or type(tensor) not in PLAIN:
        return False
    return not is_functorch_wrapped_tensor(tensor) and not is_legacy_batchedtensor(tensor)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast tensors as torch's attention does under autocast. float64 and integers stay as they are; the checks handle them."""
    if not autocast_enabled():
        return tensors
    return tuple([_cast(tensor) for tensor in tensors])


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in CAST or not _autocasts(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _autocasts(device: str) -> bool:
    return is_autocast_available(device) and torch.is_autocast_enabled(device)


def no_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Context in which the float32 of a reference stays float32."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if autocast_enabled() and _autocasts(device) else nullcontext()


def positive_per_head(name: str, value: float | torch.Tensor, like: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Convert a float, 0-d or (num_heads,) tensor of positive numbers to a float32 tensor of shape (1,) or (num_heads,).

    If `like` is float64, the result is float64. Numbers and CPU tensors are checked here. Reading a CUDA tensor back would
    stall its stream, so a value there that is not positive makes the outputs of its head NaN instead. The result must not be
    modified: calls with the same number share it.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(value, torch.Tensor):
        if not is_number(value):
            raise TypeError(f"{name} must be a float or a floating-point tensor, got {type(value).__name__}")
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
        return _constant(value, dtype, like)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be a float or a floating-point tensor, got {value.dtype}")
    shape = value.shape
    if len(shape) and not same_shape(shape, (1,)) and not same_shape(shape, (num_heads,)):
        raise ValueError(f"{name} must be a number or one number per query head, shape ({num_heads},), got {tuple(shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of q, {like.device}, got {value.device}")
    if value.is_cpu and has_values(value) and not bool((value > 0).all()):
        raise ValueError(f"{name} must be positive, got {value.min().item()}")
    return in_dtype(value if len(shape) else value.reshape(1), dtype).contiguous().resolve_neg()


def numbers_of(
    name: str, tensor: torch.Tensor | None, shape: Sequence[int], meaning: str, q: torch.Tensor
) -> torch.Tensor | None:
    """A floating tensor of this shape on the device of q, or None, in the dtype of accumulation."""
    if tensor is None:
        return None
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if not same_shape(tensor.shape, shape):
        raise ValueError(f"{name} must have shape {meaning}, {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    return in_dtype(tensor, torch.float64 if q.dtype == torch.float64 else torch.float32).resolve_neg()


def parameter(value: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    """Convert a 0-d tensor, or a positive float beside a CUDA tensor, to the tensor (1,) of positive_per_head.

    Anything else is returned unchanged. The guard check of a call with a number then compares tensors only.
    """
    if isinstance(value, torch.Tensor):
        return value if value.dim() else value.reshape(1)
    if type(value) is float and value > 0 and type(like) in PLAIN and like.is_cuda and like.dtype != torch.float64:
        return _constant(value, torch.float32, like)
    return value


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tensor.to(dtype), but without the microsecond that it takes if the dtype is already right."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _constant(value: float, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """The number as a tensor (1,) on the device of `like`, cached if the cached fill surely precedes its use."""
    if not is_plain(like):
        return torch.full((1,), float(value), dtype=dtype, device=like.device)
    if not like.is_cuda:
        return _filled(float(value), dtype, like.device, None)
    if torch.cuda.is_current_stream_capturing():  # the graph fills it, in its own memory
        return torch.full((1,), float(value), dtype=dtype, device=like.device)
    return _filled(float(value), dtype, like.device, stream_of(like))


@functools.lru_cache(maxsize=256)
def _filled(value: float, dtype: torch.dtype, device: torch.device, stream: int | None) -> torch.Tensor:
    """stream is part of the key: kernels on another stream might run before the fill."""
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
        return torch.full((1,), value, dtype=dtype, device=device)


def check_cu_seqlens(
    cu_seqlens: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cu_seqlens_k: torch.Tensor | None = None
) -> None:
    """Check cu_seqlens: int32 (S + 1,), from 0 to N, never decreasing, for a batch of 1.

    cu_seqlens_k: the same for the keys, None if k has the boundaries of q. The values of a CUDA tensor are not read back,
    because that would stall the stream; `nearfar.check_cu_seqlens` reads them. Kernels stay inside the tensors for any values.
    """
    _check_packing("cu_seqlens", cu_seqlens, q)
    if cu_seqlens_k is not None:
        _check_packing("cu_seqlens_k", cu_seqlens_k, k)
        if not same_shape(cu_seqlens_k.shape, cu_seqlens.shape):
            raise ValueError(
                f"cu_seqlens_k must have the shape of cu_seqlens, {tuple(cu_seqlens.shape)}, got {tuple(cu_seqlens_k.shape)}"
            )
    elif q.shape[2] != k.shape[2]:
        raise ValueError(f"cu_seqlens needs q and k of one length, got {q.shape[2]} and {k.shape[2]}")
    for name, ends, tokens in (("cu_seqlens", cu_seqlens, q), ("cu_seqlens_k", cu_seqlens_k, k)):
        if ends is not None and ends.is_cpu and has_values(ends):
            check_ends(ends, tokens.shape[2], name)


def _check_packing(name: str, cu_seqlens: torch.Tensor, tokens: torch.Tensor) -> None:
    check_cu_seqlens_layout(cu_seqlens, name)
    if cu_seqlens.device != tokens.device:
        raise ValueError(f"{name} must be on the device of q, {tokens.device}, got {cu_seqlens.device}")
    if tokens.shape[0] != 1:
        raise ValueError(f"{name} packs sequences in a batch of 1, got a batch of {tokens.shape[0]}")


def check_cu_seqlens_layout(cu_seqlens: torch.Tensor, name: str = "cu_seqlens") -> None:
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32:
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name} must be an int32 tensor, got {kind}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{name} must have shape (number of sequences + 1,), got {tuple(cu_seqlens.shape)}")


def check_ends(cu_seqlens: torch.Tensor, num_tokens: int, name: str = "cu_seqlens") -> None:
    """Check that the values go from 0 to num_tokens and never decrease."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != num_tokens or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
        shown = ", ".join(map(str, ends[:8])) + (", ..." if len(ends) > 8 else "")
        raise ValueError(f"{name} must start at 0, never decrease and end at {num_tokens}, got [{shown}]")


def is_number(value: object) -> bool:
    return type(value) is float or isinstance(value, numbers.Real)  # the first test is faster


def check_top_k(top_k: int | None) -> None:
    if top_k is None:
        return
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k must be an int or None, got {type(top_k).__name__}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")


def check_ties(ties: str) -> None:
    if ties not in ("index", "keep"):
        raise ValueError(f'ties must be "index" or "keep", got {ties!r}')


def kernel_width_reason(name: str, width: int, smallest: int = 16) -> str | None:
    """Why the kernels do not serve this head width, or None."""
    if width % 8 == 0 and smallest <= width <= 256:
        return None
    return f"{name} is {width} wide; kernels take multiples of 8 from {smallest} to 256"


def default_scale(width: int) -> float:
    """The scale of dot products, width^-0.5."""
    return max(int(width), 1) ** -0.5  # int: kernels take no symbolic width


def finite_scale(scale: float | None) -> float | None:
    """Check a scale and convert it to a float; None, for the default, stays None."""
    if scale is None:
        return None
    if not is_number(scale) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not abs(scale) < math.inf:  # math.isfinite takes no symbolic number
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)
