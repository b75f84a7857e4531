"""Affine-scaled and softmax attention: the cases of the performance page, and a sweep over length at a fixed token count."""

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import nearfar
from bench.baselines import SDPA, sdpa
from bench.baselines import affine as baselines
from bench.cases import OURS, BaseCase, Provider, lengths
from bench.formulas import Softmax
from bench.formulas.affine import Affine
from nearfar import registry

SOFTMAX = (*SDPA, "fa4")
COMPOSED = {f"{name}-epilogue": name for name in SOFTMAX}  # softmax attention, then the epilogue
PROVIDERS = (*OURS, *SOFTMAX, *COMPOSED)


@dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """affine: with alpha and beta; without, it is nearfar.softmax_attention."""

    causal: bool = True
    affine: bool = True

    linear_time: ClassVar = False

    @property
    def variant(self):
        return "causal" if self.causal else "full"

    @property
    def title(self):
        return f"{self.size}, {self.variant}"

    def formula(self, provider):
        kind = Affine if provider in COMPOSED or (provider in OURS and self.affine) else Softmax
        return kind(-1, 0 if self.causal else -1)

    def inputs(self, device, formula):
        """With betas of the size of N^-1/2, so that both terms of o are of one size and an error in either shows."""
        tensors = super().inputs(device, formula)
        if formula.rows:
            with torch.no_grad():
                tensors[-1].mul_(self.length**-0.5)
        return tensors

    def provider(self, name, inputs):
        if name in OURS:
            return self.ours(name, inputs)
        softmax = COMPOSED.get(name, name)
        fa4 = softmax == "fa4"
        run = baselines.flash_attention_4(self.causal) if fa4 else sdpa(softmax, self.causal)
        if name in COMPOSED:
            return Provider(f"{softmax} + compiled epilogue", baselines.composed(run, self.causal), token_major=fa4)
        return Provider(f"{softmax} softmax", run, token_major=fa4)

    def call(self, backend="auto"):
        return functools.partial(self.operator.function, causal=self.causal, backend=backend)

    def prepared(self, inputs):
        return self.operator.prepare(*inputs, causal=self.causal)

    @property
    def operator(self):
        return registry.find(nearfar.affine_attention if self.affine else nearfar.softmax_attention)


def suite(device):
    return gpu_suite() if device.type == "cuda" else cpu_suite()


def gpu_suite():
    softmax = ("sdpa-flash", "sdpa-cudnn", "fa4")
    composed = tuple(f"{name}-epilogue" for name in softmax)
    wide = Case(
        name="affine-causal", batch=4, heads=16, kv_heads=16, length=4096, width=128, dtype="bfloat16",
        providers=("nearfar", *composed, *softmax), goal_ms=(0.60, 2.0),
    )
    narrow = replace(wide, heads=32, kv_heads=32, width=64)
    plain = {"name": "softmax-causal", "affine": False, "goal_ms": None, "providers": ("nearfar", *softmax)}
    sweep = {"name": "affine-length", "goal_ms": None, "plotted": True}
    return [
        wide,
        narrow,
        *(replace(case, **plain) for case in (wide, narrow)),
        *(case for one in (wide, narrow) for case in swept(replace(one, **sweep), 1024, 65536, tokens=16384)),
    ]


def cpu_suite():
    sweep = Case(
        name="affine-length", batch=1, heads=4, kv_heads=4, length=256, width=64, dtype="float32", plotted=True,
        providers=("nearfar", "sdpa-epilogue", "sdpa"),
    )
    return swept(sweep, 256, 2048, tokens=2048)


def swept(sweep, first, last, tokens):
    """The sweep over lengths with `tokens` tokens a head in a batch, or one longer sequence.

    Every other length: the epilogue is compiled for each, which takes longer than to measure it.
    """
    return [replace(case, batch=max(1, tokens // case.length)) for case in lengths(sweep, first, last)[::2]]


def add_arguments(parser):
    parser.add_argument("--full", dest="causal", action="store_false", help="a query sees every key (default: causal)")
    parser.add_argument("--softmax", dest="affine", action="store_false", help="without alpha and beta")


def from_arguments(shape, args):
    batch, heads, length, width = shape
    gpu = torch.cuda.is_available()
    softmax = ("sdpa-flash", "sdpa-cudnn") if gpu else ("sdpa",)
    composed = tuple(f"{name}-epilogue" for name in softmax) if args.affine else ()
    return Case(
        name="affine-custom", batch=batch, heads=heads, kv_heads=args.kv_heads or heads, length=length, width=width,
        dtype=args.dtype or ("bfloat16" if gpu else "float32"), providers=args.providers or ("nearfar", *composed, *softmax),
        plotted=True, backward=args.backward, causal=args.causal, affine=args.affine,
    )
