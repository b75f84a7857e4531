"""Selective synchronization attention on its kernels: `torch.ops.nearfar.synchronization_attention`."""

from typing import Any

import torch

from nearfar import _cuda
from nearfar.kernels.krause import selection_words
from nearfar.runtime.backend import Backend
from nearfar.runtime.operator import Operator
from nearfar.runtime.program import Program
from nearfar.runtime.tensors import empty, empty_rows, triton_module

_launchers = triton_module("synchronization_launch")


class Synchronization(Operator):
    """omega_k is None if keys are queries. The backward reads total (B, Hq, N), the sums of S, and bits, the selection."""

    name = "synchronization_attention"
    tensors = "Tensor omega, Tensor? omega_k, Tensor v, Tensor coupling, Tensor bandwidth, Tensor order"
    options = "bool causal, int? top_k, float grad_floor"
    rows = "omega", "omega_k", "v"
    outputs = "o", "total", "bits"

    def __init__(self) -> None:
        super().__init__()
        self.backends = {"cuda": SynchronizationCuda(), "triton": SynchronizationTriton()}

    def empty(self, tensors: Any, causal: bool, top_k: int | None, *_: Any) -> Any:
        omega, _, v, *_ = tensors
        total, bits = empty(omega, omega.shape[:3], torch.float32), None
        if top_k is not None:
            bits = empty(omega, (*omega.shape[:3], selection_words(-1, -1, v.shape[2])), torch.int32)
        return empty_rows(omega, v.shape[3]), total, bits

    def has_nothing_to_do(self, tensors: Any, outputs: Any) -> bool:
        return not outputs[0].numel() or not tensors[2].shape[2]


class SynchronizationTriton(Backend):
    def forward(self, tensors: Any, outputs: Any, causal: bool, top_k: int | None, grad_floor: float) -> Program:
        return Program(tensors, outputs, _launchers().forward_launches(*tensors, causal, top_k, *outputs))

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any, causal: bool, top_k: int | None, grad_floor: float
    ) -> Program:
        launches = _launchers().backward_launches(*tensors, causal, grad_floor, *saved, *gradients, *results)
        return Program((*gradients, *tensors, *saved), results, launches)


class SynchronizationCuda(_cuda.CudaBackend):
    """One kernel in each direction, between Triton's surveys and lists. The backward kernel requires a symmetric S."""

    def forward(self, tensors: Any, outputs: Any, causal: bool, top_k: int | None, grad_floor: float) -> Program:
        omega, _, v, _, bandwidth, _ = tensors
        o, total, _ = outputs
        given = dict(omega=omega, v=v, bandwidth=bandwidth, o=o, total=total)
        attend = self._in_place(
            "synchronization_forward", _cuda.extension.SYNCHRONIZATION_ROWS, given, "omega v o", causal=causal
        )
        return Program(tensors, outputs, _launchers().forward_launches(*tensors, causal, top_k, *outputs, attend))

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any, causal: bool, top_k: int | None, grad_floor: float
    ) -> Program:
        omega, omega_k, v, _, bandwidth, order = tensors
        (do,), (dw, _, dv, *_), cuda = gradients, results, None
        if _launchers().is_symmetric(omega_k, saved[2], causal, order):
            given = dict(omega=omega, v=v, bandwidth=bandwidth, grad_o=do, dw=dw, dv=dv)
            rows, strided = _cuda.extension.SYNCHRONIZATION_GRAD_ROWS, "omega v grad_o dw dv"
            cuda = self._in_place("synchronization_backward", rows, given, strided, grad_floor=grad_floor)
        launches = _launchers().backward_launches(*tensors, causal, grad_floor, *saved, *gradients, *results, cuda)
        return Program((*gradients, *tensors, *saved), results, launches)

    def _in_place(self, kernel: str, rows: int, given: dict[str, torch.Tensor], strided: str, **others: Any) -> Any:
        batches, heads, num_tokens, _ = given["omega"].shape
        sizes = dict(batches=batches, heads=heads, num_tokens=num_tokens, bandwidth_stride=_cuda.by_head(given["bandwidth"]))

        def call(**workspaces: torch.Tensor) -> Any:
            return _cuda.call(kernel, _cuda.dtype_of(given["omega"]), given | workspaces, strided, **sizes, **others)

        return _launchers().InPlace(rows, _cuda.extension.SYNCHRONIZATION_MEMBERS, call)

    def aligned_gradient(self, gradient: torch.Tensor, *_: Any) -> torch.Tensor:
        return _cuda.aligned_boxes(gradient)


synchronization = Synchronization()
