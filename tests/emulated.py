"""The kernels of csrc/ without a GPU: their sources, compiled by g++ against tests/emulation.

What the emulation checks besides the results, and what it cannot see, is in CONTRIBUTING.md.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from harness import GRADIENTS, LAYOUTS, MISALIGNED, Sample, randn

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests/emulation"


def strides(*names, dimensions=3):
    return [(f"{name}_strides", dimensions * ctypes.c_int64) for name in names]


def fields(kind, names):
    return [(name, kind) for name in names.split()]


def find_nvcc():
    """As setup.py does."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


# -fno-extern-tls-init: shared memory is thread_local to g++ (device.h says why), but nothing has to be initialised.
OPTIONS = """-fPIC -fvisibility=hidden -fno-strict-aliasing -fno-extern-tls-init
             -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-parentheses""".split()


def build(folder, **functions):
    """Functions of the emulated kernels by name, for each source in tests/emulation the names of its functions."""
    if find_nvcc() is None:
        pytest.skip("no nvcc in CUDA_HOME or on PATH, beside which CUDA's headers are")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    sources = shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("ptx.cuh", "hopper.cuh"):
        shutil.copy(EMULATION / name, sources / "common" / name)
    # nvcc hands C++ to g++, with the path of its headers.
    command = [find_nvcc(), "-x", "c++", "-std=c++17", "-O1", "-shared", "-cudart", "none", f"-Xcompiler={','.join(OPTIONS)}"]
    command += [f"-I{sources}", f"-I{EMULATION}"]
    compilers = [subprocess.Popen([*command, f"{EMULATION}/{name}.cpp", "-o", f"{folder}/{name}.so"]) for name in functions]
    assert not any([compiler.wait() for compiler in compilers])
    found = {name: getattr(ctypes.CDLL(f"{folder}/{source}.so"), name) for source in functions for name in functions[source]}
    for function in found.values():
        function.restype = ctypes.c_char_p
    return found


class Conditions(NamedTuple):
    """What should not matter."""

    device: int = 2  # of device + 1 multiprocessors: the fewer, the more tiles are in a strip
    late_copies: bool = False
    seed: int = 0


class Guarded:
    """Tensors amid numbers that nobody may use or change; those to be filled are full of such numbers themselves."""

    MARGIN = 256

    def __init__(self, poison):
        self.poison, self.buffers = poison, []

    def empty(self, shape, dtype):
        size = torch.Size(shape).numel()
        poison = float("nan") if dtype.is_floating_point else self.poison
        buffer = torch.full((size + 2 * self.MARGIN,), poison, dtype=dtype)
        self.buffers.append((buffer, buffer.clone(), size))
        return buffer[self.MARGIN : self.MARGIN + size].view(shape)

    def copy(self, tensor):
        if tensor is None or tensor.dim() < 4:
            return None if tensor is None else self.empty(tensor.shape, tensor.dtype).copy_(tensor)
        tokens_first = tensor.transpose(1, 2)  # so that the kernels need all strides
        return self.empty(tokens_first.shape, tensor.dtype).copy_(tokens_first).transpose(1, 2)

    def assert_intact(self):
        for buffer, before, size in self.buffers:
            for margin in (slice(self.MARGIN), slice(self.MARGIN + size, None)):
                assert torch.equal(buffer[margin].view(torch.uint8), before[margin].view(torch.uint8))


def launch(kernel, structure, kind, tensors, conditions, **numbers):
    """kind: what the launcher takes beside the structure, the dtype or the feature map."""
    call = structure(**numbers)
    for name, field in structure._fields_:
        tensor = tensors.get(name.removesuffix("_strides"))
        if tensor is not None:
            setattr(call, name, field(*tensor.stride()[: field._length_]) if name.endswith("_strides") else tensor.data_ptr())
    _run(kernel, call, kind, conditions)


def launch_at(kernel, structure, kind, addresses, steps, conditions, **numbers):
    """The same from addresses and from strides, both in the order of the structure's fields."""
    names = [name for name, field in structure._fields_ if field is ctypes.c_void_p]
    call = structure(**dict(zip(names, addresses, strict=True)), **numbers)
    arrays = [name for name, _ in structure._fields_ if name.endswith("_strides")]
    for array, step in zip(arrays, steps, strict=True):
        setattr(call, array, (3 * ctypes.c_int64)(*step))
    _run(kernel, call, kind, conditions)


def _run(kernel, call, kind, conditions):
    error = kernel(ctypes.byref(call), kind.encode(), *conditions)
    assert error is None, error.decode()


def through_the_operator(operator, op_arguments, sample, layout, backends):
    """(do, o, gradients by name) of a torch operator, forward and backward by these backends; its tensors have this layout."""
    change = {**LAYOUTS, **MISALIGNED}[layout]
    tensors = {name: (change(x) if x.dim() == 4 else x).requires_grad_() for name, x in sample.tensors.items()}
    assert layout in LAYOUTS or next(iter(tensors.values())).data_ptr() % 16
    o, *_ = operator(*op_arguments(Sample(tensors, sample.options)), *backends)
    do = GRADIENTS["width before rows"](randn(*o.shape, dtype=o.dtype, seed=11, device="cpu"))
    gradients = torch.autograd.grad(o, list(tensors.values()), do)
    return do, o.detach(), dict(zip(tensors, gradients, strict=True))
