"""What the references of the pairwise operators share: sequences, windows, chunks of rows, selection."""

import torch

CHUNK = 128  # rows and keys of a block


def sequence_lengths(length, cu_seqlens):
    """Lengths of the packed sequences; one sequence without cu_seqlens."""
    return [length] if cu_seqlens is None else cu_seqlens.diff().tolist()


def split_rows(*tensors):
    """The blocks of CHUNK rows of each tensor (.., N, D), one empty block if N is 0.

    By split, not by slices: the gradient of a slice is as long as what it was cut from. Dynamo (torch 2.11) cannot split
    an empty tensor.
    """
    return [tensor.split(CHUNK, -2) if tensor.shape[-2] else (tensor,) for tensor in tensors]


def row_chunks(num_queries, num_keys, left, right):
    """Yield (row block, first key block, last key block + 1, visible) for each block of CHUNK queries.

    visible is the (rows, keys) mask of the allowed pairs of the row block with those key blocks; the queries are the last
    positions. A row block sees O(CHUNK + window) keys. No queries make one empty block, no keys no key block.
    """
    offset = num_keys - num_queries
    num_blocks = max(1, -(-num_keys // CHUNK))
    for block, start in enumerate(range(0, max(num_queries, 1), CHUNK)):
        stop = min(start + CHUNK, num_queries)
        first = 0 if left < 0 else min(max(0, start + offset - left) // CHUNK, num_blocks - 1)
        last = num_blocks if right < 0 else max(min(num_blocks, -(-(stop + offset + right) // CHUNK)), first + 1)
        position = torch.arange(start, stop)[:, None] + offset
        key = torch.arange(first * CHUNK, min(last * CHUNK, num_keys))[None, :]
        visible = torch.ones(position.shape[0], key.shape[1], dtype=torch.bool)
        if left >= 0:
            visible &= key >= position - left
        if right >= 0:
            visible &= key <= position + right
        yield block, first, last, visible


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
