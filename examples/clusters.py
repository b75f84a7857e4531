"""Clusters or consensus: particles on a circle and on a sphere that attend to one another (arXiv 2602.11534).

Krause attention lets a token see near tokens only, as opinions with bounded confidence do; softmax attention lets it see all.
With q = k = v = x, `nf.theory.krause_particles` moves particles by either. On the sphere both weigh by distance in the same
way, so the bound alone makes the difference. How many clusters are left, for bounds from a quarter of the radius to none?

    python examples/clusters.py

Needs `pip install '.[examples]'`; takes about a minute on one CPU core, and there is no larger size. A plot and a record go to
examples/out/.
"""

import records
import torch
import torch.nn.functional as F
from console import make_console, plt, positive, track
from rich.table import Table

import nearfar as nf

SURFACES = {"circle": 2, "sphere": 3}
BOUNDS = 0.25, 0.5, 0.75, 1.0, 1.5, None
SIGMA, STEP_SIZE = 0.5, 0.1
APART = 0.01  # particles that a chain of such steps connects are one cluster


def start(width, count, seeds):
    """(seeds, count, width) points, uniform on the unit sphere."""
    draws = [torch.randn(count, width, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(seeds)]
    return F.normalize(torch.stack(draws), dim=-1)


def flows(count, steps, seeds, progress):
    """(surface, bound) -> KrauseParticles of all seeds."""
    found = {}
    for surface, width in SURFACES.items():
        task = progress.add_task(surface, total=len(BOUNDS))
        for bound in BOUNDS:
            found[surface, bound] = nf.theory.krause_particles(
                start(width, count, seeds), nf.theory.log_spaced(steps, 60), sigma=SIGMA, radius=bound, step_size=STEP_SIZE
            )
            progress.advance(task)
    return found


def name_of(bound):
    return "softmax: no bound" if bound is None else f"bound {bound:g}"


def tabulate(record: dict) -> Table:
    setting = record["settings"]
    seeds = len(record["runs"][0]["clusters"])
    table = Table(
        title=f"Clusters of {setting['particles']} particles after {setting['steps']:,} steps of {STEP_SIZE}, sigma {SIGMA}: "
        f"means over {seeds} seeds ± the largest deviation"
    )
    table.add_column("distance within which a particle sees others", no_wrap=True)
    for surface in SURFACES:
        table.add_column(surface, justify="right")
    for bound in BOUNDS:
        counts = ([run["clusters"] for run in record["runs"] if (run["surface"], run["bound"]) == (s, bound)] for s in SURFACES)
        table.add_row(name_of(bound), *(records.spread(of_surface[0], 1) for of_surface in counts))
    return table


def draw(found, record):
    """Angles on the circle of one seed with and without a bound, and clusters by bound."""
    figure, (bounded, free, counts) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, bound in ((bounded, 0.5), (free, None)):
        flow = found["circle", bound]
        angles = torch.atan2(*flow.x[:, 0].unbind(-1)[::-1])
        axes.plot(flow.steps.clamp_min(0.5), angles, ".", color="C0" if bound else "C3", markersize=2)
        axes.set(title=f"circle, {name_of(bound)}: angles", xlabel="step", xscale="log", ylim=(-3.3, 3.3))
    for surface in SURFACES:
        runs = [run for run in record["runs"] if run["surface"] == surface]
        counts.plot(
            range(len(BOUNDS)), [sum(run["clusters"]) / len(run["clusters"]) for run in runs], "o-", label=surface
        )
    counts.set_xticks(range(len(BOUNDS)), ["none" if bound is None else f"{bound:g}" for bound in BOUNDS])
    counts.set(title="clusters left, mean over seeds", xlabel="bound", ylim=(0, None))
    counts.legend(frameon=False)
    return figure


def main(arguments=None):
    parser = records.parser(__doc__.splitlines()[0], gpu=False)
    parser.add_argument("--steps", type=positive, default=3000, help="of the flows (default: %(default)s)")
    parser.add_argument("--particles", type=positive, default=64, help="of each flow (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = make_console()
    with track(console) as progress:
        found = flows(options.particles, options.steps, options.seeds, progress)
    record = {
        "environment": records.environment(torch.device("cpu")),
        "settings": {"particles": options.particles, "steps": options.steps},
        "runs": [
            {"surface": surface, "bound": bound, "clusters": nf.theory.count_clusters(flow.x[-1], APART).tolist()}
            for (surface, bound), flow in found.items()
        ],
    }
    console.print(tabulate(record))
    console.print(records.finish(record, draw(found, record), options.out, "clusters"), soft_wrap=True)
    return record


if __name__ == "__main__":
    main()
