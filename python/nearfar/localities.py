"""Localities: small value objects that state which keys a query sees.

Each has `visible(query, key)`, which defines the allowed pairs: it takes integer tensors of positions that broadcast, and
returns a bool tensor. The references use it as their mask, and `lambda b, h, q, k: locality.visible(q, k)` is a mask function
of FlexAttention. Other methods (spans, linear forms) are derived from it and tested against it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor

UNLIMITED = -1
FARTHEST = 2**30  # positions; longer than any tensor, and a position plus this fits int32


@dataclass(frozen=True)
class SlidingWindow:
    """Keys from `left` positions before a query to `right` positions after it, both inclusive.

    If there are more keys than queries, the queries are the last N positions, as in flash-attn. `SlidingWindow(127)` is a
    causal window of 128 keys, including the query's own.

    Args:
        left: how many keys before the query, -1 for all of them.
        right: how many keys after the query, -1 for all of them. 0 is causal.

    Raises:
        TypeError: a side is not an int.
        ValueError: a side is below -1, which would hide the query's own key.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        for side in ("left", "right"):
            value = getattr(self, side)
            if not _is_int(value):
                raise TypeError(f"SlidingWindow: {side} must be an int, got {type(value).__name__}")
            if value < UNLIMITED:
                raise ValueError(
                    f"SlidingWindow: {side}={value} would hide the query's own key; use 0 or more, or -1 for unlimited"
                )

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool tensor: which keys queries see. query, key: integer tensors of positions among the keys, which broadcast."""
        distance = key - query
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.left != UNLIMITED:
            seen = seen & (distance >= -self.left)
        if self.right != UNLIMITED:
            seen = seen & (distance <= self.right)
        return seen


@dataclass(frozen=True)
class GridNeighborhood:
    """Cells of a 2-D or 3-D grid within a radius of the query's cell, and global tokens, which see and are seen by all tokens.

    The sequence consists of the global tokens, then the cells in row-major order. A cell at the border has fewer neighbours.
    With a dilation d, a query sees every d-th cell along an axis, including its own, and `radius` counts those.
    `GridNeighborhood((14, 14), 2, global_tokens=1)` is Krause attention's ViT (arXiv 2602.11534): 5 x 5 cells and CLS.

    Args:
        shape: cells along each axis, (H, W) or (T, H, W).
        radius: the farthest cell, 0 or more, along every axis or one number per axis.
        metric: "chebyshev", a box of 2 radius + 1 cells along each axis, or "manhattan", at most `radius` steps in total,
            which requires one radius for all axes.
        global_tokens: how many tokens precede the cells.
        dilation: 1 or more, for every axis or one number per axis.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is too small, a tuple has not one number per axis, or the metric is unknown.
    """

    shape: tuple[int, ...]
    radius: int | tuple[int, ...]
    metric: Literal["chebyshev", "manhattan"] = "chebyshev"
    global_tokens: int = 0
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        _set(self, shape=_axes(self, "shape", self.shape, None, 1))
        _set(self, radius=_axes(self, "radius", self.radius, self.shape, 0))
        _set(self, dilation=_axes(self, "dilation", self.dilation, self.shape, 1))
        if self.metric not in ("chebyshev", "manhattan"):
            raise ValueError(f'GridNeighborhood: metric must be "chebyshev" or "manhattan", got {self.metric!r}')
        if self.metric == "manhattan" and len(set(self.radii)) > 1:
            raise ValueError(f"GridNeighborhood: manhattan distances take one radius for all axes, got {self.radius}")
        if not _is_int(self.global_tokens):
            raise TypeError(f"GridNeighborhood: global_tokens must be an int, got {type(self.global_tokens).__name__}")
        if self.global_tokens < 0:
            raise ValueError(f"GridNeighborhood: global_tokens must be 0 or more, got {self.global_tokens}")
        manhattan = int(self.metric == "manhattan")
        _set(self, _text=_text(*self.shape, *self.radii, *self.dilations, manhattan, self.global_tokens))

    @property
    def text(self) -> str:
        """All numbers, those of each axis first: an operator's schema has no type for a locality.

        It is written when the locality is made, as Dynamo cannot write numbers that it has made symbols of.
        """
        return self._text  # type: ignore[attr-defined]

    @property
    def radii(self) -> tuple[int, ...]:
        """`radius` of each axis."""
        return self.radius  # type: ignore[return-value]  # a tuple since __post_init__

    @property
    def dilations(self) -> tuple[int, ...]:
        """`dilation` of each axis."""
        return self.dilation  # type: ignore[return-value]

    @property
    def num_tokens(self) -> int:
        """Tokens of a sequence, including the global ones."""
        return self.global_tokens + math.prod(self.shape)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Which keys queries see. query, key: positions in the sequence, which broadcast."""
        cells = [_coordinates(position - self.global_tokens, self.shape) for position in (query, key)]
        offsets = [k - q for q, k in zip(*cells, strict=True)]
        if self.metric == "chebyshev":
            distances = [offset.abs() <= r * d for offset, r, d in zip(offsets, self.radii, self.dilations, strict=True)]
            seen = _all(distances)
        else:
            steps = [offset.abs() // d for offset, d in zip(offsets, self.dilations, strict=True)]
            seen = sum(steps[1:], steps[0]) <= self.radii[0]
        if max(self.dilations) > 1:
            seen = seen & _all([offset % d == 0 for offset, d in zip(offsets, self.dilations, strict=True)])
        if self.global_tokens:
            seen = seen | (query < self.global_tokens) | (key < self.global_tokens)
        return seen

    def key_span(self, first: int, last: int) -> tuple[int, int]:
        """(begin, end) of the cells that queries from `first` to `last` - 1 may see, none of them counting global tokens."""
        strides = _strides(self.shape)
        reach = [min(r * d, n - 1) * s for r, d, n, s in zip(self.radii, self.dilations, self.shape, strides, strict=True)]
        return max(first - sum(reach), 0), min(last + sum(reach), math.prod(self.shape))


@dataclass(frozen=True)
class ShiftedWindow:
    """The cells of the query's window, in a 2-D or 3-D grid that is divided into windows (Swin, arXiv 2103.14030).

    The sequence consists of the cells in row-major order. Windows start `shift` cells into the grid along each axis. Windows at
    the borders are smaller: cells that a cyclic shift would bring together from opposite borders do not see each other, as in
    Swin.

    Args:
        shape: cells along each axis, (H, W) or (T, H, W); multiples of the window.
        window: cells of a window along every axis, or one number per axis.
        shift: 0 to window - 1, for every axis or one number per axis.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is too small, shift is not below the window, or the window does not divide the shape.
    """

    shape: tuple[int, ...]
    window: int | tuple[int, ...]
    shift: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        _set(self, shape=_axes(self, "shape", self.shape, None, 1))
        _set(self, window=_axes(self, "window", self.window, self.shape, 1))
        _set(self, shift=_axes(self, "shift", self.shift, self.shape, 0))
        if any(s >= w for s, w in zip(self.shifts, self.windows, strict=True)):
            raise ValueError(f"ShiftedWindow: shift must be below the window {self.window} along each axis, got {self.shift}")
        if any(n % w for n, w in zip(self.shape, self.windows, strict=True)):
            raise ValueError(f"ShiftedWindow: shape must be a multiple of the window {self.window}, got {self.shape}")
        _set(self, _text=_text(*self.shape, *self.windows, *self.shifts))

    @property
    def text(self) -> str:
        """All numbers, as those of a GridNeighborhood."""
        return self._text  # type: ignore[attr-defined]

    @property
    def windows(self) -> tuple[int, ...]:
        """`window` of each axis."""
        return self.window  # type: ignore[return-value]  # a tuple since __post_init__

    @property
    def shifts(self) -> tuple[int, ...]:
        """`shift` of each axis."""
        return self.shift  # type: ignore[return-value]

    @property
    def global_tokens(self) -> int:
        """0: every token is a cell."""
        return 0

    @property
    def num_tokens(self) -> int:
        """Tokens of a sequence."""
        return math.prod(self.shape)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Which keys queries see. query, key: positions in the sequence, which broadcast."""
        queries, keys = ([(x - s) // w for x, s, w in self._placed(position)] for position in (query, key))
        return _all([q == k for q, k in zip(queries, keys, strict=True)])

    def key_span(self, first: int, last: int) -> tuple[int, int]:
        """(begin, end) of the cells that queries from `first` to `last` - 1 may see."""
        plane, window, shift = math.prod(self.shape[1:]), self.windows[0], self.shifts[0]
        begin = (first // plane - shift) // window * window + shift
        end = ((max(last, first + 1) - 1) // plane - shift) // window * window + shift + window
        return max(begin, 0) * plane, min(end, self.shape[0]) * plane

    @property
    def bias_size(self) -> int:
        """Entries of a relative position table: one for each offset of a query from a key of its window."""
        return math.prod([2 * w - 1 for w in self.windows])  # a list: Dynamo passes no generator to math.prod

    def bias_index(self, query: Tensor, key: Tensor) -> Tensor:
        """Table index of pairs that see each other, row-major in the offset of the query from the key; 0 for other pairs."""
        index = 0 * (query - key)
        for (q, _, window), (k, _, _) in zip(self._placed(query), self._placed(key), strict=True):
            index = index * (2 * window - 1) + (q - k + window - 1)
        return index.masked_fill(~self.visible(query, key), 0)

    def _placed(self, position: Tensor) -> list[tuple[Tensor, int, int]]:
        """(coordinate, shift, window) of each axis."""
        return list(zip(_coordinates(position, self.shape), self.shifts, self.windows, strict=True))


Grid: TypeAlias = GridNeighborhood | ShiftedWindow
Locality: TypeAlias = SlidingWindow | Grid


def check_length(locality: Grid, num_queries: int, num_keys: int) -> None:
    """Raise a ValueError unless queries and keys are the tokens of the grid."""
    for name, length in (("q", num_queries), ("k", num_keys)):
        if length != locality.num_tokens:
            tokens = f" and {locality.global_tokens} global tokens" if locality.global_tokens else ""
            raise ValueError(
                f"locality: shape {locality.shape} has {math.prod(locality.shape)} cells{tokens}, so {name} must have "
                f"{locality.num_tokens} tokens, got {length}"
            )


def check_not_packed(locality: Grid, cu_seqlens: Tensor | None) -> None:
    """Raise a ValueError if a grid is asked for in a packed call."""
    if cu_seqlens is not None:
        raise ValueError(f"cu_seqlens: a {type(locality).__name__} is one grid a batch element; grids cannot be packed")


def within_reach(left: int, right: int) -> tuple[int, int]:
    """The sides of a window as kernels take them: a side that reaches beyond any tensor becomes unlimited."""
    return tuple([UNLIMITED if side >= FARTHEST else side for side in (left, right)])  # type: ignore[return-value]


def keys_in_window(left: int, right: int, num_keys: int) -> int:
    """The most keys that one query can see."""
    return num_keys if left < 0 or right < 0 else min(left + right + 1, num_keys)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(*numbers: int) -> str:
    return " ".join(map(str, numbers))


def _set(locality: object, **fields: tuple[int, ...] | str) -> None:
    for name, value in fields.items():
        object.__setattr__(locality, name, value)  # of a frozen dataclass


def _axes(locality: object, name: str, value: object, shape: Sequence[int] | None, smallest: int) -> tuple[int, ...]:
    """A number for each axis, from one number for all axes or one per axis. shape None: the value is the shape itself."""
    kind = type(locality).__name__
    if shape is None:
        if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
            raise ValueError(f"{kind}: {name} must be (H, W) or (T, H, W), got {value!r}")
        numbers = tuple(value)
    else:
        numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(shape)
        if len(numbers) != len(shape):
            raise ValueError(f"{kind}: {name} must be an int or one for each axis of {tuple(shape)}, got {value!r}")
    for number in numbers:
        if not _is_int(number):
            raise TypeError(f"{kind}: {name} must have whole numbers, got {value!r}")
        if number < smallest:
            raise ValueError(f"{kind}: {name} must be {smallest} or more along each axis, got {value!r}")
    return numbers


def _strides(shape: Sequence[int]) -> list[int]:
    """Positions from one cell to the next along each axis, in row-major order."""
    return list(accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]


def _coordinates(cell: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Coordinates of cells along each axis. Those of global tokens (negative cells) have no meaning."""
    return [cell // stride % size for stride, size in zip(_strides(shape), shape, strict=True)]


def _all(masks: Sequence[Tensor]) -> Tensor:
    seen = masks[0]
    for mask in masks[1:]:
        seen = seen & mask
    return seen
