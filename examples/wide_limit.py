"""Does a network on linearized attention approach its wide limit (arXiv 2603.13085)? The distance |f_m - f_NTK| by width.

Networks of m random ReLU units learn by gradient descent whether a digit of scikit-learn's is odd: from pixels, from pixels
scaled to norm 1, and from the scaled rows of X X^T X. f_NTK is what descent for as many steps gives with the kernel of
infinitely many units, in closed form. The distance is that of predictions for held-out digits, divided by the size of f_NTK.

    python examples/wide_limit.py
    python examples/wide_limit.py --gpu

Needs `pip install '.[examples]'`; the small size takes about a minute on one CPU core. A plot and a record go to
examples/out/. The paper's definition of f_m was not at hand: network, step size and number of steps are ours.
"""

import math

import records
import torch
import torch.nn.functional as F
from console import make_console, plt, positive, track
from rich.table import Table
from sklearn.datasets import load_digits

from nearfar.theory.malleability import FEATURES

NAMES = {"rows": "pixels", "unit_rows": "unit pixels", "attention": "attention"}
CPU = {"widths": [16, 64, 256, 1024, 4096], "steps": 100, "points": 200, "held_out": 200}
GPU = {"widths": [16, 64, 256, 1024, 4096, 16384, 65536], "steps": 2000, "points": 600, "held_out": 400}


def load_points(setting, seed, device):
    """x, y, x_test: pixels in [0, 1], and -1 or 1 for even and odd digits."""
    digits = load_digits()
    chosen = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(seed))
    x = torch.as_tensor(digits.data, device=device)[chosen.to(device)] / 16
    y = 2 * torch.as_tensor(digits.target % 2, device=device)[chosen.to(device)].to(x.dtype) - 1
    points, end = setting["points"], setting["points"] + setting["held_out"]
    return x[:points], y[:points], x[points:end]


def limit_kernel(q, x):
    """Tangent kernel of infinitely many units, (q . x) (pi - angle(q, x)) / (2 pi)."""
    products = q @ x.mT
    cosines = products / (q.norm(dim=-1)[:, None] * x.norm(dim=-1))
    return products * (math.pi - cosines.clamp(-1, 1).acos()) / (2 * math.pi)


def limit_prediction(x, y, x_test, steps):
    """(f_NTK of x_test, the step size 1 / (largest eigenvalue of the kernel))."""
    values, vectors = torch.linalg.eigh(limit_kernel(x, x))
    values = values.clamp_min(0)
    rate = 1 / values[-1]
    # sum_{s < steps} rate (1 - rate lambda)^s, which is steps * rate at lambda = 0
    tiny = rate * values < 1e-12
    sums = torch.where(tiny, steps * rate, (1 - (1 - rate * values) ** steps) / values.masked_fill(tiny, 1))
    return limit_kernel(x_test, x) @ (vectors @ (sums * (vectors.mT @ y))), rate


def network_prediction(x, y, x_test, width, steps, rate, generator):
    """f_m of x_test less its value before training, after full-batch descent on the first layer; the second is fixed signs."""
    w = torch.randn(width, x.shape[1], generator=generator, dtype=x.dtype, device=x.device)
    signs = torch.randint(2, (width,), generator=generator, device=x.device) * 2.0 - 1
    out = (signs / math.sqrt(width)).to(x.dtype)
    before_train, before_test = (x @ w.mT).relu() @ out, (x_test @ w.mT).relu() @ out
    for _ in range(steps):
        units = x @ w.mT
        residual = units.relu() @ out - before_train - y
        w -= rate * ((units > 0).to(x.dtype) * out * residual[:, None]).mT @ x
    return (x_test @ w.mT).relu() @ out - before_test


def measure(setting, seeds, device, progress):
    """One dict for each seed, feature and width."""
    runs = []
    for seed in range(seeds):
        x, y, x_test = load_points(setting, seed, device)
        for name, feature in FEATURES.items():
            # Of equal mean size, so that one step size means the same to all.
            task = progress.add_task(f"{NAMES[name]}, seed {seed}", total=len(setting["widths"]))
            train, test = feature(x, x), feature(x_test, x)
            size = train.norm(dim=-1).mean()
            limit, rate = limit_prediction(train / size, y, test / size, setting["steps"])
            for width in setting["widths"]:
                generator = torch.Generator(device).manual_seed(seed)
                found = network_prediction(train / size, y, test / size, width, setting["steps"], rate, generator)
                distance = (F.mse_loss(found, limit) / limit.square().mean()).sqrt().item()
                runs.append({"seed": seed, "features": name, "width": width, "distance": distance})
                progress.advance(task)
    return runs


def distances(record, features, width):
    return [run["distance"] for run in record["runs"] if (run["features"], run["width"]) == (features, width)]


def tabulate(record: dict) -> Table:
    setting = record["settings"]
    seeds = len({run["seed"] for run in record["runs"]})
    table = Table(
        title=f"Relative distance |f_m - f_NTK| / |f_NTK| after {setting['steps']:,} steps on {setting['points']} digits, "
        f"{record['environment']['device']}: means over {seeds} seeds ± the largest deviation"
    )
    table.add_column("units", justify="right")
    for name in NAMES.values():
        table.add_column(name, justify="right")
    for width in setting["widths"]:
        table.add_row(f"{width:,}", *(records.spread(distances(record, features, width), 3) for features in NAMES))
    return table


def draw(record: dict):
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    widths = record["settings"]["widths"]
    for color, (features, name) in zip(("C0", "C2", "C1"), NAMES.items(), strict=True):
        values = torch.tensor([distances(record, features, width) for width in widths])
        axes.loglog(widths, values.mean(1), "o-", color=color, label=name)
        axes.fill_between(widths, values.amin(1), values.amax(1), color=color, alpha=0.15, linewidth=0)
    axes.loglog(widths, [(widths[0] / width) ** 0.5 for width in widths], "k:", label="slope of width^-1/2")
    axes.set(xlabel="units", ylabel="|f_m - f_NTK| / |f_NTK|")
    axes.legend(frameon=False)
    return figure


def main(arguments=None):
    parser = records.parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, help="of descent (default: 100, with --gpu 2,000)")
    options = parser.parse_args(arguments)
    device, console = records.device_of(options), make_console()
    setting = dict(GPU if options.gpu else CPU)
    setting["steps"] = options.steps or setting["steps"]
    with track(console) as progress:
        runs = measure(setting, options.seeds, device, progress)
    record = {"environment": records.environment(device), "settings": setting, "runs": runs}
    console.print(tabulate(record))
    console.print(records.finish(record, draw(record), options.out, "wide_limit"), soft_wrap=True)
    return record


if __name__ == "__main__":
    main()
