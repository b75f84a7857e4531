"""Selective synchronization attention in plain PyTorch (arXiv 2602.14445): differentiable twice, O(N) memory.

    S_ij = J_ij sqrt(1 - delta_ij^2 / (K r_i J_ij)^2) = sqrt(J_ij^2 - delta_ij^2 / (K r_i)^2)   where that is positive, else 0
    J_ij = exp(-alpha delta_ij^2),   delta_ij = |w_i - w_j|,   o_i = sum_j S_ij v_j / (sum_j S_ij + 1e-8)

The second form of S needs no square root of a distance, whose gradient at 0 would be NaN.
"""

import torch

from nearfar.reference.pairwise import (
    by_chunk,
    group_heads,
    group_product,
    per_head,
    resolution,
    row_chunks,
    split_rows,
    squared_distances,
    top_k_mask,
)

EPS = 1e-8
# Upper bound of 1 / (K r)^2, so that its product with a distance is finite for r = 0. Such a token locks only with itself.
LARGEST_C = 1e24
# A row has no gradient if its lock radius is below twice the resolution of distances.
UNRESOLVED = 0.25


def order_parameter(theta, causal=False):
    """Reference of `nearfar.order_parameter`: (B, H), or (B, H, N) when causal; half precision is computed in float32."""
    theta = theta.to(torch.promote_types(theta.dtype, torch.float32))
    parts = torch.stack((theta.cos(), theta.sin()))
    if causal:
        counts = torch.arange(1, theta.shape[2] + 1, device=theta.device, dtype=theta.dtype)
        means = parts.cumsum(3) / counts[:, None]
    else:
        means = parts.sum(3) / max(theta.shape[2], 1)
    return modulus(*means).mean(-1)


def modulus(x, y):
    """sqrt(x^2 + y^2), with gradient 0 at 0."""
    square = x.square() + y.square()
    zero = square == 0
    return square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def synchronization_attention(omega, v, coupling, bandwidth, order, omega_k, top_k, causal, grad_floor):
    """Reference of `nearfar.synchronization_attention`.

    Args:
        omega: (B, Hq, N, D). v: (B, Hkv, M, Dv).
        coupling, bandwidth: (1,) or (Hq,). order: (B, Hq) or (B, Hq, N).
        omega_k: (B, Hkv, M, D); None for omega.
        top_k: how many keys a query keeps, None for all. causal: the queries are the last positions.

    Returns:
        (B, Hq, N, Dv) in the dtype of omega; half precision is computed in float32, distances in float64.
    """

    def attend(visible, _, margin, values):
        weights = lock(margin, grad_floor)
        if top_k is not None:
            weights = weights.masked_fill(~top_k_mask(weights.detach().masked_fill(~visible, float("-inf")), top_k), 0)
        return group_product(weights, values) / (weights.sum(-1, keepdim=True) + EPS)

    outputs = by_rows(attend, omega, coupling, bandwidth, order, omega_k, causal, v)
    return torch.cat(outputs, -2).flatten(1, 2).to(omega.dtype)


def locked_share(omega, coupling, bandwidth, order, omega_k, causal):
    """Reference of `nearfar.locked_share`."""

    def count(visible, own, margin):
        others = visible if own is None else visible & ~own
        return ((margin > 0) & others).sum((-2, -1)), others.sum()

    locked, pairs = map(sum, zip(*by_rows(count, omega, coupling, bandwidth, order, omega_k, causal), strict=True))
    return (locked / pairs.clamp(min=1)).flatten(1, 2).to(torch.promote_types(omega.dtype, torch.float32))


def by_rows(function, omega, coupling, bandwidth, order, omega_k, causal, *values):
    """[function(visible, own, margin, *values)] for each chunk of queries, with the values of the chunk's keys.

    visible: the (rows, keys) mask. own: the mask of pairs of a token with itself, None with omega_k. margin: J^2 - delta^2 /
    (K r)^2, (B, Hkv, group, rows, keys), 0 for hidden pairs.
    """
    k = omega if omega_k is None else omega_k
    compute, heads_kv = torch.promote_types(omega.dtype, torch.float32), k.shape[1]
    rates = 2 * per_head(bandwidth.to(compute), omega.shape[1], heads_kv)
    # K r in float64, because the derivatives of the largest 1 / (K r)^2 exceed float32.
    order = (order if order.dim() == 3 else order[..., None]).double()
    c = (order * coupling.double().reshape(-1, 1)).square().clamp(min=1 / LARGEST_C).reciprocal()
    c = group_heads(c.to(compute).expand(omega.shape[:3]), heads_kv)[..., None]

    def evaluate(chunk, rates, w, c, keys, *values):
        visible = chunk.visible(omega.device)
        delta2, own = squared_distances(w, keys), None
        if omega_k is None:
            own = torch.ones_like(visible).tril(chunk.rows[0]).triu(chunk.rows[0])
            delta2 = delta2.masked_fill(own, 0)
        margin = (-rates * delta2).exp() - c * delta2
        # If the lock radius K r is below the resolution of distances, the difference of two locked tokens is rounding, and c
        # would turn it into a large gradient. Such a row contributes no gradient, as if the tokens were equal.
        unresolved = c.detach() * resolution(w) > UNRESOLVED
        margin = torch.where(unresolved, margin.detach(), margin).masked_fill(~visible, 0)
        return function(visible, own, margin, *values)

    w_blocks, c_blocks = split_rows(group_heads(omega.to(compute), heads_kv), c)
    key_blocks = split_rows(*(tensor.to(compute) for tensor in (k, *values)))
    chunks = row_chunks(omega.shape[2], k.shape[2], -1, 0 if causal else -1)
    return [by_chunk(evaluate, x, (rates, w_blocks[x.block], c_blocks[x.block]), *key_blocks) for x in chunks]


def lock(margin, grad_floor):
    """S = sqrt(max(0, margin)), with the derivative 1 / (2 max(S, grad_floor)) if margin is positive, otherwise 0."""
    steep = margin > grad_floor**2
    root = torch.where(steep, margin, 1).sqrt()
    gentle = margin.masked_fill(steep | (margin <= 0), 0)
    constant = gentle.detach()
    return torch.where(steep, root, constant.sqrt() + (gentle - constant) / (2 * grad_floor))
