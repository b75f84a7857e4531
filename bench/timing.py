"""Medians of repeated calls, peak memory, and the ceilings of the machine that floors are made of."""

import statistics
import time
from typing import NamedTuple

import torch


class Time(NamedTuple):
    ms: float
    samples: int


def median_time(fn, device):
    """Median time of a call: CUDA events around each call with a cold L2 cache, or the wall clock on a CPU."""
    if device.type == "cuda":
        from triton import testing

        samples = testing.do_bench(fn, return_mode="all")
    else:
        samples = wall_times(fn)
    return Time(statistics.median(samples), len(samples))


def wall_times(fn, seconds=0.15, least=3, most=100):
    """Milliseconds of calls, after a first one that does not count."""
    fn()
    samples = []
    while len(samples) < least or (len(samples) < most and sum(samples) < 1e3 * seconds):
        start = time.perf_counter()
        fn()
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


def peak_bytes(fn, inputs):
    """Most memory in use during a call, its inputs included; None where torch does not count (CPU)."""
    if inputs[0].device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + sum(t.numel() * t.element_size() for t in inputs)


def ceilings(device):
    """What the machine can do, measured now: copied bytes (read + write) and matrix multiply-adds a second."""
    cuda = device.type == "cuda"
    source = torch.randn(2**28 if cuda else 2**24, device=device)
    target = torch.empty_like(source)
    copy = median_time(lambda: target.copy_(source), device)
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    matmul = median_time(lambda: torch.mm(a, b, out=product), device)
    return {
        "bytes_per_s": 2 * source.nbytes / (1e-3 * copy.ms),
        "flops_per_s": 2 * size**3 / (1e-3 * matmul.ms),
        "matmul": f"{size}^3 {str(dtype).removeprefix('torch.')}",
    }
