"""Is training steadier with affine-scaled attention (arXiv 2602.23057)? Loss and gradient norm of 500 steps.

Trains the transformer of train_digits.py with softmax attention, with softmax attention and a learnable sink, and with
affine-scaled attention; if asked to, also with a sigmoid in place of the clip, and with softmax attention that is only halved.
For each seed they start from the same values, see the same batches and drop the same activations.

    python examples/affine_stability.py
    python examples/affine_stability.py --models sink halved affine sigmoid --seeds 4

Needs `pip install '.[examples]'`. The default run takes five to seven minutes on two CPU cores. A plot, and the losses and
norms of every step as JSON, go to examples/out/; `--page docs/notes/affine.md` writes the table into that page.
"""

import argparse
import functools

import torch
import train_digits
from console import add_arguments, make_console, plt, positive, save, track
from pages import write_table
from rich.table import Table
from torch import nn

import nearfar as nf

LAST = 50  # steps, whose mean is the training loss at the end

# Table 4 of arXiv 2602.23057: 1B parameters, distilled.
PAPER_VARIANCE = {"softmax": 3.93, "sink": 3.951, "affine": 2.90}


class SinkAttention(train_digits.SoftmaxAttention):
    """Softmax attention with exp of a learnable logit per head, at first 0, in the denominator."""

    def __init__(self):
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(train_digits.HEADS))

    def attend(self, q, k, v):
        return nf.softmax_attention(q, k, v, causal=True, sink=self.sink)


class HalvedAttention(train_digits.SoftmaxAttention):
    """Half of softmax attention: what the affine scales are at first, and nothing else of them."""

    def attend(self, q, k, v):
        return 0.5 * super().attend(q, k, v)


MODELS = {
    "softmax": train_digits.SoftmaxAttention,
    "sink": SinkAttention,
    "halved": HalvedAttention,
    "affine": train_digits.affine_attention,
    "sigmoid": functools.partial(train_digits.affine_attention, phi="sigmoid"),
}
TITLES = {
    "softmax": "softmax",
    "sink": "softmax, sink",
    "halved": "softmax / 2",
    "affine": "affine",
    "sigmoid": "affine, sigmoid",
}


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
        title=f"{steps} steps: means over {seeds} seeds ± the largest deviation",
        caption=f"Bits per pixel held out, and in the last {LAST} steps of training. Ratios: to softmax with the same seed.",
    )
    table.add_column("", no_wrap=True)
    for name in results:
        table.add_column(TITLES[name], justify="right")

    def row(title, digits, values):
        table.add_row(title, *(spread(values(runs), digits) for runs in results.values()))

    row("held out", 3, lambda runs: torch.tensor([run["held_out"] for run in runs]))
    row("training", 3, lambda runs: over_steps(runs, "losses")[:, -LAST:].mean(1))
    row("gradient norm", 3, lambda runs: over_steps(runs, "gradient_norms").mean(1))
    for title, first in (("its variance", 0), ("variance after warm-up", train_digits.WARMUP)):
        variances = functools.partial(variance, first=first)
        row(title, 4, variances)
        row("ratio", 2, lambda runs, of=variances: of(runs) / of(results["softmax"]))
    paper = {name: PAPER_VARIANCE.get(name) for name in results}
    table.add_row("paper, variance", *("" if value is None else f"{value:.2f}" for value in paper.values()))
    table.add_row("paper, ratio", *("" if value is None else f"{value / paper['softmax']:.2f}" for value in paper.values()))
    return table


def variance(runs, first):
    """Of the gradient norm over the steps from `first` on, (seeds,)."""
    return over_steps(runs, "gradient_norms")[:, first:].var(1)


def smoothed(values, window):
    """Running means of (seeds, steps), and the step at which each ends."""
    window = train_digits.window_of(values.shape[1], window)
    return range(window, values.shape[1] + 1), values.unfold(1, window, 1).mean(2)


def band(axes, steps, values, name):
    """Mean line and range of (seeds, steps); a model has one colour in all panels."""
    color = f"C{list(MODELS).index(name)}"
    axes.plot(steps, values.mean(0), color=color, label=TITLES[name], linewidth=1.2)
    axes.fill_between(steps, values.amin(0), values.amax(0), color=color, alpha=0.15, linewidth=0)


def draw(results):
    figure, (losses, norms) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    difference = losses.inset_axes((0.36, 0.4, 0.62, 0.5))
    reference = over_steps(results["softmax"], "losses")
    for name, runs in results.items():
        loss = over_steps(runs, "losses")
        band(losses, *smoothed(loss, 10), name)
        band(difference, *smoothed(loss - reference, 50), name)
        band(norms, *smoothed(over_steps(runs, "gradient_norms"), 10), name)
    losses.set(title="training loss, bits per pixel", xlabel="step")
    steps = reference.shape[1]
    difference.set_title(f"minus that of softmax, means of {train_digits.window_of(steps, 50)} steps", fontsize=9)
    difference.tick_params(labelsize=8)
    norms.set(title="gradient norm, before clipping", xlabel="step", yscale="log")
    norms.set_yticks((0.2, 0.3, 0.5, 1, 2), minor=False)
    norms.minorticks_off()
    norms.yaxis.set_major_formatter("{x:g}")
    legend = f"means of {train_digits.window_of(steps)} steps and of {len(reference)} seeds, whose range is shaded"
    figure.legend(*norms.get_legend_handles_labels(), title=legend, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("Pixel transformers on 8x8 digits, 64 tokens an image")
    return figure


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["softmax", "sink", "affine"])
    parser.add_argument("--steps", type=positive, default=500, help="optimizer steps of each model (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=2, help="how many seeds, from 0 (default: %(default)s)")
    add_arguments(parser, device=True)
    options = parser.parse_args(arguments)
    models = dict.fromkeys(("softmax", *options.models))  # what the others are compared with comes first
    console = make_console()

    with track(console, train_digits.LOSS) as progress:
        results = measure(models, options.seeds, options.steps, torch.device(options.device), progress)
    table = tabulate(results)
    console.print(table)
    if options.page:
        write_table(options.page, "affine_stability", table)

    console.print(save(draw(results), options.out, "affine_stability", results), soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
