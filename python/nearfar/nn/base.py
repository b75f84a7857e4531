"""Base classes of the layers: float32 tensors of their own, heads of a projection, and grouped-query self-attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nearfar.runtime.checks import require


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


def own_dtype() -> torch.dtype:
    """The dtype of a layer's own tensors: float32, or float64 if that is the default dtype."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class SelfAttention(Layer):
    """Projections of x (B, N, dim) to q, k and v, and of the heads' outputs back; a layer calls its operator between them.

    Args:
        dim, num_heads, num_kv_heads, bias: as for `nearfar.nn.KrauseAttention`.
        head_dim: width of a head of q and k; None for dim / num_heads.
        value_dim: width of a head of v; None for dim / num_heads.

    Raises:
        ValueError: a width or a number of heads does not fit.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None, value_dim: int | None, bias: bool
    ) -> None:
        super().__init__()
        require(num_heads >= 1, f"num_heads must be at least 1, got {num_heads}")
        if num_kv_heads is None:
            num_kv_heads = num_heads
        require(
            num_kv_heads >= 1 and num_heads % num_kv_heads == 0,
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}",
        )
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = self._width("head_dim", head_dim)
        self.value_dim = self._width("value_dim", value_dim)
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.value_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * self.value_dim, dim, bias=bias)

    def _width(self, name: str, width: int | None) -> int:
        if width is None:
            require(
                self.dim % self.num_heads == 0,
                f"dim must be a multiple of num_heads unless {name} is given, got {self.dim} and {self.num_heads}",
            )
            return self.dim // self.num_heads
        require(width >= 1, f"{name} must be at least 1, got {width}")
        return width

    def split_heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, N, dim) -> q (B, num_heads, N, head_dim), k and v (B, num_kv_heads, N, head_dim and value_dim)."""
        # Views: operators read the (B, N, H, D) projections through their strides and write o in the same order.
        q = self.heads("q_proj", x, self.head_dim)
        k = self.heads("k_proj", x, self.head_dim)
        v = self.heads("v_proj", x, self.value_dim)
        if q.shape[1] * self.num_kv_heads != k.shape[1] * self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}, but q_proj and k_proj give "
                f"{q.shape[1]} and {k.shape[1]} heads: a rank must hold the key heads of its query heads"
            )
        return q, k, v

    def merge_heads(self, o: torch.Tensor) -> torch.Tensor:
        """o (B, num_heads, N, value_dim) -> (B, N, dim)."""
        return self.out_proj(o.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def probe(
        self, batch: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, H, 1, width) of a zero token: they have the heads, dtype and device of real ones.

        dtype, device: of the token; None for those of the first floating tensor of k_proj, else of the layer, else the
        defaults. Quantized or wrapped projections may have no such `weight`.
        """
        tensors = (*self.k_proj.parameters(), *self.k_proj.buffers(), *self.parameters(), *self.buffers())
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
        x = torch.zeros(batch, 1, self.dim, dtype=dtype or like.dtype, device=device or like.device)
        return self.heads("k_proj", x, self.head_dim), self.heads("v_proj", x, self.value_dim)
