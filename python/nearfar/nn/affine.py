"""Affine-scaled attention (arXiv 2602.23057) as a self-attention layer that decodes from a cache."""

import dataclasses
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from nearfar.nn.base import SelfAttention, own_dtype
from nearfar.ops.affine import affine_attention, softmax_attention
from nearfar.runtime.checks import check_cu_seqlens, require
from nearfar.runtime.dispatch import Backend
from nearfar.runtime.packing import token_bounds
from nearfar.runtime.private import current_graph_task, process_group_of, register_dataclass

PHI = {"clip": lambda logits: (0.1 * logits + 0.5).clamp(0, 1), "sigmoid": torch.sigmoid}  # eq. 11, and its ablation
Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin
REMEMBERED = 256  # forwards of a layer that may lie between one and its recomputation


@dataclasses.dataclass
class Cache:
    """Decoding cache of `AffineScaledAttention.step`: keys, values and the sum of the values.

    Attributes:
        k, v: (B, num_kv_heads, max_length, head_dim), filled up to `length`; keys are stored rotated.
        total: (B, num_kv_heads, head_dim) float32 (float64 in a float64 layer), the sum of v[:, :, :length].
        length: number of tokens in the cache. Lower it to drop the last tokens, such as those of a rejected draft.
        summed: number of tokens in `total`; if it differs from length, `step` computes the sum again.
    """

    k: torch.Tensor
    v: torch.Tensor
    total: torch.Tensor
    length: int = 0
    summed: int = 0


register_dataclass(Cache, serialized_type_name="nearfar.nn.affine.Cache")  # for torch.export


class AffineScaledAttention(SelfAttention):
    """Softmax attention with weights scaled and shifted per query: projections around `nearfar.affine_attention`.

        a = phi(W_a x), one number per token and query head                            [eq. 7, 11]
        b = (a_ma - a) / N, N the number of keys of the (padded) sequence              [eq. 8]
        a_ma <- momentum a_ma + (1 - momentum) mean(a), when training                  [eq. 9]

    Source: arXiv 2602.23057. We read eq. 9 as defining the a_ma of eq. 8: b uses the average that already includes the current
    tokens. In training, a token therefore depends on all tokens of the batch through their mean, as in batch normalization. In
    eval the average is frozen, and a causal layer is causal bit for bit. Gradients flow through the a in b, but not through
    a_ma.

    Every forward in training mode updates a_ma once, from all positions, padding included; with gradient accumulation, each
    micro-batch updates it. If torch.distributed is initialised, the mean is over the tokens of all ranks of process_group, so
    that a_ma is the same on all of them and the broadcast of DistributedDataParallel changes nothing. Every rank of that group
    has to train the layer, equally often.

    Activation checkpointing repeats forward inside the backward. The repeated call updates nothing and uses the a_ma of the
    first one, which the layer finds by the mean of a among its last 256 forwards. Gradients are therefore exact with both kinds
    of checkpointing, also nested, with several micro-batches in flight, and with several calls of one layer. Calls whose tokens
    have the same mean of a to the last bit, such as calls with equal x, cannot be distinguished: all use the a_ma of the last
    one. You can checkpoint a compiled layer; a compiled function that checkpoints the layer raises in the backward.

    Under autocast the projections and the attention run in the autocast dtype. a, b and a_ma are float32, even in a
    half-precision layer.

    Args:
        dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention); None for num_heads.
        head_dim: width of a head; None for dim / num_heads. Kernels take multiples of 8 from 16 to 256.
        causal: whether a token sees only itself and earlier tokens; `step` requires it.
        window_size: (left, right), how many keys before and after its own a query sees, -1 for all; the sum that b multiplies
            runs over the same keys.
        phi: "clip" for clip(0.1 W_a x + 0.5, 0, 1), the paper's, or "sigmoid" for sigmoid(W_a x).
        momentum: of a_ma, from 0 to 1.
        output_gate: multiply the heads' outputs by sigmoid(W_g x), elementwise.
        sink: add exp(s) to the softmax denominators, s a learnable logit per query head that starts at 0 (eq. 3).
        bias: whether the projections, including W_a and W_g, add a bias.
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
    sink: nn.Parameter | None
    alpha_average: torch.Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        phi: Literal["clip", "sigmoid"] = "clip",
        momentum: float = 0.9,
        output_gate: bool = False,
        sink: bool = False,
        bias: bool = False,
        process_group: dist.ProcessGroup | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, head_dim, head_dim, bias)
        require(phi in PHI, f'phi must be "clip" or "sigmoid", got {phi!r}')
        require(0 <= momentum <= 1, f"momentum must be from 0 to 1, got {momentum}")
        self.causal = causal
        self.window_size = window_size
        self.phi = phi
        self.momentum = momentum
        self.backend = backend
        self.alpha_proj = nn.Linear(dim, num_heads, bias=bias)
        self.gate_proj = nn.Linear(dim, num_heads * self.value_dim, bias=bias) if output_gate else None
        self.register_parameter("sink", nn.Parameter(torch.empty(num_heads, dtype=own_dtype())) if sink else None)
        self.register_buffer("alpha_average", torch.empty(num_heads, dtype=own_dtype()))
        self.group_name = "" if process_group is None else process_group.group_name  # copies and pickles, unlike the group
        self._history = _empty_history(num_heads, self.alpha_average.dtype, self.alpha_average.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the sink and the average to 0; each projection has its own reset_parameters."""
        nn.init.zeros_(self.alpha_average)
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def forward(self, x: torch.Tensor, *, rotary: Rotary | None = None, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within x.

        Args:
            x: (B, N, dim).
            rotary: None, or (cos, sin), each broadcastable to (B, 1, N, head_dim), to rotate q and k by position. Dimensions i
                and i + head_dim / 2 form a pair, so the two halves of cos, and of sin, are usually equal.
            cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed along N in a batch of 1, starting with 0. The N of
                b is then the length of the token's sequence.

        Returns:
            (B, N, dim), in the dtype of the projections.

        Raises:
            TypeError, ValueError: rotary or cu_seqlens do not fit.
        """
        q, k, v = self._heads(x, rotary)
        length = x.shape[1]
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, q, k)
            first, end = token_bounds(cu_seqlens, length)
            length = end - first
        alpha = self._alpha(x, q)
        average = self._updated_average(alpha) if self.training else self.own("alpha_average", q.shape[1])
        o = affine_attention(
            q, k, v, alpha, _beta(alpha, average, length), causal=self.causal, window_size=self.window_size,
            sink=self._sink(q), cu_seqlens=cu_seqlens, backend=self.backend,
        )
        return self._gated_out(o, x)

    @torch.no_grad()
    def init_cache(
        self, batch: int, max_length: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Cache:
        """An empty `Cache` for max_length tokens, in the dtype of the projections or, under autocast, of autocast.

        Args:
            batch: sequences.
            max_length: tokens of each.
            dtype, device: of the tokens to come; None for those of the parameters. Quantized projections may need them.
        """
        k, v = self.probe(batch, dtype, device)
        shape = batch, k.shape[1], max_length, self.head_dim
        total = v.new_zeros(batch, v.shape[1], self.value_dim, dtype=torch.promote_types(v.dtype, torch.float32))
        return Cache(k.new_zeros(shape), v.new_zeros(shape), total)

    @torch.no_grad()
    def step(
        self,
        x: torch.Tensor,
        cache: Cache,
        *,
        length: int | torch.Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> torch.Tensor:
        """Decode T tokens after those of the cache: one at a time, or a whole prompt.

        If the window has no limit on the left, the bias term costs O(1) per token, from the running sum of v. a_ma is not
        updated.

        Args:
            x: (B, T, dim).
            cache: from `init_cache`. It is updated in place.
            length: the N of b; None for the number of keys up to each token, its own included. `forward` divides by the padded
                length instead: pass that length for steps that equal the causal forward of an eval layer.
            rotary: as in `forward`, for the positions of these T tokens.

        Returns:
            (B, T, dim), not differentiable.

        Raises:
            ValueError: the layer is not causal, the cache is too short, or x or rotary do not fit.
        """
        require(self.causal, "step decodes with causal attention; this AffineScaledAttention has causal=False")
        before, after = cache.length, cache.length + x.shape[1]
        if x.shape[0] != cache.k.shape[0]:  # no require: a message made in every call binds a compiled graph to its length
            raise ValueError(f"x must have the batch size of cache, {cache.k.shape[0]}, got {x.shape[0]}")
        if after <= before:
            raise ValueError("x must have at least one token")
        if after > cache.k.shape[2]:
            raise ValueError(f"cache has room for {cache.k.shape[2]} tokens, and these would make {after}")
        q, k, v = self._heads(x, rotary)
        if cache.summed != before:
            cache.total.copy_(cache.v[:, :, :before].sum(2, dtype=cache.total.dtype))
        cache.k[:, :, before:after] = k
        cache.v[:, :, before:after] = v
        alpha = self._alpha(x, q)
        length = torch.arange(before + 1, after + 1, device=x.device) if length is None else length
        beta = _beta(alpha, self.own("alpha_average", q.shape[1]), length)
        left = self.window_size[0]
        first = 0 if left < 0 else max(before - left, 0)
        k, v = cache.k[:, :, first:after], cache.v[:, :, first:after]
        options: dict[str, Any] = {
            "causal": True, "window_size": self.window_size, "sink": self._sink(q), "backend": self.backend
        }
        new = cache.v[:, :, before:after].to(cache.total.dtype).cumsum(2)
        if left < 0:
            o = softmax_attention(q, k, v, **options)
            # Heads of a group share the sum of their values by broadcasting.
            scaled, sums = alpha[..., None] * o, (cache.total[:, :, None] + new)[:, :, None]
            shift = beta[..., None].unflatten(1, (new.shape[1], -1)) * sums
            o = (scaled + shift.flatten(1, 2)).to(o.dtype)
        else:  # sums over a window are as cheap as its attention, and drop the values that leave it exactly
            o = affine_attention(q, k, v, alpha, beta, **options)
        cache.total += new[:, :, -1]
        cache.length = cache.summed = after
        return self._gated_out(o, x)

    def _heads(self, x: torch.Tensor, rotary: Rotary | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of x, with q and k turned by rotary."""
        q, k, v = self.split_heads(x)
        if rotary is None:
            return q, k, v
        require(isinstance(rotary, (tuple, list)) and len(rotary) == 2, "rotary must be a pair (cos, sin)", TypeError)
        require(self.head_dim % 2 == 0, f"rotary needs an even head_dim, got {self.head_dim}")
        target = x.shape[0], 1, x.shape[1], self.head_dim
        for name, angle in zip(("cos", "sin"), rotary, strict=True):
            fits = len(angle.shape) <= 4 and all(
                size in (1, wanted) for size, wanted in zip(angle.shape[::-1], target[::-1], strict=False)
            )
            require(fits, f"rotary: {name} must broadcast to (B, 1, N, head_dim), {target}, got {tuple(angle.shape)}")
        return rotate(q, *rotary), rotate(k, *rotary), v

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
            history = self._history = _empty_history(heads, alpha.dtype, alpha.device)
        return moving_average(alpha.detach(), average, history, self.momentum, first, self.num_heads, self.group_name)

    def _gated_out(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is not None:
            o = o * torch.sigmoid(self.heads("gate_proj", x, self.value_dim))
        return self.merge_heads(o)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, causal={self.causal}, "
            f"window_size={self.window_size}, phi={self.phi!r}, momentum={self.momentum}, backend={self.backend!r}"
        )


def _beta(alpha: torch.Tensor, average: torch.Tensor, length: int | torch.Tensor) -> torch.Tensor:
    return (average[:, None] - alpha) / length


def _empty_history(heads: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What `moving_average` remembers of the last forwards, none yet: a mean that none has, (REMEMBERED, 2, heads)."""
    with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside
        return torch.full((REMEMBERED, 2, heads), torch.inf, dtype=dtype, device=device)


@torch.library.custom_op("nearfar::moving_average", mutates_args=("average", "history"))
def moving_average(
    alpha: torch.Tensor,
    average: torch.Tensor,
    history: torch.Tensor,
    momentum: float,
    first: int,
    heads: int,
    group: str,
) -> torch.Tensor:
    """Eq. 9: update the average by alpha (B, H, N) and return it; in a recomputation return what the first call did.

    The mean is over the tokens of all ranks of a group ("" is the default one), which may have different numbers of them; none
    change nothing. first: which of all `heads` is the first of alpha; ranks with others add nothing to its mean. history: pairs
    (mean of the own tokens, what was returned), the last first.

    One operator that compilers and selective checkpointing do not look into: what it does depends on who calls it.
    """
    count = alpha.shape[0] * alpha.shape[2]
    sums = alpha.sum((0, 2))
    mean = sums / max(count, 1)
    if current_graph_task() != -1:  # inside a backward, which calls forward to recompute it only
        nearest = (history[:, 0] - mean).abs().sum(1).argmin()
        return history.index_select(0, nearest.view(1))[0, 1].clone()
    totals = alpha.new_zeros(2, heads)
    own = totals[:, first : first + alpha.shape[1]]
    own[0], own[1] = sums, count
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals, group=process_group_of(group) if group else None)
    sums, counts = own
    updated = average.to(alpha.dtype).lerp(sums / counts.clamp(min=1), (1 - momentum) * counts.clamp(max=1))
    average.copy_(updated)
    history.copy_(torch.cat((torch.stack((mean, updated))[None], history[:-1])))
    return updated


@moving_average.register_fake
def _(
    alpha: torch.Tensor, average: torch.Tensor, history: torch.Tensor, momentum: float, first: int, heads: int, group: str
) -> torch.Tensor:
    return alpha.new_empty(alpha.shape[1])


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions by halves: heads (B, H, N, D) * cos + (-second half, first half) * sin, in the dtype of heads."""
    first, second = heads.chunk(2, -1)
    return (heads * cos + torch.cat((-second, first), -1) * sin).to(heads.dtype)
