"""Affine-scaled attention (arXiv 2602.23057) as a self-attention layer that decodes from a cache."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from nearfar.nn.average import empty_history, moving_average
from nearfar.nn.base import SelfAttention, own_dtype
from nearfar.nn.cache import AffineCache
from nearfar.nn.positions import Rotary
from nearfar.ops.affine import affine_attention, softmax_attention
from nearfar.runtime.checks import check_cu_seqlens, require
from nearfar.runtime.dispatch import Backend
from nearfar.runtime.packing import token_bounds

PHI = {"clip": lambda logits: (0.1 * logits + 0.5).clamp(0, 1), "sigmoid": torch.sigmoid}  # eq. 11, and its ablation


class AffineScaledAttention(SelfAttention):
    """Softmax attention with weights scaled and shifted per query: projections around `nearfar.affine_attention`.

        a = phi(W_a x), one number per token and query head                            [eq. 7, 11]
        b = (a_ma - a) / N, N the length of the sequence                               [eq. 8]
        a_ma <- momentum a_ma + (1 - momentum) mean(a), when training                  [eq. 9]

    Source: arXiv 2602.23057. We read eq. 9 as defining the a_ma of eq. 8: b uses the average that already includes the current
    tokens. In training, a token therefore depends on all tokens of the batch through their mean, as in batch normalization. In
    eval the average is frozen, and a causal layer is causal bit for bit. Gradients flow through the a in b, but not through
    a_ma.

    N is the length of the whole sequence, also where causality hides some of it: x.shape[1], a sequence's own length where
    several are packed or padded, and in calls with a cache its `num_keys`, which is max_length. A causal forward of N tokens
    is therefore what a cache of max_length=N computes in pieces. To decode as a model was trained, on sequences of one length,
    set `cache.num_keys` to that length.

    Every forward in training mode without a cache updates a_ma once, from all tokens that key_padding_mask leaves; with
    gradient accumulation, each micro-batch updates it. If torch.distributed is initialised, the mean is over the tokens of all
    ranks of process_group, so that a_ma is the same on all of them and the broadcast of DistributedDataParallel changes
    nothing. Every rank of that group has to train the layer, equally often.

    Activation checkpointing repeats forward inside the backward. The repeated call updates nothing and uses the a_ma of the
    first one, which the layer finds by the mean of a among its last 256 forwards. Gradients are therefore exact with both kinds
    of checkpointing, also nested, with several micro-batches in flight, and with several calls of one layer. Calls whose tokens
    have the same mean of a to the last bit, such as calls with equal x, cannot be distinguished: all use the a_ma of the last
    one. You can checkpoint a compiled layer; a compiled function that checkpoints the layer raises in the backward.

    Under autocast the projections and the attention run in the autocast dtype. a, b and a_ma are float32, even in a
    half-precision layer.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, qk_norm, device, dtype: as for `nearfar.nn.KrauseAttention`.
        bias: whether the projections, including W_a and W_g, add a bias.
        window_size: (left, right), how many keys before and after its own a query sees, -1 for all; the sum that b multiplies
            runs over the same keys.
        phi: "clip" for clip(0.1 W_a x + 0.5, 0, 1), the paper's, or "sigmoid" for sigmoid(W_a x).
        momentum: of a_ma, from 0 to 1.
        output_gate: multiply the heads' outputs by sigmoid(W_g x), elementwise.
        sink: add exp(s) to the softmax denominators, s a learnable logit per query head that starts at 0 (eq. 3).
        process_group: the ranks over whose tokens a_ma averages; None for the default group. Pass it with pipeline parallelism,
            where only some ranks train this layer. The layer stores the group's name.
        backend: as in `nearfar.affine_attention`, which also checks window_size.

    Attributes:
        alpha_average: (num_heads,) buffer, a_ma; it starts at 0.
        sink: (num_heads,) parameter, or None. Both are float32 (float64 in a float64 layer).

    Raises:
        ValueError: dim, num_heads, num_kv_heads, head_dim, phi or momentum do not fit.
    """

    per_head = ("sink", "alpha_average")
    cache_type = AffineCache
    shown = (*SelfAttention.shown, "window_size", "phi", "momentum", "backend")
    sink: nn.Parameter | None
    alpha_average: torch.Tensor

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
        window_size: tuple[int, int] = (-1, -1),
        phi: Literal["clip", "sigmoid"] = "clip",
        momentum: float = 0.9,
        output_gate: bool = False,
        sink: bool = False,
        process_group: dist.ProcessGroup | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, head_dim, head_dim, causal, bias, qk_norm, device, dtype)
        require(phi in PHI, f'phi must be "clip" or "sigmoid", got {phi!r}')
        require(0 <= momentum <= 1, f"momentum must be from 0 to 1, got {momentum}")
        self.window_size = window_size
        self.phi = phi
        self.momentum = momentum
        self.backend = backend
        made: Any = dict(device=device, dtype=dtype)
        own: Any = dict(device=device, dtype=own_dtype(dtype))
        self.alpha_proj = nn.Linear(dim, num_heads, bias=bias, **made)
        self.gate_proj = nn.Linear(dim, num_heads * self.value_dim, bias=bias, **made) if output_gate else None
        self.register_parameter("sink", nn.Parameter(torch.empty(num_heads, **own)) if sink else None)
        self.register_buffer("alpha_average", torch.empty(num_heads, **own))
        self.group_name = "" if process_group is None else process_group.group_name  # copies and pickles, unlike the group
        self._history = empty_history(num_heads, self.alpha_average.dtype, self.alpha_average.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the sink and the average to 0; each projection has its own reset_parameters."""
        nn.init.zeros_(self.alpha_average)
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def attend(self, x: torch.Tensor, rotary: Rotary | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self.split_heads(x, rotary)
        length: int | torch.Tensor = x.shape[1]
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, q, k)
            first, end = token_bounds(cu_seqlens, x.shape[1])
            length = end - first
        alpha = self._alpha(x, q)
        average = self._updated_average(alpha) if self.training else self.own("alpha_average", q.shape[1])
        o = affine_attention(
            q, k, v, alpha, _beta(alpha, average, length), causal=self.causal, window_size=self.window_size,
            sink=self._sink(q), cu_seqlens=cu_seqlens, backend=self.backend,
        )
        return self._gated_out(o, x)

    def empty_cache(self, k: torch.Tensor, v: torch.Tensor, max_length: int | None) -> AffineCache:
        room = self.room(k, v, max_length)
        total = v.new_zeros(*v.shape[:2], v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32))
        return AffineCache(**room, total=total, num_keys=room["k"].shape[2])

    def decode(self, x: torch.Tensor, rotary: Rotary | None, cache: AffineCache) -> torch.Tensor:
        """forward after the tokens of a cache. a_ma is not updated.

        If the window has no limit on the left, the bias term costs O(1) per token, from the running sum of v.
        """
        q, new_k, new_v = self.split_heads(x, rotary)
        before = cache.length
        k, v = cache.extend(new_k, new_v, self.window_size[0])
        if cache.summed != before:
            cache.total.copy_(cache.v[:, :, :before].sum(2, dtype=cache.total.dtype))
        alpha = self._alpha(x, q)
        beta = _beta(alpha, self.own("alpha_average", q.shape[1]), cache.num_keys)
        options: Any = {"causal": True, "window_size": self.window_size, "sink": self._sink(q), "backend": self.backend}
        new = v[:, :, -x.shape[1] :].to(cache.total.dtype).cumsum(2)
        if self.window_size[0] < 0:
            o = softmax_attention(q, k, v, **options)
            # Heads of a group share the sum of their values by broadcasting.
            scaled, sums = alpha[..., None] * o, (cache.total[:, :, None] + new)[:, :, None]
            shift = beta[..., None].unflatten(1, (new.shape[1], -1)) * sums
            o = (scaled + shift.flatten(1, 2)).to(o.dtype)
        else:  # sums over a window are as cheap as its attention, and drop the values that leave it exactly
            o = affine_attention(q, k, v, alpha, beta, **options)
        cache.total += new[:, :, -1]
        cache.summed = cache.length
        return self._gated_out(o, x)

    def _alpha(self, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """a of x (B, N, dim): (B, num_heads, N) in float32, or float64 in a float64 layer."""
        logits = self.heads("alpha_proj", x, 1)[..., 0]
        if logits.shape[1] != q.shape[1]:
            raise ValueError(f"alpha_proj gives {logits.shape[1]} heads where q_proj gives {q.shape[1]}: shard them alike")
        return PHI[self.phi](logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def _sink(self, q: torch.Tensor) -> torch.Tensor | None:
        return None if self.sink is None else self.own("sink", q.shape[1])

    @torch.no_grad()
    def _updated_average(self, alpha: torch.Tensor) -> torch.Tensor:
        """a_ma after the tokens of alpha have entered it."""
        heads = alpha.shape[1]
        self.own("alpha_average", heads)  # refuses other heads
        average: Any = self.alpha_average
        first = 0
        if hasattr(average, "to_local"):
            first, average = average.device_mesh.get_local_rank() * heads, average.to_local()
        elif heads != self.num_heads and not self.group_name and dist.is_available() and dist.is_initialized():
            raise ValueError(
                f"process_group must name the ranks that hold the same {heads} of the {self.num_heads} heads, whose tokens are "
                "averaged; nearfar.nn.parallel.HeadParallel needs none"
            )
        history = self._history
        if (history.shape[2], history.dtype, history.device) != (heads, alpha.dtype, alpha.device):
            history = self._history = empty_history(heads, alpha.dtype, alpha.device)
        return moving_average(alpha.detach(), average, history, self.momentum, first, self.num_heads, self.group_name)

    def _gated_out(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is not None:
            o = o * torch.sigmoid(self.heads("gate_proj", x, self.value_dim))
        return self.merge_heads(o)


def _beta(alpha: torch.Tensor, average: torch.Tensor, length: int | torch.Tensor) -> torch.Tensor:
    return (average[:, None] - alpha) / length
