"""Dropout of attention weights: its arguments, and what of a random word means that a weight is dropped."""

import torch

from nearfar.runtime import checks

CUDA_REASON = "the CUDA kernels have no dropout"
WORD_BITS = 31  # of a random word that are compared, so that a threshold is an int32


def check_dropout(dropout_p: float) -> None:
    if not checks.is_number(dropout_p) or isinstance(dropout_p, bool):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")


def seed_of(dropout_p: float, seed: int | torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """The seed of a call, (1,) int64 on the device of q, drawn from torch's generator of that device unless it is given.

    None without dropout. It stays on the device, so that a CUDA graph draws a new one in each replay.
    """
    if seed is not None:
        _check_seed(seed)
    check_dropout(dropout_p)
    if not dropout_p:
        return None
    checks.check_tensor("q", q)
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if not isinstance(seed, torch.Tensor):
        return torch.full((1,), seed, dtype=torch.int64, device=q.device)
    if seed.device != q.device:
        raise ValueError(f"seed must be on the device of q, {q.device}, got {seed.device}")
    return seed.reshape(1)


def _check_seed(seed: object) -> None:
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got {seed.dtype}")
        if seed.dim() and not checks.same_shape(seed.shape, (1,)):
            raise ValueError(f"seed must be one number, got shape {tuple(seed.shape)}")
        return
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be a number of 64 bits, got {seed}")


def threshold(dropout_p: float) -> int:
    """A weight is dropped if the upper WORD_BITS of its word are below this number."""
    return min(round(dropout_p * 2**WORD_BITS), 2**WORD_BITS - 1)


def keep_scale(dropout_p: float) -> float:
    """What the weights are multiplied with that stay."""
    return 1 / (1 - dropout_p)
