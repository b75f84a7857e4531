"""Train a small softmax transformer on scikit-learn's digits and watch what its attention heads do, before and after.

The model is the softmax one of train_digits.py: it reads 8x8 digits pixel by pixel. What is watched: entropy, sinks, how well
the top_n keys of a query stand apart, and the regime of every head (arXiv 2603.06248, 2602.01893), over held-out digits.

    python examples/watch_attention.py
    python examples/watch_attention.py --steps 1000 --top-n 8

Needs `pip install '.[examples]'`; takes about a minute on two CPU cores. Tables go to the terminal, pictures to examples/out/.
"""

import argparse
from pathlib import Path

import torch
import train_digits
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--images", type=int, default=16, help="held-out digits to watch (default: %(default)s)")
    parser.add_argument("--top-n", type=int, default=4, help="keys that a query selects (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the pictures")
    options = parser.parse_args(arguments)
    console = Console()
    images, held_out = train_digits.load_images(torch.device(options.device))
    held_out = held_out[: options.images]

    torch.manual_seed(options.seed)
    untrained = train_digits.PixelTransformer(train_digits.SoftmaxAttention).to(options.device)
    results = {"untrained": watched(untrained, held_out, options.top_n)}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[loss]:.3f} bits/pixel"), console=console) as progress:
        model, losses, *_ = train_digits.train(
            train_digits.SoftmaxAttention, images, options.steps, options.seed, progress, "softmax"
        )
    results["trained"] = watched(model, held_out, options.top_n)

    options.out.mkdir(parents=True, exist_ok=True)
    for name, found in results.items():
        path = options.out / f"heads-{name}.png"
        nf.diagnostics.plot(found, path)
        console.print(f"\n{name}, {len(held_out)} held-out digits of {train_digits.PIXELS} tokens; picture: {path}")
        console.print(str(found), soft_wrap=True, highlight=False)
    return results, losses


if __name__ == "__main__":
    main()
