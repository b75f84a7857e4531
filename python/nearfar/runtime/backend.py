"""What an operator asks of each of its backends."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nearfar.runtime.program import Program


class Backend:
    """What fills the outputs of an operator: programs, made of tensors of the meta device."""

    def forward(self, tensors: Any, outputs: Any, *options: Any) -> "Program":
        """The program tensors -> outputs."""
        raise NotImplementedError

    def backward(self, gradients: Any, tensors: Any, saved: Any, results: Any, *options: Any) -> "Program":
        """The program (*gradients of the visible outputs, *tensors, *saved) -> results, the gradients of the tensors."""
        raise NotImplementedError

    def aligned(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of an input, with a contiguous last dimension, as the kernels read them: themselves or a copy."""
        return rows

    def aligned_gradient(self, gradient: torch.Tensor, *options: Any) -> torch.Tensor:
        """The same of an upstream gradient, whose layout autograd chooses."""
        return gradient
