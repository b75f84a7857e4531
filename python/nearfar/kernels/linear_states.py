"""States of linear and Hadamard attention: where a call keeps them, and how long the pieces are that sequences are cut into."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from nearfar import _cuda

# A multiply-add of a pair computed directly takes as long as two of those that go through the state, forward and backward
# together, as measured on an H100 for one, two and three factors (docs/notes/linear.md).
DIRECT_COST = 2
# Bytes that pass through memory while a multiprocessor does one multiply-add, times the bytes of a state on its way: they
# balance the direct pairs of a piece, which grow with its length, against its state, which is written and read once.
STATE_COST = 384

# Programs that a pass is cut into where it can be: four for each multiprocessor of an H100, and one where a state walks along.
PROGRAMS = 528
WALK_PROGRAMS = 128
# Warps that the CUDA kernels of bidirectional attention need: eight for each multiprocessor. A block has one for 16 columns.
FULL_WARPS = 1056
WALK_WIDTH = 128
TILE_OF_STATE = 16384  # elements of a state that one program accumulates
# Bytes of the states of causal attention in float32 beyond which there is one for twice as many tokens: that takes about a
# seventh more time (docs/notes/linear.md), and a million tokens of 16 x 16 features stay within 1.5 times their own memory.
LARGE_STATES = 2**30


def causal_piece_length(widths: Sequence[int], value_width: int) -> int:
    """Tokens between two states of causal attention; a power of two, by shapes that do not change with the length."""
    balanced = STATE_COST * math.prod(widths) * value_width / (sum(widths) + value_width)
    return 2 ** min(12, max(7, round(math.log2(balanced) / 2)))


def walks(widths: Sequence[int], value_width: int, backend: str) -> bool:
    """Whether one program holds the whole state on chip."""
    if len(widths) > 1:
        return backend == "cuda" and (tuple(widths), value_width) == _cuda.HADAMARD_CAUSAL_WIDTHS
    return max(widths[0], value_width) <= WALK_WIDTH


def piece_length_of(qs: Sequence[torch.Tensor], v: torch.Tensor, causal: bool, backend: str) -> int:
    """Tokens of the pieces that sequences are cut into."""
    widths, value_width = tuple(q.shape[3] for q in qs), v.shape[3]
    if causal and not walks(widths, value_width, backend):
        length = causal_piece_length(widths, value_width)
        states = v.shape[0] * v.shape[1] * v.shape[2] // length * math.prod(widths) * (value_width + 1) * 4
        return 2 * length if states > LARGE_STATES else length
    if causal:
        # Every piece but the first costs a pass over the keys, so there are no more than fill the GPU.
        pieces = WALK_PROGRAMS // max(1, qs[0].shape[0] * qs[0].shape[1])
    elif backend == "cuda":
        pieces = full_pieces(max(1, v.shape[0] * v.shape[1]), max(1, qs[0].shape[2], v.shape[2]), value_width)
    else:
        tiles = max(1, math.prod(widths) * value_width // TILE_OF_STATE)
        pieces = math.ceil(PROGRAMS / max(1, v.shape[0] * v.shape[1] * tiles))
    length = max(qs[0].shape[2], v.shape[2])
    step = 128 * max(1, pieces)  # a piece holds whole tiles of every kernel
    return max(256, (length + step - 1) // step * 128)


def full_pieces(heads: int, length: int, width: int) -> int:
    """Into how many pieces the CUDA kernels of bidirectional attention cut a sequence.

    The time of a pass is that of full rounds of blocks, and that of writing and reading a float32 state for each piece beside
    two 16-bit tensors.
    """
    blocks = FULL_WARPS * 16 // width

    def cost(pieces: int) -> float:
        return math.ceil(heads * pieces / blocks) * blocks / (heads * pieces) + 2 * pieces * width / length

    return min(range(1, 2 + 4 * blocks // heads), key=cost)


def prefers_direct(widths: Sequence[int], value_width: int, num_queries: int, num_keys: int) -> bool:
    """Whether bidirectional attention costs less pair by pair than through the state."""
    pairs = num_queries * num_keys * (sum(widths) + value_width)
    return DIRECT_COST * pairs <= (num_queries + num_keys) * math.prod(widths) * value_width


def uses_states(qs: Sequence[torch.Tensor], v: torch.Tensor, causal: bool, with_state: bool, backend: str) -> bool:
    """Whether a call goes through states at all. with_state: one comes in or is asked for."""
    widths, num_queries = [q.shape[3] for q in qs], qs[0].shape[2]
    if with_state:
        return True
    if causal:
        # Packed sequences are known to the device only; any of them may be as long as all of them together.
        return num_queries > piece_length_of(qs, v, causal, backend)
    return not prefers_direct(widths, v.shape[3], num_queries, v.shape[2])


def num_states(qs: Sequence[torch.Tensor], v: torch.Tensor, cu_seqlens: torch.Tensor | None, causal: bool, backend: str) -> int:
    """States of one head that are kept for the rows that read them."""
    if not causal:
        return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    length, num_tokens = piece_length_of(qs, v, causal, backend), v.shape[2]
    if cu_seqlens is None:
        return (num_tokens + length - 1) // length
    return num_tokens // length + cu_seqlens.shape[0] - 1


def empty_states(qs: Sequence[torch.Tensor], v: torch.Tensor, count: Any, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Buffers for `count` saved states of each head and for their normalisers."""
    widths, value_width = [q.shape[3] for q in qs], v.shape[3]
    shape = (*v.shape[:2], count, math.prod(widths))
    # A state that is walked on with stays float32; others are rounded as operands of products.
    half = v.dtype == torch.bfloat16 and not walks(widths, value_width, backend)
    states = v.new_empty((*shape, value_width), dtype=torch.bfloat16 if half else torch.float32)
    return states, v.new_empty(shape, dtype=torch.float32)
