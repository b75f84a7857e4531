"""Selective synchronization attention in plain PyTorch (arXiv 2602.14445): differentiable twice, O(N) memory.

    S_ij = J_ij sqrt(1 - delta_ij^2 / (K r_i J_ij)^2) = sqrt(J_ij^2 - delta_ij^2 / (K r_i)^2)   where that is positive, else 0
    J_ij = exp(-alpha delta_ij^2),   delta_ij = |w_i - w_j|,   o_i = sum_j S_ij v_j / (sum_j S_ij + 1e-8)

The second form of S needs no square root of a distance, whose gradient at 0 would be NaN.
"""

import torch

from nearfar.reference.pairwise import CHUNK, row_chunks, top_k_mask

EPS = 1e-8
# 1 / (K r)^2 is at most this, so that it times a distance is finite where r is 0: such a token locks with itself alone.
LARGEST_C = 1e24


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
        (B, Hq, N, Dv) in the dtype of omega; half precision is computed in float32.
    """
    compute = torch.promote_types(omega.dtype, torch.float32)
    value_blocks = v.to(compute)[:, :, None].split(CHUNK, -2)
    outputs = []
    for _, last, visible, margin in margins(omega, coupling, bandwidth, order, omega_k, causal):
        weights = lock(margin, grad_floor)
        if top_k is not None:
            weights = weights * top_k_mask(weights.detach().masked_fill(~visible, float("-inf")), top_k)
        outputs.append(weights @ torch.cat(value_blocks[:last], -2) / (weights.sum(-1, keepdim=True) + EPS))
    return torch.cat(outputs, -2).flatten(1, 2).to(omega.dtype)


def locked_share(omega, coupling, bandwidth, order, omega_k, causal):
    """Reference of `nearfar.locked_share`."""
    locked = pairs = 0
    for block, _, visible, margin in margins(omega, coupling, bandwidth, order, omega_k, causal):
        if omega_k is None:
            visible = visible & ~own_pairs(visible, block)
        locked = locked + ((margin > 0) & visible).sum((-2, -1))
        pairs = pairs + visible.sum()
    return (locked / pairs.clamp(min=1)).flatten(1, 2).to(torch.promote_types(omega.dtype, torch.float32))


def margins(omega, coupling, bandwidth, order, omega_k, causal):
    """Yield, for each block of CHUNK queries: its number, how many blocks of keys come with it, the (rows, keys) mask of
    visible pairs, and J^2 - delta^2 / (K r)^2.

    The latter is (B, Hkv, group, rows, keys), 0 where a pair is not visible: query heads share key heads by broadcasting.
    """
    k = omega if omega_k is None else omega_k
    compute, heads_kv = torch.promote_types(omega.dtype, torch.float32), k.shape[1]
    queries = omega.to(compute).unflatten(1, (heads_kv, -1))
    keys = k.to(compute)[:, :, None]
    key_squares = keys.square().sum(-1)[..., None, :]
    rates = 2 * bandwidth.to(compute).expand(omega.shape[1]).reshape(heads_kv, -1, 1, 1)
    if order.dim() == 2:
        order = order[..., None]
    radius = order * coupling.reshape(-1, 1)
    c = radius.square().clamp(min=1 / LARGEST_C).reciprocal().to(compute).expand(omega.shape[:3])
    c = c.unflatten(1, (heads_kv, -1))[..., None]
    # Blocks by split, not by slices: the gradient of a slice is as long as what it was cut from.
    blocks = zip(queries.split(CHUNK, -2), c.split(CHUNK, -2), strict=True)
    chunks = row_chunks(omega.shape[2], k.shape[2], -1, 0 if causal else -1)
    key_blocks, square_blocks = keys.split(CHUNK, -2), key_squares.split(CHUNK, -1)
    for (rows, row_c), (block, _, last, visible) in zip(blocks, chunks, strict=True):
        visible = visible.to(omega.device)
        products = rows @ torch.cat(key_blocks[:last], -2).mT
        delta2 = rows.square().sum(-1, keepdim=True) + torch.cat(square_blocks[:last], -1) - 2 * products
        delta2 = delta2.clamp(min=0)
        if omega_k is None:
            delta2 = delta2.masked_fill(own_pairs(visible, block), 0)
        yield block, last, visible, ((-rates * delta2).exp() - row_c * delta2).masked_fill(~visible, 0)


def own_pairs(mask, block):
    """Of the pairs of a block of queries with the keys from the first on, those of a token with itself: a mask like `mask`."""
    return torch.ones_like(mask).tril(block * CHUNK).triu(block * CHUNK)


def lock(margin, grad_floor):
    """sqrt(max(0, margin)), with the derivative 1 / (2 max(S, grad_floor)) where that is positive and 0 elsewhere."""
    positive = margin.clamp(min=0)
    steep = positive > grad_floor**2
    root = torch.where(steep, positive, 1).sqrt()
    line = positive.detach().sqrt() + (positive - positive.detach()) / (2 * grad_floor)
    return torch.where(steep, root, line)
