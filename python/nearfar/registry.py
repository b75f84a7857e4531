"""The operators and steps of nearfar, listed once: for the generic tests, the benchmark suite and the README's table."""

from collections.abc import Callable
from typing import Any, NamedTuple

from nearfar.ops import affine, diagnostics, krause, krause_step, linear, synchronization


class Operator(NamedTuple):
    """One public operator.

    room: name of its file in ops/, reference/, triton_kernels/, tests/, bench/cases/ and docs/operators/. Operators that are
        special cases of one another share files.
    function: the public function. prepare: its checks; returns a call with `q` and `backends`.
    op: its name in torch.ops.nearfar.
    summary, source: for the README's table.
    differentiable: False if its results have no gradient.
    """

    room: str
    function: Callable[..., Any]
    prepare: Callable[..., Any]
    op: str
    summary: str
    source: str
    differentiable: bool = True


OPERATORS = (
    Operator(
        room="krause",
        function=krause.krause_attention,
        prepare=krause.prepare,
        op="krause_attention",
        summary="Krause attention: softmax of negative squared distances inside a window, keeping the top_k nearest keys",
        source="arXiv 2602.11534",
    ),
    Operator(
        room="linear",
        function=linear.linear_attention,
        prepare=linear.prepare_linear_attention,
        op="hadamard_attention",
        summary="Linear attention: weights phi(q) . phi(k), bidirectional or causal, with a state to continue from",
        source="arXiv 2602.12128",
    ),
    Operator(
        room="linear",
        function=linear.hadamard_attention,
        prepare=linear.prepare_hadamard_attention,
        op="hadamard_attention",
        summary="Hadamard linear attention: weights are products of one to three kernels phi(q) . phi(k), with a state",
        source="arXiv 2602.12128",
    ),
    Operator(
        room="affine",
        function=affine.affine_attention,
        prepare=affine.prepare_affine_attention,
        op="affine_attention",
        summary="Affine-scaled attention: alpha times the softmax weights plus beta, per query and head; windows, sinks",
        source="arXiv 2602.23057",
    ),
    Operator(
        room="affine",
        function=affine.softmax_attention,
        prepare=affine.prepare_softmax_attention,
        op="affine_attention",
        summary="Softmax attention: causal or full, sliding windows, packed sequences, attention sinks",
        source="arXiv 1706.03762",
    ),
    Operator(
        room="synchronization",
        function=synchronization.synchronization_attention,
        prepare=synchronization.prepare,
        op="synchronization_attention",
        summary="Selective synchronization attention: weights of phase-locked oscillators; what cannot lock is skipped",
        source="arXiv 2602.14445",
    ),
    Operator(
        room="diagnostics",
        function=diagnostics.attention_statistics,
        prepare=diagnostics.prepare_attention_statistics,
        op="attention_statistics",
        summary="Attention statistics, streamed: lse and entropy (differentiable), largest weight, mass that each key receives",
        source="arXiv 2603.06248",
    ),
    Operator(
        room="diagnostics",
        function=diagnostics.selection_geometry,
        prepare=diagnostics.prepare_selection_geometry,
        op="selection_geometry",
        summary="Selection geometry, streamed: precision, recall and F of the top_n keys of each query among all",
        source="arXiv 2602.01893",
        differentiable=False,
    ),
)


class Step(NamedTuple):
    """One public function that decodes a token.

    room: as for Operator. function: the public function. memory: name of the argument that it updates in place. operator: the
    public function whose last row it computes.
    """

    room: str
    function: Callable[..., Any]
    memory: str
    operator: Callable[..., Any]


STEPS = (
    Step("krause", krause_step.krause_attention_step, "cache", krause.krause_attention),
    Step("linear", linear.linear_attention_step, "state", linear.linear_attention),
    Step("linear", linear.hadamard_attention_step, "state", linear.hadamard_attention),
)


class Part(NamedTuple):
    """A public function that computes an input of an operator. It is tested like an operator, but has no file of its own."""

    room: str
    function: Callable[..., Any]
    op: str
    differentiable: bool = True


PARTS = (Part("synchronization", synchronization.order_parameter, "order_parameter"),)


def find(op: Callable[..., Any] | str) -> Operator:
    """The Operator for a public function or its name. Raises ValueError if there is none."""
    for operator in OPERATORS:
        if op is operator.function or op == operator.function.__name__:
            return operator
    names = ", ".join(operator.function.__name__ for operator in OPERATORS)
    raise ValueError(f"op must be an operator of nearfar ({names}), got {op!r}")
