"""Launch parameters from the committed table launch.json; nothing is tuned at run time (see `python -m nearfar.tune`)."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
import triton

TABLE = Path(__file__).with_name("launch.json")


class LaunchParameters(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.cache
def _table():
    return json.loads(TABLE.read_text())


@functools.cache
def launch_parameters(kernel, width, itemsize):
    """Tile sizes, warps and stages of a kernel.

    Args:
        kernel: name of the kernel in the table.
        width: the larger of the padded widths of q and v; the table's next larger entry serves it.
        itemsize: bytes of an input element.
    """
    widths = _table()[kernel][f"{8 * itemsize}-bit"]
    return LaunchParameters(*widths[str(min(int(w) for w in widths if int(w) >= width))])


@functools.cache
def width_block(width):
    """Tile width that holds a head width: a power of two of at least 16, as tl.dot needs."""
    return max(16, triton.next_power_of_2(width))


def dot_precision(dtype):
    """float32 products are exact unless the user allowed tf32, the same switch that torch obeys."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
