"""Checks of public arguments: each raises one ValueError or TypeError that names the argument and says what is accepted."""

import numbers

import torch
from torch.utils.weak import WeakTensorKeyDictionary

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition, message, error=ValueError):
    if not condition:
        raise error(message)


def check_floating(name, tensor):
    require(isinstance(tensor, torch.Tensor), f"{name} must be a torch.Tensor, got {type(tensor).__name__}", TypeError)
    require(
        tensor.dtype in FLOATING,
        f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}",
        TypeError,
    )


def check_qkv(q, k, v):
    """q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv): one dtype, one device, Hq a multiple of Hkv."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        require(tensor.dim() == 4, f"{name} must have 4 dimensions (B, H, N, D), got shape {tuple(tensor.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        require(tensor.dtype == q.dtype, f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}", TypeError)
        require(tensor.device == q.device, f"{name} must be on the device of q, {q.device}, got {tensor.device}")
        require(tensor.shape[0] == q.shape[0], f"{name} must have the batch size of q, {q.shape[0]}, got {tensor.shape[0]}")
    require(k.shape[3] == q.shape[3], f"k must have the width of q, {q.shape[3]}, got {k.shape[3]}")
    require(
        v.shape[1:3] == k.shape[1:3],
        f"v must have the heads and length of k, {tuple(k.shape[1:3])}, got {tuple(v.shape[1:3])}",
    )
    require(
        k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
        f"q must have a multiple of the {k.shape[1]} heads of k and v, got {q.shape[1]}",
    )


def autocast(*tensors):
    """Cast to the autocast dtype of the tensors' device where autocast is on, as torch's attention does."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    return tensors


def positive_per_head(name, value, like, num_heads):
    """A float, 0-d or (num_heads,) tensor of positive numbers as a float32 tensor of shape (1,) or (num_heads,).

    float64 inputs keep float64. Numbers and CPU tensors are checked here; reading a CUDA tensor back would stall its stream,
    so there a value that is not positive turns the outputs of its head into NaN instead.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(value, numbers.Real):
        require(value > 0, f"{name} must be positive, got {value}")
        return torch.full((1,), float(value), dtype=dtype, device=like.device)
    require(
        isinstance(value, torch.Tensor) and value.dtype in FLOATING,
        f"{name} must be a float or a floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}",
        TypeError,
    )
    require(
        value.dim() == 0 or tuple(value.shape) in ((1,), (num_heads,)),
        f"{name} must be a number, a 0-d tensor or one number per query head, shape ({num_heads},), got {tuple(value.shape)}",
    )
    require(value.device == like.device, f"{name} must be on the device of q, {like.device}, got {value.device}")
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool((value > 0).all()), f"{name} must be positive, got a smallest value of {value.min() if value.numel() else 0}")
    return value.reshape(-1).to(dtype)


# cu_seqlens tensors whose values were found in order, by identity, with the version that was read and the length it fits.
_checked_seqlens = WeakTensorKeyDictionary()


def check_cu_seqlens(cu_seqlens, q, k):
    """cu_seqlens: int32 (S + 1,) from 0 to N without a decrease, for one packed batch of equally long q and k.

    The values of a tensor are read back once, on first sight (a CUDA tensor is synchronised then), and not at all while a
    CUDA graph is captured or a function compiled; kernels stay inside the tensors whatever the values are.
    """
    require(
        isinstance(cu_seqlens, torch.Tensor) and cu_seqlens.dtype == torch.int32,
        f"cu_seqlens must be an int32 tensor, got {getattr(cu_seqlens, 'dtype', type(cu_seqlens).__name__)}",
        TypeError,
    )
    require(
        cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 2,
        f"cu_seqlens must have shape (number of sequences + 1,), got {tuple(cu_seqlens.shape)}",
    )
    require(cu_seqlens.device == q.device, f"cu_seqlens must be on the device of q, {q.device}, got {cu_seqlens.device}")
    require(q.shape[0] == 1, f"cu_seqlens packs sequences in a batch of 1, got a batch of {q.shape[0]}")
    require(q.shape[2] == k.shape[2], f"cu_seqlens needs q and k of one length, got {q.shape[2]} and {k.shape[2]}")
    if torch.compiler.is_compiling() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    seen = (cu_seqlens._version, q.shape[2])
    if _checked_seqlens.get(cu_seqlens) != seen:
        ends = cu_seqlens.tolist()
        require(
            ends[0] == 0 and ends[-1] == q.shape[2] and all(a <= b for a, b in zip(ends, ends[1:], strict=False)),
            f"cu_seqlens must start at 0, never decrease and end at the length {q.shape[2]}, got {ends if len(ends) <= 8 else ends[:8] + ['...']}",
        )
        _checked_seqlens[cu_seqlens] = seen


def check_top_k(top_k):
    if top_k is not None:
        require(
            isinstance(top_k, int) and not isinstance(top_k, bool),
            f"top_k must be an int or None, got {type(top_k).__name__}",
            TypeError,
        )
        require(top_k >= 1, f"top_k must be at least 1, got {top_k}")


def kernel_width_reason(name, width):
    """Why the kernels do not serve this head width, or None."""
    if width % 8 == 0 and 16 <= width <= 256:
        return None
    return f"{name} is {width} wide; kernels take multiples of 8 from 16 to 256"
