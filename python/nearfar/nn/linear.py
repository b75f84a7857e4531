"""Linear and Hadamard linear attention (arXiv 2602.12128) as self-attention layers that decode from a state."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nearfar.nn.base import SelfAttention
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

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        value_dim: int | None,
        feature_map: FeatureMap,
        causal: bool,
        normalize: bool,
        bias: bool,
        backend: Backend,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, head_dim, value_dim, bias)
        self.feature_map = feature_map
        self.causal = causal
        self.normalize = normalize
        self.backend = backend
        self._maps_token_by_token = isinstance(feature_map, str)  # functions are tried before the first state

    def factors(self, heads: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """q or k (B, H, N, head_dim) in the form that the operator takes."""
        return heads

    def forward(
        self,
        x: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend within x and, through `state`, to earlier tokens.

        Args:
            x: (B, N, dim).
            cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed along N in a batch of 1, starting with 0.
            state: the state after earlier tokens, from `init_state`, an earlier call or `step`; with cu_seqlens, one per
                sequence. It is not changed.
            return_state: return (output, state after the last token). Gradients flow through both states.

        Returns:
            output (B, N, dim), in the dtype of the projections, or (output, state).
        """
        q, k, v = self.split_heads(x)
        if state is not None or return_state:
            self._check_feature_map(k)
        result = self.operator(
            self.factors(q), self.factors(k), v, feature_map=self.feature_map, normalize=self.normalize, causal=self.causal,
            initial_state=state, return_state=return_state, cu_seqlens=cu_seqlens, backend=self.backend,
        )
        if return_state:
            o, state = result
            return self.merge_heads(o), state
        return self.merge_heads(result)

    @torch.no_grad()
    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """The state before the first token: zeros (batch, num_kv_heads, d_1, .., d_R, value_dim + 1) in float32.

        d_1, .., d_R are the widths of the features. A float64 layer has float64 states.

        Args:
            batch: sequences.
            dtype, device: of the tokens to come; None for those of the parameters. Quantized projections may need them.

        Raises:
            ValueError: feature_map mixes tokens.
        """
        k, v = self.probe(batch, dtype, device)
        self._check_feature_map(k)
        mapped = self.feature_map if callable(self.feature_map) else lambda factor: factor
        widths = [mapped(factor).shape[-1] for factor in self._factor_list(k)]
        dtype = torch.promote_types(v.dtype, torch.float32)
        return v.new_zeros(batch, v.shape[1], *widths, v.shape[-1] + 1, dtype=dtype)

    @torch.no_grad()
    def step(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Decode one token as the causal forward would. Time and memory do not depend on the number of earlier tokens.

        Args:
            x: (B, 1, dim).
            state: from `init_state`, `forward` or earlier steps. It is updated in place.

        Returns:
            (B, 1, dim), not differentiable.

        Raises:
            ValueError: the layer is not causal, x has more than one token, state does not fit, or feature_map mixes tokens.
        """
        require(self.causal, f"step decodes with causal attention; this {type(self).__name__} has causal={self.causal}")
        q, k, v = self.split_heads(x)
        self._check_feature_map(k)
        o = self.step_operator(
            self.factors(q), self.factors(k), v, state,
            feature_map=self.feature_map, normalize=self.normalize, backend=self.backend,
        )
        return self.merge_heads(o)

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
                    "feature_map must map each token by itself, the same way each time, for states and steps; with another "
                    f"token beside it, its features change by {difference:.1e} of the largest"
                )
        self._maps_token_by_token = True

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, value_dim={self.value_dim}, "
            f"feature_map={self.feature_map!r}, causal={self.causal}, normalize={self.normalize}, backend={self.backend!r}"
        )


class LinearAttention(_StatefulAttention):
    """Multi-head self-attention in linear time: projections around `nearfar.linear_attention`.

    Source: arXiv 2602.12128, with one factor. Under autocast the projections and the attention run in the autocast dtype; the
    state stays float32.

    Args:
        dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention); None for num_heads.
        head_dim: width of a head of q and k; None for dim / num_heads. Kernels take multiples of 8 up to 256.
        value_dim: width of a head of v; None for dim / num_heads. Kernels take multiples of 8 from 16 to 256.
        feature_map: as in `nearfar.linear_attention`; the parameters of a module become the layer's.
        causal: whether a token sees only itself and earlier tokens; `step` requires it.
        normalize: whether the weights of a query are divided by their sum.
        bias: whether the projections add a bias.
        backend: as in `nearfar.linear_attention`, which also checks feature_map.

    Raises:
        ValueError: dim, num_heads, num_kv_heads, head_dim or value_dim do not fit.
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
        value_dim: int | None = None,
        feature_map: FeatureMap = "elu",
        causal: bool = False,
        normalize: bool = True,
        bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, head_dim, value_dim, feature_map, causal, normalize, bias, backend)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, {super().extra_repr()}"


class HadamardAttention(_StatefulAttention):
    """Multi-head self-attention by products of kernels, in linear time: projections around `nearfar.hadamard_attention`.

    Source: arXiv 2602.12128. Each head has its own projection for every factor of q and of k: in the rows of q_proj.weight and
    k_proj.weight, the factors of a head follow one another. Under autocast the projections and the attention run in the
    autocast dtype; the state stays float32.

    Args:
        dim: width of the input and of the output.
        num_heads: query heads.
        factor_widths: (d_1, .., d_R), widths of the factors of a head of q and k. Kernels take up to three factors, of widths
            that are multiples of 8 up to 256 and have a product of at most 16,384.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention); None for num_heads.
        value_dim: width of a head of v; None for dim / num_heads. Kernels take multiples of 8 from 16 to 256.
        feature_map, causal, normalize, bias, backend: as for `nearfar.nn.LinearAttention`.

    Raises:
        ValueError: dim, num_heads, factor_widths, num_kv_heads or value_dim do not fit.
    """

    operator = staticmethod(hadamard_attention)
    step_operator = staticmethod(hadamard_attention_step)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        factor_widths: Sequence[int] = (16, 16),
        num_kv_heads: int | None = None,
        value_dim: int | None = None,
        feature_map: FeatureMap = "elu",
        causal: bool = False,
        normalize: bool = True,
        bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        factor_widths = tuple(factor_widths)
        require(
            bool(factor_widths) and min(factor_widths) >= 1,
            f"factor_widths must be one or more widths of at least 1, got {factor_widths}",
        )
        super().__init__(
            dim, num_heads, num_kv_heads, sum(factor_widths), value_dim, feature_map, causal, normalize, bias, backend
        )
        self.factor_widths = factor_widths

    def factors(self, heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return heads.split(self.factor_widths, -1)

    def extra_repr(self) -> str:
        return f"factor_widths={self.factor_widths}, {super().extra_repr()}"
