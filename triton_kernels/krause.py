"""Krause attention (arXiv 2602.11534) as pair functions of the pairwise skeleton.

    s_ij = (q_i . k_j - |k_j|^2 / 2) / sigma^2        the |q_i|^2 of the squared distance cancels in the softmax
"""

import triton
import triton.language as tl

from .pairwise_launch import PairFunctions


@triton.jit
def rbf_scale(sigma):
    """1 / sigma^2; a sigma on the GPU is not checked on the host, so one that is not positive poisons its head."""
    return tl.where(sigma > 0, tl.div_rn(1.0, sigma * sigma), float("nan"))


@triton.jit
def rbf_score(qk, k_squares, scale):
    # Scaled last: products and squares of small integers stay exact, so equal distances stay equal and ties are ties.
    return (qk - 0.5 * k_squares) * scale


@triton.jit
def rbf_tile_score(q_tile, k_tile, k_squares, scale, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """(queries, keys) scores of two tiles, or their transpose."""
    if q_tile.dtype == tl.float32 and PRECISION == "ieee":
        return wide_half_distances(k_tile, q_tile) * scale if TRANSPOSED else wide_half_distances(q_tile, k_tile) * scale
    elif TRANSPOSED:
        return rbf_score(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION), k_squares[:, None], scale)
    else:
        return rbf_score(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), k_squares[None, :], scale)


@triton.jit
def wide_half_distances(x_tile, y_tile):
    """-|x - y|^2 / 2 of float32 rows, rounded once.

    Far from the origin products and squares have nothing in common but digits that cancel: in float64 what is left is right.
    On GPUs for data centers its products take the tensor cores, and no longer than float32's without them.
    """
    x, y = x_tile.to(tl.float64), y_tile.to(tl.float64)
    products = tl.dot(x, tl.trans(y), out_dtype=tl.float64)
    return (products - 0.5 * tl.sum(x * x, 1)[:, None] - 0.5 * tl.sum(y * y, 1)[None, :]).to(tl.float32)


@triton.jit
def rbf_grad(ds_others, ds_total, x):
    """Gradient of a token x from sum_j dS_j y_j and sum_j dS_j over the others y.

    It is sum_j dS_j (y_j - x). Where all dS_j of a token sum to zero, as those of a query do, any point may stand for x.
    """
    return ds_others - ds_total * x


@triton.jit
def rbf_grad_sigma(dlog_scale, sigma):
    """log(scale) = -2 log(sigma)"""
    return -2.0 * dlog_scale / sigma


PAIR = PairFunctions(rbf_scale, rbf_tile_score, rbf_grad, rbf_grad_sigma)
