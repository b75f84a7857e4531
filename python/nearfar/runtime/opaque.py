"""References as torch operators, for torch.compile and export: one graph node that serves every length and packing."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from nearfar.runtime.checks import is_compiling, no_autocast
from nearfar.runtime.library import define
from nearfar.runtime.private import autograd_inside, tree_flatten, tree_leaves, tree_map, tree_unflatten


def opaque(
    name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any], differentiable: int = 1
) -> Callable[..., Any]:
    """A function that calls `function` or, under tracing, the operator `torch.ops.nearfar.<name>_reference`.

    A traced reference would unroll its loops over blocks and sequences, so the graph would fit one length only. The operator
    hides the loops. Its backward runs the reference again under autograd and cannot be differentiated a second time. Without
    tracing, `function` itself is called, and is differentiable as often as it supports.

    Args:
        schema: of the arguments of function, tensors first; the outputs are tensors.
        fake: returns contiguous tensors like the outputs; for an output that is None, an empty 1-d tensor in the dtype of the
            first argument.
        differentiable: how many outputs have gradients; they come first.
    """
    arguments, returns = schema.split(" -> ")
    single = returns == "Tensor"

    def forward(*arguments: Any) -> Any:
        with no_autocast(_first(arguments)):
            outputs = function(*arguments)
        return tree_map(functools.partial(_own, like=_first(arguments)), outputs)

    def backward(do: Sequence[Any], *arguments: Any) -> list[torch.Tensor]:
        leaves, spec = tree_flatten(arguments)
        with autograd_inside(), no_autocast(_first(arguments)):
            leaves = [x.detach().requires_grad_() if _has_gradient(x) else x for x in leaves]
            outputs = function(*tree_unflatten(leaves, spec))
            outputs = (outputs,) if single else outputs[:differentiable]
            inputs = [x for x in leaves if _has_gradient(x)]
            pairs = [(o, d) for o, d in zip(outputs, do, strict=True) if o is not None and o.requires_grad]
            gradients = torch.autograd.grad(
                [o for o, _ in pairs], inputs, [d for _, d in pairs], allow_unused=True, materialize_grads=True
            )
        return [torch.empty_like(x).copy_(gradient) for x, gradient in zip(inputs, gradients, strict=True)]

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        leaves, ctx.spec = tree_flatten(inputs)
        ctx.save_for_backward(*[x for x in leaves if isinstance(x, torch.Tensor)])
        ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in leaves]
        if not single:
            ctx.mark_non_differentiable(*output[differentiable:])

    def autograd(ctx: Any, *do: Any) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        leaves = [next(tensors) if other is None else other[0] for other in ctx.others]
        gradients = iter(backward_operator(list(do[:differentiable]), *tree_unflatten(leaves, ctx.spec)))
        return tuple(tree_unflatten([next(gradients) if _has_gradient(x) else None for x in leaves], ctx.spec))

    def fake_backward(do: Sequence[Any], *arguments: Any) -> list[torch.Tensor]:
        return [torch.empty_like(x) for x in tree_leaves(arguments) if _has_gradient(x)]

    define(f"{name}_reference", schema, forward, fake, name, autograd, save)
    schema_of_backward = f"(Tensor[] do, {arguments[1:]} -> Tensor[]"
    define(f"{name}_reference_backward", schema_of_backward, backward, fake_backward, name, _refuse_double_backward)
    operator = getattr(torch.ops.nearfar, f"{name}_reference").default
    backward_operator = getattr(torch.ops.nearfar, f"{name}_reference_backward").default

    def call(*arguments: Any) -> Any:
        if is_compiling():
            return operator(*arguments)
        with no_autocast(_first(arguments)):
            return function(*arguments)

    return call


def _first(arguments: Any) -> torch.Tensor:
    return next(x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor))


def _own(output: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A copy of the output, so that it is no view of an input and has the layout of the fake one."""
    return like.new_empty(0) if output is None else output.clone(memory_format=torch.contiguous_format)


def _has_gradient(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _refuse_double_backward(ctx: Any, *gradients: Any) -> NoReturn:
    raise RuntimeError("a compiled reference has no double backward; call it outside torch.compile for second derivatives")
