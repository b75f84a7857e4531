"""Shared code of the references: sequences, windows, chunks of rows, distances, selection."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nearfar.runtime.private import transform_level

CHUNK = 64  # rows and keys of a block


def sequence_lengths(length, cu_seqlens):
    """Lengths of the packed sequences; one sequence without cu_seqlens."""
    return [length] if cu_seqlens is None else cu_seqlens.diff().tolist()


def split_rows(*tensors):
    """The blocks of CHUNK rows of each tensor (.., N, D); one empty block if N is 0.

    Uses split, because the gradient of a slice has the size of the whole tensor. Dynamo (torch 2.11) cannot split an empty
    tensor.
    """
    return [tensor.split(CHUNK, -2) if tensor.shape[-2] else (tensor,) for tensor in tensors]


class Chunk(NamedTuple):
    """A block of CHUNK queries and the key blocks from `first` to `last` - 1 that its window reaches."""

    block: int
    first: int
    last: int
    rows: tuple[int, int]  # (begin, end) positions of the queries among the keys
    keys: tuple[int, int]
    left: int
    right: int

    def visible(self, device: torch.device) -> Tensor:
        """The (rows, keys) mask of the allowed pairs."""
        position = torch.arange(*self.rows, device=device)[:, None]
        key = torch.arange(*self.keys, device=device)[None, :]
        visible = torch.ones(position.shape[0], key.shape[1], dtype=torch.bool, device=device)
        if self.left >= 0:
            visible &= key >= position - self.left
        if self.right >= 0:
            visible &= key <= position + self.right
        return visible


def row_chunks(num_queries: int, num_keys: int, left: int, right: int) -> Iterator[Chunk]:
    """Yield the Chunk of each block of CHUNK queries; the queries are the last positions.

    A chunk has O(CHUNK + window) keys. Without queries there is one empty chunk; without keys, chunks have no key block.
    """
    offset = num_keys - num_queries
    num_blocks = max(1, -(-num_keys // CHUNK))
    for block, start in enumerate(range(0, max(num_queries, 1), CHUNK)):
        stop = min(start + CHUNK, num_queries)
        first = 0 if left < 0 else min(max(0, start + offset - left) // CHUNK, num_blocks - 1)
        last = num_blocks if right < 0 else max(min(num_blocks, -(-(stop + offset + right) // CHUNK)), first + 1)
        keys = first * CHUNK, min(last * CHUNK, num_keys)
        yield Chunk(block, first, last, (start + offset, stop + offset), keys, left, right)


class KeyBlocks(Protocol):
    """Which blocks of keys a chunk of queries sees: from `first` to `last` - 1."""

    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...


def by_chunk(function: Callable[..., Any], chunk: KeyBlocks, tensors: Sequence[Tensor], *blocks: Sequence[Tensor]) -> Any:
    """Call function(chunk, *tensors, ..) with, for each list of key blocks, the chunk's blocks concatenated.

    The function is checkpointed: the backward runs it again, so a chunk's scores are not saved. It is differentiable any number
    of times. Under transforms of torch.func and torch.compile, which do not support hooks on saved tensors, it is not
    checkpointed.
    """
    count, length = len(tensors), chunk.last - chunk.first

    def evaluate(*arguments):
        seen = [torch.cat(arguments[i : i + length], -2) for i in range(count, len(arguments), length)]
        return function(chunk, *arguments[:count], *seen)

    # Pass each block as a separate argument, so that autograd detects in-place writes before the backward.
    arguments = *tensors, *(block for keys in blocks for block in keys[chunk.first : chunk.last])
    tracked = torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments)
    if not tracked or torch.compiler.is_compiling() or transform_level() is not None:
        return evaluate(*arguments)
    return checkpoint(evaluate, *arguments, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


def group_heads(tensor: Tensor, heads_kv: int) -> Tensor:
    """(B, Hq, ..) as (B, Hkv, group, ..): the query heads of a group share their key head."""
    return tensor.unflatten(1, (heads_kv, tensor.shape[1] // heads_kv))


def per_head(parameter: Tensor, heads_q: int, heads_kv: int) -> Tensor:
    """A parameter (Hq,) or (1,) as (Hkv, group, 1, 1), which broadcasts to rows and pairs."""
    return parameter.expand(heads_q).reshape(heads_kv, -1, 1, 1)


def group_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """(B, Hkv, group, n, c) times (B, Hkv, c, m), without a copy of the matrix for each head of a group."""
    return (rows.flatten(2, 3) @ matrix).unflatten(2, rows.shape[2:4])


def squared_distances(q: Tensor, k: Tensor) -> Tensor:
    """|q_i - k_j|^2 of q (B, Hkv, group, n, D) and k (B, Hkv, m, D): (B, Hkv, group, n, m) in the dtype of q.

    Products are in float64, and exact for inputs of fewer bits except for the rounding of their sum, so tokens may lie far from
    the origin and close to each other. A pair does not depend on other tokens, as it would if a mean were subtracted. Distances
    within that rounding, such as those of equal tokens, are set to 0; their derivatives of every order are unchanged.
    """
    queries, keys = q.double(), k.double()
    q_squares, k_squares = (x.square().sum(-1, keepdim=True) for x in (queries, keys))
    distances = (group_product(-2 * queries, keys.mT) + q_squares + k_squares[:, :, None].mT).to(q.dtype)
    return distances - distances.detach().masked_fill(distances.detach() > resolution(q), 0)


def resolution(q: Tensor) -> Tensor:
    """(.., n, 1): squared distances from q (.., n, D) up to this size may be rounding errors alone."""
    # For equal keys, errors of up to (D + 16) 2^-55 |q|^2 were measured, over all shapes of products.
    return (q.detach().double().square().sum(-1, keepdim=True) * ((q.shape[-1] + 16) * 2.0**-54)).to(q.dtype)


def distance_scores(q: Tensor, k: Tensor, sigma: Tensor) -> Tensor:
    """-|q_i - k_j|^2 / (2 sigma^2); sigma broadcasts to (B, Hkv, group, n, m)."""
    return squared_distances(q, k) * (-0.5 * sigma.reciprocal().square())


def top_k_mask(scores, top_k, keep_ties=False):
    """Mask of the top_k largest scores along the last dimension; equal scores go to the smaller index.

    keep_ties: of all scores that are not below the top_k-th, which are more than top_k where equal ones straddle the cut.
    Masked candidates are -inf and are never selected. NaN counts as the largest score, so that it reaches the output.
    """
    scores = scores.masked_fill(scores.isnan(), float("inf"))
    allowed = scores > float("-inf")
    if top_k >= scores.shape[-1]:
        return allowed
    cut = scores.topk(top_k, dim=-1).values[..., -1:]
    if keep_ties:
        return (scores >= cut) & allowed
    above, tied = scores > cut, scores == cut
    room = top_k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return (above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))) & allowed


def masked_softmax(scores, keep):
    """Softmax over the last dimension, restricted to the mask `keep`, which broadcasts. Rows without any entry are zeros."""
    empty = ~keep.any(-1, keepdim=True)
    return scores.masked_fill(~(keep | empty), float("-inf")).softmax(-1).masked_fill(empty, 0.0)
