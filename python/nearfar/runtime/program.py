"""Programs: the launches of one direction of an operator, in order, with everything fixed except addresses."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nearfar._cuda import BuiltLaunch
from nearfar.runtime.private import current_stream, empty_cuda
from nearfar.runtime.tensors import allocate, allocates_directly, device_of, layouts, triton_module

_launch = triton_module("launch")

ALIGNED = 16  # alignment in bytes that the address-only launch requires
PART_ALIGNMENT = 128  # bytes, of each workspace within the joint allocation


class Program:
    """Fills the outputs of calls of one signature (with zeros if it has no launches). It is built once, from meta tensors.

    inputs, outputs: None for absent ones. launches: pairs of a launch and its arguments, which are tensors, None and tuples of
    tensors. Arguments that are neither inputs nor outputs are workspaces. A call allocates all workspaces at once and creates
    no tensors for them, because kernels need only their addresses.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor | None],
        outputs: Sequence[torch.Tensor | None],
        launches: Sequence[tuple[Any, Sequence[Any]]],
    ) -> None:
        self._outputs, self._launches = layouts(*outputs), launches
        values = [*inputs, *outputs, None]
        known = {id(x) for x in values}
        tuples = [x for _, given in launches for x in given if type(x) is tuple]
        parts = [x for group in (*tuples, *[given for _, given in launches]) for x in group if type(x) is not tuple]
        workspaces = list({id(x): x for x in parts if id(x) not in known}.values())
        self._size, self._workspaces = 0, []
        for x in workspaces:
            self._workspaces.append((self._size, x.nbytes, x.dtype, x.shape))
            self._size += -(-x.nbytes // PART_ALIGNMENT) * PART_ALIGNMENT
        # Positions in the list of a call's values (tensors or addresses): inputs, outputs, None, workspaces, tuples of these.
        places = {id(x): place for place, x in enumerate([*values, *workspaces, *tuples])}
        self._tuples = [_selection(places, group) for group in tuples]
        self._selections = [_selection(places, given) for _, given in launches]
        self._allocations = [None if x is None else (tuple(x[0]), x[1], x[2]) for x in self._outputs]  # for empty_cuda
        self._offsets = [offset for offset, *_ in self._workspaces]
        # Set once kernels are compiled: the device, whether launch hooks are set, and launches with their selections.
        self._device: Any = None
        self._hooks_are_set: Any = None
        self._steps: Sequence[Any] = ()

    def __call__(self, *inputs: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        """Compute and return the outputs."""
        first: Any = inputs[0]
        if first.is_meta:  # there is nothing to fill
            return allocate(self._outputs, first.device)
        with device_of(first):
            if first.is_cuda and not self._steps:
                self._compile(first)
            outputs = self.at_once(*inputs)
            if outputs is None:
                outputs = allocate(self._outputs, first.device)
                self._launch_tensors(inputs, outputs)
        return outputs

    def at_once(self, *inputs: torch.Tensor | None) -> Sequence[torch.Tensor | None] | None:
        """Fast path: the outputs, by allocations and address-only launches alone. None if the call needs the fallback path.

        It does if kernels are not compiled yet or are interpreted, an input does not start at a multiple of 16 bytes, another
        device is current, torch is in deterministic mode, or a Triton launch hook is set.
        """
        if not (self._steps and allocates_directly(self._device)) or self._hooks_are_set():
            return None
        addresses: list[Any] = []
        low_bits = 0
        for tensor in inputs:
            address = 0 if tensor is None else tensor.data_ptr()
            addresses.append(address)
            low_bits |= address
        if low_bits % ALIGNED:
            return None
        outputs = []
        for layout in self._allocations:
            tensor = None if layout is None else empty_cuda(*layout)
            addresses.append(0 if tensor is None else tensor.data_ptr())
            outputs.append(tensor)
        addresses.append(0)
        if self._workspaces:
            workspace = empty_cuda((self._size,), (1,), torch.uint8)
            start = workspace.data_ptr()
            addresses += [start + offset for offset in self._offsets]
        if self._tuples:
            addresses += [select(addresses) for select in self._tuples]
        stream = current_stream(self._device.index)
        for launch, select in self._steps:
            launch(select(addresses), stream)
        return outputs

    def build_ahead(self, device: torch.device) -> None:
        """Start building the kernels of a later call on this device, in threads."""
        with torch.cuda.device(device):
            _launch().build_ahead(*self._launches)

    def _launch_tensors(self, inputs: Sequence[Any], outputs: Sequence[torch.Tensor | None]) -> None:
        """Fallback path: launch with tensors. Kernels may be interpreted, and addresses may be unaligned."""
        if not self._launches:
            for tensor in outputs:
                if tensor is not None:
                    tensor.zero_()
            return
        values: list[Any] = [*inputs, *outputs, None]
        workspace: Any = inputs[0].new_empty(self._size, dtype=torch.uint8) if self._workspaces else None
        values += [workspace[start : start + size].view(dtype).view(shape) for start, size, dtype, shape in self._workspaces]
        values += [select(values) for select in self._tuples]
        launches = zip(self._launches, self._selections, strict=True)
        _launch().launch_all(*[(launch, select(values)) for (launch, _), select in launches])

    def _compile(self, first: torch.Tensor) -> None:
        """Compile new kernels and prepare the steps of the fast path; no steps if kernels are interpreted."""
        device, launches = first.get_device(), [launch for launch, _ in self._launches]
        kinds: list[Any] = [None] * len(launches)
        hooks_are_set: Callable[[], bool] = bool  # bool() is False
        if not all(isinstance(launch, BuiltLaunch) for launch in launches):  # otherwise Triton is not needed
            launcher, surveyed = _launch(), []
            if launcher.knobs.runtime.interpret:
                return
            for launch, given in self._launches:
                addresses, (_, *dtypes), aligned = launcher.survey(given)  # meta tensors: addresses are 0
                surveyed.append((launch, given, (addresses, (device, *dtypes), aligned)))
            launcher.compile_new(surveyed)
            kinds, hooks_are_set = [seen[1] for _, _, seen in surveyed], launcher.hooks_are_set
        bound = [launch.bound(device, of) for launch, of in zip(launches, kinds, strict=True)]
        self._device, self._hooks_are_set = first.device, hooks_are_set
        self._steps = [*zip(bound, self._selections, strict=True)]


def _selection(places: Mapping[int, int], given: Sequence[Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that selects a launch's arguments from the list of a call's values."""
    indices = [places[id(x)] for x in given]
    return operator.itemgetter(*indices) if len(indices) > 1 else lambda values: (values[indices[0]],)
