"""`explain`: which backend would serve a call, and why the others cannot."""

from collections.abc import Callable
from typing import Any

from nearfar import registry
from nearfar.runtime import dispatch
from nearfar.runtime.dispatch import Backend


def explain(op: Callable[..., Any] | str, *args: Any, backend: Backend = "auto", **kwargs: Any) -> str:
    """Describe which backend would serve a call, without running it.

    Args:
        op: a public operator, such as `nearfar.krause_attention`, or its name.
        *args, backend, **kwargs: the arguments of the call.

    Returns:
        A line with the chosen backend, then one line per backend, with the reason if it cannot serve the call.

    Raises:
        ValueError: op is not an operator of nearfar, or the operator would raise a ValueError.
        TypeError: the operator would raise a TypeError.
    """
    operator = registry.find(op)
    call = operator.prepare(*args, **kwargs)
    return dispatch.report(operator.function.__name__, backend, call)
