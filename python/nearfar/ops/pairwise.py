"""The operators on the pairwise skeleton as torch operators: schema, fake and autograd, written once."""

import functools
import importlib

import torch

from nearfar import _cuda
from nearfar.checks import PLAIN
from nearfar.localities import keys_in_window
from nearfar.ops.torch_operator import (
    allocate,
    apply,
    compile_ahead,
    device_of,
    empty_rows,
    launch_all,
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

    plan_cuda_forward, cuda_backward: of backend="cuda"; its forward saves the same tensors as Triton's.

    The forward returns (o, lse, bits); lse and the selection bits only serve the backward. torch.compile, export and
    dispatch modes see one opaque operator in each direction. A plain eager call goes to the same two functions without the
    dispatcher, which would take longer than the launch (docs/krause.md has the measurement).
    """

    def __init__(self, name, kernels, plan_cuda_forward, cuda_backward):
        self._kernels = kernels
        self.plan_cuda_forward, self._cuda_backward = plan_cuda_forward, cuda_backward
        register(
            name,
            (_FORWARD, self._dispatched_forward, _fake_forward),
            (_BACKWARD, self.backward, _fake_backward),
            self._dispatched_backward,
            _save,
        )
        self.forward_op = getattr(torch.ops.nearfar, name).default
        self.backward_op = getattr(torch.ops.nearfar, f"{name}_backward").default

    def __call__(self, rows, q, k, v, parameter, token_bounds, *options):
        """rows: layouts of q, k and v, None where the call is not plain.

        options: left, right, top_k, and the backends of the forward and of the backward, which save and read the same.
        """
        rows, (q, k, v) = unit_strides(rows, q, k, v)
        if rows is None or type(parameter) not in PLAIN:
            return self.forward_op(q, k, v, parameter, token_bounds, *options)[0]
        arguments = q, k, v, parameter, token_bounds, *options
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or parameter.requires_grad):
            return apply(_Eager, q, k, v, parameter, self, rows, arguments)
        return self.forward(rows, *arguments)[0]

    @functools.cached_property
    def modules(self):
        """The launchers and the pair functions; Triton is imported with the first launch, not with the package."""
        from nearfar.triton_kernels import pairwise_launch

        return pairwise_launch, importlib.import_module(self._kernels).PAIR

    def forward(
        self, rows, q, k, v, parameter, token_bounds, left, right, top_k, backend, backward_backend, ahead=None
    ):  # fmt: skip
        """(o, lse, bits), bits None without top_k. rows: layouts of q, k and v. ahead: see compile_ahead."""
        options = left, right, top_k, backend, backward_backend, uses_tf32(q), ahead
        outputs, launch, squares_ahead = _plan_forward(
            rows, self, parameter.numel(), token_bounds is not None, *options
        )
        o, lse, bits = allocate(outputs, q.device)
        if launch is None:
            return o.zero_(), lse.zero_(), bits
        if backend == "cuda":
            launch(q, k, v, parameter, token_bounds, o, lse, bits)
            return o, lse, bits
        with device_of(q):
            if bits is None:
                k_squares = _cuda.row_sumsq(k) if squares_ahead and k.is_cuda and _cuda.extension is not None else None
                launch(q, k, v, k_squares, parameter, o, lse, token_bounds)
            else:
                launch(q, k, v, parameter, o, lse, bits, token_bounds)
        return o, lse, bits

    def _dispatched_forward(
        self, q, k, v, parameter, token_bounds, left, right, top_k, backend="triton", backward_backend="triton"
    ):
        arguments = q, k, v, parameter, token_bounds, left, right, top_k, backend, backward_backend
        o, lse, bits = self.forward(layouts(q, k, v), *arguments)
        return o, lse, no_bits(q) if bits is None else bits

    def backward(self, do, q, k, v, parameter, token_bounds, o, lse, bits, left, right, top_k, backend="triton"):
        do, bits = unit_stride(do), None if top_k is None else bits
        if not o.numel() or not k.shape[2]:
            return tuple(gradient.zero_() for gradient in empty_gradients(q, k, v, parameter))
        if backend == "cuda":
            gradients = empty_gradients(q, k, v, parameter)
            self._cuda_backward(q, k, v, parameter, token_bounds, left, right, o, do, lse, bits, *gradients)
            return gradients
        tensors = do, q, k, v, parameter, token_bounds, o, lse, bits
        outputs, (queries, keys, of_parameter) = _plan_backward(layouts(*tensors), self, left, right, uses_tf32(q))
        dq, dk, dv, dparameter, delta, dlog_scale = allocate(outputs, q.device)
        launch_all(
            q,
            (queries, (q, k, v, parameter, o, do, lse, bits, dq, delta, dlog_scale, token_bounds)),
            (keys, (q, k, v, parameter, do, lse, bits, delta, dk, dv, token_bounds)),
            (of_parameter, (dlog_scale, parameter, dparameter)),
        )
        return dq, dk, dv, dparameter

    def _dispatched_backward(self, ctx, do, _dlse, _dbits):
        return *self.backward_op(do, *ctx.saved_tensors, *ctx.options), *[None] * 6


class _Eager(torch.autograd.Function):
    """The autograd of a plain eager call."""

    @staticmethod
    def forward(ctx, q, k, v, parameter, op, rows, arguments):
        """arguments: those of op.forward after rows, in one piece, as torch looks over each that it is given."""
        output = op.forward(rows, *arguments, ahead=rows[0][3])
        _save(ctx, arguments, output)
        ctx.op = op
        return output[0]

    @staticmethod
    def backward(ctx, do):
        # With create_graph the torch operator runs, because it refuses to be differentiated again.
        backward = ctx.op.backward_op if torch.is_grad_enabled() else ctx.op.backward
        return *backward(do, *ctx.saved_tensors, *ctx.options), None, None, None


def _save(ctx, inputs, output):
    *tensors, left, right, top_k, _, backward_backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.options = left, right, top_k, backward_backend


@planned
def _plan_forward(q, k, v, op, num_parameters, packed, left, right, top_k, backend, backward_backend, _tf32, ahead):
    """Layouts of o, lse and bits, the launch (None: there is nothing to read), and whether |k|^2 is to be computed ahead of it.

    One more pass over k, by a CUDA kernel, was measured to pay for wide heads and windows (docs/krause.md).
    """
    outputs = empty_outputs(q, v, left, right, k.shape[2], top_k)
    if not outputs[0].numel() or not k.shape[2]:
        return layouts(*outputs), None, False
    parameter = q.new_empty(num_parameters, dtype=torch.float32)
    token_bounds = q.new_empty((2, q.shape[2]), dtype=torch.int32) if packed else None
    if backward_backend == "triton":
        compile_ahead(ahead, op.backward, outputs[0], q, k, v, parameter, token_bounds, *outputs, left, right, top_k)
    if backend == "cuda":
        return layouts(*outputs), op.plan_cuda_forward(q, k, v, parameter, left, right, top_k, outputs[0]), False
    launchers, pair = op.modules
    launch = launchers.forward_launch(pair, q, k, v, parameter, token_bounds, left, right, top_k, *outputs)
    many_keys = keys_in_window(left, right, k.shape[2]) > SQUARES_AHEAD_KEYS
    return layouts(*outputs), launch, k.shape[3] >= SQUARES_AHEAD_WIDTH and many_keys


@planned
def _plan_backward(do, q, k, v, parameter, token_bounds, o, lse, bits, op, left, right, _tf32):
    """Layouts of dq, dk, dv, dparameter, delta and dlog_scale, and Triton's launches."""
    gradients = empty_gradients(q, k, v, parameter)
    launchers, pair = op.modules
    call = launchers.signature(q, k, v, parameter, token_bounds is not None, left, right)
    delta, dlog_scale = torch.empty_like(lse), lse.new_empty(*lse.shape[:2], launchers.grad_query_tiles(call))
    return layouts(*gradients, delta, dlog_scale), launchers.backward_launches(pair, call, o, do, bits, *gradients[:3])


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

    It does not depend on the length under a limited window, so that torch.compile has nothing to specialize on. Up to 256
    bits it grows in steps of 64, beyond in steps of 128: as many keys as a tile of the forward has.
    """
    window = num_keys if left < 0 or right < 0 else min(left + right + 1, MAX_CANDIDATES)
    step = 64 if window <= 256 else 128
    return (window + step - 1) // step * (step // 32)
