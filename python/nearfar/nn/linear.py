"""Linear and Hadamard linear attention (arXiv 2602.12128) as self-attention layers that decode from a state."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nearfar.nn.base import SelfAttention
from nearfar.nn.positions import Rotary, rotate
from nearfar.ops.linear import (
    FeatureMap,
    hadamard_attention,
    hadamard_attention_step,
    linear_attention,
    linear_attention_step,
)
from nearfar.runtime.checks import is_plain, require
from nearfar.runtime.dispatch import Backend


class _StatefulAttention(SelfAttention):
    """Base of the two layers, which name their operators and split projections into factors."""

    operator: Callable[..., Any]
    step_operator: Callable[..., torch.Tensor]
    cache_type = torch.Tensor
    shown: tuple[str, ...] = (*SelfAttention.shown, "value_dim", "feature_map", "normalize", "backend")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        value_dim: int | None,
        causal: bool,
        bias: bool,
        qk_norm: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        feature_map: FeatureMap,
        normalize: bool,
        backend: Backend,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, head_dim, value_dim, causal, bias, qk_norm, device, dtype)
        self.feature_map = feature_map
        self.normalize = normalize
        self.backend = backend
        self._maps_token_by_token = isinstance(feature_map, str)  # functions are tried before the first state

    def factors(self, heads: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """q or k (B, H, N, head_dim) in the form that the operator takes."""
        return heads

    def attend(self, x: torch.Tensor, rotary: Rotary | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self.split_heads(x, rotary)
        if cu_seqlens is not None:
            self._check_feature_map(k)
        return self.merge_heads(self._attended(q, k, v, cu_seqlens=cu_seqlens))

    def empty_cache(self, k: torch.Tensor, v: torch.Tensor, max_length: int | None) -> torch.Tensor:
        self._check_feature_map(k)
        mapped = self.feature_map if callable(self.feature_map) else lambda factor: factor
        widths = [mapped(factor).shape[-1] for factor in self._factor_list(k)]
        return v.new_zeros(*v.shape[:2], *widths, v.shape[-1] + 1, dtype=torch.promote_types(v.dtype, torch.float32))

    def decode(self, x: torch.Tensor, rotary: Rotary | None, cache: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split_heads(x, rotary)
        self._check_feature_map(k)
        if x.shape[1] > 1:
            o, state = self._attended(q, k, v, initial_state=cache, return_state=True)
            cache.copy_(state)
            return self.merge_heads(o)
        o = self.step_operator(
            self.factors(q), self.factors(k), v, cache,
            feature_map=self.feature_map, normalize=self.normalize, backend=self.backend,
        )
        return self.merge_heads(o)

    def _attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        return self.operator(
            self.factors(q), self.factors(k), v,
            feature_map=self.feature_map, normalize=self.normalize, causal=self.causal, backend=self.backend, **options,
        )

    def _factor_list(self, heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        factors = self.factors(heads)
        return factors if isinstance(factors, tuple) else (factors,)

    @torch.no_grad()
    def _check_feature_map(self, k: torch.Tensor) -> None:
        """Refuse a function that mixes tokens, as no state represents it: compare two tokens at once with one by one."""
        if self._maps_token_by_token or not is_plain(k) or k.is_meta:
            return
        for factor in self._factor_list(k):
            heads, width = factor.shape[1], factor.shape[3]
            sizes = torch.tensor([[1.0], [3.0]], device=k.device)
            pair = sizes * torch.arange(2 * width, device=k.device).view(2, width).sin()
            pair = pair.to(k.dtype).expand(1, heads, 2, width)
            together = self.feature_map(pair)  # type: ignore[operator]
            alone = torch.cat([self.feature_map(token) for token in pair.split(1, 2)], 2)  # type: ignore[operator]
            difference = (together - alone).abs().max() / together.abs().max()
            if difference > 0.05:  # more than rounding, in 16 bits or of a quantized map
                raise ValueError(
                    "feature_map must map each token by itself, the same way each time, for caches and packed sequences; with "
                    f"another token beside it, its features change by {difference:.1e} of the largest"
                )
        self._maps_token_by_token = True


class LinearAttention(_StatefulAttention):
    """Multi-head self-attention in linear time: projections around `nearfar.linear_attention`.

    Source: arXiv 2602.12128, with one factor. Under autocast the projections and the attention run in the autocast dtype; the
    state stays float32.

    Its cache is the state, a tensor (batch, num_kv_heads, features, value_dim + 1) in float32 (float64 in a float64 layer),
    zeros before the first token. `nearfar.linear_attention` continues from it with gradients.

    Args:
        dim, num_heads, num_kv_heads, causal, bias, qk_norm, device, dtype: as for `nearfar.nn.KrauseAttention`.
        head_dim: width of a head of q and k; None for dim / num_heads. Kernels take multiples of 8 up to 256.
        value_dim: width of a head of v; None for dim / num_heads. Kernels take multiples of 8 from 16 to 256.
        feature_map: as in `nearfar.linear_attention`; the parameters of a module become the layer's. It comes after rotary, so
            weights depend on relative positions alone only with "identity".
        normalize: whether the weights of a query are divided by their sum.
        backend: as in `nearfar.linear_attention`, which also checks feature_map.

    Raises:
        ValueError: dim, num_heads, num_kv_heads, head_dim or value_dim do not fit; from init_cache and calls with a cache,
            packed sequences or padding also where feature_map mixes tokens.
    """

    operator = staticmethod(linear_attention)
    step_operator = staticmethod(linear_attention_step)

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
        value_dim: int | None = None,
        feature_map: FeatureMap = "elu",
        normalize: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, value_dim, causal, bias, qk_norm, device, dtype,
            feature_map, normalize, backend,
        )


class HadamardAttention(_StatefulAttention):
    """Multi-head self-attention by products of kernels, in linear time: projections around `nearfar.hadamard_attention`.

    Source: arXiv 2602.12128. Each head has its own projection for every factor of q and of k: in the rows of q_proj.weight and
    k_proj.weight, the factors of a head follow one another. qk_norm is over all factors of a head together; rotary turns each
    factor by itself (`nearfar.nn.rotary(N, factor_widths)`). Under autocast the projections and the attention run in the
    autocast dtype; the state stays float32.

    Its cache is the state, a tensor (batch, num_kv_heads, d_1, .., d_R, value_dim + 1), as of `nearfar.nn.LinearAttention`.

    Args:
        dim, num_heads, num_kv_heads, causal, bias, qk_norm, device, dtype: as for `nearfar.nn.KrauseAttention`.
        head_dim: the sum of factor_widths; without these, two factors of half of it.
        factor_widths: (d_1, .., d_R), widths of the factors of a head of q and k; None for (16, 16), or for what head_dim says.
            Kernels take up to three factors, of widths that are multiples of 8 up to 256 and have a product of at most 16,384.
        value_dim, feature_map, normalize, backend: as for `nearfar.nn.LinearAttention`.

    Raises:
        ValueError: dim, num_heads, head_dim, factor_widths, num_kv_heads or value_dim do not fit; from init_cache and calls
            with a cache, packed sequences or padding also where feature_map mixes tokens.
    """

    operator = staticmethod(hadamard_attention)
    step_operator = staticmethod(hadamard_attention_step)
    shown = (*_StatefulAttention.shown, "factor_widths")

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
        factor_widths: Sequence[int] | None = None,
        value_dim: int | None = None,
        feature_map: FeatureMap = "elu",
        normalize: bool = True,
        backend: Backend = "auto",
    ) -> None:
        if factor_widths is None:
            factor_widths = (16, 16) if head_dim is None else (head_dim // 2, head_dim // 2)
        widths = tuple(factor_widths)
        require(
            bool(widths) and min(widths) >= 1, f"factor_widths must be one or more widths of at least 1, got {widths}"
        )
        require(
            head_dim in (None, sum(widths)), f"head_dim must be the sum of factor_widths, {sum(widths)}, got {head_dim}"
        )
        super().__init__(
            dim, num_heads, num_kv_heads, sum(widths), value_dim, causal, bias, qk_norm, device, dtype,
            feature_map, normalize, backend,
        )
        self.factor_widths = widths

    def factors(self, heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return heads.split(self.factor_widths, -1)

    def rotated(self, heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        widths = self.factor_widths
        require(all(width % 2 == 0 for width in widths), f"rotary needs even factor_widths, got {widths}")
        cos, sin = (part.expand(*part.shape[:-1], sum(widths)).split(widths, -1) for part in rotary)
        return torch.cat([rotate(*parts) for parts in zip(self.factors(heads), cos, sin, strict=True)], -1)
