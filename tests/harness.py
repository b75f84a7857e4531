"""What the tests share: the device, the dtypes, running a call with its gradients, and the rule of accuracy."""

import os
from typing import NamedTuple

import pytest
import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Triton 3.6 multiplies bfloat16 wrongly in its interpreter: bfloat16 is for the GPU.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


class Sample(NamedTuple):
    """One call of an operator: its differentiable tensors and its other arguments, both by name."""

    tensors: dict
    options: dict


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, dtype=torch.float32, seed=0, device=DEVICE):
    """The same normal numbers on every device."""
    return torch.randn(*shape, generator=generator(seed)).to(device, dtype)


def like(tensor, seed=1):
    return randn(*tensor.shape, dtype=tensor.dtype, seed=seed, device=tensor.device)


def leaves(sample):
    """The tensors of a sample as leaves that require gradients; strides are kept."""
    return {name: tensor.detach().requires_grad_() for name, tensor in sample.tensors.items()}


def run(function, sample, do=None, backend="triton"):
    """Output and gradients by name. do: gradient of the output, a function of the output, or None for a random one."""
    tensors = leaves(sample)
    o = function(**tensors, **sample.options, backend=backend)
    if do is None:
        do = like
    gradients = torch.autograd.grad(o, tensors.values(), do(o.detach()) if callable(do) else do)
    return o.detach(), dict(zip(tensors, gradients, strict=True))


def assert_same(first, second, what=""):
    """Two results of `run` agree bit for bit."""
    assert torch.equal(first[0], second[0]), f"o differs {what}"
    for name in first[1]:
        assert torch.equal(first[1][name], second[1][name]), f"gradient of {name} differs {what}"


def assert_accurate(name, got, exact, plain, scale, dtype):
    """error <= 2 * (error of plain PyTorch in this dtype) + 4 eps * scale, by Frobenius norm and by largest element.

    got: the result. exact: the float64 oracle. plain: the same formula by plain torch operations in `dtype`; where it
    overflows it earns no allowance. scale: what `exact` becomes when every sum adds absolute values, so that 4 eps mean
    the roundings of the terms where these cancel (with one key in reach dq is 0, a difference of two equal numbers).
    """
    assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    assert torch.isfinite(got).all(), f"{name} is not finite"
    info = torch.finfo(dtype)
    quantum = info.smallest_normal * info.eps  # results below it cannot be told from zero
    norms = {"Frobenius": lambda t: t.norm() if t.dim() else t.abs(), "maximum": lambda t: t.abs().max()}
    for norm_name, norm in norms.items():
        error = norm(got.double() - exact).item()
        allowance = norm(plain.double() - exact).nan_to_num(0, 0, 0).item()
        floor = norm(torch.full_like(exact, quantum)).item()
        bound = 2 * allowance + 4 * info.eps * norm(scale).item() + floor
        assert error <= bound, (
            f"{name}: {norm_name} error {error:.3e} > 2 * {allowance:.3e} of plain {dtype} "
            f"+ 4 eps * {norm(scale).item():.3e} = {bound:.3e}"
        )
