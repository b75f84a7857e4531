"""How well do linear and Hadamard attention (arXiv 2602.12128) approximate a softmax layer, at equal numbers a token?

The teacher is a layer of causal softmax attention with random projections of random tokens. A student sees the same tokens and
values, and learns projections of its own for q and k: one factor of `width` numbers a token, or two factors of half of that.
Both store the same numbers a token; the products of two factors make (width / 2)^2 features of them, where one factor has
width. What counts is the squared error of new tokens relative to the squared output of the teacher.

    python examples/approximate_softmax.py
    python examples/approximate_softmax.py --gpu

Needs `pip install '.[examples]'`; the small size takes a few minutes on one CPU core. A plot and a record go to examples/out/.
The set-up is ours: neither the paper's text nor the set-up behind the figures that the table quotes was at hand.
"""

import records
import torch
from console import make_console, plt, positive, track
from rich.table import Table
from torch import nn

import nearfar as nf

WIDTHS = 16, 32, 64  # numbers a token and head of q, and as many of k
FACTORS = 1, 2
SHARPNESS = 2.0  # standard deviation of the teacher's scores; at 0 every weight would be equal, and any student exact
LEARNING_RATE = 3e-3

# An earlier check, of which only these numbers are left: (width, factors) -> relative squared error.
EARLIER_CHECK = {(16, 1): 0.826, (32, 1): 0.792, (64, 1): 0.760, (16, 2): 0.797, (32, 2): 0.723, (64, 2): 0.650}

CPU = {"dim": 64, "heads": 2, "context": 64, "batch": 4, "steps": 300}
GPU = {"dim": 256, "heads": 4, "context": 512, "batch": 16, "steps": 2000}


class Teacher:
    """Causal softmax attention of x (B, N, dim), with scores of standard deviation SHARPNESS, and heads dim / heads wide."""

    def __init__(self, setting: dict, generator: torch.Generator):
        dim, self.heads = setting["dim"], setting["heads"]
        self.q, self.k, self.v = (
            torch.randn(dim, dim, generator=generator, device=generator.device) * dim**-0.5 for _ in range(3)
        )

    def split(self, y):
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def __call__(self, x):
        """(its outputs, its values), each (B, H, N, D)."""
        q, k, v = (self.split(x @ w) for w in (self.q, self.k, self.v))
        return nf.softmax_attention(q, k, v, causal=True, scale=SHARPNESS * q.shape[-1] ** -0.5), v


class Student(nn.Module):
    """Weights of `factors` factors for values that are given; features elu + 1."""

    def __init__(self, setting: dict, width: int, factors: int):
        super().__init__()
        self.heads, self.factors = setting["heads"], factors
        self.q_proj, self.k_proj = (nn.Linear(setting["dim"], self.heads * width) for _ in range(2))

    def forward(self, x, v):
        q, k = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj))
        return nf.hadamard_attention(q.chunk(self.factors, -1), k.chunk(self.factors, -1), v, causal=True)


def relative_error(student, teacher, x):
    target, v = teacher(x)
    return (student(x, v) - target).square().sum() / target.square().sum()


def fit(setting, width, factors, seed, device, progress, task) -> float:
    """Relative squared error on tokens that no step has seen. Students of a seed have one teacher and see the same tokens."""
    generator = torch.Generator(device).manual_seed(seed)
    teacher = Teacher(setting, generator)
    torch.manual_seed(seed)
    student = Student(setting, width, factors).to(device)
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting["steps"])

    def tokens(batch):
        return torch.randn(batch, setting["context"], setting["dim"], generator=generator, device=device)

    for _ in range(setting["steps"]):
        loss = relative_error(student, teacher, tokens(setting["batch"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.advance(task)
    with torch.no_grad():
        return relative_error(student, teacher, tokens(4 * setting["batch"])).item()


def tabulate(record: dict) -> Table:
    setting, runs = record["settings"], record["runs"]
    table = Table(
        title=f"Relative squared error after {setting['steps']} steps of {setting['batch']} x {setting['context']} tokens "
        f"{setting['dim']} wide, {setting['heads']} heads, {record['environment']['device']}: means over "
        f"{len({run['seed'] for run in runs})} seeds ± the largest deviation",
        caption="Earlier check: its set-up is not known.",
    )
    for column in ("numbers a token", "one factor", "two factors", "ratio", "earlier check, one", "earlier check, two"):
        table.add_column(column, justify="right")
    for width in WIDTHS:
        one, two = (
            torch.tensor([run["error"] for run in runs if (run["width"], run["factors"]) == (width, factors)])
            for factors in FACTORS
        )
        earlier = (f"{EARLIER_CHECK[width, factors]:.3f}" for factors in FACTORS)
        table.add_row(str(width), spread3(one), spread3(two), spread3(two / one), *earlier)
    return table


def spread3(values) -> str:
    return records.spread(values, 3)


def draw(record: dict):
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for factors, name in zip(FACTORS, ("linear: one factor", "Hadamard: two factors"), strict=True):
        runs = [run for run in record["runs"] if run["factors"] == factors]
        axes.plot([run["width"] for run in runs], [run["error"] for run in runs], "o", color=f"C{factors}", alpha=0.6)
        means = [torch.tensor([run["error"] for run in runs if run["width"] == width]).mean() for width in WIDTHS]
        axes.plot(WIDTHS, means, color=f"C{factors}", label=name)
    axes.set(xscale="log", xlabel="numbers a token and head, of q and of k", ylabel="relative squared error")
    axes.set_xticks(WIDTHS, WIDTHS, minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def main(arguments=None):
    parser = records.parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, help="of each student (default: 300, with --gpu 2,000)")
    options = parser.parse_args(arguments)
    device, console = records.device_of(options), make_console()
    setting = dict(GPU if options.gpu else CPU)
    setting["steps"] = options.steps or setting["steps"]
    record = {"environment": records.environment(device), "settings": setting, "runs": []}
    path = options.out / "approximate_softmax.json"
    cases = [(seed, width, factors) for seed in range(options.seeds) for width in WIDTHS for factors in FACTORS]
    with track(console, "{task.fields[error]}") as progress:
        for seed, width, factors in cases:
            task = progress.add_task(f"{factors} x {width // factors} numbers, seed {seed}", total=setting["steps"], error="")
            error = fit(setting, width, factors, seed, device, progress, task)
            progress.update(task, error=f"{error:.3f}")
            record["runs"].append({"seed": seed, "width": width, "factors": factors, "error": error})
            records.save(record, path)
    console.print(tabulate(record))
    console.print(records.finish(record, draw(record), options.out, "approximate_softmax"), soft_wrap=True)
    return record


if __name__ == "__main__":
    main()
