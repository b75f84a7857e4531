"""Plans: what follows from the layouts and options of a call is worked out once, and found again by a look at its tensors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from nearfar.runtime.private import TensorGuards, autocast_enabled, dispatch_modes, in_forward_ad
from nearfar.runtime.tensors import META, allocate, tf32_allowed

is_compiling, grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled

MOST_ALIKE = 4  # plans of one shape and the same options, the last ones, which a call is compared with one by one
MOST_SHAPES = 64  # the last shapes of the first tensor, of calls with the same options

Cached = TypeVar("Cached", bound=Any)
Found = TypeVar("Found")

_caches: list[Any] = []


def forgotten_with_plans(cached: Cached) -> Cached:
    """A function with a cache, which forget_plans empties."""
    _caches.append(cached)
    return cached


def forget_plans() -> None:
    """Plan everything anew, with what the table of launch parameters says now."""
    for cached in _caches:
        cached.cache_clear()


def planned(plan: Callable[..., Found]) -> Callable[..., Found]:
    """`plan(self, tensors, *options)` as a method (self, layouts, *options), worked out once for each, on meta tensors.

    Options must be hashable and of types that were checked: 1, 1.0 and True are one key.
    """

    @forgotten_with_plans
    @functools.lru_cache(maxsize=1024)
    def look_up(self: Any, layouts: tuple[Any, ...], *options: Any) -> Found:
        return plan(self, allocate(layouts, META), *options)

    return look_up


def _guards(tensors: Sequence[torch.Tensor]) -> Any:
    """What `check`s tensors: types, dtypes, devices, shapes, strides, requires_grad and dispatch keys, transforms' too."""
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def _guards_work() -> bool:
    """False for a torch without these guards, or with other ones: every call is then checked and planned by its layouts."""
    try:
        x = torch.empty(2, 3, device="cpu")  # whatever the default device is
        return _guards([x]).check(x) and not _guards([x]).check(x.mT)
    except Exception:
        return False


GUARDS_WORK = _guards_work()


class Repeats(Generic[Found]):
    """Plans of calls with the same options, found by their tensors: one function in C++ compares them, in a microsecond."""

    def __init__(self) -> None:
        self._kept: dict[torch.Size, list[tuple[Any, tuple[Any, ...], Found]]] = {}

    def find(self, *tensors: Any) -> Found | None:
        """The plan of a call whose tensors were like these, or None. Options have to tell which of them there are."""
        first = tensors[0]
        if not isinstance(first, torch.Tensor):
            return None
        if found := self._kept.get(first.shape):
            state = _state(first)
            for guards, kept_state, plan in found:
                if kept_state == state and guards.check(*tensors):
                    return plan
        return None

    def keep(self, plan: Found, *tensors: torch.Tensor) -> None:
        """Remember the plan of a call by the tensors that it was made for.

        They may be others than the call came with: casts and copies leave alone what they have made, so that a call with such
        tensors has the same plan. For calls of which that is not so there are no Repeats. Where one tensor is given twice,
        nothing is found.
        """
        first = tensors[0]
        if not can_repeat(first) or self.find(*tensors) is not None:
            return
        guards = _guards(tensors)
        if guards.check(*tensors):
            alike = self._kept.pop(first.shape, [])
            self._kept[first.shape] = [(guards, _state(first), plan), *alike[: MOST_ALIKE - 1]]
            if len(self._kept) > MOST_SHAPES:
                del self._kept[next(iter(self._kept))]


def can_repeat(tensor: torch.Tensor) -> bool:
    """True if signature and torch state alone select the backend; on a CPU values and the environment do, too."""
    return tensor.is_cuda and GUARDS_WORK


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a call depends on besides its arguments and what the dispatch keys of its tensors tell."""
    autocast_dtype = torch.get_autocast_dtype("cuda") if autocast_enabled() else None
    tf32 = tensor.dtype == torch.float32 and tf32_allowed(torch.float32)
    return grad_enabled(), in_forward_ad(), dispatch_modes(), autocast_dtype, tf32


def repeats(*options: Any) -> Repeats[Any] | None:
    """The Repeats of calls with these options, one of which names the operator; None while something is compiled."""
    if is_compiling():
        return None
    try:
        return _repeats(*options)
    except TypeError:  # what cannot be hashed is refused by the checks, or is no constant
        return None


@forgotten_with_plans
@functools.lru_cache(maxsize=1024, typed=True)  # 1, 1.0 and True are not the same option
def _repeats(*_: Any) -> Repeats[Any]:
    return Repeats()
