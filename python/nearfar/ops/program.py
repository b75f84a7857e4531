"""Launches in order with everything fixed but addresses: what the forward of an operator comes to in a call."""

import operator

import torch

from nearfar.ops.torch_operator import allocate, kernels, layouts

_launch = kernels("launch")

ALIGNED = 16  # bytes that addresses are a multiple of where kernels are launched with nothing else
PART_ALIGNMENT = 128  # bytes, of the parts of a workspace


class Program:
    """Fills the outputs of a signature. It is made of meta tensors, once, while the signature is planned.

    inputs, outputs: None for what is absent. launches: pairs of a launch and what it is given, as for launch_all. What they are
    given besides inputs and outputs is a workspace: a call allocates all of them as one, and makes no tensors of its parts,
    because kernels need no more than addresses.
    """

    def __init__(self, inputs, outputs, launches):
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
        # The values of a call, tensors or addresses: those above, workspaces, and tuples of such, as kernels take them.
        places = {id(x): place for place, x in enumerate([*values, *workspaces, *tuples])}
        self._tuples = [_selection(places, group) for group in tuples]
        self._selections = [_selection(places, given) for _, given in launches]
        self._steps = ()  # launch, selection and what `survey` says of kinds, for addresses, once kernels are compiled

    def __call__(self, *inputs):
        """The outputs."""
        first = inputs[0]
        if first.is_cuda and first.get_device() != torch._C._cuda_getDevice():
            with torch.cuda.device(first.device):
                return self(*inputs)
        outputs = allocate(self._outputs, first.device)
        workspace = torch.empty(self._size, dtype=torch.uint8, device=first.device) if self._workspaces else None
        addresses, low_bits = [], 0
        for tensor in (*inputs, *outputs):
            address = 0 if tensor is None else tensor.data_ptr()
            addresses.append(address)
            low_bits |= address
        if not first.is_cuda or low_bits % ALIGNED or not (self._steps or self._compile(first.get_device())):
            self._launch_tensors([*inputs, *outputs, None], workspace)
            return outputs
        addresses.append(0)
        if workspace is not None:
            start = workspace.data_ptr()
            addresses += [start + offset for offset, *_ in self._workspaces]
        addresses += [select(addresses) for select in self._tuples]
        for launch, select, kinds in self._steps:
            launch.run(inputs, (select(addresses), kinds, True))
        return outputs

    def _launch_tensors(self, values, workspace):
        """The long way of tensors that are interpreted or not aligned."""
        values += [workspace[start : start + size].view(dtype).view(shape) for start, size, dtype, shape in self._workspaces]
        values += [select(values) for select in self._tuples]
        launches = zip(self._launches, self._selections, strict=True)
        _launch().launch_all(*[(launch, select(values)) for (launch, _), select in launches])

    def _compile(self, device):
        """Compile what is new and return the steps, none where kernels are interpreted."""
        launcher, surveyed = _launch(), []
        if launcher.knobs.runtime.interpret:
            return ()
        for launch, given in self._launches:
            addresses, (_, *dtypes), aligned = launcher.survey(given)  # of the meta device; addresses are 0
            surveyed.append((launch, given, (addresses, (device, *dtypes), aligned)))
        launcher.compile_new(surveyed)
        kinds = [seen[1] for _, _, seen in surveyed]
        self._steps = [(launch, *rest) for (launch, _), *rest in zip(self._launches, self._selections, kinds, strict=True)]
        return self._steps


def _selection(places, given):
    """A function that takes what is given, tensors in their places, from the values of a call."""
    indices = [places[id(x)] for x in given]
    return operator.itemgetter(*indices) if len(indices) > 1 else lambda values: (values[indices[0]],)
