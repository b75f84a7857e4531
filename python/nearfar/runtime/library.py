"""Registration of torch operators with torch.library: vmap rules, and errors for forward AD and double backward."""

import functools
from ast import literal_eval
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from nearfar.runtime.private import (
    add_batch_dim,
    any_requires_grad,
    below_autograd,
    direct_apply,
    in_forward_ad,
    is_legacy_batchedtensor,
    remove_batch_dim,
    single_level_function,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

Direction = tuple[str, Callable[..., Any], Callable[..., Any]]  # schema, function and fake


def define(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    serves: str | None = None,
    autograd: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Register `torch.ops.nearfar.<name>`: implementation, fake (shapes, strides, dtypes), autograd and vmap.

    vmap calls the operator once per slice. Forward AD raises.

    Args:
        serves: the public functions that it serves, for messages; None for its name.
        autograd, setup_context: as for `torch.library.register_autograd`; None if its outputs have no gradient.
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
    """Register an operator and the operator of its backward. The latter cannot be differentiated.

    Args:
        forward, backward: schema, function and fake of `<name>` and of `<name>_backward`.
        autograd, setup_context, serves: as for `define`.
    """
    define(name, *forward, serves or name, autograd, setup_context)
    define(f"{name}_backward", *backward, serves or name, refuse_double_backward)


_libraries: list[torch.library.Library] = []  # keeps the registrations alive


class _Library(torch.library.Library):
    """Registers autograd kernels that refuse forward AD: tangents would otherwise be dropped silently."""

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
    """Raise if a tensor among the arguments, or in lists of them, has a tangent. Costs nothing outside forward AD."""
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
    """An autograd kernel like that of torch.library.register_autograd, but one that works under nested torch.func transforms.

    There Function.apply requires its own transform rules. An operator already has rules, by its dispatch keys, so the apply of
    the C++ base class is called instead.
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
        arguments = (*arguments, *map(literal_eval, defaults[len(arguments) :]))  # the dispatcher omits defaults
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
    """The same rule for the legacy vmap, which torch.autograd.grad(is_grads_batched=True) still uses."""
    leaves, spec = tree_flatten(arguments)
    mapped = [isinstance(x, torch.Tensor) and is_legacy_batchedtensor(x) for x in leaves]
    level = _level(leaves[mapped.index(True)])
    leaves = [remove_batch_dim(x, level, 1, 0) if cut else x for x, cut in zip(leaves, mapped, strict=True)]
    outputs = _loop(operator, leaves[mapped.index(True)].shape[0], leaves, mapped, spec)
    return tree_map(lambda x: add_batch_dim(x, 0, level), outputs)


def _level(batched: torch.Tensor) -> int:
    """The level of a tensor of the legacy vmap. Found by trial, because the thread of a CUDA backward does not know it."""
    for level in range(1, 64):
        if not is_legacy_batchedtensor(remove_batch_dim(batched, level, 1, 0)):
            return level
    raise RuntimeError("gradients are batched over several dimensions at once; batch them over one")


def _loop(operator: Any, count: int, leaves: Sequence[Any], mapped: Sequence[bool], spec: Any) -> Any:
    """The outputs of an operator for each of `count` slices, stacked. mapped: which leaves are sliced, along dimension 0."""
    outputs = []
    for index in range(count):
        own = [x[index] if cut else x for x, cut in zip(leaves, mapped, strict=True)]
        outputs.append(operator(*tree_unflatten(own, spec)))
    return tree_map(lambda *slices: torch.stack(slices), *outputs)


def refuse_double_backward(ctx: Any, *gradients: Any) -> NoReturn:
    raise RuntimeError('the fused kernels have no double backward; use backend="reference" for second derivatives')
