"""nearfar.tune: which candidate it takes, and that it times what the launch table has entries for. The clock is a fake."""

import copy
import math
from unittest.mock import patch

import pytest
import torch
from harness import DEVICE
from nearfar.triton_kernels import launch

from nearfar import tune

# Entries of the launch table by the call that serves them.
CALLS = [
    {"attend", "grad_queries", "grad_keys"},
    {"softmax_attend", "softmax_grad_queries", "softmax_grad_keys"},
    {"sync_attend", "sync_grad_tokens"},
    {"sync_grad_keys", "sync_grad_queries"},
    {"statistics", "key_mass", "statistics_grad_queries", "statistics_grad_keys"},
    {"geometry"},
    {"accumulate", "read", "grad"},
    {"read_causal", "grad_causal"},
    {"accumulate_one", "walk_read", "walk_grad_queries", "walk_grad_keys"},
    {"walk_read_causal", "walk_grad_queries_causal", "walk_grad_keys_causal"},
]


def parameters(block_m):
    return launch.LaunchParameters(block_m, 32, 4, 3, None)


@pytest.mark.parametrize("trials, best, refused", [
    ({32: (2.0, 1.0), 128: (3.0, 1.0)}, 64, []),
    ({32: (0.5, 1.0), 128: (0.7, 1.0)}, 32, []),
    ({32: (0.5, 1.5), 128: (0.7, 1.0)}, 128, [32]),
    ({32: (0.5, math.nan), 128: (0.6, math.inf)}, 64, [32, 128]),
    ({32: None, 128: (0.7, 1.005)}, 128, []),
], ids=["none is faster", "the fastest", "wrong", "not finite", "does not build, rounds"])
def test_the_fastest_that_computes_the_same(trials, best, refused):
    """trials: (milliseconds, the element that may be wrong) by candidate. The largest element is 2, of 16 bits."""
    entry = {"64": list(parameters(64))}
    measured = {64: (1.0, 1.0), **trials}

    def measure():
        result = measured[entry["64"][0]]
        return result and (result[0], [torch.ones(3), torch.tensor([2.0, result[1], -1.0])])

    milliseconds, found = tune.choose(entry, "64", map(parameters, trials), measure, tune.ROUNDING[16])
    assert entry["64"] == list(parameters(best)) and milliseconds == measured[best][0]
    assert found == list(map(parameters, refused))


@pytest.mark.skipif(DEVICE != "cpu", reason="what the interpreter launches")
@pytest.mark.parametrize("kernels", CALLS, ids=min)
def test_calls_launch_the_kernels_with_the_parameters_of_the_table(kernels):
    """A number of warps that no entry has marks the launches that the changed entries are for."""
    launched = []
    make = launch.Launch.run

    def spy(self, *arguments):
        launched.append((self._kernel.__name__, self._options["num_warps"]))
        make(self, *arguments)

    sizes = {"NEAR": (1, 1, 70), "FAR": (1, 1, 140), "NARROW": ((1, 1, 140), (8, 8))}
    with patch.multiple(tune, do_bench=lambda run, **_: run() or 0.5, **sizes), patch.object(launch.Launch, "run", spy):
        run = tune.make_call(min(kernels), 64, 32, device="cpu")
        changed = copy.deepcopy({kernel: launch.table()[kernel] for kernel in kernels})
        for kernel in kernels:
            changed[kernel]["32-bit"]["64"][2] = 2
        with patch.dict(launch.table(), changed):
            milliseconds, results = tune.measure(run, min(kernels))
    tune.forget_plans()
    marked = {name for name, warps in launched if warps == 2}
    assert marked == set().union(*map(tune.function_names, kernels))
    assert milliseconds in (0.5, 1.0) and all(torch.isfinite(result).all() for result in results)


def test_every_entry_of_the_table_has_a_call():
    assert set().union(*CALLS) == set(launch.table())
    for kernel, sizes in launch.table().items():
        for size, widths in sizes.items():
            for width in widths:
                assert len(list(tune.candidates(kernel, int(size.split("-")[0]), int(width)))) >= 2


@pytest.mark.parametrize("arguments, gpu, writable, message", [
    (["--kernels", "nothing"], True, True, "invalid choice: 'nothing'"),
    (["--choices", "nothing"], True, True, "invalid choice: 'nothing'"),
    ([], False, True, "torch sees none here"),
    ([], True, False, "launch.json cannot be written"),
    (["--choices"], True, False, "choices.json cannot be written"),
], ids=["kernel", "operator", "no GPU", "launch table", "table of choices"])
def test_bad_arguments_get_one_line(monkeypatch, capsys, arguments, gpu, writable, message):
    monkeypatch.setattr("sys.argv", ["tune", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(tune.os, "access", lambda path, mode: writable)
    with pytest.raises(SystemExit):
        tune.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
