"""The operators on the pairwise skeleton as torch operators: schema, fake and autograd, written once."""

import functools
import importlib

import torch

from nearfar import _cuda
from nearfar.checks import PLAIN
from nearfar.localities import keys_in_window
from nearfar.ops.eager import Plan, start
from nearfar.ops.program import Program
from nearfar.ops.torch_operator import (
    compile_ahead,
    empty_rows,
    layouts,
    planned,
    register,
    unit_stride,
    unit_strides,
    uses_tf32,
)

MAX_CANDIDATES = 1024  # keys that a query may choose its top_k from

# Wide heads and windows from which on the squared norms of keys are computed once, ahead of the attention.
SQUARES_AHEAD_WIDTH = 128
SQUARES_AHEAD_KEYS = 512

_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor parameter, Tensor? token_bounds, int left, int right, int? top_k,"
    ' str backend="triton", str backward_backend="triton") -> (Tensor, Tensor, Tensor)'
)
_BACKWARD = (
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor parameter, Tensor? token_bounds, Tensor o, Tensor lse, Tensor? bits,"
    ' int left, int right, int? top_k, str backend="triton") -> (Tensor, Tensor, Tensor, Tensor)'
)


class PairwiseOp:
    """`torch.ops.nearfar.<name>` and its backward, over the Triton kernels of a module that defines PAIR.

    cuda_forward, cuda_backward: classes of the launches of backend="cuda"; its forward saves the same tensors as Triton's.

    The forward returns (o, lse, bits); lse and the selection bits only serve the backward. torch.compile, export and
    dispatch modes see one opaque operator in each direction. A plain eager call goes to the same two functions without the
    dispatcher, which would take longer than the launch (docs/notes/krause.md has the measurement).
    """

    def __init__(self, name, kernels, cuda_forward, cuda_backward):
        self._kernels = kernels
        self.cuda_forward, self.cuda_backward = cuda_forward, cuda_backward
        register(
            name,
            (_FORWARD, self._dispatched_forward, _fake_forward),
            (_BACKWARD, self.backward, _fake_backward),
            self._dispatched_backward,
            _save,
        )
        self.forward_op = getattr(torch.ops.nearfar, name).default
        self.backward_op = getattr(torch.ops.nearfar, f"{name}_backward").default

    def __call__(self, repeats, rows, q, k, v, parameter, token_bounds, *options):
        """repeats: of calls with these options and without token_bounds, or None. rows: layouts of q, k and v, None where the
        call is not plain. options: left, right, top_k, and the backends of the forward and of the backward, which save and
        read the same.
        """
        rows, (q, k, v) = unit_strides(rows, q, k, v)
        tensors = q, k, v, parameter, token_bounds
        if rows is None or type(parameter) not in PLAIN:
            return self.forward_op(*tensors, *options)[0]
        return start(_Plan(self, rows, options, tensors), repeats, tensors)

    @functools.cached_property
    def modules(self):
        """The launchers and the pair functions; Triton is imported with the first launch, not with the package."""
        from nearfar.triton_kernels import pairwise_launch

        return pairwise_launch, importlib.import_module(self._kernels).PAIR

    def forward(self, rows, tensors, left, right, top_k, backend, backward_backend, ahead=None):
        """(o, lse, bits), bits None without top_k. rows: layouts of q, k and v. ahead: see compile_ahead."""
        if backend == "cuda":
            rows, (q, k, v) = _cuda.aligned_rows(rows, *tensors[:3])
            tensors = q, k, v, *tensors[3:]
        return self.program(rows, tensors, left, right, top_k, backend, backward_backend, ahead)(*tensors)

    def program(self, rows, tensors, left, right, top_k, backend, backward_backend, ahead):
        q, k, _, parameter, token_bounds = tensors
        given = parameter.numel(), token_bounds is not None, q.is_cuda and _cuda.extension is not None
        return _plan_forward(rows, self, *given, left, right, top_k, backend, backward_backend, uses_tf32(q), ahead)

    def _dispatched_forward(
        self, q, k, v, parameter, token_bounds, left, right, top_k, backend="triton", backward_backend="triton"
    ):  # fmt: skip
        tensors, options = (q, k, v, parameter, token_bounds), (left, right, top_k, backend, backward_backend)
        o, lse, bits = self.forward(layouts(q, k, v), tensors, *options)
        return o, lse, no_bits(q) if bits is None else bits

    def backward(self, do, q, k, v, parameter, token_bounds, o, lse, bits, left, right, top_k, backend="triton"):
        """(dq, dk, dv, dparameter)."""
        do, bits = unit_stride(do), None if top_k is None else bits
        if backend == "cuda":  # autograd hands over whatever layout it has
            (q, k, v), do = _cuda.aligned_starts(q, k, v), _cuda.aligned(do)
        tensors = do, q, k, v, parameter, token_bounds, o, lse, bits
        return tuple(_plan_backward(layouts(*tensors), self, left, right, backend, uses_tf32(q))(*tensors))

    def _dispatched_backward(self, ctx, do, _dlse, _dbits):
        return *self.backward_op(do, *ctx.saved_tensors, *ctx.options), *[None] * 6


class _Plan(Plan):
    """A plain call of a PairwiseOp."""

    def __init__(self, op, *arguments):
        self._op, self.program_of, self.forward_of = op, op.program, op.forward
        super().__init__(*arguments)

    def backward(self, gradients, saved, dispatched):
        backward = self._op.backward_op if dispatched else self._op.backward
        left, right, top_k, _, backend = self.options
        return *backward(*gradients, *saved, left, right, top_k, backend), None


def _save(ctx, inputs, output):
    *tensors, left, right, top_k, _, backward_backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.options = left, right, top_k, backward_backend


@planned
def _plan_forward(
    q, k, v, op, num_parameters, packed, squares, left, right, top_k, backend, backward_backend, _tf32, ahead
):  # fmt: skip
    """The program of (o, lse, bits). squares: whether there is a CUDA kernel of |k|^2.

    One more pass over k, by that kernel, was measured to pay for wide heads and windows (docs/notes/krause.md).
    """
    o, lse, bits = outputs = empty_outputs(q, v, left, right, k.shape[2], top_k)
    parameter = q.new_empty(num_parameters, dtype=torch.float32)
    token_bounds = q.new_empty((2, q.shape[2]), dtype=torch.int32) if packed else None
    inputs = q, k, v, parameter, token_bounds
    if not o.numel() or not k.shape[2]:
        return Program(inputs, outputs, ())
    if backward_backend == "triton":
        compile_ahead(ahead, op.backward, o, *inputs, *outputs, left, right, top_k)
    if backend == "cuda":
        launch = op.cuda_forward(q, k, v, parameter, left, right, top_k, o)
        return Program(inputs, outputs, [(launch, (*inputs, *outputs))])
    launchers, pair = op.modules
    launches, k_squares = [], None
    wide = k.shape[3] >= SQUARES_AHEAD_WIDTH and keys_in_window(left, right, k.shape[2]) > SQUARES_AHEAD_KEYS
    if squares and wide and k.dtype != torch.float32 and bits is None:
        k_squares = k.new_empty(k.shape[:3], dtype=torch.float32)
        launches = [(_cuda.RowSumsq(k), (k, k_squares))]
    launches += launchers.forward_launches(pair, q, k, v, k_squares, *inputs[3:], left, right, top_k, *outputs)
    return Program(inputs, outputs, launches)


@planned
def _plan_backward(do, q, k, v, parameter, token_bounds, o, lse, bits, op, left, right, backend, _tf32):
    """The program of (dq, dk, dv, dparameter)."""
    inputs = do, q, k, v, parameter, token_bounds, o, lse, bits
    dq, dk, dv, dparameter = gradients = empty_gradients(q, k, v, parameter)
    if not o.numel() or not k.shape[2]:
        return Program(inputs, gradients, ())
    if backend == "cuda":
        launch = op.cuda_backward(q, k, v, o, do, parameter, left, right, dq, dk, dv)
        partials = lse.new_empty(launch.partials_shape(q, k))
        return Program(
            inputs, gradients, [(launch, (q, k, v, o, do, parameter, lse, bits, token_bounds, *gradients, partials))]
        )
    launchers, pair = op.modules
    call = launchers.signature(q, k, v, parameter, token_bounds is not None, left, right)
    queries, keys, of_parameter = launchers.backward_launches(pair, call, o, do, bits, dq, dk, dv)
    delta, dlog_scale = torch.empty_like(lse), lse.new_empty(*lse.shape[:2], launchers.grad_query_tiles(call))
    launches = (
        (queries, (q, k, v, parameter, o, do, lse, bits, dq, delta, dlog_scale, token_bounds)),
        (keys, (q, k, v, parameter, do, lse, bits, delta, dk, dv, token_bounds)),
        (of_parameter, (dlog_scale, parameter, dparameter)),
    )
    return Program(inputs, gradients, launches)


def empty_outputs(q, v, left, right, num_keys, top_k):
    """o, lse and bits, not filled; bits None without top_k."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if top_k is None:
        return empty_rows(q, v.shape[3]), lse, None
    shape = (*q.shape[:3], selection_words(left, right, num_keys))
    return empty_rows(q, v.shape[3]), lse, torch.empty(shape, dtype=torch.int32, device=q.device)


def empty_gradients(q, k, v, parameter):
    """dq, dk, dv and dparameter, not filled."""
    return empty_rows(q, q.shape[3]), empty_rows(k, k.shape[3]), empty_rows(v, v.shape[3]), torch.empty_like(parameter)


def no_bits(q):
    """What stands for bits without top_k where a schema wants a tensor."""
    return torch.empty((0,), dtype=torch.int32, device=q.device)


def _fake_forward(q, k, v, parameter, token_bounds, left, right, top_k, backend="triton", backward_backend="triton"):
    o, lse, bits = empty_outputs(q, v, left, right, k.shape[2], top_k)
    return o, lse, no_bits(q) if bits is None else bits


def _fake_backward(do, q, k, v, parameter, *_):
    return empty_gradients(q, k, v, parameter)


def selection_words(left, right, num_keys):
    """int32 words of a row's selection: a ring of bits that fits a window; key j is bit j modulo its size.

    It does not depend on the length under a limited window, and does not branch on it under another, so that torch.compile
    and torch.export have nothing to specialize on. Up to 256 bits it grows in steps of 64, beyond in steps of 128: as many
    keys as a tile of the forward has.
    """
    window = num_keys if left < 0 or right < 0 else min(left + right + 1, MAX_CANDIDATES)
    steps = (window + 63) // 64
    beyond_256 = (steps + 11) // 16  # 0 up to 4 steps, 1 from 5 to 20, and MAX_CANDIDATES are 16
    return 2 * (steps + beyond_256 * (steps % 2))
