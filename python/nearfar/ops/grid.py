"""Krause attention on grids: the checks and the dispatch that `nearfar.krause_attention` makes there."""

import math
from typing import NamedTuple

import torch

from nearfar import tiling
from nearfar.kernels.krause_grid import decoded, krause_grid
from nearfar.kernels.krause_window import krause_window
from nearfar.localities import Grid, ShiftedWindow, check_length, check_not_packed
from nearfar.reference.grid import krause_attention as reference_krause_attention
from nearfar.runtime import checks, dispatch, dropout, plans
from nearfar.runtime.dispatch import Backend, Ties
from nearfar.runtime.opaque import opaque
from nearfar.runtime.private import constant_while_traced

MAX_WINDOW = 1024  # cells of a window, of whose pairs the gradient of a table keeps sums
CUDA_REASON = "the CUDA kernels take windows, not grids"


class Call(NamedTuple):
    """A checked call: the tensors every backend computes with. plain: q, k and v are those of a plain eager call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sigma: torch.Tensor
    bias: torch.Tensor | None
    keep_ties: bool
    seed: torch.Tensor | None
    backends: dispatch.Backends
    plain: bool


def _decoded_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    locality: str,
    top_k: int | None,
    keep_ties: bool,
    dropout_p: float,
) -> torch.Tensor:
    return reference_krause_attention(q, k, v, sigma, decoded(locality), top_k, keep_ties, bias, seed, dropout_p)


_reference = opaque(
    "krause_attention_grid",
    "(Tensor q, Tensor k, Tensor v, Tensor sigma, Tensor? bias, Tensor? seed, str locality, int? top_k,"
    " bool keep_ties, float dropout_p) -> Tensor",
    _decoded_reference,
    lambda q, k, v, *_: q.new_empty((*q.shape[:3], v.shape[3])),
)


def krause_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: float | torch.Tensor,
    locality: Grid,
    top_k: int | None,
    ties: Ties,
    cu_seqlens: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    backend: Backend,
) -> torch.Tensor:
    """`nearfar.krause_attention` on a grid."""
    windows = isinstance(locality, ShiftedWindow)
    operator = krause_window if windows else krause_grid
    repeats = None
    if cu_seqlens is None and (windows or bias is None):  # else the call is refused
        repeats = plans.repeats(operator, locality, top_k, ties, dropout_p, bias is None, backend)
    if repeats:
        sigma = checks.parameter(sigma, q)
        given = (q, k, v, sigma, *([bias] if windows else []), seed)
        if plan := repeats.find(*[x for x in given if x is not None]):
            return plan(*given)
    call = prepare(q, k, v, sigma, locality, top_k, ties, cu_seqlens, bias, dropout_p, seed)
    q, k, v, sigma, bias, keep_ties, seed, backends, plain = call
    dropout_p = float(dropout_p)
    forward, backward = backends.served(backend, q)
    if forward == "reference":
        return _reference(q, k, v, sigma, bias, seed, locality.text, top_k, keep_ties, dropout_p)
    text = locality.text
    if windows:
        return krause_window(repeats, plain, (q, k, v, sigma, bias, seed), text, dropout_p, forward, backward)
    return krause_grid(repeats, plain, (q, k, v, sigma, seed), text, top_k, keep_ties, dropout_p, forward, backward)


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: float | torch.Tensor,
    locality: Grid,
    top_k: int | None,
    ties: Ties,
    cu_seqlens: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> Call:
    """Check the arguments of krause_attention on a grid and return its Call."""
    q, k, v = checks.autocast(q, k, v)
    checks.check_qkv(checks.meta("q", q), checks.meta("k", k), checks.meta("v", v))
    checks.check_top_k(top_k)
    checks.check_ties(ties)
    dropout.check_dropout(dropout_p)
    check_length(locality, q.shape[2], k.shape[2])
    check_not_packed(locality, cu_seqlens)
    sigma = checks.positive_per_head("sigma", sigma, q, q.shape[1])
    bias = _checked_bias(bias, locality, q)
    reason = checks.kernel_width_reason("q", q.shape[3]) or checks.kernel_width_reason("v", v.shape[3])
    reason = reason or _reason(locality, top_k is not None)
    keep_ties = ties == "keep" and top_k is not None
    plain = checks.plain_layouts(q, k, v) is not None
    return Call(q, k, v, sigma, bias, keep_ties, seed, dispatch.Backends(CUDA_REASON, reason), plain)


def _checked_bias(bias: torch.Tensor | None, locality: Grid, q: torch.Tensor) -> torch.Tensor | None:
    if bias is None:
        return None
    if not isinstance(locality, ShiftedWindow):
        raise ValueError(f"bias is a table of a ShiftedWindow's offsets; locality is a {type(locality).__name__}")
    meta = checks.meta("bias", bias)
    if meta.dtype not in checks.FLOATING:
        raise TypeError(f"bias must be float16, bfloat16, float32 or float64, got {meta.dtype}")
    if not checks.same_shape(meta.shape, (q.shape[1], locality.bias_size)):
        offsets = " x ".join(str(2 * window - 1) for window in locality.windows)
        raise ValueError(
            f"bias must have shape (Hq, {offsets}), {(int(q.shape[1]), locality.bias_size)}, got {tuple(meta.shape)}"
        )
    if meta.device != q.device:
        raise ValueError(f"bias must be on the device of q, {q.device}, got {meta.device}")
    return checks.in_dtype(bias, torch.float64 if q.dtype == torch.float64 else torch.float32).resolve_neg()


@constant_while_traced
def _reason(locality: Grid, selects: bool) -> str | None:
    """Why no kernel serves a locality, or None."""
    if isinstance(locality, ShiftedWindow):
        cells = math.prod(locality.windows)
        if cells > MAX_WINDOW:
            return f"windows of {cells} cells; kernels take at most {MAX_WINDOW}"
        return "top_k in a ShiftedWindow; its kernels do not select yet" if selects else None
    return tiling.reason(locality, selects)


