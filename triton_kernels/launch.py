"""How kernels are launched: parameters from the committed table launch.json, and launches prepared once per signature."""

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
    maxnreg: int | None = None


@functools.cache
def table():
    """{kernel: {"16-bit" or "32-bit": {padded head width: the fields of LaunchParameters}}}."""
    return json.loads(TABLE.read_text())


def write_table(new):
    """Write the table with one line for each kernel and element size."""
    kernels = []
    for kernel, sizes in new.items():
        lines = ",\n".join(f'    "{size}": {json.dumps(widths)}' for size, widths in sizes.items())
        kernels.append(f'  "{kernel}": {{\n{lines}\n  }}')
    TABLE.write_text("{\n" + ",\n".join(kernels) + "\n}\n")


@functools.cache
def launch_parameters(kernel, width, itemsize):
    """Tile sizes, warps, stages and register limit of a kernel. Nothing is tuned at run time: `python -m nearfar.tune` is.

    Args:
        kernel: name of the kernel in the table.
        width: the larger of the padded widths of q and v; the table's next larger entry serves it.
        itemsize: bytes of an input element.
    """
    widths = table()[kernel][f"{8 * itemsize}-bit"]
    return LaunchParameters(*widths[str(min(int(w) for w in widths if int(w) >= width))])


def width_block(width):
    """Tile width that holds a head width: a power of two of at least 16, as tl.dot needs."""
    return max(16, triton.next_power_of_2(width))


def dot_precision(dtype):
    """float32 products are exact unless the user allowed tf32, by the switch that torch obeys."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


class Launch:
    """A kernel launch with everything fixed but its tensors.

    Triton's own launch looks every argument over to find the compiled kernel, which takes longer than the launch itself.
    All that it looks at but pointer alignment is the same in every call of one Launch, so from the second call on the
    compiled kernel is called directly. A tensor that is not 16-byte aligned takes Triton's way.
    """

    def __init__(self, kernel, programs, scalars, parameters):
        self._launch = kernel[(programs, 1, 1)]
        self._grid = (programs, 1, 1)
        self._scalars = scalars
        self._options = {"num_warps": parameters.num_warps, "num_stages": parameters.num_stages}
        if parameters.maxnreg is not None:
            self._options["maxnreg"] = parameters.maxnreg
        self._direct = None

    def __call__(self, *tensors):
        for tensor in tensors:
            if tensor is not None and tensor.data_ptr() % 16:
                self._launch(*tensors, *self._scalars, **self._options)
                return
        if self._direct is not None:
            self._direct(*tensors, *self._scalars)
            return
        compiled = self._launch(*tensors, *self._scalars, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._direct = compiled[self._grid]
