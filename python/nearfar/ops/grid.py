"""Krause attention on grids: the torch operators, and the checks that `nearfar.krause_attention` makes there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nearfar import checks, dispatch, tiling
from nearfar.localities import Grid, GridNeighborhood, ShiftedWindow, check_length
from nearfar.ops.opaque import opaque
from nearfar.ops.pairwise import empty_gradients, no_bits
from nearfar.ops.program import Program
from nearfar.ops.torch_operator import empty_rows, kernels, layouts, planned, register, unit_stride, uses_tf32
from nearfar.reference.grid import krause_attention as reference_krause_attention
from nearfar.runtime.private import constant_while_traced

CUDA_REASON = "the CUDA kernels take windows, not grids"


class Call(NamedTuple):
    """A checked call: the tensors every backend computes with."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sigma: torch.Tensor
    bias: torch.Tensor | None
    backends: dispatch.Backends


def krause_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: float | torch.Tensor,
    locality: Grid,
    top_k: int | None,
    cu_seqlens: torch.Tensor | None,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """`nearfar.krause_attention` on a grid."""
    call = prepare(q, k, v, sigma, locality, top_k, cu_seqlens, bias)
    forward, _ = call.backends.served(backend, call.q)
    if forward == "reference":
        return _reference(call.q, call.k, call.v, call.sigma, call.bias, numbers_of(locality), top_k)
    q, k, v = map(unit_stride, (call.q, call.k, call.v))
    return torch.ops.nearfar.krause_attention_grid(q, k, v, call.sigma, numbers_of(locality), top_k)[0]


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: float | torch.Tensor,
    locality: Grid,
    top_k: int | None,
    cu_seqlens: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> Call:
    """Check the arguments of krause_attention on a grid and return its Call."""
    q, k, v = checks.autocast(q, k, v)
    metas = list(map(checks.meta, "qkv", (q, k, v)))
    checks.check_qkv(*metas)
    checks.check_top_k(top_k)
    check_length(locality, q.shape[2], k.shape[2])
    if cu_seqlens is not None:
        raise ValueError(f"cu_seqlens: a {type(locality).__name__} is one grid a batch element; grids cannot be packed")
    sigma = checks.positive_per_head("sigma", sigma, q, q.shape[1])
    bias = _checked_bias(bias, locality, q)
    reason = checks.kernel_width_reason("q", q.shape[3]) or checks.kernel_width_reason("v", v.shape[3])
    reason = reason or _reason(locality, top_k is not None)
    return Call(q, k, v, sigma, bias, dispatch.Backends(CUDA_REASON, reason))


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
    return bias


@constant_while_traced
def _reason(locality: Grid, selects: bool) -> str | None:
    """Why no kernel serves a locality, or None."""
    if isinstance(locality, ShiftedWindow):
        return "no kernel serves a ShiftedWindow yet"
    return tiling.reason(locality, selects)


# ---------------------------------------------------------------------------------------------------- localities in schemas


def numbers_of(locality: Grid) -> list[int]:
    """A locality as the integers that the schema of an operator takes; `locality_of` reads them."""
    if isinstance(locality, ShiftedWindow):
        return [*locality.shape, *locality.windows, *locality.shifts]
    manhattan = int(locality.metric == "manhattan")
    return [*locality.shape, *locality.radii, *locality.dilations, manhattan, locality.global_tokens]


def locality_of(numbers: Sequence[int]) -> Grid:
    """The locality of these numbers."""
    axes, rest = divmod(len(numbers), 3)
    shape, first, second = (tuple(numbers[i * axes : (i + 1) * axes]) for i in range(3))
    if not rest:
        return ShiftedWindow(shape, first, second)
    return GridNeighborhood(shape, first, ("chebyshev", "manhattan")[numbers[-2]], numbers[-1], second)


def _reference_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: torch.Tensor,
    bias: torch.Tensor | None,
    numbers: Sequence[int],
    top_k: int | None,
) -> torch.Tensor:
    return reference_krause_attention(q, k, v, sigma, locality_of(numbers), top_k, bias)


_reference = opaque(
    "krause_attention_grid",
    "(Tensor q, Tensor k, Tensor v, Tensor sigma, Tensor? bias, int[] locality, int? top_k) -> Tensor",
    _reference_of,
    lambda q, k, v, *_: q.new_empty((*q.shape[:3], v.shape[3])),
)

# ------------------------------------------------------------------------------------------------------ the torch operator

_launch, _krause = kernels("grid_launch"), kernels("krause")


def _empty_outputs(q: Any, v: Any, numbers: Sequence[int], top_k: int | None) -> tuple[Any, Any, Any]:
    """o, lse and bits, not filled; bits None without top_k."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if top_k is None:
        return empty_rows(q, v.shape[3]), lse, None
    locality = locality_of(numbers)
    assert isinstance(locality, GridNeighborhood)  # no kernel serves others
    words = tiling.geometry_of(locality).words_per_head
    return empty_rows(q, v.shape[3]), lse, q.new_empty((*q.shape[:2], words), dtype=torch.int32)


@planned
def _plan_forward(q: Any, k: Any, v: Any, sigma: Any, numbers: Sequence[int], top_k: int | None, _tf32: bool) -> Program:
    """The program of (o, lse, bits)."""
    inputs, outputs = (q, k, v, sigma), _empty_outputs(q, v, numbers, top_k)
    if not outputs[0].numel():
        return Program(inputs, outputs, ())
    launches = _launch().forward_launches(_krause().PAIR, *inputs, locality_of(numbers), top_k, *outputs)
    return Program(inputs, outputs, launches)


@planned
def _plan_backward(
    do: Any, q: Any, k: Any, v: Any, sigma: Any, o: Any, lse: Any, bits: Any, numbers: Sequence[int], _tf32: bool
) -> Program:
    """The program of (dq, dk, dv, dsigma)."""
    inputs, gradients = (do, q, k, v, sigma, o, lse, bits), empty_gradients(q, k, v, sigma)
    if not o.numel():
        return Program(inputs, gradients, ())
    launches = _launch().backward_launches(
        _krause().PAIR, q, k, v, sigma, locality_of(numbers), o, do, lse, bits, *gradients
    )
    return Program(inputs, gradients, launches)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor, numbers: Sequence[int], top_k: int | None
) -> tuple[Any, ...]:
    tensors = q, k, v, sigma
    o, lse, bits = _plan_forward(layouts(*tensors), tuple(numbers), top_k, uses_tf32(q))(*tensors)
    return o, lse, no_bits(q) if bits is None else bits


def _fake_forward(q: Any, k: Any, v: Any, sigma: Any, numbers: Sequence[int], top_k: int | None) -> tuple[Any, ...]:
    o, lse, bits = _empty_outputs(q, v, numbers, top_k)
    return o, lse, no_bits(q) if bits is None else bits


def _backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    bits: torch.Tensor,
    numbers: Sequence[int],
    top_k: int | None,
) -> tuple[Any, ...]:
    tensors = unit_stride(do), q, k, v, sigma, o, lse, None if top_k is None else bits
    return tuple(_plan_backward(layouts(*tensors), tuple(numbers), uses_tf32(q))(*tensors))


def _fake_backward(do: Any, q: Any, k: Any, v: Any, sigma: Any, *_: Any) -> tuple[Any, ...]:
    return empty_gradients(q, k, v, sigma)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, numbers, top_k = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.options = numbers, top_k


def _autograd(ctx: Any, do: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    gradients = torch.ops.nearfar.krause_attention_grid_backward(do, *ctx.saved_tensors, *ctx.options)
    return *gradients, [None] * len(ctx.options[0]), None


register(
    "krause_attention_grid",
    (
        "(Tensor q, Tensor k, Tensor v, Tensor sigma, int[] locality, int? top_k) -> (Tensor, Tensor, Tensor)",
        _forward,
        _fake_forward,
    ),
    (
        "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor sigma, Tensor o, Tensor lse, Tensor bits, int[] locality, int? top_k)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
    ),
    _autograd,
    _save,
    "krause_attention",
)
