"""Krause attention's formula."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.formulas import PairFormula
from nearfar.reference.krause import krause_attention
from nearfar.reference.pairwise import masked_softmax, top_k_mask

# A selection is clear when its margin exceeds this many roundings of the terms of a float32 score.
CLEAR_ROUNDINGS = 8


@dataclass(frozen=True)
class Rbf(PairFormula):
    """Softmax of -|q - k|^2 / (2 sigma^2) over the window, or over its top_k."""

    top_k: int | None = None

    parameters: ClassVar = ("sigma",)

    def oracle(self, q, k, v, sigma):
        return krause_attention(q, k, v, sigma, self.left, self.right, self.top_k)

    def selection(self, q, k, v, sigma):
        visible, every_row = super().selection(q, k, v)
        if self.top_k is None or self.top_k >= k.shape[2]:
            return visible, every_row
        candidates = rbf_scores(q, k, sigma).masked_fill(~visible, float("-inf"))
        kept, dropped = candidates.topk(self.top_k + 1).values[..., -2:].unbind(-1)
        norms = k.norm(dim=-1).amax(-1)[..., None]
        terms = (q.norm(dim=-1) * norms + 0.5 * norms.square()) / sigma.square()[:, None]
        margin = torch.where(dropped == float("-inf"), float("inf"), kept - dropped)
        return top_k_mask(candidates, self.top_k), margin > CLEAR_ROUNDINGS * torch.finfo(torch.float32).eps * terms

    def plain(self, q, k, v, sigma, keep):
        return masked_softmax(rbf_scores(q, k, sigma.to(q.dtype)), keep) @ v


def rbf_scores(q, k, sigma):
    """-|q - k|^2 / (2 sigma^2) without its |q|^2, which cancels in the softmax; k broadcasts over the heads of q.

    sigma: one for each head (H,), or for each row of each head (H, N).
    """
    variance = sigma.square().reshape(sigma.shape[0], -1, 1)
    return (q @ k.transpose(-1, -2) - 0.5 * k.square().sum(-1)[..., None, :]) / variance
