"""Gradient flow polarises attention: the value-softmax model of arXiv 2603.06248, beside other losses and normalisers.

V and a of L(V s(a)) follow their gradient together. Under the logistic loss the softmax of a runs from uniform to a single
token, ever more slowly; which one is known at the start. Other normalisers end at exactly one token, a sigmoid never does, and
under the square loss it depends on how far the target is.

    python examples/polarization.py
    python examples/polarization.py --steps 10000 --models 8

Needs `pip install '.[examples]'`. The default run takes one to two minutes on one CPU core, half of that for the million
steps of the first figure. Plots go to examples/out/; `--page docs/theory.md` writes the table into that page.
"""

import argparse

import torch
import torch.nn.functional as F
from console import add_arguments, make_console, plt, positive, save, track
from pages import write_table
from rich.table import Table

import nearfar as nf

TOKENS = 10  # and dimensions, of all but the first figure
NORMALISERS = "softmax", "l1", "square", "relu", "sigmoid"
TARGET_NORMS = 0.5, 1, 2, 4, 8, 16
LOGITS = {"logit_mean": 1.0, "logit_std": 0.1}  # as the authors' code draws them: three normalisers cannot start from 0

# The authors' notebook (github.com/tml-epfl/softmax), run by us: one draw each, from numpy's seeds 123 (entropies) and 42
# (supports). The paper prints no such numbers. The notebook normalises beta: other norms than 1 are ours.
NOTEBOOK_ENTROPY = {1_000: 1.989, 10_000: 0.606, 100_000: 0.279, 1_000_000: 0.164}
NOTEBOOK_NORMALISER = {"softmax": 1.178, "l1": 1.0, "square": 1.0, "relu": 1.0, "sigmoid": 9.998}
NOTEBOOK_SQUARE_LOSS = {1: 9.849}

DIFFERENCES = """\
The figures of the authors' code are single draws, to be compared with the ranges. Under l1 and relu some draws still
hold two tokens: the gradient that parts them shrinks with the loss, and more steps leave fewer of them. See
docs/theory.md."""


def flows(models, steps, seed, progress):
    """Initial values of the first experiment and the flows of all four, the middle two by normaliser and by norm of beta."""
    generator = torch.Generator().manual_seed(seed)

    def flow(name, initial, last, **options):
        task = progress.add_task(name, total=last)
        recorded = sorted({*nf.theory.log_spaced(last, 200), *(step for step in NOTEBOOK_ENTROPY if step <= last)})
        return nf.theory.value_softmax_flow(
            initial, recorded, on_record=lambda step: progress.update(task, completed=step), **options
        )

    start = nf.theory.draw_value_softmax(models, 8, 8, generator=generator)
    polarisation = flow("logistic loss, softmax", start, steps, step_size=0.1)

    initial = nf.theory.draw_value_softmax(models, TOKENS, TOKENS, generator=generator, **LOGITS)
    normalisers = {
        name: flow(f"logistic loss, {name}", initial, max(steps // 10, 1), normaliser=name, step_size=0.5)
        for name in NORMALISERS
    }
    square = {
        norm: flow(
            f"square loss, |beta| = {norm}", initial._replace(beta=norm * initial.beta), max(steps // 200, 1), loss="square"
        )
        for norm in TARGET_NORMS
    }
    classes = initial._replace(beta=F.one_hot(torch.arange(models) % TOKENS, TOKENS).to(initial.v))
    cross_entropy = flow("cross-entropy, softmax", classes, max(steps // 10, 1), loss="cross_entropy", step_size=0.5)
    return start, polarisation, normalisers, square, cross_entropy


def spread(values):
    """Median and range over the models."""
    return f"{values.median():.2f}", f"{values.min():.2f} to {values.max():.2f}"


def tabulate(start, polarisation, normalisers, square, cross_entropy):
    models = len(start.a)
    table = Table(title=f"Medians and ranges over {models} draws; the authors' code, run by us, is a single draw")
    for column, justify in (("experiment", "left"), ("authors' code", "right"), ("median", "right"), ("range", "right")):
        table.add_column(column, justify=justify, no_wrap=True)
    for step, notebook in NOTEBOOK_ENTROPY.items():
        row = (polarisation.steps == step).nonzero().flatten()
        if len(row):
            table.add_row(f"entropy, {step:,} steps (ln 8 = 2.08)", f"{notebook:.3f}", *spread(polarisation.entropy[row[0]]))
    winner = (start.beta[:, None] @ start.v).squeeze(1).argmax(-1)
    hits = (polarisation.weights[-1].argmax(-1) == winner).sum()
    table.add_row("winner is argmax V_0^T beta (theorem: always)", "", f"{hits} of {models}", "")
    for name, flow in normalisers.items():
        notebook = f"{NOTEBOOK_NORMALISER[name]:.3f}"
        table.add_row(f"support of 10, logistic, {name}", notebook, *spread(flow.effective_support[-1]))
    for norm, flow in square.items():
        notebook = f"{NOTEBOOK_SQUARE_LOSS[norm]:.3f}" if norm in NOTEBOOK_SQUARE_LOSS else ""
        table.add_row(f"support of 10, square, beta of norm {norm}", notebook, *spread(flow.effective_support[-1]))
    table.add_row("support of 10, cross-entropy", "", *spread(cross_entropy.effective_support[-1]))
    return table


def band(axes, steps, values, **style):
    """Median line and range of values (T, B); the start is left out of the logarithmic axis."""
    (line,) = axes.plot(steps[1:], values.median(1).values[1:], **style)
    axes.fill_between(steps[1:], values.amin(1)[1:], values.amax(1)[1:], color=line.get_color(), alpha=0.15, linewidth=0)


def draw_polarisation(start, flow):
    """One model's weights and alignments, and the entropy of all."""
    figure, (weights, alignments, entropy) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    aligned = (start.beta[:, None] @ flow.v).squeeze(2)  # (T, B, n)
    for token in range(flow.a.shape[2]):
        weights.loglog(flow.steps[1:], flow.weights[1:, 0, token], label=f"token {token}")
        alignments.semilogx(flow.steps[1:], aligned[1:, 0, token])
    weights.set(title="one draw: weights s(a)", xlabel="step")
    weights.legend(fontsize=7, ncols=2, loc="lower left")
    alignments.set(title="the same draw: alignments V$^T$beta", xlabel="step")
    band(entropy, flow.steps, flow.entropy, color="C0", label="median and range of all draws")
    known = {step: value for step, value in NOTEBOOK_ENTROPY.items() if step <= flow.steps[-1]}
    entropy.plot(known.keys(), known.values(), "kx", label="authors' code, one draw")
    entropy.set(title="entropy of s(a), nats", xlabel="step", xscale="log", ylim=(0, None))
    entropy.legend(fontsize=8)
    figure.suptitle(f"Value-softmax model, {flow.a.shape[2]} tokens, logistic loss, {flow.a.shape[1]} draws")
    return figure


def draw_support(normalisers, square, cross_entropy):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for name, flow in normalisers.items():  # medians only: "l1" and "relu" lie on one another
        style = "--" if name == "relu" else "-"
        left.plot(flow.steps[1:], flow.effective_support.median(1).values[1:], style, label=name)
    left.plot(
        cross_entropy.steps[1:], cross_entropy.effective_support.median(1).values[1:], "k:", label="softmax, cross-entropy"
    )
    left.set(
        title="logistic loss: normalisers (step size 0.5), medians",
        xlabel="step",
        xscale="log",
        ylabel="effective support, tokens",
    )
    left.legend(fontsize=8, loc="lower left")
    for index, (norm, flow) in enumerate(square.items()):
        band(right, flow.steps, flow.effective_support, color=plt.cm.viridis(index / len(square)), label=f"|beta| = {norm}")
    right.set(title="square loss, softmax (step size 0.1), medians and ranges", xlabel="step", xscale="log")
    right.legend(fontsize=8, loc="lower left")
    left.set_yticks(range(1, TOKENS + 1))
    figure.suptitle(f"Value-softmax model, {TOKENS} tokens")
    return figure


def medians(flow):
    """The numbers of a curve: at each recorded step the median, least and largest effective support of the draws."""
    support = flow.effective_support
    low, high = support.amin(1).tolist(), support.amax(1).tolist()
    return {"steps": flow.steps.tolist(), "median": support.median(1).values.tolist(), "least": low, "largest": high}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=1_000_000, help="of the first experiment (default: %(default)s)")
    parser.add_argument("--models", type=positive, default=32, help="draws of initial values (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial values")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    console = make_console()

    with track(console) as progress:
        start, *results = flows(options.models, options.steps, options.seed, progress)
    table = tabulate(start, *results)
    console.print(table, DIFFERENCES, sep="\n")
    if options.page:
        write_table(options.page, "polarization", table)

    polarisation, normalisers, square, cross_entropy = results
    figure = draw_polarisation(start, polarisation)
    console.print(save(figure, options.out, "polarization", medians(polarisation)), soft_wrap=True)
    support = {f"logistic, {name}": medians(flow) for name, flow in normalisers.items()}
    support |= {f"square, |beta| = {norm}": medians(flow) for norm, flow in square.items()}
    support["cross-entropy"] = medians(cross_entropy)
    console.print(save(draw_support(normalisers, square, cross_entropy), options.out, "support", support), soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
