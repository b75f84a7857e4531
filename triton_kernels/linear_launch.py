"""Launchers of the kernels of linear and Hadamard attention: geometry, tile sizes and grids."""

import functools
import math
from typing import NamedTuple

import torch

from . import linear_tiles, linear_walk
from .launch import Launch, LaunchParameters, cdiv, dot_precision, launch_parameters, power_of_2, width_block
from .linear import FEATURE_MAPS, step

__all__ = [
    "Problem", "operand_precision",
    "plan_accumulate", "plan_combine", "plan_grad", "plan_read", "plan_step", "plan_walk",
]

PIECES_AT_ONCE = 8
STEP_TILE = 4096  # elements of the state in one tile of a decoding program


class Problem(NamedTuple):
    """Everything that determines the launches of a call, except strides and addresses."""

    batch: int
    query_heads: int
    key_heads: int
    num_queries: int
    num_keys: int
    widths: tuple
    value_width: int
    dtype: torch.dtype
    feature_map: str
    causal: bool
    walks: bool
    piece_length: int
    num_sequences: int  # 0 when nothing is packed
    precision: str

    @property
    def outer(self):
        """Number of features of the factors before the last."""
        return math.prod(self.widths[:-1])

    @property
    def num_features(self):
        return math.prod(self.widths)

    @property
    def divisors(self):
        """For each factor before the last, the divisor of the flat feature index. Later factors vary faster."""
        return tuple(math.prod(self.widths[r + 1 : -1]) for r in range(len(self.widths) - 1))

    @property
    def blocks(self):
        return tuple(width_block(width) for width in self.widths)

    @property
    def value_block(self):
        return width_block(self.value_width)

    @property
    def operand(self):
        """The function that rounds operands of products."""
        if self.dtype == torch.bfloat16:
            return linear_tiles.to_bfloat16
        return linear_tiles.to_tf32 if self.precision == "tf32" else linear_tiles.to_float32

    def tuned(self, kernel):
        """Launch parameters: kernels that pair tokens directly are causal or not, states have one factor or several."""
        if kernel == "accumulate":
            kernel += "_one" if len(self.widths) == 1 else ""
        elif self.causal:
            kernel += "_causal"
        widest = max(*self.blocks, self.value_block)
        return launch_parameters(kernel, widest, 2 if self.dtype == torch.bfloat16 else 4)

    def num_pieces(self, length):
        """Number of pieces of `length` tokens; with packed sequences, an upper bound."""
        if self.num_sequences:
            return length // self.piece_length + self.num_sequences
        return cdiv(length, self.piece_length)

    def row_tiles(self, length, block_m):
        if self.num_sequences:
            return self.num_pieces(length) * (self.piece_length // block_m)
        return cdiv(length, block_m)

    @property
    def num_states(self):
        """Number of states of one head that rows may read."""
        if self.causal:
            return self.num_pieces(self.num_keys)
        return self.num_sequences or 1

    @property
    def spans(self):
        """Number and length of the pieces of causal attention."""
        return self.num_pieces(self.num_keys), self.piece_length

    def math(self):
        return FEATURE_MAPS[self.feature_map][0], self.operand, self.precision


def operand_precision(dtype):
    """float16 enters products as tf32, which has the same precision and enough range for sums of features."""
    return "tf32" if dtype == torch.float16 else dot_precision(dtype)


@functools.lru_cache(maxsize=1024)
def plan_accumulate(problem, of_queries, x_strides, y_strides):
    parameters = problem.tuned("accumulate")
    inner = min(problem.blocks[-1], parameters.block_m if problem.outer == 1 else 64)
    outer = min(power_of_2(problem.outer), max(1, parameters.block_m // inner), 16)
    tiles = cdiv(problem.outer, outer) * cdiv(problem.widths[-1], inner)
    length = problem.num_queries if of_queries else problem.num_keys
    group = problem.query_heads // problem.key_heads if of_queries else 1
    pieces = problem.num_pieces(length)
    scalars = (
        x_strides, y_strides, length, problem.key_heads, group, tiles, pieces, problem.piece_length,
        *problem.math(), problem.widths, problem.divisors, problem.outer, problem.value_width,
        parameters.block_n, outer, inner, problem.value_block,
    )
    programs = tiles * pieces * problem.key_heads * problem.batch
    return Launch(linear_tiles.accumulate, programs, scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_combine(problem, pieces, backwards):
    block = max(1, 1024 // problem.value_block)
    sequences = problem.num_sequences or problem.batch
    scalars = (
        problem.key_heads, pieces, sequences, problem.causal, backwards,
        problem.num_features, problem.value_width, PIECES_AT_ONCE, block, problem.value_block,
    )
    programs = cdiv(problem.num_features, block) * problem.key_heads * sequences
    return Launch(linear_tiles.combine, programs, scalars, LaunchParameters(None, None, 4, 1))


@functools.lru_cache(maxsize=1024)
def plan_read(problem, of_keys, direct, x_strides, c_strides, y_strides, out_strides, eps):
    parameters = problem.tuned("read")
    rows, columns, row_heads, column_heads = sides(problem, of_keys)
    tiles = problem.row_tiles(rows, parameters.block_m)
    scalars = (
        x_strides, c_strides, y_strides, out_strides,
        rows, columns, row_heads, column_heads, tiles, problem.num_pieces(rows), problem.num_states, problem.piece_length, eps,
        *problem.math(), problem.causal, of_keys, direct,
        problem.widths, problem.blocks, problem.divisors, problem.outer, problem.value_width,
        parameters.block_m, parameters.block_n, min(64, max(16, power_of_2(problem.outer))),
        min(problem.blocks[-1], 64), problem.value_block,
    )
    return Launch(linear_tiles.read, tiles * row_heads * problem.batch, scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_grad(problem, of_keys, direct, x_strides, row_strides, c_strides, column_strides, dx_strides):
    parameters = problem.tuned("grad")
    rows, columns, row_heads, column_heads = sides(problem, of_keys)
    tiles = problem.row_tiles(rows, parameters.block_m)
    feature, operand, precision = problem.math()
    scalars = (
        x_strides, row_strides, c_strides, column_strides, dx_strides,
        rows, columns, row_heads, column_heads, tiles, problem.num_pieces(rows), problem.num_states, problem.piece_length,
        feature, FEATURE_MAPS[problem.feature_map][1], operand, precision, problem.causal, of_keys, direct,
        problem.widths, problem.blocks, problem.divisors, problem.outer, problem.value_width,
        parameters.block_m, parameters.block_n, min(problem.value_block, 128), problem.value_block,
    )
    return Launch(linear_tiles.grad, tiles * row_heads * problem.batch, scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_walk(problem, kernel, strides, eps=()):
    """walk_read, walk_grad_queries or walk_grad_keys. eps: (eps,) for walk_read."""
    parameters = problem.tuned(kernel)
    if parameters.num_warps == 8 and min(problem.blocks[0], problem.value_block) < 64:
        # Eight warps on a product 32 wide made an illegal access on an H100 (Triton 3.6, docs/notes/linear.md).
        parameters = parameters._replace(block_m=min(64, parameters.block_m), num_warps=4)
    of_keys = kernel == "walk_grad_keys"
    length, _, heads, _ = sides(problem, of_keys)
    feature, operand, precision = problem.math()
    maps = (feature,) if kernel == "walk_read" else (feature, FEATURE_MAPS[problem.feature_map][1])
    pieces = problem.num_pieces(length)
    scalars = (
        *strides, length, heads, problem.query_heads // problem.key_heads, pieces, problem.num_states,
        problem.piece_length, *eps, *maps, operand, precision, problem.causal,
        problem.widths[0], problem.value_width, parameters.block_m, problem.blocks[0], problem.value_block,
    )
    return Launch(getattr(linear_walk, kernel), pieces * heads * problem.batch, scalars, parameters)


def sides(problem, of_keys):
    """(rows, columns, heads of rows, heads of columns)."""
    queries, keys = problem.num_queries, problem.num_keys
    if of_keys:
        return keys, queries, problem.key_heads, problem.query_heads
    return queries, keys, problem.query_heads, problem.key_heads


@functools.lru_cache(maxsize=1024)
def plan_step(batch, key_heads, group, widths, value_width, feature_map, normalize, eps, strides):
    features, state_block = math.prod(widths), power_of_2(value_width + 1)
    divisors = tuple(math.prod(widths[r + 1 :]) for r in range(len(widths)))
    group_block = power_of_2(group)
    block = min(power_of_2(features), max(1, STEP_TILE // (state_block * group_block)))
    scalars = (
        *strides, key_heads, group, eps, FEATURE_MAPS[feature_map][0], normalize, widths, divisors, features, value_width,
        group_block, block, state_block,
    )
    return Launch(step, batch * key_heads, scalars, LaunchParameters(None, None, 4, 1))
