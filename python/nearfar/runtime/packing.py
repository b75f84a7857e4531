"""Packed sequences: cu_seqlens, the ends of sequences along one dimension."""

import torch

from nearfar.runtime import checks


def check_cu_seqlens(cu_seqlens: torch.Tensor, num_tokens: int) -> None:
    """Check the values of cu_seqlens, for which the host waits until the device has computed them.

    Operators read back CPU tensors alone. With other values on a GPU, tokens land in other sequences or in none, where they see
    no key and their rows are 0; nothing outside of the tensors is read or written.

    Args:
        cu_seqlens: (S + 1,) int32, the ends of S sequences that are packed one after the other, starting with 0.
        num_tokens: of all sequences together, where the last one has to end.

    Raises:
        TypeError: cu_seqlens is no int32 tensor.
        ValueError: its shape is not (S + 1,), or it does not start at 0, decreases, or does not end at num_tokens.
    """
    checks.check_cu_seqlens_layout(cu_seqlens)
    checks.check_ends(cu_seqlens, num_tokens)


def token_bounds(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(2, num_tokens) int32: first position and end of the sequence of each packed token."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=torch.int32)
    # All of cu_seqlens, not a slice: torch.compile on CUDA searches a slice from its base (pytorch issue 182343).
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True) - 1
    # Values that do not cover the tokens stay in bounds, too.
    sequence = sequence.clamp(0, cu_seqlens.numel() - 2)
    return torch.stack((cu_seqlens[sequence], cu_seqlens[sequence + 1]))
