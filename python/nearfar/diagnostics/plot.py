"""Plots of a `Watch` and of a `Monitor`. Needs matplotlib."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from nearfar.diagnostics.regimes import REGIMES, UNDEFINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nearfar.diagnostics.monitor import Monitor
    from nearfar.diagnostics.watch import Watch

COLOURS = {"retriever": "#0072b2", "mixer": "#c9c9c9", "reset": "#d55e00"}  # distinguishable for colour-blind readers
NAMES = ("precision", "recall", "F")
LABELS = {
    "entropy": "entropy, nats",
    "first_mass": "weight of the first key",
    "sink_mass": "weight of the sink",
    "max_weight": "largest weight",
    "mean_logit": "mean score",
    "weight_sum": "sum of weights",
}


def plot(watched: "Watch", path: str | Path | None = None) -> "Figure":
    """Draw entropy by layer, sink mass, precision, recall and F against top_n, and a map of the regimes.

    The curves leave out top_n = 1, for which precision, recall and F are 1 by definition.

    Args:
        watched: a `Watch` of at least one layer.
        path: file to save the figure to; its suffix sets the format. None saves nothing.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: the watch recorded nothing.
    """
    from matplotlib.figure import Figure

    if not watched.layers:
        raise ValueError("watched has seen no attention: run the model inside the watch")
    means, regimes = list(watched.layers.values()), watched.regimes().values()
    figure = Figure(figsize=(12, 4 + max(4, 0.28 * len(means))), layout="constrained")
    grid = figure.subplots(2, 2, height_ratios=(4, max(4, 0.28 * len(means))))
    draw_by_layer(grid[0, 0], [m["entropy"] for m in means])
    highest = max(m["entropy"].nan_to_num().max().item() for m in means) + 0.1
    grid[0, 0].set(title="entropy of the weights", ylabel="nats, mean over queries", ylim=(-0.04 * highest, 1.04 * highest))
    support = grid[0, 0].secondary_yaxis("right", functions=(lambda x: x, lambda x: x))
    support.set_ylabel("effective support, keys")
    ticks = [2**power for power in range(int(highest / math.log(2)) + 1)]
    support.set_yticks([math.log(keys) for keys in ticks], [f"{keys:,}" for keys in ticks])
    draw_geometry(grid[0, 1], watched, means)
    draw_sinks(figure, grid[1, 0], matrix([m["sink_mass"] for m in means]))
    draw_regimes(grid[1, 1], matrix(regimes), watched.top_n)
    figure.suptitle(title_of(watched))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def plot_history(
    monitor: "Monitor",
    path: str | Path | None = None,
    quantities: Sequence[str] = ("entropy", "first_mass", "max_weight", "mean_logit"),
) -> "Figure":
    """Draw quantities by depth, as first and last watched, and over the steps of a training, a line for each layer.

    Args:
        monitor: a `Monitor` that has watched at least one step.
        path: file to save the figure to; its suffix sets the format. None saves nothing.
        quantities: names of numbers in `Watch.layers` with one number a head.

    Returns:
        The matplotlib Figure: a row for each quantity, over the steps on the left, by depth on the right. Lines are means over
        the heads of a layer, areas reach from the least to the largest head.

    Raises:
        ValueError: the monitor watched no attention, or a quantity is unknown.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    steps = {step: watched.layers for step, watched in monitor.steps.items() if watched.layers}
    if not steps:
        raise ValueError("monitor has seen no attention: run the model inside monitor.step(number)")
    layers = list(dict.fromkeys(layer for means in steps.values() for layer in means))
    known = [name for name, numbers in steps[min(steps)][layers[0]].items() if numbers.dim() == 1]
    if unknown := [name for name in quantities if name not in known]:
        raise ValueError(f"quantities must be among {', '.join(known)}, got {unknown[0]!r}")
    figure = Figure(figsize=(12, 3.2 * len(quantities)), layout="constrained")
    colours = [colormaps["viridis"](0.85 * index / max(len(layers) - 1, 1)) for index in range(len(layers))]
    for name, (over_time, by_depth) in zip(quantities, figure.subplots(len(quantities), 2, squeeze=False), strict=True):
        for index, layer in enumerate(layers):
            at = [step for step in steps if layer in steps[step]]
            draw_heads(over_time, at, [steps[step][layer][name] for step in at], colours[index], layer)
        for step, colour in {min(steps): "0.6", max(steps): "#d55e00"}.items():
            at = [index for index, layer in enumerate(layers) if layer in steps[step]]
            draw_heads(by_depth, at, [steps[step][layers[index]][name] for index in at], colour, f"step {step:,}")
        over_time.set(xlabel="step", ylabel=LABELS.get(name, name))
        by_depth.set(xlabel="layer", xticks=thinned(len(layers)))
        by_depth.legend(frameon=False)
        for axes in (over_time, by_depth):
            axes.grid(True, axis="y", color="0.9")
    if len(layers) <= 16:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=8, ncols=8)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def draw_heads(axes: "Axes", at: Sequence[int], heads: Sequence[torch.Tensor], colour: object, label: str) -> None:
    """A line through the means over heads, and the area between the least and the largest head."""
    axes.plot(at, [x.nanmean().item() for x in heads], "o-", color=colour, markersize=3, label=label)
    lowest, highest = ([getattr(x, end)().item() for x in heads] for end in ("min", "max"))
    axes.fill_between(at, lowest, highest, color=colour, alpha=0.12, linewidth=0)


def title_of(watched: "Watch") -> str:
    """The model, how many layers and heads were seen, and by how many queries each."""
    heads = sum(len(means["entropy"]) for means in watched.layers.values())
    queries = max(watched._weights.values())
    return f"{watched.model or 'Attention'}: {len(watched.layers)} layers, {heads} heads, {queries:,} queries a head"


def matrix(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """(layers, heads), NaN where a layer has fewer heads than another."""
    return pad_sequence([heads.double() for heads in rows], batch_first=True, padding_value=math.nan)


def draw_by_layer(axes: "Axes", values: Sequence[torch.Tensor]) -> None:
    """One dot per head, and a line through the means of the layers."""
    for layer, heads in enumerate(values):
        axes.plot([layer] * len(heads), heads.tolist(), "o", color="#0072b2", alpha=0.5, markersize=5,
                  label=None if layer else "head")
    axes.plot(range(len(values)), [heads.nanmean().item() for heads in values], "k-", linewidth=1.5, label="mean of the layer")
    axes.set(xlabel="layer", xticks=thinned(len(values)))
    axes.grid(True, axis="y", color="0.9")
    axes.legend(frameon=False)


def draw_geometry(axes: "Axes", watched: "Watch", means: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Medians and quartiles over all heads, and the random control if there is one."""
    shown = [index for index, top_n in enumerate(watched.sweep) if top_n > 1]
    sweep = [watched.sweep[index] for index in shown]
    curves = torch.cat([m["geometry"] for m in means], -1)[:, shown]
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device="cpu")
    for index, (name, marker) in enumerate(zip(NAMES, "osD", strict=True)):
        low, middle, high = curves[index].nanquantile(quartiles, -1).tolist()
        axes.plot(sweep, middle, marker=marker, color=f"C{index}", label=name)
        axes.fill_between(sweep, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
    for index, (name, marker) in enumerate(zip(NAMES, "osD", strict=True)):
        control = torch.cat([m[("control_precision", "control_recall", "control_f_score")[index]] for m in means])
        axes.plot(watched.top_n, control.nanmedian().item(), marker=marker, color=f"C{index}", markerfacecolor="none",
                  linestyle="none", label=f"{name}, random keys")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sweep, sweep)
    axes.set(title="separation of the selected keys (median, quartiles)", xlabel="top_n", ylim=(-0.03, 1.03))
    axes.grid(True, axis="y", color="0.9")
    axes.legend(frameon=False, ncols=2, fontsize=8)


def draw_sinks(figure: "Figure", axes: "Axes", rows: torch.Tensor) -> None:
    highest = rows.nan_to_num().max().item()
    limit = next((end for end in (0.02, 0.05, 0.1, 0.2, 0.5) if highest <= end), 1)
    image = axes.imshow(rows.numpy(), vmin=0, vmax=limit, cmap="YlOrRd", aspect="auto")
    figure.colorbar(image, ax=axes, label="share of the weight")
    label_axes(axes, *rows.shape)
    axes.set(title="mass of the sink, mean over queries")


def draw_regimes(axes: "Axes", rows: torch.Tensor, top_n: int) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = [COLOURS[name] for name in REGIMES]
    rows = rows.masked_fill(rows == UNDEFINED, math.nan)  # left blank, as heads that a layer does not have
    axes.imshow(rows.numpy(), vmin=-0.5, vmax=2.5, cmap=ListedColormap(colours), aspect="auto")
    label_axes(axes, *rows.shape)
    counts = [int((rows == index).sum()) for index in range(len(REGIMES))]
    patches = [Patch(color=c, label=f"{name} ({count})") for c, name, count in zip(colours, REGIMES, counts, strict=True)]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)
    axes.set(title=f"regimes, top_n = {top_n}")


def label_axes(axes: "Axes", layers: int, heads: int) -> None:
    """Numbers of layers and heads, and lines between them."""
    axes.set(xlabel="head", ylabel="layer", yticks=thinned(layers), xticks=thinned(heads))
    axes.set_xticks([head + 0.5 for head in range(heads - 1)], minor=True)
    axes.set_yticks([layer + 0.5 for layer in range(layers - 1)], minor=True)
    axes.grid(True, which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)


def thinned(count: int, most: int = 16) -> range:
    """At most so many of the numbers 0 to count - 1, evenly spaced."""
    return range(0, count, -(-count // most))
