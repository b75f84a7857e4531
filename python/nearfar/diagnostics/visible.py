"""Which keys queries see, by masks, text lengths and causality, in parts that `nearfar.attention_statistics` can compute."""

from typing import Any, NamedTuple

import torch

from nearfar.localities import GridNeighborhood, Locality, ShiftedWindow, SlidingWindow


class Unreadable(Exception):
    """Raised for attention whose weights a watch cannot compute; the message is the reason."""


class Part(NamedTuple):
    """Queries and the window of keys that they see, aligned at the last of each: one text, in one batch element or in all."""

    batch: slice
    queries: slice
    keys: slice
    locality: Locality | None = None


EVERYWHERE = slice(None)


def everything(num_queries: int, num_keys: int) -> list[Part]:
    return [Part(EVERYWHERE, slice(0, num_queries), slice(0, num_keys))]


def causal_from_the_first(num_queries: int, num_keys: int) -> list[Part]:
    """is_causal of scaled_dot_product_attention: query i sees the keys 0 to i, however many keys there are."""
    if num_queries > num_keys:
        raise Unreadable(f"is_causal with {num_queries} queries and {num_keys} keys is not a window that ends at the last key")
    return [Part(EVERYWHERE, slice(0, num_queries), slice(0, num_queries), SlidingWindow(-1, 0))]


def of_locality(num_queries: int, num_keys: int, locality: Locality | None, ends: list[int] | None) -> list[Part]:
    """What an operator of nearfar shows its queries. ends: 0 and the end of each text, None for one text."""
    if ends is not None:
        return packed(ends, ends, locality)  # type: ignore[arg-type]  # grids are never packed
    if locality is None or isinstance(locality, (GridNeighborhood, ShiftedWindow)):
        return [Part(EVERYWHERE, slice(0, num_queries), slice(0, num_keys), locality)]
    hidden = max(num_queries - num_keys, 0)
    if hidden and locality.right:
        raise Unreadable(f"{num_queries} queries see a window of {num_keys} keys that is not causal")
    return [Part(EVERYWHERE, slice(hidden, num_queries), slice(0, num_keys), locality)]


def packed(ends_q: list[int], ends_k: list[int], locality: SlidingWindow | None) -> list[Part]:
    """One part for each text of a packed sequence. ends: 0 and the end of each text, for queries and for keys."""
    if len(ends_q) != len(ends_k):
        raise Unreadable(f"cu_seqlens count {len(ends_q) - 1} texts of queries and {len(ends_k) - 1} of keys")
    texts = zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    return [Part(EVERYWHERE, slice(a, b), slice(c, d), locality) for a, b, c, d in texts if b > a]


def visible_keys(mask: torch.Tensor) -> torch.Tensor:
    """The mask as bools, True where a key is visible. Floating-point masks are added to scores; they hold 0 or about -inf."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise Unreadable(f"attention_mask is {mask.dtype}: only masks of bools and masks that are added to scores are read")
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool(((mask != 0) & ~hidden).any()):
        raise Unreadable("attention_mask adds a bias to the scores: its weights are no softmax of q . k alone")
    return ~hidden


def parts_of_mask(visible: torch.Tensor) -> list[Part]:
    """The parts of a mask (B, H, N, M) of bools; B and H may be expanded dimensions.

    Queries that see no key are left out: they have no weights.
    """
    if visible.shape[1] > 1 and visible.stride(1):
        if bool((visible != visible[:, :1]).any()):
            raise Unreadable("attention_mask differs between heads")
    visible = visible[:, 0]
    if len(visible) and (not visible.stride(0) or bool((visible == visible[:1]).all())):
        return [Part(EVERYWHERE, *part) for part in windows(visible[0])]
    return [Part(slice(b, b + 1), *part) for b, mask in enumerate(visible) for part in windows(mask)]


def windows(mask: torch.Tensor) -> list[tuple[slice, slice, SlidingWindow | None]]:
    """(queries, keys, locality) of each text in a mask (N, M): one window, or several texts one after the other."""
    num_queries, num_keys = mask.shape
    if not num_queries:
        return []
    counts = mask.sum(-1)
    rows = counts.nonzero().flatten().cpu()
    if not len(rows):
        raise Unreadable("attention_mask hides every key")
    first = mask.to(torch.uint8).argmax(-1)
    last = num_keys - 1 - mask.flip(-1).to(torch.uint8).argmax(-1)
    if bool(((last - first + 1 != counts) & (counts > 0)).any()):
        raise Unreadable("attention_mask hides keys between those that a query sees: it is no causal or sliding window")
    first, end = first.cpu()[rows], last.cpu()[rows] + 1
    if found := window(rows, first, end, num_queries, num_keys):
        return [found]
    ahead = end.cummax(0).values  # a text begins where a query sees only keys behind all that were seen so far
    starts = (first[1:] >= ahead[:-1]).nonzero().flatten() + 1
    parts: list[Any] = [
        window(*text, num_queries, num_keys)  # type: ignore[call-arg]
        for text in zip(*(x.tensor_split(starts) for x in (rows, first, end)), strict=True)
    ]
    if None in parts:
        raise Unreadable(
            "attention_mask is no causal or sliding window of each text: watch texts of one length, without padding, or pad a "
            "causal model's on the left"
        )
    return parts


def window(
    rows: torch.Tensor, first: torch.Tensor, end: torch.Tensor, num_queries: int, num_keys: int
) -> tuple[slice, slice, SlidingWindow | None] | None:
    """(queries, keys, locality) of the mask's rows that see the keys from first to end; None if that is not a window."""
    start, stop, count = int(first.min()), int(end.max()), len(rows)
    queries, keys = slice(int(rows[0]), int(rows[-1]) + 1), slice(start, stop)
    if queries.stop - queries.start != count:
        return None
    position = torch.arange(count, device="cpu") + stop - count
    left, right = int((position - first).max()), int((end - 1 - position).max())
    if bool((first == start).all() & (end == stop).all()):
        alone = num_queries == num_keys and (queries.start < start or queries.stop > stop)
        return None if alone and count > 1 else (queries, keys, None)  # padding that sees what the text sees is ambiguous
    if left < 0 or right < 0 or stop - start < count:
        return None
    inside = (first == (position - left).clamp_min(start)) & (end == (position + right + 1).clamp_max(stop))
    return (queries, keys, SlidingWindow(left, right)) if bool(inside.all()) else None
