"""The ways of linear and Hadamard attention to their result: each is a class with the launches of both directions.

    Tiles           tile by tile, by pairs or from the state, of any widths; Triton
    Walk            a block walks along a piece with the state on chip: causal, or one narrow factor; Triton and CUDA C++
    Bidirectional   one narrow factor without causality; CUDA C++
    Slabs           two factors of 64 without causality, whose state is read slab by slab; CUDA C++
"""

from typing import Any, NamedTuple

import torch

from nearfar import _cuda
from nearfar.kernels.linear_states import piece_length_of, walks
from nearfar.runtime.tensors import triton_module

_packing, _launchers = triton_module("packing"), triton_module("linear_launch")


class Call(NamedTuple):
    """A call on the meta device. pieces, first_pieces: tables of packed sequences (triton_kernels/packing.py), or None."""

    problem: Any
    qs: tuple[torch.Tensor, ...]
    ks: tuple[torch.Tensor, ...]
    v: torch.Tensor
    initial_state: torch.Tensor | None
    pieces: torch.Tensor | None
    first_pieces: torch.Tensor | None
    stateful: bool
    eps: float

    @property
    def q_strides(self) -> Any:
        return strides_of(self.qs)

    @property
    def k_strides(self) -> Any:
        return strides_of(self.ks)


def route_of(
    tensors: Any, stateful: bool, feature_map: str, causal: bool, eps: float, backend: str
) -> tuple["Route", list[Any]]:
    """The route of a call, and the launches that fill the tables of packed sequences."""
    *factors, v, initial_state, cu_seqlens = tensors
    qs, ks = tuple(factors[: len(factors) // 2]), tuple(factors[len(factors) // 2 :])
    q, widths, launch = qs[0], tuple(q.shape[3] for q in qs), _launchers()
    problem = launch.Problem(
        q.shape[0], q.shape[1], v.shape[1], q.shape[2], v.shape[2], widths, v.shape[3], v.dtype, feature_map, causal,
        walks(widths, v.shape[3], backend), piece_length_of(qs, v, causal, backend),
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, launch.operand_precision(v.dtype),
    )  # fmt: skip
    pieces = first_pieces = None
    launches: list[Any] = []
    if cu_seqlens is not None:
        sizes = v.shape[2], problem.num_pieces(v.shape[2]), problem.piece_length
        pieces, first_pieces, launches = _packing().piece_launches(cu_seqlens, *sizes)
    call = Call(problem, qs, ks, v, initial_state, pieces, first_pieces, stateful, eps)
    if backend == "cuda" and stateful and not causal:
        return Bidirectional(call) if problem.walks else Slabs(call), launches
    if problem.walks and (causal or stateful):
        return Walk(call, _cuda.Walk if backend == "cuda" else launch.plan_walk), launches
    return Tiles(call), launches


class Route:
    """The launches of one direction of a call, in order: what each route reads and writes is the same."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def forward(self, outputs: Any) -> list[Any]:
        """Fill o, the final state, inverse, states and norms; None for what does not exist."""
        o, state, inverse, states, norms = outputs
        launches = []
        if self.call.stateful:
            sums, combine = self._partials(False)
            combined = combine, (*sums, self.call.initial_state, states, norms, state, self.call.first_pieces)
            launches = [self.accumulate(sums), combined]
        return [*launches, self.read(o, inverse, states, norms)]

    def backward(self, do: Any, dstate: Any, saved: Any, dqs: Any, dks: Any, dv: Any, dinitial: Any) -> list[Any]:
        """Fill the gradients. saved: o, inverse, states, norms."""
        o, inverse, states, norms = saved
        weights = o.new_empty(o.shape[:3], dtype=torch.float32)
        sums = key_states = key_norms = None
        of_states = []
        if self.call.stateful:
            key_states, key_norms = torch.empty_like(states), torch.empty_like(norms)
            sums, combine = self._partials(True)
            combined = combine, (*sums, dstate, key_states, key_norms, dinitial, self.call.first_pieces)
            of_states = [*self.accumulate_gradients(do, inverse, weights, sums), combined]
        return [
            self.grad_queries(do, inverse, states, norms, weights, dqs, sums),
            *of_states,
            *self.grad_keys(do, inverse, weights, key_states, key_norms, dks, dv),
        ]

    def _partials(self, of_queries: bool) -> Any:
        """Partial sums over the keys, or over the queries for the gradients, and the launch that combines them."""
        problem = self.call.problem
        pieces = problem.num_pieces(problem.num_queries if of_queries else problem.num_keys)
        shape = problem.batch, problem.key_heads, pieces, problem.num_features
        sums = [self.call.v.new_empty(size, dtype=torch.float32) for size in ((*shape, problem.value_width), shape)]
        return sums, _launchers().plan_combine(problem, pieces, of_queries and problem.causal)

    def accumulate(self, sums: Any) -> Any:
        """Sums over the keys of each piece."""
        problem, _, ks, v, _, pieces, *_ = self.call
        plan = _launchers().plan_accumulate(problem, False, self.call.k_strides, v.stride())
        return plan, (ks, v, None, None, *sums, pieces)

    def accumulate_gradients(self, do: Any, inverse: Any, weights: Any, sums: Any) -> list[Any]:
        """Sums over the queries of each piece."""
        problem, qs, _, _, _, pieces, *_ = self.call
        plan = _launchers().plan_accumulate(problem, True, self.call.q_strides, do.stride())
        return [(plan, (qs, do, inverse, weights, *sums, pieces))]

    def read(self, o: Any, inverse: Any, states: Any, norms: Any) -> Any:
        raise NotImplementedError

    def grad_queries(self, do: Any, inverse: Any, states: Any, norms: Any, weights: Any, dqs: Any, sums: Any) -> Any:
        raise NotImplementedError

    def grad_keys(
        self, do: Any, inverse: Any, weights: Any, key_states: Any, key_norms: Any, dks: Any, dv: Any
    ) -> list[Any]:
        raise NotImplementedError


class Tiles(Route):
    @property
    def _direct(self) -> bool:
        """Whether tokens of a piece are paired."""
        return self.call.problem.causal or not self.call.stateful

    def read(self, o: Any, inverse: Any, states: Any, norms: Any) -> Any:
        problem, qs, ks, v, _, pieces, *_ = self.call
        strides = self.call.q_strides, self.call.k_strides, v.stride(), o.stride()
        plan = _launchers().plan_read(problem, False, self._direct, *strides, self.call.eps)
        return plan, (qs, ks, v, None, states, norms, o, inverse, pieces)

    def grad_queries(self, do: Any, inverse: Any, states: Any, norms: Any, weights: Any, dqs: Any, sums: Any) -> Any:
        problem, qs, ks, v, _, pieces, *_ = self.call
        strides = self.call.q_strides, do.stride(), self.call.k_strides, v.stride(), strides_of(dqs)
        plan = _launchers().plan_grad(problem, False, self._direct, *strides)
        return plan, (qs, do, inverse, weights, ks, v, None, None, states, norms, dqs, pieces)

    def grad_keys(
        self, do: Any, inverse: Any, weights: Any, key_states: Any, key_norms: Any, dks: Any, dv: Any
    ) -> list[Any]:
        problem, qs, ks, v, _, pieces, *_ = self.call
        strides = self.call.k_strides, v.stride(), self.call.q_strides, do.stride(), strides_of(dks)
        plan = _launchers().plan_grad(problem, True, self._direct, *strides)
        given = ks, v, None, None, qs, do, inverse, weights, key_states, key_norms, dks, pieces
        return [(plan, given), self.grad_values(do, inverse, key_states, key_norms, dv)]

    def grad_values(self, do: Any, inverse: Any, key_states: Any, key_norms: Any, dv: Any) -> Any:
        problem, qs, ks, _, _, pieces, *_ = self.call
        strides = self.call.k_strides, self.call.q_strides, do.stride(), dv.stride()
        plan = _launchers().plan_read(problem, True, self._direct, *strides, 0.0)
        return plan, (ks, qs, do, inverse, key_states, key_norms, dv, None, pieces)


class Walk(Route):
    def __init__(self, call: Call, plan: Any) -> None:
        """plan: what makes launches of the walks, in Triton or in CUDA C++."""
        super().__init__(call)
        self._plan = plan

    def read(self, o: Any, inverse: Any, states: Any, norms: Any) -> Any:
        problem, qs, ks, v, _, pieces, *_ = self.call
        strides = *self.call.q_strides, *self.call.k_strides, v.stride(), o.stride()
        return self._plan(problem, "walk_read", strides, (self.call.eps,)), (*qs, *ks, v, states, norms, o, inverse, pieces)

    def grad_queries(self, do: Any, inverse: Any, states: Any, norms: Any, weights: Any, dqs: Any, sums: Any) -> Any:
        problem, qs, ks, v, _, pieces, *_ = self.call
        strides = *self.call.q_strides, *self.call.k_strides, v.stride(), do.stride(), *strides_of(dqs)
        given = *qs, *ks, v, do, inverse, states, norms, *dqs, weights, pieces
        eps = (self.call.eps,) if self._plan is _cuda.Walk else ()  # its weights are summed anew
        return self._plan(problem, "walk_grad_queries", strides, eps), given

    def grad_keys(
        self, do: Any, inverse: Any, weights: Any, key_states: Any, key_norms: Any, dks: Any, dv: Any
    ) -> list[Any]:
        problem, qs, ks, v, _, pieces, *_ = self.call
        strides = (*self.call.k_strides, v.stride(), *self.call.q_strides, do.stride(), *strides_of(dks), dv.stride())
        given = *ks, v, *qs, do, inverse, weights, key_states, key_norms, *dks, dv, pieces
        return [(self._plan(problem, "walk_grad_keys", strides), given)]


class Bidirectional(Route):
    """The kernel of the gradients of the queries sums what those of the keys need."""

    def accumulate(self, sums: Any) -> Any:
        problem, _, ks, v, _, pieces, *_ = self.call
        return _cuda.LinearBidirectional(problem, "sums", (*self.call.k_strides, v.stride())), (*ks, v, *sums, pieces)

    def accumulate_gradients(self, do: Any, inverse: Any, weights: Any, sums: Any) -> list[Any]:
        return []

    def read(self, o: Any, inverse: Any, states: Any, norms: Any) -> Any:
        problem, qs, _, _, _, pieces, *_ = self.call
        plan = _cuda.LinearBidirectional(problem, "read", (*self.call.q_strides, o.stride()), (self.call.eps,))
        return plan, (*qs, states, norms, o, inverse, pieces)

    def grad_queries(self, do: Any, inverse: Any, states: Any, norms: Any, weights: Any, dqs: Any, sums: Any) -> Any:
        problem, qs, _, _, _, pieces, *_ = self.call
        strides = *self.call.q_strides, do.stride(), *strides_of(dqs)
        given = *qs, do, inverse, states, norms, *dqs, *sums, pieces
        return _cuda.LinearBidirectional(problem, "grad_queries", strides), given

    def grad_keys(
        self, do: Any, inverse: Any, weights: Any, key_states: Any, key_norms: Any, dks: Any, dv: Any
    ) -> list[Any]:
        problem, _, ks, v, _, pieces, *_ = self.call
        strides = *self.call.k_strides, v.stride(), *strides_of(dks), dv.stride()
        given = *ks, v, key_states, key_norms, *dks, dv, pieces
        return [(_cuda.LinearBidirectional(problem, "grad_keys", strides), given)]


class Slabs(Tiles):
    """Accumulating leaves a counter and tiles of norms for the kernel that reads the state."""

    def accumulate(self, sums: Any) -> Any:
        problem, _, ks, v, _, pieces, *_ = self.call
        plan = _cuda.HadamardAccumulate(problem, False, self.call.k_strides, v.stride())
        workspaces = plan.workspaces(problem, False, v)
        self._counter, self._norm_tiles = workspaces[-2:]
        return plan, (ks, v, None, None, *sums, *workspaces, pieces)

    def accumulate_gradients(self, do: Any, inverse: Any, weights: Any, sums: Any) -> list[Any]:
        problem, qs, _, _, _, pieces, *_ = self.call
        plan = _cuda.HadamardAccumulate(problem, True, self.call.q_strides, do.stride())
        workspaces = plan.workspaces(problem, True, do)
        self._counter, self._norm_tiles = workspaces[-2:]
        return [(plan, (qs, do, inverse, weights, *sums, *workspaces, pieces))]

    def read(self, o: Any, inverse: Any, states: Any, norms: Any) -> Any:
        problem, qs, ks, v, _, pieces, *_ = self.call
        plan = _cuda.HadamardRead(problem, False, self.call.q_strides, o.stride(), self.call.eps)
        return plan, (qs, ks, v, None, states, norms, o, inverse, self._counter, self._norm_tiles, pieces)

    def grad_values(self, do: Any, inverse: Any, key_states: Any, key_norms: Any, dv: Any) -> Any:
        problem, qs, ks, _, _, pieces, *_ = self.call
        plan = _cuda.HadamardRead(problem, True, self.call.k_strides, dv.stride(), 0.0)
        given = ks, qs, do, inverse, key_states, key_norms, dv, None, self._counter, self._norm_tiles, pieces
        return plan, given


def strides_of(tensors: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.stride() for tensor in tensors)
