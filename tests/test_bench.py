"""The benchmark room: floors, the oracle check, the command line on a CPU, and the tables it writes into documents."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from bench import __main__ as bench
from bench import baselines, check, report, suite
from bench.cases import BaseCase, Provider, Work, krause, rooms
from bench.environment import short_name
from bench.formulas import Rbf, Softmax, Window
from nearfar import registry

CASE = krause.Case(
    name="krause-test", batch=1, heads=4, kv_heads=2, length=200, width=16, dtype="float32", providers=("nearfar",),
    left=31, right=5,
)  # fmt: skip
CEILINGS = {"bytes_per_s": 1e12, "flops_per_s": 1e12}
CPU = torch.device("cpu")


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
    for module in found.values():
        for device in (CPU, torch.device("cuda")):
            for case in module.suite(device):
                assert isinstance(case, BaseCase) and set(case.providers) <= set(module.PROVIDERS)


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


def test_floors_of_the_performance_page():
    core = krause.gpu_suite()[0]
    ceilings = {"bytes_per_s": 3.02e12, "flops_per_s": 700e12}
    forward, backward = (work.floor_ms(ceilings) for work in core.work(Rbf(core.left, core.right)))
    assert forward == pytest.approx(0.089, rel=0.01) and backward == pytest.approx(0.18, rel=0.02)


@pytest.mark.parametrize("formula", [Rbf(31, 5), Rbf(31, 5, 12), Rbf(-1, 0), Softmax(31, 0), Softmax(-1, 0)])
def test_check_approves_the_plain_formula_and_sees_a_small_error(formula):
    inputs = CASE.inputs(CPU)
    expected = check.expect(formula, inputs, backward=True)
    keep, _ = formula.selection(inputs[0].detach(), inputs[1].detach().repeat_interleave(2, 1), inputs[3].detach())

    def run(q, k, v, sigma):
        return formula.plain(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), sigma, keep)

    def errors(output):
        return {**check.forward(expected, output), **check.backward(expected, output, inputs, ours=False)}

    right = errors(run(*inputs))
    assert set(right) == {"o", "dq", "dk", "dv"} | ({"dsigma"} if isinstance(formula, Rbf) else set())
    assert all(error <= allowed for error, allowed in right.values())
    assert all(error > allowed for error, allowed in errors(1.0001 * run(*inputs)).values() if allowed < 1e-5)


def test_check_refuses_nan_and_a_missing_gradient():
    inputs = CASE.inputs(CPU)
    expected = check.expect(Rbf(31, 5), inputs, backward=True)
    output = CASE.call()(*inputs)
    broken = check.Check(check.forward(expected, output * float("nan")), rows=1, rows_left_out=0)
    assert not broken.passed and broken.worst[0] == "o"
    constant_sigma = CASE.call()(*inputs[:3], inputs[3].detach())
    with pytest.raises(RuntimeError, match="not have been used"):
        check.backward(expected, constant_sigma, inputs, ours=True)


@pytest.mark.parametrize("length", [300, 512])
@pytest.mark.parametrize("left, right", [(127, 0), (200, 100), (-1, 0)])
def test_block_mask_is_the_one_torch_finds_pair_by_pair(left, right, length):
    window = Window(left, right)
    visible = window.visible(length, length, "cpu")
    theirs = create_block_mask(lambda b, h, row, key: visible[row, key], None, None, length, length, device="cpu")
    ours = baselines.window_block_mask(window, length, CPU)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("formula", [Rbf(63, 0), Softmax(-1, 0)])
def test_flex_agrees_with_the_oracle(formula):
    """Uncompiled, forward: all that FlexAttention does on a CPU."""
    inputs = replace(CASE, backward=False).inputs(CPU)
    expected = check.expect(formula, inputs, backward=False)
    run = baselines.flex(formula, CASE.length, CPU, compiled=lambda function: function)
    error, allowed = check.forward(expected, run(*inputs))["o"]
    assert error <= allowed


@pytest.mark.parametrize("top_k", [None, 12])
def test_eager_agrees_with_the_oracle(top_k):
    case = replace(CASE, top_k=top_k)
    row = suite.measure(case, "eager", case.inputs(CPU), {}, CEILINGS)
    assert row["status"] == "ok" and row["forward"]["ms"] > 0 and row["backward"]["samples"] >= 3


def test_a_failing_baseline_says_why_and_a_failing_nearfar_fails_the_run(monkeypatch):
    def broken(case, name, inputs):
        def run(*inputs):
            raise RuntimeError("no such kernel\nat all")

        return Provider(name, run, Rbf(case.left, case.right))

    monkeypatch.setattr(krause.Case, "provider", broken)
    rows = suite.run([replace(CASE, providers=("sdpa", "nearfar"))], CPU, CEILINGS, lambda text: None)
    assert [row["status"] for row in rows] == ["unavailable", "failed"]
    assert rows[0]["note"] == "RuntimeError: no such kernel"
    assert suite.sound(rows[:1]) and not suite.sound(rows)


def test_scaling_measures():
    def row(length, ms, peak):
        parts = {part: {"ms": ms, "bytes": 100} for part in ("forward", "backward")}
        return {"ours": True, "case": {"length": length}, "peak_bytes": peak, **parts}

    measures = suite.scaling([row(8, 5.0, 140), row(4, 2.0, 70)])
    assert [(m["value"], m["goal"]) for m in measures] == [(2.5, 2.1), (1.4, 1.5)]
    assert [report.met(m) for m in measures] == [False, True]


def test_command_line_on_a_tiny_case(out, capsys):
    shapes = ["--shapes", "1,2,64,16", "1,2,128,16", "--window", "15,0", "--top-k", "8"]
    assert bench.main(["krause", *shapes, "--backward", "--providers", "nearfar,sdpa,eager"]) == 0
    ours = "nearfar triton" if torch.cuda.is_available() else "nearfar reference"
    record = json.loads((out / "krause-custom.json").read_text())
    assert record["room"] == "krause" and record["environment"]["torch"] == torch.__version__
    assert [row["label"] for row in record["rows"]] == 2 * [ours, "sdpa causal", "eager"]
    assert all(row["status"] == "ok" and row["backward"]["ms"] > 0 for row in record["rows"])
    assert (out / "krause-length.png").read_bytes().startswith(b"\x89PNG")
    assert ours in capsys.readouterr().out


def test_a_wrong_provider_is_not_timed_and_fails_the_run(out, wrong_nearfar):
    assert bench.main(["krause", "--shapes", "1,2,64,16", "--providers", "nearfar,eager"]) == 1
    wrong, right = json.loads((out / "krause-custom.json").read_text())["rows"]
    assert wrong["status"] == "wrong" and wrong["forward"] is None and "o is off by" in wrong["note"]
    assert right["status"] == "ok"


@pytest.mark.parametrize(
    "arguments", [["--cases", "nonsense"], ["krause", "--shapes", "1,2,3"], ["krause"], ["krause", "--record"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert "error:" in capsys.readouterr().err


def test_documents_are_refreshed_from_recorded_results(tmp_path, capsys):
    rows = [suite.measure(CASE, name, CASE.inputs(CPU), {}, CEILINGS) for name in ("nearfar", "sdpa")]
    environment = dict(device="GPU", torch="2", triton="3", cuda="13", nearfar="0", date="2026-01-01T00:00")
    measures = [{"what": "first call", "value": 3.2, "unit": "s", "goal": 5.0, "note": None}]
    head = dict(name="krause-test", room="krause", environment=environment, ceilings=CEILINGS)
    results = tmp_path / "results"
    report.write_json(results / "h100", {**head, "rows": rows, "measures": measures})
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- bench:krause -->\nold\n<!-- /bench:krause -->\nThe end.\n")

    assert report.main(["--check"], tmp_path, results) == 1
    assert "old" in readme.read_text() and "out of date" in capsys.readouterr().out
    assert report.main([], tmp_path, results) == 0
    text = readme.read_text()
    assert "old" not in text and text.startswith("# Title\n") and text.endswith("The end.\n")
    assert "| **nearfar reference** |" in text and "| first call | 3.20 s | ≤ 5 s |" in text
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
