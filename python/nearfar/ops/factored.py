"""The operators on the factored skeleton as torch operators: plan, schema, fake and autograd.

Linear attention is Hadamard linear attention with one factor; both are `torch.ops.nearfar.hadamard_attention`.
"""

import math

import torch
from torch import Tensor

from nearfar import _cuda
from nearfar.checks import is_plain, no_autocast
from nearfar.ops.eager import Plan, start
from nearfar.ops.program import Program
from nearfar.ops.step import define_step
from nearfar.ops.torch_operator import (
    allocate,
    compile_ahead,
    device_of,
    empty_rows,
    kernels,
    launch_all,
    layouts,
    planned,
    register,
    unit_stride,
    unit_strides,
    uses_tf32,
)
from nearfar.reference.linear import step as reference_step

# A multiply-add of a pair computed directly takes as long as two of those that go through the state, forward and backward
# together, as measured on an H100 for one, two and three factors (docs/notes/linear.md).
DIRECT_COST = 2
# Bytes that pass through memory while a multiprocessor does one multiply-add, times the bytes of a state on its way: they
# balance the direct pairs of a piece, which grow with its length, against its state, which is written and read once.
STATE_COST = 384

# Programs that a pass is cut into where it can be: four for each multiprocessor of an H100, and one where a state walks along.
PROGRAMS = 528
WALK_PROGRAMS = 128
# Warps that the CUDA kernels of bidirectional attention need: eight for each multiprocessor. A block has one for 16 columns.
FULL_WARPS = 1056
WALK_WIDTH = 128
TILE_OF_STATE = 16384  # elements of a state that one program accumulates
# Bytes of the states of causal attention in float32 beyond which there is one for twice as many tokens: that takes about a
# seventh more time (docs/notes/linear.md), and a million tokens of 16 x 16 features stay within 1.5 times their own memory.
LARGE_STATES = 2**30

_FORWARD = (
    "(Tensor[] qs, Tensor[] ks, Tensor v, Tensor? initial_state, Tensor? cu_seqlens, str feature_map, bool normalize,"
    " bool causal, float eps, bool return_state, str backend, str backward_backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor do, Tensor? dstate, Tensor[] qs, Tensor[] ks, Tensor v, Tensor? initial_state, Tensor? cu_seqlens, Tensor o,"
    " Tensor inverse, Tensor states, Tensor norms, str feature_map, bool normalize, bool causal, float eps, str backend)"
    " -> (Tensor[], Tensor[], Tensor, Tensor)"
)


def attend(repeats, rows, qs, ks, v, initial_state, cu_seqlens, *options):
    """(o, state), state None unless return_state. The arguments are those of `nearfar.hadamard_attention`, checked.

    repeats: of calls with these options and without cu_seqlens, or None. rows: layouts of qs, ks and v, None where the call is
    not plain. options: feature_map, normalize, causal, eps, return_state, and the backends of the forward and of the backward,
    which read what either has saved with one factor; with several they have to be the same.
    """
    rows, factors_and_v = unit_strides(rows, *qs, *ks, v)
    tensors = *factors_and_v, None if initial_state is None else initial_state.contiguous(), cu_seqlens
    if rows is None or (initial_state is not None and not is_plain(initial_state)):
        return torch.ops.nearfar.hadamard_attention(*_split(tensors), *options)[:2]
    return start(_Plan(rows, options, tensors), repeats, tensors)


def _step(
    qs: list[Tensor], ks: list[Tensor], v: Tensor, state: Tensor, out: Tensor,
    feature_map: str, normalize: bool, eps: float, backend: str,
) -> None:  # fmt: skip
    """One token: update the state and fill out (B, Hq, 1, Dv)."""
    if backend == "reference":
        with no_autocast(v):
            out.copy_(reference_step(qs, ks, v, state, feature_map, normalize, eps))
    elif out.numel():
        qs, ks, v = tuple(map(unit_stride, qs)), tuple(map(unit_stride, ks)), unit_stride(v)  # type: ignore[assignment]
        widths, group = tuple([q.shape[3] for q in qs]), qs[0].shape[1] // v.shape[1]
        strides = _strides(qs), _strides(ks), v.stride(), out.stride()
        with device_of(v):
            plan = _launchers().plan_step(*v.shape[:2], group, widths, v.shape[3], feature_map, normalize, eps, strides)
            plan(qs, ks, v, state, out)


step = define_step("hadamard_attention_step", _step, ("state", "out"))


_launchers = kernels("factored_launch")


def causal_piece_length(widths, value_width):
    """Tokens between two states of causal attention; a power of two, by shapes that do not change with the length."""
    balanced = STATE_COST * math.prod(widths) * value_width / (sum(widths) + value_width)
    return 2 ** min(12, max(7, round(math.log2(balanced) / 2)))


def walks(widths, value_width, backend):
    """Whether one program holds the whole state on chip."""
    if len(widths) > 1:
        return backend == "cuda" and (tuple(widths), value_width) == _cuda.HADAMARD_WIDTHS
    return max(widths[0], value_width) <= WALK_WIDTH


def piece_length_of(qs, v, causal, backend):
    """Tokens of the pieces that sequences are cut into."""
    widths, value_width = tuple(q.shape[3] for q in qs), v.shape[3]
    if causal and not walks(widths, value_width, backend):
        length = causal_piece_length(widths, value_width)
        states = v.shape[0] * v.shape[1] * v.shape[2] // length * math.prod(widths) * (value_width + 1) * 4
        return 2 * length if states > LARGE_STATES else length
    if causal:
        # Every piece but the first costs a pass over the keys, so there are no more than fill the GPU.
        pieces = WALK_PROGRAMS // max(1, qs[0].shape[0] * qs[0].shape[1])
    elif backend == "cuda":
        pieces = full_pieces(max(1, v.shape[0] * v.shape[1]), max(1, qs[0].shape[2], v.shape[2]), value_width)
    else:
        tiles = max(1, math.prod(widths) * value_width // TILE_OF_STATE)
        pieces = math.ceil(PROGRAMS / max(1, v.shape[0] * v.shape[1] * tiles))
    length = max(qs[0].shape[2], v.shape[2])
    step = 128 * max(1, pieces)  # a piece holds whole tiles of every kernel
    return max(256, (length + step - 1) // step * 128)


def full_pieces(heads, length, width):
    """Into how many pieces the CUDA kernels of bidirectional attention cut a sequence.

    The time of a pass is that of full rounds of blocks, and that of writing and reading a float32 state for each piece beside
    two 16-bit tensors.
    """
    blocks = FULL_WARPS * 16 // width

    def cost(pieces):
        return math.ceil(heads * pieces / blocks) * blocks / (heads * pieces) + 2 * pieces * width / length

    return min(range(1, 2 + 4 * blocks // heads), key=cost)


def prefers_direct(widths, value_width, num_queries, num_keys):
    """Whether bidirectional attention costs less pair by pair than through the state."""
    pairs = num_queries * num_keys * (sum(widths) + value_width)
    return DIRECT_COST * pairs <= (num_queries + num_keys) * math.prod(widths) * value_width


def uses_states(qs, v, causal, with_state, backend):
    """Whether a call goes through states at all. with_state: one comes in or is asked for."""
    widths, num_queries = [q.shape[3] for q in qs], qs[0].shape[2]
    if with_state:
        return True
    if causal:
        # Packed sequences are known to the device only; any of them may be as long as all of them together.
        return num_queries > piece_length_of(qs, v, causal, backend)
    return not prefers_direct(widths, v.shape[3], num_queries, v.shape[2])


def problem_of(qs, ks, v, cu_seqlens, feature_map, causal, backend):
    launch = _launchers()
    q, widths = qs[0], tuple(q.shape[3] for q in qs)
    return launch.Problem(
        q.shape[0], q.shape[1], v.shape[1], q.shape[2], v.shape[2], widths, v.shape[3], v.dtype, feature_map, causal,
        walks(widths, v.shape[3], backend), piece_length_of(qs, v, causal, backend),
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, launch.operand_precision(v.dtype),
    )  # fmt: skip


# Which kernels serve: walks with the state on chip; those that read it or pair directly, tile by tile; and in CUDA C++ those of
# bidirectional attention, with one narrow factor, and with two of 64, which read a state slab by slab.
WALK, TILES, FULL, SLABS = "walk", "tiles", "full", "slabs"


def route_of(problem, stateful, backend):
    if backend == "cuda" and stateful and not problem.causal:
        return FULL if problem.walks else SLABS
    return WALK if problem.walks and (problem.causal or stateful) else TILES


def piece_table(cu_seqlens, num_tokens, piece_length):
    """What the kernels know of packed sequences, which are cut into pieces one by one.

    Returns (5, pieces) int32: begin and end of each piece, its sequence, begin and end of that; pieces beyond the last are
    empty. And (sequences + 1,) int32: the first piece of each sequence.
    """
    sequences = cu_seqlens.shape[0] - 1
    counts = (cu_seqlens.diff() + piece_length - 1) // piece_length
    first = torch.cat((cu_seqlens.new_zeros(1), counts.cumsum(0, dtype=torch.int32)))
    piece = torch.arange(num_tokens // piece_length + sequences, device=cu_seqlens.device, dtype=torch.int32)
    sequence = (torch.searchsorted(first, piece, right=True, out_int32=True) - 1).clamp(0, sequences - 1)
    sequence_begin, sequence_end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
    begin = torch.minimum(sequence_begin + (piece - first[sequence]) * piece_length, sequence_end)
    end = torch.minimum(begin + piece_length, sequence_end)
    return torch.stack((begin, end, sequence, sequence_begin, sequence_end)), first


def forward(rows, tensors, feature_map, normalize, causal, eps, return_state, backend, backward_backend, ahead=None):
    """(o, final state, inverse, states, norms); what does not exist is None.

    rows: layouts of qs, ks and v. tensors: they, initial_state and cu_seqlens. ahead: see compile_ahead.
    """
    if backend == "cuda":
        rows, given = _cuda.aligned_rows(rows, *tensors[:-2])
        tensors = *given, *tensors[-2:]
    options = feature_map, normalize, causal, eps, return_state, backend, backward_backend
    program = _program(rows, tensors, *options, ahead)
    qs, _, v, _, cu_seqlens = _split(tensors)
    if cu_seqlens is None:
        return program(*tensors)
    return program(*tensors, *piece_table(cu_seqlens, v.shape[2], piece_length_of(qs, v, causal, backend)))


def _program(rows, tensors, *options):
    """The program of (o, state, inverse, states, norms). Its inputs are the tensors and, if they are packed, a piece_table."""
    *_, v, initial_state, cu_seqlens = tensors
    given = initial_state is not None, None if cu_seqlens is None else cu_seqlens.shape[0]
    return _plan_forward(rows, *given, uses_tf32(v), *options)


@planned
def _plan_forward(*arguments):
    *tensors, continued, ends, _tf32, feature_map, normalize, causal, eps, return_state, backend, backward_backend, ahead = (
        arguments
    )
    r, v = len(tensors) // 2, tensors[-1]
    qs, ks = tuple(tensors[:r]), tuple(tensors[r:-1])
    cu_seqlens = None if ends is None else v.new_empty(ends, dtype=torch.int32)
    sequences = v.shape[0] if ends is None else ends - 1
    state_shape = sequences, v.shape[1], *[q.shape[3] for q in qs], v.shape[3] + 1
    initial_state = v.new_empty(state_shape, dtype=torch.float32) if continued else None
    stateful = uses_states(qs, v, causal, initial_state is not None or return_state, backend)
    outputs = _allocate_forward(qs, v, cu_seqlens, normalize, causal, return_state, stateful, backend)
    saved = outputs[0], *outputs[2:]
    given = qs, ks, v, initial_state, cu_seqlens, *saved, feature_map, normalize, causal, eps, backward_backend
    compile_ahead(ahead, backward, outputs[0], None, *given)
    launch, problem = _launchers(), problem_of(qs, ks, v, cu_seqlens, feature_map, causal, backend)
    route = route_of(problem, stateful, backend)
    pieces = first_pieces = None
    inputs = *tensors, initial_state, cu_seqlens
    if cu_seqlens is not None:
        pieces, first_pieces = cu_seqlens.new_empty(5, problem.num_pieces(v.shape[2])), torch.empty_like(cu_seqlens)
        inputs = *inputs, pieces, first_pieces
    o, state, inverse, states, norms = outputs
    q_strides, k_strides, v_strides, o_strides, eps = _strides(qs), _strides(ks), v.stride(), o.stride(), float(eps)
    launches, workspaces = [], ()
    if stateful:
        partials, combine = _plan_states(problem, False, v)
        if route == FULL:
            accumulate = _cuda.FullLaunch(problem, "sums", (*k_strides, v_strides)), (*ks, v, *partials, pieces)
        else:
            plan, workspaces = _plan_accumulate(problem, route, False, k_strides, v)
            accumulate = plan, (ks, v, None, None, *partials, *workspaces, pieces)
        launches = [accumulate, (combine, (*partials, initial_state, states, norms, state, first_pieces))]
    if route == FULL:
        read = _cuda.FullLaunch(problem, "read", (*q_strides, o_strides), (eps,)), (*qs, states, norms, o, inverse, pieces)
    elif route == WALK:
        plan = _plan_walk(backend)(problem, "walk_read", (*q_strides, *k_strides, v_strides, o_strides), (eps,))
        read = plan, (*qs, *ks, v, states, norms, o, inverse, pieces)
    elif route == SLABS:
        plan = _cuda.FactoredRead(problem, False, q_strides, o_strides, eps)
        read = plan, (qs, ks, v, None, states, norms, o, inverse, *workspaces[-2:], pieces)
    else:
        plan = launch.plan_read(problem, False, causal or not stateful, q_strides, k_strides, v_strides, o_strides, eps)
        read = plan, (qs, ks, v, None, states, norms, o, inverse, pieces)
    launches.append(read)
    return Program(inputs, outputs, launches)


def _plan_walk(backend):
    return _cuda.Walk if backend == "cuda" else _launchers().plan_walk


def _plan_states(problem, of_queries, like):
    """Partial sums over the keys, or over the queries for the gradients, not filled; the launch that combines them."""
    pieces = problem.num_pieces(problem.num_queries if of_queries else problem.num_keys)
    shape = problem.batch, problem.key_heads, pieces, problem.num_features
    partials = [like.new_empty(size, dtype=torch.float32) for size in ((*shape, problem.value_width), shape)]
    return partials, _launchers().plan_combine(problem, pieces, of_queries and problem.causal)


def _plan_accumulate(problem, route, of_queries, x_strides, y):
    """The launch and its workspaces, of which the kernels that read the state take the last two."""
    if route != SLABS:
        return _launchers().plan_accumulate(problem, of_queries, x_strides, y.stride()), ()
    plan = _cuda.FactoredAccumulate
    return plan(problem, of_queries, x_strides, y.stride()), plan.workspaces(problem, of_queries, y)


def _strides(tensors):
    return tuple(tensor.stride() for tensor in tensors)


def _split(tensors):
    """qs, ks and what comes after them: v, initial_state and cu_seqlens."""
    r = (len(tensors) - 3) // 2
    return tensors[:r], tensors[r : 2 * r], *tensors[2 * r :]


def backward(
    do, dstate, qs, ks, v, initial_state, cu_seqlens, o, inverse, states, norms,
    feature_map, normalize, causal, eps, backend,
):  # fmt: skip
    """(dqs, dks, dv, gradient of the initial state or None)."""
    do = torch.zeros_like(o) if do is None else unit_stride(do)
    dstate = None if dstate is None else dstate.contiguous()
    if backend == "cuda":
        do, (*factors, v) = (_cuda.aligned if causal else _cuda.aligned_boxes)(do), _cuda.aligned_starts(*qs, *ks, v)
        qs, ks = factors[: len(qs)], factors[len(qs) :]
    qs, ks, r = tuple(qs), tuple(ks), len(qs)
    tensors = layouts(do, o, states, norms, *qs, *ks, v, initial_state, cu_seqlens)
    plan = _plan_backward(tensors, feature_map, causal, eps, backend, uses_tf32(v))
    outputs, problem, route, (accumulate, combine), launches = plan
    found = allocate(outputs, v.device)
    dqs, dks = tuple(found[:r]), tuple(found[r : 2 * r])
    dv, dinitial, weights, key_states, key_norms, partials, partial_norms, *workspaces = found[2 * r :]
    pieces, first_pieces = (None, None) if cu_seqlens is None else piece_table(cu_seqlens, v.shape[2], problem.piece_length)
    state_launches = []
    if combine is not None:
        sums = partials, partial_norms
        state_launches = [(combine, (*sums, dstate, key_states, key_norms, dinitial, first_pieces))]
        if accumulate is not None:
            state_launches.insert(0, (accumulate, (qs, do, inverse, weights, *sums, *workspaces, pieces)))
    if route == FULL:
        queries, keys = launches
        launches = [
            (queries, (*qs, do, inverse, states, norms, *dqs, partials, partial_norms, pieces)),
            *state_launches,
            (keys, (*ks, v, key_states, key_norms, *dks, dv, pieces)),
        ]
    elif route == WALK:
        queries, keys = launches
        launches = [
            (queries, (*qs, *ks, v, do, inverse, states, norms, *dqs, weights, pieces)),
            *state_launches,
            (keys, (*ks, v, *qs, do, inverse, weights, key_states, key_norms, *dks, dv, pieces)),
        ]
    else:
        queries, keys, values = launches
        launches = [
            (queries, (qs, do, inverse, weights, ks, v, None, None, states, norms, dqs, pieces)),
            *state_launches,
            (keys, (ks, v, None, None, qs, do, inverse, weights, key_states, key_norms, dks, pieces)),
            (values, (ks, qs, do, inverse, key_states, key_norms, dv, None, *workspaces[-2:], pieces)),
        ]
    launch_all(v, *launches)
    return list(dqs), list(dks), dv, dinitial


@planned
def _plan_backward(do, o, states, norms, *arguments):
    """Layouts of gradients and workspaces, the problem, accumulate and combine where there are states, the other launches."""
    *tensors, feature_map, causal, eps, backend, _tf32 = arguments
    qs, ks, v, initial_state, cu_seqlens = _split(tensors)
    dqs, dks, dv = [empty_rows(q, q.shape[3]) for q in qs], [empty_rows(k, k.shape[3]) for k in ks], empty_rows(v, v.shape[3])
    launch, problem = _launchers(), problem_of(qs, ks, v, cu_seqlens, feature_map, causal, backend)
    route = route_of(problem, states is not None, backend)
    q_strides, k_strides, do_strides, v_strides = _strides(qs), _strides(ks), do.stride(), v.stride()
    dq_strides, dk_strides = _strides(dqs), _strides(dks)
    weights = None if route == FULL else o.new_empty(o.shape[:3], dtype=torch.float32)
    key_states = key_norms = accumulate = combine = None
    partials, state_workspaces = (None, None), ()
    if states is not None:
        key_states, key_norms = torch.empty_like(states), torch.empty_like(norms)
        partials, combine = _plan_states(problem, True, do)
        if route != FULL:  # where the kernel of the gradients of the queries does it
            accumulate, state_workspaces = _plan_accumulate(problem, route, True, q_strides, do)
    if route == FULL:
        of_queries, of_keys = (*q_strides, do_strides, *dq_strides), (*k_strides, v_strides, *dk_strides, dv.stride())
        launches = _cuda.FullLaunch(problem, "grad_queries", of_queries), _cuda.FullLaunch(problem, "grad_keys", of_keys)
    elif route == WALK:
        plan = _plan_walk(backend)
        of_queries = *q_strides, *k_strides, v_strides, do_strides, *dq_strides
        of_keys = *k_strides, v_strides, *q_strides, do_strides, *dk_strides, dv.stride()
        of_cuda = ((float(eps),),) if backend == "cuda" else ()
        launches = plan(problem, "walk_grad_queries", of_queries, *of_cuda), plan(problem, "walk_grad_keys", of_keys)
    else:
        direct = causal or states is None
        queries = launch.plan_grad(problem, False, direct, q_strides, do_strides, k_strides, v_strides, dq_strides)
        keys = launch.plan_grad(problem, True, direct, k_strides, v_strides, q_strides, do_strides, dk_strides)
        if route == SLABS:
            values = _cuda.FactoredRead(problem, True, k_strides, dv.stride(), 0.0)
        else:
            values = launch.plan_read(problem, True, direct, k_strides, q_strides, do_strides, dv.stride(), 0.0)
        launches = queries, keys, values
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    workspaces = weights, key_states, key_norms, *partials, *state_workspaces
    return layouts(*dqs, *dks, dv, dinitial, *workspaces), problem, route, (accumulate, combine), launches


def _allocate_forward(qs, v, cu_seqlens, normalize, causal, return_state, stateful, backend):
    """o, final state, inverse, states, norms, not filled; None for what does not exist."""
    batch, query_heads, num_queries, _ = qs[0].shape
    heads, widths, value_width = v.shape[1], [q.shape[3] for q in qs], v.shape[3]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = empty_rows(qs[0], value_width)
    state = inverse = states = norms = None
    if return_state:
        state = torch.empty((sequences, heads, *widths, value_width + 1), dtype=torch.float32, device=v.device)
    if normalize:
        inverse = torch.empty((batch, query_heads, num_queries), dtype=torch.float32, device=v.device)
    if stateful:
        if causal:
            length = piece_length_of(qs, v, causal, backend)
            count = (num_queries + length - 1) // length if cu_seqlens is None else num_queries // length + sequences
        else:
            count = 1 if cu_seqlens is None else sequences
        states, norms = _empty_states(qs, v, count, backend)
    return o, state, inverse, states, norms


def _empty_states(qs, v, count, backend):
    """Buffers for `count` saved states of each head and for their normalisers."""
    widths, value_width = [q.shape[3] for q in qs], v.shape[3]
    shape = (*v.shape[:2], count, math.prod(widths))
    # A state that is walked on with stays float32; others are rounded as operands of products.
    half = v.dtype == torch.bfloat16 and not walks(widths, value_width, backend)
    states = torch.empty((*shape, value_width), dtype=torch.bfloat16 if half else torch.float32, device=v.device)
    return states, torch.empty(shape, dtype=torch.float32, device=v.device)


def _or_empty(tensors, like):
    """None as the empty tensor that stands for it where a schema wants a tensor."""
    return [like.new_empty(0, dtype=torch.float32) if tensor is None else tensor for tensor in tensors]


def _or_none(*tensors):
    """And back; None stays None."""
    return [None if tensor is None or tensor.dim() == 1 else tensor for tensor in tensors]


def _as_outputs(outputs, qs, v, backend):
    """What an operator returns: no saved states are a count of 0, and what else does not exist is an empty tensor."""
    *others, states, norms = outputs
    saved = (states, norms) if states is not None else _empty_states(qs, v, 0, backend)
    return *_or_empty(others, v), *saved


def _dispatched_forward(qs, ks, v, initial_state, cu_seqlens, *options):
    rows, backend = layouts(*qs, *ks, v), options[-2]
    return _as_outputs(forward(rows, (*qs, *ks, v, initial_state, cu_seqlens), *options), qs, v, backend)


def _dispatched_backward(do, dstate, qs, ks, v, initial_state, cu_seqlens, o, inverse, states, norms, *options):
    # The state that was not asked for has a gradient, too, where somebody differentiates every output.
    dstate, inverse = _or_none(dstate, inverse)
    # A count of 0 means that none were saved, but for an empty sequence that continues a state.
    if not states.shape[2] and (v.shape[2] or initial_state is None):
        states = norms = None
    dqs, dks, dv, dinitial = backward(
        do, dstate, qs, ks, v, initial_state, cu_seqlens, o, inverse, states, norms, *options
    )
    return dqs, dks, dv, *_or_empty((dinitial,), v)


def _fake_forward(qs, ks, v, initial_state, cu_seqlens, feature_map, normalize, causal, eps, return_state, backend, _):
    # How many states are saved depends on the length in ways that would bind an exported program to some lengths.
    unknown = torch.compiler.is_exporting() and any(isinstance(x.shape[2], torch.SymInt) for x in (*qs, v))
    stateful = not unknown and uses_states(qs, v, causal, initial_state is not None or return_state, backend)
    outputs = _allocate_forward(qs, v, cu_seqlens, normalize, causal, return_state, stateful, backend)
    if unknown:
        outputs = *outputs[:3], *_empty_states(qs, v, torch.library.get_ctx().new_dynamic_size(), backend)
    return _as_outputs(outputs, qs, v, backend)


def _fake_backward(do, dstate, qs, ks, v, initial_state, *_):
    dqs, dks = [empty_rows(q, q.shape[3]) for q in qs], [empty_rows(k, k.shape[3]) for k in ks]
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    return dqs, dks, empty_rows(v, v.shape[3]), *_or_empty((dinitial,), v)


def _save(ctx, inputs, output):
    qs, ks, v, initial_state, cu_seqlens, feature_map, normalize, causal, eps, _, _, backward_backend = inputs
    o, _, *saved = output
    ctx.save_for_backward(*qs, *ks, v, initial_state, cu_seqlens, o, *saved)
    ctx.set_materialize_grads(False)
    ctx.options = feature_map, normalize, causal, eps, backward_backend


def _autograd_backward(ctx, do, dstate, *_):
    *tensors, o, inverse, states, norms = ctx.saved_tensors
    return *_backward_op(do, dstate, tensors, o, (inverse, states, norms), ctx.options), *[None] * 8


def _backward_op(do, dstate, tensors, o, saved, options):
    """Gradients of qs, ks, v and initial_state by the torch operator."""
    qs, ks, v, initial_state, cu_seqlens = _split(tensors)
    do = torch.zeros_like(o) if do is None else do
    operator = torch.ops.nearfar.hadamard_attention_backward
    dqs, dks, dv, dinitial = operator(
        do, dstate, qs, ks, v, initial_state, cu_seqlens, o, *_as_outputs(saved, qs, v, options[-1]), *options
    )
    return dqs, dks, dv, None if initial_state is None else dinitial


class _Plan(Plan):
    """A plain call."""

    num_visible = 2
    program_of, forward_of = staticmethod(_program), staticmethod(forward)

    def outputs(self, *tensors):
        if tensors[-1] is None:
            return super().outputs(*tensors)
        return forward(self.rows, tensors, *self.options, self.ahead)  # makes the pieces of packed sequences

    def backward(self, gradients, saved, dispatched):
        *tensors, o, inverse, states, norms = saved
        feature_map, normalize, causal, eps, _, _, backend = self.options
        options = feature_map, normalize, causal, eps, backend
        if dispatched:
            dqs, dks, dv, dinitial = _backward_op(*gradients, tensors, o, (inverse, states, norms), options)
        else:
            dqs, dks, dv, dinitial = backward(*gradients, *_split(tensors), o, inverse, states, norms, *options)
        return *dqs, *dks, dv, dinitial, None


register(
    "hadamard_attention",
    (_FORWARD, _dispatched_forward, _fake_forward),
    (_BACKWARD, _dispatched_backward, _fake_backward),
    _autograd_backward,
    _save,
    "linear_attention and hadamard_attention",
)
