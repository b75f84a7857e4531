"""Selective synchronization attention, beside the paper's formula and softmax attention."""

from dataclasses import dataclass

import torch

import nearfar
from bench.baselines import SDPA, sdpa
from bench.baselines import synchronization as baselines
from bench.cases import OURS, BaseCase, Provider
from bench.formulas import Softmax
from bench.formulas.synchronization import Synchronization
from nearfar.ops.synchronization import prepare

PROVIDERS = (*OURS, *SDPA, "eager")
SPREAD, APART = 0.3, 0.5  # of the frequencies of a cluster, over sqrt(width), and of the centres
CELL = 64  # tokens: where runs may begin, so that a share of pairs is that share of block pairs


@dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """clusters: about equally long runs of tokens; pairs lock inside a run, all of them, and none between runs."""

    causal: bool = False
    clusters: int = 1
    coupling: float = 2.0
    bandwidth: float = 0.2
    order: float = 1.0

    @property
    def variant(self):
        locked = "every pair locks" if self.clusters == 1 else f"1 pair in {self.clusters} locks"
        return f"causal, {locked}" if self.causal else locked

    @property
    def title(self):
        return f"{self.size}, {self.variant}"

    def inputs(self, device, formula):
        tensors = super().inputs(device, formula)
        if isinstance(formula, Synchronization):
            generator = torch.Generator(device).manual_seed(1)
            with torch.no_grad():
                omega = tensors[0]
                centres = APART * torch.randn(self.clusters, self.width, generator=generator, device=device)
                cell = min(CELL, max(1, self.length // self.clusters))
                cells = torch.arange(self.length, device=device) // cell
                run = cells * self.clusters // (cells[-1] + 1)
                omega.mul_(SPREAD * self.width**-0.5).add_(centres[run] if self.clusters > 1 else 0.0)
        return tensors

    def formula(self, provider):
        right = 0 if self.causal else -1
        return Softmax(-1, right) if provider in SDPA else Synchronization(-1, right, self.clusters)

    def provider(self, name, inputs):
        if name in OURS:
            return self.ours(name, inputs)
        if name in SDPA:
            return Provider(f"{name} softmax", sdpa(name, self.causal))
        return Provider(name, baselines.eager(self.formula(name)))

    def call(self, backend="auto"):
        def run(*inputs):
            return nearfar.synchronization_attention(*self.arguments(inputs), causal=self.causal, backend=backend)

        return run

    def prepared(self, inputs):
        return prepare(*self.arguments(inputs), causal=self.causal)

    def arguments(self, inputs):
        """One order for each head; for each query where the operator wants that."""
        *others, order = inputs
        shape = (self.batch, self.heads, self.length) if self.causal else (self.batch, self.heads)
        order = order[:, None] if self.causal else order
        return *others, order.expand(shape)


def add_arguments(parser):
    parser.add_argument("--causal", action="store_true", help="a query sees the keys at or before it (default: all)")
    clusters = "runs of tokens that lock among themselves only (default: 1, every pair locks)"
    parser.add_argument("--clusters", type=int, default=1, help=clusters)


def from_arguments(shape, args):
    batch, heads, length, width = shape
    gpu = torch.cuda.is_available()
    default = ("nearfar", "sdpa-flash", "sdpa-cudnn") if gpu else ("nearfar", "sdpa", "eager")
    return Case(
        name="ssa-custom", batch=batch, heads=heads, kv_heads=heads, length=length, width=width,
        dtype=args.dtype or ("bfloat16" if gpu else "float32"), providers=args.providers or default, plotted=True,
        backward=args.backward, causal=args.causal, clusters=args.clusters,
    )
