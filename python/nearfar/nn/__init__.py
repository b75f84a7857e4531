"""Drop-in attention layers, x (B, N, dim) -> (B, N, dim), one file per operator."""

from nearfar.nn.krause import KrauseAttention
from nearfar.nn.linear import HadamardAttention, LinearAttention

__all__ = ["HadamardAttention", "KrauseAttention", "LinearAttention"]
