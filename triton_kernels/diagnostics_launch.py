"""Launchers of the streamed diagnostics. Outputs and workspaces come from the caller.

`parameter` is the sigma of scores by distance, (1,) or (Hq,), or None for dot products, which `scale` multiplies.
"""

import functools

from . import diagnostics
from .launch import Launch, LaunchParameters, cdiv, launch_all, width_block
from .pairwise_launch import signature

ROWS = LaunchParameters(16, None, 4, 1)  # of kernels that do not visit pairs
ROUND = 8  # entries that `select` finds in one pass: they stay in registers, and few calls need more


def sign_and_size(scale):
    """(sign, |scale| or 1 for 0). Kernels apply the sign to the products, so that the largest product is the largest score."""
    return (scale > 0) - (scale < 0), abs(scale) or 1.0


@functools.lru_cache(maxsize=1024)
def plan_squares(shape, strides):
    batch, heads, length, width = shape
    tiles = cdiv(length, ROWS.block_m)
    scalars = strides, length, heads, tiles, width, ROWS.block_m, width_block(width)
    return Launch(diagnostics.squares, tiles * heads * batch, scalars, ROWS)


@functools.lru_cache(maxsize=1024)
def plan_pairs(kernel, call, scale, gradient_strides=()):
    """A kernel of the statistics, whose programs own tiles of queries or of keys."""
    parameters = call.tuned("statistics" if kernel is diagnostics.shifted_entropy else kernel.__name__)
    by_keys = kernel in (diagnostics.key_mass, diagnostics.statistics_grad_keys)
    length, block = (call.k_shape[2], parameters.block_n) if by_keys else (call.q_shape[2], parameters.block_m)
    heads = call.k_shape[1] if kernel is diagnostics.statistics_grad_keys else call.q_shape[1]
    tiles = cdiv(length, block)
    sign, size = sign_and_size(scale)
    width = call.q_shape[3]
    scalars = (
        call.q_strides, call.k_strides, *gradient_strides, call.parameter_stride, *call.geometry, tiles, call.window, size,
        sign, call.precision, width, parameters.block_m, parameters.block_n,
        width_block(width),
    )
    return Launch(kernel, tiles * heads * call.q_shape[0], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_select(call, scale, top_n, first_rank):
    parameters = call.tuned("geometry")
    tiles = cdiv(call.q_shape[2], parameters.block_m)
    width = call.q_shape[3]
    scalars = (
        call.q_strides, call.k_strides, *call.geometry, tiles, call.window, top_n, first_rank,
        sign_and_size(scale)[0], call.precision, min(ROUND, top_n - first_rank), first_rank > 0,
        width, parameters.block_m, parameters.block_n, width_block(width),
    )
    return Launch(diagnostics.select, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


@functools.lru_cache(maxsize=1024)
def plan_centre(call, scale, top_n):
    num_queries, _, num_heads, group = call.geometry
    tiles = cdiv(num_queries, ROWS.block_m)
    width = call.v_shape[3]
    scalars = (
        call.v_strides, call.parameter_stride, num_queries, num_heads, group, tiles, top_n, sign_and_size(scale)[1],
        width, ROWS.block_m, width_block(width),
    )
    return Launch(diagnostics.centre, tiles * call.q_shape[0] * num_heads, scalars, ROWS)


@functools.lru_cache(maxsize=1024)
def plan_separate(call, scale, top_n):
    parameters = call.tuned("geometry")
    tiles = cdiv(call.q_shape[2], parameters.block_m)
    sign, size = sign_and_size(scale)
    scalars = (
        call.q_strides, call.k_strides, call.v_strides, call.parameter_stride, *call.geometry, tiles, call.window, top_n, size,
        sign, call.precision, *call.sizes(parameters),
    )
    return Launch(diagnostics.separate, tiles * call.q_shape[0] * call.q_shape[1], scalars, parameters)


def squares_of(x, out):
    """The launch that fills out (B, H, N) with |x|^2; none if out is None."""
    return [] if out is None else [(plan_squares(x.shape, x.stride()), (x, out))]


def statistics(q, k, parameter, left, right, scale, k_squares, lse, entropy, max_weight, max_key):
    """Fill lse, entropy, max_weight, max_key (B, Hq, N) and, with a parameter, k_squares (B, Hkv, M).

    With a parameter lse is that of the raw scores.
    """
    plan = plan_pairs(diagnostics.statistics, signature(q, k, k, parameter, False, left, right), scale)
    launch_all(*squares_of(k, k_squares), (plan, (q, k, k_squares, parameter, lse, entropy, max_weight, max_key)))


def key_mass(q, k, parameter, left, right, scale, k_squares, lse, alpha, mass):
    """Fill mass (B, Hq, M). lse: of the raw scores; alpha (B, Hq, N), None for 1; k_squares: filled."""
    plan = plan_pairs(diagnostics.key_mass, signature(q, k, k, parameter, False, left, right), scale)
    plan(q, k, k_squares, parameter, lse, alpha, mass)


def shifted_entropy(q, k, parameter, left, right, scale, k_squares, lse, alpha, beta, entropy, total):
    """Fill entropy and total (B, Hq, N) and, with a parameter, k_squares. lse: of the raw scores."""
    plan = plan_pairs(diagnostics.shifted_entropy, signature(q, k, k, parameter, False, left, right), scale)
    launch_all(*squares_of(k, k_squares), (plan, (q, k, k_squares, parameter, lse, alpha, beta, entropy, total)))


def statistics_backward(
    q, k, parameter, left, right, scale, k_squares, lse, level, slope, gain, dq, dk, weighted,
    alpha=None, beta=None, of_softmax=None, of_weights=None,
):
    """Fill dq, dk and, with a parameter, k_squares (B, Hkv, M) and weighted (B, Hq, N); with a beta of_softmax and of_weights.

    lse, level, slope: (B, Hq, N), slope and, without a beta, level times gain, (B, Hkv).
    """
    call = signature(q, k, k, parameter, False, left, right)
    queries = plan_pairs(diagnostics.statistics_grad_queries, call, scale, (dq.stride(),))
    keys = plan_pairs(diagnostics.statistics_grad_keys, call, scale, (dk.stride(),))
    rows = lse, level, slope, gain, alpha, beta
    launch_all(
        *squares_of(k, k_squares),
        (queries, (q, k, k_squares, parameter, *rows, dq, weighted, of_softmax, of_weights)),
        (keys, (q, k, k_squares, parameter, *rows, dk)),
    )


def geometry(
    q, k, v, parameter, left, right, scale, k_squares, v_squares, scores, chosen, s, shift, excess, farthest,
    precision, recall, f_score,
):
    """Fill precision, recall, f_score (B, Hq, N).

    Workspaces: scores and excess (B, Hq, N, top_n) float32, chosen likewise int32, s (B, Hq, N, Dv) in the dtype of v, shift
    and farthest (B, Hq, N), v_squares (B, Hkv, M) and, with a parameter, k_squares likewise.
    """
    call, top_n = signature(q, k, v, parameter, False, left, right), scores.shape[3]
    rounds = [plan_select(call, scale, top_n, first_rank) for first_rank in range(0, top_n, ROUND)]
    launch_all(
        *squares_of(k, k_squares),
        *squares_of(v, v_squares),
        *((plan, (q, k, k_squares, scores, chosen)) for plan in rounds),
        (plan_centre(call, scale, top_n), (v, parameter, scores, chosen, s, shift, excess, farthest)),
        (plan_separate(call, scale, top_n),
         (q, k, v, k_squares, v_squares, parameter, scores, chosen, s, shift, excess, farthest, precision, recall, f_score)),
    )


def centre(q, k, v, left, right, scale, scores, chosen, s, shift, excess, farthest):
    """Fill s, shift, excess and farthest from scores and chosen, for scores by dot products."""
    plan = plan_centre(signature(q, k, v, None, False, left, right), scale, scores.shape[3])
    plan(v, None, scores, chosen, s, shift, excess, farthest)
