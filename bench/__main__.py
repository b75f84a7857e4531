"""Command line: `python -m bench`, see docs/benchmarks.md."""

import argparse
import collections
import datetime
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from bench import cases, compare, environment, fingerprint, record, report, running, runs, terminal, timing, trace

OUT = Path(__file__).parent / "out"
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(arguments=None):
    args = make_parser().parse_args(arguments)
    # Plain text for a log that is no terminal; 170 columns hold a row.
    console = Console(width=None if sys.stdout.isatty() else 170)
    try:
        return args.command(args, console)
    except (ValueError, OSError, ImportError) as error:
        print(f"python -m bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m bench: stopped", file=sys.stderr)
        return INTERRUPTED


# ---- commands


def list_command(args, console):
    device = torch.device(args.device or this_device())
    chosen = running.select(device, running.FULL, tags=args.tag)
    console.print(terminal.cases_table(chosen))
    return 0


def run_command(args, console):
    device = torch.device(this_device())
    chosen = chosen_cases(args, device)
    path, resumed = run_path(args, device)
    refuse_unwritable(path)
    if device.type == "cpu":
        # Threads wait for one another where cores are shared; one shows the growth with length undisturbed.
        torch.set_num_threads(1)
    env = environment.describe(device)
    run = runs.Run.resume(path, env) if resumed else runs.Run.start(path, env, timing.ceilings(device))
    seconds = running.estimate([case for of_room in chosen.values() for case in of_room], run.data["ceilings"], device)
    console.print(terminal.heading(env, run.data["ceilings"]))
    console.print(f"{rows_of(chosen)} rows in about {terminal.duration(seconds)}, kept in {path} one by one", soft_wrap=True)
    try:
        sound = running.measure(run, chosen, device, args.level, console)
    except KeyboardInterrupt:
        kept = sum(len(found["rows"]) for found in run.data["records"])
        console.print(f"stopped: {kept} rows are in {path}; the same command and --resume --out {path} goes on", soft_wrap=True)
        return INTERRUPTED
    run.finish()
    records = runs.load(path)
    wrote = [path, runs.write_csv(path.with_suffix(".csv"), records)]
    wrote += running.plot_sweeps(records, lambda room: path.with_name(f"{path.stem}-{room}-length.png"))
    console.print("\n".join(f"wrote {name}" for name in wrote), soft_wrap=True)
    return 0 if sound else 1


def compare_command(args, console):
    old, new = runs.load(args.old), runs.load(args.new)
    found = compare.changes(old, new)
    if not found:
        raise ValueError(f"{args.old} and {args.new} have no timed row in common")
    console.print(compare.table(found))
    for text in compare.unlike(old, new):
        console.print(f"[yellow]not alike:[/] {text}")
    failed = compare.failures(found, args.fail_above) if args.fail_above is not None else []
    for change in failed:
        how = "has no time any more" if change.broke else f"takes {change.ratio:.3f} times as long"
        console.print(f"[red]{change.title}, {change.label}, {change.direction} {how}[/]", soft_wrap=True)
    return 1 if failed else 0


def report_command(args, console):
    from bench import page  # plotly, which a machine that only measures may lack

    records = runs.load(args.run)
    refuse_unwritable(args.output)
    args.output.write_text(page.render(records))
    console.print(f"wrote {args.output}", soft_wrap=True)
    return 0


def record_command(args, console):
    folder = report.RESULTS
    paths = record.record(args.run, folder, args.without)
    records = [runs.read(path) for path in paths]
    paths += running.plot_sweeps(records, lambda room: paths[0].with_name(f"{room}-length.png"))
    console.print("\n".join(f"wrote {path}" for path in paths), soft_wrap=True)
    console.print("Now `python -m bench.report` refreshes the pages.")
    return 0


def check_command(args, console):
    disagree = report.main(["--check"])
    records = [(path, runs.read(path)) for path in sorted(report.RESULTS.glob("*/*.json"))]
    states = {path: fingerprint.state(record) for path, record in records}
    for path, (state, why) in states.items():
        if state == fingerprint.STALE:
            console.print(f"{path.parent.name}/{path.name} is stale: {why}; measure it again", soft_wrap=True)
    counts = collections.Counter(state for state, _ in states.values())
    kinds = (fingerprint.CURRENT, fingerprint.STALE, fingerprint.UNKNOWN)
    console.print(f"records: {', '.join(f'{counts[kind]} {kind}' for kind in kinds)}")
    return 1 if disagree or counts[fingerprint.STALE] else 0


def profile_command(args, console):
    device = torch.device(this_device())
    ((room, (case, *_)),) = running.select(device, running.FULL, names=[args.case]).items()
    running.refuse_unknown("provider", [args.provider], cases.module(room).PROVIDERS)
    label, table = trace.kernels(case, args.provider, device)
    console.print(f"{case.name}: {case.title}, {label}")
    print(table)
    return 0


# ---- arguments


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure nearfar against its baselines.",
        epilog="Exit status: 1, a provider disagreed with the float64 oracle, one of nearfar's own failed, or what a command "
               "looks for is there; 2, it was asked for what cannot be done; 130, it was stopped.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=run)
        return sub

    listing = command("list", list_command, "show the cases, whose shapes they are and who competes")
    listing.add_argument("--device", choices=("cpu", "cuda"), help="whose cases (default: this machine's)")
    add_tag(listing)
    add_run_arguments(command("run", run_command, "measure the suite, or single problems of one operator"))

    comparing = command("compare", compare_command, "show what became slower or faster between two runs")
    comparing.add_argument("old", metavar="OLD", type=Path)
    comparing.add_argument("new", metavar="NEW", type=Path, help="files of runs or records, or folders of records")
    comparing.add_argument("--fail-above", metavar="5%", type=percent, help="exit 1 if nearfar became slower by more than that")

    reporting = command("report", report_command, "write an HTML page of a run, one file that needs no network")
    reporting.add_argument("run", metavar="RUN", type=Path, help="file of a run, or folder of records")
    reporting.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: %(default)s")

    recording = command("record", record_command, "keep a GPU's run in bench/results/<gpu>/, for committing")
    recording.add_argument("run", metavar="RUN", type=Path)
    recording.add_argument("--without", metavar="A,B", type=names, default=(), help="providers that may be missing")

    command("check", check_command, "fail if a page disagrees with the records, or a record is stale")

    profiling = command("profile", profile_command, "show the kernels of a case and their times")
    profiling.add_argument("case", metavar="CASE", help="a name of `list`")
    profiling.add_argument("--provider", default="nearfar", help="default: %(default)s")
    return parser


def add_tag(parser):
    parser.add_argument("--tag", metavar="A,B", type=names, help=f"cases with one of these: {', '.join(cases.TAGS)}")


def add_file(parser):
    """Accepted before and after an operator's name."""
    kept = {"default": argparse.SUPPRESS}
    parser.add_argument("--out", metavar="FILE", type=Path, help="of the run (default: bench/out/<time>-<device>.json)", **kept)
    resume = "go on with --out, or with the newest run that was stopped"
    parser.add_argument("--resume", action="store_true", help=resume, **kept)


def add_run_arguments(parser):
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--quick", dest="level", action="store_const", const=running.QUICK, help="the headline cases")
    levels.add_argument("--full", dest="level", action="store_const", const=running.FULL, help="the long ones, too")
    parser.set_defaults(level=running.DEFAULT)
    add_tag(parser)
    parser.add_argument("--cases", metavar="A,B", type=names, help="names of cases to run, whatever their tags")
    parser.add_argument("--only", metavar="A,B", type=names, help="providers to measure (default: all of each case)")
    parser.set_defaults(out=None, resume=False)
    add_file(parser)
    rooms = parser.add_subparsers(dest="room", metavar="OPERATOR", title="single problems of an operator")
    for room, module in cases.rooms().items():
        sub = rooms.add_parser(room, help=module.__doc__.splitlines()[0], description=f"Measure single problems of {room}.")
        add_file(sub)
        sub.add_argument("--shapes", metavar="B,H,N,D", type=shape, nargs="+", required=True, help="one or more shapes")
        sub.add_argument("--kv-heads", metavar="H", type=positive, help="heads of k and v (default: those of q)")
        module.add_arguments(sub)
        sub.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                         help="default: bfloat16 on a GPU, float32 on a CPU")
        sub.add_argument("--backward", action="store_true", help="measure the backward pass too")
        sub.add_argument("--providers", metavar="A,B", type=names, help=f"among {', '.join(module.PROVIDERS)}")


def names(text):
    return tuple(text.split(","))


def positive(text):
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)


def shape(text):
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not batch,heads,tokens,width, as in 1,32,16384,64")
    return tuple(map(int, parts))


def percent(text):
    """The share that a text like 5% or 5 means."""
    try:
        return float(text.removesuffix("%")) / 100
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no percentage, as in 5%") from None


# ---- what to run, and where to keep it


def this_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen_cases(args, device):
    """{room: cases} that the arguments of `run` ask for."""
    if not args.room:
        return running.select(device, args.level, args.cases, args.tag, args.only)
    module = cases.module(args.room)
    running.refuse_unknown("provider", args.providers, module.PROVIDERS)
    chosen = [module.from_arguments(shape, args) for shape in args.shapes]
    for case in chosen:
        running.refuse_unfit(case, device)
    return {args.room: chosen}


def run_path(args, device):
    """(file of the run, whether it is to be resumed)."""
    if args.out and args.out.exists() and not args.resume:
        raise ValueError(f"{args.out} exists: --resume goes on with it, or give another --out")
    if args.resume and args.out:
        return args.out, True
    if args.resume:
        stopped = [path for path in sorted(OUT.glob("*.json"), reverse=True) if runs.read(path).get("finished") is False]
        if not stopped:
            raise ValueError(f"no run in {OUT} was stopped before its end: leave --resume out")
        return stopped[0], True
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return args.out or OUT / f"{stamp}-{environment.short_of(device)}.json", False


def refuse_unwritable(path):
    """Raise ValueError before anything is measured, rather than OSError after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written, {error.strerror}: name another file") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: name another file")


def rows_of(chosen):
    return sum(len(case.providers) for of_room in chosen.values() for case in of_room)


if __name__ == "__main__":
    sys.exit(main())
