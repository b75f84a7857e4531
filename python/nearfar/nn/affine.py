"""Affine-scaled attention (arXiv 2602.23057) as a self-attention layer that decodes from a cache."""

import dataclasses

import torch
import torch.distributed as dist
from torch import nn

from nearfar.checks import check_cu_seqlens, require
from nearfar.nn.base import SelfAttention
from nearfar.ops.affine import affine_attention, softmax_attention
from nearfar.ops.packing import token_bounds

PHI = {"clip": lambda logits: (0.1 * logits + 0.5).clamp(0, 1), "sigmoid": torch.sigmoid}  # eq. 11, and its ablation


@dataclasses.dataclass
class Cache:
    """What `AffineScaledAttention.step` goes on from: keys, values and the sum of the values.

    Attributes:
        k, v: (B, num_kv_heads, max_length, head_dim), filled up to `length`; keys are rotated already.
        total: (B, num_kv_heads, head_dim) float32 (float64 in a float64 layer), the sum of v[:, :, :length].
        length: how many tokens there are.
    """

    k: torch.Tensor
    v: torch.Tensor
    total: torch.Tensor
    length: int = 0


class AffineScaledAttention(SelfAttention):
    """Softmax attention with weights scaled and shifted by query: projections around `nearfar.affine_attention`.

        a = phi(W_a x), one number per token and query head                            [eq. 7, 11]
        b = (a_ma - a) / N, N the number of keys of the (padded) sequence              [eq. 8]
        a_ma <- momentum a_ma + (1 - momentum) mean(a), when training                  [eq. 9]

    Source: arXiv 2602.23057. We read eq. 9 as defining the a_ma of eq. 8, so that b uses the average that the tokens at hand
    have already entered. In training, a token therefore depends on all tokens of the batch through their mean, as it does in
    batch normalization; in eval the average is frozen and a causal layer is causal bit for bit. a has a gradient inside b too,
    a_ma has none.

    Every forward in training mode is one update of a_ma, from all positions, padding included: each micro-batch of an
    accumulated gradient is one, and activation checkpointing, which calls forward again, makes one more. Where
    torch.distributed is initialised, the mean is over the tokens of all ranks of the default group, so that a_ma is the same
    everywhere and what DistributedDataParallel broadcasts changes nothing; every rank of that group has to train the layer,
    equally often.

    Under autocast the projections and the attention run in the autocast dtype. a and b are computed, and a_ma is kept, in
    float32, also in a layer cast to half precision.

    Args:
        dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention); None: num_heads.
        head_dim: width of a head; None: dim / num_heads. Kernels take multiples of 8 from 16 to 256.
        causal: whether a token sees only itself and those before it, which `step` needs.
        window_size: (left, right), how many keys before and after its own a query sees, -1 for all; b sums over these too.
        phi: "clip" for clip(0.1 W_a x + 0.5, 0, 1), the paper's, or "sigmoid" for sigmoid(W_a x).
        momentum: of a_ma, from 0 to 1.
        output_gate: multiply the heads' outputs by sigmoid(W_g x), elementwise.
        sink: add exp of a learnable logit per query head, initially 0, to the denominators of softmax (eq. 3).
        bias: whether the projections, W_a and W_g too, add a bias.
        backend: as in `nearfar.affine_attention`, which also checks window_size.

    Attributes:
        alpha_average: (num_heads,) float32 buffer, a_ma; it starts at 0.
        sink: (num_heads,) float32 parameter, or None.

    Raises:
        ValueError: dim, num_heads, num_kv_heads, head_dim, phi or momentum do not fit.
    """

    def __init__(
        self,
        dim,
        num_heads,
        *,
        num_kv_heads=None,
        head_dim=None,
        causal=True,
        window_size=(-1, -1),
        phi="clip",
        momentum=0.9,
        output_gate=False,
        sink=False,
        bias=False,
        backend="auto",
    ):
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
        self.register_parameter("sink", nn.Parameter(torch.zeros(num_heads)) if sink else None)
        self.register_buffer("alpha_average", torch.zeros(num_heads, dtype=torch.float32))

    def forward(self, x, *, rotary=None, cu_seqlens=None):
        """Attend within x.

        Args:
            x: (B, N, dim).
            rotary: None, or (cos, sin), each broadcastable to (B, 1, N, head_dim), that turn q and k by position: the pairs of
                a head are the dimensions i and i + head_dim / 2, so the halves of cos and of sin are usually equal.
            cu_seqlens: (S + 1,) int32, the ends of sequences packed along N in a batch of 1, starting with 0. The N of b is
                then the length of a token's own sequence.

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
        alpha = self._alpha(x)
        if self.training:
            self._update_average(alpha)
        o = affine_attention(
            q, k, v, alpha, self._beta(alpha, length), causal=self.causal, window_size=self.window_size, sink=self.sink,
            cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return self._gated_out(o, x)

    @torch.no_grad()
    def init_cache(self, batch, max_length):
        """An empty `Cache` of room for max_length tokens, in the dtype of the projections (under autocast, of autocast)."""
        k = self.k_proj(self.k_proj.weight.new_empty(batch, 0, self.dim))
        shape = batch, self.num_kv_heads, max_length, self.head_dim
        total = k.new_zeros(batch, self.num_kv_heads, self.value_dim, dtype=torch.promote_types(k.dtype, torch.float32))
        return Cache(k.new_zeros(shape), k.new_zeros(shape), total)

    @torch.no_grad()
    def step(self, x, cache, *, length=None, rotary=None):
        """Decode T tokens after those of the cache, one at a time or a prompt at once.

        Without a left side of the window the bias term costs O(1) a token, from the running sum of v. a_ma is not updated.

        Args:
            x: (B, T, dim).
            cache: from `init_cache`. It is updated in place.
            length: the N of b. None: for each token the number of keys so far, itself included, which is not the padded length
                that a row of `forward` divides by; with that length, steps equal the causal forward of an eval layer.
            rotary: as in `forward`, for the positions of these T tokens.

        Returns:
            (B, T, dim), without gradient.

        Raises:
            ValueError: the layer is not causal, the cache has no room, or x or rotary do not fit.
        """
        require(self.causal, "step decodes with causal attention; this AffineScaledAttention has causal=False")
        before, after = cache.length, cache.length + x.shape[1]
        require(x.shape[0] == cache.k.shape[0], f"x must have the batch size of cache, {cache.k.shape[0]}, got {x.shape[0]}")
        require(after > before, "x must have at least one token")
        require(after <= cache.k.shape[2], f"cache has room for {cache.k.shape[2]} tokens, and these would make {after}")
        q, k, v = self._heads(x, rotary)
        cache.k[:, :, before:after] = k
        cache.v[:, :, before:after] = v
        alpha = self._alpha(x)
        beta = self._beta(alpha, torch.arange(before + 1, after + 1, device=x.device) if length is None else length)
        left = self.window_size[0]
        first = 0 if left < 0 else max(before - left, 0)
        k, v = cache.k[:, :, first:after], cache.v[:, :, first:after]
        options = {"causal": True, "window_size": self.window_size, "sink": self.sink, "backend": self.backend}
        new = cache.v[:, :, before:after].to(cache.total.dtype).cumsum(2)
        if left < 0:
            o = softmax_attention(q, k, v, **options)
            # Heads of a group share the sum of their values by broadcasting.
            scaled, sums = alpha[..., None] * o, (cache.total[:, :, None] + new)[:, :, None]
            shift = beta[..., None].unflatten(1, (self.num_kv_heads, -1)) * sums
            o = (scaled + shift.flatten(1, 2)).to(o.dtype)
        else:  # sums over a window are as cheap as its attention, and drop the values that leave it exactly
            o = affine_attention(q, k, v, alpha, beta, **options)
        cache.total += new[:, :, -1]
        cache.length = after
        return self._gated_out(o, x)

    def _heads(self, x, rotary):
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

    def _alpha(self, x):
        """a of x (B, N, dim): (B, num_heads, N) in float32, or float64 in a float64 layer."""
        logits = self.alpha_proj(x).transpose(1, 2)
        return PHI[self.phi](logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def _beta(self, alpha, length):
        return (self.alpha_average[:, None] - alpha) / length

    @torch.no_grad()
    def _update_average(self, alpha):
        """Eq. 9, with the mean over the tokens of all ranks, which may have different numbers of them; none change nothing."""
        count = alpha.new_full((1,), alpha.shape[0] * alpha.shape[2])
        totals = torch.cat((alpha.sum((0, 2)), count))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        count = totals[-1]
        self.alpha_average.lerp_(totals[:-1] / count.clamp(min=1), (1 - self.momentum) * count.clamp(max=1))

    def _gated_out(self, o, x):
        if self.gate_proj is not None:
            o = o * torch.sigmoid(self.gate_proj(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.merge_heads(o)

    def _apply(self, fn, recurse=True):
        # half() and to(bfloat16) would round the average, and then its small updates away.
        average = self.alpha_average
        super()._apply(fn, recurse)
        if self.alpha_average.dtype in (torch.float16, torch.bfloat16):
            self.alpha_average = average.to(self.alpha_average.device)
        return self

    def extra_repr(self):
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, causal={self.causal}, "
            f"window_size={self.window_size}, phi={self.phi!r}, momentum={self.momentum}, backend={self.backend!r}"
        )


def rotate(heads, cos, sin):
    """Rotary positions by halves: heads (B, H, N, D) * cos + (-second half, first half) * sin, in the dtype of heads."""
    first, second = heads.chunk(2, -1)
    return (heads * cos + torch.cat((-second, first), -1) * sin).to(heads.dtype)
