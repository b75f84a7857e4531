"""Measure cases into a run: which ones, how long it may take, and each row kept as soon as it is there."""

from dataclasses import replace
from itertools import groupby

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import cases, crossover, fingerprint, overhead, plots, suite, terminal

QUICK, DEFAULT, FULL = "quick", "default", "full"
# Seconds of a provider beside its calls (the oracle, compilation), and how many calls at what multiple of the floor there are.
STARTS = {"cuda": 2.0, "cpu": 1.0}
CALLS = {"cuda": 40, "cpu": 120}


def select(device, level=DEFAULT, names=None, tags=None, providers=None):
    """{room: cases} of the table. Raises ValueError that names the known ones where a name, tag or provider is unknown."""
    found = cases.suite(device)
    known = dict.fromkeys(case.name for chosen in found.values() for case in chosen)
    refuse_unknown("case", names, known)
    refuse_unknown("tag", tags, cases.TAGS)
    refuse_unknown("provider", providers, dict.fromkeys(name for room in found for name in cases.module(room).PROVIDERS))

    def wanted(case):
        by_level = {QUICK: "quick" in case.tags, DEFAULT: "long" not in case.tags, FULL: True}[level]
        by_tag = not tags or set(tags) & set(case.tags)
        return case.name in names if names else by_level and by_tag

    chosen = {room: [with_providers(case, providers) for case in of_room if wanted(case)] for room, of_room in found.items()}
    chosen = {room: [case for case in of_room if case.providers] for room, of_room in chosen.items()}
    if not any(chosen.values()):
        raise ValueError("no case of this device has all of that; `python -m bench list` shows the cases")
    return {room: of_room for room, of_room in chosen.items() if of_room}


def refuse_unknown(kind, given, known):
    if unknown := sorted(set(given or ()) - set(known)):
        raise ValueError(f"unknown {kind} {', '.join(unknown)}; there are {', '.join(known)}")


def with_providers(case, providers):
    kept = tuple(name for name in case.providers if name in providers) if providers else case.providers
    return case if kept == case.providers else replace(case, providers=kept)


def refuse_unfit(case, device):
    """Raise ValueError where the operator cannot serve a case, found out on a few tokens before anything is measured."""
    if case.heads % case.kv_heads:
        raise ValueError(f"{case.heads} query heads are no multiple of {case.kv_heads} key heads")
    few = replace(case, batch=1, length=min(case.length, 16), backward=False)
    try:
        few.prepared(few.inputs(device, few.formula("nearfar")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{case.title}: {error}") from None
    if device.type == "cuda":
        need = 3 * sum(work.bytes for work in case.work(case.formula("nearfar")))
        if need > (memory := torch.cuda.get_device_properties(device).total_memory):
            sizes = f"about {need / 2**30:.0f} GiB, and the device has {memory / 2**30:.0f}"
            raise ValueError(f"{case.title} needs {sizes}: use fewer tokens")


def estimate(chosen, ceilings, device):
    """Seconds that the cases may take: a guess from floors, to tell minutes from hours."""
    total = 0.0
    for case in chosen:
        for name in case.providers:
            floor = sum(work.floor_ms(ceilings) for work in case.work(case.formula(name))[: 1 + case.backward])
            total += STARTS[device.type] + 1e-3 * CALLS[device.type] * floor
    return total


def measure(run, chosen, device, level, console):
    """Measure {room: cases} into the run. Returns whether no provider was wrong and none of ours failed."""
    ceilings, sound = run.data["ceilings"], True
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(len(case.providers) for of_room in chosen.values() for case in of_room))

        def advance(text):
            progress.update(task, description=text)
            progress.advance(task)

        for room, of_room in chosen.items():
            for name, group in groupby(of_room, lambda case: case.name):
                of_name = list(group)
                record = run.record(name, room, fingerprint.of(room))
                kept = {id(row) for row in record["rows"]}
                for row in suite.rows(of_name, device, ceilings, advance, run.done):
                    if id(row) not in kept:
                        record["rows"].append(row)
                        run.save()
                rows = record["rows"]
                record["measures"] = measures_of(name, rows, room, of_name, device, level)
                run.save()
                console.print(terminal.rows_table(rows, device.type == "cuda"))
                if record["measures"]:
                    console.print(terminal.measures_table(record["measures"]))
                sound &= suite.sound(rows)
    return sound


def measures_of(name, rows, room, chosen, device, level):
    """What has a goal beside a baseline, crossover lengths of a sweep, growth of long cases, first call and host time."""
    measures, sweep = suite.relative(rows), name.endswith("-length")
    if sweep:
        measures += crossover.measures(rows)
    long = name.endswith("-million") or (sweep and device.type == "cpu")  # a CPU has no million
    if long and all(case.linear_time for case in chosen):
        measures += suite.scaling(rows)
    timed = [case for case in chosen if case.goal_ms]
    if device.type == "cuda" and timed and level != QUICK:
        measures += overhead.measures(room, timed[0], device)
    return measures


def plot_sweeps(records, path_of):
    """Draw the sweeps of each room; path_of(room) is where to. Returns the paths."""
    paths = []
    for room in dict.fromkeys(record["room"] for record in records):
        rows = [row for record in records if record["room"] == room for row in record["rows"]]
        plotted = [row for row in rows if row["case"]["plotted"] and row["forward"]]
        if plotted:
            paths.append(plots.plot(path_of(room), plotted, records[0]["environment"]))
    return paths
