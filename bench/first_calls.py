"""What a first call waits for: `python -m bench.first_calls` compiles all kernels for sm_90, with no GPU, and records the time.

Of every operator, dtype, width and class of windows and top_k, each kernel once, in a fresh cache. On a GPU the kernels of a
call are compiled side by side in threads, so that it waits about as long as its slowest kernel takes. CPU seconds, of Python
and of the compilers that it runs, are what other processes on the machine change least.
"""

import argparse
import functools
import itertools
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

import nearfar as nf
from bench import ahead, environment

RECORD = Path(__file__).parent / "results" / "first-calls.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (256, 128, 64, 32, 16)
WINDOWS = (64, 128, 192, 256, 512, 1024)  # rings of a selection; without one the kernels do not depend on the window
STEP_WINDOWS = (32, 128, 256, 1024)
GOAL_S, SLOWEST = 5.0, 10
TOKENS = 4096


def calls():
    """(operator, arguments in words, dtype, width, function, tensors) of each call."""
    for dtype in DTYPES:
        for width in WIDTHS:
            rows = functools.partial(_rows, dtype)
            for function, options, tensors in _of_width(width, rows):
                called = functools.partial(function, backend="triton", **options)
                words = ", ".join(f"{name} {_written(value)}" for name, value in options.items())
                yield getattr(function, "operator", function.__name__), words, dtype, width, called, tensors


def _rows(dtype, *widths, tokens=TOKENS, batch=1, heads=2):
    return [torch.empty(batch, heads, tokens, width, dtype=dtype) for width in widths]


def _numbers(*shape):
    return torch.ones(shape)


def _written(value):
    if isinstance(value, nf.SlidingWindow):
        return f"{value.left},{value.right}"
    return str(value)


def _of_width(width, rows):
    """(function, options, tensors) of each call with heads of a width. tensors: a function that makes them."""
    qkv = functools.partial(rows, width, width, width)
    for window in WINDOWS:
        options = {"locality": nf.SlidingWindow(window - 1), "top_k": min(window, 96) // 2}
        yield nf.krause_attention, options, lambda: [*qkv(), _numbers(2)]
    for locality in (None, nf.SlidingWindow(127)):
        yield nf.krause_attention, {"locality": locality}, lambda: [*qkv(), _numbers(2)]
    for window in STEP_WINDOWS:
        for top_k in (None, window // 2):
            yield krause_step, {"window": window, "top_k": top_k}, lambda: rows(width, width, width, tokens=1)
    for causal in (False, True):
        yield nf.linear_attention, {"causal": causal}, qkv
        for factors in ((16, width), (width, 64)) if width > 16 else ((16, 16), (16, 16, 16)):
            if width <= 128 or factors[0] == 16:
                tensors = functools.partial(rows, *factors, *factors, 64)
                yield hadamard, {"factors": factors, "causal": causal}, tensors
        yield nf.softmax_attention, {"causal": causal}, qkv
        yield nf.affine_attention, {"causal": causal}, lambda: [*qkv(), _numbers(1, 2, TOKENS), _numbers(1, 2, TOKENS)]
        for top_k, tokens in ((None, TOKENS), (16, 1024)):
            order = (1, 2, tokens) if causal else (1, 2)
            yield nf.synchronization_attention, {"causal": causal, "top_k": top_k}, lambda order=order, tokens=tokens: [
                *rows(width, width, tokens=tokens), _numbers(2), _numbers(2), _numbers(*order),
            ]
        yield nf.order_parameter, {"causal": causal}, lambda: rows(width)
        for sigma in (None, 2.0):
            yield statistics, {"causal": causal, "sigma": sigma}, lambda: rows(width, width)
            yield geometry, {"causal": causal, "sigma": sigma}, qkv
    yield nf.affine_attention, {"window_size": (127, 64)}, lambda: [*qkv(), _numbers(1, 2, TOKENS), _numbers(1, 2, TOKENS)]
    yield linear_step, {}, lambda: rows(width, width, width, tokens=1)
    yield hadamard_step, {}, lambda: rows(16, width, 16, width, 64, tokens=1)


def named(operator):
    """Marks a call whose function is not that operator's own."""

    def mark(function):
        function.operator = operator
        return function

    return mark


@named("krause_attention_step")
def krause_step(q, k, v, window, top_k, backend):
    with torch.no_grad():
        cache = nf.KrauseCache.empty(1, 2, window, q.shape[3], dtype=q.dtype)
        nf.krause_attention_step(q, k, v, cache, _numbers(2), top_k=top_k, backend=backend)


@named("linear_attention_step")
def linear_step(q, k, v, backend):
    with torch.no_grad():
        nf.linear_attention_step(q, k, v, _numbers(1, 2, q.shape[3], v.shape[3] + 1), backend=backend)


@named("hadamard_attention_step")
def hadamard_step(*tensors, backend):
    with torch.no_grad():
        state = _numbers(1, 2, *[tensor.shape[3] for tensor in tensors[:2]], tensors[4].shape[3] + 1)
        nf.hadamard_attention_step(tensors[:2], tensors[2:4], tensors[4], state, backend=backend)


@named("hadamard_attention")
def hadamard(*tensors, factors, causal, backend):
    count = len(factors)
    return nf.hadamard_attention(tensors[:count], tensors[count:-1], tensors[-1], causal=causal, backend=backend)


@named("attention_statistics")
def statistics(*tensors, backend, **options):
    return sum(nf.attention_statistics(*tensors, backend=backend, **options)[:2])


@named("selection_geometry")
def geometry(*tensors, backend, **options):
    with torch.no_grad():
        nf.selection_geometry(*tensors, 4, backend=backend, **options)


def measure(launch, tensors):
    """(hash, what compiling it took) of a kernel."""
    times, start = os.times(), time.perf_counter()
    compiled = ahead.compile_launch(launch, tensors)
    seconds, after = time.perf_counter() - start, os.times()
    return compiled.hash, {
        "kernel": launch._kernel.__name__,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(sum(after[:4]) - sum(times[:4]), 2),
        "instructions": compiled.asm["ptx"].count(";\n"),
    }


def measure_call(index):
    """What `measure` finds of each kernel of a call, with the call."""
    torch.set_num_threads(1)
    operator, options, dtype, width, function, tensors = next(itertools.islice(calls(), index, None))
    call = {"operator": operator, "options": options, "dtype": str(dtype)[6:], "width": width}
    return [(key, call | found) for key, found in itertools.starmap(measure, ahead.captured(function, tensors()))]


def records(chosen, workers):
    """The record as it grows, call by call. chosen: indices of the calls."""
    started, found = os.getloadavg(), {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for done, kernels in enumerate(pool.map(measure_call, chosen), 1):
                for key, row in kernels:  # one that another call compiled comes from the cache
                    found.setdefault(key, row)
                load = {"load_before": started, "load_after": os.getloadavg(), "cores": os.cpu_count(), "workers": workers}
                env = environment.describe(torch.device("cpu")) | load
                yield {"environment": env, "calls": done, "of_calls": len(chosen), "rows": list(found.values())}


def markdown(record):
    """The slowest kernels, and how many take longer than the goal."""
    rows, env, calls = record["rows"], record["environment"], f"{record['calls']} of {record['of_calls']} calls"
    late = sum(row["cpu_seconds"] > GOAL_S for row in rows)
    lines = [
        f"{len(rows)} kernels for sm_90 of {calls}, {late} of them beyond {GOAL_S:g} s of CPU time, on {env['cores']} cores of "
        f"{env['device'].partition(',')[0]}, load {env['load_before'][0]:.1f} to {env['load_after'][0]:.1f}; torch "
        f"{env['torch']}, Triton {env['triton']}, {env['date'][:10]}. The slowest:\n",
        "| operator | call | dtype | width | kernel | CPU s | wall s | PTX instructions |",
        "|---|---|---|---:|---|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: -row["cpu_seconds"])[:SLOWEST]:
        cells = [row[name] for name in ("operator", "options", "dtype", "width", "kernel")]
        cells += [f"{row['cpu_seconds']:.1f}", f"{row['seconds']:.1f}", f"{row['instructions']:,}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if note := record.get("note"):  # by whoever put a record together
        lines += ["", note]
    return "\n".join([*lines, ""])


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.first_calls", description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", help="of these only, and print the table instead of recording")
    parser.add_argument("--workers", type=int, default=1, help="processes that compile")
    args = parser.parse_args(arguments)
    chosen = [index for index, call in enumerate(calls()) if not args.operators or call[0] in args.operators]
    for record in records(chosen, args.workers):
        if not args.operators:  # written each time: a run that is cut short keeps some
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
    if args.operators:
        print(markdown(record))


if __name__ == "__main__":
    main()
