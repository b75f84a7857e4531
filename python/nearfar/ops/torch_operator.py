"""What every torch operator of nearfar needs: registration in both directions, and how its tensors are made and passed."""

import functools
import importlib
from ast import literal_eval
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch.autograd import forward_ad

from nearfar.runtime.private import (
    add_batch_dim,
    any_requires_grad,
    below_autograd,
    current_device,
    current_stream,
    direct_apply,
    empty_cuda,
    in_forward_ad,
    is_deterministic,
    is_legacy_batchedtensor,
    remove_batch_dim,
    single_level_function,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

Direction = tuple[str, Callable[..., Any], Callable[..., Any]]  # schema, function and fake
Cached = TypeVar("Cached", bound=Any)


def define(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    serves: str | None = None,
    autograd: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """`torch.ops.nearfar.<name>`: an implementation, a fake one, that of shapes, strides and dtypes, and its transforms.

    vmap takes the slices one by one. Forward AD is refused.

    Args:
        serves: the public functions that it serves, for messages; None: its name.
        autograd, setup_context: as for `torch.library.register_autograd`; None: its outputs are constants.
    """
    qualified = f"nearfar::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, ("CPU", "CUDA"), function)
    torch.library.register_fake(qualified, fake)
    operator, library = getattr(torch.ops.nearfar, name).default, _Library(serves or name)
    torch.library.register_vmap(qualified, functools.partial(_map, operator), lib=library)
    library.impl(name, functools.partial(map_batched_gradients, operator), "Batched")
    if autograd is None:
        library.impl(name, functools.partial(below_autograd, operator), "Autograd", with_keyset=True)
    else:
        defaults = [argument.partition("=")[2] for argument in schema.partition(" -> ")[0].strip("()").split(", ")]
        library.impl(name, _autograd_kernel(operator, defaults, autograd, setup_context), "Autograd", with_keyset=True)
    _libraries.append(library)


def register(
    name: str,
    forward: Direction,
    backward: Direction,
    autograd: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None,
    serves: str | None = None,
) -> None:
    """An operator and the operator of its backward, which cannot be differentiated again.

    Args:
        forward, backward: schema, function and fake of `<name>` and of `<name>_backward`.
        autograd, setup_context, serves: as for `define`.
    """
    define(name, *forward, serves or name, autograd, setup_context)
    define(f"{name}_backward", *backward, serves or name, refuse_double_backward)


_libraries: list[torch.library.Library] = []  # registrations last as long as these


class _Library(torch.library.Library):
    """Registers autograd kernels that refuse forward AD, whose tangents would be lost in silence below them."""

    def __init__(self, serves: str) -> None:
        super().__init__("nearfar", "FRAGMENT")
        self._serves = serves

    def impl(self, name: str, kernel: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:  # type: ignore[override]
        if dispatch_key != "Autograd":
            return super().impl(name, kernel, dispatch_key, **options)

        def refusing(keyset: Any, *arguments: Any, **keywords: Any) -> Any:
            refuse_forward_ad(self._serves, *arguments, *keywords.values())
            return kernel(keyset, *arguments, **keywords)

        return super().impl(name, refusing, dispatch_key, **options)


def refuse_forward_ad(serves: str, *arguments: Any) -> None:
    """Raise if a tensor among the arguments, or in lists of them, has a tangent; free outside forward AD."""
    if not in_forward_ad():
        return
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{serves}: the kernels have no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad). "
                'Pass backend="reference", which has, or use reverse mode'
            )


def _autograd_kernel(
    operator: Any, defaults: Sequence[str], backward: Callable[..., Any], setup_context: Callable[..., None] | None
) -> Callable[..., Any]:
    """What torch.library.register_autograd makes, that also works where transforms of torch.func are nested.

    There Function.apply asks for rules of its own; an operator has them by its dispatch keys, so that C++'s is called.
    """

    class Generated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, spec: Any, made: list[Any], *leaves: Any) -> tuple[Any, ...]:
            arguments = tree_unflatten(leaves, spec)
            outputs = below_autograd(operator, keyset, *arguments)
            if setup_context is not None:
                setup_context(ctx, arguments, outputs)
            flat, ctx.output_spec = tree_flatten(outputs)
            made.append(ctx.output_spec)
            return tuple(flat)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            gradients = tree_unflatten(gradients, ctx.output_spec)
            found = backward(ctx, *(gradients if isinstance(gradients, (list, tuple)) else (gradients,)))
            return None, None, None, *tree_leaves(found)

    apply = direct_apply(Generated)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if not (torch.is_grad_enabled() and any_requires_grad(*arguments)):
            return below_autograd(operator, keyset, *arguments)
        arguments = (*arguments, *map(literal_eval, defaults[len(arguments) :]))  # which the dispatcher leaves out
        made: list[Any] = []
        leaves, spec = tree_flatten(arguments)
        with single_level_function():
            outputs = apply(keyset, spec, made, *leaves)
        return tree_unflatten(outputs, made[0])

    return kernel


def _map(operator: Any, info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
    """The vmap rule of an operator, as for `torch.library.register_vmap`: a loop over the slices."""
    (leaves, spec), dims = tree_flatten(arguments), tree_leaves(in_dims)
    moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(leaves, dims, strict=True)]
    outputs = _loop(operator, info.batch_size, moved, [dim is not None for dim in dims], spec)
    return outputs, tree_map(lambda _: 0, outputs)


def map_batched_gradients(operator: Any, *arguments: Any) -> Any:
    """The same for the older vmap, which torch.autograd.grad(is_grads_batched=True) still maps the backward with."""
    leaves, spec = tree_flatten(arguments)
    mapped = [isinstance(x, torch.Tensor) and is_legacy_batchedtensor(x) for x in leaves]
    level = _level(leaves[mapped.index(True)])
    leaves = [remove_batch_dim(x, level, 1, 0) if cut else x for x, cut in zip(leaves, mapped, strict=True)]
    outputs = _loop(operator, leaves[mapped.index(True)].shape[0], leaves, mapped, spec)
    return tree_map(lambda x: add_batch_dim(x, 0, level), outputs)


def _level(batched: torch.Tensor) -> int:
    """The level of a tensor of the older vmap, which the thread of a CUDA backward does not know."""
    for level in range(1, 64):
        if not is_legacy_batchedtensor(remove_batch_dim(batched, level, 1, 0)):
            return level
    raise RuntimeError("gradients are batched over several dimensions at once; batch them over one")


def _loop(operator: Any, count: int, leaves: Sequence[Any], mapped: Sequence[bool], spec: Any) -> Any:
    """The outputs of an operator for each of `count` slices, stacked. mapped: which leaves are cut, along dimension 0."""
    outputs = []
    for index in range(count):
        own = [x[index] if cut else x for x, cut in zip(leaves, mapped, strict=True)]
        outputs.append(operator(*tree_unflatten(own, spec)))
    return tree_map(lambda *slices: torch.stack(slices), *outputs)


def refuse_double_backward(ctx: Any, *gradients: Any) -> NoReturn:
    raise RuntimeError('the fused kernels have no double backward; use backend="reference" for second derivatives')


class Layout(NamedTuple):
    """All of a tensor but its values and where they are."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def layouts(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """What checks and plans are looked up by: the fields of a Layout for each tensor, None for None."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors])


class Layouts(tuple[Any, ...]):
    """The layouts of the tensors of a plain call: equal ones are one object, and found by identity from then on.

    What is looked up by them in a call then need not hash and compare the numbers of every tensor again.
    """

    __hash__, __eq__, __ne__ = object.__hash__, object.__eq__, object.__ne__

    @functools.cached_property
    def unit_strides(self) -> bool:
        """Whether the last dimension of every tensor is contiguous, as the kernels need."""
        return all([strides[-1] == 1 for _, strides, _, _ in self])


interned = functools.lru_cache(maxsize=1024)(Layouts)


_caches: list[Any] = []
META = torch.device("meta")


def forgotten_with_plans(cached: Cached) -> Cached:
    """A function with a cache, which forget_plans empties."""
    _caches.append(cached)
    return cached


def planned(plan: Callable[..., Any]) -> Callable[..., Any]:
    """`plan(*tensors, *options)` as a function (layouts, *options), worked out once for each signature, on meta tensors.

    A plan holds what follows from layouts and options, which must be hashable: layouts of outputs and workspaces, and launches.
    """

    @forgotten_with_plans
    @functools.lru_cache(maxsize=1024)
    def look_up(layouts: tuple[Any, ...], *options: Any) -> Any:
        return plan(*allocate(layouts, META), *options)

    return look_up


def forget_plans() -> None:
    """Everything is planned anew, with what the table of launch parameters says now."""
    for cached in _caches:
        cached.cache_clear()


def takes_the_short_way(device: torch.device) -> bool:
    """It allocates on the current device, and fills nothing where torch is to be deterministic, as torch.empty does."""
    return empty_cuda is not None and device.index == current_device() and not is_deterministic()


def allocate(layouts: Sequence[Any], device: torch.device) -> list[Any]:
    """Tensors of these layouts on this device, not filled; None for None."""
    if device.type == "cuda" and takes_the_short_way(device):
        return [None if x is None else empty_cuda(tuple(x[0]), x[1], x[2]) for x in layouts]
    return [None if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device=device) for x in layouts]


def uses_tf32(tensor: torch.Tensor) -> bool:
    """Whether the user allowed tf32 in the products of this tensor; plans depend on it (launch.dot_precision)."""
    return tf32_allowed(tensor.dtype)


def tf32_allowed(dtype: torch.dtype) -> bool:
    """Whether torch's own products of this dtype may be rounded to tf32.

    All switches end in this one, the older ones (allow_tf32, set_float32_matmul_precision) too; where nothing is set here, it
    reads torch.backends.fp32_precision. The getter of allow_tf32 raises when switches of both kinds were set.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Context in which the device of the tensor is the current one; free when it already is."""
    if not tensor.is_cuda or tensor.get_device() == current_device():  # CUDA is up where there is such a tensor
        return nullcontext()
    return torch.cuda.device(tensor.device)


def stream_of(tensor: torch.Tensor) -> int:
    return current_stream(tensor.get_device())


def kernels(name: str) -> Callable[[], ModuleType]:
    """A function that returns `nearfar.triton_kernels.<name>`: Triton comes with the first launch, not with the package."""
    return functools.cache(lambda: importlib.import_module(f"nearfar.triton_kernels.{name}"))


_launch = kernels("launch")


def launch_all(tensor: torch.Tensor, *launches: Any) -> None:
    """Make (launch, tensors) pairs in order on the device of a tensor; on the meta device, see compile_ahead."""
    if tensor.is_meta:
        _launch().build_ahead(*launches)
        return
    with device_of(tensor):
        _launch().launch_all(*launches)


def compile_ahead(device: torch.device | None, backward: Callable[..., object], *arguments: Any) -> None:
    """Start to compile what `backward(*arguments)`, for meta tensors, will launch on this device; None: nothing.

    A forward whose result needs gradients calls it while it is planned, that is once for each signature, so that the kernels
    of both directions are compiled at one time. The upstream gradient is taken to be laid out as the output is; the kernels
    of another one are compiled when it comes.
    """
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            backward(*arguments)


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself when its last dimension is contiguous, as the kernels need, otherwise a copy."""
    return tensor if tensor.stride()[-1] == 1 else tensor.contiguous()


def unit_strides(rows: Layouts | None, *tensors: torch.Tensor) -> tuple[Layouts | None, tuple[torch.Tensor, ...]]:
    """Layouts of the tensors and they themselves after unit_stride. rows: layouts before it, None where a call is not plain."""
    if rows is not None and rows.unit_strides:
        return rows, tensors
    tensors = tuple(map(unit_stride, tensors))
    return None if rows is None else interned(layouts(*tensors)), tensors


def empty_rows(like: torch.Tensor, width: int) -> torch.Tensor:
    """(B, H, N, width) in the memory order of `like`: a (B, N, H, D) projection gets its output in the same order."""
    batch, heads, length, like_width = like.shape
    if width == like_width:
        return torch.empty_like(like)
    if heads > 1 and like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, width).transpose(1, 2)
    return like.new_empty(batch, heads, length, width)
