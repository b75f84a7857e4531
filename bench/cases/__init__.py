"""Benchmark cases: their table, cases.toml, and one module per operator, named as its `room` in nearfar.registry.

A module offers

    Case                                a BaseCase with the operator's own parameters
    PROVIDERS                           names of who may compute it
    add_arguments(parser)               the operator's own options of `python -m bench <room>`
    from_arguments(shape, args)         the Case of one shape and those options
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from nearfar import registry

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

GPU = torch.device("cuda")
TABLE = Path(__file__).with_name("cases.toml")
TAGS = ("lm", "vision", "video", "inference", "short", "quick", "long")
OURS = {"nearfar": "auto", "cuda": "cuda", "triton": "triton", "reference": "reference"}


class Work(NamedTuple):
    """What a pass must move and compute at the very least."""

    bytes: int
    flops: int

    def floor_ms(self, ceilings):
        return 1e3 * max(self.bytes / ceilings["bytes_per_s"], self.flops / ceilings["flops_per_s"])


class Provider(NamedTuple):
    """An implementation that computes a case.

    label: name in tables. run: inputs -> output. token_major: its tensors are (B, N, H, D), so it is given inputs that lie
    like that in memory.
    """

    label: str
    run: Callable
    token_major: bool = False


@dataclass(frozen=True, kw_only=True)
class BaseCase:
    """One problem of one size. A room's Case adds the parameters of its operator and

    variant                     short text of those that tell the lines of a plot apart
    title                       text of size and parameters
    formula(provider)           what a provider computes, see formulas/
    provider(name, inputs)      the Provider
    call(backend)               inputs -> o by nearfar
    prepared(inputs)            the checked call by nearfar, with its q and its `backends`

    name: cases of one name share a results file. Names ending in `-length` are sweeps, which competitors leave when
        they take too long; the last two of `-million` must scale.
    width: of the values, and of q and k where the operator has no widths of its own.
    goal_ms: (forward, backward) from the design's performance page, None where there is none.
    goal_over: (provider, how many times its forward ours may take at most), None where there is none.
    plotted: part of the plot of time against length.
    linear_time: time grows as the length does, not as its square.
    source: whose shape it is. tags: see cases.toml.
    """

    name: str
    batch: int
    heads: int
    length: int
    width: int
    kv_heads: int
    dtype: str
    providers: tuple[str, ...]
    backward: bool = True
    goal_ms: tuple[float, float] | None = None
    goal_over: tuple[str, float] | None = None
    plotted: bool = False
    source: str = ""
    tags: tuple[str, ...] = ()

    linear_time: ClassVar = True

    def describe(self):
        return asdict(self)

    @property
    def output_shape(self):
        return self.batch, self.heads, self.length, self.width

    @property
    def size(self):
        kv = "" if self.kv_heads == self.heads else f"/{self.kv_heads}"
        return f"B{self.batch} H{self.heads}{kv} N{self.length} D{self.width} {self.dtype}"

    @staticmethod
    def is_ours(provider):
        return provider in OURS

    def ours(self, name, inputs):
        """The Provider that is nearfar on the backend that `name` stands for."""
        call = self.prepared(inputs)
        served = call.backends.served(OURS[name], call.q)
        return Provider(f"nearfar {' and '.join(dict.fromkeys(served))}", self.call(OURS[name]))

    def inputs(self, device, formula):
        """The formula's tensors and rows, random, and its parameters; they require gradients where the backward is measured."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, self.dtype)
        tensors = [
            torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in formula.inputs(self).values()
        ]
        rows = self.output_shape[:3]
        tensors += [torch.randn(rows, generator=generator, device=device) for _ in formula.rows]
        tensors += [torch.full((self.heads,), getattr(self, name), device=device) for name in formula.parameters]
        return [t.requires_grad_(self.backward) for t in tensors]

    def work(self, formula):
        """(forward, backward). Forward: inputs in, o out. Backward: inputs, o and dO in, a gradient for each input out.

        Parameters, one number a head, are too few to count.
        """
        values = sum(math.prod(shape) for shape in formula.inputs(self).values()) + math.prod(self.output_shape)
        rows = len(formula.rows) * math.prod(self.output_shape[:3])
        moved = getattr(torch, self.dtype).itemsize * values + torch.float32.itemsize * rows
        forward, backward = formula.flops(self)
        return Work(moved, forward), Work(2 * moved, backward)


def suite(device):
    """{room: cases} of the table for a torch.device."""
    table = tomllib.loads(TABLE.read_text())
    kind = "cpu" if device.type == "cpu" else "gpu"
    found = {
        room: [case for entry in table.get(room, ()) if entry.get("device", "gpu") == kind for case in from_entry(room, entry)]
        for room in rooms()
    }
    return {room: cases for room, cases in found.items() if cases}


def from_entry(room, entry):
    """The Cases of an entry of the table, several where it has something to vary."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    kind, vary, shape = (fields.pop(key, None) for key in ("device", "vary", "shape"))
    batch, heads, length, width = shape
    sizes = {"batch": batch, "heads": heads, "kv_heads": heads, "length": length, "width": width}
    case = module(room).Case(**{**sizes, "dtype": "float32" if kind == "cpu" else "bfloat16", **fields})
    if not vary:
        return [case]
    return [replace(case, **dict(zip(vary, values, strict=True))) for values in zip(*vary.values(), strict=True)]


def rooms():
    """Rooms of the registered operators that have a module here."""
    names = dict.fromkeys(operator.room for operator in registry.OPERATORS)
    return {name: module(name) for name in names if importlib.util.find_spec(f"{__name__}.{name}")}


def module(room):
    return importlib.import_module(f"{__name__}.{room}")


def load(room, description):
    """The Case that `describe` described, also after a way through JSON."""
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in description.items()}
    return module(room).Case(**lists)
