"""Linear and Hadamard linear attention in plain PyTorch (arXiv 2602.12128): differentiable any number of times, O(N) memory.

With x_r = phi(q_r), y_r = phi(k_r) and a 1 appended to every v_j,

    o_i = sum_j prod_r (x_r,i . y_r,j) v_j = <x_1,i (x) .. (x) x_R,i, S>,    S = sum_j y_1,j (x) .. (x) y_R,j (x) v_j

and the last column of the result divides the others. Autograd would save the N x prod d_r products of both sides for the
backward. But the sums are multilinear, so their derivatives are sums of the same kind with the factors exchanged. Each sum is
therefore an autograd function whose backward calls such functions again and which saves only its arguments.
"""

import functools
import math

import torch
from torch.nn.functional import softplus

from nearfar.reference import pairwise
from nearfar.reference.pairwise import sequence_lengths, split_rows
from nearfar.runtime.library import map_batched_gradients
from nearfar.runtime.private import is_legacy_batchedtensor

FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),  # literally, elu(x) + 1 would round small values to 0
    "relu": torch.relu,
    "softplus": softplus,
    "exp": torch.exp,
}


def hadamard_attention(
    qs, ks, v, feature_map="elu", normalize=True, causal=False, eps=1e-6,
    initial_state=None, return_state=False, cu_seqlens=None,
):
    """Reference of `nearfar.hadamard_attention`.

    Args:
        qs: R tensors (B, Hq, N, d_r). ks: R tensors (B, Hkv, M, d_r). v: (B, Hkv, M, Dv).
        feature_map: a name of FEATURE_MAPS.
        initial_state: (B, Hkv, d_1, .., d_R, Dv + 1), the state after earlier keys; with cu_seqlens, one per sequence.
        cu_seqlens: (S + 1,) ends of packed sequences, None for one sequence.

    Returns:
        o (B, Hq, N, Dv) in the dtype of q, and the state after the last key or None. Half precision is computed in float32.
        Rows whose weights and eps sum to 0 are 0.
    """
    xs, ys, values = _features(qs, ks, v, feature_map)
    lengths = [sequence_lengths(tensor.shape[-2], cu_seqlens) for tensor in (qs[0], v)]
    # Split, not sliced: the gradient of a slice has the size of the whole tensor.
    sequences = [
        zip(*(tensor.split(length, -2) for tensor in tensors), strict=True)
        for tensors, length in ((xs, lengths[0]), (ys, lengths[1]), ((values,), lengths[1]))
    ]
    states = None if initial_state is None else initial_state.split(len(values), 0)
    outputs, final = [], []
    for index, (x, y, (value,)) in enumerate(zip(*sequences, strict=True)):
        o, state = _one_sequence(x, y, value, None if states is None else states[index], causal, return_state)
        outputs.append(o)
        final.append(state)
    o = _normalize(torch.cat(outputs, -2), normalize, eps).flatten(1, 2).to(v.dtype)
    return o, torch.cat(final) if return_state else None


def step(qs, ks, v, state, feature_map="elu", normalize=True, eps=1e-6):
    """One token: add its key to `state` in place and return o (B, Hq, 1, Dv); no gradient."""
    with torch.no_grad():
        xs, ys, values = _features(qs, ks, v, feature_map)
        state += _apply(Build, *(y[:, :, 0] for y in ys), values[:, :, 0])
        return _normalize(_read(state, xs), normalize, eps).flatten(1, 2).to(v.dtype)


def direct_is_cheaper(num_queries, num_keys, widths):
    """Whether pairs of rows cost less than a state; widths: d_1, .., d_R and that of the values."""
    return num_queries * num_keys * sum(widths) <= (num_queries + num_keys) * math.prod(widths)


def _features(qs, ks, v, feature_map):
    """x_r (B, Hkv, group, N, d_r), y_r (B, Hkv, 1, M, d_r) and v with its 1 (B, Hkv, 1, M, Dv + 1)."""
    compute = torch.promote_types(v.dtype, torch.float32)
    phi = FEATURE_MAPS[feature_map]
    heads = v.shape[1]
    xs = [phi(q.to(compute)).unflatten(1, (heads, q.shape[1] // heads)) for q in qs]
    ys = [phi(k.to(compute))[:, :, None] for k in ks]
    return xs, ys, torch.nn.functional.pad(v.to(compute), (0, 1), value=1.0)[:, :, None]


def _one_sequence(xs, ys, values, state, causal, return_state):
    """The unnormalised o (B, Hkv, group, N, Dv + 1), and the state after the last key if requested."""
    by_pairs = causal or direct_is_cheaper(xs[0].shape[-2], values.shape[-2], [y.shape[-1] for y in (*ys, values)])
    o = _apply(Pairs, int(causal), *xs, *ys, values) if by_pairs else 0
    if by_pairs and state is not None:
        o = o + _read(state, xs)
    if return_state or not by_pairs:
        built = _apply(Build, *(y[:, :, 0] for y in ys), values[:, :, 0])
        state = built if state is None else state + built
    return o if by_pairs else _read(state, xs), state


def _read(state, xs):
    """<x_1,i (x) .. (x) x_R,i, state>. The heads of a group are additional rows for the same state."""
    return _apply(Contract, state, *(x.flatten(2, 3) for x in xs)).unflatten(2, xs[0].shape[2:4])


def _normalize(o, normalize, eps):
    if not normalize:
        return o[..., :-1]
    total = o[..., -1:] + eps
    return o[..., :-1] / total.masked_fill(total == 0, float("inf"))


def _product(factors):
    """Face-splitting product of (.., n, d_r): (.., n, prod d_r)."""
    return functools.reduce(lambda left, right: (left[..., None] * right[..., None, :]).flatten(-2), factors)


def _contract(state, first, *rest):
    """Contract with the first factor after the others: shorter sums have smaller rounding errors."""
    if not rest:
        return first @ state
    by_first = _product(rest)[:, :, None] @ state.flatten(3, -2)
    return (first[..., None, :] @ by_first.transpose(2, 3)).squeeze(-2)


def _chunks(tensors):
    return zip(*split_rows(*tensors), strict=True)


def _without(items, index):
    return (*items[:index], *items[index + 1 :])


def _apply(function, *arguments):
    """function.apply, or function.forward if no gradient is needed, as Dynamo miscounts the arguments of apply then."""
    tracked = torch.is_grad_enabled() and any(getattr(argument, "requires_grad", False) for argument in arguments)
    evaluate = function.apply if tracked else function.forward
    if any(isinstance(argument, torch.Tensor) and is_legacy_batchedtensor(argument) for argument in arguments):
        return map_batched_gradients(evaluate, *arguments)  # the legacy vmap has no rules for most views
    return evaluate(*arguments)


class Build(torch.autograd.Function):
    """Factors (B, H, n, d_1), .., (B, H, n, d_m) -> their sum of outer products over n, (B, H, d_1, .., d_m)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*factors):
        state = sum(_product(chunk[:-1]).mT @ chunk[-1] for chunk in _chunks(factors))
        return state.unflatten(2, [factor.shape[-1] for factor in factors[:-1]])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dstate):
        factors = ctx.saved_tensors
        return tuple(
            _apply(Contract, dstate.movedim(2 + r, -1), *_without(factors, r)) if needed else None
            for r, needed in enumerate(ctx.needs_input_grad)
        )


class Contract(torch.autograd.Function):
    """State (B, H, d_1, .., d_m, c) and factors (B, H, n, d_1), .., (B, H, n, d_m) -> (B, H, n, c)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(state, *factors):
        return torch.cat([_contract(state, *chunk) for chunk in _chunks(factors)], -2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, do):
        state, *factors = ctx.saved_tensors
        needs_state, *needs_factors = ctx.needs_input_grad
        return _apply(Build, *factors, do) if needs_state else None, *(
            _apply(Contract, state.movedim(2 + r, -1), *_without(factors, r), do) if needed else None
            for r, needed in enumerate(needs_factors)
        )


class Pairs(torch.autograd.Function):
    """sum_j prod_r (x_r,i . y_r,j) v_j over all j (direction 0), j <= i (1) or j >= i (-1), and over the groups of keys.

    x_r: (B, H, G, N, d_r), y_r: (B, H, K, M, d_r), v: (B, H, K, M, c) -> (B, H, G, N, c).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(direction, *tensors):
        if direction >= 0:
            return _pairs(bool(direction), *tensors)
        return _pairs(True, *(tensor.flip(-2) for tensor in tensors)).flip(-2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.direction = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, do):
        *factors, v = ctx.saved_tensors
        count = len(factors) // 2
        xs, ys, direction = factors[:count], factors[count:], ctx.direction
        gradients = [
            *(lambda r=r: _apply(Pairs, direction, *_without(xs, r), do, *_without(ys, r), v, ys[r]) for r in range(count)),
            *(lambda r=r: _apply(Pairs, -direction, *_without(ys, r), v, *_without(xs, r), do, xs[r]) for r in range(count)),
            lambda: _apply(Pairs, -direction, *ys, *xs, do),
        ]
        needed = ctx.needs_input_grad[1:]
        return None, *(gradient() if need else None for gradient, need in zip(gradients, needed, strict=True))


def _pairs(causal, *tensors):
    """Forward of Pairs, by chunks of queries, over all keys; when causal, over the chunk's keys and a state of earlier ones."""
    count = len(tensors) // 2
    (groups, num_queries), (key_groups, num_keys) = tensors[0].shape[2:4], tensors[-1].shape[2:4]
    by_state = causal and not direct_is_cheaper(num_queries, num_keys, [t.shape[-1] for t in tensors[count:]])
    outputs, state = [], None
    for start in range(0, max(num_queries, 1), pairwise.CHUNK):
        stop = min(start + pairwise.CHUNK, num_queries)
        keys = slice(start if by_state else 0, stop if causal else num_keys)
        xs = [x[..., start:stop, :].flatten(2, 3) for x in tensors[:count]]
        *ys, v = [y[..., keys, :].flatten(2, 3) for y in tensors[count:]]
        weights = functools.reduce(torch.mul, [x @ y.mT for x, y in zip(xs, ys, strict=True)])
        if causal:
            visible = torch.ones(stop - start, keys.stop - keys.start, dtype=torch.bool, device=v.device)
            weights = weights.where(visible.tril(start - keys.start).repeat(groups, key_groups), 0)
        o = weights @ v
        if by_state:
            if state is not None:
                o = o + _product(xs) @ state  # not in place, for vmap
            state = _product(ys).mT @ v + (0 if state is None else state)
        outputs.append(o.unflatten(2, (groups, stop - start)))
    return torch.cat(outputs, -2)
