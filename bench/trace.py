"""Where the time of a case goes: `python -m bench profile CASE`, a table of the kernels (on a CPU of the torch operators)."""

import torch
from torch.profiler import ProfilerActivity, profile


def kernels(case, name, device, calls=5):
    """(provider's label, torch.profiler's table) of some forward and backward calls, after one that compiles."""
    inputs = case.inputs(device, case.formula(name))
    provider = case.provider(name, inputs)
    if provider.token_major:
        inputs = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(case.backward) for t in inputs]

    def call():
        o = provider.run(*inputs)
        if case.backward:
            torch.autograd.grad(o, inputs, torch.ones_like(o), allow_unused=True)

    call()
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as trace:
        for _ in range(calls):
            call()
        if gpu:
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    return provider.label, trace.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)
