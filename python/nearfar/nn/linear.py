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
    """What the two layers share. They name their operators and say how the factors lie in a projection."""

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
        """q or k (B, H, N, head_dim) as the operator takes it."""
        return heads

    def forward(
        self,
        x: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend within x, and to what `state` holds.

        Args:
            x: (B, N, dim).
            cu_seqlens: (S + 1,) int32, the ends of sequences packed along N in a batch of 1, starting with 0.
            state: what earlier tokens have left, from `init_state`, from an earlier call or from `step`; with cu_seqlens one
                for each sequence. It is not changed.
            return_state: return (output, state after the last token), to go on from; gradients flow through both states.

        Returns:
            (B, N, dim), in the dtype of the projections, or (that, state).
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
            dtype, device: of the tokens to come; None: those of the parameters. Quantized projections may need them.

        Raises:
            ValueError: feature_map looks at more than one token at a time.
        """
        k, v = self.probe(batch, dtype, device)
        self._check_feature_map(k)
        mapped = self.feature_map if callable(self.feature_map) else lambda factor: factor
        widths = [mapped(factor).shape[-1] for factor in self._factor_list(k)]
        dtype = torch.promote_types(v.dtype, torch.float32)
        return v.new_zeros(batch, v.shape[1], *widths, v.shape[-1] + 1, dtype=dtype)

    @torch.no_grad()
    def step(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Decode one token as the causal forward would, in time and memory that do not depend on the tokens before.

        Args:
            x: (B, 1, dim).
            state: from `init_state`, from `forward` or from earlier steps. It is updated in place.

        Returns:
            (B, 1, dim), without gradient.

        Raises:
            ValueError: the layer is not causal, x is longer than one token, state does not fit, or feature_map looks at more
                than one token at a time.
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
        """Refuse a function that looks across tokens, as no state can stand for it: two tokens at once, and one by one."""
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

    Source: arXiv 2602.12128 with one factor. Under autocast the projections and the attention run in the autocast dtype; the
    state stays float32.

    Args:
        dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention); None: num_heads.
        head_dim: width of a head of q and k; None: dim / num_heads. Kernels take multiples of 8 up to 256.
        value_dim: width of a head of v; None: dim / num_heads. Kernels take multiples of 8 from 16 to 256.
        feature_map: as in `nearfar.linear_attention`; a module's parameters are those of the layer.
        causal: whether a token sees only itself and those before it, which `step` needs.
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
    """Multi-head self-attention by products of kernels in linear time: projections around `nearfar.hadamard_attention`.

    Source: arXiv 2602.12128. Each head projects the input to every factor of q and of k on its own: in the rows of
    q_proj.weight and k_proj.weight, the factors of a head follow one another. Under autocast the projections and the attention
    run in the autocast dtype; the state stays float32.

    Args:
        dim: width of the input and of the output.
        num_heads: query heads.
        factor_widths: (d_1, .., d_R), the widths of the factors of a head of q and k. Kernels take up to three, multiples of 8
            up to 256, whose product is at most 16,384.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention); None: num_heads.
        value_dim: width of a head of v; None: dim / num_heads. Kernels take multiples of 8 from 16 to 256.
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
