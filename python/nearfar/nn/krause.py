"""Krause attention (arXiv 2602.11534) as a self-attention layer, and its schedule of top_k over the depth of a model."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from nearfar.localities import Locality, ShiftedWindow, SlidingWindow
from nearfar.nn.base import SelfAttention, causal_locality, is_causal, own_dtype
from nearfar.nn.cache import KVCache
from nearfar.nn.positions import Rotary
from nearfar.ops.krause import krause_attention
from nearfar.ops.krause_step import KrauseCache, krause_attention_step
from nearfar.runtime.checks import check_exactly, meta, require
from nearfar.runtime.dispatch import Backend


class KrauseAttention(SelfAttention):
    """Multi-head self-attention by distance: projections around `nearfar.krause_attention`, with a learnable bandwidth.

    Source: arXiv 2602.11534. sigma = exp(log_sigma), which stays positive. Under autocast the projections and the attention run
    in the autocast dtype; sigma stays float32.

    Its cache holds the last left + 1 keys and values of a SlidingWindow(left), a `nearfar.KrauseCache`, whose sequences may
    have different lengths; several tokens at once are attended to in one packed call. Without a limit on the left it is a
    cache of max_length tokens.

    Args:
        dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention); None for num_heads.
        head_dim: width of a head; None for dim / num_heads. Kernels take multiples of 8 from 16 to 256.
        causal: whether a token sees only itself and earlier tokens. A SlidingWindow with right=0, the default, always is.
        bias: whether the projections add a bias.
        qk_norm: whether each head of q and of k is divided by its root mean square and scaled by a learnable weight
            (head_dim,), as in Qwen3, before it is rotated.
        device, dtype: of the parameters, as for torch's modules.
        locality: which keys a query sees: None for all, a `nearfar.SlidingWindow`, a `nearfar.GridNeighborhood` or a
            `nearfar.ShiftedWindow`. Grids take neither packed sequences nor padding.
        top_k: how many keys of its locality a query keeps, None for all; see `nearfar.nn.top_k_schedule`.
        sigma_init: initial bandwidth of every head, in units of |q - k|.
        sigma_per_head: whether each query head learns a bandwidth; False: one for the layer, as in the authors' image models.
        position_bias: learn a table of relative positions, which a ShiftedWindow adds to the scores.
        backend: as in `nearfar.krause_attention`, which also checks locality and top_k.

    Attributes:
        log_sigma: (num_heads,) or (1,) parameter, float32 even in a half-precision layer (float64 in a float64 layer).
        position_table: (num_heads, locality.bias_size) parameter, likewise, or None.

    Raises:
        ValueError: dim, num_heads, num_kv_heads, head_dim, causal, locality, sigma_init or position_bias do not fit.
    """

    shown = (*SelfAttention.shown, "locality", "top_k", "sigma_init", "sigma_per_head", "backend")
    position_table: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        qk_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        locality: Locality | None = None,
        top_k: int | None = None,
        sigma_init: float = 2.5,
        sigma_per_head: bool = True,
        position_bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        locality = causal_locality(causal, locality)
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, head_dim, is_causal(locality), bias, qk_norm, device, dtype
        )
        require(0 < sigma_init < math.inf, f"sigma_init must be positive and finite, got {sigma_init}")
        self.locality = locality
        self.top_k = top_k
        self.backend = backend
        self.sigma_init = sigma_init
        self.sigma_per_head = sigma_per_head
        self.per_head = ("log_sigma", "position_table") if sigma_per_head else ("position_table",)
        own: Any = dict(dtype=own_dtype(dtype), device=device)
        self.log_sigma = nn.Parameter(torch.empty(num_heads if sigma_per_head else 1, **own))
        table = None
        if position_bias:
            if not isinstance(locality, ShiftedWindow):
                raise ValueError(f"position_bias is a table of a ShiftedWindow's offsets; locality is {locality}")
            table = nn.Parameter(torch.empty(num_heads, locality.bias_size, **own))
        self.register_parameter("position_table", table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set log_sigma to its initial value and position_table to 0; each projection has its own reset_parameters."""
        nn.init.constant_(self.log_sigma, math.log(self.sigma_init))
        if self.position_table is not None:
            nn.init.zeros_(self.position_table)

    @property
    def cache_type(self) -> type:  # type: ignore[override]
        return KVCache if self._window() is None else KrauseCache

    def attend(self, x: torch.Tensor, rotary: Rotary | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        if cu_seqlens is not None and not (self.locality is None or isinstance(self.locality, SlidingWindow)):
            kind = type(self.locality).__name__
            raise ValueError(f"a {kind} is one grid a batch element: it takes neither cu_seqlens nor key_padding_mask")
        q, k, v = self.split_heads(x, rotary)
        table = None if self.position_table is None else self.own("position_table", q.shape[1])
        o = krause_attention(
            q, k, v, self._sigma(q), self.locality,
            top_k=self.top_k, cu_seqlens=cu_seqlens, bias=table, backend=self.backend,
        )
        return self.merge_heads(o)

    def empty_cache(self, k: torch.Tensor, v: torch.Tensor, max_length: int | None) -> KVCache | KrauseCache:
        window = self._window()
        if window is None:
            return super().empty_cache(k, v, max_length)
        batch, heads, _, width = k.shape
        return KrauseCache.empty(batch, heads, window, width, v.shape[3], dtype=k.dtype, device=k.device)

    def decode(self, x: torch.Tensor, rotary: Rotary | None, cache: Any) -> torch.Tensor:
        q, k, v = self.split_heads(x, rotary)
        options: Any = dict(top_k=self.top_k, backend=self.backend)
        if self._window() is None:
            k, v = cache.extend(k, v)
            o = krause_attention(q, k, v, self._sigma(q), self.locality, **options)
        else:
            self._check_rolling(cache, k, v)
            if x.shape[1] == 1:
                o = krause_attention_step(q, k, v, cache, self._sigma(q), **options)
            else:
                o = attend_and_roll(q, k, v, cache, self._sigma(q), **options)
        return self.merge_heads(o)

    def _check_rolling(self, cache: KrauseCache, k: torch.Tensor, v: torch.Tensor) -> None:
        if cache.k.shape[2] != self._window():
            raise ValueError(f"cache must have a slot for each of {self._window()} keys, got {cache.k.shape[2]}")
        for name, kept, new in (("cache.k", cache.k, k), ("cache.v", cache.v, v)):
            shape = (*new.shape[:2], kept.shape[2], new.shape[3])
            check_exactly(name, meta(name, kept), shape, new.dtype, new.device)

    def _sigma(self, q: torch.Tensor) -> torch.Tensor:
        return self.own("log_sigma", q.shape[1] if self.sigma_per_head else None).exp()

    def _window(self) -> int | None:
        """How many keys a query of a causal layer sees at most."""
        limited = isinstance(self.locality, SlidingWindow) and self.locality.left >= 0
        return self.locality.left + 1 if limited else None  # type: ignore[union-attr]


def attend_and_roll(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KrauseCache,
    sigma: torch.Tensor,
    *,
    top_k: int | None,
    backend: Backend,
) -> torch.Tensor:
    """Krause attention of T new tokens after those of a rolling cache of W slots, into which they go: (B, Hq, T, Dv).

    Each sequence's last W - 1 keys come before its new ones, with queries that nobody reads. Sequences are as long as they
    are: one that has fewer keys is cut in two where they begin, as packed sequences are, without a look at its length from the
    host.

    Args:
        q: (B, Hq, T, D). k: (B, Hkv, T, D). v: (B, Hkv, T, Dv).
        cache: updated in place.
    """
    batch, _, tokens, _ = q.shape
    window = cache.k.shape[2]
    earlier = window - 1
    length = cache.length.long()[:, None]
    slots = ((length + torch.arange(-earlier, 0, device=q.device)) % window)[:, None, :, None]
    keys, values = (
        torch.cat((kept.take_along_dim(slots, 2), new), 2) for kept, new in ((cache.k, k), (cache.v, v))
    )
    span = earlier + tokens
    starts = torch.arange(batch, device=q.device)[:, None] * span
    cuts = torch.cat((starts, starts + (earlier - length).clamp(min=0)), 1)
    cu_seqlens = pad(cuts.flatten(), (0, 1), value=batch * span).to(torch.int32)
    q, keys, values = (x.transpose(0, 1).flatten(1, 2)[None] for x in (pad(q, (0, 0, earlier, 0)), keys, values))
    o = krause_attention(
        q, keys, values, sigma, SlidingWindow(earlier), top_k=top_k, cu_seqlens=cu_seqlens, backend=backend
    )
    count = min(tokens, window)
    slots = ((length + torch.arange(tokens - count, tokens, device=q.device)) % window)[:, None, :, None]
    for kept, new in ((cache.k, k), (cache.v, v)):
        last = new[:, :, tokens - count :]
        kept.scatter_(2, slots.expand(last.shape), last)
    cache.length.add_(tokens)
    return o[0].unflatten(1, (batch, span))[:, :, earlier:].transpose(0, 1)


def top_k_schedule(depth: int, first: int, last: int) -> list[int]:
    """top_k of each of `depth` layers, from `first` to `last` in equal steps, rounded (ties to even).

    Source: arXiv 2602.11534, whose image models go from 8 to 16 keys: `top_k_schedule(12, 8, 16)`.

    Raises:
        ValueError: depth, first or last is below 1.
    """
    for name, number in (("depth", depth), ("first", first), ("last", last)):
        require(number >= 1, f"{name} must be at least 1, got {number}")
    return [round(first + (last - first) * layer / max(depth - 1, 1)) for layer in range(depth)]
