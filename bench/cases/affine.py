"""Affine-scaled and softmax attention, windows included, beside FlashAttention, cuDNN and FlexAttention."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

import nearfar
from bench.baselines import SDPA, sdpa
from bench.baselines import affine as baselines
from bench.baselines.krause import flex
from bench.cases import OURS, BaseCase, Provider
from bench.formulas import Softmax
from bench.formulas.affine import Affine
from nearfar import registry

SOFTMAX = (*SDPA, "fa4")
COMPOSED = {f"{name}-epilogue": name for name in SOFTMAX}  # softmax attention, then the epilogue
FLEX = "flex-softmax"
PROVIDERS = (*OURS, *SOFTMAX, *COMPOSED, FLEX)


@dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """affine: with alpha and beta; without, it is nearfar.softmax_attention. left: keys of its window before a query, -1 for
    all, which SDPA and FlashAttention-4 always see here."""

    causal: bool = True
    affine: bool = True
    left: int = -1

    linear_time: ClassVar = False

    @property
    def variant(self):
        return ("causal" if self.causal else "full") + (f", window {self.left + 1}" if self.left >= 0 else "")

    @property
    def title(self):
        return f"{self.size}, {self.variant}"

    def formula(self, provider):
        kind = Affine if provider in COMPOSED or (provider in OURS and self.affine) else Softmax
        windowed = provider in OURS or provider == FLEX
        return kind(self.left if windowed else -1, 0 if self.causal else -1)

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
        if name == FLEX:
            return Provider(name, flex(self.formula(name), self.length, inputs[0].device))
        if name in COMPOSED and self.left >= 0:
            raise ValueError("the epilogue sums all values before a query and has no window")
        softmax = COMPOSED.get(name, name)
        fa4 = softmax == "fa4"
        run = baselines.flash_attention_4(self.causal) if fa4 else sdpa(softmax, self.causal)
        if name in COMPOSED:
            return Provider(f"{softmax} + compiled epilogue", baselines.composed(run, self.causal), token_major=fa4)
        return Provider(f"{softmax} softmax", run, token_major=fa4)

    def call(self, backend="auto"):
        return functools.partial(self.operator.function, **self.keywords(), backend=backend)

    def prepared(self, inputs):
        return self.operator.prepare(*inputs, **self.keywords())

    def keywords(self):
        return {"causal": self.causal, "window_size": (self.left, -1)}

    @property
    def operator(self):
        return registry.find(nearfar.affine_attention if self.affine else nearfar.softmax_attention)


def add_arguments(parser):
    parser.add_argument("--full", dest="causal", action="store_false", help="a query sees every key (default: causal)")
    parser.add_argument("--left", type=int, default=-1, help="keys of the window before a query (default: -1, all of them)")
    parser.add_argument("--softmax", dest="affine", action="store_false", help="without alpha and beta")


def from_arguments(shape, args):
    batch, heads, length, width = shape
    gpu = torch.cuda.is_available()
    softmax = ("sdpa-flash", "sdpa-cudnn") if gpu else ("sdpa",)
    composed = tuple(f"{name}-epilogue" for name in softmax) if args.affine else ()
    return Case(
        name="affine-custom", batch=batch, heads=heads, kv_heads=args.kv_heads or heads, length=length, width=width,
        dtype=args.dtype or ("bfloat16" if gpu else "float32"), providers=args.providers or ("nearfar", *composed, *softmax),
        plotted=True, backward=args.backward, causal=args.causal, affine=args.affine, left=args.left,
    )
