"""Plain eager calls: their autograd, and how a call like an earlier one is found again.

Python is most of what a small call costs. A call whose tensors differ from those of an earlier one in nothing but values and
addresses needs no checks, no dispatch and no look-up of its program: one function in C++, which the guards of torch.compile are
made of, tells.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nearfar.checks import is_plain
from nearfar.ops.program import Program
from nearfar.ops.torch_operator import Layouts, forgotten_with_plans
from nearfar.runtime.private import TensorGuards, autocast_enabled, direct_apply, dispatch_modes, in_forward_ad

is_compiling, grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled

MOST_KEPT = 4  # signatures with the same options, the last ones, which a call is compared with one by one


def _guards(tensors: Sequence[torch.Tensor]) -> Any:
    """What `check`s tensors: types, dtypes, devices, shapes, strides, requires_grad and dispatch keys, transforms' too."""
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def _guards_work() -> bool:
    """Torch calls them its own: a version that has them no more, or other ones, takes the ordinary way of every call."""
    try:
        x = torch.empty(2, 3, device="cpu")  # whatever the default device is
        return _guards([x]).check(x) and not _guards([x]).check(x.mT)
    except Exception:
        return False


GUARDS_WORK = _guards_work()


class Plan:
    """A plain call without its tensors. Those of an operator have

    program_of(rows, tensors, *options, ahead)      the Program of the forward
    forward_of(rows, tensors, *options, ahead)      its outputs, also where the program does not run at once
    backward(gradients, saved, dispatched)      gradients of the tensors from those of the visible outputs; saved: the
                                    tensors, the first output and those that are not visible; dispatched: whether the torch
                                    operator must compute them

    rows: layouts of the tensors of rows. options: of the operator. tensors: those of the call, None for what is absent. ahead:
    see compile_ahead.
    """

    num_visible = 1  # outputs that the caller gets
    program_of: Callable[..., Program]
    forward_of: Callable[..., Sequence[Any]]
    backward: Callable[..., Sequence[Any]]

    def __init__(self, rows: Layouts, options: tuple[Any, ...], tensors: Sequence[torch.Tensor | None]) -> None:
        self.rows, self.options = rows, options
        self.tracked = grad_enabled() and any([x is not None and x.requires_grad for x in tensors])
        self.ahead = rows[0][3] if self.tracked else None
        self.program = self.program_of(rows, tensors, *options, self.ahead)

    def __call__(self, *tensors: Any) -> Any:
        """What the caller gets."""
        return _apply(self, *tensors) if self.tracked else self.visible(self.outputs(*tensors))

    def outputs(self, *tensors: torch.Tensor | None) -> Sequence[Any]:
        outputs = self.program.at_once(*tensors)
        return self.forward_of(self.rows, tensors, *self.options, self.ahead) if outputs is None else outputs

    def visible(self, outputs: Sequence[Any]) -> Any:
        return outputs[0] if self.num_visible == 1 else tuple(outputs[: self.num_visible])


class _Eager(torch.autograd.Function):
    """The autograd of a plain eager call, without the dispatcher. torch looks over each argument, so they are few."""

    @staticmethod
    def forward(ctx: Any, plan: "Plan", *tensors: torch.Tensor | None) -> Any:
        outputs = plan.outputs(*tensors)
        ctx.save_for_backward(*tensors, outputs[0], *outputs[plan.num_visible :])
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return plan.visible(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        # That the forward was plain binds nothing here. The torch operator refuses to be differentiated again, in either mode,
        # and maps over batched gradients.
        dispatched = grad_enabled() or not is_plain(*[x for x in gradients if x is not None])
        return None, *ctx.plan.backward(gradients, ctx.saved_tensors, dispatched)


_apply = direct_apply(_Eager)  # no call under transforms of torch.func is plain


class Repeats:
    """The plans of calls with the same options, found by their tensors."""

    def __init__(self) -> None:
        self._kept: list[tuple[Any, tuple[Any, ...], Plan]] = []

    def find(self, *tensors: Any) -> Plan | None:
        """The Plan of a call whose tensors were like these, or None. Options have to tell which of them there are."""
        state = _state()
        for guards, kept_state, plan in self._kept:
            if kept_state == state and guards.check(*tensors):
                return plan
        return None

    def keep(self, plan: Plan, *tensors: Any) -> None:
        """Remember the plan of a call by the tensors that it was made for; None, what is absent, is no part of a look.

        They may be others than the call came with: casts and copies leave alone what they have made, so that a call with such
        tensors has the same plan. For calls of which that is not so there are no Repeats. Where one tensor is given twice,
        nothing is found.
        """
        tensors = tuple([x for x in tensors if x is not None])
        if can_repeat(tensors[0]) and self.find(*tensors) is None:
            guards = _guards(tensors)
            if guards.check(*tensors):
                self._kept = [(guards, _state(), plan), *self._kept[: MOST_KEPT - 1]]


def start(plan: Plan, repeats: Repeats | None, tensors: Sequence[torch.Tensor | None]) -> Any:
    """What the caller gets of a call that was not found; one like it will be, where there are Repeats."""
    if repeats is not None:
        repeats.keep(plan, *tensors)
    return plan(*tensors)


def can_repeat(tensor: torch.Tensor) -> bool:
    """Whether nothing but signature and state tells what serves a call: on a CPU, values and the environment do, too.

    So does, for float32, the switch of tf32.
    """
    return tensor.is_cuda and tensor.dtype != torch.float32 and GUARDS_WORK


def _state() -> tuple[Any, ...]:
    """What a call depends on besides its arguments and what the dispatch keys of its tensors tell."""
    autocast_dtype = torch.get_autocast_dtype("cuda") if autocast_enabled() else None
    return grad_enabled(), in_forward_ad(), dispatch_modes(), autocast_dtype


def repeats(*options: Any) -> Repeats | None:
    """The Repeats of calls with these options, one of which names the operator; None while something is compiled."""
    if is_compiling():
        return None
    try:
        return _repeats(*options)
    except TypeError:  # what cannot be hashed is refused by the checks, or is no constant
        return None


@forgotten_with_plans
@functools.lru_cache(maxsize=1024, typed=True)  # 1, 1.0 and True are not the same option
def _repeats(*_: Any) -> Repeats:
    return Repeats()
