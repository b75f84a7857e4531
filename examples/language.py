"""Byte-level language models on the source text of Python's standard library, alike but for their attention.

Eleven of them: softmax, with a sink, with an output gate, affine (arXiv 2602.23057) without and with a gate, halved softmax,
Krause in a window and beside softmax (2602.11534), linear and Hadamard (2602.12128), synchronization (2602.14445). Measured:
bits per byte of files that were held out, variance, variation and spikes of the gradient norm, the first token's mass and the
entropy of the weights by layer, tokens a second. Models of one seed start from the same values and read the same bytes.

    python examples/language.py
    python examples/language.py --gpu
    python examples/language.py --gpu --models softmax affine --resume

Needs `pip install '.[examples]'`. The small size takes some minutes on one CPU core; with --gpu, 19 million parameters read 600
batches of 8 x 2,048 bytes. The record grows with every run that is finished; --resume continues it. Files go to examples/out/.
"""

import argparse
import json
import math

import records
from bytelm import data, report
from bytelm.model import ATTENTIONS
from bytelm.train import CPU, GPU, train
from console import make_console, positive, track

NOTE = "{task.fields[loss]:.3f} bits/byte"


def several(text):
    """Type of --steps: below 6, no variance after a warm-up could be taken."""
    if positive(text) < 6:
        raise argparse.ArgumentTypeError(f"must be at least 6, got {text}")
    return int(text)


def parser_of(doc):
    parser = records.parser(doc.splitlines()[0])
    parser.add_argument("--steps", type=several, help="of each model (default: 100, with --gpu 600)")
    parser.add_argument("--text", help="folder of *.py files to read (default: the standard library)")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the record in --out has")
    return parser


def plan_of(options):
    plan = GPU if options.gpu else CPU
    if not options.steps:
        return plan
    shorter = {name: min(getattr(plan, name), options.steps // 3) for name in ("warmup", "decay")}
    return plan._replace(steps=options.steps, **shorter)


def settings_of(plan, text):
    """What the runs of one record have in common."""
    return {"plan": plan._asdict() | {"size": plan.size._asdict()}, "text": text.describe()}


def opened(path, settings, device, resume):
    """The record to add runs to: a new one, or with --resume that of the path, which must have the same settings."""
    if not (resume and path.exists()):
        return {"environment": records.environment(device), "settings": settings, "runs": []}
    record = json.loads(path.read_text())
    if record["settings"] != settings:
        raise SystemExit(f"{path} has other settings or another text: leave --resume out, or give another --out")
    return record


def measure(record, path, attentions, text, plan, seeds, device, progress):
    """Add the runs that the record lacks, seed after seed, so that a record that was cut off compares all models."""
    done = {(run["model"], run["seed"]) for run in record["runs"]}
    missing = [(name, seed) for seed in range(seeds) for name in attentions if (name, seed) not in done]
    for name, seed in missing:
        task = progress.add_task(f"{name}, seed {seed}", total=plan.steps, loss=math.nan)
        run = train(attentions[name], text, plan, seed, device, progress, task)
        record["runs"].append({"model": name, **run})
        records.save(record, path)


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), help="which (default: all)")
    options = parser.parse_args(arguments)
    device, console = records.device_of(options), make_console()
    plan = plan_of(options)
    text = data.load(options.text, least=plan.size.context + 1)
    console.print(f"{text.files} files, {len(text.train):,} bytes to train on, {len(text.held_out):,} held out")
    path = options.out / "language.json"
    record = opened(path, settings_of(plan, text), device, options.resume)
    attentions = {name: ATTENTIONS[name] for name in options.models}
    with track(console, NOTE) as progress:
        measure(record, path, attentions, text, plan, options.seeds, device, progress)
    console.print(report.tabulate_training(record), report.tabulate_weights(record), sep="\n")
    console.print(records.finish(record, report.draw(record), options.out, "language"), soft_wrap=True)
    return record


if __name__ == "__main__":
    main()
