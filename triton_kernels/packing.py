"""Packed sequences: tables that kernels need, computed from cu_seqlens on the device.

Ends are valid that start at 0, never decrease and end at the number of tokens. Invalid ones, which nobody reads back here, put
tokens into other sequences or into none; whatever they are, everything stays inside the tensors.
"""

import functools

import torch
import triton
import triton.language as tl

from nearfar.runtime.tensors import empty

from .launch import Launch, LaunchParameters, cdiv

TOKENS, PIECES, SEQUENCES = 256, 64, 64  # tokens or pieces per program; sequences per step along cu_seqlens


@triton.jit
def fill_bounds(ends, target_ends, bounds, num_sequences, num_tokens, num_targets, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """bounds (3, num_tokens): begin and end of the targets of each token's sequence, and their end less that of its tokens.

    They are 0 outside of all sequences. ends, target_ends: the boundaries of as many sequences.
    """
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last_token = tl.full((BLOCK,), num_tokens + 1, tl.int32)
    begin = tl.full((BLOCK,), -1, tl.int32)
    end = tl.full((BLOCK,), num_targets + 1, tl.int32)
    for first in range(0, num_sequences + 1, STEP):
        index = first + tl.arange(0, STEP)
        there = index <= num_sequences
        found, target = tl.load(ends + index, there, other=0), tl.load(target_ends + index, there, other=0)
        before = there[None, :] & (found[None, :] <= tokens[:, None])
        after = there[None, :] & (found[None, :] > tokens[:, None])
        last_token = tl.minimum(last_token, tl.min(tl.where(after, found[None, :], num_tokens + 1), 1))
        begin = tl.maximum(begin, tl.max(tl.where(before, target[None, :], -1), 1))
        end = tl.minimum(end, tl.min(tl.where(after, target[None, :], num_targets + 1), 1))
    inside = (begin >= 0) & (end <= num_targets) & (last_token <= num_tokens)
    tl.store(bounds + tokens, tl.where(inside, begin, 0), tokens < num_tokens)
    tl.store(bounds + num_tokens + tokens, tl.where(inside, end, 0), tokens < num_tokens)
    tl.store(bounds + 2 * num_tokens + tokens, tl.where(inside, end - last_token, 0), tokens < num_tokens)


@triton.jit
def fill_pieces(
    ends, pieces, first_pieces, num_sequences, num_tokens, num_pieces, piece_length, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """Cut sequences into pieces, one by one.

    pieces (5, num_pieces): begin and end of each piece, its sequence, begin and end of that; those beyond the last are empty.
    first_pieces (num_sequences + 1,): the first piece of each sequence.
    """
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    writes = tl.program_id(0) == 0
    sequence = tl.zeros((BLOCK,), tl.int32)
    first = tl.zeros((BLOCK,), tl.int32)  # piece of that sequence
    total = 0
    for start in range(0, num_sequences, STEP):
        index = start + tl.arange(0, STEP)
        there = index < num_sequences
        begin = tl.minimum(tl.maximum(tl.load(ends + index, there, other=0), 0), num_tokens)
        end = tl.minimum(tl.maximum(tl.load(ends + index + 1, there, other=0), 0), num_tokens)
        counts = tl.where(there, (tl.maximum(end - begin, 0) + piece_length - 1) // piece_length, 0)
        after = tl.minimum(total + tl.cumsum(counts, 0), num_pieces)  # the first piece of the next sequence
        passed = there[None, :] & (after[None, :] <= piece[:, None])
        sequence += tl.sum(passed.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(passed, after[None, :], 0), 1))
        tl.store(first_pieces + index + 1, after, there & writes)
        total = tl.minimum(total + tl.sum(counts, 0), num_pieces)
    tl.store(first_pieces, 0, writes)
    beyond = sequence == num_sequences  # all of them
    sequence = tl.minimum(sequence, num_sequences - 1)
    begin = tl.minimum(tl.maximum(tl.load(ends + sequence), 0), num_tokens)
    end = tl.minimum(tl.maximum(tl.load(ends + sequence + 1), 0), num_tokens)
    piece_begin = tl.where(beyond, end, tl.minimum(begin + (piece - first) * piece_length, end))
    inside = piece < num_pieces
    tl.store(pieces + piece, piece_begin, inside)
    tl.store(pieces + num_pieces + piece, tl.minimum(piece_begin + piece_length, end), inside)
    tl.store(pieces + 2 * num_pieces + piece, sequence, inside)
    tl.store(pieces + 3 * num_pieces + piece, begin, inside)
    tl.store(pieces + 4 * num_pieces + piece, end, inside)


@functools.lru_cache(maxsize=1024)
def plan_bounds(num_sequences, num_tokens, num_targets):
    scalars = num_sequences, num_tokens, num_targets, TOKENS, SEQUENCES
    return Launch(fill_bounds, cdiv(num_tokens, TOKENS), scalars, LaunchParameters(None, None, 4, 1))


@functools.lru_cache(maxsize=1024)
def plan_pieces(num_sequences, num_tokens, num_pieces, piece_length):
    scalars = num_sequences, num_tokens, num_pieces, piece_length, PIECES, SEQUENCES
    return Launch(fill_pieces, cdiv(num_pieces, PIECES), scalars, LaunchParameters(None, None, 4, 1))


def bounds_launches(cu_seqlens, num_tokens, target_ends=None, num_targets=None):
    """(token_bounds, launches that fill them); (None, []) without packed sequences.

    target_ends, num_targets: what tokens see, if they do not see one another.
    """
    if cu_seqlens is None:
        return None, []
    if target_ends is None:
        target_ends, num_targets = cu_seqlens, num_tokens
    bounds = empty(cu_seqlens, (3, num_tokens), torch.int32)
    plan = plan_bounds(cu_seqlens.shape[0] - 1, num_tokens, num_targets)
    return bounds, [(plan, (cu_seqlens, target_ends, bounds))]


def piece_launches(cu_seqlens, num_tokens, num_pieces, piece_length):
    """(pieces, first_pieces, launches that fill them)."""
    if cu_seqlens is None:
        return None, None, []
    pieces = empty(cu_seqlens, (5, num_pieces), torch.int32)
    first_pieces = empty(cu_seqlens, cu_seqlens.shape)
    plan = plan_pieces(cu_seqlens.shape[0] - 1, num_tokens, num_pieces, piece_length)
    return pieces, first_pieces, [(plan, (cu_seqlens, pieces, first_pieces))]
