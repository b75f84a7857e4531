"""What the tests share: the device, the dtypes, running a call with its gradients, and the rule of accuracy."""

import math
import os
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.accuracy import FROBENIUS, LARGEST, accumulation  # noqa: F401  the samples take the last from here
from nearfar import _cuda
from nearfar.runtime import choices
from nearfar.runtime.plans import forget_plans
from nearfar.runtime.tensors import Layout

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Triton 3.6 multiplies bfloat16 wrongly in its interpreter: bfloat16 is for the GPU.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())

# On a GPU a fuzz draws few kernels, each of which has to be compiled, with many numbers, unless it was asked to take its time.
FEW_KERNELS = DEVICE == "cuda" and "NEARFAR_FUZZ" not in os.environ

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
needs_extension = pytest.mark.skipif(_cuda.extension is None, reason=str(_cuda.unavailable_reason))


def gpu(test):
    """Marks a test of the CUDA extension."""
    for mark in (pytest.mark.gpu, needs_gpu, needs_extension):
        test = mark(test)
    return test


class Sample(NamedTuple):
    """One call of an operator: its differentiable tensors and its other arguments, both by name."""

    tensors: dict
    options: dict


def pretend_measured(monkeypatch, *rows, capability=9):
    """Let every operator choose by these rows, on a GPU of this capability.

    rows: (key, milliseconds (cuda, triton) of the forward, those of the backward), as measured on Hopper.
    """
    found = [
        {"key": {"capability": 9, **key}}
        | {name: {"forward": forward[i], "backward": backward[i]} for i, name in enumerate(("cuda", "triton"))}
        for key, forward, backward in rows
    ]
    monkeypatch.setattr(choices, "rows", lambda operator: found)
    monkeypatch.setattr(choices, "_capability", lambda index: capability)


def has_tokens(name):
    """Whether a sample's tensor of this name is (B, H, N, D): q, k, v, or q1, q2, .. of several; omega, omega_k; theta."""
    return name[0] in "qkv" or name.startswith(("omega", "theta"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, dtype=torch.float32, seed=0, device=DEVICE):
    """The same normal numbers on every device."""
    return torch.randn(shape, generator=generator(seed)).to(device, dtype)


# The same numbers of a (B, H, N, width) tensor in memory orders that users bring, or, repeated, fewer of them.
LAYOUTS = {
    "contiguous": lambda x: x,
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other row": lambda x: torch.stack((x, -x), 3).flatten(2, 3)[:, :, ::2],
    "slice of wider rows": lambda x: torch.cat((x + 1, x, x - 1), -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "one head expanded": lambda x: x[:, :1].expand(x.shape),
    "one row expanded": lambda x: x[:, :, :1].expand(x.shape),
    "width before rows": lambda x: x.mT.contiguous().mT,
}
# Rows of 16-bit numbers that do not start where copies of 16 bytes do.
MISALIGNED = {"off by eight bytes": lambda x: torch.nn.functional.pad(x, (4, 4))[..., 4:-4]}
GRADIENTS = {**LAYOUTS, "of a sum": lambda x: torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape)}


def like(tensor, seed=1):
    """Random numbers in the shape of a tensor, or of each tensor of a tuple."""
    if isinstance(tensor, tuple):
        return tuple(like(part, seed + index) for index, part in enumerate(tensor))
    return randn(*tensor.shape, dtype=tensor.dtype, seed=seed, device=tensor.device)


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def detached(outputs):
    return tuple(map(torch.Tensor.detach, outputs)) if isinstance(outputs, tuple) else outputs.detach()


def grad(outputs, tensors, do):
    """Gradients of a tensor or a tuple of them; outputs that none of the tensors reaches are left out."""
    pairs = [(o, d) for o, d in zip(as_tuple(outputs), as_tuple(do), strict=True) if o.requires_grad]
    return torch.autograd.grad([o for o, _ in pairs], tensors, [d for _, d in pairs])


def leaves(sample):
    """The tensors of a sample as leaves that require gradients; strides are kept."""
    return {name: tensor.detach().requires_grad_() for name, tensor in sample.tensors.items()}


def run(function, sample, do=None, backend="triton"):
    """Output, a tensor or a tuple, and gradients by name.

    do: gradient of the output, a function of the output, or None for a random one.
    """
    tensors = leaves(sample)
    o = function(**tensors, **sample.options, backend=backend)
    if do is None:
        do = like
    gradients = grad(o, list(tensors.values()), do(detached(o)) if callable(do) else do)
    return detached(o), dict(zip(tensors, gradients, strict=True))


def assert_same(first, second, what=""):
    """Two results of `run` agree bit for bit."""
    for index, (a, b) in enumerate(zip(as_tuple(first[0]), as_tuple(second[0]), strict=True)):
        assert torch.equal(a, b), f"output {index} differs {what}"
    for name in first[1]:
        assert torch.equal(first[1][name], second[1][name]), f"gradient of {name} differs {what}"


def assert_same_by_other_ways(function, operator, sample, arguments):
    """What a function computes in CUDA C++ it also computes in a graph, through the dispatcher and compiled.

    operator, arguments: its torch operator, which has to pass opcheck, and what that is given for a sample.
    """
    expected = run(function, sample, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capture fails if a launch goes to any other stream
        o = function(**sample.tensors, **sample.options, backend="cuda")
    o.fill_(math.nan)
    graph.replay()
    assert torch.equal(o, expected[0])
    torch.library.opcheck(operator.default, arguments(Sample(leaves(sample), sample.options)))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(expected, run(compiled, sample, backend="cuda"))


FEW = 16
BOUNDS = {"largest": LARGEST, "Frobenius": FROBENIUS}


def accuracy(got, exact, plain, scale, dtype):
    """{norm: (error, bound)} of the rule of accuracy (bench/accuracy.py); every error has to be at most its bound.

    got: the result. plain: it is rounded to the dtype of the result here, and where it overflows it earns no allowance. Of
    16-bit inputs the features of linear attention are 16-bit numbers in it, as PyTorch's maps return them; all else is float32.

    Fewer than FEW numbers may be right by luck: the plain formula's errors then count as one unit in the last place at least.
    """
    info = torch.finfo(got.dtype)
    quantum = info.smallest_normal * info.eps  # results below it cannot be told from zero
    plain = plain.to(got.dtype).double() - exact
    found = {}
    for name, rule in BOUNDS.items():
        measure = rule.measure
        allowance = measure(plain).nan_to_num(0, 0, 0)
        if exact.numel() < FEW:
            allowance = allowance.clamp_min(info.eps * measure(exact))
        bound = rule.of(allowance, measure(exact), measure(scale), dtype) + measure(torch.full_like(exact, quantum))
        found[name] = measure(got.double() - exact).item(), bound.item()
    return found


OF_KERNELS = [True]  # whether the results at hand are


@contextmanager
def of_the_reference():
    """Results checked in here are the reference's: it computes in float32, so no 16-bit rounding of kernels is allowed for."""
    OF_KERNELS[0] = False
    try:
        yield
    finally:
        OF_KERNELS[0] = True


def rounds_like_kernels(dtype):
    """Whether the plain formula of gradients makes the roundings of 16-bit kernels (`stored` in tests/samples)."""
    return dtype.itemsize == 2 and OF_KERNELS[0]


def with_gradient_in(x, dtype):
    """x, whose gradient is rounded to this dtype, scaled to near 1 first, so that it does not underflow."""

    def rounded(gradient):
        largest = gradient.abs().max()
        unit = torch.where(largest > 0, largest.log2().floor().exp2(), 1).nan_to_num(1, 1, 1)
        return (gradient / unit).to(dtype).to(gradient.dtype) * unit

    if x.requires_grad and x.numel():
        x.register_hook(rounded)
    return x


def rounded(x, dtype):
    """x with its values, but not its derivatives, rounded to this dtype."""
    return x + (x.to(dtype) - x).detach()


def normalized(total, weight, dtype):
    """total / weight, rounded to this dtype, with the gradients dO / weight, rounded, too, and -dO . o / weight of that o."""
    inverse = weight.detach().masked_fill(weight == 0, float("inf")).reciprocal()
    o = (total.detach() * inverse).to(dtype).to(total.dtype)
    tangent = (with_gradient_in(total, dtype) - o * weight) * inverse
    return o + tangent - tangent.detach()


def furthest(exact, *plain):
    """Of several plain results the one furthest from the exact one: any of them is what plain arithmetic may give."""
    return max(plain, key=lambda x: (x.double() - exact).norm().nan_to_num(0, 0, 0).item())


def assert_accurate(name, got, exact, plain, scale, dtype):
    """The rule of accuracy, see `accuracy`."""
    assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    assert torch.isfinite(got).all(), f"{name} is not finite"
    for norm, (error, bound) in accuracy(got, exact, plain, scale, dtype).items():
        assert error <= bound, f"{name}: {norm} error {error:.3e} > {bound:.3e}, {error / bound:.2f} times what is allowed"


def tensor(width=64, dtype=torch.bfloat16, row=None, device="cuda"):
    """Layout of a tensor with rows `row` elements apart."""
    shape, row = (2, 4, 9, width), width if row is None else row
    return Layout(torch.Size(shape), (36 * row, 9 * row, row, 1), dtype, torch.device(device, 0))


@contextmanager
def poison():
    """Uninitialised memory is filled with NaN, or the largest integer, before anyone can write to it."""
    enabled, filling = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        torch.utils.deterministic.fill_uninitialized_memory = filling


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def turns(*calls):
    """Every call gives alone what it gives among the others, and no two give the same."""
    alone = []
    for call in calls:
        forget_plans()
        alone.append(call())
    for call, expected in zip(calls + calls, alone + alone, strict=True):
        assert torch.equal(call(), expected)
    for index, result in enumerate(alone):
        assert not any(torch.equal(result, other) for other in alone[:index])
