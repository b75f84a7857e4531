"""Softmax and affine attention in CUDA C++: what it serves, and the promises of Triton's in test_affine.py."""

import pytest
import torch
from harness import (
    GRADIENTS,
    LAYOUTS,
    Sample,
    assert_same,
    assert_same_by_other_ways,
    gpu,
    leaves,
    like,
    pretend_measured,
    randn,
    run,
    tensor,
)
from samples.affine import attention, check, op_arguments
from samples.cuda.affine import SAMPLES, cuda_sample, run_cuda

import nearfar as nf
from nearfar import _cuda
from nearfar.ops import affine as operator

# ---------------------------------------------------------------------------------------------------- what it serves

REASONS = {
    None: dict(),
    "no window with a limit on the left": dict(left=5),
    "no packed sequences": dict(packed=True),
    "q has dtype torch.float32": dict(q=tensor(dtype=torch.float32)),
    "q, k, v are 64, 64, 128 wide": dict(v=tensor(128)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_call_is_not_served(reason, monkeypatch):
    monkeypatch.setattr(_cuda, "extension", object())
    monkeypatch.setattr(_cuda, "_hopper_device_reason", lambda index: None)
    given = dict(q=tensor(), k=tensor(), v=tensor(), left=-1, packed=False) | REASONS[reason]
    found = _cuda.affine_reason(**given)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("hopper", [True, False])
def test_auto_asks_first_what_was_measured_faster(hopper, monkeypatch):
    monkeypatch.setattr(_cuda, "affine_reason", lambda *arguments: None)
    cuda, triton = (1.0, 2.0), (2.0, 1.0)
    rows = [
        ({"head_dim": 64, "keys": [9, None]}, cuda, cuda), ({"head_dim": 128, "keys": [10, None]}, cuda, cuda),
        ({"head_dim": 32, "keys": [8, 8]}, cuda, cuda), ({"head_dim": 32, "keys": [9, 9]}, triton, cuda),
    ]
    pretend_measured(monkeypatch, *rows, capability=9 if hopper else 8)
    for width, firsts in ((64, ("cuda", "cuda")), (128, ("triton", "triton")), (32, ("triton", "cuda"))):
        q = tensor(width)  # of 9 tokens
        _, backends = operator._checked.__wrapped__((q, q, q), -1, 1.0, False)
        found = tuple(order[0] for order in backends.orders)
        assert backends.cuda is None and found == (firsts if hopper else ("triton", "triton"))


# -------------------------------------------------------------------------------------------------------- the kernel

each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
each_sample = pytest.mark.parametrize("name", SAMPLES)


@gpu
@each_half
@each_sample
def test_against_the_oracle(name, dtype):
    sample = cuda_sample(dtype, **SAMPLES[name])
    o, gradients = run_cuda(sample)
    check(sample, like(o), o, gradients)
    for repeat in range(20):
        assert_same((o, gradients), run_cuda(sample), f"at repeat {repeat}")


@gpu
@each_sample
def test_saves_what_triton_saves(name):
    sample = cuda_sample(**SAMPLES[name])
    ours, tritons = (torch.ops.nearfar.affine_attention(*op_arguments(sample), backend) for backend in ("cuda", "triton"))
    for a, b in zip(ours, tritons, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
    torch.testing.assert_close(ours[2], tritons[2], rtol=1e-5, atol=1e-5)


@gpu
@pytest.mark.parametrize("backends", [("cuda", "triton"), ("triton", "cuda")], ids="-".join)
def test_either_backward_takes_what_either_forward_saves(backends):
    sample = cuda_sample(causal=True, sink=True)
    tensors = leaves(sample)
    o, *_ = torch.ops.nearfar.affine_attention(*op_arguments(Sample(tensors, sample.options)), *backends)
    do = like(o)
    gradients = torch.autograd.grad(o, list(tensors.values()), do)
    check(sample, do, o.detach(), dict(zip(tensors, gradients, strict=True)))


@gpu
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous" and "expanded" not in name])
def test_layouts(layout):
    sample = cuda_sample(causal=True)
    strided = {name: LAYOUTS[layout](x) if x.dim() == 4 else x for name, x in sample.tensors.items()}
    dense = {name: x.contiguous() for name, x in strided.items()}
    assert_same(*(run_cuda(Sample(x, sample.options)) for x in (strided, dense)))


@gpu
@pytest.mark.parametrize("layout", GRADIENTS)
def test_upstream_gradients_of_any_layout(layout):
    sample = cuda_sample(causal=True)
    do = GRADIENTS[layout](like(sample.tensors["q"]))
    assert_same(*(run_cuda(sample, x) for x in (do, do.contiguous())))


@gpu
def test_starts_that_are_not_aligned():
    sample = cuda_sample(causal=True)
    shifted = {n: torch.cat((x.new_zeros(4), x.flatten()))[4:].view(x.shape) for n, x in sample.tensors.items()}
    assert_same(run_cuda(sample), run_cuda(Sample(shifted, sample.options)))


@gpu
def test_what_a_query_cannot_see_changes_no_bit():
    """Later keys change nothing for it, nor queries without a gradient for earlier keys, whatever they are."""
    sample = cuda_sample(length=900, causal=True)
    do = like(sample.tensors["q"])
    do[:, :, 500:] = 0
    o, gradients = run_cuda(sample, do)
    other = Sample({name: x.clone() for name, x in sample.tensors.items()}, sample.options)
    for name in "qkv":
        other.tensors[name][:, :, 500:] = 1e4 * randn(*other.tensors[name][:, :, 500:].shape, dtype=torch.bfloat16, seed=5)
    changed_o, changed = run_cuda(other, do)
    assert torch.equal(o[:, :, :500], changed_o[:, :, :500])
    for name in sample.tensors:
        assert torch.equal(gradients[name][:, :, :500], changed[name][:, :, :500]), name


@gpu
def test_how_close_it_is_to_torchs_attention():
    sample = cuda_sample(width=128, length=4096, heads=(4, 4), causal=True, affine=False)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in sample.tensors.values()), is_causal=True)
    o = nf.softmax_attention(**sample.tensors, causal=True, backend="cuda")
    torchs = torch.nn.functional.scaled_dot_product_attention(*sample.tensors.values(), is_causal=True)
    assert (o - expected).norm() <= 1.1 * (torchs - expected).norm()


@gpu
def test_more_heads_than_l2_holds():
    """Three of seven heads are side by side."""
    sample = cuda_sample(width=128, length=9000, heads=(7, 7), causal=True)
    do = like(sample.tensors["q"])
    (o, ours), (expected_o, expected) = (run(attention(sample), sample, do, backend=backend) for backend in ("cuda", "triton"))
    for got, want in ((o, expected_o), *((ours[name], expected[name]) for name in ours)):
        assert (got.float() - want.float()).norm() <= 0.01 * want.float().norm()


@gpu
def test_in_a_graph_on_another_stream_and_through_the_dispatcher():
    op, sample = torch.ops.nearfar.affine_attention, cuda_sample(length=600, causal=True, sink=True)
    assert_same_by_other_ways(nf.affine_attention, op, sample, lambda s: (*op_arguments(s), "cuda", "cuda"))


@gpu
def test_explain():
    sample = cuda_sample()
    text = nf.explain(nf.affine_attention, **sample.tensors, causal=True)
    assert ("cuda       can serve this call" in text) == (torch.cuda.get_device_capability() == (9, 0))
    assert "served by triton" in nf.explain(nf.affine_attention, **sample.tensors, window_size=(9, 0))
