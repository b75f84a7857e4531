"""Affine-scaled attention's competitors: a softmax kernel followed by the epilogue alpha * o + beta * cumsum(v)."""

import importlib

import torch

from bench.baselines import static


def composed(attention, causal, compiled=static):
    """The epilogue as one would write it down after `attention`, compiled as a call of its own."""
    finish = compiled(causal_epilogue if causal else full_epilogue)

    def run(q, k, v, alpha, beta):
        return finish(attention(q, k, v), v, alpha, beta)

    return run


def causal_epilogue(o, v, alpha, beta):
    return scale_and_shift(o, v.cumsum(2, dtype=wide(v)), alpha, beta)


def full_epilogue(o, v, alpha, beta):
    return scale_and_shift(o, v.sum(2, keepdim=True, dtype=wide(v)), alpha, beta)


def wide(v):
    """Sums are float32, as autocast makes them too: bfloat16 has no digits left for them."""
    return torch.promote_types(v.dtype, torch.float32)


def scale_and_shift(o, sums, alpha, beta):
    group = o.shape[1] // sums.shape[1]
    sums = sums.repeat_interleave(group, 1) if group > 1 else sums
    return (alpha[..., None] * o + beta[..., None] * sums).to(o.dtype)


def flash_attention_4(causal):
    """FlashAttention-4 (the package flash-attn-4), which takes (B, N, H, D)."""
    attention = importlib.import_module("flash_attn.cute").flash_attn_func

    def run(q, k, v):
        result = attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal)
        o = result[0] if isinstance(result, tuple) else result  # some versions return lse too
        return o.transpose(1, 2)

    return run
