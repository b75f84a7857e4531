"""Selective synchronization attention (arXiv 2602.14445) as a self-attention layer, and the OSN block around it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nearfar.nn.base import NORM_EPS, AttentionLayer, Layer, head_width, own_dtype
from nearfar.nn.cache import SynchronizationCache
from nearfar.nn.positions import Rotary, check_rotary, rotate
from nearfar.ops.synchronization import locked_share, order_parameter, synchronization_attention
from nearfar.runtime.checks import require
from nearfar.runtime.dispatch import Backend
from nearfar.runtime.packing import check_cu_seqlens

RAW_INIT = 1.0  # of K and alpha before softplus, as in the paper


class SynchronizationAttention(AttentionLayer):
    """Multi-head self-attention among phase-locked oscillators: projections around `nearfar.synchronization_attention`.

    Source: arXiv 2602.14445. Each token has natural frequencies omega and phases theta, linear in x. The coupling K =
    softplus(raw_coupling) is one number for all heads, the bandwidth alpha = softplus(raw_bandwidth) one per head; all start at
    softplus(1) = 1.31. `nearfar.order_parameter` computes the order parameter r from theta.

    With the paper's frequency_scale of 1 and heads of 64, no two tokens lock at first: they are about 6.5 apart, and would lock
    within 0.6. The layer then passes on the token's own v, and neither omega nor theta gets a gradient. With a frequency_scale
    of c head_dim**-0.5, distances do not grow with the width. For normalised random tokens, about 1% of the pairs lock at first
    with c = 1, and all of them with c = 0.5; we recommend a c between these. `locked_share` measures the share.

    Packed and padded sequences attend one by one, as the operator takes no packed ones yet; their boundaries are read back from
    the device. Under autocast the projections and the attention run in the autocast dtype; r, K and alpha stay float32.

    Args:
        dim, num_heads, device, dtype: as for `nearfar.nn.KrauseAttention`.
        num_kv_heads: num_heads or None, as a head's queries and keys are one omega.
        head_dim: width of a head; None for dim / num_heads. Kernels take multiples of 8 from 16 to 256.
        causal: whether a token sees only itself and earlier tokens; its r is then that of these tokens.
        bias: whether the projections add a bias, as the paper's do.
        qk_norm: whether each head of omega is divided by its root mean square and scaled by a learnable weight (head_dim,).
        top_k: how many keys a query keeps, None for all that lock.
        frequency_scale: factor of omega, positive; 1 in the paper.
        sort: as in `nearfar.synchronization_attention`.
        grad_floor: as in `nearfar.synchronization_attention`.
        backend: as in `nearfar.synchronization_attention`, which also checks top_k, sort and grad_floor.

    Attributes:
        raw_coupling: (1,) parameter; older state dicts, in which it is 0-d, load. raw_bandwidth: (num_heads,) parameter. Both
            are float32 even in a half-precision layer (float64 in a float64 layer).

    Raises:
        ValueError: dim, num_heads, num_kv_heads, head_dim or frequency_scale do not fit.
    """

    per_head = ("raw_bandwidth",)
    cache_type = SynchronizationCache
    shown = (
        "num_heads", "head_dim", "causal", "qk_norm", "top_k", "frequency_scale", "sort", "grad_floor", "backend"
    )

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
        top_k: int | None = None,
        frequency_scale: float = 1.0,
        sort: bool = False,
        grad_floor: float = 1e-3,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        head_dim = head_width("head_dim", head_dim, dim, num_heads)
        require(
            num_kv_heads in (None, num_heads),
            f"num_kv_heads must be num_heads, {num_heads}, as queries and keys are one omega, got {num_kv_heads}",
        )
        require(frequency_scale > 0, f"frequency_scale must be positive, got {frequency_scale}")
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.causal = causal
        self.qk_norm = qk_norm
        self.top_k = top_k
        self.frequency_scale = frequency_scale
        self.sort = sort
        self.grad_floor = grad_floor
        self.backend = backend
        width = num_heads * head_dim
        made: Any = dict(device=device, dtype=dtype)
        own: Any = dict(device=device, dtype=own_dtype(dtype))
        self.omega_proj = nn.Linear(dim, width, bias=bias, **made)
        self.theta_proj = nn.Linear(dim, width, bias=bias, **made)
        self.v_proj = nn.Linear(dim, width, bias=bias, **made)
        self.out_proj = nn.Linear(width, dim, bias=bias, **made)
        self.omega_norm = nn.RMSNorm(head_dim, eps=NORM_EPS, **made) if qk_norm else None
        self.raw_coupling = nn.Parameter(torch.empty(1, **own))  # of one element: FSDP shards no 0-d parameter
        self.raw_bandwidth = nn.Parameter(torch.empty(num_heads, **own))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set raw_coupling and raw_bandwidth to their initial value; each projection has its own reset_parameters."""
        nn.init.constant_(self.raw_coupling, RAW_INIT)
        nn.init.constant_(self.raw_bandwidth, RAW_INIT)

    def attend(self, x: torch.Tensor, rotary: Rotary | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        tensors = self._projected(x, rotary)
        if cu_seqlens is None:
            return self._out(self._attended(*tensors))
        require(x.shape[0] == 1, f"cu_seqlens packs sequences in a batch of 1, got a batch of {x.shape[0]}")
        check_cu_seqlens(cu_seqlens, x.shape[1])
        lengths = [length for length in cu_seqlens.diff().tolist() if length] or [0]
        sequences = zip(*(tensor.split(lengths, 2) for tensor in tensors), strict=True)
        return self._out(torch.cat([self._attended(*sequence) for sequence in sequences], 2))

    def empty_cache(self, k: torch.Tensor, v: torch.Tensor, max_length: int | None) -> SynchronizationCache:
        phases = k.new_zeros(*k.shape[:2], 2, k.shape[3], dtype=torch.promote_types(k.dtype, torch.float32))
        return SynchronizationCache(**self.room(k, v, max_length), phases=phases)

    def decode(self, x: torch.Tensor, rotary: Rotary | None, cache: SynchronizationCache) -> torch.Tensor:
        if cache.summed != cache.length:
            raise ValueError(
                f"cache cannot drop tokens: phases is the sum over {cache.summed}, and length is {cache.length}"
            )
        omega, theta, v = self._projected(x, rotary)
        keys, values = cache.extend(omega, v)
        angle = theta.to(cache.phases.dtype)
        sums = cache.phases[:, :, :, None] + torch.stack((angle.cos(), angle.sin()), 2).cumsum(3)
        count = torch.arange(cache.summed + 1, cache.length + 1, device=x.device)
        order = torch.linalg.vector_norm(sums, dim=2).mean(-1) / count
        cache.phases.copy_(sums[:, :, :, -1])
        cache.summed = cache.length
        return self._out(self._synchronized(omega, values, order, omega_k=keys))

    def probe(
        self, batch: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        omega, _, v = self._projected(self.like_tokens(batch, self.omega_proj, self.dim, dtype, device), None)
        return omega, v

    @torch.no_grad()
    def locked_share(self, x: torch.Tensor, *, rotary: Rotary | None = None) -> torch.Tensor:
        """(B, num_heads): share of the pairs of different tokens of x (B, N, dim) that lock, by `nearfar.locked_share`."""
        omega, theta, _ = self._projected(x, rotary)
        return locked_share(omega, *self._parameters_of(omega), self._order(theta), causal=self.causal)

    def _projected(
        self, x: torch.Tensor, rotary: Rotary | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """omega, theta and v of x, (B, num_heads, N, head_dim) each."""
        omega = self.heads("omega_proj", x, self.head_dim)
        if self.omega_norm is not None:
            omega = self.omega_norm(omega).to(omega.dtype)
        omega = omega * self.frequency_scale
        if rotary is not None:
            check_rotary(rotary, x, self.head_dim)
            omega = rotate(omega, *rotary)
        return omega, self.heads("theta_proj", x, self.head_dim), self.heads("v_proj", x, self.head_dim)

    def _attended(self, omega: torch.Tensor, theta: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._synchronized(omega, v, self._order(theta), sort=self.sort)

    def _synchronized(self, omega: torch.Tensor, v: torch.Tensor, order: torch.Tensor, **options: Any) -> torch.Tensor:
        return synchronization_attention(
            omega, v, *self._parameters_of(omega), order,
            causal=self.causal, top_k=self.top_k, grad_floor=self.grad_floor, backend=self.backend, **options,
        )

    def _order(self, theta: torch.Tensor) -> torch.Tensor:
        return order_parameter(theta, causal=self.causal, backend=self.backend)

    def _parameters_of(self, omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """coupling and bandwidth, of the heads of omega."""
        return F.softplus(self.own("raw_coupling")), F.softplus(self.own("raw_bandwidth", omega.shape[1]))

    def _out(self, o: torch.Tensor) -> torch.Tensor:
        return self.out_proj(o.transpose(1, 2).flatten(2))


class OSNBlock(Layer):
    """A block of an oscillatory synchronization network: x += SSA(LN(x)); x += FFN(LN(x)) with GELU.

    Source: arXiv 2602.14445. With dim 512, 8 heads and hidden_dim 2048 it has the paper's 3,152,393 parameters.

    Args:
        dim: width of the input and of the output.
        num_heads: heads.
        hidden_dim: width inside the FFN; None for 4 dim.
        bias: whether the projections of the attention add a bias, as the paper's do.
        device, dtype, **options: of `nearfar.nn.SynchronizationAttention`.

    Raises:
        ValueError: as `nearfar.nn.SynchronizationAttention`, or hidden_dim is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        hidden_dim: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        require(hidden_dim >= 1, f"hidden_dim must be at least 1, got {hidden_dim}")
        made: Any = dict(device=device, dtype=dtype)
        self.attention_norm = nn.LayerNorm(dim, **made)
        self.attention = SynchronizationAttention(dim, num_heads, bias=bias, **made, **options)
        self.ffn_norm = nn.LayerNorm(dim, **made)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden_dim, **made), nn.GELU(), nn.Linear(hidden_dim, dim, **made))

    def forward(
        self,
        x: torch.Tensor,
        *,
        rotary: Rotary | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: SynchronizationCache | None = None,
    ) -> torch.Tensor:
        """x (B, N, dim) -> (B, N, dim). The other arguments are those of `nearfar.nn.SynchronizationAttention`.

        To padding tokens the block adds its FFN alone.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = x + self.attention(
                self.attention_norm(x), rotary=rotary, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, cache=cache
            )
            return x + self.ffn(self.ffn_norm(x))

    def init_cache(
        self,
        batch: int,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SynchronizationCache:
        """The cache of the attention, as for `nearfar.nn.SynchronizationAttention`."""
        return self.attention.init_cache(batch, max_length, dtype=dtype, device=device)
