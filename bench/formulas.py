"""What the providers compute. Tensors are (B, Hq, N, D) and (B, Hkv, M, D); the queries are the last N positions.

    pairs(length)                       query-key pairs of one head
    oracle(q, k, v, sigma)              nearfar's reference, or a formula as plain, run in float64
    selection(q, k, sigma)              the (B, Hq, N, M) mask of the pairs that count, and the (B, Hq, N) mask of the
                                        rows whose selection rounding cannot change
    plain(q, k, v, sigma, keep)         the textbook lines in the dtype of the inputs: the yardstick for every error
"""

from dataclasses import dataclass

import torch

from nearfar.reference.krause import krause_attention
from nearfar.reference.pairwise import masked_softmax, top_k_mask

# A selection is clear when its margin exceeds this many roundings of the terms of a float32 score.
CLEAR_ROUNDINGS = 8


@dataclass(frozen=True)
class Window:
    left: int
    right: int

    def pairs(self, length):
        back, ahead = (length - 1 if side < 0 else min(side, length - 1) for side in (self.left, self.right))
        return length * (back + ahead + 1) - back * (back + 1) // 2 - ahead * (ahead + 1) // 2

    def visible(self, num_queries, num_keys, device):
        distance = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - torch.arange(
            num_keys, device=device
        )
        return ((distance <= self.left) | (self.left < 0)) & ((-distance <= self.right) | (self.right < 0))


@dataclass(frozen=True)
class Rbf(Window):
    """Softmax of -|q - k|^2 / (2 sigma^2) over the window, or over its top_k."""

    top_k: int | None = None

    def oracle(self, q, k, v, sigma):
        return krause_attention(q, k, v, sigma, self.left, self.right, self.top_k)

    def selection(self, q, k, sigma):
        visible = self.visible(q.shape[2], k.shape[2], q.device)
        scores = rbf_scores(q, k, sigma)
        if self.top_k is None or self.top_k >= k.shape[2]:
            return visible.expand(scores.shape), torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
        candidates = scores.masked_fill(~visible, float("-inf"))
        kept, dropped = candidates.topk(self.top_k + 1).values[..., -2:].unbind(-1)
        norms = k.norm(dim=-1).amax(-1)[..., None]
        terms = (q.norm(dim=-1) * norms + 0.5 * norms.square()) / sigma.square()[:, None]
        margin = torch.where(dropped == float("-inf"), float("inf"), kept - dropped)
        return top_k_mask(candidates, self.top_k), margin > CLEAR_ROUNDINGS * torch.finfo(torch.float32).eps * terms

    def plain(self, q, k, v, sigma, keep):
        return masked_softmax(rbf_scores(q, k, sigma.to(q.dtype)), keep) @ v


@dataclass(frozen=True)
class Softmax(Window):
    """Softmax of q.k / sqrt(D) over the window."""

    def oracle(self, q, k, v, sigma):
        return self.plain(q, k, v, sigma, self.visible(q.shape[2], k.shape[2], q.device))

    def selection(self, q, k, sigma):
        visible = self.visible(q.shape[2], k.shape[2], q.device)
        return visible, torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)

    def plain(self, q, k, v, sigma, keep):
        return masked_softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, keep) @ v


def rbf_scores(q, k, sigma):
    """-|q - k|^2 / (2 sigma^2) without its |q|^2, which cancels in the softmax; k broadcasts over the heads of q.

    sigma: one for each head (H,), or for each row of each head (H, N).
    """
    variance = sigma.square().reshape(sigma.shape[0], -1, 1)
    return (q @ k.transpose(-1, -2) - 0.5 * k.square().sum(-1)[..., None, :]) / variance
