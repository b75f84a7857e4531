"""Streamed diagnostics: statistics and selection geometry, beside the forward of softmax attention over the same tokens."""

from dataclasses import dataclass

import torch

import nearfar
from bench.baselines import SDPA, sdpa
from bench.baselines import diagnostics as baselines
from bench.cases import OURS, BaseCase, Provider, Work
from bench.formulas import Softmax
from bench.formulas.diagnostics import Geometry, Statistics
from nearfar import registry

PROVIDERS = (*OURS, *SDPA, "eager")


@dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """top_n: of nearfar.selection_geometry; None is nearfar.attention_statistics."""

    top_n: int | None = None
    causal: bool = True
    backward: bool = False

    @property
    def variant(self):
        what = "statistics" if self.top_n is None else f"geometry, top_n {self.top_n}"
        return f"{what}, {'causal' if self.causal else 'full'}"

    @property
    def title(self):
        return f"{self.size}, {self.variant}"

    def formula(self, provider):
        right = 0 if self.causal else -1
        if provider in SDPA:
            return Softmax(-1, right)
        return Statistics(-1, right) if self.top_n is None else Geometry(-1, right, self.top_n, self.dtype)

    def work(self, formula):
        """Outputs are a few numbers a query, too few to count."""
        forward, backward = super().work(formula)
        moved = 0 if isinstance(formula, Softmax) else self.batch * self.heads * self.length * self.width
        return Work(forward.bytes - moved * getattr(torch, self.dtype).itemsize, forward.flops), backward

    def provider(self, name, inputs):
        if name in OURS:
            return self.ours(name, inputs)
        if name in SDPA:
            return Provider(f"{name} softmax", sdpa(name, self.causal))
        return Provider(name, baselines.eager(self.formula(name)))

    def call(self, backend="auto"):
        """The results in columns, as bench/formulas/diagnostics.py has them."""

        def statistics(q, k):
            found = nearfar.attention_statistics(q, k, causal=self.causal, backend=backend)
            columns = (found.lse, found.entropy, found.max_weight, found.key_mass)
            return torch.stack(columns if self.causal else columns[:3], -1)

        def geometry(q, k, v):
            return torch.stack(nearfar.selection_geometry(q, k, v, self.top_n, causal=self.causal, backend=backend), -1)

        return statistics if self.top_n is None else geometry

    def prepared(self, inputs):
        if self.top_n is None:
            return registry.find(nearfar.attention_statistics).prepare(*inputs, causal=self.causal)
        return registry.find(nearfar.selection_geometry).prepare(*inputs, self.top_n, causal=self.causal)


def add_arguments(parser):
    top_n = "keys that a query selects, for nearfar.selection_geometry (default: nearfar.attention_statistics)"
    parser.add_argument("--top-n", metavar="N", type=int, help=top_n)
    parser.add_argument("--full", action="store_true", help="a query sees every key (default: those at or before it)")


def from_arguments(shape, args):
    batch, heads, length, width = shape
    gpu = torch.cuda.is_available()
    default = ("nearfar", "sdpa-cudnn", "sdpa-flash") if gpu else ("nearfar", "sdpa", "eager")
    return Case(
        name="diagnostics-custom", batch=batch, heads=heads, kv_heads=args.kv_heads or heads, length=length, width=width,
        dtype=args.dtype or ("bfloat16" if gpu else "float32"), providers=args.providers or default, plotted=True,
        top_n=args.top_n, causal=not args.full,
    )
