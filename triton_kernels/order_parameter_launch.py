"""Launchers of the kernels of the order parameter. Outputs and workspaces come from the caller."""

import functools

from . import order_parameter
from .launch import Launch, LaunchParameters, cdiv, width_block

CHUNK = order_parameter.CHUNK.value


@functools.lru_cache(maxsize=1024)
def plan(kernel, shape, *strides):
    """Launch a kernel of order_parameter.py; all of them work on chunks."""
    batch, heads, length, width = shape
    chunks = cdiv(length, CHUNK)
    scalars = *strides, length, heads, chunks, width, width_block(width)
    return Launch(kernel, chunks * heads * batch, scalars, LaunchParameters(None, None, 4, 1))


def phase_sums(theta, sums):
    """Fill sums (B, H, chunks, 2, D)."""
    plan(order_parameter.phase_sums, theta.shape, theta.stride())(theta, sums)


def prefix_order(theta, before, r):
    """Fill r (B, H, N)."""
    plan(order_parameter.prefix_order, theta.shape, theta.stride())(theta, before, r)


def pull_sums(theta, before, dr, sums):
    """Fill sums (B, H, chunks, 2, D)."""
    plan(order_parameter.pull_sums, theta.shape, theta.stride())(theta, before, dr, sums)


def grad_phases(theta, before, dr, pulls, dtheta):
    """Fill dtheta; before and dr None: not causal."""
    plan(order_parameter.grad_phases, theta.shape, theta.stride(), dtheta.stride())(theta, before, dr, pulls, dtheta)
