"""Packed sequences: what the kernels need to know of cu_seqlens, computed on its device without a host sync."""

import torch


def token_bounds(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(2, num_tokens) int32: first position and end of the sequence of each packed token."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=torch.int32)
    # All of cu_seqlens, not a slice: torch.compile on CUDA searches a slice from its base (pytorch issue 182343).
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True) - 1
    # Values that do not cover the tokens are refused where they are read (checks.py); here they must stay in bounds.
    sequence = sequence.clamp(0, cu_seqlens.numel() - 2)
    return torch.stack((cu_seqlens[sequence], cu_seqlens[sequence + 1]))
