"""Krause attention (arXiv 2602.11534) as a self-attention layer that decodes from a rolling cache."""

import math

import torch
from torch import nn

from nearfar.localities import SlidingWindow
from nearfar.nn.base import SelfAttention, own_dtype
from nearfar.ops.krause import krause_attention
from nearfar.ops.krause_step import KrauseCache, krause_attention_step
from nearfar.runtime.checks import require
from nearfar.runtime.dispatch import Backend


class KrauseAttention(SelfAttention):
    """Multi-head self-attention by distance: projections around `nearfar.krause_attention`, with a learnable bandwidth.

    Source: arXiv 2602.11534. Each query head learns sigma = exp(log_sigma), which stays positive. Under autocast the
    projections and the attention run in the autocast dtype; sigma stays float32.

    Args:
        dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention); None for num_heads.
        head_dim: width of a head; None for dim / num_heads. Kernels take multiples of 8 from 16 to 256.
        locality: which keys a query sees: None for all, or a `nearfar.SlidingWindow`, causal with right=0. `step` requires a
            causal one with a limit on the left.
        top_k: how many keys of its locality a query keeps, None for all.
        sigma_init: initial bandwidth of every head, in units of |q - k|.
        bias: whether the projections add a bias.
        backend: as in `nearfar.krause_attention`, which also checks locality and top_k.

    Attributes:
        log_sigma: (num_heads,) parameter, float32 even in a half-precision layer (float64 in a float64 layer).

    Raises:
        ValueError: dim, num_heads, num_kv_heads, head_dim or sigma_init do not fit.
    """

    per_head = ("log_sigma",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        locality: SlidingWindow | None = None,
        top_k: int | None = None,
        sigma_init: float = 2.5,
        bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, head_dim, head_dim, bias)
        require(0 < sigma_init < math.inf, f"sigma_init must be positive and finite, got {sigma_init}")
        self.locality = locality
        self.top_k = top_k
        self.backend = backend
        self.sigma_init = sigma_init
        self.log_sigma = nn.Parameter(torch.empty(num_heads, dtype=own_dtype()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set log_sigma to its initial value; each projection has its own reset_parameters."""
        nn.init.constant_(self.log_sigma, math.log(self.sigma_init))

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within x.

        Args:
            x: (B, N, dim).
            cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed along N in a batch of 1, starting with 0.

        Returns:
            (B, N, dim), in the dtype of the projections.
        """
        q, k, v = self.split_heads(x)
        o = krause_attention(
            q, k, v, self._sigma(q), self.locality,
            top_k=self.top_k, cu_seqlens=cu_seqlens, backend=self.backend,
        )
        return self.merge_heads(o)

    @torch.no_grad()
    def init_cache(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> KrauseCache:
        """An empty `nearfar.KrauseCache` of left + 1 slots, in the dtype of the projections or, under autocast, of autocast.

        Args:
            batch: sequences.
            dtype, device: of the tokens to come; None for those of the parameters. Quantized projections may need them.

        Raises:
            ValueError: the locality is not a causal SlidingWindow with a limit on the left.
        """
        window = self._causal_window()
        k, _ = self.probe(batch, dtype, device)
        return KrauseCache.empty(batch, k.shape[1], window, self.head_dim, self.value_dim, dtype=k.dtype, device=k.device)

    @torch.no_grad()
    def cache_after(self, x: torch.Tensor) -> KrauseCache:
        """The cache after the tokens x (B, N, dim), such as a prompt: `step` continues from it.

        Raises:
            ValueError: the locality is not a causal SlidingWindow with a limit on the left.
        """
        window = self._causal_window()
        _, k, v = self.split_heads(x[:, -window:])
        return KrauseCache.after(k, v, window, length=x.shape[1])

    @torch.no_grad()
    def step(self, x: torch.Tensor, cache: KrauseCache) -> torch.Tensor:
        """Decode one token of each sequence as the causal forward would. Time and memory depend on the window alone.

        Args:
            x: (B, 1, dim).
            cache: from `init_cache` or `cache_after`. It is updated in place.

        Returns:
            (B, 1, dim), not differentiable.

        Raises:
            TypeError: cache is not a KrauseCache, or has another dtype.
            ValueError: the locality is not a causal SlidingWindow with a limit on the left, x has more than one token, or cache
                does not fit.
        """
        window = self._causal_window()
        q, k, v = self.split_heads(x)
        if isinstance(cache, KrauseCache):  # the operator says what is wrong with anything else
            require(cache.k.shape[2] == window, f"cache must have a slot for each of {window} keys, got {cache.k.shape[2]}")
        o = krause_attention_step(q, k, v, cache, self._sigma(q), top_k=self.top_k, backend=self.backend)
        return self.merge_heads(o)

    def _sigma(self, q: torch.Tensor) -> torch.Tensor:
        return self.own("log_sigma", q.shape[1]).exp()

    def _causal_window(self) -> int:
        """How many keys a query sees, for decoding."""
        limited = isinstance(self.locality, SlidingWindow) and self.locality.right == 0 and self.locality.left >= 0
        require(limited, f"decoding needs locality=SlidingWindow(left, 0) with left >= 0; this layer has {self.locality}")
        return self.locality.left + 1  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"locality={self.locality}, top_k={self.top_k}, backend={self.backend!r}"
        )
