"""Feature maps of linear and Hadamard linear attention (arXiv 2602.12128) and their derivatives, and the decoding step."""

import triton
import triton.language as tl

from .tiles import LOG2E, at, exp2


@triton.jit
def exp(x):
    return exp2(x * LOG2E)


@triton.jit
def identity(x):
    return x


@triton.jit
def identity_grad(x):
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def elu(x):
    """elu(x) + 1"""
    return tl.where(x > 0, x + 1, exp(x))


@triton.jit
def elu_grad(x):
    return tl.where(x > 0, 1.0, exp(x))


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_grad(x):
    return tl.where(x > 0, 1.0, relu(x))


@triton.jit
def softplus(x):
    small = exp(-tl.abs(x))
    # log(1 + small) loses the digits of small; there three terms of the series suffice.
    rest = tl.where(small < 0.01, small * (1 - small * (0.5 - small * (1.0 / 3))), tl.log(1 + small))
    return tl.maximum(x, 0.0) + rest


@triton.jit
def softplus_grad(x):
    return tl.sigmoid(x)


FEATURE_MAPS = {
    "identity": (identity, identity_grad),
    "elu": (elu, elu_grad),
    "relu": (relu, relu_grad),
    "softplus": (softplus, softplus_grad),
    "exp": (exp, exp),
}


@triton.jit
def step(
    qs, ks, v, state, out,
    q_strides, k_strides, v_strides, out_strides, num_heads, group, eps,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, WIDTHS: tl.constexpr, DIVISORS: tl.constexpr,
    NUM_FEATURES: tl.constexpr, DV: tl.constexpr, GROUP_BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_STATE: tl.constexpr,
):
    """One token: add its features times (v, 1) to the state of a key head, (P, Dv + 1) float32, and read it for the group."""
    program = tl.program_id(0)
    head, batch = program % num_heads, program // num_heads
    column = tl.arange(0, BLOCK_STATE)
    value = tl.load(at(v, v_strides, batch, head) + column, mask=column < DV, other=0.0).to(tl.float32)
    value = tl.where(column == DV, 1.0, value)
    member = tl.arange(0, GROUP_BLOCK)
    in_group = member < group
    state += program.to(tl.int64) * NUM_FEATURES * (DV + 1)

    total = tl.zeros((GROUP_BLOCK, BLOCK_STATE), tl.float32)
    for first in range(0, NUM_FEATURES, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        valid = p < NUM_FEATURES
        key_features = tl.where(valid, 1.0, 0.0)
        query_features = tl.where(valid[None, :] & in_group[:, None], 1.0, 0.0)
        for r in tl.static_range(len(WIDTHS)):
            index = p // DIVISORS[r] % WIDTHS[r]
            k = tl.load(at(ks[r], k_strides[r], batch, head) + index, mask=valid, other=0.0)
            key_features *= FEATURE(k.to(tl.float32))
            q = at(qs[r], q_strides[r], batch, head * group) + member[:, None] * q_strides[r][1] + index[None, :]
            q = tl.load(q, mask=valid[None, :] & in_group[:, None], other=0.0)
            query_features *= FEATURE(q.to(tl.float32))
        pointers = state + p[:, None] * (DV + 1) + column[None, :]
        mask = valid[:, None] & (column <= DV)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0) + key_features[:, None] * value[None, :]
        tl.store(pointers, tile, mask=mask)
        total += tl.sum(query_features[:, :, None] * tile[None, :, :], 1)

    if NORMALIZE:
        norm = tl.sum(tl.where((column == DV)[None, :], total, 0.0), 1) + eps
        total *= tl.where(norm == 0.0, 0.0, tl.div_rn(1.0, norm))[:, None]
    pointers = at(out, out_strides, batch, head * group) + member[:, None] * out_strides[1] + column[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=in_group[:, None] & (column < DV)[None, :])
