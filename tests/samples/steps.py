"""Sample calls of the steps that decode a token, by name of their function."""

from typing import NamedTuple

import torch
from harness import DEVICE, randn

import nearfar as nf
from samples import krause, linear


class StepSample(NamedTuple):
    """One step: q, k and v of its token, the tensors of its memory, which it writes to, and its other arguments, by name."""

    tensors: dict
    memory: dict
    options: dict


def make(step, dtype=torch.float32, device=DEVICE, batch=2, tokens=5):
    """A step after `tokens` tokens."""
    name = step.function.__name__
    if name == "krause_attention_step":
        sample = krause_sample(dtype, device, batch, tokens + 1)
        q, k, v, sigma = sample.tensors.values()
        cache = nf.KrauseCache.after(k[:, :, :-1], v[:, :, :-1], sample.options["locality"].left + 1)
        token = {n: t[:, :, -1:].contiguous() for n, t in (("q", q), ("k", k), ("v", v))}
        return StepSample(token, cache._asdict(), {"sigma": sigma, "top_k": sample.options["top_k"]})
    widths = (16,) if name == "linear_attention_step" else (8, 16)
    tensors = linear.random_tensors(widths, 16, (batch, 4, 1), (batch, 2, 1), dtype, device, numbered=len(widths) > 1)
    return StepSample(tensors, {"state": linear.random_state((batch, 2, *widths, 17), dtype, device)}, {})


def krause_sample(dtype, device, batch, length, window=4, top_k=3):
    tensors = {
        "q": randn(batch, 4, length, 16, dtype=dtype, seed=1, device=device),
        "k": randn(batch, 2, length, 16, dtype=dtype, seed=2, device=device),
        "v": randn(batch, 2, length, 16, dtype=dtype, seed=3, device=device),
        "sigma": torch.linspace(2, 4, 4, device=device, dtype=torch.promote_types(dtype, torch.float32)),
    }
    return krause.Sample(tensors, {"locality": nf.SlidingWindow(window - 1), "top_k": top_k})


def clone(sample):
    return sample._replace(memory={name: tensor.clone() for name, tensor in sample.memory.items()})


def call(step, sample, **keywords):
    """The output; the memory of the sample is updated."""
    tensors, keywords = dict(sample.tensors), {**sample.options, **keywords}
    if "cache" == step.memory:
        return step.function(**tensors, cache=nf.KrauseCache(**sample.memory), **keywords)
    if "q" not in tensors:
        qs, ks = ([tensors.pop(name) for name in linear.factor_names(tensors, letter)] for letter in "qk")
        return step.function(qs, ks, **tensors, **sample.memory, **keywords)
    return step.function(**tensors, **sample.memory, **keywords)


