"""Private names of torch and Triton (runtime/private.py): in no other file, and calls work without any one of them."""

import ast
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import without
from nearfar.triton_kernels import launch

from nearfar.runtime import private

pytestmark = pytest.mark.full

NAMES = [*private.NAMES, *[name for name, _ in private.TRITON.values()]]
# What is lost with a name, with an error that says so.
LOST = {
    "torch._C:_FunctionBase": ("func_gradient",),
    "torch._functorch.utils:enable_single_level_autograd_function": ("func_gradient",),
    "torch:_add_batch_dim": ("batched_gradients", "batched_gradients_of_the_reference"),
    "torch:_remove_batch_dim": ("batched_gradients", "batched_gradients_of_the_reference"),
    "torch._C:_dispatch_tls_local_include_set": ("reference_in_a_graph",),
    "torch._C:_dispatch_tls_local_exclude_set": ("reference_in_a_graph",),
    "torch._C:_ForceDispatchKeyGuard": ("reference_in_a_graph",),
    "torch._C:DispatchKeySet": ("reference_in_a_graph",),
    "torch._C:DispatchKey.AutogradFunctionality": ("reference_in_a_graph",),
    "torch.overrides:_get_current_function_mode_stack": ("watched_model",),
    "torch.overrides:_push_mode": ("watched_model",),
    "torch.overrides:_pop_mode": ("watched_model",),
}


@pytest.fixture(scope="module")
def results():
    """`without.results(name)` in a process of its own: a fork of one in which torch and Triton are imported, nearfar is not."""
    context = get_context("forkserver")
    slow = "torch._dynamo", "torch._decomp.decompositions_for_jvp", "torch.nn.attention.flex_attention", "triton", "without"
    context.set_forkserver_preload(slow)
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        yield lambda name: pool.submit(without.results, name).result(timeout=120)


@pytest.fixture(scope="module")
def expected(results):
    return results(None)


def test_nothing_is_missing_here(expected):
    """Nor lost: else the tests below would compare errors."""
    refused = [case for case, found in expected.items() if isinstance(found, tuple)]
    assert refused == ["forward_mode", "double_backward"]


@pytest.mark.parametrize("name", NAMES)
def test_calls_work_without(name, results, expected):
    if not without.exists(name):
        pytest.skip(f"torch {torch.__version__} has none: the other tests run without it")
    found = results(name)
    for case in LOST.get(name, ()):
        error, text = found.pop(case)
        assert error == "NotImplementedError" and name.replace(":", ".") in text, text
    for case, outcome in found.items():
        if isinstance(outcome, tuple):
            assert outcome == expected[case], case
        else:
            assert all(map(numpy.array_equal, outcome, expected[case])), case


def test_every_lost_name_is_one_of_them():
    assert set(LOST) <= set(NAMES) and len(set(NAMES)) == len(NAMES)


def test_a_kernel_without_its_internals_is_run_by_triton():
    calls, scalars = [], (7, 0.5)

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments, stream: calls.append((grid, arguments, stream))

    private.bound(Compiled(), (3, 1, 1), scalars)((64, 128), 77)
    assert calls == [((3, 1, 1), (64, 128, 7, 0.5), 77)]
    assert private.stub_arguments(Compiled()) is None


def test_without_knobs_triton_makes_each_launch(monkeypatch):
    """It alone calls hooks, of which nothing is known then."""
    monkeypatch.setattr(launch, "knobs", private.TRITON["knobs"][1]())
    assert launch.hooks_are_set()


def test_without_the_driver_of_triton(monkeypatch):
    driver = private.TRITON["driver"][1]()
    monkeypatch.setattr(launch, "driver", driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    properties = SimpleNamespace(shared_memory_per_block_optin=4096)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties if device == 3 else None)
    assert launch.shared_memory() == 4096
    assert driver.active.get_current_target() is driver.active.launcher_cls("source", "metadata") is None
    assert driver.active.get_current_stream is private.current_stream


def test_a_module_without_its_internals():
    module = SimpleNamespace()
    assert private.hooks_of(module) is module and not private.is_compiled(module)


# ------------------------------------------------------------------------------------------------------- in no other file

ROOT = Path(__file__).parents[2]
PACKAGE = [path for folder in ("python/nearfar", "triton_kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES = [path for path in PACKAGE if path != ROOT / "python/nearfar/runtime/private.py"]
UNSTABLE = ("triton.runtime", "triton.compiler", "triton.backends", "triton.knobs")  # Triton has no underscores


def own_names(tree):
    """Names that a file defines: functions, classes, variables, and attributes that it sets of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def root_of(attribute):
    """What an attribute is looked up in, if it can be the module triton, else "x"."""
    return attribute.value.id if isinstance(attribute.value, ast.Name) and attribute.value.id == "triton" else "x"


def used_names(tree):
    """(line, dotted name) of attributes, also those that getattr and hasattr name, and of what is imported from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, f"{root_of(node)}.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            if isinstance(node.args[1], ast.Constant):
                yield node.lineno, f"x.{node.args[1].value}"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if not alias.name.startswith("nearfar"))
        elif isinstance(node, ast.ImportFrom) and not node.level and not node.module.startswith("nearfar"):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def private_names(text, own=()):
    """(line, dotted name) of the private names that a file uses; own: names of the package, and of NamedTuple."""
    for line, name in used_names(ast.parse(text)):
        parts = [part for part in name.split(".") if part.startswith("_") and not part.startswith("__")]
        if name.startswith(UNSTABLE) or not set(parts) <= set(own):
            yield line, name


def test_no_other_file_uses_a_private_name():
    texts = {path: path.read_text() for path in FILES}
    assert len(texts) > 60
    own = {"_replace", "_fields"}.union(*(own_names(ast.parse(text)) for text in texts.values()))
    found = [f"{path}:{line}: {name}" for path, text in texts.items() for line, name in private_names(text, own)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", [
    "torch._C._any_requires_grad(x)", "from torch._C import _any_requires_grad", "from torch import _C", "import torch._dynamo",
    "x._version", "getattr(x, '_version')", "forward_ad._current_level", "from torch.overrides import _pop_mode",
    "from triton.runtime import driver", "import triton.compiler", "triton.knobs.runtime", "from triton import knobs",
])
def test_a_private_name_is_seen(text):
    assert list(private_names(text))


def test_a_public_name_is_no_private_one():
    assert not list(private_names("import torch, nearfar._C\nfrom .launch import _x\ntorch.compile(x.__class__)"))
