"""The interface between an operator and its backends."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nearfar.runtime.program import Program


class Backend:
    """Builds the programs that fill an operator's outputs. All tensors here are on the meta device."""

    def forward(self, tensors: Any, outputs: Any, *options: Any) -> "Program":
        """Build the program that computes outputs from tensors."""
        raise NotImplementedError

    def backward(self, gradients: Any, tensors: Any, saved: Any, results: Any, *options: Any) -> "Program":
        """Build the program that computes results, the gradients of the tensors.

        Its inputs are (*gradients, *tensors, *saved), gradients being those of the visible outputs.
        """
        raise NotImplementedError

    def aligned(self, rows: torch.Tensor) -> torch.Tensor:
        """The input (its last dimension is contiguous), or a copy if the kernels require another alignment."""
        return rows

    def aligned_gradient(self, gradient: torch.Tensor, *options: Any) -> torch.Tensor:
        """The same for an upstream gradient, whose layout autograd chooses."""
        return gradient
