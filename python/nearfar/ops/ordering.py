"""Sorting tokens along their dominant direction."""

from typing import Any

import torch

ITERATIONS = 3  # of the power method; any direction of large variance is good enough


@torch.no_grad()
def by_frequency(omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(permutation, inverse), each (B, H, N), that sorts the tokens of omega (B, H, N, D) along their dominant direction."""
    wide = omega.to(torch.promote_types(omega.dtype, torch.float32))
    wide = wide - wide.mean(2, keepdim=True)
    # Start from the farthest token, not from random numbers, so that the result is deterministic.
    farthest = wide.square().sum(-1).argmax(2)[..., None] if wide.shape[2] else None
    if farthest is None:
        permutation = torch.zeros(omega.shape[:3], dtype=torch.int64, device=omega.device)
        return permutation, permutation
    direction = _rows(wide, farthest).mT
    for _ in range(ITERATIONS):
        direction = torch.nn.functional.normalize(wide.mT @ (wide @ direction), dim=2)
    permutation = (wide @ direction)[..., 0].argsort(dim=2, stable=True)
    return permutation, permutation.argsort(dim=2)


def _rows(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The rows of tensor (B, H, N, D) at indices (B, H, M). take_along_dim would specialise a compiled call to one length."""
    return tensor.gather(2, indices[..., None].expand(*indices.shape, tensor.shape[3]))


def permute(tensor: torch.Tensor, permutation: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The rows of tensor (B, H, N, _) in the order of permutation. The gradient is a gather by the inverse, not a scatter."""
    return _Permute.apply(tensor, permutation, inverse)


class _Permute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: torch.Tensor, permutation: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return _rows(tensor, permutation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        permutation, inverse = ctx.saved_tensors
        return permute(gradient, inverse, permutation), None, None
