"""torch.library registration of the operators on the pairwise skeleton: schema, fake and autograd, written once."""

import importlib

import torch

_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor parameter, Tensor? token_bounds, int left, int right, int? top_k)"
    " -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor parameter, Tensor? token_bounds, Tensor o, Tensor lse, Tensor bits,"
    " int left, int right, int? top_k) -> (Tensor, Tensor, Tensor, Tensor)"
)


class PairwiseOp:
    """`torch.ops.nearfar.<name>` and its backward, over the Triton kernels of a module that defines PAIR.

    The forward returns (o, lse, bits); lse and the selection bits only serve the backward. torch.compile sees one opaque call
    in each direction.
    """

    def __init__(self, name, kernels):
        self._kernels = kernels
        forward, backward = f"nearfar::{name}", f"nearfar::{name}_backward"
        torch.library.define(forward, _FORWARD)
        torch.library.define(backward, _BACKWARD)
        torch.library.impl(forward, ("CPU", "CUDA"), self._forward)
        torch.library.impl(backward, ("CPU", "CUDA"), self._backward)
        torch.library.register_fake(forward, self._empty_outputs)
        torch.library.register_fake(backward, self._empty_gradients)
        torch.library.register_autograd(forward, self._autograd_backward, setup_context=_setup_context)
        torch.library.register_autograd(backward, _refuse_double_backward)
        self._forward_op = getattr(torch.ops.nearfar, name).default
        self._backward_op = getattr(torch.ops.nearfar, f"{name}_backward").default

    def __call__(self, q, k, v, parameter, token_bounds, left, right, top_k):
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        return self._forward_op(q, k, v, parameter, token_bounds, left, right, top_k)[0]

    def _modules(self):
        """The launchers and the operator's pair functions; Triton is imported with the first launch, not with the package."""
        from nearfar.triton_kernels import pairwise_launch

        return pairwise_launch, importlib.import_module(self._kernels).PAIR

    def _forward(self, q, k, v, parameter, token_bounds, left, right, top_k):
        o, lse, bits = self._empty_outputs(q, k, v, parameter, token_bounds, left, right, top_k)
        if o.numel():
            launch, pair = self._modules()
            with torch.cuda.device_of(q):
                launch.forward(pair, q, k, v, parameter, token_bounds, left, right, top_k, o, lse, bits)
        return o, lse, bits

    def _backward(self, do, q, k, v, parameter, token_bounds, o, lse, bits, left, right, top_k):
        dq, dk, dv, dparameter = self._empty_gradients(
            do, q, k, v, parameter, token_bounds, o, lse, bits, left, right, top_k
        )
        if not o.numel():
            return dq, dk.zero_(), dv.zero_(), dparameter.zero_()
        launch, pair = self._modules()
        delta = torch.empty_like(lse)
        dlog_scale = lse.new_empty(*lse.shape[:2], launch.grad_query_tiles(q, v))
        with torch.cuda.device_of(q):
            launch.backward(
                pair, q, k, v, parameter, token_bounds, left, right, o, unit_stride(do), lse,
                None if top_k is None else bits, dq, dk, dv, delta, dlog_scale,
            )  # fmt: skip
        return dq, dk, dv, pair.grad_parameter(dlog_scale.sum((0, 2)), parameter)

    @staticmethod
    def _empty_outputs(q, k, v, parameter, token_bounds, left, right, top_k):
        o = _empty(q, v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        words = 0 if top_k is None else selection_words(left, right, k.shape[2])
        return o, lse, q.new_empty((*q.shape[:3], words), dtype=torch.int32)

    @staticmethod
    def _empty_gradients(do, q, k, v, parameter, token_bounds, o, lse, bits, left, right, top_k):
        return _empty(q, q.shape[3]), _empty(k, k.shape[3]), _empty(v, v.shape[3]), torch.empty_like(parameter)

    def _autograd_backward(self, ctx, do, _dlse, _dbits):
        *inputs, o, lse, bits = ctx.saved_tensors
        gradients = self._backward_op(do, *inputs, o, lse, bits, *ctx.window_and_top_k)
        return *gradients, None, None, None, None


def unit_stride(tensor):
    """The tensor itself when its last dimension is contiguous, as the kernels need, otherwise a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def selection_words(left, right, num_keys):
    """int32 words of a row's selection: a ring of bits, in steps of 64, that the keys of one window fit (key j modulo its size)."""
    blocks = 1 << (-(-num_keys // 64) - 1).bit_length()
    if left >= 0 and right >= 0:
        blocks = min(blocks, -(-(left + right + 1) // 64))
    return 2 * blocks


def _empty(like, width):
    """(B, H, N, width) in the memory order of `like`: a (B, N, H, D) projection gets its output in the same order."""
    batch, heads, length, _ = like.shape
    if heads > 1 and like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, width).transpose(1, 2)
    return like.new_empty(batch, heads, length, width)


def _setup_context(ctx, inputs, output):
    *tensors, left, right, top_k = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.window_and_top_k = left, right, top_k


def _refuse_double_backward(ctx, *gradients):
    raise RuntimeError('the fused kernels have no double backward; use backend="reference" for second derivatives')
