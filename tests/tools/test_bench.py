"""The benchmarks: floors, the oracle check, the command line on a CPU, and the tables they write into documents."""

import csv
import functools
import importlib
import itertools
import json
import math
import re
import sys
import time
import types
from dataclasses import replace

import pytest
import torch
from harness import needs_gpu
from torch.nn.attention.flex_attention import create_block_mask

from bench import __main__ as bench
from bench import cases as bench_cases
from bench import (
    check,
    crossover,
    environment,
    fingerprint,
    first_calls,
    plots,
    report,
    running,
    runs,
    suite,
    text,
    timing,
    trace,
)
from bench.baselines import affine as affine_baselines
from bench.baselines import krause as krause_baselines
from bench.baselines import linear as linear_baselines
from bench.cases import BaseCase, Provider, Work, affine, diagnostics, krause, linear, rooms
from bench.environment import short_name
from bench.formulas import Softmax, Window
from bench.formulas.affine import Affine
from bench.formulas.krause import Rbf
from bench.formulas.linear import Hadamard
from bench.record import reasons
from bench.timing import median_time
from nearfar import registry

CASE = krause.Case(
    name="krause-test", batch=1, heads=4, kv_heads=2, length=200, width=16, dtype="float32", providers=("nearfar",),
    left=31, right=5,
)
LINEAR = linear.Case(
    name="linear-test", batch=1, heads=4, kv_heads=2, length=256, width=24, dtype="float32", providers=("nearfar",),
    factors=(16,),
)
HADAMARD = replace(LINEAR, factors=(8, 4))
AFFINE = affine.Case(
    name="affine-test", batch=1, heads=4, kv_heads=2, length=200, width=16, dtype="float32", providers=("nearfar",)
)
STATISTICS = diagnostics.Case(
    name="statistics-test", batch=1, heads=4, kv_heads=2, length=200, width=16, dtype="float32", providers=("nearfar",),
)
GEOMETRY = replace(STATISTICS, top_n=4)
CEILINGS = {"bytes_per_s": 1e12, "flops_per_s": 1e12}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "OUT", tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def wrong_nearfar(monkeypatch):
    """nearfar with outputs that are off by 32 roundings, eight times what a formula without errors is allowed."""
    call = krause.Case.call

    def wrong(case, backend):
        factor = 1 + 32 * torch.finfo(getattr(torch, case.dtype)).eps
        return lambda *inputs: factor * call(case, backend)(*inputs)

    monkeypatch.setattr(krause.Case, "call", wrong)


def test_every_room_here_is_an_operator_and_offers_what_the_suite_needs():
    found = rooms()
    assert found and set(found) <= {operator.room for operator in registry.OPERATORS}
    for device in (CPU, GPU):
        suites = bench_cases.suite(device)
        assert set(suites) == set(found)
        for room, cases in suites.items():
            for case in cases:
                assert isinstance(case, BaseCase) and set(case.providers) <= set(found[room].PROVIDERS)
                assert case.source and case.tags and set(case.tags) <= set(bench_cases.TAGS)
                assert case.heads % case.kv_heads == 0 and ("short" in case.tags) <= (case.length <= 1024)


@pytest.mark.parametrize("room", rooms())
@pytest.mark.parametrize("gpu", [False, True])
def test_single_problems_have_providers_by_default(monkeypatch, room, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args = bench.make_parser().parse_args(["run", room, "--shapes", "1,2,64,16"])
    case = rooms()[room].from_arguments(args.shapes[0], args)
    assert case.providers[0] == "nearfar" and set(case.providers) <= set(rooms()[room].PROVIDERS)
    assert case.output_shape == (1, 2, 64, 16)


@pytest.mark.parametrize("left, right", [(0, 0), (3, 0), (3, 2), (-1, 0), (0, -1), (-1, -1), (50, 50)])
@pytest.mark.parametrize("length", [1, 4, 17])
def test_pairs_of_a_window(length, left, right):
    window = Window(left, right)
    pairs = sum(
        (left < 0 or i - j <= left) and (right < 0 or j - i <= right) for i in range(length) for j in range(length)
    )
    assert window.pairs(length) == pairs == int(window.visible(length, length, "cpu").sum())


def test_work_counts_tensors_and_products():
    forward, backward = CASE.work(Rbf(31, 5))
    q, kv = 200 * 4 * 16 * 4, 200 * 2 * 16 * 4
    pairs = 4 * int(Window(31, 5).visible(200, 200, "cpu").sum())
    assert forward == Work(bytes=2 * q + 2 * kv, flops=4 * pairs * 16)
    assert backward == Work(bytes=4 * q + 4 * kv, flops=10 * pairs * 16)


@pytest.mark.parametrize(
    "name, floor",
    [
        ("krause-window", (0.089, 0.18)),
        ("linear-causal", (0.089, 0.18)),
        ("linear-full", (0.089, 0.18)),
        ("hadamard-full", (0.067, 0.133)),
        ("hadamard-video", (1.2, 2.4)),
        ("affine-causal", (0.40, 1.0)),
        ("statistics", (3.1, 0.27)),
        ("geometry", (4.7, 0.36)),
    ],
)
def test_floors_of_the_performance_page(name, floor):
    core = next(case for cases in bench_cases.suite(GPU).values() for case in cases if case.name == name)
    ceilings = {"bytes_per_s": 3.02e12, "flops_per_s": 700e12}
    floors = [work.floor_ms(ceilings) for work in core.work(core.formula("nearfar"))]
    assert floors == pytest.approx(floor, rel=0.02)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [30, 4000])
def test_work_of_the_cheaper_form(length, causal):
    """Direct: 12 similarities and 25 values for each pair; factored: 32 x 25 into the state and out of it for each token."""
    case = replace(HADAMARD, kv_heads=4, length=length, causal=causal)
    forward, backward = case.work(case.formula("nearfar"))
    tokens = 4 * length
    assert forward.bytes * 2 == backward.bytes == 2 * 4 * tokens * (12 + 12 + 24 + 24)
    if length == 30:
        pairs = tokens * (31 / 2 if causal else 30)
        assert (forward.flops, backward.flops) == (2 * pairs * (12 + 25), 2 * pairs * (3 * 12 + 2 * 25))
    else:
        assert (forward.flops, backward.flops) == (4 * tokens * 32 * 25, 8 * tokens * 32 * 25)


FORMULAS = [
    *((CASE, formula) for formula in (Rbf(31, 5), Rbf(31, 5, 12), Rbf(-1, 0), Softmax(31, 0), Softmax(-1, 0))),
    (LINEAR, Softmax(-1, -1)),
    (LINEAR, Hadamard(-1, 0, (16,))),
    (LINEAR, Hadamard(-1, -1, (16,), "identity", normalize=False)),
    (HADAMARD, Hadamard(-1, -1, (8, 4))),
    (HADAMARD, Hadamard(-1, 0, (8, 4), "softplus")),
    (AFFINE, Affine(-1, 0)),
    (AFFINE, Affine(-1, -1)),
]


@pytest.mark.parametrize("case, formula", FORMULAS)
def test_check_approves_the_plain_formula_and_sees_a_small_error(case, formula):
    inputs = case.inputs(CPU, formula)
    expected = check.expect(formula, case, inputs)
    names = [*formula.inputs(case), *formula.rows, *formula.parameters]

    def every_head(inputs):
        return [t.repeat_interleave(2, 1) if name[0] in "kv" else t for name, t in zip(names, inputs, strict=True)]

    keep, _ = formula.selection(*every_head([t.detach() for t in inputs]))

    def plain(*inputs):
        return formula.plain(*every_head(inputs), keep=keep)

    def checked(run):
        return check.check(expected, check.outputs_of(run, inputs, expected, ours=True), ours=True)

    right = checked(plain)
    assert set(right.errors) == {"o", *(f"d{name}" for name in names)}
    assert right.passed, right.worst
    wrong = checked(lambda *inputs: 1.0001 * plain(*inputs))
    assert all(wrong.excess(name) > 1 for name in wrong.errors)


@pytest.mark.parametrize("feature_map", linear.FEATURE_MAPS)
@pytest.mark.parametrize("causal", [False, True])
def test_hadamard_oracle_is_the_recurrence(feature_map, causal):
    """Token by token through the state: no pairs, no chunks, nothing shared with the formula."""
    maps = {
        "identity": lambda x: x,
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "relu": lambda x: x.clamp(min=0),
        "softplus": lambda x: (1 + x.exp()).log(),
        "exp": lambda x: math.e**x,
    }
    case = replace(HADAMARD, heads=2, length=9, causal=causal, feature_map=feature_map, normalize=feature_map != "identity")
    formula = case.formula("nearfar")
    inputs = [t.detach().double() for t in case.inputs(CPU, formula)]
    q1, q2, k1, k2 = (maps[feature_map](t[0]) for t in inputs[:4])
    values = torch.cat([inputs[4][0], torch.ones(2, 9, 1, dtype=torch.float64)], -1)
    states = torch.stack([torch.einsum("ha,hb,hv->habv", k1[:, j], k2[:, j], values[:, j]) for j in range(9)])
    states = states.cumsum(0) if causal else states.sum(0).expand(9, *states.shape[1:])
    read = torch.einsum("hna,hnb,nhabv->hnv", q1, q2, states)
    expected = read[..., :-1] / (read[..., -1:] + 1e-6) if formula.normalize else read[..., :-1]
    torch.testing.assert_close(formula.oracle(*inputs)[0], expected, rtol=1e-10, atol=1e-10)


def test_check_refuses_nan_and_a_missing_gradient():
    inputs = CASE.inputs(CPU, Rbf(31, 5))
    expected = check.expect(Rbf(31, 5), CASE, inputs)
    broken = check.check(expected, [{"o": CASE.call()(*inputs).detach() * float("nan")}], ours=True)
    assert not broken.passed and broken.worst[0] == "o"
    with pytest.raises(RuntimeError, match="not have been used"):
        check.outputs_of(lambda q, k, v, sigma: CASE.call()(q, k, v, sigma.detach()), inputs, expected, ours=True)


PLANTED = replace(CASE, batch=2, heads=8, kv_heads=4, length=256, left=63, right=0)
ONE_KEY_HEAD = replace(PLANTED, batch=1, heads=2, kv_heads=1)
PROBLEMS = {}  # inputs and expected results of the planted cases, which no test changes


@pytest.fixture
def few_pairs(monkeypatch):
    monkeypatch.setitem(check.PAIRS, "cpu", 2**16)


class LostGradient(torch.autograd.Function):
    """o, whose first rows pass no gradient on."""

    @staticmethod
    def forward(ctx, o):
        return o.clone()

    @staticmethod
    def backward(ctx, do):
        do = do.clone()
        do[:, :, : do.shape[2] // 2] = 0
        return do


def first_quarter_constant(call, *inputs):
    o = call(*inputs)
    quarter = o.shape[2] // 4
    return torch.cat((torch.full_like(o[:, :, :quarter], 7.0), o[:, :, quarter:]), 2)


def only_the_last_head(call, *inputs):
    o = call(*inputs)
    return torch.cat((0 * o[:, :-1], o[:, -1:]), 1)


def only_the_last_batch_element(call, *inputs):
    o = call(*inputs)
    return torch.cat((float("nan") * o[:-1], o[-1:]), 0)


def head_0_for_all(call, q, k, v, sigma):
    return call(q, *(torch.cat((x[:, :1].expand(-1, 3, -1, -1), x[:, 3:]), 1) for x in (k, v)), sigma)


def lost_gradient(call, *inputs):
    return LostGradient.apply(call(*inputs))


def three_percent_more(call, *inputs):
    return 1.03 * call(*inputs)


PLANTS = [
    first_quarter_constant, only_the_last_head, only_the_last_batch_element, head_0_for_all, lost_gradient, three_percent_more
]


def measure_planted(monkeypatch, case, provider, plant=None):
    """The row of a provider whose calls go through plant(call, *inputs)."""
    of_case = type(case).provider

    def planted(case, name, inputs):
        right = of_case(case, name, inputs)
        return right._replace(run=functools.partial(plant, right.run)) if plant else right

    monkeypatch.setattr(type(case), "provider", planted)
    return suite.measure(case, provider, CPU, PROBLEMS.setdefault(case, {}), CEILINGS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("provider", ["nearfar", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "case, plants",
    [(PLANTED, [None, *PLANTS]), (ONE_KEY_HEAD, [None, first_quarter_constant, lost_gradient, three_percent_more])],
    ids=["four key heads", "one key head"],
)
def test_planted_errors_are_seen(monkeypatch, few_pairs, case, plants, dtype, provider):
    for plant in plants:
        with monkeypatch.context() as patch:
            row = measure_planted(patch, replace(case, dtype=dtype), provider, plant)
        assert row["status"] == ("wrong" if plant else "ok"), (plant, row["note"])
        assert bool(row["forward"]) == bool(row["backward"]) == (plant is None)


@pytest.mark.parametrize("case", [STATISTICS, GEOMETRY], ids=["statistics", "geometry"])
def test_planted_errors_of_diagnostics_are_seen(monkeypatch, few_pairs, case):
    for plant in (None, first_quarter_constant, only_the_last_head, three_percent_more):
        with monkeypatch.context() as patch:
            row = measure_planted(patch, replace(case, length=256), "nearfar", plant)
        assert row["status"] == ("wrong" if plant else "ok"), (plant, row["note"])


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 32])
@pytest.mark.parametrize("right", [0, 7])
def test_every_case_compares_four_kinds_of_rows(kv_heads, right):
    case = replace(CASE, heads=kv_heads, kv_heads=kv_heads, length=4096, right=right)
    rounds = check.rounds_of_blocks(Rbf(31, right), case, pairs=2**16)
    begins = [block.rows.start for blocks in rounds for block in blocks]
    rows = rounds[0][0].counted
    assert 0 in begins and 4096 - rows in begins
    assert any((begin + rows // 2) % check.TILE == 0 for begin in begins) and len(set(begins)) >= 4
    for blocks in rounds:  # which add up in no gradient
        assert len({(block.batch, block.kv_head) for block in blocks}) == len(blocks)


def one_rounding_off(o):
    o.view(-1)[0].nextafter_(o.new_tensor(9.0))
    return o


@pytest.mark.parametrize("later, note", [(lambda o: 0 * o, "is off by"), (one_rounding_off, "of a later call differ")])
def test_what_is_right_at_first_and_wrong_later_is_seen(monkeypatch, later, note):
    of_case, calls = krause.Case.provider, []

    def planted(case, name, inputs):
        right = of_case(case, name, inputs)

        def run(*inputs):
            calls.append(1)
            return right.run(*inputs) if len(calls) == 1 else later(right.run(*inputs))

        return right._replace(run=run)

    monkeypatch.setattr(krause.Case, "provider", planted)
    row = suite.measure(replace(PLANTED, backward=False), "nearfar", CPU, {}, CEILINGS)
    assert row["status"] == "wrong" and note in row["note"] and row["forward"] is None


def test_a_case_that_can_show_nothing_says_so(monkeypatch):
    """The plain formula itself is off by more than the cap: with float32 far from the origin it has no digits left."""
    right = krause.Case.inputs

    def far(case, device, formula):
        return [(x + 1000).detach().requires_grad_() if x.dim() == 4 else x for x in right(case, device, formula)]

    monkeypatch.setattr(krause.Case, "inputs", far)
    row = suite.measure(PLANTED, "nearfar", CPU, {}, CEILINGS)
    assert row["status"] == "wrong" and "shows nothing" in row["note"]


@pytest.mark.parametrize("length", [300, 512])
@pytest.mark.parametrize("left, right", [(127, 0), (200, 100), (-1, 0)])
def test_block_mask_is_the_one_torch_finds_pair_by_pair(left, right, length):
    window = Window(left, right)
    visible = window.visible(length, length, "cpu")
    theirs = create_block_mask(lambda b, h, row, key: visible[row, key], None, None, length, length, device="cpu")
    ours = krause_baselines.window_block_mask(window, length, CPU)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("formula", [Rbf(63, 0), Softmax(-1, 0)])
def test_flex_agrees_with_the_oracle(formula):
    """Uncompiled, forward: all that FlexAttention does on a CPU."""
    case = replace(CASE, backward=False)
    inputs = case.inputs(CPU, formula)
    expected = check.expect(formula, case, inputs)
    run = krause_baselines.flex(formula, CASE.length, CPU, compiled=lambda function: function)
    assert check.check(expected, [{"o": run(*inputs).detach()}], ours=False).passed


@pytest.mark.parametrize("top_k", [None, 12])
def test_eager_agrees_with_the_oracle(top_k):
    row = suite.measure(replace(CASE, top_k=top_k), "eager", CPU, {}, CEILINGS)
    assert row["status"] == "ok" and row["forward"]["ms"] > 0 and row["backward"]["samples"] >= 3


@pytest.mark.parametrize("provider", ["nearfar", "eager", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", [LINEAR, HADAMARD], ids=["linear", "hadamard"])
def test_linear_providers_agree_with_the_oracle(case, causal, provider):
    row = suite.measure(replace(case, causal=causal), provider, CPU, {}, CEILINGS)
    assert row["status"] == "ok", row["note"]
    names = ("q", "k", "v") if provider == "sdpa" or case is LINEAR else ("q1", "q2", "k1", "k2", "v")
    assert set(row["check"]["errors"]) == {"o", *(f"d{name}" for name in names)}


@pytest.mark.parametrize("causal", [False, True])
def test_plain_linear_compiles_as_one_graph(causal):
    case = replace(HADAMARD, causal=causal, backward=False)
    formula = case.formula("compile")
    inputs = case.inputs(CPU, formula)
    run = linear_baselines.plain(formula)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(*inputs), run(*inputs))


@pytest.mark.parametrize("provider", ["nearfar", "eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", [STATISTICS, GEOMETRY], ids=["statistics", "geometry"])
def test_diagnostics_agree_with_the_oracle(case, causal, dtype, provider):
    row = suite.measure(replace(case, causal=causal, dtype=dtype), provider, CPU, {}, CEILINGS)
    assert row["status"] == "ok" and row["backward"] is None, row["note"]
    assert row["check"]["rows_left_out"] < row["check"]["rows"] / 2
    assert set(row["check"]["errors"]) == {"o"}


@pytest.mark.parametrize("case, column", [*((STATISTICS, column) for column in range(4)), *((GEOMETRY, c) for c in range(3))])
def test_errors_of_diagnostics_are_seen_in_every_column(monkeypatch, case, column):
    call = case.call("reference")

    def wrong(case, backend):
        def run(*inputs):
            o = call(*inputs)
            o[..., column] *= 1 + 1e-3
            return o

        return run

    monkeypatch.setattr(diagnostics.Case, "call", wrong)
    assert suite.measure(case, "nearfar", CPU, {}, CEILINGS)["status"] == "wrong"


def test_times_over_a_baseline_have_goals():
    case = replace(GEOMETRY, providers=("nearfar", "sdpa"), goal_over=("sdpa", 2.5))
    longer = replace(case, length=400)
    times = ((case, "nearfar", 6.0), (case, "sdpa", 3.0), (longer, "nearfar", 8.0), (longer, "sdpa", 2.0))
    rows = [suite.new_row(c, name) | {"forward": {"ms": ms}} for c, name, ms in times]
    measures = suite.relative(rows)
    assert [(m["value"], text.met(m)) for m in measures] == [(2.0, True), (4.0, False)]
    assert measures[0]["what"] == "forward of nearfar over sdpa, geometry, top_n 4, causal"
    rows[1]["forward"] = None
    assert [m["value"] for m in suite.relative(rows)] == [None, 4.0]
    assert suite.relative([suite.new_row(CASE, "nearfar")]) == []


@pytest.fixture
def uncompiled(monkeypatch):
    """Epilogues as they are: compiling them takes seconds."""
    composed = functools.partial(affine_baselines.composed, compiled=lambda function: function)
    monkeypatch.setattr(affine_baselines, "composed", composed)


@pytest.mark.parametrize("provider", ["nearfar", "sdpa", "sdpa-epilogue"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", [AFFINE, replace(AFFINE, affine=False)], ids=["affine", "softmax"])
def test_affine_providers_agree_with_the_oracle(uncompiled, case, causal, provider):
    row = suite.measure(replace(case, causal=causal), provider, CPU, {}, CEILINGS)
    assert row["status"] == "ok" and row["backward"]["ms"] > 0, row["note"]
    rows = ("alpha", "beta") if provider == "sdpa-epilogue" or (provider == "nearfar" and case.affine) else ()
    assert set(row["check"]["errors"]) == {"o", *(f"d{name}" for name in ("q", "k", "v", *rows))}


@pytest.mark.parametrize("epilogue", [affine_baselines.causal_epilogue, affine_baselines.full_epilogue])
def test_epilogues_compile_as_one_graph(epilogue):
    o, v, alpha, beta = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 4, 9), torch.randn(1, 4, 9)
    assert torch.equal(torch.compile(epilogue, fullgraph=True, backend="eager")(o, v, alpha, beta), epilogue(o, v, alpha, beta))


def test_the_check_of_affine_attention_sees_either_term(monkeypatch):
    """beta is such that an error in the sum of values shows beside the softmax, and the other way round."""
    right = affine.Case.call
    for wrong in ("alpha", "beta"):

        def call(case, backend="auto", wrong=wrong):
            def run(q, k, v, alpha, beta):
                factors = {"alpha": alpha, "beta": beta}
                factors[wrong] = 1.0001 * factors[wrong]
                return right(case, backend)(q, k, v, **factors)

            return run

        monkeypatch.setattr(affine.Case, "call", call)
        row = suite.measure(replace(AFFINE, backward=False), "nearfar", CPU, {}, CEILINGS)
        assert row["status"] == "wrong" and "o is off by" in row["note"]


def test_flash_attention_4_is_called_in_its_layout_or_missed(monkeypatch):
    case = replace(AFFINE, kv_heads=4)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    row = suite.measure(case, "fa4", CPU, {}, CEILINGS)
    assert row["status"] == "missing" and "flash_attn.cute" in row["note"]

    def attention(q, k, v, causal):
        assert all(t.is_contiguous() for t in (q, k, v)), "it would copy"
        o = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal)
        return o.transpose(1, 2), None

    module = types.ModuleType("flash_attn.cute")
    module.flash_attn_func = attention
    for stand_in in (types.ModuleType("flash_attn"), module):
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    row = suite.measure(case, "fa4", CPU, {}, CEILINGS)
    assert row["status"] == "ok" and row["backward"], row["note"]


@pytest.fixture
def fla(monkeypatch):
    """A stand-in for fla, which runs on a GPU alone: its layout, its arguments and its recurrence."""

    def attention(kernel, q, k, v, scale, normalize):
        assert all(t.is_contiguous() for t in (q, k, v)), "fla would copy"
        scores = torch.einsum("bnhd,bmhd->bhnm", scale * q.float(), k.float()).tril()
        o = torch.einsum("bhnm,bmhd->bnhd", scores, v.float())
        o = o / scores.sum(-1).transpose(1, 2)[..., None] if normalize else o
        return o.to(v.dtype), f"state of {kernel}"

    module = types.ModuleType("fla.ops.linear_attn")
    for kernel in ("fused_chunk", "chunk"):
        setattr(module, f"{kernel}_linear_attn", functools.partial(attention, kernel))
    for stand_in in (types.ModuleType("fla"), types.ModuleType("fla.ops"), module):
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    compiled = functools.partial(linear_baselines.fla, compiled=lambda function: function)
    monkeypatch.setattr(linear_baselines, "fla", compiled)


@pytest.mark.parametrize("provider", [*linear.FLA, *linear.FLA_BARE])
def test_fla_is_called_in_its_layout_and_with_its_arguments(fla, provider):
    """In bfloat16, as float32 would show that fla adds no eps to its denominators."""
    row = suite.measure(replace(LINEAR, kv_heads=4, causal=True, dtype="bfloat16"), provider, CPU, {}, CEILINGS)
    assert row["status"] == "ok" and row["backward"], row["note"]


@pytest.mark.parametrize(
    "case, note", [(LINEAR, "causal"), (HADAMARD, "one factor"), (replace(LINEAR, causal=True), "a key head for each")]
)
def test_fla_says_what_it_does_not_have(fla, case, note):
    row = suite.measure(case, "fla-chunk", CPU, {}, CEILINGS)
    assert row["status"] == "unavailable" and note in row["note"]


def test_a_failing_baseline_says_why_and_a_failing_nearfar_fails_the_run(monkeypatch):
    def broken(case, name, inputs):
        def run(*inputs):
            raise RuntimeError("no such kernel\nat all")

        return Provider(name, run)

    monkeypatch.setattr(krause.Case, "provider", broken)
    rows = list(suite.rows([replace(CASE, providers=("sdpa", "nearfar"))], CPU, CEILINGS, lambda text: None))
    assert [row["status"] for row in rows] == ["unavailable", "failed"]
    assert rows[0]["note"] == "RuntimeError: no such kernel"
    assert suite.sound(rows[:1]) and not suite.sound(rows)


def test_scaling_measures():
    def row(length, ms, peak, variant=""):
        parts = {part: {"ms": ms, "bytes": 100} for part in ("forward", "backward")}
        return {"ours": True, "case": {"length": length}, "variant": variant, "peak_bytes": peak, **parts}

    measures = suite.scaling([row(8, 5.0, 140), row(4, 2.0, 70), row(2, 0.5, 70)])
    assert [(m["value"], m["goal"]) for m in measures] == [(2.5, 2.1), (1.4, 1.5)]
    assert [text.met(m) for m in measures] == [False, True]
    assert measures[0]["what"] == "time at N=8 over N=4"
    measures = suite.scaling([row(4, 1.0, None, "full"), row(4, 2.0, None, "causal"), row(8, 2.0, None, "full")])
    assert [(m["what"], m["value"]) for m in measures] == [("time at N=8 over N=4, full", 2.0)]


def swept(provider, times, causal=False):
    """Rows of a sweep from {length: (forward, backward)}."""
    return [
        {"provider": provider, "label": provider, "variant": "causal" * causal, "case": {"length": length, "causal": causal},
         "forward": {"ms": forward}, "backward": {"ms": backward}}
        for length, (forward, backward) in times.items()
    ]


def test_crossover_of_straight_lines_is_exact():
    """Ours takes N / 100 and 3 N / 100 ms, theirs N^2 / 30000 and 8 N^2 / 30000: forward 300, together 1200 / 9."""
    lengths = [2**i for i in range(6, 12)]
    ours = swept("nearfar", {n: (n / 100, 3 * n / 100) for n in lengths})
    theirs = swept("sdpa-flash", {n: (n**2 / 30000, 8 * n**2 / 30000) for n in reversed(lengths)})
    unlike = swept("sdpa-flash", {n: (1e-3, 1e-3) for n in lengths}, causal=True)
    found = crossover.crossings([*ours, *theirs, *unlike, *swept("eager", {64: (1.0, 1.0)})])
    assert [c.total for c in found] == ["forward", "forward + backward"]
    assert [c.length for c in found] == pytest.approx([300, 1200 / 9])
    assert [c.ms for c in found] == pytest.approx([3, 4 * 12 / 9])
    measures = crossover.measures([*ours, *theirs])
    assert measures[0]["what"] == "faster from this length: nearfar, over sdpa-flash, forward"
    assert text.measured(measures[0]) == "300 tokens"


def test_lines_of_several_widths_cross_at_their_own():
    rows = []
    for width, ms in ((64, 2.0), (128, 3.0)):
        lines = swept("nearfar", {4: (1.0, 1.0), 8: (1.0, 1.0)}) + swept("sdpa", {4: (1 / ms, 1.0), 8: (ms, ms)})
        rows += [{**row, "case": {**row["case"], "width": width}} for row in lines]
    found = crossover.crossings(rows)
    assert [c.what for c in found] == [
        f"nearfar, D{width}, over sdpa, {total}" for width in (64, 128) for total in crossover.TOTALS
    ]
    assert [c.ms for c in found[::2]] == [1.0, 1.0]


def test_a_sweep_at_fixed_tokens_keeps_them():
    cases = [case for case in bench_cases.suite(GPU)["affine"] if case.name == "affine-length"]
    assert {(case.width, case.batch * case.length) for case in cases if case.length <= 16384} == {(64, 16384), (128, 16384)}
    assert {case.length for case in cases} == {4**i for i in range(5, 9)}
    rows = [suite.new_row(case, "nearfar") for case in cases]
    assert list(plots.series(rows)) == ["nearfar, H16 D128 bfloat16", "nearfar, H32 D64 bfloat16"]


@pytest.mark.parametrize(
    "theirs, note",
    [
        ({4: 2.0, 8: 3.0}, "faster at every length from 4"),
        ({4: 2.0, 8: 0.5}, "slower at 8"),
        ({16: 2.0}, "no length in common"),
    ],
)
def test_lines_that_do_not_cross_say_so(theirs, note):
    rows = swept("nearfar", {4: (1.0, 1.0), 8: (1.0, 1.0)}) + swept("sdpa", {n: (ms, ms) for n, ms in theirs.items()})
    for found in crossover.crossings(rows):
        assert found.length is None and note in found.note


def test_the_last_crossing_counts():
    ours = swept("nearfar", {n: (1.0, 1.0) for n in (1, 2, 4, 8)})
    theirs = swept("sdpa", {n: (ms, ms) for n, ms in zip((1, 2, 4, 8), (2.0, 0.5, 0.5, 2.0), strict=True)})
    assert [c.length for c in crossover.crossings(ours + theirs)] == pytest.approx([32**0.5, 32**0.5])


@needs_gpu
def test_times_of_a_gpu_leave_the_host_out():
    x = torch.zeros(1, device="cuda")

    def slow():
        time.sleep(2e-3)
        x.add_(1)

    assert median_time(slow, x.device).ms < 0.5


SHAPES = ["run", "krause", "--shapes", "1,2,64,16", "1,2,128,16", "--window", "15,0", "--top-k", "8"]


def rows_in(path):
    return [row for record in runs.load(path) for row in record["rows"]]


def test_command_line_on_a_tiny_case(out, capsys):
    assert bench.main([*SHAPES, "--backward", "--providers", "nearfar,sdpa,eager"]) == 0
    ours = "nearfar triton" if torch.cuda.is_available() else "nearfar reference"
    (path,) = out.glob("*.json")
    (record,) = runs.load(path)
    assert record["room"] == "krause" and record["environment"]["torch"] == torch.__version__
    assert record["schema"] == runs.SCHEMA and set(environment.PACKAGES) < set(record["environment"]["packages"])
    rows = record["rows"]
    assert [row["label"] for row in rows] == 2 * [ours, "sdpa causal", "eager"]
    assert all(row["status"] == "ok" and row["backward"]["ms"] > 0 for row in rows)
    assert all(row["peak_bytes"] > row["forward"]["bytes"] for row in rows)
    assert path.with_name(f"{path.stem}-krause-length.png").read_bytes().startswith(b"\x89PNG")
    table = list(csv.DictReader(path.with_suffix(".csv").open()))
    assert [float(line["forward_ms"]) for line in table] == [row["forward"]["ms"] for row in rows]
    assert ours in capsys.readouterr().out
    refused = list(reasons(runs.read(path), set()))
    assert "CPU" in refused[0] or torch.cuda.is_available()
    assert any("krause-custom" in reason for reason in refused)


def assert_page_shows(path, page, rows):
    """The report of a run names every row and loads nothing."""
    assert bench.main(["report", str(path), "-o", str(page)]) == 0
    own = page.read_text().replace(importlib.import_module("plotly.offline").get_plotlyjs(), "")
    assert not re.findall(r"(?:src|href)=.?https?:|@import|url\(", own)
    assert own.count("<tr class=") == len(rows) and all(text.both(row, "ms", 3) in own for row in rows)
    assert own.count('class="plotly-graph-div"') == own.count('<section class="figure">') == 4


def test_a_stopped_run_keeps_its_rows_and_goes_on(out, monkeypatch, capsys):
    path, measure = out / "run.json", suite.measure

    def stopped(case, name, *rest):
        if case.length == 128:
            raise KeyboardInterrupt
        return measure(case, name, *rest)

    command = [*SHAPES, "--providers", "nearfar", "--out", str(path)]
    with monkeypatch.context() as patch:
        patch.setattr(suite, "measure", stopped)
        assert bench.main(command) == bench.INTERRUPTED
    first = rows_in(path)
    assert [row["case"]["length"] for row in first] == [64] and runs.read(path)["finished"] is False
    assert any("stopped" in reason for reason in reasons(runs.read(path), set()))
    assert bench.main([*command, "--resume"]) == 0
    assert rows_in(path)[0] == first[0] and [row["case"]["length"] for row in rows_in(path)] == [64, 128]
    capsys.readouterr()
    assert bench.main(command) == 2 and "exists" in capsys.readouterr().err  # it overwrites nothing


def test_command_line_of_linear_attention(out):
    shapes = ["--shapes", "1,2,64,16", "--factors", "8,16", "--causal", "--feature-map", "relu", "--no-normalize"]
    path = out / "linear.json"
    assert bench.main(["run", "--out", str(path), "linear", *shapes, "--backward", "--providers", "nearfar,sdpa,eager"]) == 0
    ours = "nearfar triton" if torch.cuda.is_available() else "nearfar reference"
    assert [row["label"] for row in rows_in(path)] == [ours, "sdpa softmax", "eager"]
    assert {row["variant"] for row in rows_in(path)} == {"factors 8x16, causal, relu, not normalised"}


def test_a_wrong_provider_is_not_timed_and_fails_the_run(out, wrong_nearfar):
    path = out / "run.json"
    assert bench.main(["run", "--out", str(path), "krause", "--shapes", "1,2,64,16", "--providers", "nearfar,eager"]) == 1
    wrong, right = rows_in(path)
    assert wrong["status"] == "wrong" and wrong["forward"] is None and "o is off by" in wrong["note"]
    assert right["status"] == "ok"
    assert any("nearfar reference is wrong" in reason for reason in reasons(runs.read(path), set()))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["run", "--cases", "nonsense"], "there are krause-length"),
        (["run", "--tag", "nonsense"], "there are lm, vision"),
        (["run", "--only", "nonsense"], "there are nearfar, cuda"),
        (["list", "--device", "tpu"], "cuda"),
        (["run", "krause", "--shapes", "1,2,3"], "as in 1,32,16384,64"),
        (["run", "krause", "--shapes", "1,2,0,16"], "as in 1,32,16384,64"),
        (["run", "krause", "--shapes", "1,3,64,16", "--kv-heads", "2"], "no multiple of 2 key heads"),
        (["run", "krause", "--shapes", "1,2,64,16", "--top-k", "0"], "top_k"),
        (["run", "krause"], "--shapes"),
        (["run", "--out", "/dev/null/run.json"], "name another file"),
        (["run", "--resume"], "leave --resume out"),
        (["compare", "nowhere", "nowhere", "--fail-above", "much"], "as in 5%"),
        (["report", "nowhere.json"], "there is no nowhere.json"),
        (["profile", "nonsense"], "there are krause-length"),
        (["profile", "krause-length", "--provider", "nonsense"], "there are nearfar, cuda"),
        ([], "COMMAND"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(out, monkeypatch, arguments, says, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "ceilings", None)
    try:
        status = bench.main(arguments)
    except SystemExit as refused:
        status = refused.code
    error = capsys.readouterr().err
    assert status == 2 and says in error and "Traceback" not in error


def test_levels_and_tags_choose_cases():
    quick, default, full = ({case for cases in running.select(GPU, level).values() for case in cases}
                            for level in (running.QUICK, running.DEFAULT, running.FULL))
    assert quick < default < full and {case.name for case in full - default} >= {"krause-million", "linear-million"}
    vision = running.select(GPU, running.FULL, tags=("vision", "video"))
    assert all({"vision", "video"} & set(case.tags) for cases in vision.values() for case in cases)
    sdpa = running.select(GPU, providers=("sdpa-cudnn",))
    assert all(case.providers == ("sdpa-cudnn",) for cases in sdpa.values() for case in cases)
    assert running.estimate(list(quick), CEILINGS, GPU) < running.estimate(list(full), CEILINGS, GPU)


def test_a_case_of_the_table_varies_what_it_lists():
    entry = {"name": "x", "shape": [1, 4, 8, 16], "kv_heads": 2, "providers": ["nearfar"], "device": "cpu",
             "vary": {"length": [8, 16], "batch": [2, 1]}}
    cases = bench_cases.from_entry("krause", entry)
    assert [(case.batch, case.length) for case in cases] == [(2, 8), (1, 16)]
    assert {(case.heads, case.kv_heads, case.width, case.dtype, case.providers) for case in cases} == {
        (4, 2, 16, "float32", ("nearfar",))
    }


TINY_TABLE = """
[[krause]]
name = "near-length"
device = "cpu"
source = "a paper"
tags = ["vision", "quick"]
shape = [1, 2, 32, 16]
vary = { length = [32, 64] }
providers = ["nearfar", "eager", "sdpa"]
plotted = true

[[linear]]
name = "far"
device = "cpu"
source = "a model"
tags = ["lm", "long"]
shape = [1, 2, 32, 16]
factors = [16]
causal = true
providers = ["nearfar", "sdpa"]
"""


def test_the_suite_of_a_table_runs_reports_and_compares(out, monkeypatch, capsys):
    page = pytest.importorskip("bench.page", reason="plotly draws the report, and a machine that measures may lack it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_cases, "TABLE", out / "cases.toml")
    bench_cases.TABLE.write_text(TINY_TABLE)
    path = out / "run.json"
    assert bench.main(["run", "--quick", "--only", "nearfar,eager,sdpa", "--out", str(path)]) == 0
    (near,) = runs.load(path)
    assert [row["case"]["length"] for row in near["rows"]] == [32, 32, 32, 64, 64, 64]
    assert any(m["what"].startswith("faster from this length") for m in near["measures"])
    assert bench.main(["run", "--full", "--resume", "--out", str(path)]) == 0
    kept, far = runs.load(path)
    assert kept["rows"] == near["rows"] and [row["provider"] for row in far["rows"]] == ["nearfar", "sdpa"]
    assert_page_shows(path, out / "page.html", rows_in(path))
    rows = [page.table_row(record, row) for record in (kept, far) for row in record["rows"]]
    ours = [row for row in rows if row["ours"]]
    assert [row["source"] for row in ours] == ["a paper", "a paper", "a model"]
    times = [sum(row[d]["ms"] for d in text.DIRECTIONS) for row in near["rows"][:3]]
    assert ours[0]["alike"] == (pytest.approx(times[0] / times[1]), "eager")  # SDPA computes something else
    assert ours[0]["sdpa"] == (pytest.approx(times[0] / times[2]), "sdpa causal") and ours[2]["alike"] is None
    found = page.summary(ours, "alike", "")
    assert len(found["lost"]) + found["even"] + len(found["won"]) == 2 and found["alone"] == 1
    assert bench.main(["compare", str(path), str(path), "--fail-above", "0"]) == 0
    capsys.readouterr()
    assert bench.main(["list", "--tag", "lm"]) == 0
    listed = capsys.readouterr().out
    assert "a model" in listed and "near-length" not in listed


def finished_run(path, ms, **changed):
    """A run of a GPU with one row of nearfar's and one of a competitor's."""
    timed = {"ms": ms, "bytes": 1, "floor_ms": 0.1, "percent_of_floor": 10.0}
    rows = [suite.new_row(CASE, name) | {"forward": timed} for name in ("nearfar", "sdpa")]
    rows[0] |= changed
    environment = {"short_name": "h200", "device": "NVIDIA H200", "driver": "1", "cuda": "13", "torch": "2", "triton": "3"}
    records = [{"name": "krause-test", "room": "krause", "rows": rows, "measures": []}]
    head = {"schema": runs.SCHEMA, "environment": environment, "ceilings": CEILINGS, "finished": True}
    path.write_text(json.dumps({**head, "records": records}))
    return path


def test_compare_fails_above_the_limit(tmp_path, capsys):
    old, slower = finished_run(tmp_path / "old.json", 1.0), finished_run(tmp_path / "slower.json", 1.2)
    broken = finished_run(tmp_path / "broken.json", 1.0, forward=None, status="wrong")
    assert bench.main(["compare", str(old), str(slower)]) == 0 and "1.200" in capsys.readouterr().out
    assert bench.main(["compare", str(old), str(slower), "--fail-above", "25%"]) == 0
    assert bench.main(["compare", str(old), str(slower), "--fail-above", "5%"]) == 1
    assert bench.main(["compare", str(slower), str(old), "--fail-above", "5"]) == 0
    capsys.readouterr()
    assert bench.main(["compare", str(old), str(broken), "--fail-above", "5%"]) == 1
    assert "has no time any more" in capsys.readouterr().out


def test_record_keeps_a_sound_run_and_refuses_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    run = finished_run(tmp_path / "run.json", 1.0)
    assert bench.main(["record", str(run)]) == 0
    assert rows_in(tmp_path / "results/h200/krause-test.json") == rows_in(run)
    wrong = finished_run(tmp_path / "wrong.json", 1.0, status="wrong", note="o is off by 1", forward=None)
    assert bench.main(["record", str(wrong)]) == 2 and "is wrong: o is off by 1" in capsys.readouterr().err
    missing = finished_run(tmp_path / "missing.json", 1.0, status="missing", provider="fa4", ours=False, forward=None)
    assert bench.main(["record", str(missing)]) == 2 and "--without fa4" in capsys.readouterr().err
    assert bench.main(["record", str(missing), "--without", "fa4"]) == 0


def test_a_fingerprint_covers_an_operators_sources_alone():
    names = {room: {str(path.relative_to(fingerprint.ROOT)) for path in fingerprint.sources(room)} for room in rooms()}
    krause = {"python/nearfar/ops/krause.py", "python/nearfar/kernels/krause.py", "triton_kernels/krause.py",
              "triton_kernels/pairwise.py", "triton_kernels/selection.py", "csrc/krause/forward.cu", "csrc/common/mma.cuh",
              "bench/cases/krause.py", "bench/formulas/krause.py"}
    assert krause <= names["krause"] and not any("linear" in name or "affine" in name for name in names["krause"])
    assert {"csrc/hadamard/bidirectional_read.cu", "triton_kernels/linear_walk.py"} <= names["linear"]
    assert len({fingerprint.of(room) for room in names}) == len(names)


def test_check_finds_stale_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "main", lambda arguments: 0)
    case = bench_cases.suite(GPU)["krause"][0]
    head = {"name": case.name, "room": "krause", "rows": [suite.new_row(case, "nearfar")], "measures": []}
    record = {**head, "fingerprint": fingerprint.of("krause")}
    runs.write_record(tmp_path / "h100", head)
    runs.write_record(tmp_path / "h200", record)
    assert bench.main(["check"]) == 0 and "1 current, 0 stale, 1 unknown" in capsys.readouterr().out
    runs.write_record(tmp_path / "h200", record | {"fingerprint": "another"})
    assert bench.main(["check"]) == 1 and "sources of krause have changed" in capsys.readouterr().out
    changed = suite.new_row(replace(case, sigma=9.0), "nearfar")
    runs.write_record(tmp_path / "h200", record | {"rows": [changed]})
    assert bench.main(["check"]) == 1 and "other cases of that name" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, says", [("[1", "not a file of results"), ("{}", "neither"), ('{"rows": [], "schema": 99}', "schema 99")]
)
def test_files_that_are_no_results_are_refused(tmp_path, content, says):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        runs.load(path)


def test_a_profile_lists_what_ran():
    label, table = trace.kernels(replace(CASE, providers=("eager",)), "eager", CPU, calls=1)
    assert label == "eager" and "aten::bmm" in table


def test_windowed_softmax_agrees_with_the_oracle():
    row = suite.measure(replace(AFFINE, affine=False, left=31), "nearfar", CPU, {}, CEILINGS)
    assert row["status"] == "ok" and row["title"].endswith("causal, window 32"), row["note"]


def test_documents_are_refreshed_from_recorded_results(tmp_path, capsys):
    aimed = replace(CASE, goal_ms=(1.0, 2.0))
    rows = [suite.measure(case, name, CPU, {}, CEILINGS) for case in (CASE, aimed) for name in ("nearfar", "sdpa")]
    env = dict(device="GPU", torch="2", triton="3", cuda="13", nearfar="0", date="2026-01-01T00:00")
    measures = [
        {"what": "first call", "value": 3.2, "unit": "s", "goal": 5.0, "note": None},
        {"what": "crossover", "value": None, "unit": "tokens", "goal": None, "note": "faster at every length"},
    ]
    head = dict(name="krause-test", room="krause", environment=env, ceilings=CEILINGS)
    results = tmp_path / "results"
    runs.write_record(results / "h100", {**head, "rows": rows, "measures": measures})
    runs.write_record(results / "h100", {**head, "name": "other", "room": "linear", "rows": [], "measures": []})
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- bench:krause -->\nold\n<!-- /bench:krause -->\n"
                      "<!-- bench:overview -->\n<!-- /bench:overview -->\nThe end.\n")

    assert report.main(["--check"], tmp_path, results) == 1
    assert "old" in readme.read_text() and "out of date" in capsys.readouterr().out
    assert report.main([], tmp_path, results) == 0
    text = readme.read_text()
    assert "old" not in text and text.startswith("# Title\n") and text.endswith("The end.\n")
    assert "| **nearfar reference** |" in text and "| first call | 3.20 s | ≤ 5 s |" in text
    assert "| crossover | faster at every length |  |" in text
    (line,) = [line for line in text.partition("<!-- bench:overview -->")[2].splitlines() if line.startswith("| krause")]
    _, name, shape, ours, goal, other, label, _ = map(str.strip, line.split("|"))
    assert (name, shape, goal, label) == (aimed.name, aimed.title, "1.00 / 2.00", rows[1]["label"])
    times = [[row[part]["ms"] for part in ("forward", "backward")] for row in rows]  # two cases of one title, two providers
    for cell, expected in ((ours, times[2]), (other, min(times[1], times[3], key=sum))):
        assert [float(number) for number in cell.split("/")] == pytest.approx(expected, rel=0.01)
    assert report.main(["--check"], tmp_path, results) == 0


@pytest.mark.parametrize(
    "name, short",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-16GB", "v100"),
    ],
)
def test_short_names_of_gpus(name, short):
    assert short_name(name) == short


# ---- first calls, whose kernels are compiled without a GPU


def test_first_calls_cover_every_function_dtype_and_width():
    operators = {entry.function.__name__ for entry in (*registry.OPERATORS, *registry.PARTS, *registry.STEPS)}
    covered = {(call[0], call[2], call[3]) for call in first_calls.calls()}
    assert covered == set(itertools.product(operators, first_calls.DTYPES, first_calls.WIDTHS))


def test_slowest_first_calls_are_listed():
    row = {"operator": "krause_attention", "options": "top_k 4", "dtype": "float32", "width": 64, "kernel": "select",
           "seconds": 9.0, "cpu_seconds": 4.0, "instructions": 12345}
    env = {"cores": 2, "device": "Xeon, CPU threads: 1", "load_before": [1.0], "load_after": [3.5], "torch": "2.13",
           "triton": "3.6", "date": "2026-12-01T00:00"}
    rows = [row | {"width": width, "cpu_seconds": 0.5 * width} for width in range(1, 14)]
    page = first_calls.markdown({"environment": env, "calls": 3, "of_calls": 7, "rows": rows}).splitlines()
    words = "13 kernels for sm_90 of 3 of 7 calls, 3 of them beyond 5 s of CPU time, on 2 cores of Xeon, load 1.0 to 3.5; torch"
    assert page[0].startswith(words)
    assert page[4] == "| krause_attention | top_k 4 | float32 | 13 | select | 6.5 | 9.0 | 12,345 |"
    assert len(page) == 4 + first_calls.SLOWEST


def test_a_kernel_is_compiled_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    index = next(i for i, call in enumerate(first_calls.calls()) if call[0] == "linear_attention_step" and call[3] == 16)
    (record,) = first_calls.records([index], workers=1)
    (row,) = record["rows"]
    assert (row["operator"], row["kernel"], row["width"]) == ("linear_attention_step", "step", 16)
    assert row["cpu_seconds"] > 0 and row["instructions"] > 100
