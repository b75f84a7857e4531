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
from nearfar.runtime.library import define, register
from nearfar.runtime.tensors import device_of, empty_rows, tf32_allowed, triton_module

_STATISTICS = (
    '(Tensor q, Tensor k, Tensor? sigma, int left, int right, float scale, str backend="triton")'
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_STATISTICS_BACKWARD = (
    "(Tensor dlse, Tensor dentropy, Tensor q, Tensor k, Tensor? sigma, Tensor lse, Tensor entropy, int left, int right,"
    " float scale) -> (Tensor, Tensor, Tensor)"
)
_GEOMETRY = (
    '(Tensor q, Tensor k, Tensor v, Tensor? sigma, int top_n, int left, int right, float scale, str backend="triton")'
    " -> (Tensor, Tensor, Tensor)"
)

# The backward scales upstream gradients so that the largest is between 2^10 and 2^11. Unscaled, weights of long rows and
# gradients of a mean over many rows would underflow in float16. |P log2(P)| and the entropy are at most 20 together, so scaled
# products do not overflow.
UPSTREAM_EXPONENT = 11


_launchers = triton_module("diagnostics_launch")


def _per_query(q, count, dtype=torch.float32):
    return tuple(q.new_empty(q.shape[:3], dtype=dtype) for _ in range(count))


def _squares(x, wanted=True):
    """The workspace for the squared norms of rows, or None."""
    return x.new_empty(x.shape[:3], dtype=torch.float32) if wanted else None


def _empty_statistics(q, k, *_):
    """Uninitialised lse, entropy, max_weight, max_key and key_mass."""
    mass = q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    return *_per_query(q, 3), *_per_query(q, 1, torch.int64), mass


def _common(q, sigma):
    """-|q|^2 / (2 sigma^2), which kernels omit from scores by distance; 0 for exact float32 calls, which include it."""
    if q.dtype == torch.float32 and not tf32_allowed(q.dtype):
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
    q: Tensor, k: Tensor, sigma: Tensor | None, left: int, right: int, scale: float, backend: str = "triton"
) -> tuple[Tensor, ...]:
    """(lse, entropy, max_weight, max_key, key_mass). backend: "triton" or "cuda"; Triton computes the gradients of both."""
    outputs = _empty_statistics(q, k)
    if not q.numel():
        return *outputs[:4], outputs[4].zero_()
    if backend == "cuda":
        _statistics_in_cuda(q, k, left, right, scale, *outputs)
        return outputs
    with device_of(q):
        _launchers().statistics(q, k, sigma, left, right, scale, _squares(k, sigma is not None), *outputs)
    if sigma is not None:
        outputs[0].add_(_common(q, sigma))
    return outputs


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
    weighted, of_raw = (None, lse) if sigma is None else (torch.empty_like(lse), lse - _common(q, sigma))
    with device_of(q):
        _launchers().statistics_backward(
            q, k, sigma, left, right, scale, _squares(k, sigma is not None), of_raw, level, slope, gain,
            dq, dk, weighted,
        )
    if sigma is None:
        return dq, dk, dsigma
    # Scores are distances / sigma^2; weighted has the sums of dS times the distances.
    of_distances = (weighted / of_rows).sum((0, 2))
    return dq, dk, -2 / sigma**3 * (of_distances if sigma.numel() > 1 else of_distances.sum())


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
    last, positions = k.shape[2], torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
    begin = positions - left if left >= 0 else torch.zeros_like(positions)
    end = positions + right + 1 if right >= 0 else torch.full_like(positions, last)
    seen = before[..., end.clamp(0, last)] > before[..., begin.clamp(0, last)]
    return own | seen.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _fake_backward(dlse, dentropy, q, k, sigma, *_):
    dsigma = q.new_empty(0, dtype=torch.float32) if sigma is None else torch.empty_like(sigma)
    return empty_rows(q, q.shape[3]), empty_rows(k, k.shape[3]), dsigma


def _save(ctx, inputs, output):
    q, k, sigma, *options, _ = inputs
    ctx.save_for_backward(q, k, sigma, *output[:2])
    ctx.mark_non_differentiable(*output[2:])
    ctx.options = options


def _autograd_backward(ctx, dlse, dentropy, *_):
    saved = ctx.saved_tensors
    dq, dk, dsigma = torch.ops.nearfar.attention_statistics_backward(dlse, dentropy, *saved, *ctx.options)
    return dq, dk, None if saved[2] is None else dsigma, None, None, None, None


register(
    "attention_statistics",
    (_STATISTICS, statistics, _empty_statistics),
    (_STATISTICS_BACKWARD, statistics_backward, _fake_backward),
    _autograd_backward,
    _save,
)
define("selection_geometry", _GEOMETRY, geometry, lambda q, *_: _per_query(q, 3))
