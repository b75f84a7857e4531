"""The formulas that providers compute: one module per operator, and here what they share.

A formula works on (B, Hq, N, D) queries and (B, Hkv, M, D) keys and values; the queries are the last N positions.

    inputs(case)                {name: shape} of its tensors; those named q.. belong to queries, the others to keys
    rows                        names of further inputs, one float32 number for each query
    parameters                  names of further inputs, one number for each query head, whose value is a field of the case
    every_row                   whether its oracle needs all queries, as they are keys, too
    compared(clear, last)       mask over the columns, too, of what can be compared in rows that are clear and maybe the last
    columns(case)               width of its output
    precision(case)             dtype that its results are rounded to
    flops(case)                 (forward, backward) at the very least
    oracle(*inputs)             run in float64
    selection(*inputs)          mask of the pairs that count, and the (B, Hq, N) mask of the rows whose selection rounding
                                cannot change
    plain(*inputs, keep)        the textbook lines in float32: the yardstick for every error; keep is the mask of selection
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from nearfar.reference.pairwise import masked_softmax


@dataclass(frozen=True)
class Window:
    """The keys that a query sees: `left` before it and `right` after it, -1 for all."""

    left: int
    right: int

    def pairs(self, length):
        """Query-key pairs of one head."""
        back, ahead = (length - 1 if side < 0 else min(side, length - 1) for side in (self.left, self.right))
        return length * (back + ahead + 1) - back * (back + 1) // 2 - ahead * (ahead + 1) // 2

    def visible(self, num_queries, num_keys, device):
        distance = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - torch.arange(
            num_keys, device=device
        )
        return ((distance <= self.left) | (self.left < 0)) & ((-distance <= self.right) | (self.right < 0))


class Formula(Window):
    """What most formulas have in common: everything in the window counts, and the oracle is the plain lines."""

    rows: ClassVar = ()
    parameters: ClassVar = ()
    every_row: ClassVar = False

    def columns(self, case):
        return case.width

    def precision(self, case):
        return getattr(torch, case.dtype)

    def selection(self, *inputs):
        (q, *_), (*_, v) = inputs, inputs
        visible = self.visible(q.shape[2], v.shape[2], q.device)
        return visible, torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)

    def compared(self, clear, last):
        return clear[..., None]

    def oracle(self, *inputs):
        return self.plain(*inputs, keep=self.selection(*inputs)[0])


class PairFormula(Formula):
    """Attention with one q and one k, by pairs: two products forward, five backward."""

    def inputs(self, case):
        kv = case.batch, case.kv_heads, case.length, case.width
        return {"q": case.output_shape, "k": kv, "v": kv}

    def flops(self, case):
        product = 2 * case.batch * case.heads * case.width * self.pairs(case.length)
        return 2 * product, 5 * product


class Softmax(PairFormula):
    """Softmax of q.k / sqrt(D) over the window."""

    def plain(self, q, k, v, keep):
        return masked_softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, keep) @ v
