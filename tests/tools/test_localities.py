"""Localities against their definitions, written out pair by pair; and what they refuse."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from samples.grid import cells, mask

import nearfar as nf
from nearfar.localities import check_length

NEIGHBORHOODS = [
    nf.GridNeighborhood((5, 4), 1),
    nf.GridNeighborhood((5, 4), (2, 0), global_tokens=2),
    nf.GridNeighborhood((4, 7), 2, "manhattan"),
    nf.GridNeighborhood((1, 6), 1, "manhattan", global_tokens=1),
    nf.GridNeighborhood((7, 5), (1, 2), dilation=(2, 3)),
    nf.GridNeighborhood((3, 4, 5), (1, 1, 2), global_tokens=1),
    nf.GridNeighborhood((4, 3, 3), 2, "manhattan"),
    nf.GridNeighborhood((5, 1, 4), 9, dilation=2),
    nf.GridNeighborhood((4, 7), 2, "manhattan", dilation=2),
]
WINDOWS = [
    nf.ShiftedWindow((8, 6), (4, 3)),
    nf.ShiftedWindow((8, 8), 4, 2),
    nf.ShiftedWindow((4, 6), (4, 2), (1, 0)),
    nf.ShiftedWindow((2, 4, 6), (1, 2, 3), (0, 1, 2)),
]
each_grid = pytest.mark.parametrize("locality", NEIGHBORHOODS + WINDOWS, ids=str)


def mask_of(locality):
    position = torch.arange(locality.num_tokens)
    return locality.visible(position[:, None], position[None, :])


@each_grid
def test_a_grid_is_visible_as_defined(locality):
    expected = mask(locality)
    assert torch.equal(mask_of(locality), expected)
    assert expected.diagonal().all() and torch.equal(expected, expected.T)
    assert not expected.all()


@each_grid
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_span_of_some_queries_holds_all_they_see(locality, rows):
    seen = mask(locality)[locality.global_tokens :, locality.global_tokens :]
    for first in range(0, len(seen), rows):
        last = min(first + rows, len(seen))
        begin, end = locality.key_span(first, last)
        assert 0 <= begin <= first and last <= end <= len(seen)
        assert not seen[first:last, :begin].any() and not seen[first:last, end:].any()


def test_a_span_is_no_longer_than_its_neighborhood():
    begin, end = nf.GridNeighborhood((64, 64), 2).key_span(1024, 1088)
    assert end - begin <= 64 + 2 * (2 * 64 + 2)
    assert nf.ShiftedWindow((64, 64), 4, 2).key_span(1024, 1088) == (14 * 64, 18 * 64)


@pytest.mark.parametrize("left, right", [(2, 0), (-1, 1), (3, -1), (-1, -1)])
def test_a_window_is_visible_as_defined(left, right):
    position = torch.arange(9)
    seen = nf.SlidingWindow(left, right).visible(position[:, None], position[None, :])
    for q, k in itertools.product(range(9), range(9)):
        assert seen[q, k] == ((left == -1 or q - k <= left) and (right == -1 or k - q <= right))


@pytest.mark.parametrize("locality", WINDOWS, ids=str)
def test_the_table_has_an_entry_for_each_offset(locality):
    """Pairs that see each other share an entry exactly if their offsets agree; entries go by the offset, row-major."""
    position, places = torch.arange(locality.num_tokens), cells(locality.shape)
    index = locality.bias_index(position[:, None], position[None, :])
    offsets = list(itertools.product(*[range(1 - w, w) for w in locality.window]))
    assert locality.bias_size == len(offsets)
    for q, k in mask(locality).nonzero().tolist():
        offset = tuple(a - b for a, b in zip(places[q], places[k], strict=True))
        assert offsets[index[q, k]] == offset


def test_a_mask_of_flex_attention():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    locality = NEIGHBORHOODS[5]
    size = locality.num_tokens
    made = flex.create_mask(lambda b, h, q, k: locality.visible(q, k), 1, 1, size, size, device="cpu")
    assert torch.equal(made[0, 0], mask(locality))


@each_grid
def test_localities_are_values(locality):
    again = type(locality)(**{name: getattr(locality, name) for name in locality.__dataclass_fields__})
    assert again == locality and hash(again) == hash(locality)
    assert copy.deepcopy(locality) == pickle.loads(pickle.dumps(locality)) == locality
    buffer = io.BytesIO()
    torch.save(locality, buffer)
    buffer.seek(0)
    assert torch.load(buffer) == locality


def test_one_number_is_that_of_every_axis():
    assert nf.GridNeighborhood((4, 4, 4), 1) == nf.GridNeighborhood([4, 4, 4], (1, 1, 1), dilation=[1, 1, 1])
    assert nf.ShiftedWindow((4, 4), 2, 1) == nf.ShiftedWindow((4, 4), (2, 2), (1, 1))


BAD = {
    "shape must be (H, W) or (T, H, W)": lambda: nf.GridNeighborhood((4,), 1),
    "shape must be (H, W) or (T, H, W), got 16": lambda: nf.GridNeighborhood(16, 1),
    "shape must be 1 or more": lambda: nf.GridNeighborhood((4, 0), 1),
    "radius must be 0 or more": lambda: nf.GridNeighborhood((4, 4), -1),
    "radius must have whole numbers": lambda: nf.GridNeighborhood((4, 4), 1.5),
    "radius must be an int or one for each axis": lambda: nf.GridNeighborhood((4, 4), (1, 1, 1)),
    "radius must have whole numbers, got True": lambda: nf.GridNeighborhood((4, 4), True),
    "dilation must be 1 or more": lambda: nf.GridNeighborhood((4, 4), 1, dilation=(1, 0)),
    "dilation must have whole numbers": lambda: nf.GridNeighborhood((4, 4), 1, dilation=2.0),
    "global_tokens must be 0 or more": lambda: nf.GridNeighborhood((4, 4), 1, global_tokens=-1),
    "global_tokens must be an int": lambda: nf.GridNeighborhood((4, 4), 1, global_tokens=1.0),
    'metric must be "chebyshev" or "manhattan"': lambda: nf.GridNeighborhood((4, 4), 1, "euclidean"),
    "manhattan distances take one radius": lambda: nf.GridNeighborhood((4, 4), (1, 2), "manhattan"),
    "shift must be below the window": lambda: nf.ShiftedWindow((4, 4), 2, 2),
    "shift must be 0 or more": lambda: nf.ShiftedWindow((4, 4), 2, -1),
    "shift must have whole numbers": lambda: nf.ShiftedWindow((4, 4), 2, 0.5),
    "window must be 1 or more": lambda: nf.ShiftedWindow((4, 4), 0),
    "shape must be a multiple of the window": lambda: nf.ShiftedWindow((4, 6), 4),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused(message):
    with pytest.raises((TypeError, ValueError)) as error:
        BAD[message]()
    assert message in str(error.value)


def test_a_grid_that_is_not_the_sequence_is_refused():
    locality = nf.GridNeighborhood((4, 4), 1, global_tokens=1)
    check_length(locality, 17, 17)
    for lengths, name in (((16, 17), "q"), ((17, 16), "k")):
        with pytest.raises(ValueError, match=rf"16 cells and 1 global tokens, so {name} must have 17 tokens, got 16"):
            check_length(locality, *lengths)
