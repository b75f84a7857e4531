"""The order parameter of Kuramoto oscillators: r = mean over channels of |z|, z = mean over tokens of exp(i theta).

Causal, r_i takes the tokens up to i. Sums over tokens are taken by chunks of CHUNK tokens, and torch adds up the chunks; they
hold the cosines of all channels, then their sines.

    phase_sums        sums of exp(i theta) over each chunk
    prefix_order      causal: r of each token, from the sums before its chunk
    pull_sums         causal: sums of the pulls over each chunk
    grad_phases       dtheta

The pull of a token i is dr_i z_i / |z_i| by channel, over D times the number of tokens of its mean; 0 where z_i is. dtheta_j is
the sum of the pulls of the tokens whose mean has j in it, turned by a right angle against exp(i theta_j).
"""

import triton
import triton.language as tl

from .tiles import at, load_tile, load_vector, program_coordinates, store_tile

CHUNK: tl.constexpr = tl.constexpr(32)  # tokens


@triton.jit
def chunk_index(num_chunks, num_heads):
    """(chunk, head, batch, index of the chunk among those of all heads)."""
    chunk, head, batch = program_coordinates(num_chunks, num_heads)
    return chunk, head, batch, (batch.to(tl.int64) * num_heads + head) * num_chunks + chunk


@triton.jit
def load_phases(theta, strides, chunk, head, batch, num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, cosines, sines); 0 for rows beyond the last."""
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    angle = load_tile(at(theta, strides, batch, head), rows, strides[2], num_tokens, D, BLOCK_D).to(tl.float32)
    present = (rows < num_tokens)[:, None]
    return rows, tl.where(present, tl.cos(angle), 0.0), tl.where(present, tl.sin(angle), 0.0)


@triton.jit
def load_pair(sums, index, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The two (1, BLOCK_D) halves of a row of sums."""
    column = tl.arange(0, BLOCK_D)
    x = load_vector(sums + index * 2 * D, column, D, 0.0)
    y = load_vector(sums + index * 2 * D + D, column, D, 0.0)
    return x[None, :], y[None, :]


@triton.jit
def store_pair(sums, index, x, y, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    tl.store(sums + index * 2 * D + column, tl.sum(x, 0), mask=column < D)
    tl.store(sums + index * 2 * D + D + column, tl.sum(y, 0), mask=column < D)


@triton.jit
def prefix_means(before, index, rows, cosines, sines, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(x, y, |z|) of each token and channel of a chunk."""
    x, y = load_pair(before, index, D, BLOCK_D)
    count = (rows + 1).to(tl.float32)[:, None]
    x = (x + tl.cumsum(cosines, 0)) / count
    y = (y + tl.cumsum(sines, 0)) / count
    return x, y, tl.sqrt(x * x + y * y)


@triton.jit
def prefix_pulls(before, dr, index, rows, cosines, sines, num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(x, y) of the pulls of the tokens of a chunk."""
    x, y, length = prefix_means(before, index, rows, cosines, sines, D, BLOCK_D)
    row_dr = load_vector(dr, rows, num_tokens, 0.0) / ((rows + 1).to(tl.float32) * D)
    scale = tl.where(length == 0.0, 0.0, row_dr[:, None] / length)
    return x * scale, y * scale


@triton.jit
def phase_sums(theta, sums, strides, num_tokens, num_heads, num_chunks, D: tl.constexpr, BLOCK_D: tl.constexpr):
    chunk, head, batch, index = chunk_index(num_chunks, num_heads)
    _, cosines, sines = load_phases(theta, strides, chunk, head, batch, num_tokens, D, BLOCK_D)
    store_pair(sums, index, cosines, sines, D, BLOCK_D)


@triton.jit
def prefix_order(theta, before, r, strides, num_tokens, num_heads, num_chunks, D: tl.constexpr, BLOCK_D: tl.constexpr):
    chunk, head, batch, index = chunk_index(num_chunks, num_heads)
    rows, cosines, sines = load_phases(theta, strides, chunk, head, batch, num_tokens, D, BLOCK_D)
    _, _, length = prefix_means(before, index, rows, cosines, sines, D, BLOCK_D)
    length = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], length, 0.0)
    r += (batch.to(tl.int64) * num_heads + head) * num_tokens
    tl.store(r + rows, tl.sum(length, 1) / D, mask=rows < num_tokens)


@triton.jit
def pull_sums(theta, before, dr, sums, strides, num_tokens, num_heads, num_chunks, D: tl.constexpr, BLOCK_D: tl.constexpr):
    chunk, head, batch, index = chunk_index(num_chunks, num_heads)
    rows, cosines, sines = load_phases(theta, strides, chunk, head, batch, num_tokens, D, BLOCK_D)
    dr += (batch.to(tl.int64) * num_heads + head) * num_tokens
    x, y = prefix_pulls(before, dr, index, rows, cosines, sines, num_tokens, D, BLOCK_D)
    store_pair(sums, index, x, y, D, BLOCK_D)


@triton.jit
def grad_phases(
    theta, before, dr, pulls, dtheta, strides, dtheta_strides, num_tokens, num_heads, num_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """pulls: their sum over the later chunks, (B, H, chunks, 2, D); with before and dr None, over all tokens, (B, H, 2, D)."""
    chunk, head, batch, index = chunk_index(num_chunks, num_heads)
    rows, cosines, sines = load_phases(theta, strides, chunk, head, batch, num_tokens, D, BLOCK_D)
    if before is None:
        x, y = load_pair(pulls, batch.to(tl.int64) * num_heads + head, D, BLOCK_D)
    else:
        later_x, later_y = load_pair(pulls, index, D, BLOCK_D)
        dr += (batch.to(tl.int64) * num_heads + head) * num_tokens
        x, y = prefix_pulls(before, dr, index, rows, cosines, sines, num_tokens, D, BLOCK_D)
        x = later_x + tl.cumsum(x, 0, reverse=True)
        y = later_y + tl.cumsum(y, 0, reverse=True)
    gradient = y * cosines - x * sines
    store_tile(at(dtheta, dtheta_strides, batch, head), rows, dtheta_strides[2], num_tokens, gradient, D, BLOCK_D)
