"""Decoding caches of the layers that keep every key and value. All are updated in place by the layer that made them."""

import dataclasses

import torch

from nearfar.ops.krause_step import KrauseCache
from nearfar.runtime.private import register_dataclass


@dataclasses.dataclass(kw_only=True)
class KVCache:
    """Keys and values of all tokens so far, up to a fixed number of them.

    Attributes:
        k: (B, num_kv_heads, max_length, head_dim), filled up to `length`; keys are stored rotated.
        v: (B, num_kv_heads, max_length, value_dim), likewise.
        length: number of tokens in the cache. Lower it to drop the last tokens, such as those of a rejected draft.
    """

    k: torch.Tensor
    v: torch.Tensor
    length: int = 0

    def extend(self, k: torch.Tensor, v: torch.Tensor, left: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of T tokens, and return those that the T tokens see: at most `left` before each.

        Raises:
            ValueError: the batch, the heads or the widths are not those of the cache, or it is too short.
        """
        before, after = self.length, self.length + k.shape[2]
        # No require: a message made in every call binds a compiled graph to its length.
        if k.shape[0] != self.k.shape[0]:
            raise ValueError(f"x must have the batch size of cache, {self.k.shape[0]}, got {k.shape[0]}")
        for new, kept in ((k, self.k), (v, self.v)):
            if new.shape[1] != kept.shape[1] or new.shape[3] != kept.shape[3]:
                raise ValueError(
                    f"cache holds {kept.shape[1]} heads of width {kept.shape[3]}, and this layer has {new.shape[1]} of width "
                    f"{new.shape[3]}: a cache belongs to the layer whose init_cache made it"
                )
        if after > self.k.shape[2]:
            raise ValueError(f"cache has room for {self.k.shape[2]} tokens, and these would make {after}")
        self.k[:, :, before:after] = k
        self.v[:, :, before:after] = v
        self.length = after
        first = 0 if left < 0 else max(before - left, 0)
        return self.k[:, :, first:after], self.v[:, :, first:after]


@dataclasses.dataclass(kw_only=True)
class AffineCache(KVCache):
    """Cache of `nearfar.nn.AffineScaledAttention`: keys, values and the sum of the values.

    Attributes:
        total: (B, num_kv_heads, head_dim) float32 (float64 in a float64 layer), the sum of v[:, :, :summed].
        summed: number of tokens in `total`; if it differs from length, the layer computes the sum again.
        num_keys: the N of b, the length of the whole sequence: max_length, unless you set another.
    """

    total: torch.Tensor
    num_keys: int
    summed: int = 0


@dataclasses.dataclass(kw_only=True)
class SynchronizationCache(KVCache):
    """Cache of `nearfar.nn.SynchronizationAttention`, with frequencies as keys.

    Attributes:
        phases: (B, num_heads, 2, head_dim) float32 (float64 in a float64 layer), the sum of cos(theta) and of sin(theta) over
            the tokens so far, whose prefix order parameter comes from it. It cannot drop tokens.
        summed: number of tokens in `phases`.
    """

    phases: torch.Tensor
    summed: int = 0


@dataclasses.dataclass(kw_only=True)
class GatedCache:
    """Cache of `nearfar.nn.KrauseGatedAttention`: those of its two branches."""

    softmax: KVCache
    krause: KVCache | KrauseCache


for kind in (KVCache, AffineCache, SynchronizationCache, GatedCache):
    register_dataclass(kind, serialized_type_name=f"nearfar.nn.cache.{kind.__name__}")  # for torch.export
    torch.serialization.add_safe_globals([kind])  # for torch.load
