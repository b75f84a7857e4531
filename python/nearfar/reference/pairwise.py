"""What the references of the pairwise operators share: sequences, windows, chunks of rows, selection."""

import torch

CHUNK = 128  # rows evaluated at a time; a chunk sees at most CHUNK + window keys


def sequences(num_queries, num_keys, cu_seqlens):
    """(query slice, key slice) of each packed sequence; a single one without cu_seqlens."""
    if cu_seqlens is None:
        return [(slice(0, num_queries), slice(0, num_keys))]
    ends = cu_seqlens.tolist()
    return [(slice(a, b), slice(a, b)) for a, b in zip(ends, ends[1:], strict=False)]


def row_chunks(num_queries, num_keys, left, right):
    """Yield (rows, keys, visible) for each chunk of rows: two slices and the (rows, keys) mask of allowed pairs; no rows make one empty chunk.

    The queries are the last positions. Memory of a chunk is O(CHUNK * window), not O(CHUNK * num_keys).
    """
    offset = num_keys - num_queries
    for start in range(0, max(num_queries, 1), CHUNK):
        stop = min(start + CHUNK, num_queries)
        first = 0 if left < 0 else min(max(0, start + offset - left), num_keys)
        last = num_keys if right < 0 else max(min(num_keys, stop + offset + right), first)
        position = torch.arange(start, stop)[:, None] + offset
        key = torch.arange(first, last)[None, :]
        visible = torch.ones(stop - start, last - first, dtype=torch.bool)
        if left >= 0:
            visible &= key >= position - left
        if right >= 0:
            visible &= key <= position + right
        yield slice(start, stop), slice(first, last), visible


def top_k_mask(scores, top_k):
    """Mask of the top_k largest scores along the last dimension; equal scores go to the smaller index.

    Masked candidates hold -inf and are never selected.
    """
    if top_k >= scores.shape[-1]:
        return scores > float("-inf")
    cut = scores.topk(top_k, dim=-1).values[..., -1:]
    above, tied = scores > cut, scores == cut
    room = top_k - above.sum(-1, keepdim=True)
    return (above | (tied & (tied.cumsum(-1) <= room))) & (scores > float("-inf"))


def masked_softmax(scores, keep):
    """Softmax over the kept entries of the last dimension; rows that keep nothing give zeros and no gradient."""
    empty = ~keep.any(-1, keepdim=True)
    return scores.masked_fill(~(keep | empty), float("-inf")).softmax(-1).masked_fill(empty, 0.0)
