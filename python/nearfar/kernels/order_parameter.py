"""The order parameter on its kernels: `torch.ops.nearfar.order_parameter`."""

import torch

from nearfar.runtime.library import register
from nearfar.runtime.tensors import device_of, empty_rows, triton_module, unit_stride


def order_parameter(theta: torch.Tensor, causal: bool) -> torch.Tensor:
    """(B, H), or (B, H, N) when causal, float32."""
    return torch.ops.nearfar.order_parameter(unit_stride(theta), causal)


_launchers = triton_module("order_parameter_launch")


def _empty_sums(theta, launch):
    batch, heads, length, width = theta.shape
    return theta.new_empty((batch, heads, -(-length // launch.CHUNK), 2, width), dtype=torch.float32)


def _empty_order(theta, causal):
    return theta.new_empty(theta.shape[:3] if causal else theta.shape[:2], dtype=torch.float32)


def _chunk_sums(theta, launch):
    sums = _empty_sums(theta, launch)
    launch.phase_sums(theta, sums)
    return sums


def _before(sums):
    """For each chunk, the sums over all earlier chunks; exactly 0 for the first."""
    return torch.cat((torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1].cumsum(2)), 2)


def _forward(theta, causal):
    r = _empty_order(theta, causal)
    if not theta.numel():
        return r.zero_()
    launch = _launchers()
    with device_of(theta):
        sums = _chunk_sums(theta, launch)
        if causal:
            launch.prefix_order(theta, _before(sums), r)
            return r
        return torch.linalg.vector_norm(sums.sum(2), dim=2).mean(-1) / theta.shape[2]


def _backward(dr, theta, causal):
    dtheta = empty_rows(theta, theta.shape[3])
    if not theta.numel():
        return dtheta
    launch = _launchers()
    with device_of(theta):
        sums = _chunk_sums(theta, launch)
        if causal:
            before, dr, pulls = _before(sums), dr.contiguous(), _empty_sums(theta, launch)
            launch.pull_sums(theta, before, dr, pulls)
            launch.grad_phases(theta, before, dr, _before(pulls.flip(2)).flip(2), dtheta)
        else:
            total = sums.sum(2)
            pulls = torch.nn.functional.normalize(total, dim=2, eps=torch.finfo(total.dtype).tiny)
            pulls *= dr[..., None, None] / (theta.shape[2] * theta.shape[3])
            launch.grad_phases(theta, None, None, pulls, dtheta)
    return dtheta


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.causal = inputs[1]


def _autograd_backward(ctx, dr):
    return torch.ops.nearfar.order_parameter_backward(dr, *ctx.saved_tensors, ctx.causal), None


register(
    "order_parameter",
    ("(Tensor theta, bool causal) -> Tensor", _forward, _empty_order),
    (
        "(Tensor dr, Tensor theta, bool causal) -> Tensor",
        _backward,
        lambda dr, theta, causal: empty_rows(theta, theta.shape[3]),
    ),
    _autograd_backward,
    _save,
)
