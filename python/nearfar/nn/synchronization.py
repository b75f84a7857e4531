"""Selective synchronization attention (arXiv 2602.14445) as a self-attention layer, and the OSN block around it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nearfar.nn.base import Layer, own_dtype
from nearfar.ops.synchronization import locked_share, order_parameter, synchronization_attention
from nearfar.runtime.checks import require
from nearfar.runtime.dispatch import Backend

RAW_INIT = 1.0  # of K and alpha before softplus, as in the paper


class SynchronizationAttention(Layer):
    """Multi-head self-attention among phase-locked oscillators: projections around `nearfar.synchronization_attention`.

    Source: arXiv 2602.14445. Each token has natural frequencies omega and phases theta, linear in x. The coupling K =
    softplus(raw_coupling) is one number for all heads, the bandwidth alpha = softplus(raw_bandwidth) one per head; all start at
    softplus(1) = 1.31. `nearfar.order_parameter` computes the order parameter r from theta.

    With the paper's frequency_scale of 1 and heads of 64, no two tokens lock at first: they are about 6.5 apart, and would lock
    within 0.6. The layer then passes on the token's own v, and neither omega nor theta gets a gradient. With a frequency_scale
    of c head_dim**-0.5, distances do not grow with the width. For normalised random tokens, about 1% of the pairs lock at first
    with c = 1, and all of them with c = 0.5; we recommend a c between these. `locked_share` measures the share.

    Under autocast the projections and the attention run in the autocast dtype; r, K and alpha stay float32.

    Args:
        dim: width of the input and of the output.
        num_heads: heads.
        head_dim: width of a head; None for dim / num_heads. Kernels take multiples of 8 from 16 to 256.
        causal: whether a token sees only itself and earlier tokens; its r is then that of these tokens.
        top_k: how many keys a query keeps, None for all that lock.
        frequency_scale: factor of omega, positive; 1 in the paper.
        sort: as in `nearfar.synchronization_attention`.
        grad_floor: as in `nearfar.synchronization_attention`.
        bias: whether the projections add a bias, as the paper's do.
        backend: as in `nearfar.synchronization_attention`, which also checks top_k, sort and grad_floor.

    Attributes:
        raw_coupling: (1,) parameter; older state dicts, in which it is 0-d, load. raw_bandwidth: (num_heads,) parameter. Both
            are float32 even in a half-precision layer (float64 in a float64 layer).

    Raises:
        ValueError: dim, num_heads, head_dim or frequency_scale do not fit.
    """

    per_head = ("raw_bandwidth",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        causal: bool = False,
        top_k: int | None = None,
        frequency_scale: float = 1.0,
        sort: bool = False,
        grad_floor: float = 1e-3,
        bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        require(num_heads >= 1, f"num_heads must be at least 1, got {num_heads}")
        if head_dim is None:
            require(
                dim % num_heads == 0,
                f"dim must be a multiple of num_heads unless head_dim is given, got {dim} and {num_heads}",
            )
            head_dim = dim // num_heads
        require(head_dim >= 1, f"head_dim must be at least 1, got {head_dim}")
        require(frequency_scale > 0, f"frequency_scale must be positive, got {frequency_scale}")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.causal = causal
        self.top_k = top_k
        self.frequency_scale = frequency_scale
        self.sort = sort
        self.grad_floor = grad_floor
        self.backend = backend
        width = num_heads * head_dim
        self.omega_proj = nn.Linear(dim, width, bias=bias)
        self.theta_proj = nn.Linear(dim, width, bias=bias)
        self.v_proj = nn.Linear(dim, width, bias=bias)
        self.out_proj = nn.Linear(width, dim, bias=bias)
        self.raw_coupling = nn.Parameter(torch.empty(1, dtype=own_dtype()))  # of one element: FSDP shards no 0-d parameter
        self.raw_bandwidth = nn.Parameter(torch.empty(num_heads, dtype=own_dtype()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set raw_coupling and raw_bandwidth to their initial value; each projection has its own reset_parameters."""
        nn.init.constant_(self.raw_coupling, RAW_INIT)
        nn.init.constant_(self.raw_bandwidth, RAW_INIT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within x.

        Args:
            x: (B, N, dim).

        Returns:
            (B, N, dim), in the dtype of the projections.
        """
        omega, *parameters = self._oscillators(x)
        o = synchronization_attention(
            omega, self.heads("v_proj", x, self.head_dim), *parameters, causal=self.causal, top_k=self.top_k, sort=self.sort,
            grad_floor=self.grad_floor, backend=self.backend,
        )
        return self.out_proj(o.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def locked_share(self, x: torch.Tensor) -> torch.Tensor:
        """(B, num_heads): share of the pairs of different tokens of x (B, N, dim) that lock, by `nearfar.locked_share`."""
        return locked_share(*self._oscillators(x), causal=self.causal)

    def _oscillators(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """omega, coupling, bandwidth and order of x."""
        omega = self.heads("omega_proj", x, self.head_dim) * self.frequency_scale
        order = order_parameter(self.heads("theta_proj", x, self.head_dim), causal=self.causal, backend=self.backend)
        bandwidth = self.own("raw_bandwidth", omega.shape[1])
        return omega, F.softplus(self.own("raw_coupling")), F.softplus(bandwidth), order

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}, top_k={self.top_k}, "
            f"frequency_scale={self.frequency_scale}, sort={self.sort}, grad_floor={self.grad_floor}, backend={self.backend!r}"
        )


class OSNBlock(Layer):
    """A block of an oscillatory synchronization network: x += SSA(LN(x)); x += FFN(LN(x)) with GELU.

    Source: arXiv 2602.14445. With dim 512, 8 heads and hidden_dim 2048 it has the paper's 3,152,393 parameters.

    Args:
        dim: width of the input and of the output.
        num_heads: heads.
        hidden_dim: width inside the FFN; None for 4 dim.
        **options: of `nearfar.nn.SynchronizationAttention`.

    Raises:
        ValueError: as `nearfar.nn.SynchronizationAttention`, or hidden_dim is below 1.
    """

    def __init__(self, dim: int, num_heads: int, *, hidden_dim: int | None = None, **options: Any) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        require(hidden_dim >= 1, f"hidden_dim must be at least 1, got {hidden_dim}")
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SynchronizationAttention(dim, num_heads, **options)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, N, dim) -> (B, N, dim)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))
