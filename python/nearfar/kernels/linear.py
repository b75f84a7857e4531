"""Linear and Hadamard linear attention on their kernels: `torch.ops.nearfar.hadamard_attention`."""

from typing import Any

import torch
from torch import Tensor

from nearfar import _cuda
from nearfar.kernels.linear_routes import route_of
from nearfar.kernels.linear_states import empty_states, num_states, uses_states
from nearfar.reference.linear import step as reference_step
from nearfar.runtime.backend import Backend
from nearfar.runtime.checks import no_autocast
from nearfar.runtime.operator import Operator
from nearfar.runtime.program import Program
from nearfar.runtime.step import define_step
from nearfar.runtime.tensors import device_of, empty, empty_rows, triton_module, unit_stride

_launchers = triton_module("linear_launch")


class Linear(Operator):
    """Hadamard linear attention; linear attention is the case of one factor.

    The backward reads inverse (B, Hq, N), the reciprocals of the normalisers, and, if the forward saved them, states and norms
    of the pieces. With one factor, the backward may run on another backend than the forward; with several it may not.
    """

    name = "hadamard_attention"
    serves = "linear_attention and hadamard_attention"
    tensors = "Tensor[] qs, Tensor[] ks, Tensor v, Tensor? initial_state, Tensor? cu_seqlens"
    options = "str feature_map, bool normalize, bool causal, float eps, bool return_state"
    rows = "qs", "ks", "v"
    constants = 1
    outputs = "o", "state", "inverse", "states", "norms"
    visible = 2

    def __init__(self) -> None:
        super().__init__()
        self.backends = {"cuda": LinearCuda(), "triton": LinearTriton()}

    def empty(self, tensors: Any, *options: Any) -> Any:
        return self._empty(tensors, True, *options)

    def empty_fake(self, tensors: Any, *options: Any) -> Any:
        """While exporting with a dynamic length, the number of saved states is a new symbol.

        Computed from the length, it would restrict the exported program to some lengths.
        """
        (qs, v), backend = _queries_and_values(tensors), options[-1]
        if not (torch.compiler.is_exporting() and any(isinstance(x.shape[2], torch.SymInt) for x in (*qs, v))):
            return self.empty(tensors, *options)
        outputs = self._empty(tensors, False, *options)
        return *outputs[:3], *empty_states(qs, v, torch.library.get_ctx().new_dynamic_size(), backend)

    def _empty(
        self, tensors: Any, keeps: bool, _: str, normalize: bool, causal: bool, eps: float, return_state: bool, backend: str
    ) -> Any:
        """keeps: save states if the call uses them."""
        qs, v = _queries_and_values(tensors)
        initial_state, cu_seqlens = tensors[-2:]
        batch, query_heads, num_queries, _ = qs[0].shape
        state = inverse = states = norms = None
        if return_state:
            sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
            shape = sequences, v.shape[1], *[q.shape[3] for q in qs], v.shape[3] + 1
            state = empty(v, shape, torch.float32)
        if normalize:
            inverse = empty(v, (batch, query_heads, num_queries), torch.float32)
        if keeps and uses_states(qs, v, causal, initial_state is not None or return_state, backend):
            states, norms = empty_states(qs, v, num_states(qs, v, cu_seqlens, causal, backend), backend)
        return empty_rows(qs[0], v.shape[3]), state, inverse, states, norms

    def present(self, outputs: Any, tensors: Any, *options: Any) -> list[Tensor]:
        """Represent absent states by 0 states, so that the output has the same rank in all calls."""
        *others, states, norms = outputs
        if states is None:
            qs, v = _queries_and_values(tensors)
            states, norms = empty_states(qs, v, 0, options[-1])
        return super().present([*others, states, norms], tensors)

    def absent(self, saved: Any, tensors: Any) -> list[Tensor | None]:
        *others, states, norms = saved
        *_, v, initial_state, _ = tensors
        # No states were saved, except that an empty sequence which continues a state saves 0 of them.
        if states is not None and not states.shape[2] and (v.shape[2] or initial_state is None):
            states = norms = None
        return super().absent([*others, states, norms], tensors)


def _queries_and_values(tensors: Any) -> Any:
    return tensors[: (len(tensors) - 3) // 2], tensors[-3]


class LinearTriton(Backend):
    name = "triton"

    def forward(
        self, tensors: Any, outputs: Any, feature_map: str, normalize: bool, causal: bool, eps: float, return_state: bool
    ) -> Program:
        route, launches = route_of(tensors, outputs[3] is not None, feature_map, causal, eps, self.name)
        return Program(tensors, outputs, [*launches, *route.forward(outputs)])

    def backward(
        self, gradients: Any, tensors: Any, saved: Any, results: Any,
        feature_map: str, normalize: bool, causal: bool, eps: float, return_state: bool,
    ) -> Program:
        route, launches = route_of(tensors, saved[2] is not None, feature_map, causal, eps, self.name)
        (do, dstate), (*factors, dv, dinitial, _) = gradients, results
        dqs, dks = tuple(factors[: len(factors) // 2]), tuple(factors[len(factors) // 2 :])
        launches += route.backward(do, dstate, saved, dqs, dks, dv, dinitial)
        return Program((*gradients, *tensors, *saved), results, launches)


class LinearCuda(_cuda.CudaBackend, LinearTriton):
    name = "cuda"

    def aligned_gradient(self, gradient: Tensor, *options: Any) -> Tensor:
        _, _, causal, *_ = options
        return _cuda.aligned(gradient) if causal else _cuda.aligned_boxes(gradient)


linear = Linear()


def _step(
    qs: list[Tensor], ks: list[Tensor], v: Tensor, state: Tensor, out: Tensor,
    feature_map: str, normalize: bool, eps: float, backend: str,
) -> None:
    """One token: update the state and fill out (B, Hq, 1, Dv)."""
    if backend == "reference":
        with no_autocast(v):
            out.copy_(reference_step(qs, ks, v, state, feature_map, normalize, eps))
    elif out.numel():
        qs, ks, v = tuple(map(unit_stride, qs)), tuple(map(unit_stride, ks)), unit_stride(v)  # type: ignore[assignment]
        widths, group = tuple([q.shape[3] for q in qs]), qs[0].shape[1] // v.shape[1]
        strides = tuple(q.stride() for q in qs), tuple(k.stride() for k in ks), v.stride(), out.stride()
        with device_of(v):
            plan = _launchers().plan_step(*v.shape[:2], group, widths, v.shape[3], feature_map, normalize, eps, strides)
            plan(qs, ks, v, state, out)


step = define_step("hadamard_attention_step", _step, ("state", "out"))
