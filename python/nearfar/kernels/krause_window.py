"""Krause attention in the windows of a grid on its kernels: `torch.ops.nearfar.krause_attention_window`."""

from typing import Any

import torch

from nearfar.kernels.krause_grid import decoded
from nearfar.runtime.backend import Backend
from nearfar.runtime.operator import Operator
from nearfar.runtime.program import Program
from nearfar.runtime.tensors import empty, empty_rows, triton_module


class KrauseWindow(Operator):
    """bias: (Hq, entries) float32. The backward reads lse (B, Hq, N)."""

    name = "krause_attention_window"
    serves = "krause_attention"
    tensors = "Tensor q, Tensor k, Tensor v, Tensor sigma, Tensor? bias, Tensor? seed"
    options = "str locality, float dropout_p"
    rows = "q", "k", "v"
    constants = 1
    outputs = "o", "lse"

    def __init__(self) -> None:
        super().__init__()
        self.backends = {"triton": KrauseWindowTriton()}

    def empty(self, tensors: Any, *_: Any) -> Any:
        q, _, v, *_ = tensors
        return empty_rows(q, v.shape[3]), empty(q, q.shape[:3], torch.float32)

    def has_nothing_to_do(self, tensors: Any, outputs: Any) -> bool:
        return not outputs[0].numel()


_launchers, _pair = triton_module("window_launch"), triton_module("krause")


class KrauseWindowTriton(Backend):
    def forward(self, tensors: Any, outputs: Any, locality: str, dropout_p: float) -> Program:
        launches = _launchers().forward_launches(_pair().PAIR, *tensors, decoded(locality), dropout_p, *outputs)
        return Program(tensors, outputs, launches)

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any, locality: str, dropout_p: float
    ) -> Program:
        given = *tensors, decoded(locality), dropout_p, *saved, *gradients, *results[:5]
        return Program((*gradients, *tensors, *saved), results, _launchers().backward_launches(_pair().PAIR, *given))


krause_window = KrauseWindow()
