"""The streamed diagnostics as torch operators: schema, fake and autograd.

Eager calls use the dispatcher too: diagnostics run rarely, so its microseconds do not matter. The last dimension of q, k and v
must be contiguous.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from nearfar import _cuda
from nearfar.reference.affine import window_sums
from nearfar.runtime.library import define, register
from nearfar.runtime.tensors import device_of, empty_rows, tf32_allowed, triton_module

_STATISTICS = (
    "(Tensor q, Tensor k, Tensor? sigma, Tensor? alpha, Tensor? beta, Tensor? sink, int left, int right, float scale,"
    ' str backend="triton") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)'
)
_STATISTICS_BACKWARD = (
    "(Tensor dlse, Tensor dentropy, Tensor q, Tensor k, Tensor? sigma, Tensor lse, Tensor entropy, int left, int right,"
    " float scale) -> (Tensor, Tensor, Tensor)"
)
_ENTROPY = (
    "(Tensor q, Tensor k, Tensor? sigma, Tensor alpha, Tensor beta, Tensor lse, int left, int right, float scale)"
    " -> (Tensor, Tensor)"
)
_ENTROPY_BACKWARD = (
    "(Tensor dentropy, Tensor q, Tensor k, Tensor? sigma, Tensor alpha, Tensor beta, Tensor lse, Tensor entropy, Tensor total,"
    " int left, int right, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_GEOMETRY = (
    '(Tensor q, Tensor k, Tensor v, Tensor? sigma, int top_n, int left, int right, float scale, str backend="triton")'
    " -> (Tensor, Tensor, Tensor)"
)

# The backward scales upstream gradients so that the largest is between 2^10 and 2^11. Unscaled, weights of long rows and
# gradients of a mean over many rows would underflow in float16. |P log2(P)| and the entropy are at most 20 together, so scaled
# products do not overflow.
UPSTREAM_EXPONENT = 11

SUMMED_AT_ONCE = 2**19  # numbers of a head's keys whose sums are in memory at once, if that is more than 4 columns


_launchers = triton_module("diagnostics_launch")


def _per_query(q, count, dtype=torch.float32):
    return tuple(q.new_empty(q.shape[:3], dtype=dtype) for _ in range(count))


def _squares(x, wanted=True):
    """The workspace for the squared norms of rows, or None."""
    return x.new_empty(x.shape[:3], dtype=torch.float32) if wanted else None


def _empty_statistics(q, k, *_):
    """Uninitialised lse, entropy, max_weight, max_key, key_mass, mean_logit and weight_sum."""
    mass = q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    return *_per_query(q, 3), *_per_query(q, 1, torch.int64), mass, *_per_query(q, 2)


def _common(q, sigma):
    """-|q|^2 / (2 sigma^2), which kernels omit from scores by distance; 0 for dot products and for exact float32 calls."""
    if sigma is None or q.dtype == torch.float32 and not tf32_allowed(q.dtype):
        return 0.0
    return torch.linalg.vector_norm(q, dim=-1, dtype=torch.float32).square() / (-2 * sigma[:, None].square())


def _gain(key_heads, *gradients):
    """(B, Hkv) powers of two that scale the gradients (B, Hq, N) to just below 2^UPSTREAM_EXPONENT.

    There is one per key head, because dk sums over its queries. So no other head or batch element changes a bit of a head's
    gradients, and values that are not finite stay in their row.
    """
    largest = [x.abs().nan_to_num(0, 0, 0).unflatten(1, (key_heads, -1)).amax((2, 3)) for x in gradients]
    exponent = torch.frexp(functools.reduce(torch.maximum, largest)).exponent
    # The bits of a float32, clamped so that its inverse is a normal number too.
    return (127 + UPSTREAM_EXPONENT - exponent).clamp(1, 253).bitwise_left_shift(23).view(torch.float32)


def statistics(
    q: Tensor, k: Tensor, sigma: Tensor | None, alpha: Tensor | None, beta: Tensor | None, sink: Tensor | None,
    left: int, right: int, scale: float, backend: str = "triton",
) -> tuple[Tensor, ...]:
    """(lse, entropy, max_weight, max_key, key_mass, mean_logit, weight_sum), lse and entropy without alpha, beta and sink.

    backend: "triton" or "cuda", which knows none of these three; the gradients are Triton's.
    """
    outputs = lse, entropy, max_weight, max_key, mass, mean_logit, weight_sum = _empty_statistics(q, k)
    if not q.numel():
        mass.zero_()
        return outputs
    if backend == "cuda":
        _statistics_in_cuda(q, k, left, right, scale, lse, entropy, max_weight, max_key, mass)
        share: Any = lse - lse  # NaN where lse is
    else:
        squares, common = _squares(k, sigma is not None), _common(q, sigma)
        with device_of(q):
            _launchers().statistics(q, k, sigma, left, right, scale, squares, lse, entropy, max_weight, max_key)
            lse.add_(common)
            of_all = lse if sink is None else torch.logaddexp(lse, sink[:, None])
            _launchers().key_mass(q, k, sigma, left, right, scale, squares, of_all - common, _contiguous(alpha), mass)
        share = lse - of_all
    share = share.exp_()  # of the keys in the softmax, as the sink has the rest
    max_weight.mul_(share)
    weight_sum.copy_(share)
    if alpha is not None:
        max_weight.mul_(alpha)
        weight_sum.mul_(alpha)
    if beta is not None:
        max_weight.add_(beta)
        weight_sum.add_(beta * _keys_seen(q, k, left, right))
        mass.add_(window_sums(beta[..., None], k.shape[2], right, left)[..., 0])  # of the queries that see a key
    mean_logit.copy_(_mean_logits(q, k, sigma, left, right, scale))
    mean_logit.masked_fill_(lse.isnan(), math.nan)
    return outputs


def _contiguous(x):
    return None if x is None else x.contiguous()


def _keys_seen(q, k, left, right):
    """(N,) how many keys each query sees."""
    first, end = _seen(q, k, left, right)
    return end - first


def _mean_logits(q, k, sigma, left, right, scale):
    """(B, Hq, N): the mean score of the keys that a query sees, from the sums of these keys instead of from pairs.

    A few columns at a time, so that the sums take no more memory than the tensors; how many depends on no other head.
    """
    wide = torch.float64 if sigma is not None or q.dtype == torch.float32 else torch.float32
    group, num_queries, count = q.shape[1] // k.shape[1], q.shape[2], _keys_seen(q, k, left, right)
    products, norms = torch.zeros_like(q[..., 0], dtype=wide), 0.0
    columns = max(4, SUMMED_AT_ONCE // k.shape[2])
    for own, seen in zip(q.split(columns, 3), k.split(columns, 3), strict=True):
        seen = seen.to(wide)
        sums = window_sums(seen, num_queries, left, right)
        products += (own.unflatten(1, (-1, group)) * sums[:, :, None]).sum(-1).flatten(1, 2)
        if sigma is not None:
            norms = norms + window_sums(seen.square().sum(-1, keepdim=True), num_queries, left, right)
    if sigma is None:
        return products * scale / count
    norms = norms[..., 0].repeat_interleave(group, 1)
    distances = q.to(wide).square().sum(-1) + (norms - 2 * products) / count
    return -0.5 * distances / sigma.to(wide)[:, None].square()


def statistics_backward(
    dlse: Tensor, dentropy: Tensor, q: Tensor, k: Tensor, sigma: Tensor | None, lse: Tensor, entropy: Tensor,
    left: int, right: int, scale: float,
) -> tuple[Tensor, ...]:
    """(dq, dk, dsigma): dS = P (dlse - dentropy (log P + entropy)); an empty dsigma without a sigma."""
    dq, dk, dsigma = _fake_backward(dlse, dentropy, q, k, sigma)
    if not q.numel():
        return dq, dk.zero_(), dsigma.zero_()
    dlse, dentropy = dlse.contiguous(), dentropy.contiguous()  # kernels read (B, Hq, N) without strides
    gain = _gain(k.shape[1], dlse, dentropy)
    of_rows = gain.repeat_interleave(q.shape[1] // k.shape[1], 1)[..., None]
    level, slope = of_rows * (dlse - dentropy * entropy), -math.log(2) * of_rows * dentropy
    weighted = None if sigma is None else torch.empty_like(lse)
    with device_of(q):
        _launchers().statistics_backward(
            q, k, sigma, left, right, scale, _squares(k, sigma is not None), lse - _common(q, sigma), level, slope, gain,
            dq, dk, weighted,
        )
    return dq, dk, dsigma if sigma is None else _of_sigma(sigma, weighted / of_rows)


def _of_sigma(sigma, weighted):
    """The gradient of sigma. weighted (B, Hq, N): sums of dS times the distances that are scores by sigma^-2."""
    of_distances = weighted.sum((0, 2))
    return -2 / sigma**3 * (of_distances if sigma.numel() > 1 else of_distances.sum())


def shifted_entropy(
    q: Tensor, k: Tensor, sigma: Tensor | None, alpha: Tensor, beta: Tensor, lse: Tensor, left: int, right: int, scale: float
) -> tuple[Tensor, ...]:
    """(entropy of the shares |w| / total, total = sum |w|), with w = alpha exp(s - lse) + beta. lse is an input of its own."""
    entropy, total = _per_query(q, 2)
    if not q.numel():
        return entropy, total
    alpha, beta = alpha.contiguous(), beta.contiguous()
    with device_of(q):
        _launchers().shifted_entropy(
            q, k, sigma, left, right, scale, _squares(k, sigma is not None), lse - _common(q, sigma), alpha, beta,
            entropy, total,
        )
    return entropy, total


def shifted_entropy_backward(
    dentropy: Tensor, q: Tensor, k: Tensor, sigma: Tensor | None, alpha: Tensor, beta: Tensor, lse: Tensor,
    entropy: Tensor, total: Tensor, left: int, right: int, scale: float,
) -> tuple[Tensor, ...]:
    """(dq, dk, dsigma, dalpha, dbeta, dlse), from dw = -dentropy sign(w) / total (log(|w| / total) + entropy)."""
    dq, dk, dsigma, *of_rows = _fake_entropy_backward(dentropy, q, k, sigma, alpha, beta, lse)
    if not q.numel():
        return dq, dk.zero_(), dsigma.zero_(), *of_rows
    alpha, beta = alpha.contiguous(), beta.contiguous()
    level, slope = entropy / math.log(2) - total.log2(), -math.log(2) * dentropy / total
    gain = _gain(k.shape[1], slope * alpha)
    unit = gain.repeat_interleave(q.shape[1] // k.shape[1], 1)[..., None]
    weighted = None if sigma is None else torch.empty_like(lse)
    of_softmax, of_weights = torch.empty_like(lse), torch.empty_like(lse)  # sums of dw exp(s - lse) and of dw, times unit
    with device_of(q):
        _launchers().statistics_backward(
            q, k, sigma, left, right, scale, _squares(k, sigma is not None), lse - _common(q, sigma), level, unit * slope, gain,
            dq, dk, weighted, alpha, beta, of_softmax, of_weights,
        )
    of_softmax, of_weights = of_softmax / unit, of_weights / unit
    dsigma = dsigma if sigma is None else _of_sigma(sigma, weighted / unit)
    return dq, dk, dsigma, of_softmax, of_weights, -alpha * of_softmax


def geometry(
    q: Tensor, k: Tensor, v: Tensor, sigma: Tensor | None, top_n: int, left: int, right: int, scale: float,
    backend: str = "triton",
) -> tuple[Tensor, ...]:
    """(precision, recall, f_score). backend: "triton" or "cuda"."""
    outputs: Any = _per_query(q, 3)
    if not q.numel():
        return outputs
    entries = (*q.shape[:3], top_n)
    scores, excess = (q.new_empty(entries, dtype=torch.float32) for _ in range(2))
    chosen = q.new_empty(entries, dtype=torch.int32)
    s = v.new_empty((*q.shape[:3], v.shape[3]))
    shift, farthest = _per_query(q, 2)
    centred: Any = (scores, chosen, s, shift, excess, farthest)
    with device_of(q):
        if backend == "cuda":
            centre = functools.partial(_launchers().centre, q, k, v, left, right, scale, *centred)
            _geometry_in_cuda(q, k, v, left, right, scale, centre, *centred, *outputs)
        else:
            squares = _squares(k, sigma is not None), _squares(v)
            _launchers().geometry(q, k, v, sigma, left, right, scale, *squares, *centred, *outputs)
    hidden = _sees_nan(q, k, v, left, right)
    for output in outputs:
        output.masked_fill_(hidden, math.nan)
    return outputs


def _whole_tiles(length):
    tile = _cuda.extension.DIAGNOSTICS_TILE
    return -(-length // tile) * tile


def _statistics_in_cuda(q, k, left, right, scale, lse, entropy, max_weight, max_key, mass):
    """Fill lse, entropy, max_weight, max_key (B, Hq, N) and mass (B, Hq, M), all contiguous."""
    q, k = _cuda.aligned_starts(q, k)
    levels = lse.new_empty(*q.shape[:2], _whole_tiles(q.shape[2]))
    rows = dict(lse=lse, entropy=entropy, max_weight=max_weight, max_key=max_key)
    _cuda.run(_cuda.call(
        "statistics", _cuda.dtype_of(q), dict(q=q, k=k, **rows, mass=mass, levels=levels), "q k",
        **_cuda.pair_sizes(q, k), left=left, right=right, scale=scale,
    ))


def _geometry_in_cuda(
    q, k, v, left, right, scale, centre, scores, chosen, s, shift, excess, farthest, precision, recall, f_score
):
    """Fill precision, recall, f_score (B, Hq, N). triton_kernels/diagnostics_launch.py describes the workspaces.

    centre: called after scores and chosen are filled, to fill s, shift, excess and farthest.
    """
    q, k, v = _cuda.aligned_starts(q, k, v)
    length = v.shape[2]
    squares = torch.nn.functional.pad(_cuda.row_sumsq(v), (0, _whole_tiles(length) - length))
    tensors = dict(
        q=q, k=k, v=v, scores=scores, chosen=chosen, s=s, shift=shift, farthest=farthest, excess=excess, squares=squares,
        precision=precision, recall=recall, f_score=f_score,
    )
    sizes = _cuda.pair_sizes(q, k) | dict(top_n=scores.shape[3], left=left, right=right, scale=scale)
    select, separate = (
        _cuda.call(f"geometry_{name}", _cuda.dtype_of(q), tensors, "q k v", **sizes) for name in ("select", "separate")
    )
    _cuda.run(select)
    centre()
    _cuda.run(separate)


def _sees_nan(q, k, v, left, right):
    """(B, Hq, N) bool: whether a query, or any key or value that it sees, contains NaN.

    Comparisons with NaN are false, so without this check the kernels would report a perfect result for such a row.
    """
    own, keys, values = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).isnan() for x in (q, k, v))
    before = torch.nn.functional.pad((keys | values).cumsum(2, dtype=torch.int32), (1, 0))
    first, end = _seen(q, k, left, right)
    seen = before[..., end] > before[..., first]
    return own | seen.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _seen(q, k, left, right):
    """(first, last + 1) of the keys that each query sees, both (N,)."""
    last, positions = k.shape[2], torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
    first = positions - left if left >= 0 else torch.zeros_like(positions)
    end = positions + right + 1 if right >= 0 else torch.full_like(positions, last)
    return first.clamp(0, last), end.clamp(0, last)


def _fake_backward(dlse, dentropy, q, k, sigma, *_):
    dsigma = q.new_empty(0, dtype=torch.float32) if sigma is None else torch.empty_like(sigma)
    return empty_rows(q, q.shape[3]), empty_rows(k, k.shape[3]), dsigma


def _save(ctx, inputs, output):
    q, k, sigma, _, _, _, *options, _ = inputs
    ctx.save_for_backward(q, k, sigma, *output[:2])
    ctx.mark_non_differentiable(*output[2:])
    ctx.options = options


def _autograd_backward(ctx, dlse, dentropy, *_):
    saved = ctx.saved_tensors
    dq, dk, dsigma = torch.ops.nearfar.attention_statistics_backward(dlse, dentropy, *saved, *ctx.options)
    return dq, dk, None if saved[2] is None else dsigma, *7 * [None]


def _fake_entropy_backward(dentropy, q, k, sigma, alpha, beta, lse, *_):
    gradients = _fake_backward(None, None, q, k, sigma)
    return *gradients, *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (alpha, beta, lse))


def _save_entropy(ctx, inputs, output):
    *tensors, left, right, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.options = left, right, scale


def _entropy_backward(ctx, dentropy, _):
    saved = ctx.saved_tensors
    found = torch.ops.nearfar.shifted_entropy_backward(dentropy, *saved, *ctx.options)
    dq, dk, dsigma, *of_rows = found
    return dq, dk, None if saved[2] is None else dsigma, *of_rows, None, None, None


register(
    "attention_statistics",
    (_STATISTICS, statistics, _empty_statistics),
    (_STATISTICS_BACKWARD, statistics_backward, _fake_backward),
    _autograd_backward,
    _save,
)
register(
    "shifted_entropy",
    (_ENTROPY, shifted_entropy, lambda q, *_: _per_query(q, 2)),
    (_ENTROPY_BACKWARD, shifted_entropy_backward, _fake_entropy_backward),
    _entropy_backward,
    _save_entropy,
    serves="attention_statistics",
)
define("selection_geometry", _GEOMETRY, geometry, lambda q, *_: _per_query(q, 3))
