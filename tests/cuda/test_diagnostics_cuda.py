"""Statistics and geometry in CUDA C++: what is served, and the promises of Triton's kernels in test_diagnostics.py."""

import math

import pytest
import torch
from harness import DEVICE, LAYOUTS, Sample, gpu, leaves, poison, pretend_measured, randn, run, tensor
from samples import diagnostics as oracle
from samples.cuda.diagnostics import SAMPLES, cuda_sample, everything
from samples.diagnostics import check_constants, check_geometry, geometry, statistics

import nearfar as nf
from nearfar import _cuda
from nearfar.ops import diagnostics as operator

# ---------------------------------------------------------------------------------------------------- what it serves

REASONS = {
    None: dict(),
    "q is on cpu": dict(q=tensor(device="cpu")),
    "float32; the CUDA kernels take float16 and bfloat16": dict(q=tensor(dtype=torch.float32)),
    "q, k, v are 32, 32, 32 wide": dict(q=tensor(32), k=tensor(32), v=tensor(32)),
    "q, k, v are 64, 64, 128 wide": dict(v=tensor(128)),
    "rows of k do not start": dict(k=tensor(row=68)),
    "k is empty, (2, 4, 0, 64)": dict(k=tensor()._replace(shape=torch.Size((2, 4, 0, 64)))),
    "k is expanded": dict(k=tensor()._replace(strides=(0, 0, 64, 1))),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_call_is_not_served(reason, monkeypatch):
    monkeypatch.setattr(_cuda, "extension", object())
    monkeypatch.setattr(_cuda, "_hopper_device_reason", lambda index: None)
    given = dict(q=tensor(), k=tensor(), v=tensor()) | REASONS[reason]
    found = _cuda.hopper_reason(given)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("built", "capability", "runs"), [
    (["80", "90a"], (9, 0), True), (["80", "90"], (9, 0), False), (["80", "90a"], (8, 0), False), (["90a"], (10, 0), False),
])
def test_which_devices_are_served(built, capability, runs, monkeypatch):
    class Extension:
        architectures = staticmethod(lambda: built)

    monkeypatch.setattr(_cuda, "extension", Extension)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = _cuda._hopper_device_reason.__wrapped__(0)
    assert reason is None if runs else "are for compute capability 9.0, architecture 90a" in reason


@pytest.mark.parametrize("hopper", [True, False])
def test_auto_asks_first_what_was_measured_faster(hopper, monkeypatch):
    monkeypatch.setattr(_cuda, "hopper_reason", lambda layouts: None)
    rows = (({"head_dim": 64}, (1.0, 2.0), (1.0, 2.0)), ({"head_dim": 128}, (2.0, 1.0), (2.0, 1.0)))
    pretend_measured(monkeypatch, *rows, capability=9 if hopper else 8)
    for width, first in ((64, "cuda" if hopper else "triton"), (128, "triton")):
        q = tensor(width)
        *reasons, orders = operator._checked.__wrapped__((q, q, q), False, "selection_geometry")
        assert reasons == [None, None] and [order[0] for order in orders] == [first, first]


def test_distances_and_scales_that_are_not_positive_are_not_served():
    q = randn(1, 1, 5, 64, dtype=torch.bfloat16)
    for options, reason in ((dict(sigma=1.0), "score by dot products"), (dict(scale=-1.0), "positive scale, not -1.0")):
        with pytest.raises(ValueError, match="backend='cuda' cannot serve this call") as error:
            nf.attention_statistics(q, q, **options, backend="cuda")
        assert DEVICE == "cpu" or reason in str(error.value)


# -------------------------------------------------------------------------------------------------------- the kernels

each_sample = pytest.mark.parametrize("name", SAMPLES)
each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
EXACT_ROWS = {torch.float16: 0.3, torch.bfloat16: 0.2}  # rounding of s may change the result of the other rows


@gpu
@each_half
@each_sample
def test_statistics_against_the_oracle(name, dtype):
    sample = cuda_sample(dtype, **SAMPLES[name])
    check_constants(sample, statistics(sample, "cuda"))
    qk = Sample({name: x for name, x in sample.tensors.items() if name != "v"}, sample.options)
    do = tuple(randn(*qk.tensors["q"].shape[:3], seed=seed) for seed in (4, 5))

    def lse_and_entropy(q, k, **options):
        return tuple(nf.attention_statistics(q, k, **options)[:2])

    results, gradients = run(lse_and_entropy, qk, do, backend="cuda")
    oracle.check(qk, do, results, gradients)


@gpu
@each_half
@pytest.mark.parametrize("top_n", [1, 4, 5, 8, 9, 30])
@each_sample
def test_geometry_by_brute_force(name, top_n, dtype):
    sample = cuda_sample(dtype, **SAMPLES[name])
    found = geometry(sample, top_n, "cuda")
    check_geometry(sample, top_n, found, EXACT_ROWS[dtype] if sample.tensors["k"].shape[2] > 4 * top_n else 0)
    for ours, tritons in zip(found, geometry(sample, top_n), strict=True):
        assert (ours == tritons).double().mean() > 0.99


@gpu
def test_256_keys():
    sample = cuda_sample(length=700, causal=True, heads=(1, 1))
    for ours, tritons in zip(geometry(sample, 256, "cuda"), geometry(sample, 256), strict=True):
        assert (ours == tritons).double().mean() > 0.99


@gpu
@pytest.mark.parametrize("top_n", [3, 7, 40])
def test_ties_go_to_the_smaller_key(top_n):
    """Whole numbers, whose products are exact: most scores occur several times, across tiles and across the cut."""
    sample = cuda_sample(length=300, keys=700, scale=0.25)
    for name in "qk":
        sample.tensors[name].mul_(0.3).round_()
    check_geometry(sample, top_n, geometry(sample, top_n, "cuda"), 0)
    for ours, tritons in zip(geometry(sample, top_n, "cuda"), geometry(sample, top_n), strict=True):
        assert torch.equal(ours, tritons)
    scores = oracle.dense_scores(sample.options, **{n: t.double() for n, t in sample.tensors.items() if n != "v"})
    first = (scores == scores.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(statistics(sample, "cuda").max_key, first)


@gpu
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous" and "expanded" not in name])
def test_layouts(layout):
    sample = cuda_sample(length=300, heads=(2, 2), causal=True)
    strided = {name: LAYOUTS[layout](x) for name, x in sample.tensors.items()}
    dense = {name: x.contiguous() for name, x in strided.items()}
    for a, b in zip(*(everything(Sample(x, sample.options)) for x in (strided, dense)), strict=True):
        assert torch.equal(a, b)


@gpu
def test_starts_that_are_not_aligned():
    sample = cuda_sample(length=300, causal=True)
    shifted = {name: torch.cat((x.new_zeros(4), x.flatten()))[4:].view(x.shape) for name, x in sample.tensors.items()}
    for a, b in zip(everything(sample), everything(Sample(shifted, sample.options)), strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("locality", [None, nf.SlidingWindow(300, 0)], ids=["causal", "window"])
def test_what_a_query_cannot_see_changes_no_bit(locality):
    sample = cuda_sample(length=900, causal=True, locality=locality)
    other = Sample({name: x.clone() for name, x in sample.tensors.items()}, sample.options)
    for x in other.tensors.values():
        x[:, :, 500:] = math.nan
    fields = (*operator.AttentionStatistics._fields, "precision", "recall", "f_score")
    for name, a, b in zip(fields, everything(sample), everything(other), strict=True):
        settled = (200 if locality else 0) if name == "key_mass" else 500
        assert torch.equal(a[..., :settled], b[..., :settled]), name


@gpu
def test_nan_reaches_its_rows():
    sample = cuda_sample(length=300, causal=True)
    sample.tensors["k"][:, :, 100] = math.nan
    found = statistics(sample, "cuda")
    for name in ("lse", "entropy", "max_weight"):
        assert torch.equal(getattr(found, name).isnan()[0, 0], torch.arange(300, device=DEVICE) >= 100), name


@gpu
def test_every_element_is_written_and_the_same_every_time():
    sample = cuda_sample(length=450, heads=(4, 2), causal=True)
    first = everything(sample, 9)
    with poison():
        poisoned = everything(sample, 9)
    for repeat in range(20):
        for a, b, c in zip(first, poisoned, everything(sample, 9), strict=True):
            assert torch.equal(a, b), "depends on what its memory held"
            assert torch.equal(a, c), f"differs in repeat {repeat}"


@gpu
def test_in_a_graph_on_another_stream_and_through_the_dispatcher():
    sample = cuda_sample(length=600, causal=True)
    expected = everything(sample)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capture fails if a launch goes to any other stream
        found = everything(sample)
    for x in found:
        x.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    q, k, _ = leaves(sample).values()
    torch.library.opcheck(torch.ops.nearfar.attention_statistics.default, (q, k, *4 * [None], -1, 0, 0.125, "cuda"))
    constants = *sample.tensors.values(), None, 4, -1, 0, 0.125, "cuda"
    torch.library.opcheck(torch.ops.nearfar.selection_geometry.default, constants)
    compiled = torch.compile(lambda: everything(sample), backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(), expected, strict=True))


@gpu
def test_auto_and_explain():
    sample = cuda_sample(length=9)
    q, k, v = sample.tensors.values()
    chosen = "cuda" if torch.cuda.get_device_capability() == (9, 0) else "triton"
    assert f"served by {chosen}" in nf.explain(nf.selection_geometry, q, k, v, top_n=2)
    assert f"served by {chosen}" in nf.explain(nf.attention_statistics, q, k)
    assert "served by triton" in nf.explain(nf.attention_statistics, q, k, sigma=1.0)
