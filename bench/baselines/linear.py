"""Linear attention's competitors: the formula written down, eager or compiled, and flash-linear-attention (fla)."""

import functools
import importlib

import torch

from bench.baselines import static
from bench.formulas.linear import FEATURE_MAPS, similarity, split

CHUNK = 128  # tokens that the causal form takes at once


def plain(formula):
    """The factored form as one would write it down: features in memory, two products; by chunks where it is causal.

    In float16 the sums of long sequences overflow, which the check notices.
    """
    form = causal if formula.right == 0 else bidirectional

    def run(*inputs):
        qs, ks, v = split(inputs)
        group = qs[0].shape[1] // v.shape[1]
        *ks, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (*ks, v))
        o, total = form(formula.mapped(qs), formula.mapped(ks), v)
        return o / (total + formula.eps) if formula.normalize else o

    return run


def bidirectional(qs, ks, v):
    """(o, total): what is to be divided and by what, from mapped factors."""
    q, k = face_split(qs), face_split(ks)
    return q @ (k.transpose(-1, -2) @ v), q @ k.sum(-2)[..., None]


def causal(qs, ks, v):
    length = v.shape[2]
    chunk = min(CHUNK, length)
    if length % chunk:
        raise ValueError(f"the causal form takes chunks of {chunk} tokens, got {length} tokens")
    qs, ks = ([factor.unflatten(2, (-1, chunk)) for factor in factors] for factors in (qs, ks))
    q, k, v = face_split(qs), face_split(ks), v.unflatten(2, (-1, chunk))
    weights = similarity(qs, ks).tril()
    o = weights @ v + q @ before(k.transpose(-1, -2) @ v)
    total = weights.sum(-1, keepdim=True) + q @ before(k.sum(-2)[..., None])
    return o.flatten(2, 3), total.flatten(2, 3)


def before(states):
    """Sum over earlier chunks, in float32 as any use of bfloat16 would need on long sequences."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return (wide.cumsum(2) - wide).to(states.dtype)


def face_split(factors):
    """The outer product of the factors of each token: (.., d_1), (.., d_2) -> (.., d_1 d_2)."""
    return functools.reduce(lambda a, b: (a[..., :, None] * b[..., None, :]).flatten(-2), factors)


def fla(name, formula, compiled=static):
    """fla's `name`_linear_attn, causal. It takes (B, N, H, D) and no feature map: that is a compiled call of its own."""
    attention = getattr(importlib.import_module("fla.ops.linear_attn"), f"{name}_linear_attn")
    if len(formula.factors) > 1 or formula.right != 0:
        raise ValueError("fla has causal linear attention with one factor")
    mapped = compiled(FEATURE_MAPS[formula.feature_map]) if formula.feature_map != "identity" else FEATURE_MAPS["identity"]

    def run(q, k, v):
        if q.shape[1] != k.shape[1]:
            raise ValueError("fla's linear attention needs a key head for each query head")
        q, k, v = (t.transpose(1, 2) for t in (mapped(q), mapped(k), v))
        o, _ = attention(q, k, v, scale=1.0, normalize=formula.normalize)
        return o.transpose(1, 2)

    return run
