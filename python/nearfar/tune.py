"""Re-measure the launch parameters of the kernels, or which backend is faster, on this GPU and rewrite the committed table.

    python -m nearfar.tune [--kernels attend read_causal ...] [--widths 64 ...] [--bits 16 ...]
    python -m nearfar.tune --choices [krause_attention ...]

For each kernel, head width and element size, every candidate is compiled (one process per core) and then timed inside a forward
and backward of an operator in a common shape: Krause attention with a causal window of 128 keys, causal softmax, linear or
Hadamard attention, synchronization attention in which every pair locks, or the diagnostics of causal softmax attention. The
fastest candidate is written to triton_kernels/launch.json. A candidate is refused if an output or a gradient differs by more
than rounding from the result with the current parameters. With --choices, each backend is timed in every case of
python/nearfar/runtime/choices.json instead (tune_choices.py), and that file is rewritten; this requires the CUDA extension and
tuned launch parameters. Needs a GPU, rich (the `bench` extra), and a source tree or an editable install.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from unittest.mock import patch

import torch
from rich.progress import track
from triton import CompilationError, OutOfResources
from triton.testing import do_bench

import nearfar as nf
from nearfar import tune_choices
from nearfar.runtime import choices, plans
from nearfar.triton_kernels import (
    affine_launch,
    diagnostics_launch,
    launch,
    linear_launch,
    pairwise_launch,
    synchronization_launch,
)

DTYPES = {16: torch.bfloat16, 32: torch.float32}
# Allowed difference, relative to the largest element of a result: sums in another order round differently. The error of a race
# or a wrong tile is as large as the result itself.
ROUNDING = {16: 2.0**-6, 32: 2.0**-13}
NEAR, FAR = (1, 16, 8192), (4, 32, 4096)  # batch, heads, tokens
NARROW, WIDE = ((4, 32, 4096), (16, 16)), ((1, 12, 32768), (64, 64))  # shapes and factors of Hadamard attention by width of v
DIAGNOSTICS = ("statistics", "key_mass", "statistics_grad_queries", "statistics_grad_keys", "geometry")
# Rows, columns and stages of the candidate tiles at 16 bits.
TILES = {
    "near": ((32, 64), (32, 64), (1, 2, 3)),
    "softmax": ((32, 64, 128), (32, 64, 128), (2, 3)),
    "statistics": ((64, 128), (64, 128), (2, 3, 4)),
    "sync": ((32, 64, 128), (32, 64), (1, 2, 3)),
    "walk": ((32, 64, 128), (None,), (1, 2, 3)),
    "accumulate": ((64, 128, 256), (32, 64, 128), (2, 3, 4)),
    "read": ((64, 128), (32, 64), (1, 2, 3, 4)),
    "grad": ((64, 128), (32, 64), (1, 2, 3, 4)),
}
WARP_SHARE = (256, 2048)  # fewest and most elements of a tile per warp
# Candidate limits of registers per thread, for narrow heads.
REGISTERS = {"near": (None, 128, 168), "softmax": (None, 128, 168), "sync": (None, 128, 168)}


def function_names(kernel):
    """The names of the Triton functions that use an entry of the table."""
    if kernel == "geometry":
        return {"select", "separate"}
    return {kernel.removeprefix("softmax_").removeprefix("sync_").removesuffix("_causal").removesuffix("_one")}


def family(kernel):
    first = kernel.split("_")[0]
    if kernel in DIAGNOSTICS:
        return "softmax" if "grad" in kernel else "statistics"
    if first in ("softmax", "sync", "walk"):
        return first
    return first if function_names(kernel) <= {"accumulate", "read", "grad"} else "near"


def candidates(kernel, bits, width):
    """Candidate parameters: tiles that fit in shared memory and use registers neither too much nor too little."""
    rows, columns, stages = TILES[family(kernel)]
    near = family(kernel) == "near"
    limits = REGISTERS.get(family(kernel), (None,)) if width <= 64 and bits == 16 else (None,)
    if bits == 32:
        rows, columns = ([size and size // 2 for size in sizes] for sizes in (rows, columns))
    if kernel == "sync_grad_keys":  # its rows are keys, its columns queries
        rows, columns = columns, rows
    for block_m, block_n, warps, depth in itertools.product(rows, columns, (4, 8), stages):
        if block_m * width * bits > 64 * 256 * 16 or (near and width < 256 and warps == 8):
            continue
        if not near and None not in (block_m, block_n) and not WARP_SHARE[0] <= block_m * block_n / warps <= WARP_SHARE[1]:
            continue
        for registers in limits:
            yield launch.LaunchParameters(block_m, block_n, warps, depth, registers)


def make_diagnostics(kernel, width, bits, device):
    q, k, v = (torch.randn(*NEAR, width, device=device, dtype=DTYPES[bits]).requires_grad_() for _ in range(3))

    def selection():
        """Means, because near ties may legitimately change single rows."""
        found = nf.selection_geometry(q, k, v, 4, causal=True, backend="triton")
        return [part.mean() for part in found]

    def statistics():
        found = nf.attention_statistics(q, k, causal=True, backend="triton")
        gradients = torch.autograd.grad((found.lse.sum(), found.entropy.sum()), (q, k))
        return [found.lse.detach(), found.entropy.detach(), found.max_weight, found.key_mass, *gradients]

    return selection if kernel == "geometry" else statistics


def make_call(kernel, width, bits, device="cuda"):
    """A function that runs forward and backward of an operator that launches this kernel, and returns all results."""
    if family(kernel) == "sync":
        return make_synchronization_call(kernel, width, bits, device)
    if kernel in DIAGNOSTICS:
        return make_diagnostics(kernel, width, bits, device)
    factored = family(kernel) not in ("near", "softmax")
    shape, widths = (FAR if factored else NEAR), (width,)
    if factored and family(kernel) != "walk" and not kernel.endswith("_one"):
        shape, widths = NARROW if width <= 64 else WIDE
    inputs = [
        torch.randn(*shape, size, device=device, dtype=DTYPES[bits]).requires_grad_() for size in (*widths, *widths, width)
    ]
    do = torch.randn_like(inputs[-1])

    def forward():
        if factored:
            qs, ks = inputs[: len(widths)], inputs[len(widths) : -1]
            return nf.hadamard_attention(qs, ks, inputs[-1], causal=kernel.endswith("_causal"), backend="triton")
        if family(kernel) == "softmax":
            return nf.softmax_attention(*inputs, causal=True, backend="triton")
        return nf.krause_attention(*inputs, width**0.5, nf.SlidingWindow(127), backend="triton")

    def run():
        o = forward()
        return [o.detach(), *torch.autograd.grad(o, inputs, do)]

    return run


def make_synchronization_call(kernel, width, bits, device):
    """As make_call. Frequencies are close and phases agree, so that no cell is skipped. Causal calls use separate kernels."""
    causal = kernel in ("sync_grad_queries", "sync_grad_keys")
    omega, v = (torch.randn(*NEAR, width, device=device, dtype=DTYPES[bits]) for _ in range(2))
    inputs = [(omega * 0.3 * width**-0.5).requires_grad_(), v.requires_grad_()]
    parameters = 2.0, torch.full((NEAR[1],), 0.2, device=device), torch.ones(NEAR if causal else NEAR[:2], device=device)
    do = torch.randn_like(v)

    def run():
        o = nf.synchronization_attention(*inputs, *parameters, causal=causal, backend="triton")
        return [o.detach(), *torch.autograd.grad(o, inputs, do)]

    return run


@contextmanager
def recorded():
    """Context that records (launch, tensors) of all launches."""
    launches, run = [], launch.Launch.run

    def record(self, tensors, surveyed):
        launches.append((self, tensors))
        run(self, tensors, surveyed)

    with patch.object(launch.Launch, "run", record):
        yield launches


def forget_plans():
    """Clear all plans, so that later launches use the current table."""
    launch.launch_parameters.cache_clear()
    plans.forget_plans()
    for module in (affine_launch, diagnostics_launch, linear_launch, pairwise_launch, synchronization_launch):
        for name, plan in vars(module).items():
            if name.startswith("plan_"):
                plan.cache_clear()


@functools.cache
def cached_call(kernel, width, bits):
    return make_call(kernel, width, bits)


def compile_candidate(kernel, width, bits, parameters):
    """Compile a kernel with these parameters into Triton's cache, without launching anything."""

    def compile_only(self, tensors, surveyed):
        if self._kernel.__name__ in function_names(kernel):
            with suppress(CompilationError, OutOfResources):
                self.compile(tensors, surveyed[1])

    launch.table()[kernel][f"{bits}-bit"][str(width)] = list(parameters)
    forget_plans()
    with (
        patch.object(launch.Launch, "run", compile_only),
        patch.object(launch.Launch, "is_new", lambda *_: False),
        patch.object(launch, "build_ahead", lambda *_: None),
    ):
        cached_call(kernel, width, bits)()


def compile_ahead(jobs):
    """Call compile_candidate with each of these argument lists, in one process per core."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_candidate, *job) for job in jobs]
        for future in track(futures, "compiling"):
            future.result()


def measure(run, kernel):
    """(milliseconds in this kernel, results) with the current table; None if the kernel does not compile."""
    forget_plans()
    try:
        with recorded() as launches:
            results = run()
    except (CompilationError, OutOfResources):
        return None
    own = [(made, tensors) for made, tensors in launches if made._kernel.__name__ in function_names(kernel)]
    assert own, f"the call launches no {kernel}"
    times = [do_bench(lambda m=made, t=tensors: m(*t), warmup=5, rep=25, return_mode="median") for made, tensors in own]
    return sum(times), results  # the timed launches have overwritten the results


def choose(entry, key, trials, measure, rounding):
    """Set entry[key] to the fastest trial with the same results; return its milliseconds and the refused trials."""
    current = launch.LaunchParameters(*entry[key])
    fastest, expected = measure()
    best, refused = current, []
    for parameters in trials:
        entry[key] = list(parameters)
        measured = measure()
        if measured is None:
            continue
        if not tune_choices.agree(measured[1], expected, rounding):
            refused.append(parameters)
        elif measured[0] < fastest:
            best, fastest = parameters, measured[0]
    entry[key] = list(best)
    return fastest, refused


def main() -> None:
    table = launch.table()
    parser = argparse.ArgumentParser(prog="python -m nearfar.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=list(table), default=list(table))
    parser.add_argument("--widths", nargs="+", type=int, choices=(64, 128, 256), default=(64, 128, 256))
    parser.add_argument("--bits", nargs="+", type=int, choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument(
        "--choices", nargs="*", choices=tuple(tune_choices.CALLS), metavar="OPERATOR",
        help="measure which backend serves these operators faster, or all, instead of launch parameters",
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it measures on a GPU, and torch sees none here")
    written = launch.TABLE if arguments.choices is None else choices.TABLE
    if not os.access(written, os.W_OK):
        parser.error(f"{written} cannot be written: run it from a source tree of yours, installed with pip install -e")
    if arguments.choices is not None:
        return tune_choices.main(arguments.choices)
    chosen = [
        (kernel, width, bits)
        for kernel, bits, width in itertools.product(arguments.kernels, arguments.bits, arguments.widths)
        if str(width) in table[kernel][f"{bits}-bit"]
    ]
    compile_ahead([(*each, parameters) for each in chosen for parameters in candidates(each[0], each[2], each[1])])
    for kernel, width, bits in chosen:
        entry, key = table[kernel][f"{bits}-bit"], str(width)
        before, run = entry[key], make_call(kernel, width, bits)
        trials = track(list(candidates(kernel, bits, width)), f"{kernel} {bits}-bit {width}")
        milliseconds, refused = choose(entry, key, trials, lambda r=run, k=kernel: measure(r, k), ROUNDING[bits])
        print(f"{kernel} {bits}-bit {width}: {before} -> {entry[key]}, {milliseconds:.4f} ms")
        for parameters in refused:
            print(f"  refused {list(parameters)}: its results differ by more than rounding")
        launch.write_table(table)


if __name__ == "__main__":
    main()
