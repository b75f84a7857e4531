"""Tables, JSON and plot of a run; `python -m bench.report` refreshes README.md and docs/ from bench/results and choices."""

import argparse
import json
import re
import sys
from pathlib import Path
from textwrap import shorten

from rich.table import Table

from bench import choices, crossover, first_calls

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MARKERS = re.compile(r"(<!-- (bench|choices|first_calls):(\w+) -->\n).*?(<!-- /\2:\3 -->)", re.DOTALL)
OVERVIEW, SPEEDUPS = "overview", "speedups"
HEADLINES = ("krause-window-topk", "linear-causal", "hadamard-causal", "affine-causal", "ssa-sparse")
SOFTMAX = ("sdpa", "fa4")  # how providers of softmax attention over all keys begin; "-epilogue" ones compute more
DIRECTIONS = ("forward", "backward")
STYLES = {"ok": "", "skipped": "dim", "unavailable": "yellow", "wrong": "bold red", "failed": "bold red"}


# ---- on the terminal


def rows_table(rows):
    table = Table(title="forward / backward; the backward without its forward", title_justify="left")
    table.add_column("case", overflow="fold", max_width=44)
    table.add_column("provider")
    for heading in ("fwd ms", "bwd ms", "floor ms", "% of floor", "GB/s", "TFLOP/s", "peak MiB"):
        table.add_column(heading, justify="right")
    table.add_column("error against the oracle", overflow="fold")
    previous = None
    for row in rows:
        name = f"{row['case']['name']}: {row['title']}"
        if name != previous:
            table.add_section()
        heading, previous = "" if name == previous else name, name
        table.add_row(heading, row["label"], *numbers(row), verdict(row), style=STYLES[row["status"]])
    return table


def numbers(row):
    peak = row["peak_bytes"]
    return (
        part(row, "forward", "ms", 4),
        part(row, "backward", "ms", 4),
        both(row, "floor_ms", 2),
        both(row, "percent_of_floor", 2),
        both(row, "gb_per_s", 3),
        both(row, "tflop_per_s", 3),
        "-" if peak is None else f"{peak / 2**20:.0f}",
    )


def part(row, direction, key, digits):
    return "-" if row[direction] is None else significant(row[direction][key], digits)


def both(row, key, digits):
    return " / ".join(part(row, direction, key, digits) for direction in DIRECTIONS if row[direction]) or "-"


def significant(value, digits):
    """Text of so many significant digits, never fewer than the whole part has."""
    if abs(value) < 1:
        return f"{value:#.{digits}g}"
    return f"{value:.{max(digits - len(str(int(abs(value)))), 0)}f}"


def verdict(row):
    """How the check went, and why there are no times where there are none."""
    words = [shorten(row["note"], 100)] if row["note"] else []
    if row["check"] and row["status"] != "wrong":
        name, error, allowed = row["check"]["worst"]
        words.append(f"{name} {error:.1e} <= {allowed:.1e}")
        if row["check"]["rows_left_out"]:
            words.append(f"{row['check']['rows_left_out']} of {row['check']['rows']} rows near-tied")
    return "; ".join(words)


def measures_table(measures):
    table = Table(title="beside the kernels", title_justify="left")
    for heading, justify in (("what", "left"), ("value", "right"), ("goal", "right"), ("", "left")):
        table.add_column(heading, justify=justify)
    for m in measures:
        table.add_row(m["what"], measured(m), goal(m), m["note"] or ("" if met(m) else "[red]missed[/]"))
    return table


def measured(m):
    digits = 0 if m["unit"] == "tokens" else 2
    return "-" if m["value"] is None else f"{m['value']:.{digits}f} {m['unit']}"


def goal(m):
    return "" if m["goal"] is None else f"<= {m['goal']:g} {m['unit']}"


def met(m):
    return m["goal"] is None or (m["value"] is not None and m["value"] <= m["goal"])


# ---- files


def write_json(folder, record):
    """One file for all cases of a name."""
    path = folder / f"{record['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def plot(path, rows, environment):
    """Time against length on logarithmic axes, every provider a line, with guides of slope 1 and 2 and crossings marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = series(rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    for axis, total in zip(axes, crossover.TOTALS, strict=True):
        for index, (label, line) in enumerate(lines.items()):
            style = {"marker": "o", "linewidth": 2.4} if line[0]["ours"] else {"marker": "s", "linewidth": 1.2}
            axis.plot(*points(line, total), label=label, color=f"C{index}", markersize=5, **style)
        guides(axis, *points(rows, total))
        axis.set(title=total, xlabel="length N (tokens)", xscale="log", yscale="log")
        axis.grid(True, which="major", color="0.9")
        crossings = [c for c in crossover.crossings(rows) if c.total == total and c.length]
        if crossings:
            axis.plot([c.length for c in crossings], [c.ms for c in crossings], "kx", zorder=3, label="crossover")
        for index, c in enumerate(sorted(crossings, key=lambda c: c.length)):  # neighbours on either side of their marks
            offset, side = ((3, -9), "left") if index % 2 else ((-3, 5), "right")
            axis.annotate(f"{c.length:.0f}", (c.length, c.ms), offset, textcoords="offset points", fontsize=7, ha=side)
    axes[0].set_ylabel("time (ms)")
    ticks = sorted({row["case"]["length"] for row in rows})
    ticks = ticks[:: -(-len(ticks) // 8)] if len(ticks) > 8 else ticks
    axes[0].set_xticks(ticks, [token_count(n) for n in ticks], minor=False)
    axes[0].yaxis.set_major_formatter("{x:g}")
    for axis in axes:
        axis.minorticks_off()
    columns = 3 if max(map(len, lines)) < 36 else 2
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False)
    operator = rows[0]["case"]["name"].partition("-")[0].capitalize()
    figure.suptitle(", ".join(filter(None, (f"{operator} attention", *common_text(rows), environment["device"]))))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def points(rows, total):
    """Lengths and times to draw."""
    found = [(row["case"]["length"], ms) for row in rows if (ms := crossover.total_ms(row, total)) is not None]
    return [length for length, _ in found], [ms for _, ms in found]


def series(rows):
    """{label: rows} of the lines to draw; what all lines have in common stays out of the labels."""
    lines = {}
    for row in sorted(rows, key=lambda r: r["case"]["length"]):
        differing = [text(row) for text in (variant_text, size_text) if len({text(r) for r in rows}) > 1]
        lines.setdefault(", ".join(filter(None, (row["label"], *differing))), []).append(row)
    return dict(sorted(lines.items(), key=lambda item: not item[1][0]["ours"]))


def variant_text(row):
    return row["variant"]


def size_text(row):
    """The title without what the variant says and what may change along the horizontal axis: batch and length."""
    return re.sub(r"^B\d+ | N\d+", "", row["title"]).removesuffix(f", {row['variant']}")


def batch_text(row):
    return f"B{row['case']['batch']}"


def common_text(rows):
    """What all rows have in common, for the headline."""
    texts = ({text(row) for row in rows} for text in (batch_text, size_text, variant_text))
    return [distinct.pop() for distinct in texts if len(distinct) == 1]


def guides(axis, lengths, times):
    """Dashed lines of slope 1 and 2, from the lower left corner of what is drawn."""
    if len(set(lengths)) < 2:
        return
    first, last, low, high = min(lengths), max(lengths), min(times), max(times)
    for slope, text in ((1, "∝ N"), (2, "∝ N²")):
        end = min(last, first * (high / low) ** (1 / slope))
        top = low * (end / first) ** slope
        axis.plot((first, end), (low, top), color="0.6", linestyle="--", linewidth=1, zorder=1)
        axis.annotate(text, (end, top), color="0.4", ha="right", va="bottom")


def token_count(n):
    return f"{n >> 20}M" if n >= 2**20 else f"{n >> 10}k" if n >= 2**10 else str(n)


# ---- README.md and docs/


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
    nothing = "Nothing is recorded yet; `python -m bench --record` on a GPU does it.\n"
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
        cells = (part(row, "forward", "ms", 3), part(row, "backward", "ms", 3), both(row, "floor_ms", 2),
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
    """Sweeps belong to the plot; a provider without a time has nothing to say here."""
    return row["forward"] and not row["case"]["name"].endswith("-length")


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
