"""The formulas of the streamed diagnostics. Their outputs are stacked, (B, Hq, N, columns), so that rows can be compared.

Statistics are float32 whatever the inputs, and so is their plain formula, the yardstick of the errors.
"""

from dataclasses import dataclass

import torch

from bench.formulas import Formula
from nearfar.reference.pairwise import top_k_mask

CLEAR = 0.02  # what an s in half precision may move of precision and recall in the rows that are compared


class Streamed(Formula):
    def scores(self, q, k):
        """Of softmax attention, in float32 or wider; -inf where a query does not see a key."""
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~self.visible(q.shape[2], k.shape[2], q.device), float("-inf"))

    def products(self, case, count):
        return count * 2 * case.batch * case.heads * case.width * self.pairs(case.length), 0


class Statistics(Streamed):
    """lse, entropy and largest weight of the queries, and, if causal, the mass of the keys in their places.

    The last queries are all that send the last keys any, so that their mass can be compared without the other queries; the mass
    of earlier keys cannot.
    """

    def columns(self, case=None):
        return 4 if self.right == 0 else 3

    def compared(self, clear, last):
        columns = torch.ones(self.columns(), dtype=torch.bool, device=clear.device)
        if self.right == 0:
            columns[-1] = last
        return clear[..., None] & columns

    def precision(self, case):
        return torch.float32

    def inputs(self, case):
        return {"q": case.output_shape, "k": (case.batch, case.kv_heads, case.length, case.width)}

    def flops(self, case):
        """Two products of queries and keys: the masses need the sums over all keys."""
        return self.products(case, 2)

    def plain(self, q, k, keep):
        scores = self.scores(q, k)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        found = [lse, torch.special.entr(weights).sum(-1), weights.amax(-1)]
        return torch.stack([*found, *([weights.sum(-2)[..., -q.shape[2] :]] if self.right == 0 else [])], -1)


@dataclass(frozen=True)
class Geometry(Streamed):
    """Precision, recall and F of the top_n keys, by D^2 - |s|^2, whose order is that of D; dtype: of the inputs, to which the
    kernels and the plain formula round s."""

    top_n: int
    dtype: str

    def columns(self, case):
        return 3

    def inputs(self, case):
        kv = case.batch, case.kv_heads, case.length, case.width
        return {"q": case.output_shape, "k": kv, "v": kv}

    def flops(self, case):
        """Two products of queries and keys, as all keys come after those selected, and one with the values."""
        return self.products(case, 3)

    def oracle(self, q, k, v):
        keep, _ = self.selection(q, k, v)
        weights, s, values = self.parts(q, k, v, keep)
        return separation(excess(weights, s, values), weights > 0, keep)

    def plain(self, q, k, v, keep):
        """In the dtype of the inputs, too: its roundings are what CLEAR lets through."""
        dtype = getattr(torch, self.dtype)
        weights, s, values = self.parts(q, k, v, keep)
        return separation(excess(weights, s.to(dtype).to(s.dtype), values), weights > 0, keep).to(dtype)

    def selection(self, q, k, v):
        """keep: the selected keys. Clear: rows where no rounding of s moves precision or recall by more than CLEAR."""
        scores = self.scores(q, k)
        keep = top_k_mask(scores, self.top_n)
        ordered = scores.topk(min(self.top_n + 1, scores.shape[-1])).values
        clear = torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
        if ordered.shape[-1] > self.top_n:
            clear = ordered[..., -2] - ordered[..., -1] > 1e-5 * (1 + ordered[..., -2].abs())
        weights, s, values = self.parts(q, k, v, keep)
        exact, eps = excess(weights, s, values), torch.finfo(getattr(torch, self.dtype)).eps
        error = eps * weights * (s.abs() @ values.abs().mT) * torch.where(keep, 1, -1)
        bounds = [separation(exact + sign * error, weights > 0, keep) for sign in (-1, 1)]
        return keep, clear & ((bounds[0] - bounds[1]).abs() <= CLEAR).all(-1)

    def parts(self, q, k, v, keep):
        weights = self.scores(q, k).softmax(-1)
        values = v.to(weights.dtype)
        return weights, (weights * keep) @ values, values


def excess(weights, s, values):
    """D^2 - |s|^2"""
    return weights.square() * values.square().sum(-1)[..., None, :] - 2 * weights * (s @ values.mT)


def separation(squares, visible, keep):
    """(precision, recall, F) in the last dimension."""
    outside, count = visible & ~keep, keep.sum(-1)
    farthest = squares.masked_fill(~keep, float("-inf")).amax(-1, keepdim=True)
    nearest = squares.masked_fill(~outside, float("inf")).amin(-1, keepdim=True)
    precision = count / (count + (outside & (squares <= farthest)).sum(-1)).to(squares.dtype)
    recall = (keep & ((squares < nearest) | (nearest == float("inf")))).sum(-1) / count.to(squares.dtype)
    return torch.stack((precision, recall, 2 * precision * recall / (precision + recall)), -1)
