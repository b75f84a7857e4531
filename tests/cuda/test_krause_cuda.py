"""Krause attention in CUDA C++: what it serves, and the same promises as of Triton's kernels, which test_krause.py tests."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cuda_kernels import digest
from harness import (
    DEVICE,
    LAYOUTS,
    MISALIGNED,
    Sample,
    assert_same,
    gpu,
    leaves,
    like,
    needs_extension,
    pretend_measured,
    randn,
    run,
    tensor,
)
from samples.cuda.krause import CAUSAL, SAMPLES, cuda_sample
from samples.krause import best, check, decode, keys_like, op_arguments, visible

import nearfar as nf
from nearfar import _cuda
from nearfar.ops import krause as operator

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


# ---------------------------------------------------------------------------------------------------- what it serves


class Extension:
    """Stands for nearfar._C where it was not built."""

    KRAUSE_WINDOW = 128

    def __init__(self, *architectures):
        self.architectures = lambda: list(architectures)
        self.devices = lambda: [{"shared_memory_per_block_optin": 99 * 1024}]
        self.krause_forward_shared_bytes = lambda width, window: width * 1024
        self.krause_backward_shared_bytes = lambda width: width * 1000


def test_auto_asks_first_what_was_measured_faster(monkeypatch):
    monkeypatch.setattr(_cuda, "krause_reason", lambda *arguments: None)
    row = {"head_dim": 64, "selection_words": 4, "selects": False}, (1.0, 2.0), (3.0, 2.0)
    pretend_measured(monkeypatch, row)

    def orders(q, window=128, top_k=None):
        return operator._checked.__wrapped__((q, q, q), nf.SlidingWindow(window - 1), top_k)[2].orders

    first, second = ("cuda", "triton"), ("triton", "cuda")
    assert orders(tensor()) == (first, second)
    for unlisted in ((tensor(), 64, None), (tensor(), 128, 5), (tensor(32), 128, None)):
        assert orders(*unlisted) == (second, second)
    pretend_measured(monkeypatch, row, capability=8)
    assert orders(tensor()) == (second, second)


REASONS = {
    None: lambda: (tensor(), tensor(), tensor(), 127, 0),
    "q is on cpu": lambda: (*[tensor(device="cpu")] * 3, 127, 0),
    "float32": lambda: (*[tensor(dtype=torch.float32)] * 3, 127, 0),
    "48 and 48 wide": lambda: (*[tensor(48)] * 3, 127, 0),
    "64 and 32 wide": lambda: (tensor(), tensor(), tensor(32), 127, 0),
    "windows of up to 128 keys": lambda: (tensor(), tensor(), tensor(), 100, 28),
    "windows of up to 128 keys, ": lambda: (tensor(), tensor(), tensor(), -1, 0),
    "rows of v do not start": lambda: (tensor(), tensor(), tensor(row=68), 127, 0),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_call_is_not_served(reason, monkeypatch):
    monkeypatch.setattr(_cuda, "extension", Extension("90a"))
    monkeypatch.setattr(_cuda, "_device_reason", lambda *arguments: None)
    found = _cuda.krause_reason(*REASONS[reason]())
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "built, capability, served",
    [("90a", (9, 0), True), ("90a", (10, 0), False), ("80", (8, 6), True), ("86", (8, 0), False), ("80", (9, 0), False)],
)
def test_which_devices_are_served(built, capability, served, monkeypatch):
    monkeypatch.setattr(_cuda, "extension", Extension(built))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(_cuda, "_architecture_reason", _cuda._architecture_reason.__wrapped__)
    reason = _cuda._device_reason(0, 64, 128)
    assert (reason is None) == served and (served or f"{capability[0]}.{capability[1]}" in reason)
    if served:
        assert "128 takes 131072 bytes of shared memory" in _cuda._device_reason(0, 128, 128)


def test_without_an_extension_the_reason_is_why(monkeypatch):
    monkeypatch.setattr(_cuda, "extension", None)
    monkeypatch.setattr(_cuda, "unavailable_reason", "it was left out")
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call: it was left out"):
        nf.krause_attention(*[randn(1, 1, 4, 32, dtype=torch.float16)] * 3, 2.0, nf.SlidingWindow(3), backend="cuda")


@needs_extension
def test_shared_memory_fits():
    """32 wide heads fit every device since 8.0; a multiprocessor of an H100 holds three blocks of 64, two of 128 wide ones."""
    assert _cuda.extension.KRAUSE_WINDOW == 128
    for width, limit in ((32, 99 * 1024), (64, 228 * 1024 // 3 - 1024), (128, 228 * 1024 // 2 - 1024)):
        for window in (1, 64, 65, 128):
            assert 2 * 128 * width * 2 < _cuda.extension.krause_forward_shared_bytes(width, window) <= limit


# ----------------------------------------------------------------------------------------------------------- forward


def krause(sample, backend="cuda"):
    return nf.krause_attention(**sample.tensors, **sample.options, backend=backend)


def saved(sample):
    """(o, lse, bits) of the registered operator."""
    return torch.ops.nearfar.krause_attention(*op_arguments(sample), "cuda")


def selection(sample):
    mask = visible(sample)
    return decode(saved(sample)[2], mask.shape[1]) & mask


@gpu
@each_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_against_the_oracle(name, dtype):
    sample = cuda_sample(dtype, **SAMPLES[name])
    o, gradients = run(nf.krause_attention, sample, backend="cuda")
    selected = best(sample) if sample.options.get("top_k") is None else selection(sample)
    check(sample, like(o), o, gradients, selected)


@gpu
@each_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_the_same_bits_every_time(name, dtype):
    sample = cuda_sample(dtype, **SAMPLES[name])
    first = run(nf.krause_attention, sample, backend="cuda")
    for repeat in range(100):
        assert_same(first, run(nf.krause_attention, sample, backend="cuda"), f"at repeat {repeat}")


def test_a_digest_knows_every_bit():
    """Of numbers, too, and of what is not contiguous."""
    tensors = [torch.tensor(1.0), torch.arange(6.0).view(2, 3).mT, torch.tensor([1, 2], dtype=torch.bfloat16)]
    changed = [[x + 1 if x is other else x for x in tensors] for other in tensors]
    assert len({digest(some) for some in (tensors, *changed)}) == 4 and digest(tensors) == digest(iter(tensors))


@gpu
def test_fifty_processes_give_the_same_bits(tmp_path):
    """Of every CUDA kernel. The first one fills a cache of their own: where several do at one time, a launcher may be taken for
    another (docs/notes/krause.md)."""
    command = [sys.executable, Path(__file__).with_name("cuda_kernels.py")]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}

    def fresh(_):
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(min(16, os.cpu_count())) as pool:
        runs = [fresh(0), *pool.map(fresh, range(49))]
    assert not [(done.returncode, done.stderr) for done in runs if done.returncode]
    assert len({done.stdout for done in runs}) == 1 and runs[0].stdout


@gpu
@each_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_saves_what_triton_saves(name, dtype):
    sample = cuda_sample(dtype, **SAMPLES[name])
    ours, tritons = saved(sample), torch.ops.nearfar.krause_attention(*op_arguments(sample))
    for a, b in zip(ours, tritons, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
    torch.testing.assert_close(ours[1], tritons[1], rtol=1e-6, atol=1e-5)


@gpu
@pytest.mark.parametrize("layout", ["expanded", "shifted", "transposed"])
def test_upstream_gradients_of_any_layout(layout):
    sample = cuda_sample(torch.float16, locality=CAUSAL, top_k=96)
    tensors = [x.requires_grad_() for x in sample.tensors.values()]
    o = krause(sample)
    do = randn(*o.shape, dtype=o.dtype, seed=9)
    if layout == "expanded":
        do = do[:, :, :1].expand(o.shape)
    elif layout == "shifted":
        do = torch.nn.functional.pad(do, (4, 0))[..., 4:]
    else:
        do = do.mT.contiguous().mT
    expected = torch.autograd.grad(o, tensors, do.contiguous(), retain_graph=True)
    for name, got, gradient in zip(sample.tensors, torch.autograd.grad(o, tensors, do), expected, strict=True):
        assert torch.equal(got, gradient), name


@gpu
@each_dtype
@pytest.mark.parametrize("top_k", [1, 50, 127])
@pytest.mark.parametrize("kind", ["equal", "outliers", "close", "signs", "integers"])
def test_selection_is_exact(kind, top_k, dtype):
    """Scores that float32 holds exactly, most of them many times over, so that no rounding excuses another set."""
    sample = cuda_sample(dtype, locality=CAUSAL, top_k=top_k)
    high = 0 if kind == "close" else 3
    sample.tensors["q"].copy_((sample.tensors["q"] * high).round().clamp(-high, high))
    exact = keys_like("integers", sample.tensors["k"]) if kind in ("equal", "outliers") else sample.tensors["k"]
    sample.tensors["k"].copy_(keys_like(kind, exact))
    assert torch.equal(selection(sample), best(sample))


@gpu
@each_dtype
@pytest.mark.parametrize("exponent", [-8, 8])
def test_tiny_and_huge_bandwidths_select_alike(exponent, dtype):
    sample = cuda_sample(dtype, locality=CAUSAL, top_k=50)
    expected = selection(sample)
    sample.tensors["sigma"].mul_(2.0**exponent)
    assert torch.equal(selection(sample), expected)
    assert torch.isfinite(krause(sample)).all()


@gpu
def test_huge_scores():
    """Squares near 1e25 beside those near 64: the count is right, and the weights stay finite."""
    sample = cuda_sample(torch.bfloat16, locality=CAUSAL, top_k=50)
    sample.tensors["k"][:, :, ::37] *= 1e12
    assert torch.equal(selection(sample).sum(-1), best(sample).sum(-1))
    assert torch.isfinite(krause(sample)).all()


@gpu
@pytest.mark.parametrize("top_k", [None, 5])
def test_not_a_number_reaches_its_rows_only(top_k):
    sample = cuda_sample(torch.float16, length=200, locality=nf.SlidingWindow(20), top_k=top_k)
    good = krause(sample)
    for name, rows in (("q", [70]), ("k", range(70, 91))):
        bad = Sample({**sample.tensors, name: sample.tensors[name].clone()}, sample.options)
        bad.tensors[name][:, :, 70, 3] = math.nan
        hit = torch.zeros(200, dtype=torch.bool, device=DEVICE)
        hit[list(rows)] = True
        o = krause(bad)
        assert torch.isnan(o[:, :, hit]).all(-1).all()
        assert torch.equal(o[:, :, ~hit], good[:, :, ~hit])


@gpu
@pytest.mark.parametrize("top_k", [None, 5])
def test_sigma_that_is_not_positive_poisons_its_head(top_k):
    sample = cuda_sample(torch.float16, locality=CAUSAL, top_k=top_k)
    good = krause(sample)
    for value in (0.0, -1.0, math.nan):
        sample.tensors["sigma"][0] = value
        o = krause(sample)
        assert torch.isnan(o[:, 0]).all() and torch.equal(o[:, 1], good[:, 1])


@gpu
@pytest.mark.parametrize("top_k", [None, 5])
def test_queries_without_keys_give_zeros(top_k):
    sample = cuda_sample(torch.float16, length=100, keys=30, locality=nf.SlidingWindow(9), top_k=top_k)
    o, lse, _ = saved(sample)
    assert not o[:, :, :70].any() and not lse[:, :, :70].any()
    assert o[:, :, 70:].any(-1).all()


@gpu
@pytest.mark.parametrize("layout", [name for name in (*LAYOUTS, *MISALIGNED) if name != "contiguous"])
def test_layouts(layout):
    sample = cuda_sample(torch.float16, heads=(2, 2), batch=2, locality=nf.SlidingWindow(100), top_k=30)
    change = {**LAYOUTS, **MISALIGNED}[layout]
    strided = {name: x if name == "sigma" else change(x) for name, x in sample.tensors.items()}
    dense = {name: x.contiguous() for name, x in strided.items()}
    results = [run(nf.krause_attention, Sample(tensors, sample.options), backend="cuda") for tensors in (strided, dense)]
    assert_same(*results)


@gpu
@pytest.mark.parametrize("top_k", [None, 96])
def test_in_a_graph_on_another_stream_and_through_the_dispatcher(top_k):
    sample = cuda_sample(torch.bfloat16, locality=CAUSAL, top_k=top_k)
    expected = run(nf.krause_attention, sample, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capture fails if the launch goes to any other stream
        o = krause(sample)
    o.fill_(math.nan)
    graph.replay()
    assert torch.equal(o, expected[0])
    torch.library.opcheck(
        torch.ops.nearfar.krause_attention.default, (*op_arguments(Sample(leaves(sample), sample.options)), "cuda", "cuda")
    )
    compiled = torch.compile(nf.krause_attention, backend="aot_eager", fullgraph=True)
    assert_same(expected, run(compiled, sample, backend="cuda"))


@gpu
@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="measured on Hopper only")
@pytest.mark.parametrize(
    "width, words", [(64, "served by cuda (backend='auto'"), (128, "served by cuda, its gradients by triton")]
)
def test_auto_takes_what_was_measured_faster(width, words):
    """The backward may be another backend's than the forward: they save and read the same."""
    sample = cuda_sample(torch.bfloat16, width=width, locality=CAUSAL, top_k=96)
    assert words in nf.explain(nf.krause_attention, *sample.tensors.values(), CAUSAL, top_k=96)
    auto, cuda = run(nf.krause_attention, sample, backend="auto"), run(nf.krause_attention, sample, backend="cuda")
    assert torch.equal(auto[0], cuda[0])
    for name, gradient in auto[1].items():
        scale = cuda[1][name].float().abs().max()
        assert (gradient.float() - cuda[1][name].float()).abs().max() <= 2.0**-6 * scale, name
