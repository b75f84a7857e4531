"""Softmax attention (arXiv 1706.03762) as a self-attention layer: the baseline of the others, with their conventions."""

import torch
from torch import nn

from nearfar.localities import Locality
from nearfar.nn.base import SelfAttention, causal_locality, is_causal, own_dtype
from nearfar.nn.cache import KVCache
from nearfar.nn.positions import Rotary
from nearfar.ops.affine import softmax_attention
from nearfar.runtime.dispatch import Backend


class SoftmaxAttention(SelfAttention):
    """Multi-head self-attention by softmax: projections around `nearfar.softmax_attention`.

    Source: arXiv 1706.03762.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, locality, bias, qk_norm, device, dtype: as for
            `nearfar.nn.KrauseAttention`.
        sink: add exp(s) to the softmax denominators, s a learnable logit per query head that starts at 0.
        backend: as in `nearfar.softmax_attention`.

    Attributes:
        sink: (num_heads,) parameter, float32 (float64 in a float64 layer), or None.

    Raises:
        ValueError: dim, num_heads, num_kv_heads, head_dim, causal or locality do not fit.
    """

    per_head = ("sink",)
    shown = (*SelfAttention.shown, "locality", "backend")
    sink: nn.Parameter | None

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
        sink: bool = False,
        backend: Backend = "auto",
    ) -> None:
        locality = causal_locality(causal, locality)
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, head_dim, is_causal(locality), bias, qk_norm, device, dtype
        )
        self.locality = locality
        self.backend = backend
        made = torch.empty(num_heads, dtype=own_dtype(dtype), device=device) if sink else None
        self.register_parameter("sink", None if made is None else nn.Parameter(made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the sink to 0; each projection has its own reset_parameters."""
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def attend(self, x: torch.Tensor, rotary: Rotary | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        return self._attended(*self.split_heads(x, rotary), cu_seqlens)

    def decode(self, x: torch.Tensor, rotary: Rotary | None, cache: KVCache) -> torch.Tensor:
        q, k, v = self.split_heads(x, rotary)
        k, v = cache.extend(k, v, self.locality.left)  # type: ignore[union-attr]  # causal: a SlidingWindow
        return self._attended(q, k, v, None)

    def _attended(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        sink = None if self.sink is None else self.own("sink", q.shape[1])
        o = softmax_attention(q, k, v, locality=self.locality, sink=sink, cu_seqlens=cu_seqlens, backend=self.backend)
        return self.merge_heads(o)
