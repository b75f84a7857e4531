"""Rotary positions (arXiv 2104.09864): the cosines and sines that layers take as `rotary`, and the rotation."""

from collections.abc import Sequence

import torch

from nearfar.runtime.checks import require

Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin


def rotary(
    positions: int | torch.Tensor,
    width: int | Sequence[int],
    *,
    base: float = 10000.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Rotary:
    """The cosines and sines of rotary positions, which the layers of nf.nn take as `rotary`.

    Source: arXiv 2104.09864, in the layout of Llama: pair i of a head, dimensions i and i + width / 2, turns by position *
    base^(-2 i / width). The angles are computed in float64.

    Args:
        positions: N, for positions 0 to N - 1, or a tensor of positions, (N,) or (B, N).
        width: even, of a head; or the widths of the factors of `nearfar.nn.HadamardAttention`, each turned by itself.
        base: of the geometric series of frequencies, positive.
        dtype: of the result; None for PyTorch's default.
        device: of the result; None for that of the positions.

    Returns:
        (cos, sin), each (N, width), or (B, 1, N, width) for positions (B, N). With several widths, their sum is the last size.

    Raises:
        ValueError: a width is not even and positive, base is not positive, or positions have another shape.
    """
    widths = [width] if isinstance(width, int) else list(width)
    for number in widths:
        require(number >= 2 and number % 2 == 0, f"width must be even and at least 2, got {width}")
    require(base > 0, f"base must be positive, got {base}")
    if not isinstance(positions, torch.Tensor):
        positions = torch.arange(positions, device=device)
    require(positions.dim() in (1, 2), f"positions must have shape (N,) or (B, N), got {tuple(positions.shape)}")
    turns = positions.to(device, torch.float64)[..., None]
    angles = []
    for number in widths:
        frequencies = base ** (torch.arange(0, number, 2, device=turns.device, dtype=torch.float64) / -number)
        angles += [turns * frequencies] * 2
    angle = torch.cat(angles, -1)
    if positions.dim() == 2:
        angle = angle[:, None]
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads (B, H, N, D) * cos + (-second half, first half) * sin, in the dtype of heads."""
    first, second = heads.chunk(2, -1)
    return (heads * cos + torch.cat((-second, first), -1) * sin).to(heads.dtype)


def check_rotary(rotary: Rotary, x: torch.Tensor, width: int) -> None:
    """Raise unless rotary is (cos, sin) for the tokens x (B, N, dim) and heads of this width."""
    require(isinstance(rotary, (tuple, list)) and len(rotary) == 2, "rotary must be a pair (cos, sin)", TypeError)
    require(width % 2 == 0, f"rotary needs an even head_dim, got {width}")
    target = x.shape[0], 1, x.shape[1], width
    for name, angle in zip(("cos", "sin"), rotary, strict=True):
        sizes = zip(angle.shape[::-1], target[::-1], strict=False)
        fits = len(angle.shape) <= 4 and all(size in (1, wanted) for size, wanted in sizes)
        require(fits, f"rotary: {name} must broadcast to (B, 1, N, head_dim), {target}, got {tuple(angle.shape)}")


def rotary_of_tokens(rotary: Rotary, tokens: torch.Tensor, batch: int, length: int) -> Rotary:
    """rotary of some tokens of a (batch, length) of them, by their index: each (len(tokens), width)."""
    cos, sin = (part.broadcast_to(batch, 1, length, part.shape[-1]).flatten(0, 2)[tokens] for part in rotary)
    return cos, sin
