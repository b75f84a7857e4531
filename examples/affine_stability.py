"""Is training steadier with affine-scaled attention (arXiv 2602.23057)? Loss and gradient norm of 500 steps.

Trains the transformer of train_digits.py with softmax attention, with softmax attention and a learnable sink, and with
affine-scaled attention. For each seed they start from the same values, see the same batches and drop the same activations.

    python examples/affine_stability.py
    python examples/affine_stability.py --models softmax affine sigmoid --seeds 4

Needs `pip install '.[examples]'`. The default run takes about five minutes on two CPU cores. A plot, and the losses and norms
of every step as JSON, go to examples/out/; `--page docs/affine.md` writes the table into that page.
"""

import argparse
import functools
import json
from pathlib import Path

import matplotlib
import torch
import train_digits
from pages import write_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import nearfar as nf

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend without a window)

LAST = 50  # steps, whose mean is the training loss at the end

# operators.md, section 4: 1B parameters, distilled.
PAPER_VARIANCE = {"softmax": 3.93, "affine": 2.90}


class SinkAttention(train_digits.SoftmaxAttention):
    """Softmax attention with exp of a learnable logit per head, at first 0, in the denominator."""

    def __init__(self):
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(train_digits.HEADS))

    def attend(self, q, k, v):
        return nf.softmax_attention(q, k, v, causal=True, sink=self.sink)


MODELS = {
    "softmax": train_digits.SoftmaxAttention,
    "sink": SinkAttention,
    "affine": train_digits.affine_attention,
    "sigmoid": functools.partial(train_digits.affine_attention, phi="sigmoid"),
}
TITLES = {"softmax": "softmax", "sink": "softmax, sink", "affine": "affine, clip (paper)", "sigmoid": "affine, sigmoid"}


def measure(models, seeds, steps, device, progress):
    """{model: a dict of figures for each seed}."""
    images, held_out = train_digits.load_images(device)
    results = {name: [] for name in models}
    for seed in range(seeds):
        for name in models:
            run = train_digits.train(MODELS[name], images, steps, seed, progress, f"{TITLES[name]}, seed {seed}")
            figures = {"seed": seed, "held_out": train_digits.held_out_bits(run.model, held_out), "losses": run.losses}
            results[name].append({**figures, "gradient_norms": run.gradient_norms})
    return results


def over_steps(runs, key):
    """(seeds, steps)."""
    return torch.tensor([run[key] for run in runs], dtype=torch.float64)


def spread(values, digits):
    """Mean over the seeds, and how far the farthest is from it."""
    return f"{values.mean():.{digits}f} ± {(values - values.mean()).abs().max():.{digits}f}"


def tabulate(results):
    (first, *_) = results.values()
    seeds, steps = over_steps(first, "losses").shape
    table = Table(
        title=f"Bits per pixel and gradient norms of {steps} steps; mean over {seeds} seeds ± the largest deviation from it",
        caption=f"Training: mean of the last {LAST} steps. Ratios are to softmax, with the same seed.",
    )
    table.add_column("", no_wrap=True)
    for name in results:
        table.add_column(TITLES[name], justify="right", no_wrap=True)
    norms = {name: over_steps(runs, "gradient_norms") for name, runs in results.items()}
    variances = {name: values.var(1) for name, values in norms.items()}
    rows = {
        "held out": lambda name: spread(torch.tensor([run["held_out"] for run in results[name]]), 3),
        "training": lambda name: spread(over_steps(results[name], "losses")[:, -LAST:].mean(1), 3),
        "gradient norm, mean": lambda name: spread(norms[name].mean(1), 3),
        "gradient norm, variance": lambda name: spread(variances[name], 3),
        "ratio of variances": lambda name: spread(variances[name] / variances["softmax"], 2),
        "paper, variance": lambda name: f"{PAPER_VARIANCE[name]:.2f}" if name in PAPER_VARIANCE else "",
        "paper, ratio": lambda name: (
            f"{PAPER_VARIANCE[name] / PAPER_VARIANCE['softmax']:.2f}" if name in PAPER_VARIANCE else ""
        ),
    }
    for row, cell in rows.items():
        table.add_row(row, *map(cell, results))
    return table


def plot(results, path):
    figure, (losses, norms) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, key in ((losses, "losses"), (norms, "gradient_norms")):
        for name, runs in results.items():
            values = over_steps(runs, key)
            window = min(10, values.shape[1])
            smooth = values.unfold(1, window, 1).mean(2)
            steps = range(window, values.shape[1] + 1)
            (line,) = axes.plot(steps, smooth.mean(0), label=TITLES[name], linewidth=1.2)
            axes.fill_between(steps, smooth.amin(0), smooth.amax(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel="step")
    losses.set(title="training loss, bits per pixel")
    norms.set(title="gradient norm before clipping", yscale="log")
    losses.legend(title=f"means of {window} steps;\nrange over {len(runs)} seeds shaded")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["softmax", "sink", "affine"])
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of each model (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds, from 0 (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the plot and the JSON")
    parser.add_argument("--page", type=Path, help="Markdown page to write the table into")
    options = parser.parse_args(arguments)
    models = dict.fromkeys(("softmax", *options.models))  # what the others are compared with comes first
    console = Console()

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[loss]:.3f} bits/pixel"), console=console) as progress:
        results = measure(models, options.seeds, options.steps, torch.device(options.device), progress)
    table = tabulate(results)
    console.print(table)
    if options.page:
        write_table(options.page, "affine_stability", table)

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "affine_stability.json").write_text(json.dumps(results) + "\n")
    plot(results, options.out / "affine_stability.png")
    console.print(f"Plot and figures of every step: {options.out}/affine_stability.png, {options.out}/affine_stability.json")
    return results


if __name__ == "__main__":
    main()
