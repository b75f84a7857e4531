"""The papers' claims beside what was measured here: writes the tables of docs/claims.md from records and from other pages.

    python examples/claims.py
    python examples/claims.py --check

Figures come from the committed records in examples/results/, a folder a device, which the scripts of this folder wrote, and
from the generated tables of other pages. A claim whose record is missing is "not run". Nothing is trained here.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import approximate_softmax
import clusters
import locking
import records
import wide_limit
from bytelm import report
from pages import markdown, with_block
from rich.markup import escape
from rich.table import Table

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "claims.md"


class Finding(NamedTuple):
    measured: str
    size: str
    verdict: str


class Claim(NamedTuple):
    paper: str
    says: str
    command: str
    finding: Callable[[], Finding | None]  # None: not run


def judged(differences) -> str:
    """Verdict on differences, one a seed, that are positive where a claim holds: beyond the seeds' range, or it is not seen."""
    values = [float(difference) for difference in differences]
    mean, reach = sum(values) / len(values), max(values) - min(values)
    if min(values) <= 0 <= max(values) or not abs(mean) > reach:  # NaN of a run that diverged too
        return "not seen"
    verdict = "supported" if mean > 0 else "contradicted"
    return f"{verdict} (one seed)" if len(values) == 1 else verdict


# From tables of other pages


def cells(page: str, block: str, *label: str, below: int = 0) -> dict[str, str]:
    """{column: cell} of the row of a generated table that starts with these cells, or of one some rows below it."""
    text = (DOCS / page).read_text().split(f"<!-- {block} -->")[1].split(f"<!-- /{block} -->")[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line[:1]]
    found = [index for index, row in enumerate(rows) if tuple(row[: len(label)]) == label]
    if not found:
        raise ValueError(f"docs/{page} has no row {' | '.join(label)} in its block {block}")
    return dict(zip(header, rows[found[0] + below], strict=True))


def digits(model: str, other: str) -> Finding:
    """Whether a model of docs/examples.md has fewer bits per pixel than another."""
    bits = [float(cells("examples.md", "train_digits", name)["bits/pixel"]) for name in (model, other)]
    return Finding(
        f"bits per pixel: {bits[0]:.3f}, {other} {bits[1]:.3f}", "digits, 0.15M parameters, CPU", judged([bits[1] - bits[0]])
    )


def affine_digits(row, title, verdict, below=0, models=("affine", "softmax / 2")) -> Callable[[], Finding]:
    """A row of docs/notes/affine.md, or the one `below` it, for some of its models."""
    found = cells("notes/affine.md", "affine_stability", row, below=below)
    measured = ", ".join(f"{name} {found[name]}" for name in models)
    return lambda: Finding(f"{title}: {measured}", "digits, 0.15M parameters, 4 seeds, CPU", verdict)


def flow(row: str, column: str, title: str, verdict: str = "supported") -> Callable[[], Finding]:
    found = cells("theory.md", "polarization", row)
    interval = f" ({found['range']})" if found["range"] else ""
    return lambda: Finding(f"{title}: {found[column]}{interval}", "32 draws of value-softmax models, CPU", verdict)


def malleability(setting: str, verdict: str) -> Callable[[], Finding]:
    found = cells("theory.md", "malleability", setting, "PGD")
    measured = f"signs that change under PGD: attention {found['attention']}%, pixels {found['pixels']}%"
    return lambda: Finding(measured, "8x8 digits, 8 networks of 1,024 units, CPU", verdict)


# From records


def language(figure, digits: int, title: str, model: str, other: str = "softmax") -> Callable[[], Finding | None]:
    """Whether a figure of a run of language.py is smaller with one model than with another of the same seed."""

    def finding():
        record = records.load("language")
        runs = report.by_model(record) if record else {}
        if not (model in runs and other in runs):
            return None
        pairs = list(zip(runs[model], runs[other], strict=True))
        warmup = record["settings"]["plan"]["warmup"]
        values = [[figure(run, warmup) for run in side] for side in zip(*pairs, strict=True)]
        measured = f"{title}: {records.spread(values[0], digits)}, {other} {records.spread(values[1], digits)}"
        return Finding(measured, size_of(record, runs[model][0]), judged([b - a for a, b in zip(*values, strict=True)]))

    return finding


def size_of(record, run) -> str:
    seeds = len({run["seed"] for run in record["runs"]})
    parameters = f"{run['parameters'] / 1e6:.3g}M parameters"
    return f"{parameters}, {record['settings']['plan']['steps']} steps, {seeds} seeds, {record['environment']['device']}"


def bits(run, warmup=0):
    return run["bits_per_byte"]


def late_variance(run, warmup):
    return report.variance(run, warmup)


def spikes(run, warmup):
    return float(report.spikes(run, report.SPIKES[0], warmup))


def first_token(run, warmup):
    return report.layer_mean(run, "first_token_mass")


def entropy_falls() -> Finding | None:
    record = records.load("language")
    runs = report.by_model(record).get("softmax") if record else None
    if not runs:
        return None
    before, after = ([report.layer_mean(run, "entropy", when) for run in runs] for when in ("before", "after"))
    measured = f"nats, mean over layers: {records.spread(before, 2)} before training, {records.spread(after, 2)} after"
    return Finding(measured, size_of(record, runs[0]), judged([b - a for b, a in zip(before, after, strict=True)]))


def approximation() -> Finding | None:
    record = records.load("approximate_softmax")
    if not record:
        return None
    errors = {(run["seed"], run["width"], run["factors"]): run["error"] for run in record["runs"]}
    ratios = [errors[seed, width, 2] / error for (seed, width, factors), error in errors.items() if factors == 1]
    measured = f"error of two factors over that of one, at 16 to 64 numbers: {min(ratios):.2f} to {max(ratios):.2f}"
    size = f"{record['settings']['steps']} steps, {len(ratios) // len(approximate_softmax.WIDTHS)} seeds"
    return Finding(measured, f"{size}, {record['environment']['device']}", judged([1 - ratio for ratio in ratios]))


def consensus(surface: str) -> Callable[[], Finding | None]:
    """Whether a bound of 0.5 leaves more clusters in every draw than no bound, which leaves one."""

    def finding():
        record = records.load("clusters")
        if not record:
            return None
        of = {run["bound"]: run["clusters"] for run in record["runs"] if run["surface"] == surface}
        measured = f"clusters: {records.spread(of[0.5], 1)} within a bound of 0.5, {records.spread(of[None], 1)} without"
        verdict = judged([near - everywhere for near, everywhere in zip(of[0.5], of[None], strict=True)])
        if verdict == "supported" and max(of[None]) > 1:
            verdict = "clusters supported, consensus not seen"
        size = f"{record['settings']['particles']} particles, {record['settings']['steps']:,} steps, {len(of[None])} seeds, CPU"
        return Finding(measured, size, verdict)

    return finding


def synchronized() -> Finding | None:
    record = records.load("locking")
    runs = report.by_model(record) if record else {}
    if "softmax" not in runs:
        return None
    means = {name: sum(map(bits, of)) / len(of) for name, of in runs.items() if name != "softmax"}
    best = min(means, key=means.get)
    measured = (
        f"bits per byte: {records.spread(list(map(bits, runs[best])), 3)} at the best frequency scale, {best}, softmax "
        f"{records.spread(list(map(bits, runs['softmax'])), 3)}"
    )
    differences = [bits(b) - bits(a) for a, b in zip(runs[best], runs["softmax"], strict=True)]
    return Finding(measured, size_of(record, runs[best][0]), judged(differences))


def far_from_the_limit() -> Finding | None:
    record = records.load("wide_limit")
    if not record:
        return None
    width = record["settings"]["widths"][-1]
    attention, pixels = (wide_limit.distances(record, features, width) for features in ("attention", "rows"))
    measured = f"relative distance to it: attention {records.spread(attention, 3)}, pixels {records.spread(pixels, 3)}"
    size = f"digits, {width:,} units, {len(attention)} seeds, {record['environment']['device']}"
    return Finding(measured, size, judged([a - b for a, b in zip(attention, pixels, strict=True)]))


def not_run() -> None:
    """Of a claim for which there is a script, but no record that it could write."""


KRAUSE, HADAMARD, SSA, AFFINE = "2602.11534", "2602.12128", "2602.14445", "2602.23057"
POLARISATION, MALLEABILITY, REGIMES = "2603.06248", "2603.13085", "2602.01893"
TRAIN, GPU_LANGUAGE = "train_digits.py", "language.py --gpu"
STABILITY = "affine_stability.py --models sink halved affine --seeds 4"

CLAIMS = (
    Claim(KRAUSE, "bounded confidence makes clusters, softmax attention consensus: on a sphere", "clusters.py",
          consensus("sphere")),
    Claim(KRAUSE, "the same, on a circle", "clusters.py", consensus("circle")),
    Claim(KRAUSE, "fewer bits on images than softmax (MNIST .5685 -> .5652)", TRAIN, lambda: digits("krause", "softmax")),
    Claim(KRAUSE, "a Krause branch helps a language model", GPU_LANGUAGE, language(bits, 3, "bits per byte", "krause gated")),
    Claim(KRAUSE, "weaker sinks than softmax (in a window, most queries cannot see the first token)", GPU_LANGUAGE,
          language(first_token, 3, "first-token mass", "krause")),
    Claim(HADAMARD, "products of two kernels come nearer to softmax than one, at equal numbers a token",
          "approximate_softmax.py --gpu", approximation),
    Claim(HADAMARD, "and learn more than linear attention", TRAIN, lambda: digits("hadamard", "linear")),
    Claim(HADAMARD, "the same, of a language model", GPU_LANGUAGE, language(bits, 3, "bits per byte", "hadamard", "linear")),
    Claim(SSA, "synchronization replaces softmax at equal parameters", TRAIN, lambda: digits("synchronization", "softmax")),
    Claim(SSA, "the same, of a language model, at the best of six frequency scales", "locking.py --gpu", synchronized),
    Claim(AFFINE, "variance of the gradient norm 3.93 -> 2.90, a ratio of 0.74", STABILITY,
          affine_digits("variance after warm-up", "ratio to softmax, after warm-up", "not seen beyond halving", 1)),
    Claim(AFFINE, "the same, of a language model", GPU_LANGUAGE, language(late_variance, 4, "variance", "affine")),
    Claim(AFFINE, "a sink leaves the variance as it is (3.951)", STABILITY,
          affine_digits("variance after warm-up", "ratio to softmax, after warm-up", "supported", 1, ("softmax, sink",))),
    Claim(AFFINE, "lower loss than softmax (2.73 -> 2.72)", STABILITY,
          affine_digits("held out", "bits per pixel", "not seen", models=("affine", "softmax"))),
    Claim(AFFINE, "the same, of a language model", GPU_LANGUAGE, language(bits, 3, "bits per byte", "affine")),
    Claim(AFFINE, "the same, each with an output gate", GPU_LANGUAGE,
          language(bits, 3, "bits per byte", "affine gated", "gated")),
    Claim(AFFINE, "steadier training: fewer spikes (the paper counts 54, and 53 with softmax, at k = 6)", GPU_LANGUAGE,
          language(spikes, 1, "spikes at k = 6", "affine")),
    Claim(POLARISATION, "under the logistic loss softmax weights come to one token", "polarization.py",
          flow("entropy, 1,000,000 steps (ln 8 = 2.08)", "median", "entropy after a million steps, of at most 2.08")),
    Claim(POLARISATION, "which one is known at the start", "polarization.py",
          flow("winner is argmax V_0^T beta (theorem: always)", "median", "draws in which it is the predicted one")),
    Claim(POLARISATION, "unnormalised sigmoid weights do not", "polarization.py",
          flow("support of 10, logistic, sigmoid", "median", "effective support of 10 tokens")),
    Claim(POLARISATION, "nor do softmax weights under the square loss, for a target of norm 1", "polarization.py",
          flow("support of 10, square, beta of norm 1", "median", "effective support of 10 tokens")),
    Claim(POLARISATION, "training lowers the entropy of a language model's weights", GPU_LANGUAGE, entropy_falls),
    Claim(MALLEABILITY, "an attack changes the sign of many more influences with attention (28.9% against 3.3%)",
          "malleability.py", malleability("ten digits", "supported")),
    Claim(MALLEABILITY, "adversarial training closes the gap", "malleability.py",
          malleability("ten digits, adversarially trained", "contradicted at this size")),
    Claim(MALLEABILITY, "MNIST, 3 against 8: 41.0% against 8.4%", "malleability.py", malleability("3 or 8", "supported")),
    Claim(MALLEABILITY, "attention stays far from its wide limit", "wide_limit.py --gpu", far_from_the_limit),
    Claim(REGIMES, "heads retrieve, mix or reset, by depth, in pretrained models", "watch_attention.py", not_run),
)


def tabulate() -> Table:
    table = Table()
    for column in ("paper", "claim", "measured here", "size", "verdict", "command"):
        table.add_column(column)
    for claim in CLAIMS:
        finding = claim.finding() or Finding("", "", "not run")
        paper = escape(f"[{claim.paper}](https://arxiv.org/abs/{claim.paper})")
        table.add_row(paper, claim.says, *finding, f"`{claim.command}`")
    return table


TABLES = {  # block of the page -> (record, what makes tables of it, command)
    "language": ("language", (report.tabulate_training, report.tabulate_weights), "language.py --gpu --seeds 3"),
    "locking": ("locking", (locking.tabulate,), "locking.py --gpu --seeds 3"),
    "approximate_softmax": ("approximate_softmax", (approximate_softmax.tabulate,), "approximate_softmax.py --gpu --seeds 3"),
    "clusters": ("clusters", (clusters.tabulate,), "clusters.py"),
    "wide_limit": ("wide_limit", (wide_limit.tabulate,), "wide_limit.py --gpu --seeds 3"),
}


def written(text: str) -> str:
    """The page with all of its blocks made anew."""
    text = with_block(text, "claims", markdown(tabulate()), PAGE)
    for block, (name, tables, command) in TABLES.items():
        record = records.load(name)
        body = "\n\n".join(markdown(table(record)) for table in tables) if record else f"Not run: `python examples/{command}`."
        text = with_block(text, block, body, PAGE)
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if docs/claims.md is not up to date")
    options = parser.parse_args(arguments)
    old = PAGE.read_text()
    new = written(old)
    if options.check and new != old:
        sys.exit("docs/claims.md differs from the records: run python examples/claims.py")
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
