"""What every operator with hand-written kernels shares: registration, fakes, autograd, plain eager calls, plans.

An operator tells what it alone knows: its schema, the layouts of its outputs, and the launches of each of its backends.
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
from nearfar.runtime.tensors import empty_rows, layouts, tf32_allowed, unit_stride

grad_enabled = torch.is_grad_enabled
Tensors = Sequence[torch.Tensor | None]  # None for what is absent


class Operator:
    """`torch.ops.nearfar.<name>` and `<name>_backward`; a plain eager call goes past the dispatcher, to the same programs.

    name, serves: of the torch operator, and the public functions that it serves, for messages.
    tensors: schema of its tensors. Lists come first and are of one length; those without a gradient come last.
    options: schema of the other arguments, but for the backends of the forward and of the backward.
    rows: names of the tensors (B, H, N, width); of the others, which are small, kernels get contiguous copies.
    constants: how many of the last tensors have no gradient.
    outputs: names. A call returns the first `visible` ones; the first and those that are not visible are saved.
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
        """The outputs, not filled; None for those that do not exist. options: those of the schema, and the backend."""
        raise NotImplementedError

    def has_nothing_to_do(self, tensors: Any, outputs: Any) -> bool:
        """True if outputs and gradients are 0, or empty, whatever the values are."""
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
        """What the caller gets, of checked arguments.

        Args:
            repeats: of calls with these options, or None.
            plain: whether the rows are those of a plain call.
            tensors: those of the schema, lists one after the other.
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
        """All outputs, by the program of the forward."""
        tensors = self._arranged(tensors, options[-2])
        return self.forward_program(tensors, False, *options)(*tensors)

    def forward_program(self, tensors: Tensors, tracked: bool, *options: Any) -> Program:
        """tracked: whether a backward is to be expected, of which the kernels are compiled meanwhile."""
        device = next(x.device for x in tensors if x is not None)
        ahead = device if tracked and compiles(device) else None
        return self._plan_forward(layouts(*tensors), self._tf32(tensors), ahead, *options)

    def backward(self, gradients: Tensors, tensors: Tensors, saved: Tensors, *options: Any) -> Tensors:
        """Gradients of all tensors, by the program of the backward. options: with one backend, that of the backward."""
        program, given = self.arranged_backward(gradients, tensors, saved, *options)
        return program(*given)

    def arranged_backward(
        self, gradients: Tensors, tensors: Tensors, saved: Tensors, *options: Any
    ) -> tuple[Program, Tensors]:
        """The program of the backward, and the tensors that it takes as the kernels read them."""
        gradients, tensors = self._arranged_gradients(gradients, saved, *options), self._arranged(tensors, options[-1])
        given = (*gradients, *tensors, *saved)
        return self.backward_program(given, *options), given

    def backward_program(self, given: Tensors, *options: Any) -> Program:
        """given: gradients of the visible outputs, the tensors, and the outputs that are saved."""
        return self._plan_backward(layouts(*given), self._tf32(given), *options)

    @planned
    def _plan_forward(self, tensors: Any, _tf32: bool, ahead: torch.device | None, *options: Any) -> Program:
        *own, backend, backward_backend = options
        outputs = self.empty(tensors, *own, backend)
        if self.has_nothing_to_do(tensors, outputs):
            return Program(tensors, outputs, ())
        if ahead is not None:  # the upstream gradient is taken to be laid out as the output is
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
        """The gradients of all tensors, not filled; None for those without one."""
        found: list[torch.Tensor | None] = []
        for name, x in zip(self._flat_names(len(tensors)), tensors, strict=True):
            found.append(None if x is None else empty_rows(x, x.shape[3]) if name in self.rows else torch.empty_like(x))
        return [*found[: len(found) - self.constants], *[None] * self.constants]

    def _tf32(self, tensors: Tensors) -> bool:
        return any([x is not None and tf32_allowed(x.dtype) for x in tensors[:2]])

    def _arranged(self, tensors: Tensors, backend: str) -> list[torch.Tensor | None]:
        aligned, found = self.backends[backend].aligned, []
        for name, x in zip(self._flat_names(len(tensors)), tensors, strict=True):
            found.append(None if x is None else aligned(unit_stride(x)) if name in self.rows else x.contiguous())
        return found

    def _arranged_gradients(self, gradients: Tensors, saved: Any, *options: Any) -> list[torch.Tensor | None]:
        """That of the first output is 0 where nothing came; others may be missing."""
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
        """The name of each of `count` tensors, those of lists one after the other."""
        each, pairs = self._factors(count), zip(self._names, self._lists, strict=True)
        return tuple([name for name, listed in pairs for _ in range(each if listed else 1)])

    def _factors(self, count: int) -> int:
        """The length of the lists among `count` tensors."""
        lists = sum(self._lists)
        return (count - len(self._lists) + lists) // lists if lists else 0

    def _structured(self, tensors: Sequence[Any]) -> list[Any]:
        """The tensors as the schema has them, with lists."""
        remaining, each = iter(tensors), self._factors(len(tensors))
        return [[next(remaining) for _ in range(each)] if listed else next(remaining) for listed in self._lists]

    def _flat(self, arguments: Sequence[Any]) -> list[Any]:
        return [x for given, listed in zip(arguments, self._lists, strict=True) for x in (given if listed else (given,))]

    def _split(self, arguments: Sequence[Any]) -> tuple[list[Any], Sequence[Any]]:
        """Tensors, flat, and what comes after them."""
        count = len(self._lists)
        return self._flat(arguments[:count]), arguments[count:]

    def present(self, outputs: Tensors, tensors: Any, *options: Any) -> list[torch.Tensor]:
        """The outputs of the torch operator, which has no optional ones: an empty tensor stands for what does not exist."""
        like = next(x for x in tensors if x is not None)
        return [like.new_empty(0) if x is None else x for x in outputs]

    def absent(self, saved: Sequence[Any], tensors: Any) -> list[torch.Tensor | None]:
        """And back."""
        return [None if x is None or x.dim() == 1 else x for x in saved]

    def parted(self, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Tensors, and the outputs that are saved after them."""
        end = len(values) - len(self._saved_names())
        return values[:end], values[end:]

    def shown(self, outputs: Sequence[Any]) -> Any:
        """What the caller gets."""
        return outputs[0] if self.visible == 1 else tuple(outputs[: self.visible])

    def _dispatched_forward(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        tensors, options = self._split_forward(arguments)
        return tuple(self.present(self.forward(tensors, *options), tensors, *options[:-1]))

    def _fake_forward(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        tensors, options = self._split_forward(arguments)
        return tuple(self.present(self.empty_fake(tensors, *options[:-1]), tensors, *options[:-1]))

    def empty_fake(self, tensors: Any, *options: Any) -> Tensors:
        """The outputs of a call whose sizes may be symbols."""
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
        """Tensors, and options with both backends."""
        return self._split(_with_backends(arguments, len(self._lists) + self._num_options() + 2))

    def _split_backward(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], list[Any], Sequence[Any], Sequence[Any]]:
        """Gradients of the visible outputs, tensors, saved outputs, options."""
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
        tensors, saved = self.parted(ctx.saved_tensors)  # unpacked once, as checkpointing demands
        found = self.dispatched_backward(gradients[: self.visible], tensors, saved, *ctx.options)
        return (*self._structured(found), *[None] * (len(ctx.options) + 1))

    def dispatched_backward(self, gradients: Any, tensors: Any, saved: Any, *options: Any) -> list[torch.Tensor | None]:
        """Gradients of all tensors, by the torch operator."""
        results = self._backward_op(*gradients, *self._structured(tensors), *saved, *options)
        found = [x for result in results for x in (result if isinstance(result, (list, tuple)) else (result,))]
        found += [None] * self.constants
        return [None if x is None else result for x, result in zip(tensors, found, strict=True)]


_BACKEND = 'str backend="triton"'


def _with_backends(arguments: Sequence[Any], count: int) -> Sequence[Any]:
    """The arguments of an operator, with the defaults that the dispatcher leaves out: its backends."""
    return (*arguments, *["triton"] * (count - len(arguments)))


def compiles(device: torch.device) -> bool:
    """Whether kernels are compiled for this device, not interpreted."""
    return device.type == "cuda"


class Plan:
    """A plain call of an operator without its tensors."""

    def __init__(self, op: Operator, tensors: Tensors, options: tuple[Any, ...]) -> None:
        self.op, self._options = op, options
        *own, _, backward_backend = options
        self._backward_options = (*own, backward_backend)
        self._tracked = grad_enabled() and any([x is not None and x.requires_grad for x in tensors])
        self._program = op.forward_program(tensors, self._tracked, *options)
        self._backwards: dict[tuple[bool, ...], Repeats[Program]] = {}  # by which gradients and saved tensors there are

    def __call__(self, *tensors: Any) -> Any:
        """What the caller gets."""
        return _apply(self, *tensors) if self._tracked else self.op.shown(self.outputs(*tensors))

    def outputs(self, *tensors: torch.Tensor | None) -> Sequence[Any]:
        outputs = self._program.at_once(*tensors)
        if outputs is None:
            tensors = tuple(self.op._arranged(tensors, self._options[-2]))
            outputs = self.op.forward_program(tensors, self._tracked, *self._options)(*tensors)
        return outputs

    def gradients(self, gradients: Sequence[Any], saved: Sequence[Any]) -> Sequence[Any]:
        """Gradients of the tensors from those of the visible outputs; saved: the tensors, and the outputs that are saved."""
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
        # That the forward was plain binds nothing here. The torch operator refuses to be differentiated again, in either mode,
        # and maps over batched gradients.
        if grad_enabled() or not is_plain(*[x for x in gradients if x is not None]):
            return op.dispatched_backward(gradients, tensors, saved, *options)
        program, given = op.arranged_backward(gradients, tensors, saved, *options)
        results = program(*given)
        repeats.keep(program, *[x for x in given if x is not None])
        return results


class _Eager(torch.autograd.Function):
    """The autograd of a plain eager call, without the dispatcher. torch looks over each argument, so they are few."""

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


_apply: Callable[..., Any] = direct_apply(_Eager)  # no call under transforms of torch.func is plain
