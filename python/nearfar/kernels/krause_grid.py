"""Krause attention on grids on its kernels: `torch.ops.nearfar.krause_attention_grid`."""

from typing import Any

import torch

from nearfar import tiling
from nearfar.localities import Grid, GridNeighborhood, ShiftedWindow
from nearfar.runtime.backend import Backend
from nearfar.runtime.operator import Operator
from nearfar.runtime.program import Program
from nearfar.runtime.tensors import empty, empty_rows, triton_module


class KrauseGrid(Operator):
    """The backward reads lse (B, Hq, N) and, with top_k, bits (B, Hq, words of a head), the selection."""

    name = "krause_attention_grid"
    serves = "krause_attention"
    tensors = "Tensor q, Tensor k, Tensor v, Tensor sigma, Tensor? seed"
    options = "str locality, int? top_k, bool keep_ties, float dropout_p"
    rows = "q", "k", "v"
    constants = 1
    outputs = "o", "lse", "bits"

    def __init__(self) -> None:
        super().__init__()
        self.backends = {"triton": KrauseGridTriton()}

    def empty(self, tensors: Any, locality: str, top_k: int | None, *_: Any) -> Any:
        q, _, v, *_ = tensors
        lse, bits = empty(q, q.shape[:3], torch.float32), None
        if top_k is not None:
            words = tiling.geometry_of(neighborhood(locality)).words_per_head
            bits = empty(q, (*q.shape[:2], words), torch.int32)
        return empty_rows(q, v.shape[3]), lse, bits

    def has_nothing_to_do(self, tensors: Any, outputs: Any) -> bool:
        return not outputs[0].numel()


_launchers, _pair = triton_module("grid_launch"), triton_module("krause")


class KrauseGridTriton(Backend):
    def forward(
        self, tensors: Any, outputs: Any, locality: str, top_k: int | None, keep_ties: bool, dropout_p: float
    ) -> Program:
        given = *tensors, neighborhood(locality), top_k, keep_ties, dropout_p, *outputs
        return Program(tensors, outputs, _launchers().forward_launches(_pair().PAIR, *given))

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any, locality: str, _top_k: int | None, _keep_ties: bool,
        dropout_p: float,
    ) -> Program:
        given = *tensors, neighborhood(locality), dropout_p, *saved, *gradients, *results[:4]
        launches = _launchers().backward_launches(_pair().PAIR, *given)
        return Program((*gradients, *tensors, *saved), results, launches)


def decoded(text: str) -> Grid:
    """The locality that has this `text`."""
    numbers = list(map(int, text.split()))
    axes, rest = divmod(len(numbers), 3)
    shape, first, second = (tuple(numbers[i * axes : (i + 1) * axes]) for i in range(3))
    if not rest:
        return ShiftedWindow(shape, first, second)
    return GridNeighborhood(shape, first, "manhattan" if numbers[-2] else "chebyshev", numbers[-1], second)


def neighborhood(text: str) -> GridNeighborhood:
    """`decoded`, for the only kind of locality that kernels serve."""
    locality = decoded(text)
    assert isinstance(locality, GridNeighborhood)
    return locality


krause_grid = KrauseGrid()
