"""Translation of transformers' masks for nearfar's operators: to a window, packed sequences, and padded keys.

transformers describes a mask by a function of positions, composed of functions in `transformers.masking_utils`. Those that a
window and packed sequences can express are recognised; any other raises. No queries x keys mask is ever allocated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from nearfar.runtime.packing import packed_tokens

MASKING = "transformers.masking_utils"

Window = tuple[int, int]
Attend = Callable[..., torch.Tensor]  # (q, k, v, window, cu_seqlens, *per_query) -> o; per_query: (B, Hq, N) like q


class Rows(NamedTuple):
    """The tokens of one sequence of a batch that are not padding: indices of its queries (its last tokens) and of its keys."""

    queries: torch.Tensor
    keys: torch.Tensor


class Mask(NamedTuple):
    """Which keys each query sees.

    Attributes:
        sizes: (batch, queries, keys) of the mask.
        window: (left, right), as operators take it.
        visible: number of leading keys that queries may see; the queries are at the last positions of these.
        tokens: indices of the batch x queries tokens that are not padding, packed by cu_seqlens; None for all tokens.
        cu_seqlens: boundaries of the packed sequences; None if every sequence of the batch is whole.
        rows: the tokens of each sequence that are not padding, if there is padding and fewer queries than keys; otherwise None.
        distances: whether the distance of a query and a key is the same for an operator as in the model, which a window needs.
            It differs if padding lies between tokens of one sequence, or keys are those of another sequence.
    """

    sizes: tuple[int, int, int]
    window: Window
    visible: int
    tokens: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    rows: tuple[Rows, ...] | None = None
    distances: bool = True

    @property
    def ndim(self) -> int:
        """4, like a 4-d mask tensor: with a static cache, `generate` builds masks first and passes them to the model."""
        return 4


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: "torch.Tensor | Mask | None" = None,
    **_: Any,
) -> Mask:
    """The Mask of a mask function and a padding mask. AttentionMaskInterface calls this once for all layers of a kind.

    Args:
        q_length, kv_length: numbers of queries and keys.
        q_offset, kv_offset: positions of the first query and key.
        mask_function: from `transformers.masking_utils`.
        attention_mask: (B, tokens) bool, False for padding; tokens beyond its end are padding. A Mask is returned unchanged.

    Raises:
        NotImplementedError: the mask cannot be expressed by a window, packed sequences and padding.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    sizes = batch_size, q_length, kv_length
    pattern = _pattern(mask_function)
    after = int(q_offset) + q_length - kv_offset  # one past the key of the last query
    visible = min(kv_length, after) if pattern.right == 0 else kv_length
    mask = Mask(sizes, (pattern.left, pattern.right), visible, distances=after == visible)
    check_window(mask, mask.window)
    if pattern.right == 0 and after != visible:
        raise NotImplementedError(f"nearfar needs a key at the last query's position, {after - 1}; there are {visible} keys")
    if attention_mask is not None:
        return _with_padding(mask, _valid_keys(attention_mask, kv_offset, visible))
    if pattern.sequence_ids is not None:
        return _with_packing(mask, pattern.sequence_ids)
    return mask


def mask_without(batch: int, queries: int, keys: int, causal: bool, window: int | None) -> Mask:
    """The Mask of a call without attention_mask, from the layer's attributes. window: the most keys that a query sees."""
    if causal and queries not in (1, keys):
        raise NotImplementedError(f"causal attention of {queries} queries and {keys} keys needs an attention_mask")
    reach = -1 if window is None else window - 1 if causal else window
    mask = Mask((batch, queries, keys), (reach, 0 if causal else reach), keys, distances=causal or queries == keys)
    check_window(mask, mask.window)
    return mask


class _Pattern(NamedTuple):
    left: int = -1
    right: int = -1
    sequence_ids: torch.Tensor | None = None


def _pattern(function: Callable[..., Any] | None) -> _Pattern:
    """The pattern of a mask function of transformers, identified by its name and closure."""
    name = getattr(function, "__qualname__", repr(function))
    if getattr(function, "__module__", None) == MASKING:
        cells = _closure(function)
        match name.removesuffix(".<locals>.inner_mask").removesuffix(".<locals>.and_mask"):
            case "causal_mask_function":
                return _Pattern(right=0)
            case "bidirectional_mask_function":
                return _Pattern()
            case "sliding_window_overlay":
                return _Pattern(left=_size(cells["sliding_window"]) - 1)
            case "sliding_window_bidirectional_overlay":
                return _Pattern(left=_size(cells["sliding_window"]), right=cells["sliding_window"])
            case "packed_sequence_mask_function":
                return _Pattern(sequence_ids=cells["packed_sequence_mask"])
            case "remap_positions_for_packed_sequence":  # differences of positions within a sequence stay the same
                return _pattern(cells["mask_function"])
            case "and_masks":
                return _both([_pattern(part) for part in cells["mask_functions"]])
    raise NotImplementedError(
        f"nearfar has no operator for the mask {name}: it takes causal and bidirectional masks, sliding windows, packed "
        'sequences and padding. Use attn_implementation="eager" or "flex_attention"'
    )


def _closure(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _size(window: int) -> int:
    if window < 1:
        raise NotImplementedError(f"sliding_window must be at least 1, got {window}")
    return window


def _both(patterns: list[_Pattern]) -> _Pattern:
    ids = [pattern.sequence_ids for pattern in patterns if pattern.sequence_ids is not None]
    if len(ids) > 1:
        raise NotImplementedError("nearfar takes one packing of sequences, got a mask with two")
    left, right = (
        min([side for side in sides if side >= 0], default=-1)
        for sides in zip(*[(pattern.left, pattern.right) for pattern in patterns], strict=True)
    )
    return _Pattern(left, right, ids[0] if ids else None)


def _valid_keys(attention_mask: torch.Tensor, first: int, visible: int) -> torch.Tensor:
    """(B, visible) bool: the padding mask of keys that start at position `first`."""
    valid = attention_mask[:, first : first + visible].bool()
    return pad(valid, (0, visible - valid.shape[1]))


def _with_packing(mask: Mask, sequence_ids: torch.Tensor) -> Mask:
    """Add packed sequences to a mask. sequence_ids: (B, N); neighbours with equal ids belong to one sequence."""
    starts = torch.ones_like(sequence_ids, dtype=torch.bool)
    starts[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    if int(starts.sum()) == len(starts):  # under torch.compile, transformers declares every batch as packed
        return mask
    return mask._replace(cu_seqlens=pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel()).to(torch.int32))


def _with_padding(mask: Mask, valid: torch.Tensor) -> Mask:
    if bool(valid.all()):
        return mask
    num_queries, causal = mask.sizes[1], mask.window[1] == 0
    runs = (valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0]
    mask = mask._replace(distances=causal and not bool((runs > 1).any()))
    check_window(mask, mask.window)
    if not causal:  # queries may be of another sequence (cross-attention), whose padding is unknown: keep all of them
        every = torch.arange(num_queries, device=valid.device)
        return mask._replace(rows=tuple([Rows(every, row.nonzero()[:, 0]) for row in valid]))
    if num_queries == mask.visible:
        tokens, cu_seqlens = packed_tokens(valid)
        return mask._replace(tokens=tokens, cu_seqlens=cu_seqlens)
    queries = valid[:, mask.visible - num_queries :]
    indices = [Rows(row.nonzero()[:, 0], keys.nonzero()[:, 0]) for row, keys in zip(queries, valid, strict=True)]
    return mask._replace(rows=tuple(indices))


def check_window(mask: Mask, window: Window) -> None:
    """Refuse a limited window if distances differ from those of the model."""
    if not mask.distances and (window[0] >= 0 or window[1] > 0):
        raise NotImplementedError(
            f"nearfar cannot count a window of {window} keys over this attention_mask: it needs self-attention, causal where "
            "there is padding, and padding on one side of each sequence"
        )


def attend_within(
    attend: Attend, mask: Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *per_query: torch.Tensor
) -> torch.Tensor:
    """Call attend(q, k, v, window, cu_seqlens, *per_query) on the tokens that the mask allows. Padded queries return zeros.

    Args:
        q: (B, Hq, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv).
        per_query: (B, Hq, N) tensors.

    Returns:
        (B, Hq, N, Dv).
    """
    if mask.rows is not None:
        return _attend_rows(attend, mask, q, k, v, *per_query)
    if mask.cu_seqlens is not None:
        return _attend_packed(attend, mask, q, k, v, *per_query)
    k, v = k[:, :, : mask.visible], v[:, :, : mask.visible]
    return attend(q, k, v, mask.window, None, *per_query)


def _attend_packed(
    attend: Attend, mask: Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *per_query: torch.Tensor
) -> torch.Tensor:
    """Self-attention over the tokens of all sequences, packed in a batch of 1."""
    k, v = k[:, :, : mask.visible], v[:, :, : mask.visible]

    def packed(x: torch.Tensor) -> torch.Tensor:
        tokens = x.transpose(1, 2).flatten(0, 1)
        return (tokens if mask.tokens is None else tokens.index_select(0, mask.tokens)).transpose(0, 1)[None]

    o = attend(packed(q), packed(k), packed(v), mask.window, mask.cu_seqlens, *map(packed, per_query))[0].transpose(0, 1)
    if mask.tokens is not None:
        o = o.new_zeros(q.shape[0] * q.shape[2], *o.shape[1:]).index_copy(0, mask.tokens, o)
    return o.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def _attend_rows(
    attend: Attend, mask: Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *per_query: torch.Tensor
) -> torch.Tensor:
    """One sequence after the other, because operators do not take key lengths yet."""
    outputs = []
    for i, (queries, keys) in enumerate(mask.rows or ()):
        own = [x[i : i + 1].index_select(2, queries) for x in (q, *per_query)]
        k_own, v_own = (x[i : i + 1].index_select(2, keys) for x in (k, v))
        o = attend(own[0], k_own, v_own, mask.window, None, *own[1:])
        outputs.append(o.new_zeros(*o.shape[:2], q.shape[2], o.shape[3]).index_copy(2, queries, o))
    return torch.cat(outputs)
