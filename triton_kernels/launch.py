"""How kernels are launched: parameters from the committed table launch.json, and launches prepared once per signature."""

import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from nearfar.runtime.private import bound, driver, knobs, stub_arguments
from nearfar.runtime.tensors import tf32_allowed

ALIGNMENT = 16  # bytes; Triton specialises a kernel on addresses that are multiples of this
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


def cdiv(a, b):
    """a / b, rounded up. `triton.cdiv`, which kernels can call too, costs the host a microsecond; a plan has dozens."""
    return -(-a // b)


def power_of_2(n):
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def width_block(width):
    """Tile width for a head width: the next power of two, at least 16, as tl.dot requires."""
    return max(16, power_of_2(width))


def dot_precision(dtype):
    """Precision of products: exact for float32, unless the user allowed tf32 by torch's switches."""
    return "tf32" if tf32_allowed(dtype) else "ieee"


class CompilationLock:
    """Lets one process at a time fill Triton's cache; threads of a process compile side by side.

    Ranks that fill one empty cache at once have loaded each other's launchers (docs/notes/runtime.md).
    """

    def __init__(self):
        self._threads, self._guard, self._file = 0, threading.Lock(), None

    def __enter__(self):
        with self._guard:
            if not self._threads:
                self._file = self._acquired()
            self._threads += 1

    def __exit__(self, *_):
        with self._guard:
            self._threads -= 1
            if not self._threads and self._file is not None:
                self._file.release()

    @staticmethod
    def _acquired():
        """The lock of the cache's folder; None if no lock file can be created."""
        try:
            folder = Path(knobs.cache.dir)
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_of(folder)
            lock.acquire()
        except (AttributeError, NotImplementedError, OSError):
            return None
        return lock


@functools.cache
def lock_of(folder):
    """One lock object per file. filelock reports a deadlock for a second object after another thread released the first."""
    return FileLock(folder / "nearfar.lock", thread_local=False)


COMPILING = CompilationLock()


class Variant:
    """A kernel compiled for scalars of one sort (see `sort_of`). Launches with different lengths share it."""

    def __init__(self, kernel, options):
        self._kernel, self._options = kernel, dict(options)
        self._locks, self._built, self.loaded = {}, {}, {}  # by kinds

    def load(self, tensors, scalars, grid, kinds):
        """The loaded kernel for tensors of these kinds, all aligned."""
        if kinds not in self.loaded:
            with COMPILING:
                compiled = self.build(tensors, scalars, grid, kinds)
                compiled[grid]  # loads it
            self.loaded[kinds] = compiled
        return self.loaded[kinds]

    def build(self, tensors, scalars, grid, kinds):
        """The same, not loaded; waits for a thread that builds it.

        The table is that of GPUs with large shared memories; others get as many stages of its pipeline as theirs hold.
        """
        with COMPILING, self._locks.setdefault(kinds, threading.Lock()):
            if kinds not in self._built:
                room = shared_memory()
                for stages in range(self._options["num_stages"], 0, -1):
                    options = {**self._options, "num_stages": stages}
                    built = self._kernel.warmup(*tensors, *scalars, grid=grid, **options)
                    if built.metadata.shared <= room:
                        break
                self._built[kinds] = built
            return self._built[kinds]


@functools.cache
def variant_of(kernel, options, _sorts):
    return Variant(kernel, options)


def sort_of(value):
    """The properties of a scalar that Triton specialises on: whether an integer is 1 or a multiple of 16, and its bits."""
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    return tuple([sort_of(part) for part in value]) if type(value) is tuple else type(value)


class Launch:
    """A kernel launch with everything fixed except its tensors.

    Triton's own launch looks every argument over to find the compiled kernel, and then looks for the stream and for hooks to
    call, which takes longer than the launch itself. Here the scalars are the same in every call, so that dtypes, device and
    which tensors are None tell the compiled kernel; it is run directly, with bare addresses. A tensor that is not 16-byte
    aligned takes Triton's way, and so does every launch while a hook of Triton's is set.
    """

    def __init__(self, kernel, programs, scalars, parameters):
        self._kernel = kernel
        self._grid = (programs, 1, 1)
        self._scalars = scalars
        self._options = {"num_warps": parameters.num_warps, "num_stages": parameters.num_stages}
        if parameters.maxnreg is not None:
            self._options["maxnreg"] = parameters.maxnreg
        self._bound = {}  # by kinds: the launches bound to their loaded kernels

    @functools.cached_property
    def _variant(self):
        parameters = self._kernel.params[len(self._kernel.params) - len(self._scalars) :]
        pairs = zip(self._scalars, parameters, strict=True)
        sorts = tuple([(type(x), x) if parameter.is_constexpr else sort_of(x) for x, parameter in pairs])
        return variant_of(self._kernel, tuple(self._options.items()), sorts)

    def __call__(self, *tensors):
        """tensors: the leading arguments of the kernel: tensors, None and tuples of tensors."""
        self.run(tensors, survey(tensors))

    def run(self, tensors, surveyed):
        """The same, for tensors that were surveyed already."""
        addresses, kinds, aligned = surveyed
        if not self._grid[0]:
            return
        if not aligned or knobs.runtime.interpret:
            self._kernel[self._grid](*tensors, *self._scalars, **self._options)
        elif hooks_are_set():
            self._load(tensors, kinds)[self._grid](*addresses, *self._scalars)
        else:
            self._launch(tensors, kinds)(addresses, driver.active.get_current_stream(kinds[0]))

    def bound(self, _device, kinds):
        """A function (addresses, stream) that runs the kernel loaded for these kinds, without calling hooks."""
        return self._launch((), kinds) if self._grid[0] else lambda addresses, stream: None

    def is_new(self, surveyed):
        """Whether a kernel has to be compiled or loaded first."""
        _, kinds, aligned = surveyed
        return kinds not in self._variant.loaded and aligned and self._grid[0] > 0

    def compile(self, tensors, kinds):
        """Build and load the kernel for tensors of these kinds, all aligned."""
        self._launch(tensors, kinds)

    def build_ahead(self, tensors, kinds):
        """Build the kernel and, in Triton's cache, its C launch stub, which loading would build otherwise."""
        with COMPILING:
            arguments = stub_arguments(self._variant.build(tensors, self._scalars, self._grid, kinds))
            if arguments is not None:  # otherwise another launch has loaded it
                driver.active.launcher_cls(*arguments)

    def _load(self, tensors, kinds):
        return self._variant.load(tensors, self._scalars, self._grid, kinds)

    def _launch(self, tensors, kinds):
        found = self._bound.get(kinds)
        if found is None:
            found = self._bound[kinds] = bound(self._load(tensors, kinds), self._grid, self._scalars)
        return found


def hooks_are_set():
    """Whether launch hooks are set, as by a profiler. Triton's chains of hooks may be empty."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def shared_memory():
    """Bytes of shared memory available to a block on the current device."""
    return driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]


def survey(tensors):
    """(addresses, kinds, whether all are aligned), in one pass.

    kinds: the dtype of each tensor, None for one that is None, which Triton compiles out, and the device of the first.
    """
    addresses, kinds, bits, device = [], [], 0, None
    for tensor in tensors:
        if tensor is None:
            addresses.append(None)
            kinds.append(None)
        elif type(tensor) is tuple:
            inner = []
            for part in tensor:
                address = part.data_ptr()
                bits |= address
                inner.append(address)
                kinds.append(part.dtype)
            addresses.append(tuple(inner))
        else:
            address = tensor.data_ptr()
            bits |= address
            device = tensor.get_device() if device is None else device
            addresses.append(address)
            kinds.append(tensor.dtype)
    return addresses, (device, *kinds), bits % ALIGNMENT == 0


def launch_all(*launches):
    """Run (launch, tensors) pairs in order."""
    surveyed = [(launch, tensors, survey(tensors)) for launch, tensors in launches]
    if not knobs.runtime.interpret:
        compile_new(surveyed)
    for launch, tensors, seen in surveyed:
        launch.run(tensors, seen)


def compile_new(surveyed):
    """Compile the kernels of (launch, tensors, what `survey` says of them) that are new, side by side in threads.

    Compilers run outside Python's lock, and each kernel also waits for a C compiler: the first call of several kernels takes
    about as long as that of the slowest.
    """
    new = {(launch, seen[1]): tensors for launch, tensors, seen in surveyed if launch.is_new(seen)}
    if len(new) == 1:
        (((launch, kinds), tensors),) = new.items()
        launch.compile(tensors, kinds)
    elif new:
        for compiled in in_threads(Launch.compile, new):
            compiled.result()


def build_ahead(*launches):
    """Start to build the kernels of (launch, meta tensors) pairs for launches to come on the current device.

    Those launches wait for what is being built, and build what has failed here once more, so that they raise its error; nobody
    else waits, but that Python joins the threads at its exit: compilers do not bear being stopped. No kernel is loaded, which
    might happen while the main thread captures a CUDA graph, and end the capture.
    """
    if knobs.runtime.interpret:
        return
    device, new = torch.cuda.current_device(), {}
    for launch, tensors in launches:
        addresses, (_, *dtypes), aligned = survey(tensors)  # addresses are 0
        kinds = (device, *dtypes)
        if launch.is_new((addresses, kinds, aligned)):
            new[launch, kinds] = tensors
    if new:
        in_threads(Launch.build_ahead, new)


def in_threads(method, launches):
    """Futures of method(launch, tensors, kinds) for each {(launch, kinds): tensors}, each in its own thread."""
    device = torch.cuda.current_device()

    def on_device(launch, tensors, kinds):
        with torch.cuda.device(device):
            method(launch, tensors, kinds)

    driver.active.get_current_target()  # Triton initialises its driver at first use, which is not thread-safe
    pool = ThreadPoolExecutor(len(launches))
    futures = [pool.submit(on_device, launch, tensors, kinds) for (launch, kinds), tensors in launches.items()]
    pool.shutdown(wait=False)
    return futures
