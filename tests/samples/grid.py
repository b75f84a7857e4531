"""Which keys a query of a grid sees, pair by pair from the definitions: no code is shared with nearfar.localities."""

import functools
import itertools

import torch

import nearfar as nf


def cells(shape):
    return list(itertools.product(*map(range, shape)))


def steps(offset, dilation):
    """Cells along an axis from a query to a key, None where the dilation leaves the key out."""
    return None if offset % dilation else abs(offset // dilation)


def is_neighbor(locality, query, key):
    taken = [steps(k - q, d) for q, k, d in zip(query, key, locality.dilation, strict=True)]
    if None in taken:
        return False
    if locality.metric == "manhattan":
        return sum(taken) <= locality.radius[0]
    return all(step <= radius for step, radius in zip(taken, locality.radius, strict=True))


def label(shape, window, shift):
    """Of each cell along an axis: its window after Swin's cyclic shift, and the part of its mask, as Swin's code makes it."""
    rolled = [(cell - shift) % shape for cell in range(shape)]
    region = [0 if x < shape - window else 1 if x < shape - shift else 2 for x in rolled]
    return [(x // window, part) for x, part in zip(rolled, region, strict=True)]


def shares_window(locality, query, key):
    axes = zip(locality.shape, locality.window, locality.shift, query, key, strict=True)
    return all(label(n, w, s)[q] == label(n, w, s)[k] for n, w, s, q, k in axes)


@functools.cache
def mask(locality):
    """(N, N) mask of the pairs that a locality allows."""
    sees = is_neighbor if isinstance(locality, nf.GridNeighborhood) else shares_window
    places, count = cells(locality.shape), locality.num_tokens - len(cells(locality.shape))
    rows = [[sees(locality, q, k) for k in places] for q in places]
    found = torch.ones(locality.num_tokens, locality.num_tokens, dtype=torch.bool)
    found[count:, count:] = torch.tensor(rows)
    return found
