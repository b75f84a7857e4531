"""From which length on nearfar is faster than softmax attention over all keys: the crossings of a sweep."""

import math
from itertools import product
from typing import NamedTuple

TOTALS = {"forward": ("forward",), "forward + backward": ("forward", "backward")}


class Crossing(NamedTuple):
    """The last crossing of two lines of a sweep. length and ms are None if they do not cross; note gives the reason."""

    what: str
    total: str
    length: float | None
    ms: float | None
    note: str | None


def total_ms(row, total):
    """Milliseconds of a row, None where a part was not measured."""
    parts = [row[part] for part in TOTALS[total]]
    return sum(part["ms"] for part in parts) if all(parts) else None


def crossings(rows):
    """Crossings of each of nearfar's lines with each of scaled_dot_product_attention's that is as causal and as wide."""
    ours, theirs = lines(rows, lambda name: name == "nearfar"), lines(rows, lambda name: name.startswith("sdpa"))
    return [
        crossing(", ".join(filter(None, (label, width, variant, f"over {rival}", total))), total, line, other)
        for ((label, width, variant), line), ((rival, *_), other), total in product(ours.items(), theirs.items(), TOTALS)
        if all(line[0]["case"].get(alike) == other[0]["case"].get(alike) for alike in ("causal", "width"))
    ]


def lines(rows, wanted):
    """{(label, width, variant): rows by length} of the providers that are wanted; one width for all needs no name."""
    found, several = {}, len({row["case"].get("width") for row in rows}) > 1
    for row in sorted(rows, key=lambda row: row["case"]["length"]):
        if wanted(row["provider"]) and row["forward"]:
            width = f"D{row['case']['width']}" if several else None
            found.setdefault((row["label"], width, row["variant"]), []).append(row)
    return found


def crossing(what, total, line, other):
    """The Crossing by straight lines between the measured points on logarithmic axes."""
    ours, theirs = (
        {row["case"]["length"]: ms for row in rows if (ms := total_ms(row, total)) is not None} for rows in (line, other)
    )
    lengths = [length for length in ours if length in theirs]
    gains = [math.log(theirs[length] / ours[length]) for length in lengths]
    slower = [index for index, gain in enumerate(gains) if gain <= 0]
    if not lengths:
        return Crossing(what, total, None, None, "no length in common")
    if not slower:
        return Crossing(what, total, None, None, f"faster at every length from {lengths[0]}")
    last = slower[-1]
    if last == len(lengths) - 1:
        return Crossing(what, total, None, None, f"slower at {lengths[-1]}, the longest measured")
    share = -gains[last] / (gains[last + 1] - gains[last])

    def between(low, high):
        return math.exp(math.log(low) + share * math.log(high / low))

    low, high = lengths[last], lengths[last + 1]
    return Crossing(what, total, between(low, high), between(ours[low], ours[high]), None)


def measures(rows):
    return [
        {"what": f"faster from this length: {c.what}", "value": c.length, "unit": "tokens", "goal": None, "note": c.note}
        for c in crossings(rows)
    ]
