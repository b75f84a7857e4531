"""Selective synchronization attention (arXiv 2602.14445): tokens are Kuramoto oscillators that attend where they phase-lock."""

import functools
import math
from typing import Any, NamedTuple

import torch

from nearfar import _cuda
from nearfar.kernels import order_parameter as order_kernels
from nearfar.kernels.krause import MAX_CANDIDATES
from nearfar.kernels.synchronization import synchronization
from nearfar.ops.ordering import by_frequency, permute
from nearfar.reference import synchronization as reference
from nearfar.runtime import checks, choices, dispatch, plans
from nearfar.runtime.dispatch import Backend
from nearfar.runtime.opaque import opaque
from nearfar.runtime.tensors import Layout

ORDER_ROUNDING = 1e-3  # an order may exceed 1 by this much


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype in which results for x are computed."""
    return torch.promote_types(x.dtype, torch.float32)


_reference_order = opaque(
    "order_parameter",
    "(Tensor theta, bool causal) -> Tensor",
    reference.order_parameter,
    lambda theta, causal: theta.new_empty(theta.shape[:3] if causal else theta.shape[:2], dtype=_wide(theta)),
)
_reference = opaque(
    "synchronization_attention",
    "(Tensor omega, Tensor v, Tensor coupling, Tensor bandwidth, Tensor order, Tensor? omega_k, int? top_k, bool causal,"
    " float grad_floor) -> Tensor",
    reference.synchronization_attention,
    lambda omega, v, *_: omega.new_empty((*omega.shape[:3], v.shape[3])),
)
_reference_share = opaque(
    "locked_share",
    "(Tensor omega, Tensor coupling, Tensor bandwidth, Tensor order, Tensor? omega_k, bool causal) -> Tensor",
    reference.locked_share,
    lambda omega, *_: omega.new_empty(omega.shape[:2], dtype=_wide(omega)),
)


class Call(NamedTuple):
    """A checked call: the arguments that every backend takes."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor
    coupling: torch.Tensor
    bandwidth: torch.Tensor
    order: torch.Tensor
    backends: dispatch.Backends
    plain: bool  # whether q, k and v are those of a plain eager call


def order_parameter(theta: torch.Tensor, *, causal: bool = False, backend: Backend = "auto") -> torch.Tensor:
    """Agreement of oscillators in phase: r = mean over channels of |mean over tokens of exp(i theta)|, between 0 and 1.

    Source: arXiv 2602.14445. The gradient of a channel whose mean is 0 is 0.

    Args:
        theta: (B, H, N, D) phases in radians, any floating dtype, computed in float32 (float64 in float64 on the reference).
        causal: average over the tokens up to each token, so that r has one number per token.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        (B, H), or (B, H, N) when causal, float32 (float64 for float64 phases); differentiable in theta (twice on the
        reference). r is 0 if N is 0.

    Raises:
        TypeError: theta is not a floating-point tensor.
        ValueError: theta does not have 4 dimensions, or the backend cannot serve the call.
    """
    meta = checks.meta("theta", theta)
    if meta.dtype not in checks.FLOATING:
        raise TypeError(f"theta must be float16, bfloat16, float32 or float64, got {meta.dtype}")
    if len(meta.shape) != 4:
        raise ValueError(f"theta must have 4 dimensions (B, H, N, D), got shape {tuple(meta.shape)}")
    width_reason = checks.kernel_width_reason("theta", theta.shape[3])
    reasons = dispatch.Backends("there is no CUDA kernel of order_parameter yet", width_reason).reasons(theta)
    if dispatch.choose(backend, reasons, theta.device) == "reference":
        return _reference_order(theta, bool(causal))
    return order_kernels.order_parameter(theta, bool(causal))


def synchronization_attention(
    omega: torch.Tensor,
    v: torch.Tensor,
    coupling: float | torch.Tensor,
    bandwidth: float | torch.Tensor,
    order: torch.Tensor,
    *,
    omega_k: torch.Tensor | None = None,
    top_k: int | None = None,
    causal: bool = False,
    sort: bool = False,
    grad_floor: float = 1e-3,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Attention among phase-locked oscillators: o_i = sum_j S_ij v_j / (sum_j S_ij + 1e-8), without a softmax.

        S_ij = sqrt(max(0, exp(-2 alpha d_ij^2) - d_ij^2 / (K r_i)^2)),    d_ij = |omega_i - omega_j|

    Source: arXiv 2602.14445, in an equivalent form without the square root of a distance. A pair with S_ij = 0 is not locked:
    it has no weight and no gradient, and the kernels skip blocks of tokens that are farther apart than the lock radius. A query
    that locks with no key returns zeros. For small S_ij the derivative grows like 1 / S_ij; see grad_floor. With omega_k, query
    heads share key heads when Hq is a multiple of Hkv (grouped-query attention), and the distance of equal rows is 0 up to
    rounding.

    Under autocast omega, omega_k and v are cast to the autocast dtype. bfloat16 keeps 8 bits of each frequency, so distances
    below a few thousandths of |omega| are lost to rounding: where the lock radius is that small, pass float32 frequencies
    outside autocast.

    Args:
        omega: (B, Hq, N, D) natural frequencies, float32, float16 or bfloat16 (float64 on the reference); any strides.
        v: (B, Hkv, M, Dv), dtype and device of omega.
        coupling: K > 0: a float, a 0-d or a (Hq,) tensor.
        bandwidth: alpha > 0: a float, a 0-d or a (Hq,) tensor.
        order: r, between 0 and 1, as `nearfar.order_parameter` returns it: (B, Hq), or (B, Hq, N) for one r per query.
        omega_k: (B, Hkv, M, D), frequencies of the keys where they differ from the queries', as in decoding; None for omega.
        top_k: how many keys a query keeps: those of the largest S_ij, and among equal ones the smaller j; None for all that
            lock. With it, kernels take up to 1,024 keys.
        causal: a query sees the keys up to its own position. With more keys than queries, the queries are the last positions.
        sort: sort the tokens along the main direction in which their frequencies vary, so that blocks are compact and more of
            them are skipped; the output is in the order of the input. Not with causal, omega_k or top_k. It pays where few
            pairs lock and locked tokens are far apart in the sequence.
        grad_floor: positive. Derivatives divide by max(S_ij, grad_floor) instead of S_ij, so that they stay finite at the lock
            boundary.
        backend: "auto", "cuda", "triton" or "reference"; `nearfar.explain` reports which one serves a call. With causal, or
            with one r per query, Triton's kernels compute the gradients of "cuda".

    CUDA tensors of coupling, bandwidth and order are not checked, as that would stall the stream: values out of range make the
    outputs of their tokens NaN.

    Returns:
        (B, Hq, N, Dv) in the dtype of omega, differentiable in omega, v, omega_k, order and, where they are tensors, coupling
        and bandwidth (twice on the reference).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, the backend cannot serve the call, or order is (B, Hq) with causal:
            later tokens would leak through it.
    """
    # No plan is cached with sort: the operator then gets other tensors than this call's arguments.
    repeats = None if sort else plans.repeats(synchronization, omega_k is None, top_k, causal, grad_floor, backend)
    if repeats:
        coupling, bandwidth = (checks.parameter(number, omega) for number in (coupling, bandwidth))
        given = omega, omega_k, v, coupling, bandwidth, order
        if plan := repeats.find(*[x for x in given if x is not None]):
            return plan(*given)
    call = prepare(
        omega, v, coupling, bandwidth, order,
        omega_k=omega_k, top_k=top_k, causal=causal, sort=sort, grad_floor=grad_floor,
    )
    tensors: list[Any]
    *tensors, backends, plain = call
    forward, backward = backends.served(backend, call.q)
    if sort:
        permutation, inverse = by_frequency(call.q)
        tensors[0], tensors[2] = permute(call.q, permutation, inverse), permute(call.v, permutation, inverse)
        if call.order.dim() == 3:
            tensors[5] = permute(call.order[..., None], permutation, inverse)[..., 0]
    if forward == "reference":
        q, k, v, *parameters = tensors
        o = _reference(q, v, *parameters, k, top_k, bool(causal), float(grad_floor))
    else:
        o = synchronization(repeats, plain, tensors, bool(causal), top_k, float(grad_floor), forward, backward)
    return permute(o, inverse, permutation) if sort else o


def locked_share(
    omega: torch.Tensor,
    coupling: float | torch.Tensor,
    bandwidth: float | torch.Tensor,
    order: torch.Tensor,
    *,
    omega_k: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Share of the token pairs that lock in `nearfar.synchronization_attention` (arXiv 2602.14445).

    It counts the pairs of different tokens that causality allows, or all pairs with omega_k. If the share is near 0, the
    operator returns v, as at the paper's defaults with heads of 64; smaller frequencies, a smaller bandwidth or a larger
    coupling raise it. Plain PyTorch in blocks of rows, at a cost of N^2: for inspecting a model, not for its training loop.

    Args:
        omega, coupling, bandwidth, order, omega_k, causal: as for `nearfar.synchronization_attention`.

    Returns:
        (B, Hq) float32 (float64 for float64 inputs), without gradient.

    Raises:
        TypeError, ValueError: as `nearfar.synchronization_attention`.
    """
    keys = omega if omega_k is None else omega_k
    call = prepare(omega, keys, coupling, bandwidth, order, omega_k=omega_k, causal=causal)
    with torch.no_grad():
        return _reference_share(call.q, call.coupling, call.bandwidth, call.order, call.k, bool(causal))


def prepare(
    omega: torch.Tensor,
    v: torch.Tensor,
    coupling: float | torch.Tensor,
    bandwidth: float | torch.Tensor,
    order: torch.Tensor,
    *,
    omega_k: torch.Tensor | None = None,
    top_k: int | None = None,
    causal: bool = False,
    sort: bool = False,
    grad_floor: float = 1e-3,
) -> Call:
    """Check the arguments of synchronization_attention and return its Call."""
    if omega_k is None:
        omega, v = checks.autocast(omega, v)
    else:
        omega, omega_k, v = checks.autocast(omega, omega_k, v)
    checks.check_top_k(top_k)
    _check_grad_floor(grad_floor)
    if sort and (causal or omega_k is not None or top_k is not None):
        raise ValueError("sort orders tokens that all see each other: it goes with neither causal, omega_k nor top_k")
    tensors = (omega, v) if omega_k is None else (omega, v, omega_k)
    layouts = checks.plain_layouts(*tensors)
    checks.check_tensor("order", order)
    symmetric = not causal and order.dim() == 2
    backends = _checked(layouts, ("omega", "v", "omega_k")[: len(tensors)], tensors, top_k, symmetric)
    heads = omega.shape[1]
    coupling = checks.positive_per_head("coupling", coupling, omega, heads)
    bandwidth = checks.positive_per_head("bandwidth", bandwidth, omega, heads)
    return Call(omega, omega_k, v, coupling, bandwidth, _order(order, omega, causal), backends, layouts is not None)


@checks.once
def _checked(metas: list[Layout], top_k: int | None, symmetric: bool) -> dispatch.Backends:
    """The backends for these layouts. symmetric: whether S is symmetric; if not, Triton computes the gradients."""
    omega, v, separate = metas[0], metas[1], len(metas) > 2
    keys, key_name = (metas[2], "omega_k") if separate else (omega, "omega")
    checks.check_qkv(omega, keys, v, names=("omega", key_name, "v"))
    reason = checks.kernel_width_reason("omega", omega.shape[3]) or checks.kernel_width_reason("v", v.shape[3])
    forward, backward = choices.orders("synchronization_attention", v.device, value_width=int(v.shape[3]))
    orders = forward, backward if symmetric else dispatch.TRITON_FIRST
    cuda_reason = reason or _cuda.synchronization_reason(omega, v, separate, top_k)
    return dispatch.Backends(cuda_reason, reason, orders, functools.partial(_candidates_reason, keys.shape[2], top_k))


def _candidates_reason(num_keys: int, top_k: int | None) -> str | None:
    if top_k is not None and num_keys > MAX_CANDIDATES:
        return f"top_k over {num_keys} candidate keys a query; kernels take at most {MAX_CANDIDATES}"
    return None


def _check_grad_floor(grad_floor: float) -> None:
    if not checks.is_number(grad_floor) or isinstance(grad_floor, bool):
        raise TypeError(f"grad_floor must be a number, got {type(grad_floor).__name__}")
    if not 0 < grad_floor < math.inf:
        raise ValueError(f"grad_floor must be positive and finite, got {grad_floor}")


def _order(order: torch.Tensor, omega: torch.Tensor, causal: bool) -> torch.Tensor:
    """Check order and convert it to float32 (float64 for float64 omega)."""
    rows = omega.shape[:3]
    if order.dtype not in checks.FLOATING:
        raise TypeError(f"order must be float16, bfloat16, float32 or float64, got {order.dtype}")
    if not (checks.same_shape(order.shape, rows) or checks.same_shape(order.shape, rows[:2])):
        raise ValueError(f"order must have shape (B, Hq), {tuple(rows[:2])}, or (B, Hq, N), got {tuple(order.shape)}")
    if order.device != omega.device:
        raise ValueError(f"order must be on the device of omega, {omega.device}, got {order.device}")
    if causal and order.dim() == 2:
        raise ValueError(
            "order of shape (B, Hq) comes from all tokens: with causal=True, later tokens would leak into earlier ones. "
            "Pass nearfar.order_parameter(theta, causal=True), of shape (B, Hq, N), or, where the order is known to hold "
            "nothing of later tokens, order[..., None].expand(B, Hq, N)"
        )
    if order.is_cpu and checks.has_values(order) and order.numel():
        low, high = order.detach().aminmax()
        if not (low >= 0 and high <= 1 + ORDER_ROUNDING):
            raise ValueError(f"order must be between 0 and 1, got {low.item()} to {high.item()}")
    return checks.in_dtype(order, torch.float64 if omega.dtype == torch.float64 else torch.float32).resolve_neg()
