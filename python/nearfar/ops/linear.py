"""Linear attention and Hadamard linear attention (arXiv 2602.12128): linear attention is the case of one factor."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch

from nearfar import _cuda
from nearfar.kernels import linear_states
from nearfar.kernels.linear import linear, step
from nearfar.reference import linear as reference
from nearfar.runtime import checks, choices, dispatch, plans
from nearfar.runtime.dispatch import Backend
from nearfar.runtime.opaque import opaque
from nearfar.runtime.step import check_out, check_writes, plain_layouts
from nearfar.runtime.tensors import Layout

FeatureMap = Literal["identity", "elu", "relu", "softplus", "exp"] | Callable[[torch.Tensor], torch.Tensor]

MAX_FACTORS = 3  # that kernels take
MAX_FEATURES = 2**14  # largest prod d_r that kernels take


def _reference_attention(
    qs: Sequence[torch.Tensor],
    ks: Sequence[torch.Tensor],
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    feature_map: FeatureMap,
    normalize: bool,
    causal: bool,
    eps: float,
    return_state: bool,
) -> Any:
    return reference.hadamard_attention(
        qs, ks, v, feature_map, normalize, causal, eps, initial_state, return_state, cu_seqlens
    )


def _empty_reference(
    qs: Sequence[torch.Tensor],
    ks: Sequence[torch.Tensor],
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    feature_map: FeatureMap,
    normalize: bool,
    causal: bool,
    eps: float,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    o = v.new_empty((*qs[0].shape[:3], v.shape[3]))
    if not return_state:
        return o, v.new_empty(0)
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = sequences, v.shape[1], *[q.shape[3] for q in qs], v.shape[3] + 1
    return o, v.new_empty(shape, dtype=torch.promote_types(v.dtype, torch.float32))


_reference = opaque(
    "hadamard_attention",
    "(Tensor[] qs, Tensor[] ks, Tensor v, Tensor? initial_state, Tensor? cu_seqlens, str feature_map, bool normalize,"
    " bool causal, float eps, bool return_state) -> (Tensor, Tensor)",
    _reference_attention,
    _empty_reference,
    differentiable=2,
)


class Call(NamedTuple):
    """A checked call: the arguments that every backend takes."""

    qs: tuple[torch.Tensor, ...]
    ks: tuple[torch.Tensor, ...]
    v: torch.Tensor
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    feature_map: str
    normalize: bool
    causal: bool
    eps: float
    return_state: bool
    backends: dispatch.Backends
    plain: bool  # whether qs, ks and v are those of a plain eager call

    @property
    def q(self) -> torch.Tensor:
        return self.qs[0]


@overload
def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
    feature_map: FeatureMap = ..., normalize: bool = ..., causal: bool = ..., eps: float = ...,
    initial_state: torch.Tensor | None = ..., return_state: Literal[False] = ..., cu_seqlens: torch.Tensor | None = ...,
    backend: Backend = ...,
) -> torch.Tensor: ...
@overload
def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
    feature_map: FeatureMap = ..., normalize: bool = ..., causal: bool = ..., eps: float = ...,
    initial_state: torch.Tensor | None = ..., return_state: Literal[True], cu_seqlens: torch.Tensor | None = ...,
    backend: Backend = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
    feature_map: FeatureMap = ..., normalize: bool = ..., causal: bool = ..., eps: float = ...,
    initial_state: torch.Tensor | None = ..., return_state: bool, cu_seqlens: torch.Tensor | None = ...,
    backend: Backend = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    causal: bool = False,
    eps: float = 1e-6,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with weights phi(q_i) . phi(k_j), in time linear in the length: o_i = sum_j A_ij v_j / (sum_j A_ij + eps).

    A_ij = phi(q_i) . phi(k_j), over all keys j, or over j <= i when causal. Source: arXiv 2602.12128; it is
    `nearfar.hadamard_attention` with one factor. Query heads share key heads when Hq is a multiple of Hkv (grouped-query
    attention). Under autocast q, k and v are cast to the autocast dtype, as in scaled_dot_product_attention; the state stays
    float32. A query whose weights and eps sum to 0 returns zeros.

    Args:
        q: (B, Hq, N, D), float32, float16 or bfloat16 (float64 on the reference); any strides.
        k: (B, Hkv, M, D), dtype and device of q; M must be N when causal or packed.
        v: (B, Hkv, M, Dv), dtype and device of q.
        feature_map: phi: "identity", "elu" (elu(x) + 1), "relu", "softplus" or "exp", fused into the kernels; or a function,
            which is applied to q and k before the kernels and may change only the width.
        normalize: divide by the sum of the weights plus eps; False returns the numerator.
        causal: a query sees the keys up to its own position.
        eps: added to the denominator, not negative.
        initial_state: (B, Hkv, D, Dv + 1) float32 (float64 for float64 inputs): the state after earlier keys, which every query
            sees. It is the sum of phi(k) v^T and, in the last column, the sum of phi(k), for both values of normalize. With
            cu_seqlens it has S in place of B.
        return_state: return (o, state), with the state after the last key in the same form.
        cu_seqlens: (S + 1,) int32, the boundaries of S sequences packed along N in a batch of 1, starting with 0.
        backend: "auto", "cuda", "triton" or "reference"; `nearfar.explain` reports which one serves a call.

    Returns:
        o (B, Hq, N, Dv) in the dtype of q, or (o, state); differentiable in q, k, v and initial_state (any number of times on
        the reference).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or the backend cannot serve the call.
    """
    return _attend(
        (q,), (k,), v, False, feature_map, normalize, causal, eps, initial_state, return_state, cu_seqlens, backend
    )


@overload
def hadamard_attention(
    qs: Sequence[torch.Tensor], ks: Sequence[torch.Tensor], v: torch.Tensor, *,
    feature_map: FeatureMap = ..., normalize: bool = ..., causal: bool = ..., eps: float = ...,
    initial_state: torch.Tensor | None = ..., return_state: Literal[False] = ..., cu_seqlens: torch.Tensor | None = ...,
    backend: Backend = ...,
) -> torch.Tensor: ...
@overload
def hadamard_attention(
    qs: Sequence[torch.Tensor], ks: Sequence[torch.Tensor], v: torch.Tensor, *,
    feature_map: FeatureMap = ..., normalize: bool = ..., causal: bool = ..., eps: float = ...,
    initial_state: torch.Tensor | None = ..., return_state: Literal[True], cu_seqlens: torch.Tensor | None = ...,
    backend: Backend = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def hadamard_attention(
    qs: Sequence[torch.Tensor], ks: Sequence[torch.Tensor], v: torch.Tensor, *,
    feature_map: FeatureMap = ..., normalize: bool = ..., causal: bool = ..., eps: float = ...,
    initial_state: torch.Tensor | None = ..., return_state: bool, cu_seqlens: torch.Tensor | None = ...,
    backend: Backend = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def hadamard_attention(
    qs: Sequence[torch.Tensor],
    ks: Sequence[torch.Tensor],
    v: torch.Tensor,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    causal: bool = False,
    eps: float = 1e-6,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Linear attention whose weights are a product of R kernels: A_ij = prod_r phi(q^r_i) . phi(k^r_j).

    o_i = sum_j A_ij v_j / (sum_j A_ij + eps), over all keys j, or over j <= i when causal. Source: arXiv 2602.12128. The cost
    is O(N prod d_r Dv), or O(N^2 (sum d_r + Dv)) for shapes where that is less. Grouped heads, autocast and queries without
    weight are treated as in `nearfar.linear_attention`.

    Args:
        qs: R tensors (B, Hq, N, d_r), float32, float16 or bfloat16 (float64 on the reference); any strides.
        ks: R tensors (B, Hkv, M, d_r), dtype and device of qs[0]; M must be N when causal or packed.
        v: (B, Hkv, M, Dv), dtype and device of qs[0].
        initial_state: (B, Hkv, d_1, .., d_R, Dv + 1) float32 (float64 for float64 inputs): the state after earlier keys: the
            sum of the outer products of phi(k^1), .., phi(k^R) with v and, in the last column, with 1. With cu_seqlens it has
            S in place of B.
        feature_map, normalize, causal, eps, return_state, cu_seqlens, backend: as for `nearfar.linear_attention`. Kernels take
            up to 3 factors and prod d_r up to 16,384.

    Returns:
        o (B, Hq, N, Dv) in the dtype of qs[0], or (o, state); differentiable in qs, ks, v and initial_state (any number of
        times on the reference).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: lists, shapes, devices or values do not fit, or the backend cannot serve the call.
    """
    return _attend(
        qs, ks, v, True, feature_map, normalize, causal, eps, initial_state, return_state, cu_seqlens, backend
    )


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Decode one token with `nearfar.linear_attention` (arXiv 2602.12128): add its key to the state, then read the state.

    Args:
        q: (B, Hq, 1, D). k: (B, Hkv, 1, D). v: (B, Hkv, 1, Dv), of one dtype and device.
        state: (B, Hkv, D, Dv + 1) float32 (float64 for float64 inputs), contiguous: the state after the tokens so far, zeros
            before the first. It is updated in place, visibly to autograd, and must not share memory with another argument.
        feature_map, normalize, eps, backend: as for `nearfar.linear_attention`.
        out: where to write o: (B, Hq, 1, Dv) in the dtype of q, its last dimension contiguous; None allocates it. It must not
            overlap itself or another argument in memory.

    Returns:
        o (B, Hq, 1, Dv), which is `out` if given. Not differentiable.

    Raises:
        TypeError, ValueError: as `nearfar.linear_attention`; also for more than one token, and, while gradients are recorded,
            for a state or out that requires one.
    """
    return _step((q,), (k,), v, False, state, feature_map, normalize, eps, out, backend)


def hadamard_attention_step(
    qs: Sequence[torch.Tensor],
    ks: Sequence[torch.Tensor],
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Decode one token with `nearfar.hadamard_attention` (arXiv 2602.12128): add its keys to the state, then read the state.

    Args:
        qs: R tensors (B, Hq, 1, d_r). ks: R tensors (B, Hkv, 1, d_r). v: (B, Hkv, 1, Dv), of one dtype and device.
        state: (B, Hkv, d_1, .., d_R, Dv + 1); it and the other arguments are as for `nearfar.linear_attention_step`.

    Returns:
        o (B, Hq, 1, Dv), which is `out` if given. Not differentiable.

    Raises:
        TypeError, ValueError: as `nearfar.hadamard_attention` and `nearfar.linear_attention_step`.
    """
    return _step(qs, ks, v, True, state, feature_map, normalize, eps, out, backend)


def prepare_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    causal: bool = False,
    eps: float = 1e-6,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> Call:
    """Check the arguments of linear_attention and return its Call."""
    return _prepare(
        (q,), (k,), v, False, feature_map, normalize, causal, eps, initial_state, return_state, cu_seqlens, "initial_state"
    )


def prepare_hadamard_attention(
    qs: Sequence[torch.Tensor],
    ks: Sequence[torch.Tensor],
    v: torch.Tensor,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    causal: bool = False,
    eps: float = 1e-6,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> Call:
    """Check the arguments of hadamard_attention and return its Call."""
    return _prepare(
        qs, ks, v, True, feature_map, normalize, causal, eps, initial_state, return_state, cu_seqlens, "initial_state"
    )


def _attend(
    qs: Sequence[torch.Tensor],
    ks: Sequence[torch.Tensor],
    v: torch.Tensor,
    listed: bool,
    feature_map: FeatureMap,
    normalize: bool,
    causal: bool,
    eps: float,
    initial_state: torch.Tensor | None,
    return_state: bool,
    cu_seqlens: torch.Tensor | None,
    backend: Backend,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    repeats = None
    # No plan is cached if feature_map is a function: the operator then gets other tensors than this call's arguments.
    if type(feature_map) is str and isinstance(qs, (tuple, list)) and isinstance(ks, (tuple, list)):
        tensors = *qs, *ks, v, initial_state, cu_seqlens
        absent = initial_state is None, cu_seqlens is None
        options = len(qs), len(ks), listed, feature_map, normalize, causal, eps, return_state, absent
        repeats = plans.repeats(linear, *options, backend)
        if repeats and (plan := repeats.find(*[x for x in tensors if x is not None])):
            o, state = plan(*tensors)
            return (o, state) if return_state else o
    call = _prepare(
        qs, ks, v, listed, feature_map, normalize, causal, eps, initial_state, return_state, cu_seqlens, "initial_state"
    )
    forward, backward = call.backends.served(backend, call.v)
    if forward == "reference":
        o, state = _reference(*call[:10])
    else:
        tensors = *call.qs, *call.ks, call.v, call.initial_state, call.cu_seqlens
        o, state = linear(repeats, call.plain, tensors, *call[5:10], forward, backward)
    return (o, state) if call.return_state else o


def _step(
    qs: Sequence[torch.Tensor],
    ks: Sequence[torch.Tensor],
    v: torch.Tensor,
    listed: bool,
    state: torch.Tensor,
    feature_map: FeatureMap,
    normalize: bool,
    eps: float,
    out: torch.Tensor | None,
    backend: Backend,
) -> torch.Tensor:
    checks.meta("state", state)
    call = _prepare(qs, ks, v, listed, feature_map, normalize, True, eps, state, True, None, "state")
    q = call.qs[0]  # Dynamo of torch 2.9 cannot trace the property
    shape = (*q.shape[:3], call.v.shape[3])
    if shape[2] != 1:
        raise ValueError(f"a step takes 1 token, got q of length {shape[2]}; nearfar.hadamard_attention takes more")
    names, tensors = [*_names("q", qs, listed), *_names("k", ks, listed), "v", "state"], [*call.qs, *call.ks, call.v, state]
    num_read = len(tensors) - 1
    if out is not None:
        names, tensors = [*names, "out"], [*tensors, out]
    layouts = plain_layouts(*tensors)
    if out is not None:
        _check_out(layouts, names, tensors)
    check_writes(layouts, names, tensors, num_read)
    reasons = {**call.backends.reasons(q), "cuda": "there is no CUDA kernel of a decoding step yet"}
    chosen = dispatch.choose(backend, reasons, q.device)
    if out is None:
        out = state.new_empty(shape, dtype=call.v.dtype)  # made from the state, so that vmap maps over both
    options = call.feature_map, call.normalize, call.eps, chosen
    step(layouts is not None, list(call.qs), list(call.ks), call.v, state, out, *options)
    return out


@checks.once
def _check_out(metas: list[Layout]) -> None:
    q, v, out = metas[0], metas[-3], metas[-1]
    check_out(out, (*q.shape[:3], v.shape[3]), v.dtype, v.device)


def _prepare(
    qs: Sequence[torch.Tensor],
    ks: Sequence[torch.Tensor],
    v: torch.Tensor,
    listed: bool,
    feature_map: FeatureMap,
    normalize: bool,
    causal: bool,
    eps: float,
    initial_state: torch.Tensor | None,
    return_state: bool,
    cu_seqlens: torch.Tensor | None,
    state_name: str,
) -> Call:
    """listed: whether q and k were passed as lists; state_name: the caller's name of initial_state. Both for messages."""
    for name, factors in (("qs", qs), ("ks", ks)):
        if not isinstance(factors, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple of tensors, got {type(factors).__name__}")
    if not checks.is_number(eps):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    qs, ks, name_of_map = _map_outside(qs, ks, feature_map, listed)
    *factors, v = checks.autocast(*qs, *ks, v)
    qs, ks = tuple(factors[: len(qs)]), tuple(factors[len(qs) :])
    tensors = *qs, *ks, v
    layouts = checks.plain_layouts(*tensors)
    names = () if layouts else (*_names("q", qs, listed), *_names("k", ks, listed), "v")
    packed = cu_seqlens is not None
    backends, state_meta = _checked(layouts, names, tensors, len(qs), listed, bool(causal), packed)
    state = None if initial_state is None else checks.meta(state_name, initial_state)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, qs[0], v)
    if state is not None:
        shape, dtype, device = state_meta
        if cu_seqlens is not None:
            shape = (cu_seqlens.numel() - 1, *shape[1:])
        checks.check_exactly(state_name, state, shape, dtype, device)
    flags = bool(normalize), bool(causal), float(eps), bool(return_state)
    return Call(qs, ks, v, initial_state, cu_seqlens, name_of_map, *flags, backends, layouts is not None)


def _map_outside(
    qs: Sequence[torch.Tensor], ks: Sequence[torch.Tensor], feature_map: FeatureMap, listed: bool
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], str]:
    """qs, ks and the name of the feature map for the kernels. A callable is applied here, and "identity" remains."""
    if isinstance(feature_map, str):
        if feature_map not in reference.FEATURE_MAPS:
            accepted = ", ".join(f'"{name}"' for name in reference.FEATURE_MAPS)
            raise ValueError(f"feature_map must be {accepted} or a function, got {feature_map!r}")
        return qs, ks, feature_map
    if not callable(feature_map):
        raise TypeError(f"feature_map must be a name or a function, got {type(feature_map).__name__}")
    for name, factors in (("q", qs), ("k", ks)):
        for factor_name, factor in zip(_names(name, factors, listed), factors, strict=True):
            checks.meta(factor_name, factor)
    return tuple(map(feature_map, qs)), tuple(map(feature_map, ks)), "identity"


def _names(name: str, factors: Sequence[Any], listed: bool) -> list[str]:
    return [f"{name}s[{r}]" for r in range(len(factors))] if listed else [name]


@checks.once
def _checked(
    metas: list[Layout], num_factors: int, listed: bool, causal: bool, packed: bool = False
) -> tuple[dispatch.Backends, tuple[tuple[int, ...], torch.dtype, torch.device]]:
    """The backends for these layouts, and (shape, dtype, device) of a state."""
    qs, ks, v = metas[:num_factors], metas[num_factors:-1], metas[-1]
    if not qs:
        raise ValueError("qs must have at least one factor, got an empty list")
    if len(ks) != len(qs):
        raise ValueError(f"ks must have as many factors as qs, {len(qs)}, got {len(ks)}")
    q_names, k_names = _names("q", qs, listed), _names("k", ks, listed)
    checks.check_qkv(qs[0], ks[0], v, (q_names[0], k_names[0], "v"))
    for r in range(1, len(qs)):
        checks.check_like(q_names[r], qs[r], q_names[0], qs[0])
        checks.check_like(k_names[r], ks[r], k_names[0], ks[0])
        if ks[r].shape[3] != qs[r].shape[3]:
            raise ValueError(f"{k_names[r]} must have the width of {q_names[r]}, {qs[r].shape[3]}, got {ks[r].shape[3]}")
    if causal and qs[0].shape[2] != v.shape[2]:
        raise ValueError(f"causal needs q and k of one length, got {qs[0].shape[2]} and {v.shape[2]}")
    widths = [q.shape[3] for q in qs]
    shape = (v.shape[0], v.shape[1], *widths, v.shape[3] + 1)
    dtype = torch.promote_types(v.dtype, torch.float32)
    reason = _kernel_reason(q_names, widths, v.shape[3])
    orders = choices.orders(
        "hadamard_attention", v.device, causal=causal, factors=len(qs), value_width=int(v.shape[3])
    )
    cuda_reason = reason or _cuda.linear_reason(qs, ks, v, causal, packed)
    queries, keys = qs[0].shape[2], v.shape[2]
    if cuda_reason is None and not causal and linear_states.prefers_direct(widths, v.shape[3], queries, keys):
        cuda_reason = f"{queries} queries and {keys} keys are few enough to go pair by pair, as no CUDA kernel does"
    return dispatch.Backends(cuda_reason, reason, orders), (shape, dtype, v.device)


def _kernel_reason(names: Sequence[str], widths: Sequence[int], value_width: int) -> str | None:
    for name, width in zip(names, widths, strict=True):
        if reason := checks.kernel_width_reason(name, width, smallest=8):
            return reason
    if len(widths) > MAX_FACTORS:
        return f"qs has {len(widths)} factors; kernels take up to {MAX_FACTORS}"
    if math.prod(widths) > MAX_FEATURES:
        return f"the widths of qs multiply to {math.prod(widths)}; kernels take up to {MAX_FEATURES}"
    return checks.kernel_width_reason("v", value_width)
