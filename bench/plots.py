"""Plot of a sweep: time against length on logarithmic axes."""

import re

from bench import crossover
from bench.text import token_count


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
