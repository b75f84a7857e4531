"""Train a small softmax transformer on scikit-learn's digits and watch what its attention heads do, before and after.

The model is the softmax one of train_digits.py: it reads 8x8 digits pixel by pixel. What is watched: entropy, sinks, how well
the top_n keys of a query stand apart, and the regime of every head (arXiv 2603.06248, 2602.01893), over held-out digits.

    python examples/watch_attention.py
    python examples/watch_attention.py --steps 1000 --top-n 8

Needs `pip install '.[examples]'`; takes about a minute on two CPU cores. Tables go to the terminal, pictures to examples/out/.
"""

import argparse

import torch
import train_digits
from console import add_arguments, make_console, positive, save, track
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch.nn.functional import pad

import nearfar as nf


@torch.no_grad()
def watched(model, images, top_n):
    """What the heads of the model do while it reads the images."""
    model.eval()
    tokens = pad(images[:, :-1], (1, 0), value=train_digits.START)
    with nf.diagnostics.watch(model, top_n=top_n) as found:
        model(tokens)
    return found


COLUMNS = {
    "entropy": "entropy", "effective_support": "support", "sink_mass": "sink", "precision": "precision", "recall": "recall",
    "f_score": "F", "control_f_score": "F, random", "regime": "regime",
}


def tabulate(found, title):
    """The quantities of every head; str(found) has more of them, in longer lines."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0))  # fits 80 columns
    table.add_column("head", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for row in found.table():
        cells = (row[name] if name == "regime" else f"{row[name]:.3f}" for name in COLUMNS)
        table.add_row(f"{row['layer'].removeprefix('blocks.').removesuffix('.attention')}.{row['head']}", *cells)
    return table


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=16, help="held-out digits to watch (default: %(default)s)")
    parser.add_argument("--top-n", type=positive, default=4, help="keys that a query selects (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    add_arguments(parser, device=True, page=False)
    options = parser.parse_args(arguments)
    console = make_console()
    images, held_out = train_digits.load_images(torch.device(options.device))
    held_out = held_out[: options.images]

    torch.manual_seed(options.seed)
    untrained = train_digits.PixelTransformer(train_digits.SoftmaxAttention).to(options.device)
    results = {"untrained": watched(untrained, held_out, options.top_n)}
    with track(console, train_digits.LOSS) as progress:
        model, losses, *_ = train_digits.train(
            train_digits.SoftmaxAttention, images, options.steps, options.seed, progress, "softmax"
        )
    results["trained"] = watched(model, held_out, options.top_n)

    for name, found in results.items():
        figure = nf.diagnostics.plot(found)
        title = f"{name}, {len(held_out)} held-out digits of {train_digits.PIXELS} tokens"
        figure.suptitle(f"{figure.get_suptitle()}\n{title}")
        console.print(tabulate(found, f"{title}; heads are layer.head"))
        console.print(save(figure, options.out, f"heads-{name}", found.table()), soft_wrap=True)
    return results, losses


if __name__ == "__main__":
    main()
