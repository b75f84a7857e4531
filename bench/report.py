"""Tables of README.md and docs/ from bench/results and choices: `python -m bench.report` refreshes them, `--check` compares."""

import argparse
import json
import re
import sys
from pathlib import Path

from bench import choices, first_calls
from bench.text import DIRECTIONS, both, goal, measured, part, significant

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MARKERS = re.compile(r"(<!-- (bench|choices|first_calls):(\w+) -->\n).*?(<!-- /\2:\3 -->)", re.DOTALL)
OVERVIEW, SPEEDUPS = "overview", "speedups"
HEADLINES = ("krause-window-topk", "linear-causal", "hadamard-causal", "affine-causal", "ssa-sparse")
SOFTMAX = ("sdpa", "fa4")  # how providers of softmax attention over all keys begin; "-epilogue" ones compute more


def markdown(room, results):
    """The tables of a room from all recorded files, one for each run, as only figures of one run compare; or a summary."""
    files = [(path.parent.name, json.loads(path.read_text())) for path in sorted(results.glob("*/*.json"))]
    if room == SPEEDUPS:
        return speedups([record for _, record in files])
    sections = {}
    for gpu, record in files:
        if room == OVERVIEW:
            sections.setdefault(gpu, []).append(record)
        elif record["room"] == room:
            sections.setdefault((gpu, record["environment"]["date"]), []).append(record)
    write = overview if room == OVERVIEW else section
    nothing = "Nothing is recorded yet; `python -m bench record` does it.\n"
    return "\n".join(write(records) for records in sections.values()) or nothing


def speedups(records):
    """A line for each headline: its newest record, beside the fastest other code for it and the fastest softmax attention."""
    lines = [
        "| case | GPU | nearfar, ms | fastest alternative | softmax attention |",
        "|---|---|---:|---|---|",
    ]
    for name in HEADLINES:
        found = [record for record in records if record["name"] == name]
        if not found:
            continue
        record = max(found, key=lambda record: record["environment"]["date"])
        ours = next(row for row in record["rows"] if row["ours"] and row["forward"])
        others = [r for r in record["rows"] if r["title"] == ours["title"] and not r["ours"] and r["forward"]]
        softmax = [r for r in others if r["provider"].startswith(SOFTMAX) and not r["provider"].endswith("-epilogue")]
        alternatives = [r for r in others if r not in softmax]
        cells = (f"{name}: {ours['title']}", record["environment"]["device"].split()[1], significant(step_ms(ours), 3),
                 beside(ours, alternatives), beside(ours, softmax))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def step_ms(row):
    return sum(row[direction]["ms"] for direction in DIRECTIONS if row[direction])


def beside(ours, others):
    """How many times as long the fastest other takes, and which it is."""
    if not others:
        return "-"
    best = min(others, key=step_ms)
    return f"**{significant(step_ms(best) / step_ms(ours), 2)}x** {best['label']}"


def overview(records):
    """A line for each case of a GPU that has a goal: ours, and the fastest other provider of the same run."""
    lines = [
        f"{records[0]['environment']['device']}, forward / backward in ms:\n",
        "| case | shape | nearfar | goal | fastest other | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for record in records:
        for row in record["rows"]:
            case = row["case"]
            if not (row["ours"] and row["forward"] and (case["goal_ms"] or case.get("goal_over"))):
                continue
            others = [r for r in record["rows"] if r["title"] == row["title"] and not r["ours"] and r["forward"]]
            best = min(others, key=step_ms, default=None)
            other = (both(best, "ms", 3), best["label"]) if best else ("", "")
            cells = (case["name"], row["title"], both(row, "ms", 3), goal_times(case), *other)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def goal_times(case):
    if case["goal_ms"]:
        return " / ".join(f"{goal:.2f}" for goal in case["goal_ms"])
    provider, ratio = case["goal_over"]
    return f"{ratio:g} x {provider}"


def section(records):
    env, ceilings = records[0]["environment"], records[0]["ceilings"]
    rows = [row for record in records for row in record["rows"] if tabled(row)]
    head = (
        f"{env['device']}, torch {env['torch']}, Triton {env['triton']}, CUDA {env['cuda']}, nearfar {env['nearfar']}, "
        f"{env['date'][:10]}. Medians in ms; floors follow from the copy and matmul rates measured in the same run, "
        f"{ceilings['bytes_per_s'] / 1e12:.2f} TB/s and {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s.\n"
    )
    heading = "| case | shape | provider | forward | backward | floor | % of floor | goal |"
    lines = [heading, "|---|---|---|---:|---:|---:|---:|---:|"] if rows else []
    previous = None
    for row in rows:
        case = row["case"]
        names = (case["name"], row["title"]) if (case["name"], row["title"]) != previous else ("", "")
        previous = case["name"], row["title"]
        goal = goal_times(case) if case["goal_ms"] and row["ours"] else ""
        forward = "missing" if missing(row) else part(row, "forward", "ms", 3)
        cells = (forward, part(row, "backward", "ms", 3), both(row, "floor_ms", 2),
                 both(row, "percent_of_floor", 2))
        label = f"**{row['label']}**" if row["ours"] else row["label"]
        lines.append("| " + " | ".join((*names, label, *cells, goal)) + " |")
    # Cases of one run repeat the baseline's host time.
    measures = {m["what"]: m for record in records for m in record["measures"]}.values()
    if measures:
        lines += ["", "| beside the kernels | measured | goal |", "|---|---:|---:|"]
        lines += [f"| {m['what']} | {measured(m) if m['value'] else m['note']} | {goal_cell(m)} |" for m in measures]
    return "\n".join([head, *lines, ""])


def goal_cell(m):
    return goal(m).replace("<=", "≤")


def tabled(row):
    """Sweeps belong to the plot; a provider without a time has nothing to say here, unless it was not installed."""
    return (row["forward"] or missing(row)) and not row["case"]["name"].endswith("-length")


def missing(row):
    """Not installed; records without a schema call that unavailable, as they do what does not serve a case."""
    unnamed = row["status"] == "unavailable" and row["note"].startswith("ModuleNotFoundError")
    return row["status"] == "missing" or unnamed


def refreshed(text, results):
    write = {
        "bench": lambda room: markdown(room, results),
        "choices": choices.markdown,
        "first_calls": lambda _: first_calls.markdown(json.loads((results / first_calls.RECORD.name).read_text())),
    }
    return MARKERS.sub(lambda m: m[1] + write[m[2]](m[3]) + m[4], text)


def main(arguments=None, root=ROOT, results=RESULTS):
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    args = parser.parse_args(arguments)
    stale = 0
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        text = path.read_text() if path.exists() else ""
        new = refreshed(text, results)
        if new != text:
            stale += 1
            name = path.relative_to(root)
            if args.check:
                print(f"{name} is out of date; run python -m bench.report")
            else:
                path.write_text(new)
                print(f"refreshed {name}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
