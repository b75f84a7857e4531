"""What every torch operator of nearfar needs: registration in both directions, and how its tensors are made and passed."""

from contextlib import nullcontext

import torch


def define(name, schema, function, fake):
    """`torch.ops.nearfar.<name>` with an implementation and a fake one, that of shapes, strides and dtypes."""
    operator = f"nearfar::{name}"
    torch.library.define(operator, schema)
    torch.library.impl(operator, ("CPU", "CUDA"), function)
    torch.library.register_fake(operator, fake)


def register(name, forward, backward, autograd, setup_context):
    """An operator and the operator of its backward, which cannot be differentiated again.

    Args:
        forward, backward: schema, function and fake of `<name>` and of `<name>_backward`.
        autograd, setup_context: as for `torch.library.register_autograd`.
    """
    define(name, *forward)
    define(f"{name}_backward", *backward)
    torch.library.register_autograd(f"nearfar::{name}", autograd, setup_context=setup_context)
    torch.library.register_autograd(f"nearfar::{name}_backward", refuse_double_backward)


def refuse_double_backward(ctx, *gradients):
    raise RuntimeError('the fused kernels have no double backward; use backend="reference" for second derivatives')


def device_of(tensor):
    """Context in which the device of the tensor is the current one; free when it already is."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def unit_stride(tensor):
    """The tensor itself when its last dimension is contiguous, as the kernels need, otherwise a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def empty_rows(like, width):
    """(B, H, N, width) in the memory order of `like`: a (B, N, H, D) projection gets its output in the same order."""
    batch, heads, length, like_width = like.shape
    if width == like_width:
        return torch.empty_like(like)
    if heads > 1 and like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, width).transpose(1, 2)
    return like.new_empty(batch, heads, length, width)
