"""Krause attention on its kernels: `torch.ops.nearfar.krause_attention`."""

from typing import Any

import torch

from nearfar import _cuda
from nearfar.localities import keys_in_window
from nearfar.runtime.backend import Backend
from nearfar.runtime.operator import Operator
from nearfar.runtime.program import Program
from nearfar.runtime.tensors import empty, empty_rows, triton_module

MAX_CANDIDATES = 1024  # most keys from which a query may select its top_k

# From this head width and beyond this window, the squared norms of keys are computed once, before the attention.
SQUARES_AHEAD_WIDTH = 128
SQUARES_AHEAD_KEYS = 512


class Krause(Operator):
    """The backward reads lse (B, Hq, N) and, with top_k, bits (B, Hq, N, words), the selection. All backends save the same."""

    name = "krause_attention"
    tensors = "Tensor q, Tensor k, Tensor v, Tensor sigma, Tensor? cu_seqlens, Tensor? seed"
    options = "int left, int right, int? top_k, bool keep_ties, float dropout_p"
    rows = "q", "k", "v"
    constants = 2
    outputs = "o", "lse", "bits"

    def __init__(self) -> None:
        super().__init__()
        self.backends = {"cuda": KrauseCuda(), "triton": KrauseTriton()}

    def empty(self, tensors: Any, left: int, right: int, top_k: int | None, *_: Any) -> Any:
        q, k, v, *_ = tensors
        lse, bits = empty(q, q.shape[:3], torch.float32), None
        if top_k is not None:
            bits = empty(q, (*q.shape[:3], selection_words(left, right, k.shape[2])), torch.int32)
        return empty_rows(q, v.shape[3]), lse, bits

    def has_nothing_to_do(self, tensors: Any, outputs: Any) -> bool:
        return not outputs[0].numel() or not tensors[1].shape[2]


_packing, _launchers, _pair = triton_module("packing"), triton_module("pairwise_launch"), triton_module("krause")


class KrauseTriton(Backend):
    def forward(
        self, tensors: Any, outputs: Any, left: int, right: int, top_k: int | None, keep_ties: bool, dropout_p: float
    ) -> Program:
        """For wide heads and windows, an extra pass over k for its squares was measured to be faster (docs/notes/krause.md)."""
        q, k, v, sigma, cu_seqlens, seed = tensors
        token_bounds, launches = _bounds(cu_seqlens, k)
        bits, k_squares = outputs[2], None
        wide = k.shape[3] >= SQUARES_AHEAD_WIDTH and keys_in_window(left, right, k.shape[2]) > SQUARES_AHEAD_KEYS
        if wide and _cuda.extension is not None and k.dtype != torch.float32 and bits is None:
            k_squares = empty(k, k.shape[:3], torch.float32)
            launches.append(_cuda.row_sumsq_call(k, k_squares))
        given = q, k, v, k_squares, sigma, token_bounds, seed, left, right, top_k, keep_ties, dropout_p, *outputs
        return Program(tensors, outputs, [*launches, *_launchers().forward_launches(_pair().PAIR, *given)])

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any, left: int, right: int, _top_k: int | None,
        _keep_ties: bool, dropout_p: float,
    ) -> Program:
        *inputs, cu_seqlens, seed = tensors
        token_bounds, launches = _bounds(cu_seqlens, inputs[1])
        given = *inputs, token_bounds, seed, left, right, dropout_p, *saved, *gradients, *results[:4]
        launches += _launchers().backward_launches(_pair().PAIR, *given)
        return Program((*gradients, *tensors, *saved), results, launches)


class KrauseCuda(_cuda.CudaBackend):
    def forward(self, tensors: Any, outputs: Any, left: int, right: int, top_k: int | None, *_: Any) -> Program:
        q, k, v, sigma, cu_seqlens, _ = tensors
        o, lse, bits = outputs
        token_bounds, launches = _bounds(cu_seqlens, k)
        attend = _cuda.call(
            "krause_forward", _cuda.dtype_of(q),
            dict(q=q, k=k, v=v, sigma=sigma, token_bounds=token_bounds, o=o, lse=lse, bits=bits), "q k v o",
            **_cuda.pair_sizes(q, k), sigma_stride=_cuda.by_head(sigma), back=left, ahead=right,
            top_k=0 if top_k is None else min(top_k, _cuda.extension.KRAUSE_WINDOW),
        )
        return Program(tensors, outputs, [*launches, attend])

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any, left: int, right: int, *_: Any
    ) -> Program:
        (do,), (q, k, v, sigma, cu_seqlens, _), (o, lse, bits) = gradients, tensors, saved
        dq, dk, dv, dsigma, *_ = results
        token_bounds, launches = _bounds(cu_seqlens, k)
        # One partial sum of dsigma per strip of a head; a head has at most as many strips as tiles.
        strips = -(-max(q.shape[2], k.shape[2]) // _cuda.extension.KRAUSE_TILE)
        partials = empty(lse, (*q.shape[:2], strips))
        grad = _cuda.call(
            "krause_backward", _cuda.dtype_of(q),
            dict(
                q=q, k=k, v=v, o=o, grad_o=do, sigma=sigma, lse=lse, bits=bits, token_bounds=token_bounds,
                dq=dq, dk=dk, dv=dv, dsigma=dsigma, partials=partials,
            ),
            "q k v o grad_o dq dk dv",
            **_cuda.pair_sizes(q, k), sigma_stride=_cuda.by_head(sigma), back=left, ahead=right,
        )
        return Program((*gradients, *tensors, *saved), results, [*launches, grad])


def _bounds(cu_seqlens: Any, k: torch.Tensor) -> Any:
    """(token_bounds, launches that fill it). Without packed sequences (None, []), and Triton is not imported."""
    return (None, []) if cu_seqlens is None else _packing().bounds_launches(cu_seqlens, k.shape[2])


def selection_words(left: int, right: int, num_keys: int) -> int:
    """int32 words of a row's selection: a ring of bits at least as large as the window. Key j is bit j modulo its size.

    Under a limited window the result does not depend on the length; otherwise there is no branch on it. So torch.compile and
    torch.export do not specialise. The size is a multiple of 64 bits up to 256, and of 128 beyond, as the forward's tiles have
    that many keys.
    """
    window = num_keys if left < 0 or right < 0 else min(left + right + 1, MAX_CANDIDATES)
    steps = (window + 63) // 64
    beyond_256 = (steps + 11) // 16  # 0 up to 4 steps, 1 from 5 to 20, and MAX_CANDIDATES are 16
    return 2 * (steps + beyond_256 * (steps % 2))


krause = Krause()
