"""Which kernels "auto" asks first: those that were measured faster, by the committed table choices.json."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nearfar.runtime.dispatch import CUDA_FIRST, TRITON_FIRST, Orders
from nearfar.runtime.private import constant_while_traced

TABLE = Path(__file__).with_name("choices.json")


@functools.cache
def table() -> dict[str, Any]:
    """{"runs": {name: GPU, versions, commit, date, method and source}, "choices": {operator: rows}}.

    Each row has the `key` that a choice depends on, of exact values or of bounds [least, most]; the `case` that was measured;
    and for "cuda" and "triton" the milliseconds of the forward and, where it was measured, of the backward, and their run.
    """
    return json.loads(TABLE.read_text())


def rows(operator: str) -> list[dict[str, Any]]:
    """Those of an operator."""
    return table()["choices"][operator]


@constant_while_traced  # it reads a file, and Dynamo of torch 2.11 cannot trace `order`
def _decided(operator: str) -> list[tuple[Mapping[str, Any], Orders]]:
    """The key and the orders of each row of an operator."""
    return [(row["key"], (order(row, "forward"), order(row, "backward"))) for row in rows(operator)]


def orders(operator: str, device: torch.device, **key: Any) -> Orders:
    """In which order "auto" asks the kernels for the forward and for the backward of a call.

    key: what the operator's choice depends on beside the GPU's architecture, named as in its rows. Triton comes first where
    nothing was measured.
    """
    if device.type == "cuda":
        key = {"capability": _capability(device.index), **key}
        for measured, found in _decided(operator):
            if _fits(measured, key):
                return found
    return TRITON_FIRST, TRITON_FIRST


def _fits(measured: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    for name, value in key.items():
        expected = measured[name]
        if isinstance(expected, list):
            least, most = expected
            if value < least or (most is not None and value > most):
                return False
        elif value != expected:
            return False
    return True


def order(row: Mapping[str, Any], direction: str) -> Sequence[str]:
    """CUDA first where it was faster; a backward that was not measured is asked as the forward."""
    cuda, triton = (row[backend].get(direction, row[backend]["forward"]) for backend in CUDA_FIRST)
    return CUDA_FIRST if cuda < triton else TRITON_FIRST


def _capability(index: int | None) -> int:
    """Major compute capability of a GPU."""
    return torch.cuda.get_device_properties(index).major
