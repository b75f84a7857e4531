"""Plans: launches and allocations that follow from a call's layouts and options, built once and found by a guard check."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from nearfar.runtime.private import TensorGuards, autocast_enabled, dispatch_modes, in_forward_ad
from nearfar.runtime.tensors import META, allocate, tf32_allowed

is_compiling, grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled

MOST_ALIKE = 4  # plans cached for one shape of the first tensor; a call is compared with them one by one
MOST_SHAPES = 64  # shapes of the first tensor cached for the same options

Cached = TypeVar("Cached", bound=Any)
Found = TypeVar("Found")

_caches: list[Any] = []


def forgotten_with_plans(cached: Cached) -> Cached:
    """Decorator of a cached function: forget_plans clears its cache."""
    _caches.append(cached)
    return cached


def forget_plans() -> None:
    """Clear all plans. Later calls build them again, with the current launch parameters."""
    for cached in _caches:
        cached.cache_clear()


def planned(plan: Callable[..., Found]) -> Callable[..., Found]:
    """Turn `plan(self, tensors, *options)` into a cached method (self, layouts, *options), which passes it meta tensors.

    Options must be hashable, and their types checked before: 1, 1.0 and True are the same key.
    """

    @forgotten_with_plans
    @functools.lru_cache(maxsize=1024)
    def look_up(self: Any, layouts: tuple[Any, ...], *options: Any) -> Found:
        return plan(self, allocate(layouts, META), *options)

    return look_up


def _guards(tensors: Sequence[torch.Tensor]) -> Any:
    """Guards whose `check` compares types, dtypes, devices, shapes, strides, requires_grad and dispatch keys of tensors.

    Dispatch keys include those of function transforms.
    """
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def _guards_work() -> bool:
    """False if torch lacks these guards or they behave differently: every call then looks up its plan by its layouts."""
    try:
        x = torch.empty(2, 3, device="cpu")  # explicit, as the default device may be another
        return _guards([x]).check(x) and not _guards([x]).check(x.mT)
    except Exception:
        return False


GUARDS_WORK = _guards_work()


class Repeats(Generic[Found]):
    """Cache of plans for calls with the same options. A cache hit takes one C++ guard check, about a microsecond."""

    def __init__(self) -> None:
        self._kept: dict[torch.Size, list[tuple[Any, tuple[Any, ...], Found]]] = {}

    def find(self, *tensors: Any) -> Found | None:
        """The cached plan for these tensors, or None. The options must determine which optional tensors are present."""
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
        """Cache the plan of a call under the tensors that it was built for.

        These may be casts or copies of the arguments. That is safe because casting or copying them again changes nothing; calls
        for which this does not hold have no Repeats. A call that passes one tensor twice is not cached.
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
    """True if signature and torch state alone select the backend. On a CPU, values and environment variables matter too."""
    return tensor.is_cuda and GUARDS_WORK


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The torch state that a call depends on and that the guards do not cover."""
    autocast_dtype = torch.get_autocast_dtype("cuda") if autocast_enabled() else None
    tf32 = tensor.dtype == torch.float32 and tf32_allowed(torch.float32)
    return grad_enabled(), in_forward_ad(), dispatch_modes(), autocast_dtype, tf32


def repeats(*options: Any) -> Repeats[Any] | None:
    """The Repeats for these options, which include the operator; None under torch.compile."""
    if is_compiling():
        return None
    try:
        return _repeats(*options)
    except TypeError:  # an unhashable option: the checks refuse it, or it is not a constant
        return None


@forgotten_with_plans
@functools.lru_cache(maxsize=1024, typed=True)  # 1, 1.0 and True are not the same option
def _repeats(*_: Any) -> Repeats[Any]:
    return Repeats()
