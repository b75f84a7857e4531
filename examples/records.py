"""What the scripts that write JSON share: options, the record's head, seeds and their spread, and progress bars."""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import nearfar as nf

RESULTS = Path(__file__).parent / "results"  # committed records, a folder a device; claims.py reads them


def parser(description: str, gpu: bool = True) -> argparse.ArgumentParser:
    """With the options that these scripts share. gpu: whether there is a size for a GPU."""
    made = argparse.ArgumentParser(description=description)
    if gpu:
        made.add_argument("--gpu", action="store_true", help="the size at which differences show, on a GPU")
    made.add_argument("--seeds", type=at_least(1), default=3, help="how many seeds, from 0 (default: %(default)s)")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the plot and the JSON")
    return made


def at_least(least: int):
    """A type for argparse: an int that is not smaller."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return number


def device_of(options: argparse.Namespace) -> torch.device:
    """The GPU for --gpu, else the CPU; exits with one line where there is none."""
    if options.gpu and not torch.cuda.is_available():
        raise SystemExit("--gpu needs a CUDA device, and torch finds none; leave it out for the small size on the CPU")
    return torch.device("cuda" if options.gpu else "cpu")


def environment(device: torch.device) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "nearfar": nf.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("NEARFAR_COMMIT", ""),
        "date": datetime.date.today().isoformat(),
    }


def progress(console, unit: str = "") -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, TextColumn("{task.fields[note]}" + unit), console=console)


def save(record: dict, path: Path) -> None:
    """Write whole or not at all: a run that is cut off leaves the record of what was finished before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(record) + "\n")
    fresh.replace(path)


def load(name: str) -> dict | None:
    """The committed record of a script, that of a GPU before that of a CPU; None if there is none."""
    found = sorted(RESULTS.glob(f"*/{name}.json"), key=lambda path: path.parent.name == "cpu")
    return json.loads(found[0].read_text()) if found else None


def spread(values, digits: int) -> str:
    """Mean over the seeds, and how far the farthest is from it."""
    values = torch.as_tensor(values, dtype=torch.float64)
    deviation = "" if len(values) == 1 else f" ± {(values - values.mean()).abs().max():.{digits}f}"
    return f"{values.mean():.{digits}f}{deviation}"
