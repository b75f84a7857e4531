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
def rbf_grad_keys(ds_q, ds_total, k_tile):
    return ds_q - ds_total * k_tile


@triton.jit
def rbf_grad_sigma(dlog_scale, sigma):
    """log(scale) = -2 log(sigma)"""
    return -2.0 * dlog_scale / sigma


PAIR = PairFunctions(rbf_scale, rbf_score, rbf_grad_keys, rbf_grad_sigma)
