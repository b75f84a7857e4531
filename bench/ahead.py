"""Compiles Triton's kernels for sm_90 without a GPU: what a call would launch, and the kernel that Triton would make of it."""

import torch
import triton
from nearfar.triton_kernels.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from nearfar.runtime import dispatch

TARGET = GPUTarget("cuda", 90, 32)


def captured(function, tensors):
    """(launch, tensors) of a forward and, of a differentiable result, backward call on CPU tensors: nothing runs.

    Outputs hold what their memory held. Results come without a GPU from a process that calls nothing else: public functions
    refuse CPU tensors where Triton does not interpret, and are made to take them.
    """
    launches = []
    dispatch.triton_device_reason = lambda tensor: None
    Launch.is_new = lambda launch, surveyed: False
    Launch.run = lambda launch, tensors, surveyed: launches.append((launch, tensors))
    o = function(*(tensor.requires_grad_(tensor.is_floating_point()) for tensor in tensors))
    if o is not None and o.requires_grad:
        torch.autograd.grad(o, [tensor for tensor in tensors if tensor.requires_grad], torch.empty_like(o), allow_unused=True)
    return launches


def compile_launch(launch, tensors):
    """The compiled kernel of a launch, as Triton would compile it on a GPU."""
    kernel, backend = launch._kernel, make_backend(TARGET)
    keywords = {**launch._options, "debug": False}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*tensors, *launch._scalars, **keywords)
    options, *source = kernel._pack_args(backend, keywords, bound, specialization, options)
    return triton.compile(ASTSource(kernel, *source), target=TARGET, options=options.__dict__)
