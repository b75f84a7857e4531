"""The HTML report of a run: `python -m bench report RUN -o report.html`, one file that loads nothing from a network.

Ratios are times over a competitor's time of the same record, forward + backward where both have one: below 1 nearfar is faster.
"Like for like" is who computes the same formula as nearfar's row. Medians carry no interval: a run keeps no spread.
"""

from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from bench import cases, page_figures, text
from bench.terminal import rate

TEMPLATE = Path(__file__).with_name("page.html.j2")
CHECKS = ("an earlier one, of the last rows of the last key head", "rows of four kinds, see docs/benchmarks.md")
CLOSE = 0.02  # nearer to 1 than that is neither won nor lost


def render(records):
    """The page of records (bench/runs.py) as text. Raises ValueError where they have no row."""
    records = sorted(records, key=lambda record: record["name"].endswith(("-length", "-million")))  # single problems first
    rows = [table_row(record, row) for record in records for row in record["rows"]]
    if not rows:
        raise ValueError("there are no rows to report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["short"] = lambda ratio: text.significant(ratio, 2)
    template = environment.from_string(TEMPLATE.read_text())
    ours = [row for row in rows if row["ours"] and row["timed"]]
    kinds = (("sdpa", "SDPA"), ("alike", "the best like for like"))
    measures = [m | {"measured": text.measured(m), "goal_text": text.goal(m), "met": text.met(m)}
                for record in records for m in record["measures"]]
    return template.render(
        title=title(records), rows=rows, plotly=get_plotlyjs(), figures=page_figures.figures(records), measures=measures,
        runs=runs_of(records), summary=[summary(ours, *kind) for kind in kinds],
        untimed=[row for row in rows if not row["timed"]], operators=list(dict.fromkeys(row["operator"] for row in rows)),
    )


def title(records):
    devices = dict.fromkeys(record["environment"]["device"] for record in records)
    return f"nearfar on {', '.join(devices)}"


def table_row(record, row):
    """Cells of a row, and the ratios of one of nearfar's."""
    rivals = [r for r in record["rows"] if r["title"] == row["title"] and not r["ours"] and r["forward"]]
    cells = {key: row[key] for key in ("title", "label", "ours", "status", "note")}
    cells |= {"operator": record["room"], "name": row["case"]["name"], "source": row["case"].get("source") or "design"}
    cells |= {"timed": bool(row["forward"]), "times": text.both(row, "ms", 3), "floor": text.both(row, "percent_of_floor", 2)}
    cells |= {"bandwidth": text.both(row, "gb_per_s", 3), "flops": text.both(row, "tflop_per_s", 3)}
    cells["memory"] = text.significant(row["peak_bytes"] / 2**20, 3) if row["peak_bytes"] else ""
    worst = row["check"]["worst"] if row["check"] else None
    cells["accuracy"] = f"{worst[0]} {worst[1]:.1e} of {worst[2]:.1e}" if worst else ""
    kinds = {"sdpa": lambda r: r["provider"].startswith("sdpa") and not r["provider"].endswith("-epilogue"),
             "alike": lambda r: alike(record["room"], r)}
    for kind, chosen in kinds.items():
        cells[kind] = best_ratio(row, [r for r in rivals if chosen(r)]) if row["ours"] and row["forward"] else None
    return cells


def alike(room, row):
    """Whether a competitor computes the formula that nearfar does."""
    case = cases.load(room, row["case"])
    return case.formula(row["provider"]) == case.formula("nearfar")


def best_ratio(row, rivals):
    """(time over that of the fastest rival, its label), None without one."""
    directions = [d for d in text.DIRECTIONS if row[d]]
    rivals = [r for r in rivals if all(r[d] for d in directions)]
    totals = {r["label"]: sum(r[d]["ms"] for d in directions) for r in rivals}
    if not totals:
        return None
    label = min(totals, key=totals.get)
    return sum(row[d]["ms"] for d in directions) / totals[label], label


def summary(rows, key, name):
    """How often nearfar won and lost against a kind of competitor, losses first, the worst first."""
    compared = sorted((row for row in rows if row[key]), key=lambda row: -row[key][0])
    lost = [row for row in compared if row[key][0] > 1 + CLOSE]
    won = [row for row in compared if row[key][0] < 1 - CLOSE]
    return {"key": key, "name": name, "compared": compared, "lost": lost, "won": won,
            "even": len(compared) - len(lost) - len(won), "alone": len(rows) - len(compared)}


def runs_of(records):
    """What each run was measured with: environments that differ in more than their date are apart."""
    found = {}
    for record in records:
        env, ceilings = record["environment"], record["ceilings"]
        packages = env.get("packages") or {}
        facts = {
            "device": env["device"], "driver": env["driver"], "CUDA": env["cuda"], "torch": env["torch"],
            "Triton": env["triton"], "nearfar": f"{env['nearfar']}, commit {env['commit'] or 'unknown'}",
            "copy": rate(ceilings["bytes_per_s"], "B/s"),
            "matmul": f"{rate(ceilings['flops_per_s'], 'FLOP/s')} ({ceilings['matmul']})",
            "check": CHECKS[bool(record.get("schema"))],
            "packages": ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items()) or "not recorded",
        }
        found.setdefault((env["date"], *facts.values()), (env["date"], facts, []))[2].append(record["name"])
    return list(found.values())
