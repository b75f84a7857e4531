"""Selective synchronization attention's formula."""

from dataclasses import dataclass
from typing import ClassVar

from bench.formulas import PairFormula
from nearfar.reference.synchronization import EPS


@dataclass(frozen=True)
class Synchronization(PairFormula):
    """Weights sqrt(max(0, J^2 - d^2 / (K r)^2)) over their sum. Queries are keys, so the oracle needs every row.

    clusters: groups of tokens of which none locks with another; the pairs between them are no work.
    """

    clusters: int = 1

    parameters: ClassVar = ("coupling", "bandwidth", "order")
    every_row: ClassVar = True

    def inputs(self, case):
        return {"omega": case.output_shape, "v": case.output_shape}

    def flops(self, case):
        forward, backward = super().flops(case)
        return forward // self.clusters, backward // self.clusters

    def selection(self, omega, v, *parameters):
        return super().selection(omega, v)

    def plain(self, omega, v, coupling, bandwidth, order, keep):
        """Parameters: one for each head (H,), or for each row of each head (H, N)."""
        coupling, bandwidth, order = (p.to(omega.dtype).reshape(p.shape[0], -1, 1) for p in (coupling, bandwidth, order))
        delta2 = squared_distances(omega)
        margin = (-2 * bandwidth * delta2).exp() - delta2 / (coupling * order).square()
        locked = keep & (margin > 0)
        weights = margin.where(locked, 1).sqrt().where(locked, 0)
        return weights @ v / (weights.sum(-1, keepdim=True) + EPS)


def squared_distances(omega):
    """|w_i - w_j|^2 of all pairs, exactly 0 on the diagonal."""
    squares = omega.square().sum(-1)
    delta2 = squares[..., :, None] + squares[..., None, :] - 2 * omega @ omega.transpose(-1, -2)
    delta2 = delta2.clamp(min=0)
    return delta2 - delta2.diagonal(dim1=-2, dim2=-1).diag_embed()
