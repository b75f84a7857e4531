"""Decoding with Krause attention (arXiv 2602.11534): one query per sequence against a rolling cache of the last keys."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nearfar import _cuda
from nearfar.kernels.krause import MAX_CANDIDATES
from nearfar.reference.krause import krause_attention_step as reference_step
from nearfar.runtime import checks, choices, dispatch
from nearfar.runtime.dispatch import Backend
from nearfar.runtime.step import check_out, check_writes, define_step, plain_layouts
from nearfar.runtime.tensors import Layout, device_of, triton_module, unit_stride


class KrauseCache(NamedTuple):
    """The last W keys and values of each sequence, from which `nearfar.krause_attention_step` continues; its size is fixed.

    `empty` makes the cache before the first token, `after` the cache after a prompt.

    Attributes:
        k: (B, Hkv, W, D), contiguous: the key at position p is in slot p mod W; slots not yet filled hold arbitrary values.
        v: (B, Hkv, W, Dv), contiguous, in the same slots.
        length: (B,) int32, how many tokens each sequence has so far (up to 2^31 - 1), on the device, so that a CUDA graph can
            replay a step. Set an entry to 0 to restart its sequence.
    """

    k: torch.Tensor
    v: torch.Tensor
    length: torch.Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        window: int,
        width: int,
        value_width: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "KrauseCache":
        """The cache before the first token.

        Args:
            batch, heads, window: B, Hkv and W = left + 1, for the keys of SlidingWindow(left).
            width, value_width: D and Dv; None: Dv = D.
            dtype, device: of the keys and values; None: PyTorch's defaults.

        Raises:
            ValueError: window is not positive.
        """
        checks.require(window >= 1, f"window must be at least 1, got {window}")
        k = torch.zeros(batch, heads, window, width, dtype=dtype, device=device)
        v = k.new_zeros(batch, heads, window, width if value_width is None else value_width)
        return cls(k, v, k.new_zeros(batch, dtype=torch.int32))

    @classmethod
    @torch.no_grad()
    def after(cls, k: torch.Tensor, v: torch.Tensor, window: int, length: int | None = None) -> "KrauseCache":
        """The cache after a prompt, on which `nearfar.krause_attention` computes.

        Args:
            k, v: (B, Hkv, N, D) and (B, Hkv, N, Dv), for all tokens of the prompt, or for at least its last `window` tokens.
            window: W = left + 1, for the keys of SlidingWindow(left).
            length: how many tokens the prompt has; None: N.

        Raises:
            TypeError, ValueError: k, v, window or length do not fit.
        """
        key_meta = checks.meta("k", k)
        checks.check_qkv(key_meta, key_meta, checks.meta("v", v))
        (batch, heads, given, width), value_width = k.shape, v.shape[3]
        length = given if length is None else length
        cache = cls.empty(batch, heads, window, width, value_width, dtype=k.dtype, device=k.device)
        kept = min(length, window)
        checks.require(
            given == length or window <= given < length,
            f"k and v must be those of all {length} tokens or of the last {window} or more, got {given}",
        )
        slots = torch.arange(length - kept, length, device=k.device) % window
        cache.k[:, :, slots] = k[:, :, given - kept :]
        cache.v[:, :, slots] = v[:, :, given - kept :]
        cache.length.fill_(length)
        return cache


torch.serialization.add_safe_globals([KrauseCache])  # for torch.load with its default, weights_only=True


def krause_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KrauseCache,
    sigma: float | torch.Tensor,
    *,
    top_k: int | None = None,
    out: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Decode one token of each sequence with `nearfar.krause_attention` (arXiv 2602.11534).

    In a sequence of p tokens so far, the new token goes to slot p mod W of the cache, and its query attends to the last min(p +
    1, W) keys, its own included. The result is the last row of krause_attention with SlidingWindow(W - 1) over the whole
    sequence; among equal scores the smaller position wins, whatever its slot. Sequences may have different lengths. Nothing is
    copied to the host.

    Args:
        q: (B, Hq, 1, D), float32, float16 or bfloat16 (float64 on the reference). k: (B, Hkv, 1, D). v: (B, Hkv, 1, Dv), of
            one dtype and device.
        cache: a `nearfar.KrauseCache` with the heads and widths of k and v, in their dtype. It is updated in place, visibly to
            autograd; its tensors must not share memory with one another or with another argument.
        sigma: bandwidth in units of |q - k|, positive: a float, a 0-d or a (Hq,) tensor, as for `nearfar.krause_attention`. A
            float32 tensor is used as it is; a float costs an allocation.
        top_k: how many of its keys a query keeps, None for all.
        out: where to write o: (B, Hq, 1, Dv) in the dtype of q, its last dimension contiguous; None allocates it. It must not
            overlap itself or another argument in memory.
        backend: "auto", "cuda", "triton" or "reference". Kernels take W up to 1,024.

    Returns:
        o (B, Hq, 1, Dv), which is `out` if given. Not differentiable.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, the backend cannot serve the call, or, while gradients are recorded,
            the cache or out requires one.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.check_top_k(top_k)
    if not isinstance(cache, KrauseCache):
        raise TypeError(f"cache must be a KrauseCache, got {type(cache).__name__}")
    names, tensors = ["q", "k", "v"], [q, k, v]
    if isinstance(sigma, torch.Tensor):
        names, tensors = [*names, "sigma"], [*tensors, sigma]
    num_read = len(tensors)
    names, tensors = [*names, "cache.k", "cache.v", "cache.length"], [*tensors, *cache]
    if out is not None:
        names, tensors = [*names, "out"], [*tensors, out]
    layouts = plain_layouts(*tensors)
    shape, order, kernel_reason = _checked(layouts, names, tensors, num_read, top_k is not None)
    check_writes(layouts, names, tensors, num_read)
    sigma = checks.positive_per_head("sigma", sigma, q, q.shape[1])
    cuda_reason = kernel_reason or _cuda.krause_step_reason(q, k, v, cache, layouts is not None)
    reasons = dispatch.Backends(cuda_reason, kernel_reason).reasons(q)
    chosen = dispatch.choose(backend, reasons, q.device, order)
    if top_k is not None and top_k >= cache.k.shape[2]:
        top_k = None
    if out is None:
        out = cache.k.new_empty(shape)  # made from the cache, so that vmap maps over both
    _run(layouts is not None, q, k, v, sigma, *cache, out, top_k, chosen)
    return out


@checks.once
def _checked(metas: list[Layout], num_read: int, selects: bool) -> tuple[tuple[int, ...], Sequence[str], str | None]:
    """(shape of the output, order of the kernel backends for "auto", why no kernel can serve these shapes or None)."""
    q, k, v = metas[:3]
    cached_k, cached_v, length, *outs = metas[num_read:]
    checks.check_qkv(q, k, v)
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] != 1:
            raise ValueError(f"a step takes 1 token, got {name} of length {x.shape[2]}; nearfar.krause_attention takes more")
    batch, heads, _, width = k.shape
    if len(cached_k.shape) != 4 or cached_k.shape[2] < 1:
        raise ValueError(f"cache.k must have shape (B, Hkv, W, D) with at least one slot, got {tuple(cached_k.shape)}")
    window = cached_k.shape[2]
    checks.check_exactly("cache.k", cached_k, (batch, heads, window, width), k.dtype, k.device)
    checks.check_exactly("cache.v", cached_v, (batch, heads, window, v.shape[3]), k.dtype, k.device)
    checks.check_exactly("cache.length", length, (batch,), torch.int32, k.device)
    shape = (*q.shape[:3], v.shape[3])
    for out in outs:
        check_out(out, shape, q.dtype, q.device)
    reason = checks.kernel_width_reason("q", width) or checks.kernel_width_reason("v", v.shape[3])
    if window > MAX_CANDIDATES:
        reason = reason or f"cache has {window} slots; kernels take at most {MAX_CANDIDATES}"
    order, _ = choices.orders("krause_attention_step", q.device, slots=window, selects=selects)
    return shape, order, reason


_kernels = triton_module("krause_step")


def _step(
    q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, cache_k: Tensor, cache_v: Tensor, length: Tensor, out: Tensor,
    top_k: int | None, backend: str,
) -> None:
    """Fill out and the cache slots of the new tokens, and increment the lengths."""
    cache = KrauseCache(cache_k, cache_v, length)
    if backend == "reference":
        with checks.no_autocast(q):
            out.copy_(reference_step(q, k, v, cache, sigma, top_k))
    elif out.numel():
        launch = _cuda.krause_step if backend == "cuda" else _kernels().step
        with device_of(q):
            launch(unit_stride(q), unit_stride(k), unit_stride(v), cache, sigma, top_k, out)
    length.add_(1)


_run = define_step("krause_attention_step", _step, ("cache_k", "cache_v", "length", "out"))
