"""FlashAttention's functions with their own signatures, computed by `nearfar.softmax_attention`.

    from nearfar.integrations.flash_attn import flash_attn_func  # was: from flash_attn import flash_attn_func

Tensors are (B, N, H, D), or (total, H, D) for packed sequences. Causal masks and windows are aligned to the last query and the
last key, as in FlashAttention 2.1 and later. A query that sees no key returns zeros. Query heads share key heads. Every call is
deterministic. dtypes are those of nearfar's operators, including float32. Heads may have any width up to 256.

dropout_p, softcap, alibi_slopes, return_attn_probs and block_table are not supported: values other than their defaults raise
NotImplementedError. `deterministic`, `num_splits` and `max_seqlen_*` do not affect the result and are ignored.
"""

import torch

from nearfar.integrations.widths import padded
from nearfar.ops.affine import softmax_attention
from nearfar.runtime.checks import check_tensor, require

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """Softmax attention of q over k and v.

    Args:
        q: (B, N, Hq, D), float32, float16 or bfloat16 (float64 on a CPU).
        k: (B, M, Hkv, D), dtype and device of q.
        v: (B, M, Hkv, Dv), dtype and device of q.
        softmax_scale: factor of q . k, None for D^-0.5.
        causal: a query sees the keys up to its own position; the last query is at the position of the last key.
        window_size: (left, right), how many keys before and after its own a query sees, both inclusive, -1 for all.

    Returns:
        (B, N, Hq, Dv) in the dtype of q, differentiable in q, k and v.

    Raises:
        NotImplementedError: dropout_p, softcap, alibi_slopes or return_attn_probs are set.
        TypeError, ValueError: as `nearfar.softmax_attention`.
    """
    _refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs)
    return _attend(q, k, v, softmax_scale, causal, window_size)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """`flash_attn_func` of q (B, N, Hq, D) and kv (B, M, 2, Hkv, D)."""
    k, v = _parts("kv", kv, "(B, M, 2, Hkv, D)", 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """`flash_attn_func` of qkv (B, N, 3, H, D)."""
    q, k, v = _parts("qkv", qkv, "(B, N, 3, H, D)", 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention within packed sequences.

    Args:
        q: (total, Hq, D), float32, float16 or bfloat16 (float64 on a CPU).
        k: (total_k, Hkv, D), dtype and device of q.
        v: (total_k, Hkv, Dv), dtype and device of q.
        cu_seqlens_q: (S + 1,) int32, the boundaries of the sequences, from 0 to total.
        cu_seqlens_k: (S + 1,) int32, the boundaries of the keys of the same sequences, from 0 to the length of k.
        max_seqlen_q, max_seqlen_k: ignored.
        softmax_scale, causal, window_size: as for `flash_attn_func`.

    Returns:
        (total, Hq, Dv) in the dtype of q, differentiable in q, k and v.

    Raises:
        NotImplementedError: an unsupported argument is set.
        TypeError, ValueError: as `nearfar.softmax_attention`.
    """
    _refuse(
        dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs,
        block_table=block_table,
    )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        require(tensor.dim() == 3, f"{name} must have 3 dimensions (total, H, D), got shape {tuple(tensor.shape)}")
    return _attend(q[None], k[None], v[None], softmax_scale, causal, window_size, cu_seqlens_q, cu_seqlens_k)[0]


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """`flash_attn_varlen_func` of q (total, Hq, D) and kv (total, 2, Hkv, D)."""
    k, v = _parts("kv", kv, "(total, 2, Hkv, D)", 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """`flash_attn_varlen_func` of qkv (total, 3, H, D)."""
    q, k, v = _parts("qkv", qkv, "(total, 3, H, D)", 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )


@torch.no_grad()
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor:
    """Write new keys and values into a cache, in place, and attend to its contents.

    Sequences of different lengths are computed one after the other, because operators do not take key lengths yet. Reading
    lengths from a tensor waits for the GPU; one int for all sequences avoids that and needs a single call.

    Args:
        q: (B, N, Hq, D), float32, float16 or bfloat16 (float64 on a CPU).
        k_cache: (cache batch, slots, Hkv, D), dtype and device of q.
        v_cache: (cache batch, slots, Hkv, Dv), dtype and device of q.
        k, v: (B, new, Hkv, D) and (B, new, Hkv, Dv), written to the slots from cache_seqlens on; or None.
        cache_seqlens: number of filled slots of each sequence before the new keys: an int, (B,) int32, or None for all slots.
        cache_batch_idx: (B,), index in the cache of each sequence of q; None for the first B.
        cache_leftpad: (B,), first valid slot of each sequence; None for 0.
        softmax_scale, causal, window_size: as for `flash_attn_func`.

    Returns:
        (B, N, Hq, Dv), not differentiable.

    Raises:
        NotImplementedError: rotary_cos, rotary_sin, block_table, softcap, alibi_slopes or return_softmax_lse are set.
        ValueError: only one of k and v is given, cache_seqlens is missing, or lengths do not fit the cache.
    """
    _refuse(
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, block_table=block_table, softcap=softcap, alibi_slopes=alibi_slopes,
        return_softmax_lse=return_softmax_lse,
    )
    require((k is None) == (v is None), "k and v must be given together")
    batch, slots = q.shape[0], k_cache.shape[1]
    new = 0 if k is None else k.shape[1]
    require(k is None or cache_seqlens is not None, "cache_seqlens must be given with k and v: it states where they go")
    ends = _numbers("cache_seqlens", slots if cache_seqlens is None else cache_seqlens, batch, new, slots)
    starts = _numbers("cache_leftpad", 0 if cache_leftpad is None else cache_leftpad, batch, 0, slots)
    order = _numbers("cache_batch_idx", cache_batch_idx, batch, 1, k_cache.shape[0]) if cache_batch_idx is not None else None
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        require(start <= end, f"cache_leftpad is {start} where cache_seqlens is {end}, in sequence {i}")

    if order is None and len(set(ends)) <= 1 and len(set(starts)) <= 1 and batch:
        spans = [(slice(0, batch), slice(0, batch), starts[0], ends[0])]
    else:
        rows = range(batch) if order is None else order
        spans = [
            (slice(i, i + 1), slice(row, row + 1), start, end)
            for i, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True))
        ]
    outputs = [q.new_empty(0, *q.shape[1:3], v_cache.shape[3])]
    for own, cached, start, end in spans:
        if k is not None and v is not None:
            k_cache[cached, end : end + new] = k[own]
            v_cache[cached, end : end + new] = v[own]
        keys, values = (cache[cached, start : end + new] for cache in (k_cache, v_cache))
        outputs.append(_attend(q[own], keys, values, softmax_scale, causal, window_size))
    return torch.cat(outputs)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax_attention of (B, N, H, D) tensors."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        require(tensor.dim() == 4, f"{name} must have 4 dimensions (B, N, H, D), got shape {tuple(tensor.shape)}")
    width = v.shape[3]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    left, right = window_size
    q, k, v = (padded(x).transpose(1, 2) for x in (q, k, v))
    window = left, 0 if causal else right
    if cu_seqlens_k is cu_seqlens_q:  # one table of boundaries does for both
        cu_seqlens_k = None
    o = softmax_attention(
        q, k, v, window_size=window, scale=scale, cu_seqlens=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    return o[..., :width].transpose(1, 2)


def _refuse(**arguments: object) -> None:
    """Raise if an unsupported argument differs from its default, which is None, False or 0."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) or value:
            raise NotImplementedError(f"nearfar does not support {name}: leave it out")


def _parts(name: str, tensor: torch.Tensor, shape: str, count: int) -> tuple[torch.Tensor, ...]:
    """Check the shape and split the third dimension from the end, which must have this size."""
    check_tensor(name, tensor)
    require(
        tensor.dim() == shape.count(",") + 1 and tensor.shape[-3] == count,
        f"{name} must have shape {shape}, got {tuple(tensor.shape)}",
    )
    return tensor.unbind(-3)


def _numbers(name: str, given: int | torch.Tensor, batch: int, reserved: int, limit: int) -> list[int]:
    """One number per sequence, checked to be from 0 to limit - reserved."""
    numbers = [given] * batch if isinstance(given, int) else given.tolist()
    require(len(numbers) == batch, f"{name} must have one number for each of {batch} sequences, got {len(numbers)}")
    for number in numbers:
        require(0 <= number <= limit - reserved, f"{name} must be from 0 to {limit - reserved}, got {number}")
    return numbers
