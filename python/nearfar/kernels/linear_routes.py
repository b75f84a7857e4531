"""Routes of linear and Hadamard attention. Each is a class with the launches of both directions.

    Tiles           tile by tile, from pairs or from the state; any widths; Triton
    Walk            a block walks along a piece and keeps the state on chip; causal, or one narrow factor; Triton
    CudaWalk        the same in CUDA C++
    Bidirectional   one narrow factor, not causal; CUDA C++
    Slabs           two factors of 64, not causal; reads the state slab by slab; CUDA C++
"""

from typing import Any, NamedTuple

import torch

from nearfar import _cuda
from nearfar.kernels.linear_states import piece_length_of, walks
from nearfar.runtime.tensors import empty, triton_module

_packing, _launchers = triton_module("packing"), triton_module("linear_launch")


class Call(NamedTuple):
    """A call with meta tensors. pieces, first_pieces: tables of packed sequences (triton_kernels/packing.py), or None."""

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
    )
    pieces = first_pieces = None
    launches: list[Any] = []
    if cu_seqlens is not None:
        sizes = v.shape[2], problem.num_pieces(v.shape[2]), problem.piece_length
        pieces, first_pieces, launches = _packing().piece_launches(cu_seqlens, *sizes)
    call = Call(problem, qs, ks, v, initial_state, pieces, first_pieces, stateful, eps)
    if backend == "cuda" and stateful and not causal:
        return Bidirectional(call) if problem.walks else Slabs(call), launches
    if problem.walks and (causal or stateful):
        return (CudaWalk if backend == "cuda" else Walk)(call), launches
    return Tiles(call), launches


class Route:
    """Builds the launches of each direction of a call, in order. All routes have the same inputs and outputs."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def forward(self, outputs: Any) -> list[Any]:
        """Launches that fill o, the final state, inverse, states and norms; None for absent ones."""
        o, state, inverse, states, norms = outputs
        launches = []
        if self.call.stateful:
            sums, combine = self._partials(False)
            combined = combine, (*sums, self.call.initial_state, states, norms, state, self.call.first_pieces)
            launches = [self.accumulate(sums), combined]
        return [*launches, self.read(o, inverse, states, norms)]

    def backward(self, do: Any, dstate: Any, saved: Any, dqs: Any, dks: Any, dv: Any, dinitial: Any) -> list[Any]:
        """Launches that fill the gradients. saved: o, inverse, states, norms."""
        o, inverse, states, norms = saved
        weights = empty(o, o.shape[:3], torch.float32)
        sums = key_states = key_norms = None
        of_states = []
        if self.call.stateful:
            key_states, key_norms = empty(states, states.shape), empty(norms, norms.shape)
            sums, combine = self._partials(True)
            combined = combine, (*sums, dstate, key_states, key_norms, dinitial, self.call.first_pieces)
            of_states = [*self.accumulate_gradients(do, inverse, weights, sums), combined]
        return [
            self.grad_queries(do, inverse, states, norms, weights, dqs, sums),
            *of_states,
            *self.grad_keys(do, inverse, weights, key_states, key_norms, dks, dv),
        ]

    def _partials(self, of_queries: bool) -> Any:
        """(workspaces of partial sums, plan of the kernel that combines them). of_queries: sums over queries, for gradients."""
        problem = self.call.problem
        pieces = problem.num_pieces(problem.num_queries if of_queries else problem.num_keys)
        shape = problem.batch, problem.key_heads, pieces, problem.num_features
        sums = [empty(self.call.v, size, torch.float32) for size in ((*shape, problem.value_width), shape)]
        return sums, _launchers().plan_combine(problem, pieces, of_queries and problem.causal)

    def accumulate(self, sums: Any) -> Any:
        """Launch that sums over the keys of each piece."""
        problem, _, ks, v, _, pieces, *_ = self.call
        plan = _launchers().plan_accumulate(problem, False, self.call.k_strides, v.stride())
        return plan, (ks, v, None, None, *sums, pieces)

    def accumulate_gradients(self, do: Any, inverse: Any, weights: Any, sums: Any) -> list[Any]:
        """Launches that sum over the queries of each piece."""
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
        """Whether tokens of a piece are paired directly."""
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
    """Walks in Triton. CudaWalk, in CUDA C++, has tensors and strides of the same names and in the same order."""

    def read(self, o: Any, inverse: Any, states: Any, norms: Any) -> Any:
        _, qs, ks, v, _, pieces, *_ = self.call
        rows = named("q", qs) | named("k", ks) | dict(v=v)
        given = rows | dict(states=states, norms=norms, o=o, inverse=inverse, pieces=pieces)
        return self.launch("read", given, [*rows, "o"], eps=self.call.eps)

    def grad_queries(self, do: Any, inverse: Any, states: Any, norms: Any, weights: Any, dqs: Any, sums: Any) -> Any:
        _, qs, ks, v, _, pieces, *_ = self.call
        rows, of_rows = named("q", qs) | named("k", ks) | dict(v=v, grad_o=do), named("dq", dqs)
        given = rows | dict(inverse=inverse, states=states, norms=norms) | of_rows | dict(weights=weights, pieces=pieces)
        return self.launch("grad_queries", given, [*rows, *of_rows], **self.of_gradients())

    def grad_keys(
        self, do: Any, inverse: Any, weights: Any, key_states: Any, key_norms: Any, dks: Any, dv: Any
    ) -> list[Any]:
        _, qs, ks, v, _, pieces, *_ = self.call
        rows, of_rows = named("k", ks) | dict(v=v) | named("q", qs) | dict(grad_o=do), named("dk", dks) | dict(dv=dv)
        between = dict(inverse=inverse, weights=weights, states=key_states, norms=key_norms)
        return [self.launch("grad_keys", rows | between | of_rows | dict(pieces=pieces), [*rows, *of_rows])]

    def of_gradients(self) -> dict[str, float]:
        """Numbers besides the sizes that the kernel of the queries' gradients takes."""
        return {}

    def launch(self, kernel: str, tensors: dict[str, Any], strided: list[str], **eps: float) -> Any:
        strides = tuple(tensors[name].stride() for name in strided)
        plan = _launchers().plan_walk(self.call.problem, f"walk_{kernel}", strides, tuple(eps.values()))
        return plan, tuple(tensors.values())


class CudaWalk(Walk):
    def of_gradients(self) -> dict[str, float]:
        return dict(eps=self.call.eps)  # the kernel sums the weights again

    def launch(self, kernel: str, tensors: dict[str, Any], strided: list[str], **eps: float) -> Any:
        problem = self.call.problem
        kernel, (num_pieces, piece_length) = kernel.replace("read", "forward"), problem.spans
        operator, width = ("linear", dict(width=problem.widths[0])) if len(problem.widths) == 1 else ("hadamard", {})
        return _cuda.call(
            f"{operator}_causal_{kernel}", problem.feature_map, tensors, " ".join(strided), **group_sizes(problem), **width,
            num_tokens=problem.num_queries, num_pieces=num_pieces, piece_length=piece_length, **eps,
        )


class Bidirectional(Route):
    """The kernel of the queries' gradients also computes the sums that the keys' gradients need."""

    def accumulate(self, sums: Any) -> Any:
        _, _, (k,), v, _, pieces, *_ = self.call
        return self._launch("sums", dict(k=k, v=v, **of_pieces(sums), pieces=pieces), "k v")

    def accumulate_gradients(self, do: Any, inverse: Any, weights: Any, sums: Any) -> list[Any]:
        return []

    def read(self, o: Any, inverse: Any, states: Any, norms: Any) -> Any:
        _, (q,), _, _, _, pieces, *_ = self.call
        given = dict(q=q, states=states, norms=norms, o=o, inverse=inverse, pieces=pieces)
        return self._launch("read", given, "q o", of_queries=True, eps=self.call.eps)

    def grad_queries(self, do: Any, inverse: Any, states: Any, norms: Any, weights: Any, dqs: Any, sums: Any) -> Any:
        _, (q,), _, _, _, pieces, *_ = self.call
        given = dict(q=q, grad_o=do, inverse=inverse, states=states, norms=norms, dq=dqs[0], **of_pieces(sums), pieces=pieces)
        return self._launch("grad_queries", given, "q grad_o dq", of_queries=True)

    def grad_keys(
        self, do: Any, inverse: Any, weights: Any, key_states: Any, key_norms: Any, dks: Any, dv: Any
    ) -> list[Any]:
        _, _, (k,), v, _, pieces, *_ = self.call
        given = dict(k=k, v=v, states=key_states, norms=key_norms, dk=dks[0], dv=dv, pieces=pieces)
        return [self._launch("grad_keys", given, "k v dk dv")]

    def _launch(self, kernel: str, tensors: dict[str, Any], strided: str, of_queries: bool = False, **eps: float) -> Any:
        problem = self.call.problem
        tokens = problem.num_queries if of_queries else problem.num_keys
        return _cuda.call(
            f"linear_bidirectional_{kernel}", problem.feature_map, tensors, strided, **group_sizes(problem), num_tokens=tokens,
            width=problem.widths[0], num_pieces=problem.num_pieces(tokens), piece_length=problem.piece_length,
            num_states=problem.num_states, **eps,
        )


class Slabs(Tiles):
    """The accumulating kernel also fills a counter and tiles of norms for the kernel that reads the state."""

    def accumulate(self, sums: Any) -> Any:
        _, _, ks, v, *_ = self.call
        return self._accumulate(ks, v, None, sums, of_queries=False)

    def accumulate_gradients(self, do: Any, inverse: Any, weights: Any, sums: Any) -> list[Any]:
        return [self._accumulate(self.call.qs, do, dict(factors=inverse, weights=weights), sums, of_queries=True)]

    def read(self, o: Any, inverse: Any, states: Any, norms: Any) -> Any:
        return self._read(self.call.qs, states, norms, o, inverse, self.call.eps, of_queries=True)

    def grad_values(self, do: Any, inverse: Any, key_states: Any, key_norms: Any, dv: Any) -> Any:
        return self._read(self.call.ks, key_states, key_norms, dv, None, 0.0, of_queries=False)

    def _accumulate(self, xs: Any, y: Any, of_rows: Any, sums: Any, of_queries: bool) -> Any:
        """Launch that sums features times y. of_rows: factors and weights of the rows, None for 1."""
        problem, sizes = self.call.problem, self._sizes(of_queries)
        chunk, width = _cuda.extension.HADAMARD_BIDIRECTIONAL_CHUNK, _cuda.extension.HADAMARD_BIDIRECTIONAL_WIDTH
        shape = problem.batch, sizes["heads"], -(-sizes["num_tokens"] // chunk), chunk, width
        self._counter = empty(y, (1,), torch.int32)
        self._norm_tiles = None if of_queries else empty(y, (problem.batch, problem.key_heads, 2, chunk, width))
        tiles: dict[str, Any] = dict(outer_tiles=empty(y, shape), inner_tiles=empty(y, shape))
        tiles["weighted_tiles"] = empty(y, shape) if of_queries else None
        return _cuda.call(
            "hadamard_bidirectional_accumulate", problem.feature_map,
            dict(outer=xs[0], inner=xs[1], y=y, **(of_rows or dict(factors=None, weights=None)), **of_pieces(sums), **tiles)
            | dict(counter=self._counter),
            "outer inner y",
            **sizes, num_pieces=problem.num_pieces(sizes["num_tokens"]), piece_length=problem.piece_length,
        )

    def _read(self, xs: Any, states: Any, norms: Any, out: Any, inverse: Any, eps: float, of_queries: bool) -> Any:
        given = dict(outer=xs[0], inner=xs[1], states=states, norms=norms, out=out, inverse=inverse)
        return _cuda.call(
            "hadamard_bidirectional_read", self.call.problem.feature_map,
            given | dict(counter=self._counter, norm_tiles=self._norm_tiles), "outer inner out",
            **self._sizes(of_queries), eps=eps,
        )

    def _sizes(self, of_queries: bool) -> dict[str, int]:
        problem = self.call.problem
        tokens, heads = problem.num_keys, problem.key_heads
        if of_queries:
            tokens, heads = problem.num_queries, problem.query_heads
        return dict(
            batches=problem.batch, heads=heads, state_heads=problem.key_heads, num_tokens=tokens, width=problem.value_width
        )


def named(name: str, factors: Any) -> dict[str, Any]:
    """{name: factor} for one factor, {name1: factor, name2: factor, ..} for several."""
    return {name: factors[0]} if len(factors) == 1 else {f"{name}{r + 1}": factor for r, factor in enumerate(factors)}


def of_pieces(sums: Any) -> dict[str, torch.Tensor]:
    return dict(zip(("partials", "partial_norms"), sums, strict=True))


def group_sizes(problem: Any) -> dict[str, int]:
    return dict(batches=problem.batch, heads=problem.query_heads, kv_heads=problem.key_heads)


def strides_of(tensors: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.stride() for tensor in tensors)
