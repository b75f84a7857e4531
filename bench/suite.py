"""Cases x providers -> rows: check first, then time. Who fails leaves the reason in its row, and the run goes on."""

import gc

import torch

from bench import check
from bench.runs import identity
from bench.timing import median_time, peak_bytes

# A competitor's sweep ends at a length that takes longer: the next one takes four times that.
PATIENCE_MS = {"cuda": 100, "cpu": 600}
SCALING_GOAL, MEMORY_GOAL = 2.1, 1.5


def rows(cases, device, ceilings, advance, done=()):
    """Each row of all cases as soon as it is there; advance(text) is called before. done: {runs.identity: row} of those
    that are there already."""
    ended = {}
    for case in cases:
        problems = {}
        for name in case.providers:
            advance(f"{case.name} N={case.length} {name}")
            sweep = (case.name, case.width, case.variant, name)
            row = new_row(case, name)
            if (key := identity(row)) in done:
                row = done[key]
            elif sweep in ended:
                row |= {"status": "skipped", "note": ended[sweep]}
            else:
                row = measure(case, name, device, problems, ceilings)
            yield row
            if case.name.endswith("-length") and not row["ours"]:
                if reason := end_of_sweep(row, PATIENCE_MS[device.type]):
                    ended.setdefault(sweep, reason)


def new_row(case, name):
    return {"case": case.describe(), "title": case.title, "variant": case.variant, "provider": name, "label": name,
            "ours": case.is_ours(name), "status": "ok", "note": None, "check": None, "peak_bytes": None,
            "forward": None, "backward": None}


def measure(case, name, device, problems, ceilings):
    """The row of one provider. problems caches, by formula, its inputs and what the oracle says."""
    row = new_row(case, name)
    try:
        formula = case.formula(name)
        if formula not in problems:
            inputs = case.inputs(device, formula)
            problems[formula] = inputs, check.expect(formula, case, inputs)
        inputs, expected = problems[formula]
        provider = case.provider(name, inputs)
        row["label"] = provider.label
        if provider.token_major:
            inputs = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(case.backward) for t in inputs]

        first = check.outputs_of(provider.run, inputs, expected, row["ours"])
        if not approve(row, check.check(expected, first, row["ours"])):
            return row
        # The graph is always built, so that forward times of all providers are those of training.
        times = {"forward": median_time(lambda: provider.run(*inputs), device)}
        if case.backward:
            o = provider.run(*inputs)
            do = torch.randn_like(o)

            def backward():
                return torch.autograd.grad(o, inputs, do, retain_graph=True, allow_unused=True)

            times["backward"] = median_time(backward, device)
            del o
        last = check.outputs_of(provider.run, inputs, expected, row["ours"])
        if not approve(row, check.check(expected, last, row["ours"])):
            return row
        if row["ours"] and (names := check.changed(first, last)):
            return row | {"status": "wrong", "note": f"{', '.join(names)} of a later call differ from the first one's"}
        del first, last
        for part, time, work in zip(times, times.values(), case.work(formula), strict=False):
            row[part] = figures(time, work, ceilings)
        if case.backward:
            row["peak_bytes"] = peak_bytes(
                lambda: torch.autograd.grad(provider.run(*inputs), inputs, do, allow_unused=True), (*inputs, do)
            )
        else:
            row["peak_bytes"] = peak_bytes(lambda: provider.run(*inputs), inputs)
    except Exception as failure:
        row["status"] = "failed" if row["ours"] else "missing" if isinstance(failure, ImportError) else "unavailable"
        row["note"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    finally:
        gc.collect()  # what a failed call left in its traceback
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return row


def approve(row, result):
    """Note a Check in the row; False when an output is beyond its limit."""
    row["check"] = result._asdict() | {"worst": result.worst}
    if not result.passed:
        name, error, _ = result.worst
        note = f"{name} is off by {error:.1e} of its norm, {result.excess(name):.1f} times its limit"
        if result.blind:
            note = f"the check shows nothing: the plain formula of {', '.join(result.blind)} is off by more than the cap"
        row |= {"status": "wrong", "note": note}
    return result.passed


def figures(time, work, ceilings):
    """A time with the rates that it achieved."""
    seconds = 1e-3 * time.ms
    floor = work.floor_ms(ceilings)
    return {**time._asdict(), "floor_ms": floor, "percent_of_floor": 100 * floor / time.ms,
            "gb_per_s": 1e-9 * work.bytes / seconds, "tflop_per_s": 1e-12 * work.flops / seconds,
            **work._asdict()}


def end_of_sweep(row, patience_ms):
    """Why the provider of this row is not worth trying on the next length, or None."""
    length = row["case"]["length"]
    if row["status"] != "ok":
        return row["note"] if row["status"] == "missing" else f"{row['status']} at N={length}"
    total = sum(row[part]["ms"] for part in ("forward", "backward") if row[part])
    return f"N={length} took {total:.0f} ms" if total > patience_ms else None


def scaling(rows):
    """Measures of each variant's last two lengths: time at 2N over time at N; peak memory over inputs + outputs + gradients."""
    lines, measures = {}, []
    for row in sorted((r for r in rows if r["ours"] and r["backward"]), key=lambda r: r["case"]["length"]):
        lines.setdefault(row["variant"], []).append(row)

    def measure(what, variant, value, goal):
        text = ", ".join(filter(None, (what, variant)))
        measures.append({"what": text, "value": value, "unit": "x", "goal": goal, "note": None})

    for variant, line in lines.items():
        whole = line[-1]
        for half in line[-2:-1]:
            what = f"time at N={whole['case']['length']} over N={half['case']['length']}"
            measure(what, variant, total_ms(whole) / total_ms(half), SCALING_GOAL)
        if whole["peak_bytes"]:
            ratio = whole["peak_bytes"] / whole["backward"]["bytes"]
            measure("peak memory over inputs + outputs + gradients", variant, ratio, MEMORY_GOAL)
    return measures


def relative(rows):
    """Measures of the cases that have a goal_over: the forward of ours over that of a baseline."""
    measures = []
    for row in rows:
        if not (row["ours"] and row["case"]["goal_over"]):
            continue
        provider, goal = row["case"]["goal_over"]
        others = [r for r in rows if r["provider"] == provider and r["title"] == row["title"]]
        times = [r["forward"]["ms"] for r in (row, *others) if r["forward"]]
        value, note = (times[0] / times[1], None) if len(times) == 2 else (None, "not measured")
        what = f"forward of {row['label']} over {provider}, {row['variant']}"
        measures.append({"what": what, "value": value, "unit": "x", "goal": goal, "note": note})
    return measures


def total_ms(row):
    return row["forward"]["ms"] + row["backward"]["ms"]


def sound(rows):
    """False when a provider is wrong or one of ours failed."""
    return not any(row["status"] in ("wrong", "failed") for row in rows)
