"""Medians of repeated calls, peak memory, and the ceilings of the machine that floors are made of."""

import itertools
import statistics
import time
from typing import NamedTuple

import torch

SPINS_PER_SECOND = 2e9  # clock ticks; a clock that is slower spins longer
L2_FLUSH_BYTES = 2**28


class Time(NamedTuple):
    ms: float
    samples: int


def median_time(fn, device):
    """Median time of a call: of the GPU's work between CUDA events, with a cold L2 cache, or by the wall clock on a CPU."""
    samples = gpu_times(fn) if device.type == "cuda" else wall_times(fn)
    return Time(statistics.median(samples), len(samples))


def gpu_times(fn, seconds=0.1, least=10, most=200):
    """Milliseconds of the GPU's work in each call, after three that do not count.

    The GPU spins before each call for longer than the host takes to enqueue it: else a host that is slower than the kernels
    would be in the times, which are those of kernels (bench/overhead.py has the host's).
    """
    fn()
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    spin = int(min(2 * host + 1e-4, 5e-3) * SPINS_PER_SECOND)
    l2 = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def enqueue():
        l2.zero_()
        torch.cuda._sleep(spin)
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        fn()
        events[1].record()
        return events

    def milliseconds(events):
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    (estimate,) = milliseconds([enqueue()])
    count = int(min(max(1e3 * seconds / max(estimate, 1e-3), least), most))
    return milliseconds([enqueue() for _ in range(count)])


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
    """Most memory in use during a call, its inputs included."""
    held = sum(t.numel() * t.element_size() for t in inputs)
    if inputs[0].device.type != "cuda":
        return held + peak_of_cpu(fn)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + held


def peak_of_cpu(fn):
    """Most bytes that torch allocated during a call and did not yet free, from its profiler's events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        fn()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max([0, *in_use])


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
