"""Base classes of the layers: float32 tensors of their own, what a call of a layer is, and grouped-query self-attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nearfar.localities import Locality, SlidingWindow
from nearfar.nn.cache import KVCache
from nearfar.nn.positions import Rotary, check_rotary, rotary_of_tokens, rotate
from nearfar.runtime.checks import require
from nearfar.runtime.packing import unpad

NORM_EPS = 1e-6  # of qk_norm, as in Qwen3


class Layer(nn.Module):
    """A module whose own tensors (bandwidths, sinks, averages; not those of its projections) stay float32 or float64.

    Casts to half precision, half-precision checkpoints and a half-precision default dtype do not change that. Code that
    replaces them without `nn.Module` (FSDP with mixed precision) may bring any dtype: `own` casts them at use.
    """

    per_head: tuple[str, ...] = ()  # the names of own tensors with one number a head; the others belong to all heads

    def reset_parameters(self) -> None:
        """Initialise the tensors that this module holds itself; each projection has its own reset_parameters."""

    def own(self, name: str, heads: int | None = None) -> torch.Tensor:
        """The layer's tensor `name`, float32 or float64. heads: the number of heads that it must have."""
        tensor = getattr(self, name)
        if hasattr(tensor, "to_local"):  # a DTensor of nearfar.nn.parallel
            tensor = local(tensor, partial=name not in self.per_head)
        if heads is not None and tensor.shape[0] != heads:
            raise ValueError(
                f"{name} holds the numbers of {tensor.shape[0]} heads where the projections give {heads} heads: shard it on "
                "its heads as they are; nearfar.nn.parallel.HeadParallel shards a whole layer"
            )
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def heads(self, name: str, x: torch.Tensor, width: int) -> torch.Tensor:
        """The projection `name` of x (B, N, dim) as (B, H, N, width), a view; H: this rank's heads under tensor parallelism."""
        y = getattr(self, name)(x)
        if y.shape[-1] % width:
            raise ValueError(
                f"{name} gives {y.shape[-1]} numbers a token, no multiple of a head's {width}: a rank must hold whole heads"
            )
        return y.unflatten(-1, (-1, width)).transpose(1, 2)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Layer":
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(lambda tensor: _widened(fn(tensor), tensor), recurse=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        every: Any = dict(recurse=False, remove_duplicate=False)
        for name, own in (*self.named_parameters(**every), *self.named_buffers(**every)):
            given = state_dict.get(prefix + name)
            if not isinstance(given, torch.Tensor):
                continue
            if own.shape == (1,) and not given.shape:  # checkpoints of before numbers were tensors of one element
                given = given.reshape(1)
            state_dict[prefix + name] = _widened(given, given)  # state_dict is a copy of the caller's
        super()._load_from_state_dict(state_dict, prefix, *args)


def _widened(result: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """result = function(tensor), in float32 if it is narrower; taken from the tensor where that has the digits."""
    if not result.is_floating_point() or result.dtype.itemsize >= 4:
        return result
    return (result if tensor.dtype.itemsize < 4 else tensor).to(result.device, torch.float32)


def local(tensor: Any, partial: bool) -> torch.Tensor:
    """This rank's part of a DTensor. partial: the gradient is the sum of the ranks' gradients, each of its own heads."""
    from torch.distributed.tensor import Partial  # takes seconds; with a DTensor here, somebody has imported it

    return tensor.to_local(grad_placements=[Partial() if partial else placement for placement in tensor.placements])


def own_dtype(dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the own tensors of a layer of this dtype (None: the default one): float32, or float64 in a float64 layer."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def causal_locality(causal: bool, locality: Locality | None) -> Locality | None:
    """The locality of a layer: with causal, what it shows of the keys up to a query's own."""
    if not causal:
        return locality
    if locality is None:
        return SlidingWindow(-1, 0)
    if isinstance(locality, SlidingWindow) and locality.right <= 0:
        return SlidingWindow(locality.left, 0)
    raise ValueError(
        f"causal sees no key after the query: locality must be None or a SlidingWindow with a right of -1 or 0, got {locality}"
    )


def is_causal(locality: Locality | None) -> bool:
    """Whether no query of this locality sees a key after its own."""
    return isinstance(locality, SlidingWindow) and locality.right == 0


class AttentionLayer(Layer):
    """What a call of every attention layer is. A layer defines `attend`, `decode`, `empty_cache` and `probe`.

    Attributes:
        causal: whether no token sees a later one; a cache needs it.
        cache_type: the class of the layer's caches.
        shown: the attributes that repr shows.
    """

    causal: bool
    cache_type: type = KVCache
    shown: tuple[str, ...] = ("num_heads", "num_kv_heads", "head_dim", "causal", "qk_norm")

    def forward(
        self,
        x: torch.Tensor,
        *,
        rotary: Rotary | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: Any = None,
    ) -> torch.Tensor:
        """Attend within x or, with a cache, within the tokens of the cache and x.

        Args:
            x: (B, N, dim).
            rotary: None, or (cos, sin), each broadcastable to (B, 1, N, head_dim), to rotate queries and keys by position, as
                from `nearfar.nn.rotary`. With a cache, those of the positions of x.
            key_padding_mask: (B, N) bool, True for padding, as in torch.nn.MultiheadAttention. Padding may be anywhere: each
                sequence is computed as if it had none, by packing the tokens that count, and rows of padding are zeros. How
                many tokens count is read back from the device.
            cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed along N in a batch of 1, starting with 0.
            cache: from `init_cache`, holding earlier tokens. It takes these N tokens in, in place. A sequence that is passed
                in pieces, of any sizes, gives the outputs of a forward of the whole. No gradient is recorded.

        Returns:
            (B, N, dim), in the dtype of the projections.

        Raises:
            TypeError, ValueError: an argument does not fit the layer or another argument, or the layer is not causal and a
                cache is given.
        """
        if cache is not None:
            self._check_cached_call(x, key_padding_mask, cu_seqlens, cache)
            with torch.no_grad():
                return self.decode(x, rotary, cache)
        if key_padding_mask is None:
            return self.attend(x, rotary, cu_seqlens)
        if cu_seqlens is not None:
            raise ValueError("packed sequences have no padding: pass key_padding_mask or cu_seqlens, not both")
        if rotary is not None:
            check_rotary(rotary, x, self.rotary_width)
        batch, length = x.shape[:2]
        tokens, cu_seqlens = unpad(key_padding_mask, (batch, length), x.device)
        if rotary is not None:
            rotary = rotary_of_tokens(rotary, tokens, batch, length)
        packed = self.attend(x.flatten(0, 1)[tokens][None], rotary, cu_seqlens)[0]
        rows = packed.new_zeros(batch * length, packed.shape[-1])
        return rows.index_copy(0, tokens, packed).unflatten(0, (batch, length))

    @torch.no_grad()
    def init_cache(
        self,
        batch: int,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """An empty cache for forward, in the dtype of the projections or, under autocast, of autocast.

        Args:
            batch: sequences.
            max_length: the most tokens of each. Layers that keep every key need it; layers of a fixed size, those with a
                window or a state, do not.
            dtype, device: of the tokens to come; None for those of the parameters. Quantized projections may need them.

        Raises:
            ValueError: the layer is not causal, or max_length is missing.
        """
        self._check_causal()
        return self.empty_cache(*self.probe(batch, dtype, device), max_length)

    def attend(self, x: torch.Tensor, rotary: Rotary | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """forward without padding and cache."""
        raise NotImplementedError

    def decode(self, x: torch.Tensor, rotary: Rotary | None, cache: Any) -> torch.Tensor:
        """forward of x after the tokens of a cache, without gradient."""
        raise NotImplementedError

    def empty_cache(self, k: torch.Tensor, v: torch.Tensor, max_length: int | None) -> Any:
        """init_cache, from keys and values like those to come, of one token."""
        return KVCache(**self.room(k, v, max_length))

    def probe(
        self, batch: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, H, 1, width) of a zero token: they have the heads, dtype and device of real ones."""
        raise NotImplementedError

    @property
    def rotary_width(self) -> int:
        """Last size of cos and sin."""
        return self.head_dim  # type: ignore[return-value]

    def room(self, k: torch.Tensor, v: torch.Tensor, max_length: int | None) -> dict[str, Any]:
        """Zeros for the k and v of max_length tokens."""
        if max_length is None:
            raise ValueError(f"max_length must be given: this {type(self).__name__} keeps every key and value")
        return {name: x.new_zeros(*x.shape[:2], max_length, x.shape[3]) for name, x in (("k", k), ("v", v))}

    def like_tokens(
        self, batch: int, projection: nn.Module, width: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> torch.Tensor:
        """A zero token (batch, 1, width). dtype, device: None for those of the first floating tensor of the projection, else
        of the layer, else the defaults. Quantized or wrapped projections may have no `weight`."""
        tensors = (*projection.parameters(), *projection.buffers(), *self.parameters(), *self.buffers())
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
        return torch.zeros(batch, 1, width, dtype=dtype or like.dtype, device=device or like.device)

    def _check_causal(self) -> None:
        if not self.causal:
            raise ValueError(f"a cache needs a causal layer, and this {type(self).__name__} has causal={self.causal}")

    def _check_cached_call(self, x: torch.Tensor, padding: Any, cu_seqlens: Any, cache: Any) -> None:
        self._check_causal()
        if padding is not None or cu_seqlens is not None:
            raise ValueError("a call with a cache takes neither key_padding_mask nor cu_seqlens: all of x follows the cache")
        if not isinstance(cache, self.cache_type):
            raise TypeError(
                f"cache must be what init_cache of this {type(self).__name__} returns, a {self.cache_type.__name__}, got "
                f"{type(cache).__name__}"
            )
        if x.shape[1] < 1:
            raise ValueError("x must have at least one token in a call with a cache")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)


def head_width(name: str, width: int | None, dim: int, num_heads: int) -> int:
    """A given width, or dim / num_heads."""
    require(num_heads >= 1, f"num_heads must be at least 1, got {num_heads}")
    if width is None:
        require(
            dim % num_heads == 0, f"dim must be a multiple of num_heads unless {name} is given, got {dim} and {num_heads}"
        )
        return dim // num_heads
    require(width >= 1, f"{name} must be at least 1, got {width}")
    return width


class SelfAttention(AttentionLayer):
    """Projections of x (B, N, dim) to q, k and v, and of the heads' outputs back; a layer calls its operator between them.

    Args:
        dim, num_heads, num_kv_heads, bias, qk_norm, device, dtype: as for `nearfar.nn.KrauseAttention`.
        head_dim: width of a head of q and k; None for dim / num_heads.
        value_dim: width of a head of v; None for dim / num_heads.

    Raises:
        ValueError: a width or a number of heads does not fit.
    """

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
    ) -> None:
        super().__init__()
        self.head_dim = head_width("head_dim", head_dim, dim, num_heads)
        self.value_dim = head_width("value_dim", value_dim, dim, num_heads)
        if num_kv_heads is None:
            num_kv_heads = num_heads
        require(
            num_kv_heads >= 1 and num_heads % num_kv_heads == 0,
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}",
        )
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.causal = causal
        self.qk_norm = qk_norm
        made: Any = dict(device=device, dtype=dtype)
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias, **made)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias, **made)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.value_dim, bias=bias, **made)
        self.out_proj = nn.Linear(num_heads * self.value_dim, dim, bias=bias, **made)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=NORM_EPS, **made) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=NORM_EPS, **made) if qk_norm else None

    def split_heads(
        self, x: torch.Tensor, rotary: Rotary | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, N, dim) -> q (B, num_heads, N, head_dim), k and v (B, num_kv_heads, N, head_dim and value_dim).

        q and k are normalised, if the layer does that, and then rotated.
        """
        # Views: operators read the (B, N, H, D) projections through their strides and write o in the same order.
        q = self.heads("q_proj", x, self.head_dim)
        k = self.heads("k_proj", x, self.head_dim)
        v = self.heads("v_proj", x, self.value_dim)
        if q.shape[1] * self.num_kv_heads != k.shape[1] * self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}, but q_proj and k_proj give "
                f"{q.shape[1]} and {k.shape[1]} heads: a rank must hold the key heads of its query heads"
            )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        if rotary is not None:
            check_rotary(rotary, x, self.rotary_width)
            q, k = self.rotated(q, rotary), self.rotated(k, rotary)
        return q, k, v

    def rotated(self, heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """q or k (B, H, N, head_dim), turned by position."""
        return rotate(heads, *rotary)

    def merge_heads(self, o: torch.Tensor) -> torch.Tensor:
        """o (B, num_heads, N, value_dim) -> (B, N, dim)."""
        return self.out_proj(o.transpose(1, 2).flatten(2))

    def probe(
        self, batch: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, k, v = self.split_heads(self.like_tokens(batch, self.k_proj, self.dim, dtype, device))
        return k, v
