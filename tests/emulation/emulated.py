"""The kernels of csrc/ without a GPU: their sources, compiled by g++ against tests/emulation.

What the emulation checks besides the results, and what it cannot see, is in docs/emulation.md.
"""

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from harness import GRADIENTS, LAYOUTS, MISALIGNED, Sample, randn

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent


def find_nvcc():
    """As setup.py does."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


# -fno-extern-tls-init: shared memory is thread_local to g++ (device.h says why), but nothing has to be initialised.
OPTIONS = """-fPIC -fvisibility=hidden -fno-strict-aliasing -fno-extern-tls-init
             -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-parentheses""".split()


class Kernel(NamedTuple):
    """A launcher, and its arguments as csrc/ declares them."""

    launch: object
    arguments: type[ctypes.Structure]


KINDS = {"t": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}


def structure(description):
    """The structure that device.h describes, of a line "name kind offset size" for each member."""
    lines = [line.split() for line in description.splitlines()]
    members = [(name, KINDS.get(kind, int(size) // 8 * ctypes.c_int64), int(offset)) for name, kind, offset, size in lines]
    found = type("Arguments", (ctypes.Structure,), {"_fields_": [member[:2] for member in members]})
    assert all(getattr(found, name).offset == offset for name, _, offset in members)
    return found


def build(folder, **launchers):
    """The emulated kernels by name. launchers: of each source in csrc/, `operator__file`, the names of its launchers."""
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
    compilers = []
    for source, names in launchers.items():
        lines = "device.h", f"{source.replace('__', '/')}.cu"
        text = [f'#include "{line}"' for line in lines] + [f"EMULATED({name})" for name in names]
        (folder / f"{source}.cpp").write_text("\n".join(text) + "\n")
        compilers.append(subprocess.Popen([*command, folder / f"{source}.cpp", "-o", folder / f"{source}.so"]))
    assert not any([compiler.wait() for compiler in compilers])
    return {
        name: load(ctypes.CDLL(f"{folder}/{source}.so"), name) for source, names in launchers.items() for name in names
    }


def load(library, name):
    launcher, arguments = library[name], library[f"{name}_arguments"]
    launcher.restype = arguments.restype = ctypes.c_char_p
    return Kernel(launcher, structure(arguments().decode()))


class Conditions(NamedTuple):
    """What should not matter."""

    device: int = 2  # of device + 1 multiprocessors: the fewer, the more tiles are in a strip
    late_copies: bool = False
    seed: int = 0


class Guarded:
    """Tensors between guard numbers, which kernels must not use or change. Outputs are filled with such numbers too."""

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


def launch(kernel, variant, tensors, conditions, **others):
    """variant: the dtype or the feature map. tensors and others: by name; tensors that the kernel does not take are ignored."""
    for name, kind in kernel.arguments._fields_:
        if name.endswith("_strides") and (tensor := tensors.get(name.removesuffix("_strides"))) is not None:
            others[name] = tensor.stride()[: kind._length_]
        elif kind is ctypes.c_void_p and tensors.get(name) is not None:
            others[name] = tensors[name].data_ptr()
    _run(kernel, variant, others, conditions)


def _run(kernel, variant, values, conditions):
    kinds = dict(kernel.arguments._fields_)
    assert values.keys() <= kinds.keys()
    call = kernel.arguments(**{name: kinds[name](*x) if isinstance(x, tuple) else x for name, x in values.items()})
    error = kernel.launch(ctypes.byref(call), variant.encode(), *conditions)
    assert error is None, error.decode()


class Extension:
    """Stands for nearfar._C with the emulated kernels, for tensors on the CPU. launched: the names of those that ran."""

    def __init__(self, kernels, **constants):
        self._kernels, self.launched = kernels, []
        self.__dict__.update(constants)

    def __getattr__(self, name):
        return functools.partial(self._plan, name)

    def _plan(self, name, variant, tensors, **others):
        """A launch, as the binding (csrc/common/binding.h) makes it of arguments by name, of which none may lack."""
        kernel = self._kernels[name]
        assert {*tensors, *others} == {argument for argument, _ in kernel.arguments._fields_}

        def run(addresses, _device, _stream):
            given = dict(zip(tensors, addresses, strict=True))
            _run(kernel, variant, {**others, **given}, Conditions())
            self.launched.append(name)

        return run


def through_the_operator(operator, op_arguments, sample, layout, backends):
    """(do, o, gradients by name) of a torch operator, forward and backward by these backends; its tensors have this layout."""
    change = {**LAYOUTS, **MISALIGNED}[layout]
    tensors = {name: (change(x) if x.dim() == 4 else x).requires_grad_() for name, x in sample.tensors.items()}
    assert layout in LAYOUTS or next(iter(tensors.values())).data_ptr() % 16
    o, *_ = operator(*op_arguments(Sample(tensors, sample.options)), *backends)
    do = GRADIENTS["width before rows"](randn(*o.shape, dtype=o.dtype, seed=11, device="cpu"))
    gradients = torch.autograd.grad(o, list(tensors.values()), do)
    return do, o.detach(), dict(zip(tensors, gradients, strict=True))
