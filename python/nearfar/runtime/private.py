"""Private names of torch and Triton. No other file of the package uses one.

Each name is looked up once and has a fallback for versions of torch or Triton that lack it. With fallbacks `import nearfar`
still works, and calls return the same results, only slower. These features are lost, with a NotImplementedError that names what
is missing:

    batched gradients, torch.autograd.grad(is_grads_batched=True)       without _add_batch_dim, _remove_batch_dim
    gradients of kernels under torch.func                 without _FunctionBase, enable_single_level_autograd_function
    gradients of a compiled or exported reference         without _ForceDispatchKeyGuard and the key sets it takes
    nearfar.diagnostics.watch                             without the stack of function modes
    process_group of AffineScaledAttention                without _resolve_process_group

Without torch.utils._pytree, torch.export takes no caches.

Triton's names are looked up at first use, because importing Triton takes a second.
"""

import importlib
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

Function = TypeVar("Function", bound=Callable[..., Any])

NAMES: list[str] = []  # the names looked up in torch, "module:attributes", for the test that removes each


def _look_up(name: str, fallback: Any) -> Any:
    NAMES.append(name)
    return _found(name, fallback)


def _found(name: str, fallback: Any) -> Any:
    module, attributes = name.split(":")
    try:
        return operator.attrgetter(attributes)(importlib.import_module(module))
    except (AttributeError, ImportError):
        return fallback


def _missing(name: str, feature: str) -> Callable[..., NoReturn]:
    """A fallback that raises."""

    def refuse(*arguments: Any, **keywords: Any) -> NoReturn:
        raise NotImplementedError(f"{feature}: torch {torch.__version__} has no {name.replace(':', '.')}, which it needs")

    return refuse


def _look_up_or_refuse(name: str, feature: str) -> Any:
    return _look_up(name, _missing(name, feature))


# ------------------------------------------------------------------------------------------------- the state of a call

AUTOCAST_DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")

# Whether autocast is on for any device. Fallback: query each device.
autocast_enabled = _look_up(
    "torch._C:_is_any_autocast_enabled", lambda: any([torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES])
)
# Number of active TorchDispatchModes. Fallback: 1, so that every call takes torch's dispatcher.
dispatch_modes = _look_up("torch._C:_len_torch_dispatch_stack", lambda: 1)
# Level of the innermost transform of torch.func, None outside. Fallback: 1, as if inside; references then save all scores.
transform_level = _look_up("torch._C._functorch:maybe_current_level", lambda: 1)
# Whether a transform of torch.func wraps a tensor. Fallback: assume so inside a transform; values are not checked there.
is_functorch_wrapped_tensor = _look_up(
    "torch._C._functorch:is_functorch_wrapped_tensor", lambda tensor: transform_level() is not None
)


def _has_no_storage(tensor: torch.Tensor) -> bool:
    if is_compiling() or is_functorch_wrapped_tensor(tensor):
        return False
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return True
    return False


# Whether the legacy vmap (that of is_grads_batched) wraps a tensor. Fallback: whether it lacks storage, which is slower.
is_legacy_batchedtensor = _look_up("torch._C._functorch:is_legacy_batchedtensor", _has_no_storage)
# Level of forward AD, -1 outside. Fallback: as if inside, so that every tensor is searched for a tangent.
_HAS_LEVEL = _look_up("torch.autograd.forward_ad:_current_level", None) is not None


def _in_forward_ad() -> bool:
    return forward_ad._current_level >= 0


in_forward_ad = _in_forward_ad if _HAS_LEVEL else lambda: not is_compiling()
"""Whether a level of forward AD is active, including those of torch.func."""


def _task_of_callback() -> int:
    try:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: None)
    except RuntimeError:
        return -1
    return 0


# Id of the running backward, -1 outside. Fallback: the engine accepts a callback only inside; outside it costs an exception.
current_graph_task = _look_up("torch._C:_current_graph_task_id", _task_of_callback)
# A compiler's context of the graph that it traces, None outside. Fallback: the flag of torch.compiler, which an older torch
# sets for export only; `watch` may then count a call that torch.compile only tries out.
tracing_context = _look_up("torch._guards:TracingContext.try_get", lambda: True if is_compiling() else None)
# Version counter of a tensor. Fallback: a new object each time, so that cu_seqlens are read back in each call.
version_of = _look_up("torch:Tensor._version", property(lambda tensor: object())).__get__
# Guard check of many tensors in C++. Fallback: none; plans are looked up by layouts.
TensorGuards = _look_up("torch._C._dynamo.guards:TensorGuards", None)


def constant_while_traced(function: Function) -> Function:
    """Let torch.compile call a function at trace time, as torch.compiler.assume_constant_result does, which imports Dynamo.

    It needs no fallback, as nothing is looked up: a torch that ignores this mark traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# ------------------------------------------------------------------------------------------------------------- autograd

# Whether any tensor among the arguments, or in lists of them, requires a gradient. Fallback: the same in Python.
any_requires_grad = _look_up(
    "torch._C:_any_requires_grad",
    lambda *arguments: any([isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves(arguments)]),  # type: ignore[has-type]
)


def _refuse_transforms(name: str) -> None:
    if transform_level() is not None:
        _missing(name, "gradients of kernels under torch.func")()


_FUNCTION = "torch._C:_FunctionBase"
_HAS_FUNCTION = _look_up(_FUNCTION, None) is not None


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The C++ apply of an autograd.Function. Fallback: the Python one, slower and without gradients under torch.func."""
    if _HAS_FUNCTION:
        return super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*arguments: Any) -> Any:
        _refuse_transforms(_FUNCTION)
        return function.apply(*arguments)

    return apply


_BelowAutograd = _look_up("torch._C:_AutoDispatchBelowAutograd", None)
_BELOW_AUTOGRAD = _look_up("torch._C:_after_autograd_keyset", None)


def _redispatch_below(operator: Any, keyset: Any, *arguments: Any) -> Any:
    with _BelowAutograd():
        return operator.redispatch(keyset & _BELOW_AUTOGRAD, *arguments)


def _redispatch_next(operator: Any, keyset: Any, *arguments: Any) -> Any:
    with torch.no_grad() if any_requires_grad(*arguments) else nullcontext():
        return operator.redispatch(keyset.remove(keyset.highestPriorityTypeId()), *arguments)


below_autograd = _redispatch_next if _BelowAutograd is None or _BELOW_AUTOGRAD is None else _redispatch_below
"""Redispatch below autograd. Fallback: to the next dispatch key, without gradients; autograd's other keys pass calls on."""


_SINGLE_LEVEL = "torch._functorch.utils:enable_single_level_autograd_function"


@contextmanager
def _outside_transforms() -> Iterator[None]:
    _refuse_transforms(_SINGLE_LEVEL)
    yield


# Context in which direct_apply works under torch.func. Fallback: it raises there, and works outside torch.func.
single_level_function = _look_up(_SINGLE_LEVEL, _outside_transforms)

_BATCHED = "batched gradients"
# Wrap and unwrap a tensor of the legacy vmap. Without them batched gradients are lost.
add_batch_dim = _look_up_or_refuse("torch:_add_batch_dim", _BATCHED)
remove_batch_dim = _look_up_or_refuse("torch:_remove_batch_dim", _BATCHED)

_COMPILED = "gradients of a compiled reference"
# These enable autograd inside an operator. Without one of them gradients of a compiled reference are lost.
_included = _look_up_or_refuse("torch._C:_dispatch_tls_local_include_set", _COMPILED)
_excluded = _look_up_or_refuse("torch._C:_dispatch_tls_local_exclude_set", _COMPILED)
_ForceKeys = _look_up_or_refuse("torch._C:_ForceDispatchKeyGuard", _COMPILED)
_KeySet = _look_up_or_refuse("torch._C:DispatchKeySet", _COMPILED)
_AUTOGRAD = _look_up("torch._C:DispatchKey.AutogradFunctionality", None)


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Context in which code below autograd, such as an operator's implementation, can use autograd."""
    if _AUTOGRAD is None:
        _missing("torch._C:DispatchKey.AutogradFunctionality", _COMPILED)()
    with _ForceKeys(_included(), _excluded() - _KeySet(_AUTOGRAD)), torch.enable_grad():
        yield


class _Trees:
    """The part of torch.utils._pytree that the package uses. Everything except tuples and lists is a leaf."""

    @staticmethod
    def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
        if type(tree) not in (tuple, list):
            return [tree], None
        parts = [_Trees.tree_flatten(part) for part in tree]
        return [leaf for leaves, _ in parts for leaf in leaves], (type(tree), [(len(leaves), spec) for leaves, spec in parts])

    @staticmethod
    def tree_unflatten(leaves: Iterable[Any], spec: Any) -> Any:
        if spec is None:
            (leaf,) = leaves
            return leaf
        leaves, (kind, parts) = iter(leaves), spec
        return kind([_Trees.tree_unflatten([next(leaves) for _ in range(count)], part) for count, part in parts])

    @staticmethod
    def tree_leaves(tree: Any) -> list[Any]:
        return _Trees.tree_flatten(tree)[0]

    @staticmethod
    def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
        leaves, spec = _Trees.tree_flatten(tree)
        return _Trees.tree_unflatten(map(function, leaves, *map(_Trees.tree_leaves, others)), spec)

    @staticmethod
    def register_dataclass(kind: type, *, serialized_type_name: str) -> None:
        pass


# Nested arguments as flat lists. Fallback: the same in Python for tuples and lists; caches cannot be inputs of torch.export.
_pytree = _look_up("torch.utils:_pytree", _Trees)
tree_flatten, tree_unflatten, tree_leaves = _pytree.tree_flatten, _pytree.tree_unflatten, _pytree.tree_leaves
tree_map, register_dataclass = _pytree.tree_map, _pytree.register_dataclass

# ----------------------------------------------------------------------------------------------------------------- CUDA

# torch.empty_strided without argument parser and dispatcher, as code generated by torch.compile calls it. Without it programs
# allocate by torch.empty_strided and launch with tensors instead of addresses.
empty_cuda = _look_up("torch._C._dynamo.guards:_empty_strided_cuda", None)
# Index of the current device. Fallback: torch's public function, which first checks that CUDA is initialised.
current_device = _look_up("torch._C:_cuda_getDevice", torch.cuda.current_device)
# Whether torch is in deterministic mode. Fallback: torch's public function, one more Python call.
is_deterministic = _look_up("torch._C:_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled)
# Handle of the current stream of a device, given its index. Fallback: through torch's stream object.
current_stream = _look_up("torch._C:_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream)

# -------------------------------------------------------------------------------------------------------------- modules

_WATCH = "nearfar.diagnostics.watch"
# The stack of TorchFunctionModes. Without one of them `watch` is lost.
function_modes = _look_up_or_refuse("torch.overrides:_get_current_function_mode_stack", _WATCH)
push_function_mode = _look_up_or_refuse("torch.overrides:_push_mode", _WATCH)
pop_function_mode = _look_up_or_refuse("torch.overrides:_pop_mode", _WATCH)
# Ids of the global hooks that take keywords; removing a hook leaves its id behind. Fallback: the id of each `watch` stays.
global_hooks_with_keywords = _look_up("torch.nn.modules.module:_global_forward_hooks_with_kwargs", {})
# The ProcessGroup with a name. Without it AffineScaledAttention's process_group is lost.
process_group_of = _look_up_or_refuse(
    "torch.distributed.distributed_c10d:_resolve_process_group", "process_group of AffineScaledAttention"
)


def hooks_of(module: torch.nn.Module) -> Any:
    """The dict of hooks that replicas of nn.DataParallel share. Fallback: the module; `watch` does not know its replicas."""
    return getattr(module, "_forward_hooks", module)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile created or changed a module. Fallback: False; `watch` then reports that its calls did not run."""
    dynamo = sys.modules.get("torch._dynamo")  # slow to import, and already imported if anything is compiled
    made = isinstance(module, getattr(dynamo, "OptimizedModule", ()))
    return made or getattr(module, "_compiled_call_impl", None) is not None


# --------------------------------------------------------------------------------------------------------------- Triton


def _without_knobs() -> SimpleNamespace:
    """Assume that a launch hook is set, so that Triton makes each launch."""
    interpret = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    return SimpleNamespace(runtime=SimpleNamespace(interpret=interpret, launch_enter_hook=True, launch_exit_hook=None))


def _shared_memory(device: int) -> dict[str, int]:
    return {"max_shared_mem": torch.cuda.get_device_properties(device).shared_memory_per_block_optin}  # type: ignore[attr-defined]


def _without_driver() -> SimpleNamespace:
    """The information that torch also has. The C stub of a kernel is built when the kernel is loaded, not before."""
    active = SimpleNamespace(
        get_current_stream=current_stream,
        get_current_target=lambda: None,
        launcher_cls=lambda source, metadata: None,
        utils=SimpleNamespace(get_device_properties=_shared_memory),
    )
    return SimpleNamespace(active=active)


TRITON = {
    "knobs": ("triton:knobs", _without_knobs),  # whether kernels are interpreted, and the hooks of launches
    "driver": ("triton.runtime.driver:driver", _without_driver),  # devices, streams, and the C stubs that launch kernels
}


def __getattr__(name: str) -> Any:
    if name not in TRITON:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where, make_fallback = TRITON[name]
    found = _found(where, None)
    globals()[name] = make_fallback() if found is None else found
    return globals()[name]


def bound(compiled: Any, grid: tuple[int, int, int], scalars: Sequence[Any]) -> Callable[[Sequence[Any], int], object]:
    """The launch of a loaded kernel as a function (addresses, stream), without hooks. Fallback: Triton's, with hooks."""
    try:
        run, handle = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
    except AttributeError:
        run = compiled[grid]
        return lambda addresses, stream: run(*addresses, *scalars, stream=stream)
    return lambda addresses, stream: run(*grid, stream, *handle, *addresses, *scalars)


def stub_arguments(compiled: Any) -> tuple[Any, Any] | None:
    """The inputs for building a kernel's C stub; None if the kernel is loaded. Fallback: None, so it is built at loading."""
    source = getattr(compiled, "src", None)
    return None if source is None or getattr(compiled, "module", None) is not None else (source, compiled.metadata)
