"""Krause attention: the cases of the design's performance page, a sweep over length, and a million tokens."""

from dataclasses import dataclass, replace

import torch

import nearfar
from bench import baselines
from bench.cases import BaseCase, Provider, Work
from bench.formulas import Rbf, Softmax
from nearfar import SlidingWindow, dispatch
from nearfar.ops.krause import prepare

OURS = {"nearfar": "auto", "cuda": "cuda", "triton": "triton", "reference": "reference"}
SDPA = {"sdpa": None, "sdpa-flash": "FLASH_ATTENTION", "sdpa-cudnn": "CUDNN_ATTENTION"}
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

    def inputs(self, device):
        """q, k, v, sigma; they require gradients only where the backward pass is measured."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((self.batch, heads, self.length, self.width) for heads in (self.heads, self.kv_heads, self.kv_heads))
        dtype = getattr(torch, self.dtype)
        qkv = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
        return [t.requires_grad_(self.backward) for t in (*qkv, torch.full((self.heads,), self.sigma, device=device))]

    @staticmethod
    def is_ours(provider):
        return provider in OURS

    def call(self, backend="auto"):
        """(q, k, v, sigma) -> o by nearfar."""
        locality = SlidingWindow(self.left, self.right)

        def run(q, k, v, sigma):
            return nearfar.krause_attention(q, k, v, sigma, locality, top_k=self.top_k, backend=backend)

        return run

    def provider(self, name, inputs):
        formula = Rbf(self.left, self.right, self.top_k)
        if name in OURS:
            reasons = prepare(*inputs, SlidingWindow(self.left, self.right), top_k=self.top_k).reasons
            backend = dispatch.choose(OURS[name], reasons, inputs[0].device)
            return Provider(f"nearfar {backend}", self.call(backend), formula)
        if name in SDPA:
            return Provider(f"{name} causal", baselines.sdpa(SDPA[name]), Softmax(-1, 0))
        if name in FLEX:
            formula = FLEX[name](self.left, self.right)
            label = name if self.top_k is None else f"{name}, no top-k"
            return Provider(label, baselines.flex(formula, self.length, inputs[0].device), formula)
        return Provider(name, baselines.eager(formula), formula)

    def work(self, formula):
        """Forward: q, k, v in, o out, two products. Backward: q, k, v, o, dO in, dq, dk, dv out, five products."""
        row = self.batch * self.length * self.width * getattr(torch, self.dtype).itemsize
        q, kv = row * self.heads, row * self.kv_heads
        product = 2 * self.batch * self.heads * self.width * formula.pairs(self.length)
        return Work(2 * q + 2 * kv, 2 * product), Work(4 * q + 4 * kv, 5 * product)


def suite(device):
    return gpu_suite() if device.type == "cuda" else cpu_suite()


def gpu_suite():
    core = Case(
        name="krause-window", batch=1, heads=32, kv_heads=32, length=16384, width=64, dtype="bfloat16",
        providers=("nearfar", "flex-rbf", "flex-softmax", "sdpa-flash", "sdpa-cudnn"), goal_ms=(0.14, 0.40),
    )  # fmt: skip
    topk = replace(
        core, name="krause-window-topk", top_k=96, providers=("nearfar", "flex-rbf", "sdpa-flash"), goal_ms=(0.30, 0.45)
    )
    small = replace(
        topk, name="krause-window-topk-4k", heads=16, kv_heads=16, length=4096, goal_ms=None,
        providers=("nearfar", "eager"),
    )  # fmt: skip
    sweep = replace(
        core, name="krause-length", heads=8, kv_heads=8, goal_ms=None, plotted=True,
        providers=("nearfar", "flex-rbf", "sdpa-flash", "sdpa-cudnn", "eager"),
    )  # fmt: skip
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
    )  # fmt: skip
    return [
        *lengths(sweep, 512, 8192),
        *lengths(replace(sweep, top_k=96, providers=("nearfar",)), 512, 8192),
    ]


def lengths(case, first, last):
    """The case at first, 2 first, ... last tokens."""
    return [replace(case, length=first << i) for i in range((last // first).bit_length())]


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
    )  # fmt: skip
