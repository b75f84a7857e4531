"""Re-measure which backend is faster in each case of runtime/choices.json, for `python -m nearfar.tune --choices`.

Outputs and gradients of each backend are first compared with the reference. Then the backends are timed in turns.
"""

import datetime
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

import nearfar as nf
from nearfar.runtime import choices
from nearfar.runtime.dispatch import KERNELS

ROUNDING = 2.0**-6  # allowed difference for 16-bit results, relative to the largest element
NEAR_TIES = 1e-4  # share of rows in which rounding may change a selection
ROUNDS = 50
FLUSHED = 2**30  # bytes: more than an L2 cache
FLUSHES = 4  # before each call, about 1.4 ms on an H100, during which the host enqueues the call, so its time does not count


# ---- the calls: each returns (inputs, function of the backend); a call has a backward if inputs require grad


def draw(case, device, *shape, heads=None, grad=True):
    """A tensor (B, H, *shape) of the case's dtype."""
    dtype = getattr(torch, case["dtype"])
    return torch.randn(case["B"], heads or case["H"], *shape, device=device, dtype=dtype).requires_grad_(grad)


def draw_qkv(case, device, grad=True):
    return [draw(case, device, case["N"], case["D"], grad=grad) for _ in range(3)]


def krause_attention(case, device):
    inputs, locality = draw_qkv(case, device), nf.SlidingWindow(*case["window"])
    sigma = case["D"] ** 0.5
    return inputs, lambda backend: nf.krause_attention(*inputs, sigma, locality, top_k=case["top_k"], backend=backend)


def krause_attention_step(case, device):
    """A step with a full cache."""
    heads, slots, width = case["Hkv"], case["slots"], case["D"]
    q = draw(case, device, 1, width, grad=False)
    k, v = (draw(case, device, 1, width, heads=heads, grad=False) for _ in range(2))
    cached = [draw(case, device, slots, width, heads=heads, grad=False) for _ in range(2)]
    cache = nf.KrauseCache(*cached, torch.full((case["B"],), slots, device=device, dtype=torch.int32))
    sigma = width**0.5
    return [q, k, v], lambda backend: nf.krause_attention_step(q, k, v, cache, sigma, top_k=case["top_k"], backend=backend)


def hadamard_attention(case, device):
    qs, ks = ([draw(case, device, case["N"], width) for width in case["factors"]] for _ in range(2))
    v = draw(case, device, case["N"], case["D"])
    return [*qs, *ks, v], lambda backend: nf.hadamard_attention(qs, ks, v, causal=case["causal"], backend=backend)


def affine_attention(case, device):
    rows = case["B"], case["H"], case["N"]
    inputs = [*draw_qkv(case, device), *(torch.randn(rows, device=device, requires_grad=True) for _ in range(2))]
    return inputs, lambda backend: nf.affine_attention(*inputs, causal=case["causal"], backend=backend)


def synchronization_attention(case, device):
    """Frequencies are close and phases agree, so that every pair locks."""
    spread = 0.3 * case["D"] ** -0.5
    omega, v = (draw(case, device, case["N"], case["D"], grad=False) for _ in range(2))
    inputs = [omega.mul_(spread).requires_grad_(), v.requires_grad_()]
    order = torch.ones(case["B"], case["H"], device=device)
    return inputs, lambda backend: nf.synchronization_attention(
        *inputs, 2.0, 0.2, order, causal=case["causal"], backend=backend
    )


def attention_statistics(case, device):
    """Forward only: there are no CUDA kernels for the gradients."""
    q, k, _ = draw_qkv(case, device, grad=False)

    def call(backend):
        found = nf.attention_statistics(q, k, causal=case["causal"], backend=backend)
        return found.lse, found.entropy, found.max_weight, found.key_mass

    return [q, k], call


def selection_geometry(case, device):
    """Means, because near ties may legitimately change single rows."""
    inputs = draw_qkv(case, device, grad=False)

    def call(backend):
        found = nf.selection_geometry(*inputs, case["top_n"], causal=case["causal"], backend=backend)
        return [part.mean() for part in found]

    return inputs, call


CALLS = {
    call.__name__: call
    for call in (
        krause_attention, krause_attention_step, hadamard_attention, affine_attention, synchronization_attention,
        attention_statistics, selection_geometry,
    )
}


# ---- the times


def milliseconds(calls):
    """Median GPU time of each call in milliseconds, by CUDA events, with a cold L2 cache. The calls take turns."""
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    events = [[] for _ in calls]
    for _ in range(3 + ROUNDS):
        for call, pairs in zip(calls, events, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(FLUSHES):
                flushed.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) for start, end in pairs[3:]) for pairs in events]


def agree(results, expected, rounding, near_ties=0.0):
    """Whether results agree: at most a share of near_ties of the rows may differ by more than rounding. NaN differs."""
    for a, b in zip(results, expected, strict=True):
        off = ~((a.float() - b.float()).abs() <= rounding * b.float().abs().max())
        rows = off.any(-1) if off.dim() == 4 else off
        if rows.sum() > near_ties * rows.numel():
            return False
    return True


def passes(operator, case, device, backend):
    """{direction: function} of the forward and, if there are gradients, the backward. Every backend gets equal tensors."""
    torch.manual_seed(0)
    inputs, call = CALLS[operator](case, device)
    differentiable = [x for x in inputs if x.requires_grad]
    forward = {"forward": lambda: call(backend)}
    if not differentiable:
        return forward
    o = call(backend)
    do = torch.randn_like(o)
    return forward | {"backward": lambda: torch.autograd.grad(o, differentiable, do, retain_graph=True)}


def results_of(run):
    """Output and gradients."""
    found = [function() for function in run.values()]
    return [x.detach() for part in found for x in ([part] if isinstance(part, torch.Tensor) else part)]


def measure(operator, case, device="cuda", time=milliseconds):
    """{backend: {direction: milliseconds}} of the kernels.

    Raises:
        ValueError: a kernel does not serve the case, or does not compute what the reference does.
    """
    expected = results_of(passes(operator, case, device, "reference"))
    near_ties = NEAR_TIES if case.get("top_k") else 0.0
    runs = {}
    for backend in KERNELS:
        runs[backend] = passes(operator, case, device, backend)
        if not agree(results_of(runs[backend]), expected, ROUNDING, near_ties):
            raise ValueError(f"backend={backend!r} differs from the reference by more than rounding")
    times = iter(time([function for run in runs.values() for function in run.values()]))
    return {backend: {direction: float(f"{next(times):.4g}") for direction in run} for backend, run in runs.items()}


# ---- the table


def renewed(rows, capability, run, measure):
    """The rows of an operator, measured again on a GPU of this major capability.

    A new row replaces the row with the same key and capability, or is added beside rows of other capabilities. If `measure`
    raises ValueError for a case, an existing row stays.
    """
    own = [row for row in rows if row["key"]["capability"] == capability]
    others = [row for row in rows if row not in own]
    found = {}
    for row in own + others:
        key = {**row["key"], "capability": capability}
        if str(key) in found:
            continue
        try:
            times = measure(row["case"])
        except ValueError as error:
            print(f"  {key}: not measured: {error}")
            found[str(key)] = row if row in own else None
        else:
            print(f"  {key}: {times}")
            found[str(key)] = {"key": key, "case": row["case"], **{backend: ms | {"run": run} for backend, ms in times.items()}}
    return others + list(filter(None, found.values()))


def text(table):
    """The table as JSON, with one line per row and per run that a row refers to."""
    rows = [row for rows in table["choices"].values() for row in rows]
    used = {row[backend]["run"] for row in rows for backend in KERNELS}
    runs = ",\n".join(f'    "{name}": {json.dumps(run)}' for name, run in table["runs"].items() if name in used)
    operators = ",\n".join(
        f'    "{operator}": [\n' + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"
        for operator, rows in table["choices"].items()
    )
    return f'{{\n  "runs": {{\n{runs}\n  }},\n  "choices": {{\n{operators}\n  }}\n}}\n'


def environment():
    """The description of a run of this module."""
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "method": f"operator calls by turns: medians of {ROUNDS}, cold L2 cache", "source": "python -m nearfar.tune --choices",
    }


def commit():
    """The commit of the sources; NEARFAR_COMMIT overrides it, for copies without .git."""
    if "NEARFAR_COMMIT" in os.environ:
        return os.environ["NEARFAR_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(operators: Sequence[str]) -> None:
    """Measure the choices of these operators, or of all if the list is empty. The table is written after each operator."""
    table, run = choices.table(), environment()
    capability, _ = torch.cuda.get_device_capability()
    name = f"{run['gpu']}, {run['date']}"
    table["runs"][name] = run
    for operator in operators or CALLS:
        print(operator)
        rows = table["choices"][operator]
        table["choices"][operator] = renewed(rows, capability, name, lambda case, op=operator: measure(op, case))
        choices.TABLE.write_text(text(table))
