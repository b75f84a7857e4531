"""Benchmark cases: one module per operator, under the name of its room in nearfar.registry.

A module offers

    Case                                a BaseCase with the operator's own parameters
    suite(device)                       the cases that `python -m bench` runs on a device
    add_arguments(parser)               the operator's own options of `python -m bench <room>`
    from_arguments(shape, args)         the Case of one shape and those options
"""

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from nearfar import registry


class Work(NamedTuple):
    """What a pass must move and compute at the very least."""

    bytes: int
    flops: int

    def floor_ms(self, ceilings):
        return 1e3 * max(self.bytes / ceilings["bytes_per_s"], self.flops / ceilings["flops_per_s"])


class Provider(NamedTuple):
    """Somebody who computes a case.

    label: name in tables. run: inputs -> output. formula: what it computes, see formulas.py.
    """

    label: str
    run: Callable
    formula: Any


@dataclass(frozen=True, kw_only=True)
class BaseCase:
    """One problem of one size.

    name: cases of one name share a results file. Names ending in `-length` are sweeps, which competitors leave when
        they take too long; the last two of `-million` must scale.
    goal_ms: (forward, backward) from the design's performance page, None where there is none.
    plotted: part of the plot of time against length.
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
    plotted: bool = False

    def describe(self):
        return asdict(self)

    @property
    def size(self):
        kv = "" if self.kv_heads == self.heads else f"/{self.kv_heads}"
        return f"B{self.batch} H{self.heads}{kv} N{self.length} D{self.width} {self.dtype}"


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
