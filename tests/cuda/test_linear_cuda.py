"""Linear and Hadamard attention in CUDA C++: what it serves, and the promises of Triton's kernels (test_linear.py)."""

from functools import partial

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
    needs_extension,
    pretend_measured,
    randn,
    run,
    tensor,
)
from samples.cuda.linear import FULL, ONE_FACTOR, SAMPLES, TWO_FACTORS, attention, cuda_sample
from samples.linear import check, op_arguments

import nearfar as nf
from nearfar import _cuda
from nearfar.kernels import linear_states
from nearfar.ops import linear as operator

# ---------------------------------------------------------------------------------------------------- what it serves


class Extension:
    """Stands for nearfar._C where it was not built."""

    def __init__(self, *architectures):
        self.architectures = lambda: list(architectures)
        self.devices = lambda: [{"shared_memory_per_block_optin": 163 * 1024}]
        self.linear_shared_bytes = lambda width, causal: width * (2048 if causal else 512)
        self.hadamard_shared_bytes = lambda: 170 * 1024


REASONS = {
    None: lambda: ([tensor()], [tensor()], tensor(), True),
    "v is on cpu": lambda: ([tensor(device="cpu")], [tensor(device="cpu")], tensor(device="cpu"), True),
    "float16, whose range is too small": lambda: ([tensor()], [tensor()], tensor(dtype=torch.float16), True),
    "float32; the CUDA kernels take bfloat16": lambda: ([tensor()], [tensor()], tensor(dtype=torch.float32), True),
    "the factors are (16, 16) and v is 64 wide; without": lambda: ([tensor(16)] * 2, [tensor(16)] * 2, tensor(), False),
    "the factors are (64, 64) and v is 64 wide": lambda: ([tensor()] * 2, [tensor()] * 2, tensor(), True),
    "the factors are (16, 16, 16)": lambda: ([tensor(16)] * 3, [tensor(16)] * 3, tensor(), True),
    "32 and 32 wide": lambda: ([tensor(32)], [tensor(32)], tensor(32), True),
    "64 and 128 wide": lambda: ([tensor()], [tensor()], tensor(128), True),
    "rows of k do not start": lambda: ([tensor()], [tensor(row=68)], tensor(), True),
    "rows of q do not start": lambda: ([tensor(16), tensor(16, row=20)], [tensor(16)] * 2, tensor(), True),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_call_is_not_served(reason, monkeypatch):
    monkeypatch.setattr(_cuda, "extension", Extension("90a"))
    monkeypatch.setattr(_cuda, "_linear_device_reason", lambda *arguments: None)
    found = _cuda.linear_reason(*REASONS[reason]())
    assert found is None if reason is None else reason in found
    assert _cuda.linear_reason([tensor(16)] * 2, [tensor(16)] * 2, tensor(), True) is None
    assert _cuda.linear_reason([tensor()], [tensor()], tensor(), False) is None


def test_which_devices_are_served(monkeypatch):
    monkeypatch.setattr(_cuda, "extension", Extension("80", "90a"))
    monkeypatch.setattr(_cuda, "_architecture_reason", _cuda._architecture_reason.__wrapped__)
    reason_on = _cuda._linear_device_reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert reason_on(0, (64,), 64, True) is None and reason_on(0, (128,), 128, False) is None
    assert "128 takes 262144 bytes of shared memory, of which the device has 166912" in reason_on(0, (128,), 128, True)
    assert "64 takes 174080 bytes" in reason_on(0, (16, 16), 64, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 0))
    assert "not for 10.0" in reason_on(0, (64,), 64, True)


def test_auto_asks_first_what_was_measured_faster(monkeypatch):
    first, second = ("cuda", "triton"), ("triton", "cuda")
    monkeypatch.setattr(_cuda, "linear_reason", lambda *arguments: None)
    row = {"causal": True, "factors": 1, "value_width": 64}, (1.0, 2.0), (3.0, 2.0)
    pretend_measured(monkeypatch, row)

    def orders(q, causal=True):
        return operator._checked.__wrapped__((q, q, q), 1, False, causal)[0].orders

    assert orders(tensor()) == (first, second) and orders(tensor(128)) == orders(tensor(), False) == (second, second)
    pretend_measured(monkeypatch, row, capability=8)
    assert orders(tensor()) == (second, second)


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_a_decoding_step_has_no_cuda_kernel(backend, monkeypatch):
    monkeypatch.setattr(_cuda, "linear_reason", lambda *arguments: None)
    q, state = randn(1, 2, 1, 64, dtype=torch.bfloat16, device="cpu"), torch.zeros(1, 2, 64, 65)
    if backend == "auto":
        assert nf.linear_attention_step(q, q, q, state).shape == q.shape
        return
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call: there is no CUDA kernel of a decoding step"):
        nf.linear_attention_step(q, q, q, state, backend=backend)


@needs_extension
def test_shared_memory_fits():
    """A block of 64 wide heads fits an A100, one of 128 wide ones an H100."""
    for width, limit in ((64, 163 * 1024), (128, 227 * 1024)):
        for causal in (True, False):
            assert 4 * 128 * width <= _cuda.extension.linear_shared_bytes(width, causal) <= limit
    assert 2 * 256 * 64 * 2 <= _cuda.extension.hadamard_shared_bytes() <= 227 * 1024


@pytest.mark.parametrize(
    "heads, length, width, blocks", [(32, 16384, 64, 256), (16, 65536, 128, 128), (70, 8192, 128, 350), (2, 777, 64, 56)]
)
def test_pieces_fill_the_gpu(heads, length, width, blocks):
    """In whole rounds of blocks, or nearly so, where sequences are long enough."""
    assert heads * linear_states.full_pieces(heads, length, width) == blocks


# -------------------------------------------------------------------------------------------------------- the kernels


def upstream(sample):
    first, v = next(iter(sample.tensors.values())), sample.tensors["v"]
    return randn(*first.shape[:3], v.shape[3], dtype=v.dtype, seed=11)


KINDS = {"causal": dict(), "two factors": dict(width=TWO_FACTORS), "full": dict(causal=False)}
each_kind = pytest.mark.parametrize("kind", KINDS)


@gpu
@pytest.mark.parametrize("name", SAMPLES)
def test_against_the_oracle(name):
    sample = cuda_sample(**SAMPLES[name])
    o, gradients = run(attention(sample), sample, backend="cuda")
    check(sample, like(o), o, gradients)
    for repeat in range(20):
        assert_same((o, gradients), run(attention(sample), sample, backend="cuda"), f"at repeat {repeat}")


@gpu
@pytest.mark.parametrize("name", ONE_FACTOR | FULL)
def test_saves_what_triton_saves(name):
    sample = cuda_sample(**SAMPLES[name])
    ours, tritons = (torch.ops.nearfar.hadamard_attention(*op_arguments(sample, backend)) for backend in ("cuda", "triton"))
    for a, b in zip(ours, tritons, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
    torch.testing.assert_close(ours[2], tritons[2], rtol=2e-2, atol=1e-6)


@gpu
@each_kind
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_layouts(layout, kind):
    sample = cuda_sample(**KINDS[kind], heads=(2, 2), batch=2, length=300)
    strided = {name: LAYOUTS[layout](x) for name, x in sample.tensors.items()}
    dense = {name: x.contiguous() for name, x in strided.items()}
    assert_same(*(run(attention(sample), Sample(x, sample.options), backend="cuda") for x in (strided, dense)))


@gpu
@each_kind
@pytest.mark.parametrize("layout", GRADIENTS)
def test_upstream_gradients_of_any_layout(layout, kind):
    sample = cuda_sample(**KINDS[kind], length=300)
    do = GRADIENTS[layout](upstream(sample))
    assert_same(*(run(attention(sample), sample, x, backend="cuda") for x in (do, do.contiguous())))


@gpu
@pytest.mark.parametrize("kind", ["causal", "two factors"])
def test_later_tokens_change_nothing(kind):
    sample = cuda_sample(**KINDS[kind], length=600)
    call = partial(attention(sample), **sample.options, backend="cuda")
    o = call(**sample.tensors)
    for x in sample.tensors.values():
        x[:, :, 384:] = 100.0
    assert torch.equal(o[:, :, :384], call(**sample.tensors)[:, :, :384])


@gpu
@each_kind
def test_in_a_graph_on_another_stream_and_through_the_dispatcher(kind):
    op, sample = torch.ops.nearfar.hadamard_attention, cuda_sample(**KINDS[kind], length=600)
    assert_same_by_other_ways(attention(sample), op, sample, lambda s: op_arguments(s, "cuda"))


@gpu
@pytest.mark.parametrize("causal", [True, False])
def test_either_backward_follows_either_forward(causal):
    """They save and read the same."""
    sample = cuda_sample(length=600, causal=causal)
    gradients = []
    for forward, backward in (("cuda", "triton"), ("triton", "cuda")):
        tensors = leaves(sample)
        *arguments, _, _ = op_arguments(Sample(tensors, sample.options))
        o, *_ = torch.ops.nearfar.hadamard_attention(*arguments, forward, backward)
        gradients.append((o.detach(), torch.autograd.grad(o, list(tensors.values()), like(o))))
    for o, found in gradients:
        check(sample, like(o), o, dict(zip(sample.tensors, found, strict=True)))
