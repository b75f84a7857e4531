"""Packed sequences: cu_seqlens, the boundaries of sequences along one dimension."""

import torch

from nearfar.runtime import checks


def check_cu_seqlens(cu_seqlens: torch.Tensor, num_tokens: int) -> None:
    """Check the values of cu_seqlens. If it is on a GPU, the host waits for the device.

    Operators check the values of CPU tensors only. With wrong values on a GPU, tokens belong to a wrong sequence or to none; a
    token of no sequence sees no key, and its row is 0. Nothing outside the tensors is read or written.

    Args:
        cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed one after the other, starting with 0.
        num_tokens: the number of tokens of all sequences, which the last boundary must equal.

    Raises:
        TypeError: cu_seqlens is not an int32 tensor.
        ValueError: its shape is not (S + 1,), or it does not start at 0, decreases, or does not end at num_tokens.
    """
    checks.check_cu_seqlens_layout(cu_seqlens)
    checks.check_ends(cu_seqlens, num_tokens)


def token_bounds(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(2, num_tokens) int32: begin and end (exclusive) of the sequence of each packed token."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=torch.int32)
    # All of cu_seqlens, not a slice: torch.compile on CUDA searches a slice from its base (pytorch issue 182343).
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True) - 1
    # Keep indices in bounds even if cu_seqlens does not cover all tokens.
    sequence = sequence.clamp(0, cu_seqlens.numel() - 2)
    return torch.stack((cu_seqlens[sequence], cu_seqlens[sequence + 1]))


def unpad(padding: torch.Tensor, shape: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, cu_seqlens): indices of the tokens of B sequences that are not padding, and their boundaries when packed.

    Their number is read back from the device.

    Args:
        padding: (B, N) bool, True for padding.
        shape, device: what it must have.

    Raises:
        TypeError: padding is no bool tensor.
        ValueError: its shape or device is another.
    """
    if not isinstance(padding, torch.Tensor) or padding.dtype != torch.bool:
        kind = padding.dtype if isinstance(padding, torch.Tensor) else type(padding).__name__
        raise TypeError(f"key_padding_mask must be a bool tensor, True for padding, got {kind}")
    if not checks.same_shape(padding.shape, shape):
        raise ValueError(f"key_padding_mask must have shape (B, N), {tuple(shape)}, got {tuple(padding.shape)}")
    if padding.device != device:
        raise ValueError(f"key_padding_mask must be on the device of x, {device}, got {padding.device}")
    return packed_tokens(~padding)


def packed_tokens(valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, cu_seqlens) of the tokens that count, valid (B, N)."""
    ends = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return valid.flatten().nonzero()[:, 0], ends
