"""Tables of a run on a terminal."""

from itertools import groupby
from textwrap import shorten

from rich.table import Table

from bench.text import both, goal, measured, met, part, significant

STYLES = {"ok": "", "skipped": "dim", "missing": "yellow", "unavailable": "yellow", "wrong": "bold red", "failed": "bold red"}


def heading(env, ceilings):
    """Where a run is measured, what that machine can do, and which competitors are not installed."""
    missing = [name for name, version in env["packages"].items() if version is None]
    lines = [
        f"{env['device']}, torch {env['torch']}, nearfar {env['nearfar']} ({env['commit'] or 'no commit'})",
        f"ceilings: copy {rate(ceilings['bytes_per_s'], 'B/s')}, matmul {rate(ceilings['flops_per_s'], 'FLOP/s')}",
    ]
    return "\n".join([*lines, *([f"not installed: {', '.join(missing)}"] if missing else [])])


def rate(value, unit):
    """In the prefix that suits its size."""
    factor, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / factor:.3g} {prefix}{unit}"


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cases_table(chosen):
    """Names, sources and sizes of {room: cases}; a sweep has one line, with the first of its sizes."""
    table = Table()
    for column in ("case", "operator", "source", "tags", "size", "providers"):
        table.add_column(column, overflow="fold")
    for room, cases in chosen.items():
        for _, group in groupby(cases, lambda case: (case.name, case.source, case.providers)):
            first, *others = group
            size = first.title + (f", and {len(others)} more" if others else "")
            table.add_row(first.name, room, first.source, ", ".join(first.tags), size, ", ".join(first.providers))
        table.add_section()
    return table


def rows_table(rows, gpu):
    table = Table(title="forward / backward; the backward without its forward", title_justify="left")
    table.add_column("case", overflow="fold", max_width=44)
    table.add_column("provider")
    for heading in ("fwd ms", "bwd ms", "floor ms", "% of floor", "GB/s", f"{'T' if gpu else 'G'}FLOP/s", "peak MiB"):
        table.add_column(heading, justify="right")
    table.add_column("error against the oracle", overflow="fold")
    previous = None
    for row in rows:
        name = f"{row['case']['name']}: {row['title']}"
        if name != previous:
            table.add_section()
        heading, previous = "" if name == previous else name, name
        table.add_row(heading, row["label"], *numbers(row, gpu), verdict(row), style=STYLES[row["status"]])
    return table


def numbers(row, gpu):
    """Cells of a row; a CPU, whose TFLOP/s would be zeros, has GFLOP/s."""
    peak = row["peak_bytes"]
    return (
        part(row, "forward", "ms", 4),
        part(row, "backward", "ms", 4),
        both(row, "floor_ms", 2),
        both(row, "percent_of_floor", 2),
        both(row, "gb_per_s", 3),
        both(row, "tflop_per_s", 3, 1 if gpu else 1000),
        "-" if peak is None else significant(peak / 2**20, 3),
    )


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
