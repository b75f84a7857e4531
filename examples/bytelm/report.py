"""Tables and plots of a record of language.py."""

import math

import torch
from console import plt
from records import spread
from rich.table import Table

FIRST = 500  # steps over which arXiv 2602.23057 takes the variance
SPIKES = 6, 9  # a step is a spike if its norm exceeds the median by this many median absolute deviations


def by_model(record: dict) -> dict[str, list[dict]]:
    """{model: its runs in the order of the seeds}."""
    found = {}
    for run in record["runs"]:
        found.setdefault(run["model"], []).append(run)
    return {name: sorted(runs, key=lambda run: run["seed"]) for name, runs in found.items()}


def norms(run: dict, start: int = 0) -> torch.Tensor:
    """Gradient norms of the first 500 steps, from a step on."""
    return torch.tensor(run["gradient_norms"][start:FIRST], dtype=torch.float64)


def variance(run: dict, start: int = 0) -> float:
    return norms(run, start).var().item()


def variation(run: dict, start: int = 0) -> float:
    """Standard deviation in units of the mean."""
    return (norms(run, start).std() / norms(run, start).mean()).item()


def spikes(run: dict, times: float, start: int = 0) -> int:
    """Steps whose norm exceeds median + times MAD of the norms."""
    values = norms(run, start)
    median = values.median()
    return int((values > median + times * (values - median).abs().median()).sum())


def layer_mean(run: dict, name: str, when: str = "after") -> float:
    values = run[when].get(name, [])
    return sum(values) / len(values) if values else math.nan


def ratios(runs: list[dict], others: list[dict], figure) -> list[float]:
    """Of a figure of the same seed."""
    of = {run["seed"]: figure(run) for run in others}
    return [figure(run) / of[run["seed"]] for run in runs if run["seed"] in of]


def title(record: dict) -> str:
    plan, text = record["settings"]["plan"], record["settings"]["text"]
    size, seeds = plan["size"], max(map(len, by_model(record).values()))
    return (
        f"{plan['steps']} steps of {plan['batch']} x {size['context']} bytes, {size['layers']} layers {size['dim']} wide, "
        f"{text['train_bytes']:,} bytes to train on, {record['environment']['device']}: means over {seeds} seeds ± the largest "
        "deviation"
    )


def tabulate_training(record: dict) -> Table:
    models, warmup = by_model(record), record["settings"]["plan"]["warmup"]
    table = Table(
        title=title(record),
        caption=f"Bits per byte held out. Of the gradient's norm before clipping, from step {warmup}, the end of the warm-up, "
        f"to {FIRST}: variance, its ratio to that of softmax with the same seed, standard deviation over mean (CV), and steps "
        "above the median + 6 and 9 MAD.",
    )
    table.add_column("model", no_wrap=True)
    for column in ("bits/byte", "variance", "ratio", "CV", "spikes", "tokens/s", "parameters"):
        table.add_column(column, justify="right")
    for name, runs in models.items():
        compared = ratios(runs, models.get("softmax", []), lambda run: variance(run, warmup))
        table.add_row(
            name,
            spread([run["bits_per_byte"] for run in runs], 3),
            spread([variance(run, warmup) for run in runs], 4),
            spread(compared, 2) if compared else "",
            spread([variation(run, warmup) for run in runs], 2),
            " / ".join(f"{sum(spikes(run, times, warmup) for run in runs) / len(runs):.1f}" for times in SPIKES),
            f"{sum(run['tokens_per_second'] for run in runs) / len(runs):,.0f}",
            f"{runs[0]['parameters']:,}",
        )
    return table


def tabulate_weights(record: dict) -> Table:
    """Layer by layer, means over the seeds."""
    table = Table(
        title="What the weights are after training, first layer to last, means over the seeds",
        caption="Means over heads and the queries after the first. Entropy in nats, in brackets that before training, mean "
        "over layers.",
    )
    table.add_column("model", no_wrap=True)
    table.add_column("share of the first token")
    table.add_column("entropy")

    def layers(runs, key, digits):
        values = torch.tensor([run["after"][key] for run in runs], dtype=torch.float64).mean(0)
        return " ".join(f"{value:.{digits}f}" for value in values)

    for name, runs in by_model(record).items():
        before = sum(layer_mean(run, "entropy", "before") for run in runs) / len(runs)
        table.add_row(name, layers(runs, "first_token_mass", 3), f"{layers(runs, 'entropy', 2)} ({before:.2f})")
    return table


def smoothed(runs: list[dict], key: str, window: int) -> tuple[range, torch.Tensor]:
    """Running means (seeds, steps), and the step at which each ends."""
    values = torch.tensor([run[key] for run in runs], dtype=torch.float64)
    window = max(1, min(window, values.shape[1] // 5))
    return range(window, values.shape[1] + 1), values.unfold(1, window, 1).mean(2)


def draw(record: dict):
    """Loss, gradient norm, and by layer the first token's mass and the entropy."""
    figure, grid = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for index, (name, runs) in enumerate(by_model(record).items()):
        style = {"color": plt.cm.tab20(index), "label": name, "linewidth": 1.2}
        for axes, key in zip(grid[0], ("losses", "gradient_norms"), strict=True):
            steps, values = smoothed(runs, key, 20)
            axes.plot(steps, values.mean(0), **style)
            axes.fill_between(steps, values.amin(0), values.amax(0), color=style["color"], alpha=0.15, linewidth=0)
        for axes, key in zip(grid[1], ("first_token_mass", "entropy"), strict=True):
            layers = torch.tensor([run["after"][key] for run in runs], dtype=torch.float64).mean(0)
            axes.plot(range(1, len(layers) + 1), layers, "o-", **style)
    titles = "training loss, bits per byte", "gradient norm, before clipping", "mass of the first token", "entropy, nats"
    for axes, title, label in zip(grid.flat, titles, ("step", "step", "layer", "layer"), strict=True):
        axes.set(title=title, xlabel=label)
    grid[0, 1].set_yscale("log")
    for axes in grid[1]:
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure
