"""Base class of operators with hand-written kernels: registration, fakes, autograd, plain eager calls, plans.

A subclass defines its schema, the layouts of its outputs, and the launches of each of its backends.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from nearfar.runtime.backend import Backend
from nearfar.runtime.checks import PLAIN, is_plain
from nearfar.runtime.library import register
from nearfar.runtime.plans import Repeats, planned
from nearfar.runtime.private import direct_apply
from nearfar.runtime.program import Program
from nearfar.runtime.tensors import empty_like, empty_rows, layouts, tf32_allowed, unit_stride

grad_enabled = torch.is_grad_enabled
Tensors = Sequence[torch.Tensor | None]  # None for absent ones


class Operator:
    """`torch.ops.nearfar.<name>` and `<name>_backward`. A plain eager call runs the same programs without the dispatcher.

    name: of the torch operator.
    serves: the public functions that it serves, for messages.
    tensors: schema of its tensors. Lists come first and have equal lengths; tensors without a gradient come last.
    options: schema of the other arguments, except the backends of the forward and of the backward.
    rows: names of the tensors of shape (B, H, N, width). The others are small, and kernels get contiguous copies of them.
    constants: how many tensors, at the end, have no gradient.
    outputs: names. A call returns the first `visible` ones. The backward gets the first output and those not visible.
    backends: by name.
    """

    name: ClassVar[str]
    serves: ClassVar[str | None] = None
    tensors: ClassVar[str]
    options: ClassVar[str]
    rows: ClassVar[Sequence[str]]
    constants: ClassVar[int] = 0
    outputs: ClassVar[Sequence[str]]
    visible: ClassVar[int] = 1
    backends: Mapping[str, Backend]

    def empty(self, tensors: Any, *options: Any) -> Tensors:
        """Uninitialised outputs; None for absent ones. options: those of the schema, and the backend."""
        raise NotImplementedError

    def has_nothing_to_do(self, tensors: Any, outputs: Any) -> bool:
        """True if outputs and gradients are 0 or empty for any values."""
        return False

    def __init__(self) -> None:
        kinds, self._names = zip(*[argument.split() for argument in self.tensors.split(", ")], strict=True)
        self._lists = [kind == "Tensor[]" for kind in kinds]
        saved = ", ".join(f"Tensor? {name}" for name in self._saved_names())
        of_outputs = ", ".join(f"Tensor? d{name}" for name in self.outputs[: self.visible])
        gradients = ", ".join("Tensor[]" if listed else "Tensor" for listed in self._with_gradient(self._lists))
        forward = f"({self.tensors}, {self.options}, {_BACKEND}, str backward_backend=\"triton\")"
        backward = f"({of_outputs}, {self.tensors}, {saved}, {self.options}, {_BACKEND})"
        register(
            self.name,
            (f"{forward} -> ({', '.join(['Tensor'] * len(self.outputs))})", self._dispatched_forward, self._fake_forward),
            (f"{backward} -> ({gradients})", self._dispatched_backward, self._fake_backward),
            self._autograd,
            self._save,
            self.serves,
        )
        self._forward_op = getattr(torch.ops.nearfar, self.name).default
        self._backward_op = getattr(torch.ops.nearfar, f"{self.name}_backward").default

    def __call__(self, repeats: Repeats[Any] | None, plain: bool, tensors: Tensors, *options: Any) -> Any:
        """Compute the visible outputs. The arguments have been checked.

        Args:
            repeats: the plan cache for these options, or None.
            plain: whether the call is plain as far as `rows` are concerned.
            tensors: those of the schema, with lists flattened.
            options: those of the schema, and the backends of the forward and of the backward.
        """
        if not (plain and all([x is None or type(x) in PLAIN for x in tensors])):
            return self.shown(self._forward_op(*self._structured(tensors), *options))
        tensors = self._arranged(tensors, options[-2])
        plan = Plan(self, tensors, options)
        if repeats is not None:
            repeats.keep(plan, *[x for x in tensors if x is not None])
        return plan(*tensors)

    # ---- programs

    def forward(self, tensors: Tensors, *options: Any) -> Tensors:
        """Run the forward's program and return all outputs."""
        tensors = self._arranged(tensors, options[-2])
        return self.forward_program(tensors, False, *options)(*tensors)

    def forward_program(self, tensors: Tensors, tracked: bool, *options: Any) -> Program:
        """The forward's program. tracked: a backward may follow, so its kernels are compiled in the background."""
        device = next(x.device for x in tensors if x is not None)
        ahead = device if tracked and compiles(device) else None
        return self._plan_forward(layouts(*tensors), self._tf32(tensors), ahead, *options)

    def backward(self, gradients: Tensors, tensors: Tensors, saved: Tensors, *options: Any) -> Tensors:
        """Run the backward's program and return the gradients of all tensors. options: those of the schema, and its backend."""
        program, given = self.arranged_backward(gradients, tensors, saved, *options)
        return program(*given)

    def arranged_backward(
        self, gradients: Tensors, tensors: Tensors, saved: Tensors, *options: Any
    ) -> tuple[Program, Tensors]:
        """The backward's program and its inputs, copied where kernels require another alignment."""
        gradients, tensors = self._arranged_gradients(gradients, saved, *options), self._arranged(tensors, options[-1])
        given = (*gradients, *tensors, *saved)
        return self.backward_program(given, *options), given

    def backward_program(self, given: Tensors, *options: Any) -> Program:
        """The backward's program. given: gradients of the visible outputs, the tensors, and the saved outputs."""
        return self._plan_backward(layouts(*given), self._tf32(given), *options)

    @planned
    def _plan_forward(self, tensors: Any, _tf32: bool, ahead: torch.device | None, *options: Any) -> Program:
        *own, backend, backward_backend = options
        outputs = self.empty(tensors, *own, backend)
        if self.has_nothing_to_do(tensors, outputs):
            return Program(tensors, outputs, ())
        if ahead is not None:  # assumes that the upstream gradient has the layout of the output
            given = (outputs[0], *[None] * (self.visible - 1), *tensors, outputs[0], *outputs[self.visible :])
            self.backward_program(given, *own, backward_backend).build_ahead(ahead)
        return self.backends[backend].forward(tensors, outputs, *own)

    @planned
    def _plan_backward(self, given: Any, _tf32: bool, *options: Any) -> Program:
        *own, backend = options
        gradients, (tensors, saved) = given[: self.visible], self.parted(given[self.visible :])
        results = self.empty_gradients(tensors)
        if self.has_nothing_to_do(tensors, saved):
            return Program(given, results, ())
        return self.backends[backend].backward(gradients, tensors, saved, results, *own)

    def empty_gradients(self, tensors: Any) -> list[torch.Tensor | None]:
        """Uninitialised gradients of all tensors; None for those without one."""
        found: list[torch.Tensor | None] = []
        for name, x in zip(self._flat_names(len(tensors)), tensors, strict=True):
            found.append(None if x is None else empty_rows(x, x.shape[3]) if name in self.rows else empty_like(x))
        return [*found[: len(found) - self.constants], *[None] * self.constants]

    def _tf32(self, tensors: Tensors) -> bool:
        return any([x is not None and tf32_allowed(x.dtype) for x in tensors[:2]])

    def _arranged(self, tensors: Tensors, backend: str) -> list[torch.Tensor | None]:
        aligned, found = self.backends[backend].aligned, []
        for name, x in zip(self._flat_names(len(tensors)), tensors, strict=True):
            found.append(None if x is None else aligned(unit_stride(x)) if name in self.rows else x.contiguous())
        return found

    def _arranged_gradients(self, gradients: Tensors, saved: Any, *options: Any) -> list[torch.Tensor | None]:
        """The upstream gradients as kernels read them. A missing first one becomes 0; the others may stay None."""
        first, *others = gradients
        first = torch.zeros_like(saved[0]) if first is None else unit_stride(first)
        aligned = self.backends[options[-1]].aligned_gradient(first, *options[:-1])
        return [aligned, *[None if x is None else x.contiguous() for x in others]]

    # ---- the torch operators

    def _saved_names(self) -> list[str]:
        return [self.outputs[0], *self.outputs[self.visible :]]

    def _with_gradient(self, values: Sequence[Any]) -> Sequence[Any]:
        return values[: len(values) - self.constants]

    @functools.cache  # noqa: B019  (operators live as long as the package)
    def _flat_names(self, count: int) -> tuple[str, ...]:
        """The name of each of `count` tensors, with lists flattened."""
        each, pairs = self._factors(count), zip(self._names, self._lists, strict=True)
        return tuple([name for name, listed in pairs for _ in range(each if listed else 1)])

    def _factors(self, count: int) -> int:
        """The length of each list among `count` flattened tensors."""
        lists = sum(self._lists)
        return (count - len(self._lists) + lists) // lists if lists else 0

    def _structured(self, tensors: Sequence[Any]) -> list[Any]:
        """Flattened tensors, regrouped into the lists of the schema."""
        remaining, each = iter(tensors), self._factors(len(tensors))
        return [[next(remaining) for _ in range(each)] if listed else next(remaining) for listed in self._lists]

    def _flat(self, arguments: Sequence[Any]) -> list[Any]:
        return [x for given, listed in zip(arguments, self._lists, strict=True) for x in (given if listed else (given,))]

    def _split(self, arguments: Sequence[Any]) -> tuple[list[Any], Sequence[Any]]:
        """(flattened tensors, remaining arguments)."""
        count = len(self._lists)
        return self._flat(arguments[:count]), arguments[count:]

    def present(self, outputs: Tensors, tensors: Any, *options: Any) -> list[torch.Tensor]:
        """The torch operator's outputs. It has no optional ones, so an empty tensor replaces None."""
        like = next(x for x in tensors if x is not None)
        return [like.new_empty(0) if x is None else x for x in outputs]

    def absent(self, saved: Sequence[Any], tensors: Any) -> list[torch.Tensor | None]:
        """The inverse of `present`: None for empty 1-d tensors."""
        return [None if x is None or x.dim() == 1 else x for x in saved]

    def parted(self, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """(tensors, saved outputs)."""
        end = len(values) - len(self._saved_names())
        return values[:end], values[end:]

    def shown(self, outputs: Sequence[Any]) -> Any:
        """The visible outputs, as a call returns them."""
        return outputs[0] if self.visible == 1 else tuple(outputs[: self.visible])

    def _dispatched_forward(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        tensors, options = self._split_forward(arguments)
        return tuple(self.present(self.forward(tensors, *options), tensors, *options[:-1]))

    def _fake_forward(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        tensors, options = self._split_forward(arguments)
        return tuple(self.present(self.empty_fake(tensors, *options[:-1]), tensors, *options[:-1]))

    def empty_fake(self, tensors: Any, *options: Any) -> Tensors:
        """Fake outputs of a call whose sizes may be symbolic."""
        return self.empty(tensors, *options)

    def _num_options(self) -> int:
        return len(self.options.split(", "))

    def _dispatched_backward(self, *arguments: Any) -> tuple[Any, ...]:
        gradients, tensors, saved, options = self._split_backward(arguments)
        saved = self.absent(saved, tensors)
        return self._present_gradients(self.backward(gradients, tensors, saved, *options), tensors)

    def _fake_backward(self, *arguments: Any) -> tuple[Any, ...]:
        _, tensors, _, _ = self._split_backward(arguments)
        return self._present_gradients(self.empty_gradients(tensors), tensors)

    def _split_forward(self, arguments: Sequence[Any]) -> tuple[list[Any], Sequence[Any]]:
        """(flattened tensors, options with both backends)."""
        return self._split(_with_backends(arguments, len(self._lists) + self._num_options() + 2))

    def _split_backward(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], list[Any], Sequence[Any], Sequence[Any]]:
        """(gradients of the visible outputs, flattened tensors, saved outputs, options)."""
        end = self.visible + len(self._lists) + len(self._saved_names())
        arguments = _with_backends(arguments, end + self._num_options() + 1)
        gradients = [None if x is None or x.dim() == 1 else x for x in arguments[: self.visible]]
        tensors, rest = self._split(arguments[self.visible :])
        count = len(self._saved_names())
        return gradients, tensors, rest[:count], rest[count:]

    def _present_gradients(self, results: Sequence[Any], tensors: Sequence[Any]) -> tuple[Any, ...]:
        like = next(x for x in tensors if x is not None)
        found = self._structured([like.new_empty(0) if x is None else x for x in results])
        return tuple(self._with_gradient(found))

    def _save(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
        tensors, (*options, _, backward_backend) = self._split(inputs)
        ctx.save_for_backward(*tensors, output[0], *output[self.visible :])
        ctx.set_materialize_grads(False)
        ctx.options = (*options, backward_backend)

    def _autograd(self, ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        tensors, saved = self.parted(ctx.saved_tensors)  # read once, as checkpointing requires
        found = self.dispatched_backward(gradients[: self.visible], tensors, saved, *ctx.options)
        return (*self._structured(found), *[None] * (len(ctx.options) + 1))

    def dispatched_backward(self, gradients: Any, tensors: Any, saved: Any, *options: Any) -> list[torch.Tensor | None]:
        """Gradients of all tensors, through the torch operator of the backward."""
        results = self._backward_op(*gradients, *self._structured(tensors), *saved, *options)
        found = [x for result in results for x in (result if isinstance(result, (list, tuple)) else (result,))]
        found += [None] * self.constants
        return [None if x is None else result for x, result in zip(tensors, found, strict=True)]


_BACKEND = 'str backend="triton"'


def _with_backends(arguments: Sequence[Any], count: int) -> Sequence[Any]:
    """The arguments of an operator, with the default backends that the dispatcher omits."""
    return (*arguments, *["triton"] * (count - len(arguments)))


def compiles(device: torch.device) -> bool:
    """Whether kernels are compiled for this device (True) or interpreted."""
    return device.type == "cuda"


class Plan:
    """The plan of a plain call: everything about it except its tensors."""

    def __init__(self, op: Operator, tensors: Tensors, options: tuple[Any, ...]) -> None:
        self.op, self._options = op, options
        *own, _, backward_backend = options
        self._backward_options = (*own, backward_backend)
        self._tracked = grad_enabled() and any([x is not None and x.requires_grad for x in tensors])
        self._program = op.forward_program(tensors, self._tracked, *options)
        self._backwards: dict[tuple[bool, ...], Repeats[Program]] = {}  # key: which gradients and saved tensors are missing

    def __call__(self, *tensors: Any) -> Any:
        """The visible outputs."""
        return _apply(self, *tensors) if self._tracked else self.op.shown(self.outputs(*tensors))

    def outputs(self, *tensors: torch.Tensor | None) -> Sequence[Any]:
        outputs = self._program.at_once(*tensors)
        if outputs is None:
            tensors = tuple(self.op._arranged(tensors, self._options[-2]))
            outputs = self.op.forward_program(tensors, self._tracked, *self._options)(*tensors)
        return outputs

    def gradients(self, gradients: Sequence[Any], saved: Sequence[Any]) -> Sequence[Any]:
        """Gradients of the tensors. gradients: those of the visible outputs. saved: the tensors and the saved outputs."""
        given = (*gradients, *saved)
        missing = tuple([x is None for x in given])
        repeats = self._backwards.get(missing)
        if repeats is None:
            repeats = self._backwards[missing] = Repeats()
        program = repeats.find(*[x for x in given if x is not None])
        results = None if program is None else program.at_once(*given)
        return self._first_gradients(gradients, saved, repeats) if results is None else results

    def _first_gradients(self, gradients: Sequence[Any], saved: Sequence[Any], repeats: Repeats[Program]) -> Sequence[Any]:
        op, options = self.op, self._backward_options
        tensors, saved = op.parted(saved)
        # The backward of a plain forward need not be plain. The torch operator raises for second derivatives, in either mode,
        # and handles batched gradients.
        if grad_enabled() or not is_plain(*[x for x in gradients if x is not None]):
            return op.dispatched_backward(gradients, tensors, saved, *options)
        program, given = op.arranged_backward(gradients, tensors, saved, *options)
        results = program(*given)
        repeats.keep(program, *[x for x in given if x is not None])
        return results


class _Eager(torch.autograd.Function):
    """Autograd of a plain eager call, without the dispatcher. It takes few arguments, because torch inspects each."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: torch.Tensor | None) -> Any:
        outputs = plan.outputs(*tensors)
        ctx.save_for_backward(*tensors, outputs[0], *outputs[plan.op.visible :])
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return plan.op.shown(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return None, *ctx.plan.gradients(gradients, ctx.saved_tensors)


_apply: Callable[..., Any] = direct_apply(_Eager)  # safe: calls under torch.func transforms are never plain
