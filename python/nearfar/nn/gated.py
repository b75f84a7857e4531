"""A Krause branch beside softmax attention, mixed token by token (arXiv 2602.11534)."""

import math
from typing import Any

import torch
from torch import nn

from nearfar.localities import SlidingWindow
from nearfar.nn.base import AttentionLayer, is_causal
from nearfar.nn.cache import GatedCache
from nearfar.nn.krause import KrauseAttention
from nearfar.nn.positions import Rotary
from nearfar.nn.softmax import SoftmaxAttention
from nearfar.runtime.checks import require
from nearfar.runtime.dispatch import Backend

SOFTMAX_SHARE = 0.8  # of the output, at first
GATE_STD = 0.01  # of the gate's weights, at first


class Gate(nn.Linear):
    """The logits of both branches, with a start in favour of softmax attention."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=GATE_STD)
        with torch.no_grad():
            self.bias.zero_()[0] = math.log(SOFTMAX_SHARE / (1 - SOFTMAX_SHARE))


class KrauseGatedAttention(AttentionLayer):
    """Softmax attention over all tokens and Krause attention over a locality, mixed by a gate of each token.

        o = g_0 softmax(x) + g_1 krause(x),    (g_0, g_1) = softmax of gate_proj of both outputs, concatenated

    Source: arXiv 2602.11534, the form of its language models (window 32, top_k 16, sigma 5.5 beside pretrained attention). Each
    branch has projections of its own, its output projection included. The gate starts at 0.8 for softmax attention: its bias at
    log(0.8 / 0.2) and 0, its weights normal with a standard deviation of 0.01, as in the authors' code.

    With `nearfar.nn.parallel.HeadParallel`, shard the branches: {"softmax": HeadParallel(), "krause": HeadParallel()}.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, bias, qk_norm, device, dtype: as for `nearfar.nn.KrauseAttention`, of
            both branches.
        locality, top_k, sigma_init, sigma_per_head: of the Krause branch. A causal layer takes a causal window, and the other
            way round.
        backend: of both branches.

    Attributes:
        softmax: the `nearfar.nn.SoftmaxAttention`. krause: the `nearfar.nn.KrauseAttention`. gate_proj: Linear from 2 dim to 2.

    Raises:
        ValueError: as `nearfar.nn.KrauseAttention`, or one branch is causal and the other is not.
    """

    cache_type = GatedCache

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
        locality: SlidingWindow | None = None,
        top_k: int | None = None,
        sigma_init: float = 5.5,
        sigma_per_head: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        require(
            causal or not is_causal(locality),
            f"causal=False, and {locality} is causal: give causal=True, or a locality that sees later keys",
        )
        branch: Any = dict(
            num_kv_heads=num_kv_heads, head_dim=head_dim, causal=causal, bias=bias, qk_norm=qk_norm, backend=backend,
            device=device, dtype=dtype,
        )
        self.causal = causal
        self.softmax = SoftmaxAttention(dim, num_heads, **branch)
        self.krause = KrauseAttention(
            dim, num_heads, locality=locality, top_k=top_k, sigma_init=sigma_init, sigma_per_head=sigma_per_head, **branch
        )
        self.gate_proj = Gate(2 * dim, 2, device=device, dtype=dtype)

    @property
    def rotary_width(self) -> int:
        return self.softmax.head_dim

    def attend(self, x: torch.Tensor, rotary: Rotary | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        return self._mixed(*[branch(x, rotary=rotary, cu_seqlens=cu_seqlens) for branch in (self.softmax, self.krause)])

    def decode(self, x: torch.Tensor, rotary: Rotary | None, cache: GatedCache) -> torch.Tensor:
        return self._mixed(
            self.softmax(x, rotary=rotary, cache=cache.softmax), self.krause(x, rotary=rotary, cache=cache.krause)
        )

    def init_cache(
        self,
        batch: int,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> GatedCache:
        self._check_causal()
        return GatedCache(
            softmax=self.softmax.init_cache(batch, max_length, dtype=dtype, device=device),
            krause=self.krause.init_cache(batch, max_length, dtype=dtype, device=device),
        )

    def _mixed(self, softmax: torch.Tensor, krause: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(torch.cat((softmax, krause), -1)).softmax(-1).to(softmax.dtype)
        return gate[..., :1] * softmax + gate[..., 1:] * krause

    def extra_repr(self) -> str:
        return f"causal={self.causal}"
