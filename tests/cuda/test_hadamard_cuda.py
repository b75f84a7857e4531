"""Bidirectional Hadamard attention with two factors of 64 in CUDA C++: what it serves, and the promises of Triton's kernels."""

import pytest
import torch
from harness import (
    GRADIENTS,
    LAYOUTS,
    MISALIGNED,
    Sample,
    assert_same,
    assert_same_by_other_ways,
    gpu,
    leaves,
    like,
    pretend_measured,
    tensor,
)
from samples.cuda.hadamard import SAMPLES, cuda_sample, run_cuda
from samples.linear import check, flat, op_arguments

import nearfar as nf
from nearfar import _cuda
from nearfar.ops import linear as operator

# ---------------------------------------------------------------------------------------------------- what it serves


class Extension:
    """Stands for nearfar._C where it was not built."""

    architectures = staticmethod(lambda: ["90a"])


def call(v=None, packed=False, **changes):
    """Arguments of linear_reason. changes: of one factor of the queries, and of one of the keys."""
    factors = [tensor(**changes), tensor()]
    return factors, factors, tensor(128) if v is None else v, False, packed


REASONS = {
    None: call,
    "v is on cpu": lambda: call(tensor(128, device="cpu")),
    "v has dtype torch.float16": lambda: call(tensor(128, dtype=torch.float16)),
    "take no packed sequences": lambda: call(packed=True),
    "the factors are (32, 64) and v is 128 wide": lambda: call(width=32),
    "the factors are (64, 64) and v is 32 wide": lambda: call(tensor(32)),
    "rows of qs[0] do not start": lambda: call(row=68),
    "rows of v do not start": lambda: call(tensor(128, row=132)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_call_is_not_served(reason, monkeypatch):
    monkeypatch.setattr(_cuda, "extension", Extension())
    monkeypatch.setattr(_cuda, "_hopper_device_reason", lambda index: None)
    found = _cuda.linear_reason(*REASONS[reason]())
    assert found is None if reason is None else reason in found
    expanded = tensor(128)._replace(strides=(0, 1152, 128, 1))
    assert "v is expanded" in _cuda.linear_reason(*call(expanded))


def checked(length, causal=False):
    metas = [x._replace(shape=torch.Size((2, 4, length, x.shape[3]))) for x in (*[tensor()] * 4, tensor(128))]
    return operator._checked.__wrapped__(metas, 2, True, causal, False)[0]


def test_where_pairs_are_cheaper_it_serves_nothing(monkeypatch):
    monkeypatch.setattr(_cuda, "linear_reason", lambda *arguments: None)
    pretend_measured(monkeypatch)
    assert "2048 queries and 2048 keys are few enough to go pair by pair" in checked(2048).cuda
    assert checked(2049).cuda is None


def test_auto_asks_first_what_was_measured_faster(monkeypatch):
    first, second = ("cuda", "triton"), ("triton", "cuda")
    monkeypatch.setattr(_cuda, "linear_reason", lambda *arguments: None)
    pretend_measured(monkeypatch, ({"causal": False, "factors": 2, "value_width": 128}, (1.0, 2.0), (3.0, 2.0)))
    assert checked(4096).orders == (first, second) and checked(4096, causal=True).orders == (second, second)


# -------------------------------------------------------------------------------------------------------- the kernels

each_sample = pytest.mark.parametrize("name", SAMPLES)


def upstream(sample):
    o = flat(**sample.tensors, **sample.options, backend="triton")
    return like(o)


@gpu
@each_sample
def test_against_the_oracle(name):
    sample = cuda_sample(**SAMPLES[name])
    o, gradients = run_cuda(sample)
    check(sample, like(o), o, gradients)
    for repeat in range(20):
        assert_same((o, gradients), run_cuda(sample), f"at repeat {repeat}")


@gpu
@each_sample
def test_saves_what_triton_saves(name):
    sample = cuda_sample(**SAMPLES[name])
    ours, tritons = (torch.ops.nearfar.hadamard_attention(*op_arguments(sample, backend)) for backend in ("cuda", "triton"))
    for a, b in zip(ours, tritons, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


@gpu
@pytest.mark.parametrize("backends", [("cuda", "triton"), ("triton", "cuda")], ids="-".join)
def test_either_backward_takes_what_either_forward_saves(backends):
    sample = cuda_sample(width=128, length=2100)
    tensors = leaves(sample)
    *arguments, _, _ = op_arguments(Sample(tensors, sample.options))
    o, *_ = torch.ops.nearfar.hadamard_attention(*arguments, *backends)
    do = like(o)
    gradients = torch.autograd.grad(o, list(tensors.values()), do)
    check(sample, do, o.detach(), dict(zip(tensors, gradients, strict=True)))


@gpu
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous" and "expanded" not in name])
def test_layouts(layout):
    sample = cuda_sample()
    strided = {name: LAYOUTS[layout](x) for name, x in sample.tensors.items()}
    dense = {name: x.contiguous() for name, x in strided.items()}
    assert_same(*(run_cuda(Sample(x, sample.options)) for x in (strided, dense)))


@gpu
@pytest.mark.parametrize("layout", GRADIENTS)
def test_upstream_gradients_of_any_layout(layout):
    sample = cuda_sample()
    do = GRADIENTS[layout](upstream(sample))
    assert_same(*(run_cuda(sample, x) for x in (do, do.contiguous())))


@gpu
def test_starts_that_are_not_aligned():
    sample = cuda_sample()
    shifted = {name: MISALIGNED["off by eight bytes"](x) for name, x in sample.tensors.items()}
    assert next(iter(shifted.values())).data_ptr() % 16
    assert_same(run_cuda(sample), run_cuda(Sample(shifted, sample.options)))


@gpu
def test_in_a_graph_on_another_stream_and_through_the_dispatcher():
    op, sample = torch.ops.nearfar.hadamard_attention, cuda_sample(heads=(4, 2))
    assert_same_by_other_ways(flat, op, sample, lambda s: op_arguments(s, "cuda"))


@gpu
def test_explain():
    factors = [cuda_sample(width=128, length=4096).tensors[name] for name in ("q1", "q2", "k1", "k2", "v")]
    text = nf.explain(nf.hadamard_attention, factors[:2], factors[2:4], factors[4])
    assert ("cuda       can serve this call" in text) == (torch.cuda.get_device_capability() == (9, 0))
