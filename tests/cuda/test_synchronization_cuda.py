"""Synchronization attention in CUDA C++: what it serves, and the promises of Triton's kernels in test_synchronization.py."""

import math

import pytest
import torch
from harness import (
    DEVICE,
    GRADIENTS,
    LAYOUTS,
    Sample,
    assert_same,
    assert_same_by_other_ways,
    gpu,
    like,
    pretend_measured,
    tensor,
)
from samples.cuda.synchronization import SAMPLES, cuda_sample, run_cuda
from samples.synchronization import check, op_arguments

import nearfar as nf
from nearfar import _cuda
from nearfar.ops import synchronization as operator
from nearfar.runtime import choices, dispatch

# ---------------------------------------------------------------------------------------------------- what it serves

REASONS = {
    None: dict(),
    "neither omega_k nor top_k": dict(separate=True),
    "omega_k nor top_k": dict(top_k=3),
    "omega has dtype torch.float32": dict(omega=tensor(dtype=torch.float32)),
    "omega, v are 64, 128 wide": dict(v=tensor(128)),
    "omega and v are 128 wide; the CUDA kernels take 64": dict(omega=tensor(128), v=tensor(128)),
    "rows of v do not start": dict(v=tensor(row=68)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_call_is_not_served(reason, monkeypatch):
    monkeypatch.setattr(_cuda, "extension", object())
    monkeypatch.setattr(_cuda, "_hopper_device_reason", lambda index: None)
    given = dict(omega=tensor(), v=tensor(), separate=False, top_k=None) | REASONS[reason]
    found = _cuda.synchronization_reason(**given)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("hopper", [True, False])
def test_auto_asks_first_what_was_measured_faster(hopper, monkeypatch):
    monkeypatch.setattr(_cuda, "synchronization_reason", lambda *arguments: None)
    rows = (({"value_width": 64}, (1.0, 2.0), (1.0, 2.0)), ({"value_width": 32}, (2.0, 1.0), (1.0, 2.0)))
    pretend_measured(monkeypatch, *rows, capability=9 if hopper else 8)
    for width, firsts in ((64, ("cuda", "cuda")), (32, ("triton", "cuda")), (128, ("triton", "triton"))):
        w = tensor(width)
        backends = operator._checked.__wrapped__((w, w), None, True)
        found = tuple(order[0] for order in backends.orders)
        assert backends.cuda is None and found == (firsts if hopper else ("triton", "triton"))


def test_gradients_of_orders_by_token_are_tritons(monkeypatch):
    monkeypatch.setattr(choices, "orders", lambda *arguments, **key: (dispatch.CUDA_FIRST,) * 2)
    sample = cuda_sample(length=9, device="cpu")
    for rows, first in (((1, 2), "cuda"), ((1, 2, 9), "triton")):
        orders = operator.prepare(**sample.tensors | {"order": torch.full(rows, 0.5)}).backends.orders
        assert [order[0] for order in orders] == ["cuda", first]


# -------------------------------------------------------------------------------------------------------- the kernels

each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
each_sample = pytest.mark.parametrize("name", SAMPLES)


@gpu
@each_half
@each_sample
def test_against_the_oracle(name, dtype):
    sample = cuda_sample(dtype, **SAMPLES[name])
    do = like(sample.tensors["v"])
    o, gradients = run_cuda(sample, do)
    check(sample, do, o, gradients)
    for repeat in range(20):
        assert_same((o, gradients), run_cuda(sample, do), f"at repeat {repeat}")


@gpu
@each_sample
def test_saves_what_triton_saves(name):
    arguments = op_arguments(cuda_sample(**SAMPLES[name]))
    ours, tritons = (torch.ops.nearfar.synchronization_attention(*arguments, x, x) for x in ("cuda", "triton"))
    for a, b in zip(ours, tritons, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
    torch.testing.assert_close(ours[1], tritons[1], rtol=1e-4, atol=1e-4)


@gpu
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous" and "expanded" not in name])
def test_layouts(layout):
    sample = cuda_sample()
    strided = {name: LAYOUTS[layout](x) if x.dim() == 4 else x for name, x in sample.tensors.items()}
    dense = {name: x.contiguous() for name, x in strided.items()}
    assert_same(*(run_cuda(Sample(x, sample.options)) for x in (strided, dense)))


@gpu
@pytest.mark.parametrize("layout", GRADIENTS)
def test_upstream_gradients_of_any_layout(layout):
    sample = cuda_sample()
    do = GRADIENTS[layout](like(sample.tensors["v"]))
    assert_same(*(run_cuda(sample, x) for x in (do, do.contiguous())))


@gpu
def test_starts_that_are_not_aligned():
    sample = cuda_sample()
    shifted = {
        n: torch.cat((x.new_zeros(4), x.flatten()))[4:].view(x.shape) if x.dim() == 4 else x for n, x in sample.tensors.items()
    }
    assert_same(run_cuda(sample), run_cuda(Sample(shifted, sample.options)))


@gpu
def test_later_tokens_change_no_bit():
    sample = cuda_sample(length=900, causal=True, by_token=True)
    o, _ = run_cuda(sample)
    late = torch.arange(900, device=DEVICE)[:, None] >= 500
    moved = {n: torch.where(late, 30 * sample.tensors[n] + 1, sample.tensors[n]) for n in ("omega", "v")}
    other, _ = run_cuda(Sample({**sample.tensors, **moved}, sample.options))
    assert torch.equal(o[:, :, :500], other[:, :, :500])


@gpu
@pytest.mark.parametrize(("name", "value"), [("omega", math.nan), ("omega", math.inf), ("v", math.nan), ("order", math.nan)])
def test_broken_inputs_reach_the_outputs_of_their_head_alone(name, value):
    sample = cuda_sample(length=200)
    sample.tensors[name][(0, 1, 141, 5)[: sample.tensors[name].dim()]] = value
    o, gradients = run_cuda(sample)
    assert o[:, 1].isnan().any(-1).all() and o[:, 0].isfinite().all()
    assert gradients["omega"][:, 1].isnan().any() and gradients["omega"][:, 0].isfinite().all()


@gpu
def test_in_a_graph_on_another_stream_and_through_the_dispatcher():
    op, sample = torch.ops.nearfar.synchronization_attention, cuda_sample(length=600)
    assert_same_by_other_ways(nf.synchronization_attention, op, sample, lambda s: (*op_arguments(s), "cuda", "cuda"))


@gpu
def test_explain():
    text = nf.explain(nf.synchronization_attention, **cuda_sample().tensors)
    assert ("cuda       can serve this call" in text) == (torch.cuda.get_device_capability() == (9, 0))
    assert "served by triton" in nf.explain(nf.synchronization_attention, **cuda_sample().tensors, top_k=3)
