"""What changed between two runs: `python -m bench compare OLD NEW`, ratios of the times of rows that both have."""

from typing import NamedTuple

from rich.table import Table

from bench import runs
from bench.text import DIRECTIONS, significant


class Change(NamedTuple):
    """old, new: ms, or a status where one of them has no time. ratio: new over old, None without two times."""

    title: str
    label: str
    ours: bool
    direction: str
    old: float | str
    new: float | str

    @property
    def ratio(self):
        return self.new / self.old if not isinstance(self.old, str) and not isinstance(self.new, str) else None

    @property
    def broke(self):
        """Had a time and has none."""
        return not isinstance(self.old, str) and isinstance(self.new, str)


def changes(old, new):
    """Changes of the rows that both have, those that broke first, then the slowest."""
    before, after = ({runs.identity(row): row for record in records for row in record["rows"]} for records in (old, new))
    found = []
    for key, row in after.items():
        if key in before:
            for direction in DIRECTIONS:
                times = [r[direction]["ms"] if r[direction] else r["status"] for r in (before[key], row)]
                if not all(isinstance(time, str) for time in times):
                    name = f"{row['case']['name']}: {row['title']}"
                    found.append(Change(name, row["label"], row["ours"], direction, *times))
    return sorted(found, key=lambda change: (not change.broke, -(change.ratio or 0)))


def failures(found, limit):
    """Changes of nearfar that became slower by more than `limit`, a share of the old time, or that broke."""
    return [c for c in found if c.ours and (c.broke or (c.ratio is not None and c.ratio > 1 + limit))]


def unlike(old, new):
    """What of the two environments differs and makes times hard to compare."""
    a, b = old[0]["environment"], new[0]["environment"]
    keys = ("device", "driver", "cuda", "torch", "triton")
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


def table(found):
    table = Table(title="times of NEW over those of OLD", title_justify="left")
    for heading in ("case", "provider", ""):
        table.add_column(heading, overflow="fold")
    for heading in ("old", "new", "ratio"):
        table.add_column(heading, justify="right")
    for change in found:
        times = [time if isinstance(time, str) else f"{significant(time, 3)} ms" for time in (change.old, change.new)]
        ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
        table.add_row(change.title, change.label, change.direction, *times, ratio, style="bold red" if change.broke else "")
    return table
