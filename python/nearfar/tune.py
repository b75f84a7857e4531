"""Re-measure the launch parameters of the kernels on this GPU and rewrite the committed table.

    python -m nearfar.tune [--kernels attend ...] [--widths 64 ...] [--bits 16 ...]

For each kernel, head width and element size every candidate is compiled and timed on Krause attention in its commonest
shape, a causal window of 128 keys; the fastest goes into triton_kernels/launch.json, which nothing else writes. Needs rich (the
`bench` extra) and a source tree or an editable install.
"""

import argparse
import itertools

import torch
from rich.progress import track
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from nearfar.triton_kernels import krause, launch, pairwise_launch

KERNELS = ("attend", "grad_queries", "grad_keys")
LEFT, RIGHT = 127, 0
DTYPES = {16: torch.bfloat16, 32: torch.float32}


def candidates(bits, width):
    """Parameter sets worth compiling: tiles that fit shared memory and registers without drowning in them."""
    blocks = (32, 64) if bits == 16 else (16, 32)
    for block_m, block_n, warps, stages in itertools.product(blocks, blocks, (4, 8), (1, 2, 3)):
        if (width < 256 and warps == 8) or block_m * width * bits > 64 * 256 * 16:
            continue
        for registers in (None, 128, 168) if width <= 64 and bits == 16 else (None,):
            yield launch.LaunchParameters(block_m, block_n, warps, stages, registers)


def make_call(width, bits):
    """{kernel: function that plans and launches it with the parameters now in the table}."""
    shape = (1, 16, 8192, width)
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=DTYPES[bits]) for _ in range(4))
    sigma = torch.full((shape[1],), width**0.5, device="cuda")
    o, lse = torch.empty_like(q), torch.zeros(shape[:3], device="cuda")
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q), torch.zeros_like(lse)
    dlog_scale = torch.empty(*shape[:2], shape[2] // 16, device="cuda")
    call = pairwise_launch.signature(q, k, v, sigma, None, LEFT, RIGHT)
    pair, strides = krause.PAIR, q.stride()
    plans = {
        "attend": lambda: pairwise_launch.plan_attend(pair, call, strides, False),
        "grad_queries": lambda: pairwise_launch.plan_grad_queries(pair, call, strides, strides, strides, 0),
        "grad_keys": lambda: pairwise_launch.plan_grad_keys(pair, call, strides, strides, strides, 0),
    }
    tensors = {
        "attend": (q, k, v, None, sigma, o, lse, None),
        "grad_queries": (q, k, v, sigma, o, do, lse, None, dq, delta, dlog_scale, None),
        "grad_keys": (q, k, v, sigma, do, lse, None, delta, dk, dv, None),
    }
    # The gradients need the o, lse and delta of a real forward.
    plans["attend"]()(*tensors["attend"])
    plans["grad_queries"]()(*tensors["grad_queries"])
    return {kernel: lambda kernel=kernel: plans[kernel]()(*tensors[kernel]) for kernel in KERNELS}


def measure(run, entry, key, parameters):
    """Median milliseconds with these parameters, None if the kernel does not build with them."""
    entry[key] = list(parameters)
    for cached in (launch.launch_parameters, *(getattr(pairwise_launch, f"plan_{kernel}") for kernel in KERNELS)):
        cached.cache_clear()
    try:
        run()
    except (CompilationError, OutOfResources):
        return None
    return do_bench(run, warmup=5, rep=25, return_mode="median")


def main():
    parser = argparse.ArgumentParser(prog="python -m nearfar.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--widths", nargs="+", type=int, choices=(64, 128, 256), default=(64, 128, 256))
    parser.add_argument("--bits", nargs="+", type=int, choices=tuple(DTYPES), default=tuple(DTYPES))
    arguments = parser.parse_args()
    table = launch.table()
    for bits, width in itertools.product(arguments.bits, arguments.widths):
        calls = make_call(width, bits)
        for kernel in arguments.kernels:
            entry, key = table[kernel][f"{bits}-bit"], str(width)
            before = entry[key]
            times = {}
            for parameters in track(list(candidates(bits, width)), f"{kernel} {bits}-bit {width}"):
                milliseconds = measure(calls[kernel], entry, key, parameters)
                if milliseconds is not None:
                    times[parameters] = milliseconds
            best = min(times, key=times.get)
            entry[key] = list(best)
            print(f"{kernel} {bits}-bit {width}: {before} -> {list(best)}, {times[best]:.4f} ms")
    launch.write_table(table)


if __name__ == "__main__":
    main()
