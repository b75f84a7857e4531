"""Drop-in attention layers, x (B, N, dim) -> (B, N, dim), one file per operator."""

from nearfar.nn.krause import KrauseAttention

__all__ = ["KrauseAttention"]
