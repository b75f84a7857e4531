"""Self-attention layers, x (B, N, dim) -> (B, N, dim): one file per operator."""

from nearfar.nn.affine import AffineScaledAttention
from nearfar.nn.krause import KrauseAttention
from nearfar.nn.linear import HadamardAttention, LinearAttention
from nearfar.nn.synchronization import OSNBlock, SynchronizationAttention

__all__ = [
    "AffineScaledAttention",
    "HadamardAttention",
    "KrauseAttention",
    "LinearAttention",
    "OSNBlock",
    "SynchronizationAttention",
]
