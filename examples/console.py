"""What the examples share: the output folder, figures with their numbers as JSON, and progress in a terminal or a log."""

import argparse
import json
import sys
import time
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend without a window)

EVERY = 20  # seconds between two lines about a task in a log


def add_arguments(parser, device=False, page=True):
    """Add --out and, if wanted, --device and --page."""
    if device:
        parser.add_argument("--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=folder_argument, default=Path(__file__).parent / "out", help="folder of the figures and their JSON"
    )
    if page:
        parser.add_argument("--page", type=page_argument, help="Markdown page to write the table into")


def positive(text):
    """Type of an argument that is an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def device_argument(text):
    """Type of --device: a device that exists here."""
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text} here, take cpu: {str(error).splitlines()[0]}") from None
    return text


def folder_argument(text):
    """Type of --out: a folder, created if it is missing, in which files can be created."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
        (Path(text) / ".writable").touch()
        (Path(text) / ".writable").unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text} ({error.strerror}): name a folder of yours") from None
    return Path(text)


def page_argument(text):
    """Type of --page: a file that exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is no file: name a page such as docs/theory.md")
    return Path(text)


def save(figure, out, name, numbers):
    """Save a figure as <name>.png and its numbers as <name>.json; return a line that says so."""
    figure.savefig(out / f"{name}.png", dpi=150)
    plt.close(figure)
    (out / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return f"Figure: {out / name}.png, its numbers: {out / name}.json"


def make_console():
    """A console as wide as the terminal; 80 columns in a log."""
    return Console() if sys.stdout.isatty() else Console(width=80)


def track(console, *fields):
    """A rich Progress in a terminal, a Log elsewhere. fields: format strings for the right end of a task's line."""
    if not console.is_terminal:
        return Log(console, fields)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, *map(TextColumn, fields), console=console)


class Log:
    """The part of rich.progress.Progress that examples use, as lines: one every 20 seconds and one at the end of a task."""

    def __init__(self, console, fields):
        self.console, self.tasks, self._fields = console, [], fields

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_task(self, name, total, **fields):
        now = time.monotonic()
        self.tasks.append(argparse.Namespace(description=name, total=total, done=0, fields=fields, start=now, told=now))
        return len(self.tasks) - 1

    def advance(self, task, count=1):
        self._report(self.tasks[task], self.tasks[task].done + count)

    def update(self, task, completed=None, **fields):
        self.tasks[task].fields |= fields
        if completed is not None:
            self._report(self.tasks[task], completed)

    def _report(self, task, done):
        task.done, now = done, time.monotonic()
        if done < task.total and now - task.told < EVERY:
            return
        task.told = now
        line = f"{task.description}: {done:,} of {task.total:,}, {now - task.start:.0f} s"
        more = [field.format(task=task) for field in self._fields]
        self.console.print(" ".join((line, *more)), highlight=False, soft_wrap=True)
        sys.stdout.flush()
