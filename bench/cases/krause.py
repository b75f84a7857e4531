"""Krause attention: the cases of the design's performance page, a sweep over length, and a million tokens."""

import functools
from dataclasses import dataclass, replace

import torch

import nearfar
from bench.baselines import SDPA, sdpa
from bench.baselines import krause as baselines
from bench.cases import OURS, BaseCase, Provider, lengths
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


def suite(device):
    return gpu_suite() if device.type == "cuda" else cpu_suite()


def gpu_suite():
    core = Case(
        name="krause-window", batch=1, heads=32, kv_heads=32, length=16384, width=64, dtype="bfloat16",
        providers=("nearfar", "flex-rbf", "flex-softmax", "sdpa-flash", "sdpa-cudnn"), goal_ms=(0.14, 0.40),
    )
    topk = replace(
        core, name="krause-window-topk", top_k=96, providers=("nearfar", "flex-rbf", "sdpa-flash"), goal_ms=(0.30, 0.45)
    )
    small = replace(
        topk, name="krause-window-topk-4k", heads=16, kv_heads=16, length=4096, goal_ms=None,
        providers=("nearfar", "eager"),
    )
    sweep = replace(
        core, name="krause-length", heads=8, kv_heads=8, goal_ms=None, plotted=True,
        providers=("nearfar", "flex-rbf", "sdpa-flash", "sdpa-cudnn", "eager"),
    )
    million = replace(sweep, name="krause-million", providers=("nearfar",))
    # FlexAttention takes seconds to compile for each length: every other one draws its line.
    swept = lengths(sweep, 1024, 131072)
    swept[1::2] = [replace(case, providers=("nearfar", "sdpa-flash", "sdpa-cudnn", "eager")) for case in swept[1::2]]
    return [
        core,
        topk,
        small,
        *swept,
        *lengths(replace(sweep, top_k=96, providers=("nearfar",)), 1024, 131072),
        *lengths(million, 524288, 1048576),
    ]


def cpu_suite():
    sweep = Case(
        name="krause-length", batch=1, heads=4, kv_heads=4, length=512, width=64, dtype="float32", plotted=True,
        providers=("nearfar", "sdpa", "eager"),
    )
    return [
        *lengths(sweep, 512, 8192),
        *lengths(replace(sweep, top_k=96, providers=("nearfar",)), 512, 8192),
    ]


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
