"""Localities: small value objects that state which keys a query sees."""

from dataclasses import dataclass

UNLIMITED = -1
FARTHEST = 2**30  # positions; tensors are shorter, and positions that it is added to stay within int32


@dataclass(frozen=True)
class SlidingWindow:
    """Keys from `left` positions before a query to `right` positions after it, both inclusive.

    Positions count from the end when there are more keys than queries: the queries are the last N positions, as in
    flash-attn. `SlidingWindow(127)` is a causal window of 128 keys, the query's own included.

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
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"SlidingWindow: {side} must be an int, got {type(value).__name__}")
            if value < UNLIMITED:
                raise ValueError(
                    f"SlidingWindow: {side}={value} would hide the query's own key; use 0 or more, or -1 for unlimited"
                )


def within_reach(left: int, right: int) -> tuple[int, int]:
    """The sides of a window as kernels take them: those that reach beyond any tensor are unlimited."""
    return tuple([UNLIMITED if side >= FARTHEST else side for side in (left, right)])  # type: ignore[return-value]


def keys_in_window(left: int, right: int, num_keys: int) -> int:
    """The most keys that one query can see."""
    return num_keys if left < 0 or right < 0 else min(left + right + 1, num_keys)
