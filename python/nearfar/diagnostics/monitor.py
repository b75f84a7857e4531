"""A watch over every n-th step of a training, and its history."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nearfar.diagnostics.watch import Watch, watch


class Monitor:
    """Watches the attention of a model at every n-th step of a training.

        monitor = nearfar.diagnostics.Monitor(model, every=100, log=lambda step, watched: print(step, watched))
        for step, batch in enumerate(batches):
            with monitor.step(step):
                loss = model(batch)
            loss.backward()
        nearfar.diagnostics.plot_history(monitor, "heads.png")

    Steps in between cost nothing. What the model computes, gradients included, does not change.

    Args:
        model: a torch.nn.Module.
        every: the steps watched are the multiples of this number, at least 1.
        log: called with the step and its `Watch` after each step watched; None for no call.
        options: as for `nearfar.diagnostics.watch`.

    Attributes:
        steps: {step: Watch}, in order of the steps watched.

    Raises:
        TypeError: every is not an int.
        ValueError: every is below 1.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        every: int = 100,
        log: Callable[[int, Watch], Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every must be an int, got {type(every).__name__}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.model, self.every, self.log, self.options = model, every, log, options
        self.steps: dict[int, Watch] = {}

    @contextmanager
    def step(self, number: int) -> Iterator[Watch | None]:
        """Context manager around the forward of a step; it yields the Watch of a step watched, None in other steps."""
        if number % self.every:
            yield None
            return
        with watch(self.model, **self.options) as watched:
            yield watched
        self.steps[number] = watched
        if self.log is not None:
            self.log(number, watched)

    def table(self) -> list[dict[str, Any]]:
        """One dict for each step, layer and head: step, and what `Watch.table` has."""
        return [{"step": step, **row} for step, watched in self.steps.items() for row in watched.table()]
