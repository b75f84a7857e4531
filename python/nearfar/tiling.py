"""Tiling of a GridNeighborhood for kernels: boxes of cells, walks over halos, linear forms of offsets, selection words."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from nearfar.localities import GridNeighborhood

Axes = tuple[int, int, int]

WORD = 32  # bits per word of a saved selection
FIELDS = 31  # bits of a code; sums of codes stay positive in an int32
BLOCKS = (16, 32, 64)  # possible tokens per tile
MAX_GLOBALS = 16  # most global tokens: they fit in one tile of any size
MIN_SELECTED_LINE = 16  # fewest cells in a line of keys: shorter lines take more words
MAX_SELECTED_RADIUS = 15  # along the last axis: a line of cells in sight fits a word
SELECT_BLOCK = 64  # keys per tile of the selecting kernel
RESIDENT_SCORES = 16384  # scores of a query tile that fit in the registers of eight warps
RESIDENT_COLUMNS = 256  # most scores per query in the kernel that selects and attends, which unrolls its key tiles
MAX_COLUMNS = 2048  # most scores per query; with these the smallest query tile spills half of them


class Geometry(NamedTuple):
    """A GridNeighborhood with three axes, axes of one cell first. manhattan: its radius, None for Chebyshev distances."""

    shape: Axes
    radius: Axes
    dilation: Axes
    manhattan: int | None
    num_globals: int

    @property
    def cells(self) -> Axes:
        """Cells of the largest residue class along each axis."""
        t, h, w = (-(-size // step) for size, step in zip(self.shape, self.dilation, strict=True))
        return t, h, w

    @property
    def words(self) -> tuple[int, int]:
        """Selection words of a cell (one per line in sight) and of a global query. The last word is for global keys."""
        (t, h, w), (reach_t, reach_h, _) = self.shape, self.radius
        has_globals = int(self.num_globals > 0)
        return (2 * reach_t + 1) * (2 * reach_h + 1) + has_globals, t * h * -(-w // WORD) + 1

    @property
    def words_per_head(self) -> int:
        """Selection words of all queries of a head."""
        of_cell, of_global = self.words
        return self.num_globals * of_global + math.prod(self.shape) * of_cell


class Tiles(NamedTuple):
    """Query tiles (boxes of cells) and the key tiles of a walk (lines of cells), or with the roles exchanged."""

    box: Axes
    key_h: int
    key_w: int

    def boxes(self, geometry: Geometry) -> Axes:
        """Number of boxes along each axis, in all residue classes."""
        axes = zip(geometry.cells, self.box, geometry.dilation, strict=True)
        t, h, w = (-(-cells // size) * step for cells, size, step in axes)
        return t, h, w

    def steps(self, geometry: Geometry) -> int:
        """Number of key tiles in the longest walk over the halo of a box."""
        return self.steps_over(halo(geometry, self.box))

    def steps_over(self, cells: Axes) -> int:
        t, h, w = cells
        return t * -(-h // self.key_h) * -(-w // self.key_w)


class Selection(NamedTuple):
    """Tiles of the selecting kernel, and the number of score tiles that a query tile holds, a power of two."""

    tiles: Tiles
    slots: int

    @property
    def columns(self) -> int:
        """Scores of a query."""
        return self.slots * self.tiles.key_h * self.tiles.key_w


@functools.lru_cache(maxsize=1024)
def geometry_of(locality: GridNeighborhood) -> Geometry:
    """The Geometry of a locality. Radii are clipped to the axes."""
    axes = [axis for axis in zip(locality.shape, locality.radii, locality.dilations, strict=True) if axis[0] > 1]
    t, h, w = [(1, 0, 1)] * (3 - len(axes)) + [(n, min(r, -(-n // d) - 1), d) for n, r, d in axes]
    manhattan = locality.radii[0] if locality.metric == "manhattan" else None
    return Geometry((t[0], h[0], w[0]), (t[1], h[1], w[1]), (t[2], h[2], w[2]), manhattan, locality.global_tokens)


def halo(geometry: Geometry, box: Axes) -> Axes:
    """The largest number of cells along each axis that a box sees."""
    axes = zip(box, geometry.radius, geometry.cells, strict=True)
    t, h, w = (min(size + 2 * reach, cells) for size, reach, cells in axes)
    return t, h, w


@functools.lru_cache(maxsize=1024)
def choose_tiles(geometry: Geometry, block_m: int, block_n: int, selects: bool) -> Tiles | None:
    """The Tiles with the fewest total steps; None if no codes fit. selects: require that a line of cells fits a word."""

    def cost(tiles: Tiles) -> tuple[int, ...]:
        return math.prod(tiles.boxes(geometry)) * tiles.steps(geometry), tiles.key_h, -tiles.box[2], -tiles.box[1]

    every = [x for x in _all_tiles(block_m, block_n) if forms(geometry, x)]
    if selects:
        every = [x for x in every if x.box[2] <= WORD and MIN_SELECTED_LINE <= x.key_w <= WORD]
    return min(every, key=cost, default=None)


@functools.lru_cache(maxsize=1024)
def choose_selection(geometry: Geometry) -> Selection:
    """The Selection for cells, with the largest query tile whose scores fit in registers.

    A key tile has whole lines of the halo, so it has the order of the keys, and no two tiles share a word.
    """

    def selection(tiles: Tiles) -> Selection:
        return Selection(tiles, _power_of_two(tiles.steps(geometry) + (geometry.num_globals > 0)))

    def cost(found: Selection) -> tuple[int, ...]:
        return math.prod(found.tiles.boxes(geometry)) * found.slots, -found.tiles.box[2], -found.tiles.box[1]

    for block_m in (32, 16):
        every = [tiles for tiles in _all_tiles(block_m, SELECT_BLOCK) if MIN_SELECTED_LINE <= tiles.key_w <= WORD]
        best = min([selection(x) for x in every if halo(geometry, x.box)[2] <= x.key_w], key=cost)
        if block_m * best.columns <= RESIDENT_SCORES:
            break
    return best


def choose_global_selection(geometry: Geometry) -> Selection:
    """The Selection for the global queries, which walk over the whole grid."""
    tiles = _global_tiles(geometry)
    return Selection(tiles, _power_of_two(tiles.steps_over(geometry.shape) + 1))


@functools.lru_cache(maxsize=1024)
def choose_resident(geometry: Geometry) -> tuple[tuple[Tiles, int], ...] | None:
    """(Tiles, steps of the longest walk) of the cells and, if there are any, of the global queries, for the resident kernel.

    That kernel keeps all scores in registers, and selects and attends in one launch. None if walks are too long for it.
    """
    every = [tiles for tiles in _all_tiles(SELECT_BLOCK, SELECT_BLOCK) if MIN_SELECTED_LINE <= tiles.key_w <= WORD]
    every = [x for x in every if halo(geometry, x.box)[2] <= x.key_w and forms(geometry, x)]
    if not every:
        return None
    best = min(every, key=lambda x: (math.prod(x.boxes(geometry)) * x.steps(geometry), -x.box[2], -x.box[1]))
    found = [(best, best.steps(geometry))]
    if geometry.num_globals:
        tiles = _global_tiles(geometry)
        found.append((tiles, tiles.steps_over(geometry.shape)))
    return tuple(found) if max(steps * tiles.key_h * tiles.key_w for tiles, steps in found) <= RESIDENT_COLUMNS else None


def _global_tiles(geometry: Geometry) -> Tiles:
    width = geometry.shape[2]
    key_w = WORD if width > MIN_SELECTED_LINE else MIN_SELECTED_LINE
    return Tiles((1, 1, MAX_GLOBALS), SELECT_BLOCK // key_w if width <= WORD else 1, key_w)


@functools.lru_cache(maxsize=1024)
def forms(geometry: Geometry, tiles: Tiles) -> tuple[int, int, int, int, int] | None:
    """(code of a step along T, along H and along W, bias, guards) for `triton_kernels.grid.sees`; None if they do not fit.

    A cell is seen if every linear form of its offset is within a radius. For Chebyshev distances the forms are the axes, each
    with its own radius. For Manhattan distances they are the sums over axes with all choices of signs, one of each pair of
    opposites. Forms that can never exceed their radius are omitted.
    """
    if geometry.manhattan is None:
        signs = [[int(axis == own) for axis in range(3)] for own in range(3)]
        radii = list(geometry.radius)
    else:
        every = itertools.product(*[(1, -1) if cells > 1 else (0,) for cells in geometry.cells])
        signs = [list(form) for form in every if next((sign for sign in form if sign), 0) > 0]
        radii = [geometry.manhattan] * len(signs)
    # Includes lanes that are not cells: a tile may begin at the last line of the halo.
    ends = zip(tiles.box, geometry.radius, (1, tiles.key_h, tiles.key_w), strict=True)
    farthest = [size + reach + key - 2 for size, reach, key in ends]
    codes, bias, guards, shift = [0, 0, 0], 0, 0, 0
    for form, radius in zip(signs, radii, strict=True):
        if radius >= sum(abs(sign) * (cells - 1) for sign, cells in zip(form, geometry.cells, strict=True)):
            continue
        width = (sum(abs(sign) * far for sign, far in zip(form, farthest, strict=True)) + radius).bit_length()
        codes = [code + (sign << shift) for code, sign in zip(codes, form, strict=True)]
        bias, guards = bias + ((radius + (1 << width)) << shift), guards | 1 << shift + width
        shift += width + 1
    return (codes[0], codes[1], codes[2], bias, guards) if shift <= FIELDS else None


@functools.lru_cache(maxsize=1024)
def reason(locality: GridNeighborhood, selects: bool) -> str | None:
    """Why kernels cannot serve a locality, or None. selects: whether there is a top_k."""
    geometry = geometry_of(locality)
    if geometry.num_globals > MAX_GLOBALS:
        return f"locality has {geometry.num_globals} global tokens; kernels take at most {MAX_GLOBALS}"
    if selects:
        if geometry.radius[2] > MAX_SELECTED_RADIUS:
            return (
                f"top_k with a radius of {geometry.radius[2]} along the last axis; kernels take at most {MAX_SELECTED_RADIUS}"
            )
        if geometry.num_globals and max(geometry.dilation) > 1:
            return "top_k with both global tokens and a dilation; kernels take one of them"
        columns = choose_selection(geometry).columns
        if geometry.num_globals:
            columns = max(columns, choose_global_selection(geometry).columns)
        if columns > MAX_COLUMNS:
            return f"top_k among {columns} keys that a tile of queries sees; kernels take at most {MAX_COLUMNS}"
    fit = all(choose_tiles(geometry, m, n, selects) for m, n in itertools.product(BLOCKS, repeat=2))
    if selects:
        fit &= all(forms(geometry, x.tiles) for x in (choose_selection(geometry), choose_global_selection(geometry)))
    if not fit:
        return f"the radius {locality.radius} does not fit the {FIELDS} bits in which kernels compare offsets"
    return None


def _all_tiles(block_m: int, block_n: int) -> Iterator[Tiles]:
    for box_h, box_w in itertools.product(_powers(block_m), repeat=2):
        if box_h * box_w <= block_m:
            for key_w in _powers(block_n):
                yield Tiles((block_m // (box_h * box_w), box_h, box_w), block_n // key_w, key_w)


def _powers(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length())]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
