"""Prepared launches (triton_kernels/launch.py), with a kernel that only notes what it is asked to do."""

import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from harness import DEVICE
from nearfar.triton_kernels import launch as launch_module
from nearfar.triton_kernels.launch import ALIGNMENT, Launch, LaunchParameters, survey
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend

from nearfar.runtime import program as program_module
from nearfar.runtime import tensors as tensors_module
from nearfar.runtime.program import Program

STAGE_BYTES = 1024
STREAM = 77


class Compiled:
    """Stands for a CompiledKernel, with the shared memory that a stage of the pipeline takes times its stages."""

    packed_metadata = "packed"

    def __init__(self, kernel, stages):
        self.src, self.metadata = kernel, SimpleNamespace(shared=STAGE_BYTES * stages)
        self.module, self._kernel, self._variant = kernel.module, kernel, len(kernel.compiled) - 1

    def __getitem__(self, grid):
        self.function = f"function {self._variant}"  # it is loaded here
        return lambda *arguments: self._kernel.calls_with_hooks.append((self._variant, arguments))

    def run(self, *arguments):
        *grid, stream, function, packed, metadata, enter, leave = arguments[:9]
        assert (grid, stream, function, packed) == ([3, 1, 1], STREAM, self.function, "packed")
        assert metadata is enter is leave is None
        self._kernel.calls.append((self._variant, arguments[9:]))


class Kernel:
    """Stands for a triton.jit function: compiles to something that notes its arguments under the number of its variant.

    compiler: what compiling does besides, given the arguments.
    """

    params = [SimpleNamespace(is_constexpr=False), SimpleNamespace(is_constexpr=True)]  # the scalars of launch_of

    def __init__(self):
        self.compiled, self.calls, self.calls_with_hooks, self.slow_calls = [], [], [], []
        self.compiler, self.stubs, self.module = lambda arguments: None, [], None

    def warmup(self, *arguments, grid, **options):
        self.compiled.append((arguments, options))
        self.compiler(arguments)
        return Compiled(self, options["num_stages"])

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.slow_calls.append(arguments)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(launch_module, "shared_memory", lambda: 4 * STAGE_BYTES)
    active = SimpleNamespace(
        get_current_stream=lambda device: STREAM,
        get_current_target=lambda: None,
        launcher_cls=lambda kernel, metadata: kernel.stubs.append(metadata),
    )
    monkeypatch.setattr(launch_module, "driver", SimpleNamespace(active=active))
    # Tensors of these tests are on the CPU, whose index is that of the meta device.
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: -1 if tensor.is_meta else 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return Kernel()


def launch_of(kernel, programs=3, scalars=(7, 0.5)):
    return Launch(kernel, programs, scalars, LaunchParameters(16, 16, num_warps=4, num_stages=2, maxnreg=128))


def test_a_launch_compiles_once_and_passes_addresses(kernel):
    launch, tensor, other = launch_of(kernel), torch.zeros(4), torch.zeros(4)
    launch(tensor, None)
    launch(other, None)
    assert len(kernel.compiled) == 1 and not kernel.slow_calls
    assert kernel.compiled[0][1] == {"num_warps": 4, "num_stages": 2, "maxnreg": 128}
    assert kernel.calls == [(0, (tensor.data_ptr(), None, 7, 0.5)), (0, (other.data_ptr(), None, 7, 0.5))]


def test_tensors_that_are_none_have_kernels_of_their_own(kernel):
    """Triton compiles None out: the kernel for one pattern, called with another, would read a null pointer."""
    launch, tensor = launch_of(kernel), torch.zeros(4)
    for arguments in ((tensor, None), (tensor, tensor), (None, tensor), (tensor, None)):
        launch(*arguments)
    assert [variant for variant, _ in kernel.calls] == [0, 1, 2, 0]
    assert not launch.is_new(survey((tensor, tensor))) and launch.is_new(survey((None, None)))


ALIKE = [(7, 9), (16, 4096), (-3, 2**31 - 1), (2**31 + 1, 2**40 + 1), (2.5, -1.0), ((3, (32, 5)), (9, (16, 7))), (True, False)]
UNLIKE = [(7, 1), (7, 16), (7, 2**31), (2**40, 2**31 + 1), (7, 2.5), (7, True), ((3, 5), (3, 16)), ((3,), (3, 3)), (7, None)]


@pytest.mark.parametrize("first, second", ALIKE)
def test_scalars_of_one_sort_share_a_kernel(kernel, first, second):
    """A new length is no new kernel: it is launched at once, with its own numbers."""
    launches, tensor = [launch_of(kernel, scalars=(scalar, 0.5)) for scalar in (first, second)], torch.zeros(4)
    for launch in launches:
        launch(tensor)
    assert len(kernel.compiled) == 1 and [arguments[1] for _, arguments in kernel.calls] == [first, second]


@pytest.mark.parametrize("first, second", [((a, 0.5), (b, 0.5)) for a, b in UNLIKE] + [((7, 0.5), (7, 1)), ((7, 1), (7, True))])
def test_scalars_of_other_sorts_do_not(kernel, first, second):
    """Triton compiles in whether a number is 1 or a multiple of 16 and how many bits it needs, and all constants."""
    tensor = torch.zeros(4)
    for scalars in (first, second):
        launch_of(kernel, scalars=scalars)(tensor)
    assert len(kernel.compiled) == 2


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton's own look at arguments, which needs no GPU")
def test_sorts_are_as_fine_as_tritons():
    """Scalars of one sort, by which kernels are shared, are the same to Triton."""
    specialize = getattr(importlib.import_module("triton._C.libtriton"), "native_specialize_impl", None)
    if specialize is None:
        pytest.skip("this Triton specializes in Python")
    backend = make_backend(GPUTarget("cuda", 90, 32))
    numbers = [0, 1, 2, 7, 16, 48, -16, -3, 2**31 - 1, 2**31, 2**31 + 16, 2**40, 2**63 - 1, 2**63, 2**63 + 16]
    numbers += [2.5, -1.0, True, False]
    seen = {}
    for number in (*numbers, *[(a, b) for a in numbers for b in numbers]):
        found = specialize(backend, number, False, True, True)
        assert seen.setdefault(launch_module.sort_of(number), found) == found


@pytest.mark.parametrize("nested", [False, True])
def test_dtypes_have_kernels_of_their_own(kernel, nested):
    """A plan is looked up by shapes and strides, which tensors of several dtypes may share."""
    launch = launch_of(kernel)
    for dtype in (torch.float32, torch.float16, torch.float32):
        tensor = torch.zeros(4, dtype=dtype)
        launch(torch.zeros(4), (tensor, tensor) if nested else tensor)
    assert [variant for variant, _ in kernel.calls] == [0, 1, 0]


def test_tuples_of_tensors_are_passed_as_tuples(kernel):
    launch, tensors = launch_of(kernel), (torch.zeros(4), torch.zeros(4))
    launch(tensors)
    assert kernel.calls == [(0, (tuple(t.data_ptr() for t in tensors), 7, 0.5))]


@pytest.mark.parametrize("nested", [False, True])
def test_unaligned_tensors_take_the_way_of_triton(kernel, nested):
    launch, tensor = launch_of(kernel), torch.zeros(5)[1:]
    argument = (torch.zeros(4), tensor) if nested else tensor
    assert not launch.is_new(survey((argument,)))
    launch(argument)
    assert not kernel.compiled and kernel.slow_calls == [(argument, 7, 0.5)]


@pytest.mark.parametrize("room, stages", [(2, [2]), (1, [2, 1]), (0, [2, 1])])
def test_a_small_shared_memory_gets_fewer_stages(kernel, monkeypatch, room, stages):
    """With none at all the last try stands, and Triton says what is missing when it loads it."""
    monkeypatch.setattr(launch_module, "shared_memory", lambda: room * STAGE_BYTES)
    launch, tensor = launch_of(kernel), torch.zeros(4)
    launch(tensor)
    launch(tensor)
    assert [options["num_stages"] for _, options in kernel.compiled] == stages
    assert [variant for variant, _ in kernel.calls] == 2 * [len(stages) - 1]


def test_no_programs_are_no_launch(kernel):
    launch = launch_of(kernel, programs=0)
    assert not launch.is_new(survey((torch.zeros(4),)))
    launch(torch.zeros(4))
    assert not (kernel.compiled or kernel.calls or kernel.slow_calls)


def test_hooks_of_triton_are_called_while_they_are_set(kernel):
    """A profiler sets them, at any time; Triton's own way of a launch calls them."""
    launch, tensor, hook = launch_of(kernel), torch.zeros(4), print
    launch(tensor)
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        try:
            launch(tensor)
        finally:
            chain.remove(hook)
    launch(tensor)
    assert kernel.calls_with_hooks == 2 * [(0, (tensor.data_ptr(), 7, 0.5))] and len(kernel.calls) == 2


def test_triton_runs_a_compiled_kernel_with_the_same_arguments():
    """Where its own way puts its metadata and its hooks, `Launch.run` puts None three times."""
    given = []
    compiled = SimpleNamespace(
        _init_handles=lambda: None, launch_metadata=lambda *arguments: "metadata",
        function="function", packed_metadata="packed",
        run=lambda *arguments: given.append(arguments),
    )
    CompiledKernel.__getitem__(compiled, (3, 1, 1))(7, 0.5, stream=STREAM)
    (arguments,) = given
    assert arguments[:7] == (3, 1, 1, STREAM, "function", "packed", "metadata") and arguments[9:] == (7, 0.5)


@pytest.mark.parametrize("hook, are_set", [(None, False), (print, True)])
def test_a_hook_may_be_a_function(hook, are_set, monkeypatch):
    """In place of a chain, as in Triton 3.3 and before, where None stood for none."""
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    assert launch_module.hooks_are_set() == are_set


def test_launches_are_made_in_order_and_new_kernels_compiled_once(kernel):
    first, second, tensor = launch_of(kernel), launch_of(kernel), torch.zeros(4)
    for _ in range(2):
        launch_module.launch_all((first, (tensor,)), (second, (tensor, None)), (first, (tensor,)))
    assert len(kernel.compiled) == 2 and [len(arguments) for _, arguments in kernel.calls] == 2 * [3, 4, 3]


def hold(folder, seconds, begun):
    launch_module.knobs.cache.dir = folder
    with launch_module.COMPILING:
        begun.set()
        time.sleep(seconds)


def test_processes_compile_one_after_the_other(tmp_path, monkeypatch):
    """And threads of one side by side: the last one leaves the lock."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    other = context.Process(target=hold, args=(str(tmp_path / "cache"), 1.5, begun))
    other.start()
    assert begun.wait(120)
    start, inside = time.monotonic(), threading.Barrier(2)

    def compile_something():
        with launch_module.COMPILING:
            inside.wait(60)

    thread = threading.Thread(target=compile_something)
    thread.start()
    compile_something()
    thread.join()
    assert time.monotonic() - start > 1  # the other process was waited for
    other.join()
    FileLock(tmp_path / "cache" / "nearfar.lock").acquire(timeout=1).lock.release()  # nobody holds it


def test_the_lock_may_be_left_by_another_thread(tmp_path, monkeypatch):
    """And then be taken again by the first one."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            entered, left = threading.Event(), threading.Event()

            def other(entered=entered, left=left):
                with launch_module.COMPILING:
                    entered.set()
                    assert left.wait(60)

            with launch_module.COMPILING:
                waiting = pool.submit(other)
                assert entered.wait(60)
            left.set()
            waiting.result(timeout=60)
    with launch_module.COMPILING:
        assert launch_module.lock_of(tmp_path).is_locked
    assert not launch_module.lock_of(tmp_path).is_locked


def test_without_a_folder_to_lock_kernels_compile(kernel, monkeypatch):
    monkeypatch.setattr(knobs.cache, "dir", "/proc/no such folder")
    launch_of(kernel)(torch.zeros(4))
    assert len(kernel.calls) == 1


# ---------------------------------------------------------------------------------------------------------- ahead of time


def on_meta(*tensors):
    return tuple(None if tensor is None else tensor.to("meta") for tensor in tensors)


def build_ahead(*launches):
    """The same, waited for, and what it failed with."""
    in_threads, started = launch_module.in_threads, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_module, "in_threads", lambda *arguments: started.extend(in_threads(*arguments)))
        launch_module.build_ahead(*launches)
    return [future.exception(timeout=60) for future in started]


def test_what_was_built_ahead_is_loaded_by_the_launch(kernel):
    """For the kinds that it was built for, and no others."""
    launch, single, half = launch_of(kernel), torch.zeros(4), torch.zeros(4, dtype=torch.float16)
    assert build_ahead((launch, on_meta(single, None)), (launch, on_meta(half, None))) == [None, None]
    assert len(kernel.compiled) == len(kernel.stubs) == 2 and not kernel.calls
    assert launch.is_new(survey((single, None)))  # a graph is perhaps being captured: nothing was loaded
    for tensors in ((half, None), (single, None), (single, None)):
        launch_module.launch_all((launch, tensors))
    assert len(kernel.compiled) == 2
    kinds = [kernel.compiled[variant][0][0].dtype for variant, _ in kernel.calls]
    assert kinds == [half.dtype, single.dtype, single.dtype]
    launch(single, single)
    assert len(kernel.compiled) == 3


def test_the_stub_of_a_kernel_that_another_launch_has_loaded_is_left_alone(kernel):
    kernel.module = "loaded"
    assert build_ahead((launch_of(kernel), on_meta(torch.zeros(4)))) == [None]
    assert len(kernel.compiled) == 1 and not kernel.stubs


def test_nothing_is_built_for_what_is_never_new(kernel):
    """As the launches of CUDA kernels, which were compiled with the package."""
    assert build_ahead((SimpleNamespace(is_new=lambda surveyed: False), on_meta(torch.zeros(4)))) == []


def test_a_launch_waits_for_its_own_kernel_only(kernel):
    launch, single, half = launch_of(kernel), torch.zeros(4), torch.zeros(4, dtype=torch.float16)
    begun, done = threading.Event(), threading.Event()

    def slow(arguments):
        if arguments[0].dtype == half.dtype:
            begun.set()
            assert done.wait(60)

    kernel.compiler = slow
    launch_module.build_ahead((launch, on_meta(half)))
    assert begun.wait(60)
    launch(single)  # of other kinds: not kept waiting
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(launch, half)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        done.set()
        waiting.result(timeout=60)
    assert [arguments[0].dtype for arguments, _ in kernel.compiled] == [half.dtype, single.dtype]
    assert [arguments[0] for _, arguments in kernel.calls] == [single.data_ptr(), half.data_ptr()]


def test_what_failed_ahead_of_time_fails_in_the_launch_or_is_mended(kernel, capfd):
    launch, tensor = launch_of(kernel), torch.zeros(4)

    def broken(arguments):
        raise RuntimeError("no compiler")

    kernel.compiler = broken
    (failed,) = build_ahead((launch, on_meta(tensor)))
    assert "no compiler" in str(failed)
    with pytest.raises(RuntimeError, match="no compiler"):
        launch(tensor)
    kernel.compiler = lambda arguments: None
    launch(tensor)
    assert len(kernel.compiled) == 3 and len(kernel.calls) == 1
    assert capfd.readouterr() == ("", "")


def test_nothing_is_built_for_no_programs_or_for_the_interpreter(kernel, monkeypatch):
    assert build_ahead((launch_of(kernel, programs=0), on_meta(torch.zeros(4)))) == []
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert build_ahead((launch_of(kernel), on_meta(torch.zeros(4)))) == [] and not kernel.compiled


def test_python_ends_in_order_while_a_kernel_is_built():
    code = """
import sys, time, threading, torch
from types import SimpleNamespace
from contextlib import nullcontext
from nearfar.triton_kernels import launch

class Kernel:
    params = ()

    def warmup(self, *arguments, **options):
        begun.set()
        time.sleep(0.5)
        print("built")
        return SimpleNamespace(metadata=SimpleNamespace(shared=0), src=None, module=None)

begun = threading.Event()
launch.shared_memory = lambda: 1
launch.driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: 0, launcher_cls=lambda *_: 0))
torch.cuda.current_device, torch.cuda.device = lambda: 0, lambda device: nullcontext()
made = launch.Launch(Kernel(), 1, (), launch.LaunchParameters(16, 16, 4, 1))
launch.build_ahead((made, (torch.empty(4, device="meta"),)))
begun.wait()
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "built\n", "")


def test_survey():
    whole, half, shifted = torch.zeros(4), torch.zeros(4, dtype=torch.float16), torch.zeros(5)[1:]
    single, short, cpu = whole.dtype, half.dtype, whole.get_device()
    address = whole.data_ptr()
    assert survey((whole, None, (half, whole))) == (
        [address, None, (half.data_ptr(), address)], (cpu, single, None, short, single), True
    )
    assert survey((None, shifted))[1:] == ((cpu, None, single), False) and not survey(((whole, shifted), None))[2]
    assert survey((torch.empty(0),)) == ([0], (cpu, single), True)  # nothing will be read there


# ----------------------------------------------------------------------------------------------------------- programs


class Noted:
    """Stands for a launch and notes what it is run with: tensors, or when it is bound addresses."""

    def __init__(self):
        self.runs, self.addresses = [], []

    def is_new(self, surveyed):
        return False

    def run(self, tensors, surveyed):
        self.runs.append((tensors, surveyed))

    def bound(self, device, kinds):
        return lambda addresses, stream: self.addresses.append((device, kinds, addresses, stream))


@pytest.fixture
def program(monkeypatch):
    """A program of two launches with two workspaces, and these launches. Tensors of the CPU say that they are of device 3."""
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 3)
    monkeypatch.setattr(tensors_module, "current_device", lambda: 3)
    monkeypatch.setattr(program_module, "allocates_directly", lambda device: True)
    monkeypatch.setattr(program_module, "current_stream", lambda device: STREAM)
    monkeypatch.setattr(
        program_module, "empty_cuda", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    )
    x, y, out = torch.empty(8, device="meta"), torch.empty(4, device="meta"), torch.empty(2, 4, device="meta")
    numbers, counts = torch.empty(5, 7, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    first, second = Noted(), Noted()
    launches = [(first, (x, numbers, None)), (second, ((x, y), numbers, counts, (y,), out))]
    return Program((x, None, y), (out, None), launches), first, second


def test_a_program_hands_over_addresses(program):
    program, first, second = program
    x, y = torch.zeros(8), torch.zeros(4)
    assert program.at_once(x, None, y) is None  # nothing is compiled yet
    for run in (program, program, program.at_once):
        out, nothing = run(x, None, y)
        assert out.shape == (2, 4) and nothing is None
        (device, kinds, of_first, stream), (_, second_kinds, of_second, _) = first.addresses[-1], second.addresses[-1]
        assert (device, stream) == (3, STREAM) and kinds == (3, torch.float32, torch.float32, None)
        assert second_kinds == (3, *[torch.float32] * 3, torch.int32, *[torch.float32] * 2)
        numbers, counts = of_second[1:3]
        assert of_first == (x.data_ptr(), numbers, 0)
        assert of_second == ((x.data_ptr(), y.data_ptr()), numbers, counts, (y.data_ptr(),), out.data_ptr())
        assert numbers % ALIGNMENT == counts % ALIGNMENT == 0 and counts >= numbers + 5 * 7 * 4
    assert len(first.addresses) == len(second.addresses) == 3 and not (first.runs or second.runs)


def test_a_program_hands_over_tensors_that_are_not_aligned(program):
    program, first, second = program
    x, y = torch.zeros(8), torch.zeros(5)[1:]
    out, _ = program(x, None, y)
    assert program.at_once(x, None, y) is None and not first.addresses
    (of_first, _), (of_second, (_, _, aligned)) = first.runs[0], second.runs[0]
    assert not aligned and of_first[0] is x and of_first[2] is None
    assert of_second[0] == (x, y) and of_second[3] == (y,) and of_second[4] is out
    assert of_first[1].data_ptr() == of_second[1].data_ptr()
    assert of_second[1].shape == (5, 7) and of_second[1].dtype == torch.float32
    assert of_second[2].shape == (3,) and of_second[2].dtype == torch.int32
    of_second[1].fill_(1.0)
    of_second[2].fill_(2)
    assert (of_second[1] == 1).all()


def test_a_program_lets_hooks_of_triton_hear_of_its_launches(program):
    program, first, second = program
    x, y = torch.zeros(8), torch.zeros(4)
    program(x, None, y)
    knobs.runtime.launch_enter_hook.add(print)
    try:
        assert program.at_once(x, None, y) is None
        out, _ = program(x, None, y)
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    assert len(first.addresses) == 1 and len(first.runs) == len(second.runs) == 1 and second.runs[0][0][4] is out


def test_a_program_without_launches_is_zeros():
    made = torch.empty(2, 3, device="meta"), None, torch.empty(4, dtype=torch.int32, device="meta")
    zeros, nothing, integers = Program((made[0],), made, ())(torch.ones(2, 3, device=DEVICE))
    assert torch.equal(zeros, torch.zeros(2, 3, device=DEVICE)) and nothing is None
    assert torch.equal(integers, torch.zeros(4, dtype=torch.int32, device=DEVICE))


def test_a_bound_launch_passes_what_a_run_passes(kernel):
    launch, tensor = launch_of(kernel), torch.zeros(4)
    launch(tensor, None)
    _, kinds, _ = survey((tensor, None))
    launch.bound(3, kinds)((tensor.data_ptr(), None), STREAM)
    assert kernel.calls[0] == kernel.calls[1] and not kernel.slow_calls
    assert launch_of(kernel, programs=0).bound(3, kinds)((tensor.data_ptr(), None), STREAM) is None and len(kernel.calls) == 2
