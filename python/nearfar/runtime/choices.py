"""The order in which "auto" tries the kernel backends: the faster one first, by the committed measurements in choices.json."""

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

    Each row has a `key`, the values that the choice depends on, exact or as bounds [least, most]; the `case` that was
    measured; and for "cuda" and "triton" their run and the milliseconds of the forward and, if measured, of the backward.
    """
    return json.loads(TABLE.read_text())


def rows(operator: str) -> list[dict[str, Any]]:
    """The rows of an operator."""
    return table()["choices"][operator]


@constant_while_traced  # Dynamo cannot trace the file access, nor (torch 2.11) `order`
def _decided(operator: str) -> list[tuple[Mapping[str, Any], Orders]]:
    """The key and the orders of each row of an operator."""
    return [(row["key"], (order(row, "forward"), order(row, "backward"))) for row in rows(operator)]


def orders(operator: str, device: torch.device, **key: Any) -> Orders:
    """The order in which "auto" tries the kernel backends, for the forward and for the backward of a call.

    key: the values that the operator's choice depends on besides the GPU's architecture, named as in its rows. Triton comes
    first if there is no measurement.
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
    """CUDA first if it was faster; a backward without a measurement takes the order of the forward."""
    cuda, triton = (row[backend].get(direction, row[backend]["forward"]) for backend in CUDA_FIRST)
    return CUDA_FIRST if cuda < triton else TRITON_FIRST


def _capability(index: int | None) -> int:
    """Major compute capability of a GPU."""
    return torch.cuda.get_device_properties(index).major
