"""Lets `nearfar.diagnostics.watch` see calls of public functions, wherever they were imported."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

observers: list[Callable[..., None]] = []  # called with the function and its arguments; there is one while a watch is open


def observed(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose calls observers are told of."""

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        result = function(*arguments, **keywords)
        if observers:
            tell(function, arguments, keywords)
        return result

    return call


def tell(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    for observer in observers:
        observer(function, arguments, keywords)
