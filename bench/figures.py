"""Figures of the README and of the site: `python -m bench.figures` writes docs/assets/{length,keys}.svg.

length.svg shows recorded times; the numbers drawn are in the file's description, which a test compares with the records.
keys.svg shows the weights of one query on a toy sequence, computed by the operators: with v = 1 (the identity), o is P.
"""

import json
import sys

import matplotlib
import torch

import nearfar as nf
from bench import crossover
from bench.report import RESULTS, ROOT
from bench.text import token_count

ASSETS = ROOT / "docs/assets"
TOTAL = "forward + backward"
PANELS = (  # title, record, variant, labels of the lines
    ("near field: window of 128 keys", "h100/krause-length", {"", "top-k 96"},
     {"nearfar cuda": "Krause", "nearfar cuda, top-k 96": "Krause, top_k=96"}),
    ("far field: causal linear attention", "h100/linear-length", {"causal"}, {"nearfar cuda": "linear"}),
)
OTHERS = {"sdpa-flash": "FlashAttention-2 (SDPA)", "sdpa-cudnn": "cuDNN (SDPA)"}
COLORS = {"Krause": "C0", "Krause, top_k=96": "C1", "linear": "C0", OTHERS["sdpa-flash"]: "0.35", OTHERS["sdpa-cudnn"]: "0.6"}


def lines(record, variants, names):
    """{label: [(length, ms)]} of one panel."""
    found = {}
    for row in record["rows"]:
        ours = names.get(", ".join(filter(None, (row["label"], row["variant"] if "top-k" in row["variant"] else ""))))
        label = ours if row["ours"] else OTHERS.get(row["provider"])
        ms = crossover.total_ms(row, TOTAL)
        if label and ms is not None and row["variant"] in variants and row["case"]["name"].endswith("-length"):
            found.setdefault(label, []).append((row["case"]["length"], ms))
    return {label: sorted(points) for label, points in sorted(found.items(), key=lambda item: item[0] in OTHERS.values())}


def panels(results=RESULTS):
    """[(title, subtitle, lines)] from the records."""
    drawn = []
    for title, path, variants, names in PANELS:
        record = json.loads((results / f"{path}.json").read_text())
        case = record["rows"][0]["case"]
        size = f"batch {case['batch']}, {case['heads']} heads of {case['width']}, {case['dtype']}"
        drawn.append((title, f"{record['environment']['device']}, {size}", lines(record, variants, names)))
    return drawn


def description(drawn):
    """The numbers of the figure as text, which goes into the file."""
    return json.dumps({title: found for title, _, found in drawn})


def draw_length(pyplot, path):
    drawn = panels()
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(10, 3.9), sharey=True, layout="constrained")
    for axis, (title, setting, found) in zip(axes, drawn, strict=True):
        for label, points in found.items():
            ours = label not in OTHERS.values()
            style = {"marker": "o", "linewidth": 2.6} if ours else {"marker": "s", "linewidth": 1.4}
            axis.plot(*zip(*points, strict=True), label=label, color=COLORS[label], markersize=5, **style)
        axis.set(xscale="log", yscale="log", xlabel="length (tokens)")
        axis.set_title(f"{title}\n", fontsize=12, fontweight="bold")
        axis.text(0.5, 1.02, setting, transform=axis.transAxes, ha="center", fontsize=8.5, color="0.35")
        ticks = [length for length, _ in next(iter(found.values()))][::2]
        axis.set_xticks(ticks, [token_count(n) for n in ticks], minor=False)
        axis.minorticks_off()
        axis.grid(True, color="0.92")
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("forward + backward (ms)")
    axes[0].yaxis.set_major_formatter("{x:g}")
    save(figure, path, description(drawn))


def weights(tokens=32, width=8):
    """[(operator, which keys it keeps, weights of the last query)] for tokens around four centres."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(4, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    q = k = (centres[torch.randint(4, (tokens,), generator=generator)] + 0.3 * noise)[None, None]
    v = torch.eye(tokens, dtype=torch.float64)[None, None]
    order = nf.order_parameter(q, causal=True)
    window = nf.SlidingWindow(11)
    ones = torch.ones(1, 1, tokens, dtype=torch.float64)
    rows = (
        ("softmax_attention", "every earlier key", nf.softmax_attention(q, k, v, causal=True)),
        ("krause_attention", "a window of 12 keys, the nearer the heavier", nf.krause_attention(q, k, v, 1.0, window)),
        ("krause_attention, top_k=5", "the 5 nearest keys of the window", nf.krause_attention(q, k, v, 1.0, window, top_k=5)),
        ("affine_attention", "softmax times alpha, plus beta for every key",
         nf.affine_attention(q, k, v, 0.5 * ones, 0.5 / tokens * ones, causal=True)),
        ("linear_attention", "every earlier key, through a state of fixed size", nf.linear_attention(q, k, v, causal=True)),
        ("synchronization_attention", "the keys that lock with the query",
         nf.synchronization_attention(q, v, 3.0, 0.2, order, causal=True)),
    )
    return [(name, kept, o[0, 0, -1].tolist()) for name, kept, o in rows]


def draw_keys(pyplot, path):
    rows = weights()
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(10, 4.6), layout="constrained")
    for axis, (name, kept, row) in zip(axes, rows, strict=True):
        for index, weight in enumerate(row):
            last = index == len(row) - 1
            share = (weight / max(row)) ** 0.6
            color = (1 - 0.88 * share, 1 - 0.53 * share, 1 - 0.29 * share) if weight else "white"
            edge = "#d62728" if last else "0.75"
            axis.add_patch(pyplot.Rectangle((index, 0), 0.86, 1, facecolor=color, edgecolor=edge, linewidth=2 if last else 0.8))
        axis.set(xlim=(-0.2, len(row)), ylim=(-0.1, 1.1))
        axis.axis("off")
        axis.set_title(f"nf.{name}", loc="left", fontsize=10, fontweight="bold", pad=2)
        axis.set_title(kept, loc="right", fontsize=9, color="0.35", pad=2)
    save(figure, path, "Weights of the last of 32 tokens (outlined) on itself and on the tokens before it; darker is heavier.")


def save(figure, path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": text})


def main():
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "nearfar", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot

    for name, draw in (("length", draw_length), ("keys", draw_keys)):
        draw(pyplot, ASSETS / f"{name}.svg")
        print(f"wrote docs/assets/{name}.svg")


if __name__ == "__main__":
    sys.exit(main())
