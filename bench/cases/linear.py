"""Linear and Hadamard linear attention, beside fla, the formula compiled or eager, and softmax attention."""

import functools
from dataclasses import dataclass

import torch

import nearfar
from bench.baselines import SDPA, sdpa, static
from bench.baselines import linear as baselines
from bench.cases import OURS, BaseCase, Provider
from bench.formulas import Softmax
from bench.formulas.linear import FEATURE_MAPS, Hadamard, split
from nearfar import registry

FLA = {"fla-fused-chunk": "fused_chunk", "fla-chunk": "chunk"}
FLA_BARE = {f"{name}-bare": kernel for name, kernel in FLA.items()}  # without feature map and normaliser
PROVIDERS = (*OURS, *SDPA, *FLA, *FLA_BARE, "compile", "eager")


@dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """factors: widths of the factors of q and k; one factor is nearfar.linear_attention."""

    factors: tuple[int, ...]
    causal: bool = False
    feature_map: str = "elu"
    normalize: bool = True

    @property
    def variant(self):
        factors = "" if self.factors == (self.width,) else f"factors {'x'.join(map(str, self.factors))}"
        features = "" if self.feature_map == "elu" else self.feature_map
        normalized = "" if self.normalize else "not normalised"
        return ", ".join(filter(None, (factors, "causal" if self.causal else "full", features, normalized)))

    @property
    def title(self):
        return f"{self.size}, {self.variant}"

    def formula(self, provider):
        right = 0 if self.causal else -1
        if provider in SDPA:
            return Softmax(-1, right)
        if provider in FLA_BARE:
            return Hadamard(-1, right, self.factors, "identity", False)
        return Hadamard(-1, right, self.factors, self.feature_map, self.normalize)

    def provider(self, name, inputs):
        formula = self.formula(name)
        if name in OURS:
            return self.ours(name, inputs)
        if name in SDPA:
            return Provider(f"{name} softmax", sdpa(name, self.causal))
        if name in FLA:
            return Provider(name, baselines.fla(FLA[name], formula), token_major=True)
        if name in FLA_BARE:
            label = f"{name.removesuffix('-bare')}, no feature map, not normalised"
            return Provider(label, baselines.fla(FLA_BARE[name], formula), token_major=True)
        run = baselines.plain(formula)
        return Provider(name, static(run) if name == "compile" else run)

    def call(self, backend="auto"):
        run = functools.partial(self.operator.function, **self.keywords(), backend=backend)
        return run if len(self.factors) == 1 else lambda *inputs: run(*split(inputs))

    def prepared(self, inputs):
        return self.operator.prepare(*(inputs if len(self.factors) == 1 else split(inputs)), **self.keywords())

    @property
    def operator(self):
        return registry.find(nearfar.linear_attention if len(self.factors) == 1 else nearfar.hadamard_attention)

    def keywords(self):
        return {"feature_map": self.feature_map, "normalize": self.normalize, "causal": self.causal}


def add_arguments(parser):
    factors = "widths of the factors of q and k, as in 16,16 (default: one as wide as v, which is linear attention)"
    parser.add_argument("--factors", metavar="D,D", type=widths, help=factors)
    parser.add_argument("--causal", action="store_true", help="a query sees the keys at or before it (default: all)")
    parser.add_argument("--feature-map", choices=FEATURE_MAPS, default="elu", help="default: %(default)s")
    parser.add_argument("--no-normalize", dest="normalize", action="store_false", help="leave the denominator out")


def widths(text):
    return tuple(int(width) for width in text.split(","))


def from_arguments(shape, args):
    batch, heads, length, width = shape
    gpu = torch.cuda.is_available()
    default = ("nearfar", "compile", "sdpa-flash", "sdpa-cudnn") if gpu else ("nearfar", "sdpa", "eager")
    return Case(
        name="linear-custom", batch=batch, heads=heads, kv_heads=args.kv_heads or heads, length=length, width=width,
        dtype=args.dtype or ("bfloat16" if gpu else "float32"), providers=args.providers or default, plotted=True,
        backward=args.backward, factors=args.factors or (width,), causal=args.causal, feature_map=args.feature_map,
        normalize=args.normalize,
    )
