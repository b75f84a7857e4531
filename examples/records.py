"""What the scripts that write a record share: options, its head, seeds and their spread."""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

import torch
from console import add_arguments, plt, positive

import nearfar as nf

RESULTS = Path(__file__).parent / "results"  # committed records, a folder a device; claims.py reads them


def parser(description: str, gpu: bool = True) -> argparse.ArgumentParser:
    """With the options that these scripts share. gpu: whether there is a size for a GPU."""
    made = argparse.ArgumentParser(description=description)
    if gpu:
        made.add_argument("--gpu", action="store_true", help="the size at which differences show, on a GPU")
    made.add_argument("--seeds", type=positive, default=3, help="how many seeds, from 0 (default: %(default)s)")
    add_arguments(made, page=False)
    return made


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


def save(record: dict, path: Path) -> None:
    """Write whole or not at all: a run that is cut off leaves the record of what was finished before."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(record) + "\n")
    fresh.replace(path)


def finish(record: dict, figure, out: Path, name: str) -> str:
    """Save a record and its figure; return a line that says so."""
    figure.savefig(out / f"{name}.png", dpi=150)
    plt.close(figure)
    save(record, out / f"{name}.json")
    return f"Figure: {out / name}.png, record: {out / name}.json"


def load(name: str) -> dict | None:
    """The committed record of a script, that of a GPU before that of a CPU; None if there is none."""
    found = sorted(RESULTS.glob(f"*/{name}.json"), key=lambda path: path.parent.name == "cpu")
    return json.loads(found[0].read_text()) if found else None


def spread(values, digits: int) -> str:
    """Mean over the seeds, and how far the farthest is from it."""
    values = torch.as_tensor(values, dtype=torch.float64)
    deviation = "" if len(values) == 1 else f" ± {(values - values.mean()).abs().max():.{digits}f}"
    return f"{values.mean():.{digits}f}{deviation}"
