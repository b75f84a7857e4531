"""Hadamard linear attention's formula, of which linear attention is the one-factor case."""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.formulas import Formula

FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softplus": F.softplus,
    "exp": torch.exp,
}


@dataclass(frozen=True)
class Hadamard(Formula):
    """o_i = sum_j A_ij v_j / (sum_j A_ij + eps) with A_ij the product over factors of phi(q_i).phi(k_j).

    Inputs: the factors of q, those of k, then v. factors: their widths. The window is everything, or everything before.
    """

    factors: tuple[int, ...]
    feature_map: str = "elu"
    normalize: bool = True
    eps: float = 1e-6

    def inputs(self, case):
        names = [str(r) for r in range(1, len(self.factors) + 1)] if len(self.factors) > 1 else [""]
        queries = {f"q{n}": (case.batch, case.heads, case.length, d) for n, d in zip(names, self.factors, strict=True)}
        keys = {f"k{n}": (case.batch, case.kv_heads, case.length, d) for n, d in zip(names, self.factors, strict=True)}
        return queries | keys | {"v": (case.batch, case.kv_heads, case.length, case.width)}

    def flops(self, case):
        """Of the factored or of the direct form, whichever needs fewer.

        Factored: every token is added to the state and read out of it, prod(d_r) x (Dv + 1) each; backward the same for the
        gradient of the state, of the features of q, of those of k, and of v. (The recurrence: chunks of a causal form cost
        more.) Direct: similarities of width sum(d_r) and values of width Dv + 1 for each pair; backward the similarities
        again and their gradients in q and k, the gradient of the weights and that of v.
        """
        similarities, values = sum(self.factors), case.width + self.normalize
        step = 2 * case.batch * case.length * (case.heads + case.kv_heads) * math.prod(self.factors) * values
        pairs = 2 * case.batch * case.heads * self.pairs(case.length)
        return (
            min(step, pairs * (similarities + values)),
            min(2 * step, pairs * (3 * similarities + 2 * values)),
        )

    def plain(self, *inputs, keep):
        qs, ks, v = split(inputs)
        weights = similarity(self.mapped(qs), self.mapped(ks)).masked_fill(~keep, 0)
        o = weights @ v
        if self.normalize:  # summed in float32: the sum of a long sequence is beyond float16
            o = o / (weights.sum(-1, keepdim=True, dtype=torch.promote_types(v.dtype, torch.float32)) + self.eps)
        return o.to(v.dtype)

    def mapped(self, factors):
        return [FEATURE_MAPS[self.feature_map](factor) for factor in factors]


def split(inputs):
    """(qs, ks, v) of the inputs."""
    count = len(inputs) // 2
    return inputs[:count], inputs[count:-1], inputs[-1]


def similarity(qs, ks):
    """The product over factors of q.k for all pairs."""
    return functools.reduce(torch.mul, [q @ k.transpose(-1, -2) for q, k in zip(qs, ks, strict=True)])
