"""States of linear and Hadamard attention: whether a call uses them, how many, and the length of the pieces of sequences."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from nearfar import _cuda
from nearfar.runtime.tensors import empty

# Cost of a multiply-add for a direct pair, relative to one through the state, forward and backward together. Measured on an
# H100 for one, two and three factors (docs/notes/linear.md).
DIRECT_COST = 2
# Cost of writing and reading one number of a state, in multiply-adds. It balances the direct pairs of a piece, which grow with
# its length, against its state, which is written and read once.
STATE_COST = 384

# Target number of programs of a launch: four per multiprocessor of an H100; one if programs walk with a state on chip.
PROGRAMS = 528
WALK_PROGRAMS = 128
# Warps that fill a GPU in the CUDA kernels of bidirectional attention: eight per multiprocessor. A block has 1 per 16 columns.
FULL_WARPS = 1056
WALK_WIDTH = 128
TILE_OF_STATE = 16384  # elements of a state that one program accumulates
# If the float32 states of causal attention take more bytes than this, pieces become twice as long. That costs about a seventh
# more time (docs/notes/linear.md) and keeps a million tokens of 16 x 16 features within 1.5 times their own memory.
LARGE_STATES = 2**30


def causal_piece_length(widths: Sequence[int], value_width: int) -> int:
    """Tokens between two states of causal attention: a power of two that depends on the widths, not on the length."""
    balanced = STATE_COST * math.prod(widths) * value_width / (sum(widths) + value_width)
    return 2 ** min(12, max(7, round(math.log2(balanced) / 2)))


def walks(widths: Sequence[int], value_width: int, backend: str) -> bool:
    """Whether one program can hold the whole state on chip."""
    if len(widths) > 1:
        return backend == "cuda" and (tuple(widths), value_width) == _cuda.HADAMARD_CAUSAL_WIDTHS
    return max(widths[0], value_width) <= WALK_WIDTH


def piece_length_of(qs: Sequence[torch.Tensor], v: torch.Tensor, causal: bool, backend: str) -> int:
    """Tokens of the pieces that sequences are split into."""
    widths, value_width = tuple(q.shape[3] for q in qs), v.shape[3]
    if causal and not walks(widths, value_width, backend):
        length = causal_piece_length(widths, value_width)
        states = v.shape[0] * v.shape[1] * v.shape[2] // length * math.prod(widths) * (value_width + 1) * 4
        return 2 * length if states > LARGE_STATES else length
    if causal:
        # Every piece except the first costs a pass over the keys, so use no more pieces than fill the GPU.
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
    """Number of pieces into which the CUDA kernels of bidirectional attention split a sequence.

    It minimises a model of the time of a launch: full waves of blocks, plus writing and reading a float32 state for each piece,
    relative to reading two 16-bit tensors.
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
    """Whether a call uses states. with_state: there is an initial state, or the final one is returned."""
    widths, num_queries = [q.shape[3] for q in qs], qs[0].shape[2]
    if with_state:
        return True
    if causal:
        # Only the device knows the lengths of packed sequences; one of them may be as long as all together.
        return num_queries > piece_length_of(qs, v, causal, backend)
    return not prefers_direct(widths, v.shape[3], num_queries, v.shape[2])


def num_states(qs: Sequence[torch.Tensor], v: torch.Tensor, cu_seqlens: torch.Tensor | None, causal: bool, backend: str) -> int:
    """Number of states of one head that are saved for the rows that read them."""
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
    # States from which a walk continues stay float32; others are rounded, as operands of products.
    half = v.dtype == torch.bfloat16 and not walks(widths, value_width, backend)
    states = empty(v, (*shape, value_width), torch.bfloat16 if half else torch.float32)
    return states, empty(v, shape, torch.float32)
