"""Selective synchronization attention's competitor: the paper's formula written down."""

import torch

from bench.formulas.synchronization import squared_distances
from nearfar.reference.synchronization import EPS

TINY = 1e-12  # under roots and fractions: their gradients at 0 would be infinite


def eager(formula):
    """The formula in the paper's own form, in float32 as its authors compute it: all N x N pairs in memory."""

    def run(omega, v, coupling, bandwidth, order):
        coupling, bandwidth, order = (p[:, None, None] for p in (coupling, bandwidth, order))
        delta = squared_distances(omega.float()).clamp(min=TINY).sqrt()
        similarity = (-bandwidth * delta.square()).exp()
        threshold = (coupling * order * similarity).clamp(min=TINY)
        ratio = delta / threshold
        locked = formula.visible(*delta.shape[-2:], omega.device) & (ratio <= 1)
        weights = torch.where(locked, similarity * (1 - ratio.square()).clamp(min=TINY).sqrt(), 0)
        return (weights / (weights.sum(-1, keepdim=True) + EPS)).to(v.dtype) @ v

    return run
