"""Tracks which modules run in which thread, and reports their attention calls.

Nothing is registered on a model: torch's global module hooks are installed while any watch is open. Each thread has its own
list of running modules and its own TorchFunctionMode, which is on while a watched module runs. Only transformers is patched,
because its models may compute attention without a torch function.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from nearfar.diagnostics import read
from nearfar.runtime.observed import observers
from nearfar.runtime.private import (
    current_graph_task,
    function_modes,
    global_hooks_with_keywords,
    hooks_of,
    pop_function_mode,
    push_function_mode,
    tracing_context,
)

# These torch modules take a slower path, with other rounding, under a TorchFunctionMode. So the mode is off while they run, and
# their attention is read from their arguments.
READ_WHOLE = tuple(module.forward for module in (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention))


class Entry:
    """A running module. was_on: whether the mode was on before. called: whether it called another watched module."""

    def __init__(self, module: nn.Module, was_on: bool) -> None:
        self.module, self.was_on, self.called = module, was_on, False


class Thread:
    """Watched modules that run in a thread, innermost last, and the mode that sees their attention."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.mode = SeeAttention()

    def is_on(self) -> bool:
        return any(mode is self.mode for mode in function_modes())

    def switch(self, on: bool) -> bool:
        """Turn the mode on or off, wherever it is on torch's stack, and return whether it was on."""
        was_on = self.is_on()
        if on and not was_on:
            push_function_mode(self.mode)
        elif was_on and not on:
            above = []
            while (mode := pop_function_mode()) is not self.mode:
                above.append(mode)
            for mode in reversed(above):
                push_function_mode(mode)
        return was_on

    @contextmanager
    def unseen(self) -> Iterator[None]:
        was_on = self.switch(False)
        try:
            yield
        finally:
            self.switch(was_on)

    def drop(self, depth: int) -> None:
        """Remove the modules from this depth on, which have ended."""
        if depth < len(self.entries):
            self.switch(self.entries[depth].was_on)
            del self.entries[depth:]
        if not self.entries:
            with lock:
                busy.discard(self)
            uninstall_if_idle()


class SeeAttention(TorchFunctionMode):
    """Reports calls of scaled_dot_product_attention, however a module imported it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():  # Dynamo traces this
            return result
        if getattr(func, "__name__", None) == "scaled_dot_product_attention":
            report(lambda: read.scaled_dot_product(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            report(lambda: read.unreadable("it calls multi_head_attention_forward itself, not nn.MultiheadAttention"))
        return result


def see_operator(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Report a call of an operator of nearfar by a module."""
    if not torch.compiler.is_compiling() and this_thread().is_on():
        report(lambda: read.nearfar_operator(function, *arguments, **keywords))


local = threading.local()
lock = threading.RLock()
sessions: tuple[Any, ...] = ()  # the open watches; replaced, never modified
busy: "weakref.WeakSet[Thread]" = weakref.WeakSet()  # threads in which watched modules run
installed: list[Callable[[], None]] = []  # functions that remove hooks and patches


def this_thread() -> Thread:
    if not hasattr(local, "thread"):
        local.thread = Thread()
    return local.thread


def key(module: nn.Module) -> int:
    """Key of a module and of its replicas by nn.DataParallel, which share the dict of its hooks."""
    return id(hooks_of(module))


@contextmanager
def opened(session: Any) -> Iterator[None]:
    """Report attention to a session, which has names {key: name}, the sets of keys compiled and ran, and take(name, reader)."""
    global sessions
    thread = this_thread()
    thread.switch(thread.switch(True))  # if torch lacks function modes, this raises before anything is installed
    with lock:
        sessions += (session,)
        if not installed:
            install()
    depth = len(thread.entries)
    try:
        yield
    finally:
        with lock:
            sessions = tuple(other for other in sessions if other is not session)
        if thread is this_thread():
            thread.drop(depth)  # entries left by a KeyboardInterrupt, for which torch calls no hook
        uninstall_if_idle()


def install() -> None:
    installed.append(register_module_forward_pre_hook(enter).remove)
    handle = register_module_forward_hook(leave, with_kwargs=True, always_call=True)
    installed.append(handle.remove)
    installed.append(lambda: global_hooks_with_keywords.pop(handle.id, None))  # handle.remove leaves this entry
    observers.append(see_operator)
    installed.append(lambda: observers.remove(see_operator))
    if transformers := sys.modules.get("transformers.modeling_utils"):  # otherwise no model can be one of transformers
        installed.append(patch_transformers(transformers.AttentionInterface))


def uninstall_if_idle() -> None:
    """Remove hooks and patches once no watch is open and no watched module runs in any thread."""
    with lock:
        if not sessions and not busy:
            while installed:
                installed.pop()()


def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling() or not any(key(module) in session.names for session in sessions):
        return
    thread = this_thread()
    if thread.entries:
        thread.entries[-1].called = True
    else:
        with lock:
            busy.add(thread)
    on = type(module).forward not in READ_WHOLE and not any(key(module) in session.compiled for session in sessions)
    thread.entries.append(Entry(module, thread.switch(on)))


def leave(module: nn.Module, arguments: tuple[Any, ...], *rest: Any) -> None:
    """Forward hook. rest: keywords and output; after an exception only None, as torch then omits the keywords."""
    if torch.compiler.is_compiling():
        return
    thread = this_thread()
    depth = next((i for i in reversed(range(len(thread.entries))) if thread.entries[i].module is module), None)
    if depth is None:
        return
    try:
        if len(rest) == 2:
            read_module(thread.entries[depth], arguments, rest[0])
    finally:
        thread.drop(depth)


def read_module(entry: Entry, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Report the attention of torch's own modules, which the mode cannot see."""
    module: Any = entry.module
    forward = type(module).forward
    for session in sessions:
        session.ran.add(key(module))
    if forward is nn.MultiheadAttention.forward:
        report(lambda: read.multihead(module, *arguments, **keywords))
    elif forward is nn.TransformerEncoderLayer.forward and not entry.called:  # the fast path calls no module
        report(lambda: read.encoder_layer(module, *arguments, **keywords), module.self_attn)


def report(reader: Callable[[], list[read.Call]], *inside: nn.Module) -> None:
    """Report attention to every watch of a running module or of a module in it; reader may raise Unreadable."""
    if tracing_context() is not None or current_graph_task() != -1:
        return  # a compiler traces the call, or checkpointing repeats it in the backward
    if torch.jit.is_tracing() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        reader = partial(read.unreadable, "it is being captured in a graph")
    thread = this_thread()
    running = [*(entry.module for entry in thread.entries), *inside]
    with thread.unseen():
        for session in sessions:
            name = next((session.names[key(m)] for m in reversed(running) if key(m) in session.names), None)
            if name is not None:
                session.take(name, reader)


def patch_transformers(interface: Any) -> Callable[[], None]:
    """Wrap the attention functions that transformers' models look up; returns a function that undoes it."""
    get_interface = interface.get_interface

    @wraps(get_interface)
    def get_watched(*arguments: Any, **keywords: Any) -> Callable[..., Any]:
        attend = get_interface(*arguments, **keywords)
        if torch.compiler.is_compiling() or not this_thread().is_on():
            return attend
        return watched(attend, keywords.get("default", arguments[-1]))

    def restore() -> None:
        if interface.get_interface is get_watched:  # otherwise it was wrapped since; then it stays, without effect
            interface.get_interface = get_interface

    interface.get_interface = get_watched
    return restore


def watched(attend: Callable[..., Any], default: Callable[..., Any]) -> Callable[..., Any]:
    """A function of transformers' attention interface, wrapped to report its calls; unchanged if they cannot be read.

    If an unknown function calls scaled_dot_product_attention, the mode sees that call.
    """
    kind = read.kind_of(getattr(attend, "watches", attend), default)
    if kind is None:
        return attend

    def watched_attend(*arguments: Any, **keywords: Any) -> Any:
        thread = this_thread()
        if not thread.is_on():
            return attend(*arguments, **keywords)
        with thread.unseen():
            result = attend(*arguments, **keywords)
        report(lambda: read.transformers_call(kind, result, *arguments, **keywords))
        return result

    watched_attend.watches = getattr(attend, "watches", attend)  # type: ignore[attr-defined]
    return watched_attend
