"""Krause attention on its kernels: `torch.ops.nearfar.krause_attention`."""

from typing import Any

import torch

from nearfar import _cuda
from nearfar.localities import keys_in_window
from nearfar.runtime.backend import Backend
from nearfar.runtime.operator import Operator
from nearfar.runtime.program import Program
from nearfar.runtime.tensors import empty_rows, triton_module

MAX_CANDIDATES = 1024  # keys that a query may choose its top_k from

# Wide heads and windows from which on the squared norms of keys are computed once, ahead of the attention.
SQUARES_AHEAD_WIDTH = 128
SQUARES_AHEAD_KEYS = 512


class Krause(Operator):
    """The backward reads lse (B, Hq, N) and, with top_k, bits (B, Hq, N, words), the selection. All backends save the same."""

    name = "krause_attention"
    tensors = "Tensor q, Tensor k, Tensor v, Tensor sigma, Tensor? cu_seqlens"
    options = "int left, int right, int? top_k"
    rows = "q", "k", "v"
    constants = 1
    outputs = "o", "lse", "bits"

    def __init__(self) -> None:
        super().__init__()
        self.backends = {"cuda": KrauseCuda(), "triton": KrauseTriton()}

    def empty(self, tensors: Any, left: int, right: int, top_k: int | None, *_: Any) -> Any:
        q, k, v, *_ = tensors
        lse, bits = q.new_empty(q.shape[:3], dtype=torch.float32), None
        if top_k is not None:
            bits = q.new_empty((*q.shape[:3], selection_words(left, right, k.shape[2])), dtype=torch.int32)
        return empty_rows(q, v.shape[3]), lse, bits

    def has_nothing_to_do(self, tensors: Any, outputs: Any) -> bool:
        return not outputs[0].numel() or not tensors[1].shape[2]


_packing, _launchers, _pair = triton_module("packing"), triton_module("pairwise_launch"), triton_module("krause")


class KrauseTriton(Backend):
    def forward(self, tensors: Any, outputs: Any, left: int, right: int, top_k: int | None) -> Program:
        """One more pass over k, for its squares, was measured to pay for wide heads and windows (docs/notes/krause.md)."""
        q, k, v, sigma, cu_seqlens = tensors
        token_bounds, launches = _bounds(cu_seqlens, k)
        bits, k_squares = outputs[2], None
        wide = k.shape[3] >= SQUARES_AHEAD_WIDTH and keys_in_window(left, right, k.shape[2]) > SQUARES_AHEAD_KEYS
        if wide and _cuda.extension is not None and k.dtype != torch.float32 and bits is None:
            k_squares = k.new_empty(k.shape[:3], dtype=torch.float32)
            launches.append((_cuda.RowSumsq(k), (k, k_squares)))
        given = q, k, v, k_squares, sigma, token_bounds, left, right, top_k, *outputs
        return Program(tensors, outputs, [*launches, *_launchers().forward_launches(_pair().PAIR, *given)])

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any, left: int, right: int, top_k: int | None
    ) -> Program:
        *inputs, cu_seqlens = tensors
        token_bounds, launches = _bounds(cu_seqlens, inputs[1])
        given = *inputs, token_bounds, left, right, *saved, *gradients, *results[:4]
        launches += _launchers().backward_launches(_pair().PAIR, *given)
        return Program((*gradients, *tensors, *saved), results, launches)


class KrauseCuda(_cuda.CudaBackend):
    def forward(self, tensors: Any, outputs: Any, left: int, right: int, top_k: int | None) -> Program:
        q, k, v, sigma, cu_seqlens = tensors
        token_bounds, launches = _bounds(cu_seqlens, k)
        launch = _cuda.KrauseForward(q, k, v, sigma, left, right, top_k, outputs[0])
        return Program(tensors, outputs, [*launches, (launch, (q, k, v, sigma, token_bounds, *outputs))])

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any, left: int, right: int, top_k: int | None
    ) -> Program:
        (do,), (q, k, v, sigma, cu_seqlens), (o, lse, bits) = gradients, tensors, saved
        dq, dk, dv, dsigma, _ = results
        token_bounds, launches = _bounds(cu_seqlens, k)
        launch = _cuda.KrauseBackward(q, k, v, o, do, sigma, left, right, dq, dk, dv)
        partials = lse.new_empty(launch.partials_shape(q, k))
        given = q, k, v, o, do, sigma, lse, bits, token_bounds, dq, dk, dv, dsigma, partials
        return Program((*gradients, *tensors, *saved), results, [*launches, (launch, given)])


def _bounds(cu_seqlens: Any, k: torch.Tensor) -> Any:
    """Without packed sequences there is no Triton to import."""
    return (None, []) if cu_seqlens is None else _packing().bounds_launches(cu_seqlens, k.shape[2])


def selection_words(left: int, right: int, num_keys: int) -> int:
    """int32 words of a row's selection: a ring of bits that fits a window; key j is bit j modulo its size.

    It does not depend on the length under a limited window, and does not branch on it under another, so that torch.compile
    and torch.export have nothing to specialize on. Up to 256 bits it grows in steps of 64, beyond in steps of 128: as many
    keys as a tile of the forward has.
    """
    window = num_keys if left < 0 or right < 0 else min(left + right + 1, MAX_CANDIDATES)
    steps = (window + 63) // 64
    beyond_256 = (steps + 11) // 16  # 0 up to 4 steps, 1 from 5 to 20, and MAX_CANDIDATES are 16
    return 2 * (steps + beyond_256 * (steps % 2))


krause = Krause()
