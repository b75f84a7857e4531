"""The measured choices: which kernel "auto" asks first for every signature, and the table that it is read from."""

import itertools
import subprocess
import sys

import pytest
import torch
from harness import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

import nearfar as nf
from bench import report
from nearfar import _cuda, registry, tune_choices
from nearfar.ops import affine, diagnostics, krause, krause_step, linear, synchronization
from nearfar.runtime import choices
from nearfar.runtime.dispatch import CUDA_FIRST, TRITON_FIRST
from nearfar.runtime.tensors import Layout

ROWS = [(operator, row) for operator, rows in choices.table()["choices"].items() for row in rows]
BOTH, FORWARD, BACKWARD = (CUDA_FIRST, CUDA_FIRST), (CUDA_FIRST, TRITON_FIRST), (TRITON_FIRST, CUDA_FIRST)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9 that the CUDA kernels serve."""
    for name in ("krause_reason", "linear_reason", "affine_reason", "synchronization_reason", "hopper_reason"):
        monkeypatch.setattr(_cuda, name, lambda *arguments: None)
    monkeypatch.setattr(choices, "_capability", lambda index: 9)


# ---- every operator's choices, as they were when the tables lay in the operators


def layout(*shape, dtype=torch.bfloat16):
    return Layout(torch.Size(shape), torch.empty(shape, device="meta").stride(), dtype, torch.device("cuda", 0))


def tensors(count, width, tokens=9):
    return (layout(2, 4, tokens, width),) * count


def of_krause(width, window, top_k):
    locality = window and nf.SlidingWindow(window - 1)
    return krause._checked.__wrapped__(tensors(3, width), locality, top_k)[2].orders


def of_krause_step(slots, selects):
    cache = *tensors(2, 64, slots), layout(2, dtype=torch.int32)
    _, order, _ = krause_step._checked.__wrapped__((*tensors(3, 64, 1), *cache), 3, selects)
    return order, order


def of_linear(causal, factors, width, value_width):
    metas = *tensors(2 * factors, width, 4096), *tensors(1, value_width, 4096)
    return linear._checked.__wrapped__(metas, factors, factors > 1, causal)[0].orders


def of_affine(width, keys):
    return affine._checked.__wrapped__((*tensors(1, width), *tensors(2, width, keys)), -1, 1.0, False)[1].orders


def of_synchronization(width, symmetric):
    return synchronization._checked.__wrapped__(tensors(2, width), None, symmetric).orders


def of_diagnostics(name, width):
    return diagnostics._checked.__wrapped__(tensors(2, width), False, name)[2]


WIDTHS, LENGTHS, WINDOWS = (16, 32, 64, 128, 256), (1, 1023, 1024, 4095, 4096, 16383, 16384, 65536), (64, 65, 128, 129)
# By operator the axes of its signatures, and what is not Triton's: a measurement that changes a choice changes it here.
GRID = {
    of_krause: ((WIDTHS, (None, 1, *WINDOWS), (None, 5)), {
        BOTH: [(32, (65, 128)), (64, (1, 64, 65, 128))], FORWARD: [(128, (65, 128))],
    }),
    of_krause_step: (((1, 32, 33, 128, 129, 1024, 1025), (False, True)), {
        BOTH: [((33, 128, 129, 1024), False), ((1, 32, 33, 128, 129, 1024), True)],
    }),
    of_linear: (((False, True), (1, 2, 3), (16, 64), WIDTHS), {
        BOTH: [((False, True), 1, (16, 64), (64, 128)), (False, 2, (16, 64), 128), (True, 2, (16, 64), 64)],
    }),
    of_affine: ((WIDTHS, LENGTHS), {
        BOTH: [(64, (16384, 65536)), (128, LENGTHS[2:])], BACKWARD: [(64, (1024, 4095, 4096, 16383))],
    }),
    of_synchronization: ((WIDTHS, (False, True)), {BOTH: [(64, True)], FORWARD: [(64, False)]}),
    of_diagnostics: ((("attention_statistics", "selection_geometry"), WIDTHS), {
        BOTH: [(("attention_statistics", "selection_geometry"), (64, 128))],
    }),
}


@pytest.mark.parametrize("orders", GRID, ids=lambda function: function.__name__)
def test_choices_of_all_signatures(orders, hopper):
    axes, listed = GRID[orders]
    expected = dict.fromkeys(itertools.product(*axes), (TRITON_FIRST, TRITON_FIRST))
    for order, groups in listed.items():
        for group in groups:
            for start in itertools.product(*(values if isinstance(values, tuple) else (values,) for values in group)):
                expected |= {signature: order for signature in expected if signature[: len(start)] == start}
    assert {signature: orders(*signature) for signature in expected} == expected


@pytest.mark.parametrize("capability", [8, 10])
def test_triton_comes_first_on_other_architectures(capability, hopper, monkeypatch):
    monkeypatch.setattr(choices, "_capability", lambda index: capability)
    assert of_krause(64, 128, None) == of_affine(128, 4096) == (TRITON_FIRST, TRITON_FIRST)


# ---- the table


def test_rows_are_of_public_functions_that_can_be_measured():
    functions = [entry.function.__name__ for entry in (*registry.OPERATORS, *registry.STEPS)]
    assert list(choices.table()["choices"]) == list(tune_choices.CALLS) and set(tune_choices.CALLS) <= set(functions)


@pytest.mark.parametrize("operator", tune_choices.CALLS)
def test_every_row_is_found_by_what_was_measured(operator, monkeypatch):
    """A call of a row's case asks with that row's key and no other's: keys name what the operator does, and do not overlap."""

    class Asked(Exception):
        pass

    def ask(name, device, **key):
        raise Asked(name, key)

    monkeypatch.setattr(choices, "orders", ask)
    for row in choices.rows(operator):
        with FakeTensorMode(), pytest.raises(Asked) as asked:
            tune_choices.CALLS[operator](row["case"], "cpu")[1]("auto")
        name, key = asked.value.args
        assert name == operator
        key = {"capability": row["key"]["capability"], **key}
        assert set(row["key"]) == set(key)
        assert [other for other in choices.rows(operator) if choices._fits(other["key"], key)] == [row]


def test_every_figure_has_a_run():
    runs, fields = choices.table()["runs"], ["gpu", "torch", "triton", "commit", "date", "method", "source"]
    assert {row[backend]["run"] for _, row in ROWS for backend in CUDA_FIRST} == set(runs)
    assert all(list(run) == fields and all(run.values()) for run in runs.values())
    for _, row in ROWS:
        assert set(row["cuda"]) == set(row["triton"]) and all(0 < row[b][d] for b in CUDA_FIRST for d in set(row[b]) - {"run"})


def test_torch_compile_reads_it_while_it_traces(hopper):
    device = torch.device("cuda", 0)

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def forward_is_cuda(x):
        forward, _ = choices.orders("affine_attention", device, head_dim=64, keys=x.shape[0])
        return x + (forward == CUDA_FIRST)

    choices.table.cache_clear()
    assert [int(forward_is_cuda(torch.zeros(keys))[0]) for keys in (900, 5000, 20000)] == [0, 0, 1]


@pytest.mark.parametrize("operator", tune_choices.CALLS)
def test_a_compiled_call_finds_its_row(operator, hopper, monkeypatch):
    """On tensors of a CPU. The rows without a backward, of a step and of diagnostics, once failed in Dynamo of torch 2.11."""
    of_device, answers = choices.orders, []

    def of_gpu(name, device, **key):
        answers.append(of_device(name, torch.device("cuda", 0), **key))
        return answers[-1]

    monkeypatch.setattr(choices, "orders", of_gpu)
    row = next(row for row in choices.rows(operator) if choices.order(row, "backward") == CUDA_FIRST)  # no row: Triton first
    sizes = {name: size for name, size in {"B": 1, "H": 1, "Hkv": 1, "N": 1024}.items() if name in row["case"]}
    inputs, call = tune_choices.CALLS[operator](row["case"] | sizes | {"dtype": "float32"}, "cpu")
    torch._dynamo.reset()
    torch.compile(lambda: call("auto"), fullgraph=True, dynamic=True, backend="eager")()
    assert set(answers) == {(choices.order(row, "forward"), choices.order(row, "backward"))}


def test_import_does_not_read_it():
    code = "import nearfar; from nearfar.runtime import choices; assert choices.table.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pages_show_the_table(monkeypatch):
    """`python -m bench.report` writes them."""
    assert report.main(["--check"]) == 0
    page = "<!-- choices:attention_statistics -->\n<!-- /choices:attention_statistics -->"
    row = '| 9 | 64 | B1 H16 N16384 D64 bfloat16 | 3.282 | 4.007 | CUDA | 1 |'
    assert row in report.refreshed(page, report.RESULTS).splitlines()
    slower = choices.rows("attention_statistics")[0]
    monkeypatch.setitem(slower["cuda"], "forward", 5.5)
    assert row.replace("3.282", "5.5").replace("CUDA", "Triton") in report.refreshed(page, report.RESULTS).splitlines()
    assert report.main(["--check"]) == 1


# ---- python -m nearfar.tune --choices: the clock is a fake


SMALL = {"B": 1, "H": 2, "N": 40, "D": 16, "dtype": "float32"}


def small(case):
    """The case in a size for the interpreter, options as they are."""
    sizes = {"Hkv": 1, "slots": 32, "factors": [16] * len(case.get("factors", ())), "window": [11, 0], "top_k": 5}
    return {**case, **SMALL} | {name: size for name, size in sizes.items() if case.get(name)}


@pytest.mark.parametrize("operator", tune_choices.CALLS)
@pytest.mark.skipif(DEVICE != "cpu", reason="kernels of CPU tensors are interpreted, which is not to be on a GPU's machine")
def test_forward_and_backward_are_timed_by_turns_once_they_are_right(operator, monkeypatch):
    monkeypatch.setattr(tune_choices, "KERNELS", ("triton", "reference"))  # the two that serve a CPU
    row = choices.rows(operator)[-1]
    timed = []
    directions = [name for name in row["cuda"] if name != "run"]

    def clock(calls):
        timed.extend(calls)
        return [0.123456 * (1 + i) for i, call in enumerate(calls) if call() is not None]

    found = tune_choices.measure(operator, small(row["case"]), "cpu", clock)
    assert list(found) == ["triton", "reference"] and all(list(times) == directions for times in found.values())
    times = [ms for backend in found.values() for ms in backend.values()]
    assert len(timed) == 2 * len(directions) and times == [0.1235, 0.2469, 0.3704, 0.4938][: len(timed)]


def test_wrong_results_are_not_timed(monkeypatch):
    def wrong(case, device):
        inputs = tune_choices.draw_qkv(case, device)
        return inputs, lambda backend: sum(inputs) * (1.0 if backend == "reference" else 1.1)

    monkeypatch.setitem(tune_choices.CALLS, "krause_attention", wrong)
    with pytest.raises(ValueError, match="backend='cuda' differs from the reference"):
        tune_choices.measure("krause_attention", SMALL, "cpu", lambda calls: pytest.fail("timed"))
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
        tune_choices.measure("attention_statistics", SMALL | {"causal": True}, "cpu", lambda calls: pytest.fail("timed"))


def test_near_ties_are_few():
    expected = torch.ones(1, 2, 10, 4)
    one = expected.clone()
    one[0, 0, 3, 1] = 2.0
    for share, right in ((0.0, False), (0.04, False), (0.05, True)):
        assert tune_choices.agree([one], [expected], 0.1, share) == right
    assert not tune_choices.agree([torch.tensor(float("nan"))], [torch.tensor(1.0)], 0.1)


def row(capability, case, run="old", cuda=1.0, triton=2.0, width=64):
    key = {"capability": capability, "head_dim": width}
    times = {"cuda": {"forward": cuda, "run": run}, "triton": {"forward": triton, "run": run}}
    return {"key": key, "case": {"N": case}, **times}


def test_what_is_measured_takes_the_place_of_the_rows_of_its_architecture():
    def measure(case):
        if case["N"] == 3:
            raise ValueError("not served")
        return {"cuda": {"forward": 4.0}, "triton": {"forward": 3.0}}

    rows = [row(8, 1), row(9, 2), row(9, 3, width=128), row(8, 3, width=32)]
    found = tune_choices.renewed(rows, 9, "new", measure)
    assert found == [rows[0], rows[3], row(9, 2, "new", 4.0, 3.0), rows[2]]  # its own case; what was; nothing at 32
    assert choices.order(found[2], "forward") == choices.order(found[2], "backward") == TRITON_FIRST


def test_the_table_is_written_as_it_is_read():
    table = choices.table()
    assert tune_choices.text(table) == choices.TABLE.read_text()
    unused = table | {"runs": table["runs"] | {"unused": {}}}
    assert tune_choices.text(unused) == tune_choices.text(table)


def test_the_command_writes_the_table(tmp_path, monkeypatch):
    from nearfar import tune

    written = tmp_path / "choices.json"
    written.write_text(choices.TABLE.read_text())
    monkeypatch.setattr(choices, "TABLE", written)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune_choices, "measure", lambda *_: {"cuda": {"forward": 2.0}, "triton": {"forward": 1.0}})
    monkeypatch.setattr(sys, "argv", ["tune", "--choices", "selection_geometry"])
    choices.table.cache_clear()
    try:
        tune.main()
        choices.table.cache_clear()
        table = choices.table()
        run = table["choices"]["selection_geometry"][0]["cuda"]["run"]
        assert table["runs"][run]["gpu"] == "GPU" and table["runs"][run]["torch"] == torch.__version__
        assert "geometry" not in table["runs"] and "statistics" in table["runs"]
        assert [row["triton"]["forward"] for row in choices.rows("selection_geometry")] == [1.0, 1.0]
    finally:
        choices.table.cache_clear()
