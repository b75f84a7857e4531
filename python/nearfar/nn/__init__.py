"""Self-attention layers, x (B, N, dim) -> (B, N, dim): a file per operator, one convention (`base.AttentionLayer`)."""

from nearfar.nn.affine import AffineScaledAttention
from nearfar.nn.cache import AffineCache, GatedCache, KVCache, SynchronizationCache
from nearfar.nn.gated import KrauseGatedAttention
from nearfar.nn.krause import KrauseAttention, top_k_schedule
from nearfar.nn.linear import HadamardAttention, LinearAttention
from nearfar.nn.positions import rotary
from nearfar.nn.softmax import SoftmaxAttention
from nearfar.nn.synchronization import OSNBlock, SynchronizationAttention

__all__ = [
    "AffineCache",
    "AffineScaledAttention",
    "GatedCache",
    "HadamardAttention",
    "KVCache",
    "KrauseAttention",
    "KrauseGatedAttention",
    "LinearAttention",
    "OSNBlock",
    "SoftmaxAttention",
    "SynchronizationAttention",
    "SynchronizationCache",
    "rotary",
    "top_k_schedule",
]
