"""Does synchronization attention (arXiv 2602.14445) learn more where more pairs lock? Language models over frequency scales.

With the paper's scale of 1 and heads of 64 hardly a pair of tokens locks at first, and the layer passes on its own values.
Smaller scales lock more pairs. This trains the byte-level model of language.py with several scales, and with softmax attention,
which has as many parameters but for one coupling a layer and one bandwidth a head, and sets the loss beside the share of locked
pairs.

    python examples/locking.py
    python examples/locking.py --gpu

Needs `pip install '.[examples]'`. The small size takes some minutes on one CPU core. A plot and a record go to examples/out/.
"""

import math
from functools import partial

import language
import records
from bytelm import data, report
from bytelm.model import ATTENTIONS, Synchronization
from console import make_console, plt, track
from rich.table import Table

FACTORS = 2.0, 1.0, 0.7, 0.5, 0.25  # c of a scale of c D^-1/2


def attentions(width):
    """{name: attention} of softmax, of the paper's scale and of smaller ones, for heads of this width."""
    scaled = {f"{factor:g} D^-1/2": partial(Synchronization, scale=factor * width**-0.5) for factor in FACTORS}
    return {"softmax": ATTENTIONS["softmax"], "1 (paper)": partial(Synchronization, scale=1.0), **scaled}


def share(run, when):
    """Of the locked pairs, mean over layers; NaN for softmax."""
    return report.layer_mean(run, "locked_share", when)


def tabulate(record: dict) -> Table:
    table = Table(title=report.title(record), caption="Locked: share of the pairs of different tokens, in %, mean over layers.")
    table.add_column("frequency scale", no_wrap=True)
    for column in ("locked before", "locked after", "bits/byte", "parameters"):
        table.add_column(column, justify="right")
    for name, runs in report.by_model(record).items():
        shares = ([100 * share(run, when) for run in runs] for when in ("before", "after"))
        locked = ("" if math.isnan(values[0]) else records.spread(values, 2) for values in shares)
        bits = records.spread([run["bits_per_byte"] for run in runs], 3)
        table.add_row(name, *locked, bits, f"{runs[0]['parameters']:,}")
    return table


def draw(record: dict):
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for index, (name, runs) in enumerate(report.by_model(record).items()):
        bits = [run["bits_per_byte"] for run in runs]
        if name == "softmax":
            axes.axhline(sum(bits) / len(bits), color="k", linestyle=":", label="softmax")
        else:
            shares = [100 * share(run, "after") for run in runs]
            axes.plot(shares, bits, "o", color=plt.cm.viridis(index / (len(FACTORS) + 2)), label=name)
    axes.set(xlabel="pairs that lock after training, %", ylabel="bits per byte held out", xscale="symlog")
    axes.legend(frameon=False, title="frequency scale")
    return figure


def main(arguments=None):
    parser = language.parser_of(__doc__)
    options = parser.parse_args(arguments)
    device, console = records.device_of(options), make_console()
    plan = language.plan_of(options)
    text = data.load(options.text, least=plan.size.context + 1)
    path = options.out / "locking.json"
    record = language.opened(path, language.settings_of(plan, text), device, options.resume)
    with track(console, language.NOTE) as progress:
        chosen = attentions(plan.size.dim // plan.size.heads)
        language.measure(record, path, chosen, text, plan, options.seeds, device, progress)
    console.print(tabulate(record))
    console.print(records.finish(record, draw(record), options.out, "locking"), soft_wrap=True)
    return record


if __name__ == "__main__":
    main()
