"""Backend selection. Each operator states why a backend cannot serve a call; one rule for all operators does the rest.

For CUDA tensors, "auto" takes the first kernel backend that can serve the call, in the order that was measured to be faster
(choices.json). For CPU tensors it takes the reference. A CUDA call that no kernel serves raises; it does not fall back to the
slow reference unless NEARFAR_ALLOW_REFERENCE=1.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from nearfar.runtime.private import constant_while_traced
from nearfar.runtime.tensors import triton_module

Backend = Literal["auto", "cuda", "triton", "reference"]  # values of the `backend` argument
Ties = Literal["index", "keep"]  # what a selection does with equal scores at its cut
Orders = tuple[Sequence[str], Sequence[str]]  # in which "auto" tries the kernel backends: forward, backward

BACKENDS = ("cuda", "triton", "reference")
KERNELS = CUDA_FIRST = ("cuda", "triton")
TRITON_FIRST = ("triton", "cuda")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def triton_device_reason(tensor: torch.Tensor) -> str | None:
    """Why Triton cannot run on the device and dtype of this tensor, or None."""
    if tensor.dtype not in KERNEL_DTYPES:
        return f"q has dtype {tensor.dtype}; kernels take float16, bfloat16 and float32"
    if tensor.is_cuda:  # under torch.compile the capability is not queried: on an older GPU Triton raises its own error
        return None if torch.compiler.is_compiling() else _capability_reason(tensor.device.index)
    if tensor.device.type == "meta":
        return None
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return _interpreter_reason() if tensor.dtype == torch.bfloat16 else None
    return f"q is on {tensor.device}; the kernels need a CUDA device (or TRITON_INTERPRET=1 for CPU tensors)"


_interpreter = triton_module("interpreter")


@constant_while_traced
def _interpreter_reason() -> str | None:
    """Why bfloat16 cannot be interpreted, or None."""
    if _interpreter().multiplies_bfloat16():
        return None
    return "q is bfloat16, whose products Triton's interpreter (TRITON_INTERPRET=1) gets wrong; take float32 or float16 there"


@functools.cache
def _capability_reason(device_index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device_index)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def choose(backend: str, reasons: Mapping[str, str | None], device: torch.device, order: Sequence[str] = KERNELS) -> str:
    """Name of the backend that serves a call.

    Args:
        backend: the user's choice, "auto" or one of BACKENDS.
        reasons: for each backend, why it cannot serve the call; None if it can.
        device: device of the call's tensors.
        order: the kernel backends in the order in which "auto" tries them.

    Raises:
        ValueError: backend is unknown, or cannot serve the call.
    """
    if backend == "auto":
        if device.type != "cuda":
            return "reference"
        for name in order:
            if reasons[name] is None:
                return name
        if os.environ.get("NEARFAR_ALLOW_REFERENCE") == "1":
            return "reference"
        raise ValueError(
            f"no kernel serves this call: cuda: {reasons['cuda']}; triton: {reasons['triton']}. "
            'Pass backend="reference" or set NEARFAR_ALLOW_REFERENCE=1 to run the slow reference instead'
        )
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto", "cuda", "triton" or "reference", got {backend!r}')
    if reasons[backend] is not None:
        raise ValueError(f"backend={backend!r} cannot serve this call: {reasons[backend]}")
    return backend


class Backends:
    """Reasons why the kernel backends cannot serve calls of one layout (None if they can), and the order for "auto".

    orders: of the forward and of the backward. too_many: returns why kernels cannot take so many keys, or None. It is called
    only if a kernel may be chosen: the comparison would specialise a traced length, which the reference does not need.
    """

    def __init__(
        self,
        cuda: str | None,
        triton: str | None,
        orders: Orders = (KERNELS, KERNELS),
        too_many: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.cuda, self.triton, self.orders, self.too_many = cuda, triton, orders, too_many
        self._known: dict[str, tuple[str, ...]] = {}

    def reasons(self, tensor: torch.Tensor) -> dict[str, str | None]:
        """For each backend, why it cannot serve a call of this tensor; None if it can."""
        cuda, triton = self.cuda, triton_device_reason(tensor) or self.triton
        if cuda is None or triton is None:
            too_many = self.too_many()
            cuda, triton = cuda or too_many, triton or too_many
        return {"cuda": cuda, "triton": triton, "reference": None}

    def served(self, backend: str, tensor: torch.Tensor) -> tuple[str, ...]:
        """Names of the backends that serve the forward and the backward of a call of this tensor; see `choose`."""
        names = self._known.get(backend) if isinstance(backend, str) else None
        if names is None:
            if backend == "reference" or (backend == "auto" and tensor.device.type != "cuda"):
                return "reference", "reference"
            reasons = self.reasons(tensor)
            names = tuple([choose(backend, reasons, tensor.device, order) for order in self.orders])
            if tensor.is_cuda and "reference" not in names:  # then no environment variable affects the result
                self._known[backend] = names
        return names


def report(name: str, backend: str, call: Any) -> str:
    """Text of `nearfar.explain`: one line for each backend."""
    try:
        forward, backward = call.backends.served(backend, call.q)
        chosen = forward if forward == backward else f"{forward}, its gradients by {backward}"
        head = f"{name}: served by {chosen} (backend={backend!r}, device={call.q.device})"
    except ValueError as error:
        head = f"{name}: refused: {error}"
    reasons = call.backends.reasons(call.q)
    lines = [f"  {candidate:9}  {reasons[candidate] or 'can serve this call'}" for candidate in BACKENDS]
    return "\n".join([head, *lines])
