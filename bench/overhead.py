"""What a call costs beside its kernels: the first call, compilation included, and the host time of every later one.

`python -m bench.overhead ROOM CASE`, CASE as JSON, prints the seconds of the first forward + backward of this process.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench import baselines, cases
from bench.formulas import Softmax
from bench.timing import wall_times

FIRST_CALL_GOAL_S = 5.0
HOST_GOAL_US = 30.0


def first_call_here(case, device):
    """Seconds of the first forward + backward, in a process that has called nothing but torch's own first backward.

    That one, of any operator, imports another part of torch: 3.4 of 7.6 seconds where it was first looked at
    (bench/results/h100/development/2026-11-22-first-call.log).
    """
    inputs = case.inputs(device, case.formula("nearfar"))
    do = torch.randn(case.output_shape, device=device, dtype=inputs[0].dtype)
    leaf = torch.ones(1, device=device, requires_grad=True)
    torch.autograd.grad(2 * leaf, leaf, torch.ones_like(leaf))
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.autograd.grad(case.call()(*inputs), inputs, do)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def first_call(room, case):
    """The same in a fresh process without a kernel cache."""
    command = [sys.executable, "-m", "bench.overhead", room, json.dumps(case.describe())]
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return float(done.stdout)


def host_us(fn, rounds=12, calls=200, pause=0.15):
    """Host time of a call that only enqueues work: of the medians of some rounds of calls the least.

    What else the host does, other tenants included, only adds to it, and may last for seconds: medians of one round differed
    by half of the least (bench/results/h100/development/2026-11-23-host-times.log).
    """
    medians = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        medians.append(statistics.median(wall_times(fn, most=calls)))
        torch.cuda.synchronize()
        time.sleep(pause)
    return 1e3 * min(medians)


def measures(room, case, device):
    """Rows {what, value, unit, goal} of a case; a failure stands in `note`.

    Host times are those of a small problem, whose kernels finish before the next call, so that no queue fills up.
    """
    small = replace(case, batch=1, heads=4, kv_heads=4, length=256)
    inputs, qkv = (small.inputs(device, formula) for formula in (small.formula("nearfar"), Softmax(-1, 0)))
    call, sdpa = small.call(), baselines.sdpa()
    label = case.variant or "whole window"

    def without_grad(run, inputs):
        with torch.no_grad():
            return host_us(lambda: run(*inputs))

    def with_grad(run, inputs):
        """After a backward, for whose kernels compilers may run beside the first forwards, and slow them down."""
        o = run(*inputs)
        torch.autograd.grad(o, [x for x in inputs if x.requires_grad], torch.ones_like(o))
        return host_us(lambda: run(*inputs))

    wanted = (
        (f"first call, {label}, forward + backward", "s", FIRST_CALL_GOAL_S, lambda: first_call(room, case)),
        (f"host time of a call, {label}, no_grad", "us", HOST_GOAL_US, lambda: without_grad(call, inputs)),
        (f"host time of a call, {label}, with grad", "us", HOST_GOAL_US, lambda: with_grad(call, inputs)),
        ("host time of scaled_dot_product_attention, no_grad", "us", None, lambda: without_grad(sdpa, qkv)),
        ("host time of scaled_dot_product_attention, with grad", "us", None, lambda: with_grad(sdpa, qkv)),
    )
    return [attempt(*row) for row in wanted]


def attempt(what, unit, goal, measure):
    row = {"what": what, "value": None, "unit": unit, "goal": goal, "note": None}
    try:
        row["value"] = measure()
    except Exception as failure:
        row["note"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return row


if __name__ == "__main__":
    room, description = sys.argv[1:]
    print(first_call_here(cases.load(room, json.loads(description)), torch.device("cuda")))
