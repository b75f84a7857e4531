"""Linear and Hadamard linear attention: the cases of the performance page, a sweep over length, and a million tokens."""

import functools
from dataclasses import dataclass, replace

import torch

import nearfar
from bench.baselines import SDPA, sdpa, static
from bench.baselines import linear as baselines
from bench.cases import OURS, BaseCase, Provider, lengths
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


def suite(device):
    return gpu_suite() if device.type == "cuda" else cpu_suite()


def gpu_suite():
    softmax, plain = ("sdpa-flash", "sdpa-cudnn"), ("compile", "eager")
    causal = Case(
        name="linear-causal", batch=4, heads=32, kv_heads=32, length=4096, width=64, factors=(64,), causal=True,
        dtype="bfloat16", providers=("nearfar", *FLA, "fla-fused-chunk-bare", *plain, *softmax), goal_ms=(0.12, 0.30),
    )
    full = replace(
        causal, name="linear-full", batch=1, length=16384, causal=False, providers=("nearfar", *plain, *softmax),
        goal_ms=(0.13, 0.30),
    )
    wide = replace(full, heads=16, kv_heads=16, length=65536, width=128, factors=(128,), goal_ms=(0.45, 1.1))
    hadamard = replace(full, name="hadamard-full", factors=(16, 16), goal_ms=(0.25, 0.80))
    video = replace(
        hadamard, name="hadamard-video", heads=12, kv_heads=12, length=32760, width=128, factors=(64, 64),
        goal_ms=(2.5, 8.0),
    )
    hadamard_causal = replace(
        hadamard, name="hadamard-causal", batch=4, length=4096, causal=True, goal_ms=(0.35, 1.1)
    )
    sweep = replace(full, name="linear-length", goal_ms=None, plotted=True, providers=("nearfar", *softmax))
    million = replace(sweep, name="linear-million", heads=8, kv_heads=8, plotted=False, providers=("nearfar",))
    hadamard_million = replace(million, name="hadamard-million", factors=(16, 16))
    return [
        causal,
        full,
        wide,
        hadamard,
        video,
        hadamard_causal,
        *swept(sweep, 256, 65536),
        *(case for one in both(million) for case in lengths(one, 524288, 1048576)),
        *(case for one in both(hadamard_million) for case in lengths(one, 524288, 1048576)),
    ]


def cpu_suite():
    sweep = Case(
        name="linear-length", batch=1, heads=4, kv_heads=4, length=512, width=64, factors=(64,), dtype="float32",
        plotted=True, providers=("nearfar", "sdpa"),
    )
    return swept(sweep, 512, 8192)


def swept(sweep, first, last):
    """Linear and Hadamard linear attention of one value width over lengths; softmax attention is the same for both."""
    hadamard = replace(sweep, factors=(16, 16), providers=("nearfar",))
    return [case for one in (*both(sweep), *both(hadamard)) for case in lengths(one, first, last)]


def both(case):
    return replace(case, causal=True), replace(case, causal=False)


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
