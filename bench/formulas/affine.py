"""The formula of affine-scaled attention; that of softmax attention is in `bench/formulas/__init__.py`."""

from typing import ClassVar

from bench.formulas import PairFormula
from nearfar.reference.pairwise import masked_softmax


class Affine(PairFormula):
    """alpha_i times softmax attention plus beta_i times the sum of the values in the window. That sum needs no pairs."""

    rows: ClassVar = ("alpha", "beta")

    def selection(self, q, k, v, alpha, beta):
        return super().selection(q, k, v)

    def plain(self, q, k, v, alpha, beta, keep):
        u = masked_softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, keep) @ v
        c = keep.to(v.dtype) @ v
        return alpha.to(v.dtype)[..., None] * u + beta.to(v.dtype)[..., None] * c
