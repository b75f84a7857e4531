"""Command line: `python -m bench` for the suite, `python -m bench <operator> --shapes ...` for single problems."""

import argparse
import sys
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import cases, crossover, environment, overhead, report, suite, timing

OUT = Path(__file__).parent / "out"


def main(arguments=None):
    parser = make_parser()
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.record and device.type == "cpu":
        parser.error("--record keeps results of a GPU, and there is none here")
    if device.type == "cpu":
        # Threads wait for one another where cores are shared; one shows the growth with length undisturbed.
        torch.set_num_threads(1)
    # Plain text for a log that is no terminal; 170 columns hold a row.
    console = Console(width=None if sys.stdout.isatty() else 170)
    env = environment.describe(device)
    folder = report.RESULTS / env["short_name"] if args.record else OUT
    console.print(f"{env['device']}, torch {env['torch']}, nearfar {env['nearfar']} ({env['commit'] or 'no commit'})")
    ceilings = timing.ceilings(device)
    console.print(
        f"ceilings: copy {ceilings['bytes_per_s'] / 1e12:.3g} TB/s, matmul {ceilings['flops_per_s'] / 1e12:.3g} TFLOP/s"
    )

    ok = True
    for room, chosen in chosen_cases(args, device, parser).items():
        plotted = []
        for name, group in groupby(chosen, lambda case: case.name):  # written one by one: a run that is cut short keeps some
            cases_of_name = list(group)
            rows = run(cases_of_name, device, ceilings, console)
            console.print(report.rows_table(rows))
            measures = measures_of(name, rows, room, cases_of_name, device)
            if measures:
                console.print(report.measures_table(measures))
            record = {"name": name, "room": room, "environment": env, "ceilings": ceilings, "rows": rows, "measures": measures}
            console.print(f"wrote {report.write_json(folder, record)}", soft_wrap=True)
            plotted += [row for row in rows if row["case"]["plotted"] and row["forward"]]
            ok &= suite.sound(rows)
        if plotted:
            console.print(f"wrote {report.plot(folder / f'{room}-length.png', plotted, env)}", soft_wrap=True)
    return 0 if ok else 1


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure nearfar against its baselines: the whole suite, or single problems of one operator.",
        epilog="Exit status 1: a provider disagreed with the float64 oracle, or one of nearfar's own failed.",
    )
    parser.add_argument("--cases", metavar="A,B", type=names, help="names of cases to run (default: all of the suite)")
    record = "write to bench/results/<gpu>/, for committing, instead of bench/out/"
    parser.add_argument("--record", action="store_true", help=record)
    rooms = parser.add_subparsers(dest="room", metavar="OPERATOR", title="single problems of an operator")
    for room, module in cases.rooms().items():
        sub = rooms.add_parser(room, help=first_line(module), description=f"Measure single problems of {room}.")
        sub.add_argument("--shapes", metavar="B,H,N,D", type=shape, nargs="+", required=True, help="one or more shapes")
        sub.add_argument("--kv-heads", metavar="H", type=int, help="heads of k and v (default: those of q)")
        module.add_arguments(sub)
        sub.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                         help="default: bfloat16 on a GPU, float32 on a CPU")
        sub.add_argument("--backward", action="store_true", help="measure the backward pass too")
        sub.add_argument("--providers", metavar="A,B", type=names, help=f"among {', '.join(module.PROVIDERS)}")
        sub.add_argument("--record", action="store_true", default=argparse.SUPPRESS, help=record)
    return parser


def first_line(module):
    return module.__doc__.splitlines()[0]


def names(text):
    return tuple(text.split(","))


def shape(text):
    batch, heads, length, width = (int(part) for part in text.split(","))
    return batch, heads, length, width


def chosen_cases(args, device, parser):
    """{room: cases} that the arguments ask for."""
    if args.room:
        module = cases.module(args.room)
        if unknown := set(args.providers or ()) - set(module.PROVIDERS):
            parser.error(f"unknown providers {', '.join(sorted(unknown))}; there are {', '.join(module.PROVIDERS)}")
        return {args.room: [module.from_arguments(shape, args) for shape in args.shapes]}
    found = {room: module.suite(device) for room, module in cases.rooms().items()}
    known = dict.fromkeys(case.name for suite_cases in found.values() for case in suite_cases)
    if unknown := set(args.cases or ()) - set(known):
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; on this device there are {', '.join(known)}")
    wanted = args.cases or known
    kept = {room: [case for case in suite_cases if case.name in wanted] for room, suite_cases in found.items()}
    return {room: suite_cases for room, suite_cases in kept.items() if suite_cases}


def run(chosen, device, ceilings, console):
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(len(case.providers) for case in chosen))

        def advance(text):
            progress.update(task, description=text)
            progress.advance(task)

        return suite.run(chosen, device, ceilings, advance)


def measures_of(name, rows, room, chosen, device):
    """What has a goal beside a baseline, crossover lengths of a sweep, growth of long cases, first call and host time."""
    measures, sweep = suite.relative(rows), name.endswith("-length")
    if sweep:
        measures += crossover.measures(rows)
    long = name.endswith("-million") or (sweep and device.type == "cpu")  # a CPU has no million
    if long and all(case.linear_time for case in chosen):
        measures += suite.scaling(rows)
    timed = [case for case in chosen if case.goal_ms]
    if device.type == "cuda" and timed:
        measures += overhead.measures(room, timed[0], device)
    return measures


if __name__ == "__main__":
    sys.exit(main())
