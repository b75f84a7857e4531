"""What a figure depends on beside the code: machine and versions."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch
import triton

import nearfar

PACKAGES = ("torch", "triton", "flash-linear-attention", "flash-attn-4", "flash-attn")


def describe(device):
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{cpu_name()}, CPU threads: {torch.get_num_threads()}"
    return {
        "device": name,
        "short_name": short_of(device),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "packages": {package: version(package) for package in PACKAGES} | {"cudnn": torch.backends.cudnn.version()},
        "nearfar": nearfar.__version__,
        # A copy of the sources, whose .git is missing or behind, can say in the environment what it is a copy of.
        "commit": os.environ.get("NEARFAR_COMMIT") or output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version(package):
    """Of an installed package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def short_of(device):
    return short_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"


def short_name(gpu):
    """h100 of "NVIDIA H100 80GB HBM3", a100 of "NVIDIA A100-SXM4-80GB", rtx4090 of "NVIDIA GeForce RTX 4090"."""
    model = re.sub(r"NVIDIA|GeForce|Tesla", "", gpu).strip()
    return re.match(r"(?:[GR]TX )?[A-Za-z0-9]+", model)[0].replace(" ", "").lower()


def cpu_name():
    """The model of /proc/cpuinfo where there is one."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return model[1] if model else platform.machine()


def output(*command):
    """First line of a command's output, None where it does not work."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None
