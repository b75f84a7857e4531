"""Krause attention, beside softmax attention, FlexAttention and the formula written down."""

import functools
from dataclasses import dataclass

import torch

import nearfar
from bench.baselines import SDPA, sdpa
from bench.baselines import krause as baselines
from bench.cases import OURS, BaseCase, Provider
from bench.formulas import Softmax
from bench.formulas.krause import Rbf
from nearfar import SlidingWindow
from nearfar.ops.krause import prepare

FLEX = {"flex-rbf": Rbf, "flex-softmax": Softmax}
PROVIDERS = (*OURS, *SDPA, *FLEX, "eager")


@dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    left: int = 127
    right: int = 0
    top_k: int | None = None
    sigma: float = 2.5

    @property
    def variant(self):
        return "" if self.top_k is None else f"top-k {self.top_k}"

    @property
    def title(self):
        return ", ".join(filter(None, (self.size, f"window {self.left},{self.right}", self.variant)))

    def formula(self, provider):
        if provider in SDPA:
            return Softmax(-1, 0)
        if provider in FLEX:
            return FLEX[provider](self.left, self.right)
        return Rbf(self.left, self.right, self.top_k)

    def provider(self, name, inputs):
        if name in OURS:
            return self.ours(name, inputs)
        if name in SDPA:
            return Provider(f"{name} causal", sdpa(name))
        formula = self.formula(name)
        if name in FLEX:
            label = name if self.top_k is None else f"{name}, no top-k"
            return Provider(label, baselines.flex(formula, self.length, inputs[0].device))
        return Provider(name, baselines.eager(formula))

    def call(self, backend="auto"):
        return functools.partial(nearfar.krause_attention, **self.keywords(), backend=backend)

    def prepared(self, inputs):
        return prepare(*inputs, **self.keywords())

    def keywords(self):
        return {"locality": SlidingWindow(self.left, self.right), "top_k": self.top_k}


def add_arguments(parser):
    window = "keys before and after a query (default: 127,0), -1 for all of them (as in --window=-1,0)"
    parser.add_argument("--window", metavar="L,R", type=sides, default=(127, 0), help=window)
    parser.add_argument("--top-k", metavar="K", type=int, help="keys a query keeps (default: all of its window)")
    parser.add_argument("--sigma", type=float, default=2.5, help="bandwidth (default: %(default)s)")


def sides(text):
    left, right = (int(side) for side in text.split(","))
    return left, right


def from_arguments(shape, args):
    batch, heads, length, width = shape
    gpu = torch.cuda.is_available()
    default = ("nearfar", "flex-rbf", "sdpa-flash", "sdpa-cudnn") if gpu else ("nearfar", "sdpa", "eager")
    return Case(
        name="krause-custom", batch=batch, heads=heads, kv_heads=args.kv_heads or heads, length=length, width=width,
        dtype=args.dtype or ("bfloat16" if gpu else "float32"), providers=args.providers or default, plotted=True,
        backward=args.backward, left=args.window[0], right=args.window[1], top_k=args.top_k, sigma=args.sigma,
    )
