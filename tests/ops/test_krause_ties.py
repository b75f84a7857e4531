"""Which keys Krause attention keeps where equal scores straddle the cut of a selection, by index or all of them."""

import pytest
import torch
from harness import DEVICE, DTYPES, Sample, generator, like, randn, run
from samples.krause import best, check, kernel_selection, reference_selection, visible
from test_grid import make as make_on_grid
from test_grid import selection as grid_selection

import nearfar as nf

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
G = nf.GridNeighborhood


def with_ties(tensors, high):
    """Small integers for q and k: scores are exact, and most cuts go through ties; with 0 all keys are equal."""
    for seed, name in enumerate("qk"):
        integers = torch.randint(-high, high + 1, tensors[name].shape, generator=generator(seed))
        tensors[name] = integers.to(tensors[name])
    tensors["sigma"] = torch.full_like(tensors["sigma"], 4)


def make(dtype, locality, top_k, length=40, **options):
    tensors = {
        name: randn(1, heads, length, 16, dtype=dtype, seed=seed)
        for seed, (name, heads) in enumerate({"q": 2, "k": 1, "v": 1}.items())
    }
    sample = Sample({**tensors, "sigma": torch.ones(2, device=DEVICE)}, dict(locality=locality, top_k=top_k, **options))
    with_ties(sample.tensors, 1)
    return sample


PACKED = torch.tensor([0, 13, 13, 40], dtype=torch.int32, device=DEVICE)
WINDOWS = {
    "window": dict(locality=nf.SlidingWindow(19, 4), top_k=5),
    "every key": dict(locality=None, top_k=3),
    "packed": dict(locality=nf.SlidingWindow(30), top_k=4, cu_seqlens=PACKED),
    "more than there are": dict(locality=nf.SlidingWindow(3), top_k=9),
}


@each_dtype
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "window" else pytest.mark.full) for n in WINDOWS])
def test_keep_keeps_all_that_score_as_the_last(name, dtype):
    sample = make(dtype, ties="keep", **WINDOWS[name])
    expected, top_k = best(sample), sample.options["top_k"]
    assert torch.equal(kernel_selection(sample), expected)
    assert torch.equal(reference_selection(sample), expected)
    assert (expected.sum(-1) > top_k).any() or name == "more than there are"
    o, gradients = run(nf.krause_attention, sample)
    # The rule of accuracy for the set at hand; that it is the right one was asserted above.
    check(Sample(sample.tensors, {**sample.options, "top_k": None}), like(o), o, gradients, expected)


@each_dtype
@pytest.mark.parametrize(
    "locality", [G((5, 6), 2, global_tokens=3), pytest.param(G((2, 40), (1, 3)), marks=pytest.mark.full)], ids=str
)
def test_keep_on_grids(locality, dtype):
    sample = make_on_grid(locality, dtype, 5, heads=(1, 1))
    sample.options["ties"] = "keep"
    with_ties(sample.tensors, 1)
    expected = best(sample)
    assert (expected.sum(-1) > 5).any()
    assert torch.equal(grid_selection(sample), expected)
    with_wide = Sample({n: t.float() for n, t in sample.tensors.items()}, sample.options)
    assert torch.equal(grid_selection(with_wide, "reference"), expected)


@pytest.mark.full
def test_equal_keys_are_all_kept():
    sample = make(torch.float32, nf.SlidingWindow(19, 4), 5, ties="keep", length=40)
    sample.tensors["k"].zero_()
    assert torch.equal(kernel_selection(sample), visible(sample).expand(1, 2, -1, -1))


def test_without_top_k_there_is_nothing_to_keep():
    sample = make(torch.float32, nf.SlidingWindow(9), None)
    o, same = (nf.krause_attention(**sample.tensors, **sample.options, ties=t, backend="triton") for t in ("index", "keep"))
    assert torch.equal(o, same)


def test_cuda_says_why_it_does_not_keep_ties():
    sample = make(torch.float16, nf.SlidingWindow(9), 4)
    text = nf.explain(nf.krause_attention, **sample.tensors, **sample.options, ties="keep", backend="reference")
    assert "select by ties=\"index\" only" in text
    with pytest.raises(ValueError, match="select by ties"):
        nf.krause_attention(**sample.tensors, **sample.options, ties="keep", backend="cuda")


@pytest.mark.parametrize("locality", [nf.SlidingWindow(9), G((5, 8), 1)], ids=str)
def test_another_rule_is_refused(locality):
    sample = make(torch.float32, locality, 4)
    with pytest.raises(ValueError, match='ties must be "index" or "keep", got \'all\''):
        nf.krause_attention(**sample.tensors, **sample.options, ties="all")
