"""Padding of head widths: kernels take multiples of 8 from 16 to 256."""

import torch
from torch.nn.functional import pad


def padded(x: torch.Tensor) -> torch.Tensor:
    """Pad x (.., D) with zeros to the next width that kernels take. Zeros change no product, distance or sum."""
    width = x.shape[-1]
    missing = max(-width % 8, 16 - width)
    return pad(x, (0, missing)) if missing else x
