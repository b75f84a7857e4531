"""Which tokens may lock: blocks of tokens whose frequencies are too far apart contribute exactly nothing, and are skipped.

Tokens i and j lock when exp(-2 alpha d^2) > c_i d^2, with d their distance and c_i = 1 / (K r_i)^2: when d is below the lock
radius, the root of d exp(alpha d^2) = K r_i. A cell of CELL tokens has a centre and a radius; the tokens of two cells are at
least |centre - centre'| - radius - radius' apart.

    survey        |w|^2 of each token, the extent of each cell; of queries, c_i of each token and the lock radius of each cell
    neighbours    for each tile of tokens, the cells of the other side that may lock with it, in order

The tests are safe against rounding: what they skip has a weight of 0 in the arithmetic of the attention kernels, too.
"""

import triton
import triton.language as tl

from .tiles import at, load_tile, load_vector, program_coordinates

CELL: tl.constexpr = tl.constexpr(64)  # tokens per cell
CELLS_AT_ONCE: tl.constexpr = tl.constexpr(32)
NEWTON_STEPS: tl.constexpr = tl.constexpr(6)  # relative error 1e-5 from 1e-30 to 1e37
# Upper bound of c, so that c |w_i - w_j|^2 stays finite. At the bound, tokens lock only with themselves.
LARGEST_C: tl.constexpr = tl.constexpr(1e24)
ORDER_ROUNDING: tl.constexpr = tl.constexpr(1e-3)  # an order may exceed 1 by this much
# Extent of a cell: its radius, the largest |w|^2, the squared lock radius.
EXTENT: tl.constexpr = tl.constexpr(3)
# Distances of centres and radii are right to 2^-12 of themselves; squared distances by products to 2^-17 of |w|^2 + |w'|^2.
DISTANCE_ROUNDING: tl.constexpr = tl.constexpr(2.0**-12)
PRODUCT_ROUNDING: tl.constexpr = tl.constexpr(2.0**-17)


@triton.jit
def lock_radius_squared(alpha, c):
    """The root x of exp(-2 alpha x) = c x: W(2 alpha / c) / (2 alpha), by Newton steps on u + log(u) = log(2 alpha / c).

    NaN, which skips nothing, where that is NaN or infinite.
    """
    z = 2.0 * alpha / c
    u = z / (1.0 + tl.log(1.0 + z))
    for _ in tl.static_range(NEWTON_STEPS):
        u = u * (1.0 + tl.log(z) - tl.log(u)) / (1.0 + u)
    return u / (2.0 * alpha)


@triton.jit
def squares_of(tile):
    """|w|^2 of each row, of 16-bit tokens from the product that gives w . w', too.

    Tensor cores cut sums off, so products of tokens with a common part lack 1e-7 of themselves. In |w|^2 + |w'|^2 - 2 w . w'
    that cancels if the squares lack it as well; else all distances are too long, and pairs at the lock boundary are lost.
    """
    if tile.dtype == tl.float32:
        return tl.sum(tile * tile, 1)
    else:
        row = tl.arange(0, tile.shape[0])
        return tl.sum(tl.where(row[:, None] == row[None, :], tl.dot(tile, tl.trans(tile)), 0.0), 1)


@triton.jit
def survey(
    w, coupling, bandwidth, order, squares, c, centres, extents,
    w_strides, coupling_stride, bandwidth_stride, num_tokens, num_heads, num_cells,
    ORDER_PER_TOKEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """c None: the tokens are keys, which have no lock radius of their own.

    Parameters on the GPU are not checked on the host, so one out of its range makes every c of its tokens NaN.
    """
    cell, head, batch = program_coordinates(num_cells, num_heads)
    index = batch.to(tl.int64) * num_heads + head
    rows = cell * CELL + tl.arange(0, CELL)
    tile = load_tile(at(w, w_strides, batch, head), rows, w_strides[2], num_tokens, D, BLOCK_D)
    row_squares = squares_of(tile)
    tile = tile.to(tl.float32)
    tl.store(squares + index * num_tokens + rows, row_squares, mask=rows < num_tokens)
    centre = tl.sum(tile, 0) / tl.minimum(num_tokens - cell * CELL, CELL)
    away = tl.where((rows < num_tokens)[:, None], tile - centre[None, :], 0.0)
    column = tl.arange(0, BLOCK_D)
    tl.store(centres + (index * num_cells + cell) * D + column, centre, mask=column < D)
    extents += (index * num_cells + cell) * EXTENT
    tl.store(extents, tl.sqrt(tl.max(tl.sum(away * away, 1), 0)))
    tl.store(extents + 1, tl.max(row_squares, 0))
    if c is not None:
        K = tl.load(coupling + head * coupling_stride)
        alpha = tl.load(bandwidth + head * bandwidth_stride)
        if ORDER_PER_TOKEN:
            r = load_vector(order + index * num_tokens, rows, num_tokens, 1.0)
        else:
            r = tl.zeros((CELL,), tl.float32) + tl.load(order + index)
        good = (r >= 0) & (r <= 1.0 + ORDER_ROUNDING)
        row_c = tl.minimum(tl.div_rn(1.0, K * K * r * r), LARGEST_C)
        row_c = tl.where(good, row_c, float("nan")) + tl.where((K > 0) & (alpha > 0), 0.0, float("nan"))
        tl.store(c + index * num_tokens + rows, row_c, mask=rows < num_tokens)
        # The widest radius is that of the smallest c. tl.min drops NaN, which must be preserved.
        smallest = tl.min(tl.where(row_c == row_c, row_c, 0.0), 0)
        tl.store(extents + 2, lock_radius_squared(alpha, smallest))


@triton.jit
def neighbours(
    centres, extents, other_centres, other_extents, lists, counts,
    num_tokens, num_cells, num_others, num_heads, own_group, other_group, num_tiles, offset,
    QUERIES: tl.constexpr, CAUSAL: tl.constexpr, CELLS: tl.constexpr, MEMBERS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """lists (B, Hq, tiles, num_others), counts (B, Hq, tiles); a tile has CELLS cells. QUERIES: tiles are of queries.

    MEMBERS: from this bit on an entry of a list has one for each cell of the tile, whether that cell meets the other; None: no.
    """
    tile, head, batch = program_coordinates(num_tiles, num_heads)
    own = batch.to(tl.int64) * (num_heads // own_group) + head // own_group
    other = batch.to(tl.int64) * (num_heads // other_group) + head // other_group
    centres += own * num_cells * D
    extents += own * num_cells * EXTENT
    other_centres += other * num_others * D
    other_extents += other * num_others * EXTENT
    index = (batch.to(tl.int64) * num_heads + head) * num_tiles + tile
    column = tl.arange(0, BLOCK_D)
    count = 0
    for first in range(0, num_others, CELLS_AT_ONCE):
        others = first + tl.arange(0, CELLS_AT_ONCE)
        present = others < num_others
        other_tile = load_tile(other_centres, others, D, num_others, D, BLOCK_D)
        other_radius = tl.load(other_extents + others * EXTENT, mask=present, other=0.0)
        other_square = tl.load(other_extents + others * EXTENT + 1, mask=present, other=0.0)
        keep = tl.zeros((CELLS_AT_ONCE,), tl.int32)
        for member in tl.static_range(CELLS):
            cell = tl.minimum(tile * CELLS + member, num_cells - 1)
            centre = tl.load(centres + cell * D + column, mask=column < D, other=0.0)
            radius = tl.load(extents + cell * EXTENT)
            square = tl.load(extents + cell * EXTENT + 1)
            if QUERIES:
                lock_squared = tl.load(extents + cell * EXTENT + 2) + tl.zeros_like(other_radius)
            else:
                lock_squared = tl.load(other_extents + others * EXTENT + 2, mask=present, other=0.0)
            away = other_tile - centre[None, :]
            distance = tl.sqrt(tl.sum(away * away, 1))
            gap = distance * (1.0 - DISTANCE_ROUNDING) - (radius + other_radius) * (1.0 + DISTANCE_ROUNDING)
            limit = lock_squared * (1.0 + 4 * DISTANCE_ROUNDING) + PRODUCT_ROUNDING * (square + other_square)
            # Written so that NaN skips nothing.
            meets = ((gap > 0) & (gap * gap > limit)) == 0
            if CAUSAL and QUERIES:
                meets &= others * CELL <= tl.minimum(cell * CELL + CELL, num_tokens) - 1 + offset
            elif CAUSAL:
                meets &= cell * CELL <= others * CELL + CELL - 1 + offset
            meets &= present & (tile * CELLS + member < num_cells)
            keep |= meets.to(tl.int32) << member
        kept = (keep != 0).to(tl.int32)
        place = count + tl.cumsum(kept, 0) - 1
        entries = others if MEMBERS is None else others | keep << MEMBERS
        tl.store(lists + index * num_others + place, entries, mask=kept != 0)
        count += tl.sum(kept, 0)
    tl.store(counts + index, count)
    tl.store(lists + index * num_others, 0, mask=count == 0)  # a walk loads its first cell before it checks the count
