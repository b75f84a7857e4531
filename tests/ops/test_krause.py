"""Krause attention: fuzz, selection, isolation, packed and empty sequences, extremes, bad input.

What every operator promises is tested on its samples in test_operators.py; the oracle is in samples/krause.py.
"""

import math

import pytest
import torch
from harness import (
    DEVICE,
    DTYPES,
    Largest,
    Sample,
    assert_same,
    generator,
    leaves,
    like,
    needs_gpu,
    randn,
    run,
)
from samples.krause import (
    best,
    check,
    decode,
    dense,
    kernel_selection,
    op_arguments,
    reference_selection,
    scores,
    visible,
    weights,
)

import nearfar as nf
from nearfar.kernels.krause import MAX_CANDIDATES, selection_words

pytestmark = pytest.mark.full

BACKENDS = ("triton", "reference")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def krause(sample, backend="triton"):
    return nf.krause_attention(**sample.tensors, **sample.options, backend=backend)


# ----------------------------------------------------------------------------------------------------------- selection


def integers(*shape, dtype, seed, high=3):
    """Small integers: products and squares are exact in float32, so selections must match exactly, ties included."""
    return torch.randint(-high, high + 1, shape, generator=generator(seed)).to(DEVICE, dtype)


def exact_sample(dtype, length=70, keys=70, width=16, top_k=5, locality=None, high=3, **options):
    return Sample(
        {
            "q": integers(1, 2, length, width, dtype=dtype, seed=1, high=high),
            "k": integers(1, 1, keys, width, dtype=dtype, seed=2, high=high),
            "v": randn(1, 1, keys, 16, dtype=dtype, seed=3),
            "sigma": torch.tensor([2.0, 4.0], device=DEVICE),
        },
        dict(locality=locality, top_k=top_k, **options),
    )


def selection(sample, backend):
    return kernel_selection(sample) if backend == "triton" else reference_selection(sample)


@each_backend
@each_dtype
@pytest.mark.parametrize("high", [1, 3])
@pytest.mark.parametrize("locality", [None, nf.SlidingWindow(33, 4), nf.SlidingWindow(66)], ids=str)
@pytest.mark.parametrize("top_k", [1, 6, 64])
def test_exact_scores_are_selected_exactly(top_k, locality, high, dtype, backend):
    """With entries of -1, 0 and 1 most cuts go through ties."""
    sample = exact_sample(dtype, top_k=top_k, locality=locality, high=high)
    selected = selection(sample, backend)
    assert torch.equal(selected, best(sample))
    if high == 1 and dtype == DTYPES[0]:
        wrong = best(sample._replace(tensors={n: t.flip(2) if n in "qkv" else t for n, t in sample.tensors.items()}))
        assert not torch.equal(selected, wrong.flip(2, 3)) or top_k == 64  # the cut does go through ties


@each_backend
@each_dtype
def test_of_equal_keys_the_first_are_kept(dtype, backend):
    sample = exact_sample(dtype, length=100, keys=100, top_k=4, locality=nf.SlidingWindow(69, 1))
    sample.tensors["k"].copy_(sample.tensors["k"][:, :, :1].expand(-1, -1, 100, -1))
    i, j = torch.arange(100, device=DEVICE)[:, None], torch.arange(100, device=DEVICE)[None, :]
    first = (i - 69).clamp(min=0)
    expected = (j >= first) & (j < first + 4) & (j <= i + 1)
    assert torch.equal(selection(sample, backend)[0, 0], expected)
    values = sample.tensors["v"][0, 0].double()
    mean = (expected.double() @ values) / expected.sum(1, keepdim=True)
    o = krause(sample, backend)[0, 0].double()
    assert (o - mean).abs().max() <= 2 * torch.finfo(dtype).eps * values.abs().max()


@each_backend
@each_dtype
def test_duplicates_at_the_cut(dtype, backend):
    """Distances 0, 1, 1, 1, 4 in scattered places: top 3 takes the 0 and the first two of the 1s."""
    sample = exact_sample(dtype, length=5, keys=5, top_k=3)
    sample.tensors["q"].zero_()
    sample.tensors["k"].zero_()
    sample.tensors["k"][0, 0, :, 0] = torch.tensor([2.0, 1.0, -1.0, 0.0, 1.0])
    expected = torch.tensor([False, True, True, True, False], device=DEVICE).expand(1, 2, 5, 5)
    assert torch.equal(selection(sample, backend), expected)


@each_backend
@each_dtype
@pytest.mark.parametrize("top_k", [1, 2, 9, 33])
def test_close_scores_are_told_apart(top_k, dtype, backend):
    """Distances that differ by steps of the dtype, whose squares are exact in float32, in a shuffled order."""
    sample = exact_sample(dtype, top_k=top_k, locality=nf.SlidingWindow(40, 10))
    sample.tensors["q"].zero_()
    sample.tensors["k"].zero_()
    step = max(torch.finfo(dtype).eps, 2.0**-11)
    sample.tensors["k"][0, 0, :, 0] = 1 + step * torch.randperm(70, generator=generator(9)).to(DEVICE)
    sample.tensors["k"][0, 0, ::8, 0] = 30  # so that the close ones share a small part of the range of scores
    sample.tensors["sigma"].fill_(16)
    assert torch.equal(selection(sample, backend), best(sample))


def test_words_of_a_saved_selection():
    """Two for every 64 keys, and beyond 256 keys four for every 128."""
    for keys in range(MAX_CANDIDATES + 1):
        step = 64 if keys <= 256 else 128
        expected = math.ceil(keys / step) * step // 32
        assert selection_words(-1, -1, keys) == expected
        assert not keys or selection_words(keys - 1, 0, 5000) == expected


@each_dtype
def test_the_saved_bits_are_the_keys_with_weight(dtype):
    """Two ways to see the selection: the bits, and the outputs with the identity for v."""
    sample = exact_sample(dtype, length=64, keys=64, top_k=9, locality=nf.SlidingWindow(40))
    sample.tensors["sigma"].fill_(8)  # no weight may underflow
    assert torch.equal(kernel_selection(sample), reference_selection(sample, backend="triton"))


@each_dtype
def test_top_k_of_everything_is_no_selection(dtype):
    sample = exact_sample(dtype, top_k=None, locality=nf.SlidingWindow(20, 5))
    o, gradients = run(nf.krause_attention, sample)
    for top_k in (26, 1024, 2**31 - 1):
        everything = Sample(sample.tensors, {**sample.options, "top_k": top_k})
        assert torch.equal(kernel_selection(everything), visible(sample).expand(1, 2, 70, 70))
        o_all, gradients_all = run(nf.krause_attention, everything)
        check(everything, like(o), o_all, gradients_all)


def test_decoding_finds_what_was_encoded():
    keep = torch.rand(3, 70, generator=generator()) < 0.3
    words = torch.zeros(3, 4, dtype=torch.int64)
    for j in range(6, 70):
        words[:, j % 128 // 32] |= keep[:, j].long() << (j % 32)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    assert torch.equal(decode(words, 70)[:, 6:], keep[:, 6:])


# ----------------------------------------------------------------------------------------------------------- rounding


@each_dtype
@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("sigma", [0.5, 5.5])
def test_gradients_do_not_see_the_rounding_of_o(sigma, offset, dtype):
    """delta = dO.o is off by it. At the smaller sigma attention is concentrated: dq is small, and keys lie off the origin."""
    base = 0.3 * randn(1, 1, 96, 32, seed=1)
    q, k = ((offset + base + spread * randn(1, 1, 96, 32, seed=2)).to(dtype) for spread in (0, 0.1))
    v, do = (randn(1, 1, 96, 32, dtype=dtype, seed=seed) for seed in (3, 4))
    sample = Sample({"q": q, "k": k, "v": v, "sigma": torch.tensor(sigma, device=DEVICE)}, {"locality": nf.SlidingWindow(31)})
    inputs = [tensor.double().requires_grad_() for tensor in sample.tensors.values()]
    exact = torch.autograd.grad(dense(*inputs, best(sample)), inputs, do.double())
    _, gradients = run(nf.krause_attention, sample, do)
    eps = torch.finfo(dtype).eps
    rounding = 50 * eps if dtype == torch.float32 else eps / 2  # of sums that cancel; of the result
    for name, want in zip("qkv", exact, strict=False):
        error = (gradients[name].double() - want).norm() / want.norm()
        assert error <= rounding, f"{name}: {error / rounding:.2f} of what is allowed"
    # The terms of the last sum cancel, too: its error is measured by their sizes. Off the origin scores have fewer digits.
    q, k, v, sigma = (tensor.detach() for tensor in inputs)
    score = scores(q, k, sigma)
    weight = weights(score, best(sample))
    dp, mean = do.double() @ v.mT, (weight * score).sum(-1, keepdim=True)
    terms = 2 / sigma * (weight * (dp - (weight * dp).sum(-1, keepdim=True)) * (score - mean)).abs().sum()
    error = (gradients["sigma"] - exact[3]).abs() / terms
    assert error <= (2e-5 if offset == 0 else 2e-4), f"sigma: {error:.1e}"


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("offset", [10, 1000])
def test_far_from_the_origin(offset, top_k):
    """float32 distances of tokens that are near each other keep their digits, forward and backward."""
    q, k = (offset + 0.3 * randn(1, 1, 60, 32, seed=seed) for seed in (1, 2))
    v, do = (randn(1, 1, 60, 32, seed=seed) for seed in (3, 4))
    sample = Sample({"q": q, "k": k, "v": v, "sigma": torch.tensor(1.0, device=DEVICE)}, {"top_k": top_k})
    assert torch.equal(kernel_selection(sample), best(sample))
    inputs = [tensor.double().requires_grad_() for tensor in sample.tensors.values()]
    exact = dense(*inputs, best(sample))
    gradients = torch.autograd.grad(exact, inputs, do.double())
    o, got = run(nf.krause_attention, sample, do)
    assert (o - exact).norm() <= 1e-6 * exact.norm()
    for name, want in zip(got, gradients, strict=True):
        # Sums of 60 terms near `offset` round by offset / 0.3 half eps each, the spread of the tokens being 0.3.
        assert (got[name] - want).norm() <= (3e-6 + 6e-7 * offset) * want.norm(), name


# ----------------------------------------------------------------------------------------------------------- isolation

BIG = {torch.float16: 6e4, torch.bfloat16: 1e12, torch.float32: 1e12}


@each_dtype
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("locality", [nf.SlidingWindow(9), nf.SlidingWindow(20, 3), nf.SlidingWindow(-1, 0)], ids=str)
def test_what_a_query_cannot_see_changes_no_bit(locality, top_k, dtype):
    """Promised where products are finite in float32; a NaN may spread through a tile.

    Key 40 changes, then query 40 and its gradient: rows that do not see it keep o and dq, keys that no changed row
    reaches keep dk and dv.
    """
    sample = Sample({n: t for n, t in exact_sample(dtype).tensors.items()}, {"locality": locality, "top_k": top_k})
    sample.tensors["q"] = randn(1, 2, 70, 16, dtype=dtype, seed=4)
    sample.tensors["k"] = randn(1, 1, 70, 16, dtype=dtype, seed=5)
    mask = visible(sample)
    do = randn(1, 2, 70, 16, dtype=dtype, seed=6)
    o, gradients = run(nf.krause_attention, sample, do)

    changed = Sample({n: t.clone() for n, t in sample.tensors.items()}, sample.options)
    changed.tensors["k"][:, :, 40] = BIG[dtype]
    changed.tensors["v"][:, :, 40] = -BIG[dtype]
    o_changed, gradients_changed = run(nf.krause_attention, changed, do)
    rows = ~mask[:, 40]
    keys = ~mask[~rows].any(0)
    assert rows.any() and (keys.any() or locality.left < 0)
    assert torch.equal(o[:, :, rows], o_changed[:, :, rows])
    assert torch.equal(gradients["q"][:, :, rows], gradients_changed["q"][:, :, rows])
    for name in "kv":
        assert torch.equal(gradients[name][:, :, keys], gradients_changed[name][:, :, keys])
    if top_k is None:
        # The values do reach the rows that see them: the test is not vacuous.
        changed.tensors["k"][:, :, 40] = sample.tensors["k"][:, :, 40]
        changed.tensors["v"][:, :, 40] = 100
        o_seen, _ = run(nf.krause_attention, changed, do)
        assert (o_seen[:, :, ~rows] != o[:, :, ~rows]).any(-1).all()

    changed = Sample({n: t.clone() for n, t in sample.tensors.items()}, sample.options)
    changed.tensors["q"][:, :, 40] = 5
    do_changed = do.clone()
    do_changed[:, :, 40] = 1000
    o_changed, gradients_changed = run(nf.krause_attention, changed, do_changed)
    others, keys = torch.arange(70, device=DEVICE) != 40, ~mask[40]
    assert torch.equal(o[:, :, others], o_changed[:, :, others])
    assert torch.equal(gradients["q"][:, :, others], gradients_changed["q"][:, :, others])
    for name in "kv":
        assert torch.equal(gradients[name][:, :, keys], gradients_changed[name][:, :, keys])


@each_dtype
@pytest.mark.parametrize("top_k", [None, 4])
def test_packed_neighbours_change_no_bit(top_k, dtype):
    ends = [0, 21, 21, 47, 70]
    options = {"locality": nf.SlidingWindow(15, 2), "top_k": top_k}
    options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    sample = Sample({n: t for n, t in exact_sample(dtype, high=2).tensors.items()}, options)
    do = randn(1, 2, 70, 16, dtype=dtype, seed=6)
    o, gradients = run(nf.krause_attention, sample, do)
    changed = Sample({n: t.clone() for n, t in sample.tensors.items()}, options)
    do_changed = do.clone()
    do_changed[:, :, 21:47] = 100
    for name, value in (("q", 3.0), ("k", BIG[dtype]), ("v", -BIG[dtype])):
        changed.tensors[name][:, :, 21:47] = value
    o_changed, gradients_changed = run(nf.krause_attention, changed, do_changed)
    others = torch.cat((torch.arange(21), torch.arange(47, 70))).to(DEVICE)
    assert torch.equal(o[:, :, others], o_changed[:, :, others])
    for name in "qkv":
        assert torch.equal(gradients[name][:, :, others], gradients_changed[name][:, :, others]), name


@each_dtype
@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_sequence(value, top_k, dtype):
    """Of packed sequences: the others keep every bit, forward and backward, and who does see it shows it."""
    ends = torch.tensor([0, 21, 47, 70], dtype=torch.int32, device=DEVICE)
    options = {"locality": nf.SlidingWindow(15, 2), "top_k": top_k, "cu_seqlens": ends}
    sample = Sample(exact_sample(dtype, high=2).tensors, options)
    do = randn(1, 2, 70, 16, dtype=dtype, seed=6)
    o, gradients = run(nf.krause_attention, sample, do)
    others = torch.cat((torch.arange(21), torch.arange(47, 70))).to(DEVICE)
    for name in ("q", "k", "v", "do"):
        changed = Sample({n: t.clone() for n, t in sample.tensors.items()}, options)
        do_changed = do.clone()
        {**changed.tensors, "do": do_changed}[name][:, :, 21:47, 3] = value
        o_changed, gradients_changed = run(nf.krause_attention, changed, do_changed)
        assert torch.equal(o[:, :, others], o_changed[:, :, others]), name
        for gradient in "qkv":
            assert torch.equal(gradients[gradient][:, :, others], gradients_changed[gradient][:, :, others]), (name, gradient)
            if math.isnan(value) and (name, gradient) != ("v", "v"):
                assert gradients_changed[gradient][:, :, 21:47].isnan().any(), (name, gradient)
        if math.isnan(value) and name != "do":
            assert o_changed[:, :, 21:47].isnan().any(-1).all(), name


@each_backend
@pytest.mark.parametrize("top_k", [None, 4])
def test_packed_sequences_are_computed_as_if_alone(top_k, backend):
    sample = exact_sample(torch.float32, top_k=top_k, locality=nf.SlidingWindow(15, 2))
    ends = [0, 0, 21, 22, 22, 70, 70]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    o, gradients = run(nf.krause_attention, Sample(sample.tensors, {**sample.options, "cu_seqlens": cu_seqlens}),
                       backend=backend)
    do = like(o)
    for a, b in zip(ends, ends[1:], strict=False):
        alone = Sample({n: t[:, :, a:b] if t.dim() == 4 else t for n, t in sample.tensors.items()}, sample.options)
        o_alone, gradients_alone = run(nf.krause_attention, alone, do[:, :, a:b], backend=backend)
        torch.testing.assert_close(o[:, :, a:b], o_alone, rtol=1e-5, atol=1e-6)
        for name in "qkv":
            torch.testing.assert_close(gradients[name][:, :, a:b], gradients_alone[name], rtol=1e-5, atol=1e-6)


@each_backend
@each_dtype
@pytest.mark.parametrize("top_k", [None, 3])
def test_queries_without_keys_give_zeros_and_get_zero_gradients(top_k, dtype, backend):
    """50 queries of 30 keys are the last positions: the first 20 stand before every key."""
    sample = exact_sample(dtype, length=50, keys=30, top_k=top_k, locality=nf.SlidingWindow(9))
    o, gradients = run(nf.krause_attention, sample, backend=backend)
    assert torch.equal(o[:, :, :20], torch.zeros_like(o[:, :, :20]))
    assert torch.equal(gradients["q"][:, :, :20], torch.zeros_like(gradients["q"][:, :, :20]))
    assert (o[:, :, 20:] != 0).any(-1).all()
    # Their upstream gradients reach nothing either.
    do = like(o)
    do[:, :, :20] = 1000
    assert_same((o, gradients), run(nf.krause_attention, sample, do, backend))


@each_backend
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("batch, length, keys", [(0, 5, 5), (1, 0, 0), (2, 0, 9), (2, 9, 0), (0, 0, 0)])
def test_empty(batch, length, keys, top_k, backend):
    sample = Sample(
        {
            "q": randn(batch, 4, length, 16),
            "k": randn(batch, 2, keys, 16),
            "v": randn(batch, 2, keys, 24),
            "sigma": torch.full((4,), 2.0, device=DEVICE),
        },
        {"top_k": top_k},
    )
    o, gradients = run(nf.krause_attention, sample, backend=backend)
    assert torch.equal(o, torch.zeros(batch, 4, length, 24, device=DEVICE))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, torch.zeros_like(sample.tensors[name])), name


@each_backend
def test_empty_packed_batch(backend):
    sample = exact_sample(torch.float32, length=0, keys=0)
    sample.options["cu_seqlens"] = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    o, gradients = run(nf.krause_attention, sample, backend=backend)
    assert o.shape == (1, 2, 0, 16) and torch.equal(gradients["sigma"], torch.zeros(2, device=DEVICE))


# ------------------------------------------------------------------------------------------------------------ extremes


@each_backend
@each_dtype
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("exponent", [-10, -4, 4, 7])
def test_powers_of_two_scale_without_rounding(exponent, top_k, dtype, backend):
    """q, k, sigma times 2^e: the same output, and gradients but for 2^-e. dO times 2^e keeps them in range for e > 0.

    No term of the formula leaves the range of float16: inputs and results are between 2^-10 and 2^14.
    """
    sample = exact_sample(dtype, top_k=top_k, locality=nf.SlidingWindow(20, 2))
    factor = 2.0**exponent
    lift = max(factor, 1.0)
    scaled = Sample({n: t if n == "v" else t * factor for n, t in sample.tensors.items()}, sample.options)
    do = randn(1, 2, 70, 16, dtype=dtype, seed=6)
    o, gradients = run(nf.krause_attention, sample, do, backend)
    o_scaled, gradients_scaled = run(nf.krause_attention, scaled, do * lift, backend)
    assert torch.equal(o, o_scaled)
    # The smallest weights round in the subnormal range of float16; 23 keys of at most 3 may add up such roundings.
    info = torch.finfo(dtype)
    atol = 23 * 3 * info.smallest_normal * info.eps
    for name, gradient in gradients_scaled.items():
        gradient = gradient.double() / lift * (1 if name == "v" else factor)
        torch.testing.assert_close(
            gradient, gradients[name].double(), rtol=info.eps, atol=atol, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


@each_backend
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("exponent", [-50, 55])
def test_float32_far_from_one(exponent, top_k, backend):
    """Squares near 2^-100 and 2^115: scores are as for exponent 0."""
    sample = exact_sample(torch.float32, top_k=top_k, locality=nf.SlidingWindow(20, 2))
    factor = 2.0**exponent
    scaled = Sample({n: t if n == "v" else t * factor for n, t in sample.tensors.items()}, sample.options)
    do = randn(1, 2, 70, 16, seed=6)
    o, gradients = run(nf.krause_attention, sample, do, backend)
    o_scaled, gradients_scaled = run(nf.krause_attention, scaled, do, backend)
    assert torch.equal(o, o_scaled)
    for name, gradient in gradients_scaled.items():
        gradient = gradient if name == "v" else gradient * factor
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


@each_backend
@each_dtype
@pytest.mark.parametrize("sigma", [2.0**-3, 2.0**10])
def test_sharp_and_flat_kernels(sigma, dtype, backend):
    """Squared distances count 32 times, which leaves the nearest keys alone, or 2^-21 times, which makes a mean."""
    sample = exact_sample(dtype, top_k=None, locality=nf.SlidingWindow(20, 2))
    sample.tensors["sigma"].fill_(sigma)
    o, gradients = run(nf.krause_attention, sample, backend=backend)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    mask = visible(sample)
    if sigma > 1:
        expected = mask.double() @ sample.tensors["v"][0, 0].double() / mask.sum(1, keepdim=True)
        tolerance = 1e-4 + torch.finfo(dtype).eps
    else:
        q, k = sample.tensors["q"].double(), sample.tensors["k"].double()
        distance = (q[:, :, :, None] - k[:, :, None]).square().sum(-1).masked_fill(~mask, float("inf"))
        nearest = (distance == distance.amin(-1, keepdim=True)).double()
        expected = nearest / nearest.sum(-1, keepdim=True) @ sample.tensors["v"].double()
        tolerance = torch.finfo(dtype).eps
    assert (o.double() - expected).abs().max() <= 4 * tolerance


@each_dtype
@pytest.mark.parametrize("top_k", [None, 5])
def test_a_sigma_that_is_not_positive_poisons_its_head_only(top_k, dtype):
    """What the kernels do where reading sigma back would stall the stream; the public function refuses on the CPU."""
    sample = exact_sample(dtype, top_k=top_k, locality=nf.SlidingWindow(20, 2))
    good, _, _ = torch.ops.nearfar.krause_attention(*op_arguments(sample))
    for value in (-2.0, 0.0, float("nan")):
        sigma = torch.tensor([value, 4.0], device=DEVICE)
        bad = Sample({**sample.tensors, "sigma": sigma}, sample.options)
        o, _, _ = torch.ops.nearfar.krause_attention(*op_arguments(bad))
        assert torch.isnan(o[:, 0]).all(), value
        assert torch.equal(o[:, 1], good[:, 1])
        if DEVICE == "cuda":
            public = krause(bad)
            assert torch.isnan(public[:, 0]).all() and torch.equal(public[:, 1], good[:, 1])


@each_backend
def test_sigma_by_number_scalar_and_head(backend):
    sample = exact_sample(torch.float32, top_k=4)
    expected = run(nf.krause_attention, Sample({**sample.tensors, "sigma": torch.full((2,), 2.5, device=DEVICE)},
                                               sample.options), backend=backend)
    for sigma in (torch.tensor(2.5, device=DEVICE), torch.tensor([2.5], device=DEVICE, dtype=torch.float64)):
        o, gradients = run(nf.krause_attention, Sample({**sample.tensors, "sigma": sigma}, sample.options),
                           backend=backend)
        assert torch.equal(o, expected[0])
        assert gradients["sigma"].shape == sigma.shape and gradients["sigma"].dtype == sigma.dtype
        torch.testing.assert_close(gradients["sigma"].sum().float(), expected[1]["sigma"].sum())
    plain = nf.krause_attention(*list(sample.tensors.values())[:3], 2.5, **sample.options, backend=backend)
    assert torch.equal(plain, expected[0])


def test_a_compiled_reference_serves_other_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(nf.krause_attention, backend="aot_eager")
    for ends in ((0, 2, 9), (0, 0, 9, 9), (0, 9, 40)):
        q, cu_seqlens = randn(1, 2, ends[-1], 16, device="cpu"), torch.tensor(ends, dtype=torch.int32)
        call = dict(locality=nf.SlidingWindow(4), top_k=2, cu_seqlens=cu_seqlens)
        expected = nf.krause_attention(q, q, q, 2.0, **call, backend="reference")
        assert torch.equal(compiled(q, q, q, 2.0, **call), expected), ends


@pytest.mark.parametrize("top_k", [None, 8])
def test_reference_memory_grows_with_the_window_only(top_k):
    """No tensor of it is N x N, and what it keeps for the backward grows as N does."""
    kept = {}
    for length in (2048, 4096):
        q, k, v = (randn(1, 2, length, 16, seed=s, device="cpu").requires_grad_() for s in range(3))
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
            return tensor

        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            o = nf.krause_attention(q, k, v, 4.0, nf.SlidingWindow(31), top_k=top_k, backend="reference")
            torch.autograd.grad(o.sum(), (q, k, v))
        chunk = 2 * 128 * (128 + 31)
        assert largest.numel <= max(q.numel(), chunk)
        kept[length] = sum(nbytes for _, nbytes in storages.values())
    assert kept[4096] < 2.1 * kept[2048]
    assert kept[4096] < 4096 * 4096 * 2  # a quarter of one float32 score matrix of both heads


# ----------------------------------------------------------------------------------------------------------- bad input


def bad(backend="triton", **changes):
    call = {"q": randn(1, 4, 6, 16), "k": randn(1, 2, 6, 16), "v": randn(1, 2, 6, 16), "sigma": 2.0, **changes}
    return nf.krause_attention(**call, backend=backend)


def seqlens(*ends, dtype=torch.int32):
    return torch.tensor(ends, dtype=dtype, device=DEVICE)


BAD = {
    "q of rank 3": (ValueError, "^q must have 4", lambda: {"q": randn(4, 6, 16)}),
    "k of rank 5": (ValueError, "^k must have 4", lambda: {"k": randn(1, 1, 2, 6, 16)}),
    "v of rank 3": (ValueError, "^v must have 4", lambda: {"v": randn(2, 6, 16)}),
    "q a list": (TypeError, "^q must be a torch.Tensor", lambda: {"q": [1.0]}),
    "v None": (TypeError, "^v must be a torch.Tensor", lambda: {"v": None}),
    "q of integers": (TypeError, "^q must be float", lambda: {"q": torch.ones(1, 4, 6, 16, dtype=torch.int64)}),
    "k of another dtype": (
        TypeError,
        "^k must have the dtype of q",
        lambda: {"k": randn(1, 2, 6, 16, dtype=torch.float16)},
    ),
    "v of another dtype": (
        TypeError,
        "^v must have the dtype of q",
        lambda: {"v": randn(1, 2, 6, 16, dtype=torch.float64)},
    ),
    "k elsewhere": (ValueError, "^k must be on the device", lambda: {"k": randn(1, 2, 6, 16, device="meta")}),
    "v elsewhere": (ValueError, "^v must be on the device", lambda: {"v": randn(1, 2, 6, 16, device="meta")}),
    "k of another batch": (ValueError, "^k must have the batch", lambda: {"k": randn(2, 2, 6, 16)}),
    "k of another width": (ValueError, "^k must have the width", lambda: {"k": randn(1, 2, 6, 24)}),
    "v of another length": (ValueError, "^v must have the heads and length", lambda: {"v": randn(1, 2, 7, 16)}),
    "v of other heads": (ValueError, "^v must have the heads and length", lambda: {"v": randn(1, 4, 6, 16)}),
    "heads that do not divide": (
        ValueError,
        "^q must have a multiple of the 2 heads",
        lambda: {"q": randn(1, 3, 6, 16)},
    ),
    "no key heads": (
        ValueError,
        "^q must have a multiple of the 0 heads",
        lambda: {"k": randn(1, 0, 6, 16), "v": randn(1, 0, 6, 16)},
    ),
    "sigma zero": (ValueError, "^sigma must be positive", lambda: {"sigma": 0}),
    "sigma negative": (ValueError, "^sigma must be positive", lambda: {"sigma": -1.5}),
    "sigma NaN": (ValueError, "^sigma must be positive", lambda: {"sigma": float("nan")}),
    "sigma of wrong shape": (
        ValueError,
        r"^sigma .*\(4,\), got \(2,\)",
        lambda: {"sigma": torch.ones(2, device=DEVICE)},
    ),
    "sigma of rank 2": (ValueError, "^sigma ", lambda: {"sigma": torch.ones(4, 1, device=DEVICE)}),
    "sigma of integers": (TypeError, "^sigma must be a float", lambda: {"sigma": torch.ones(4, dtype=torch.int32)}),
    "sigma a string": (TypeError, "^sigma must be a float", lambda: {"sigma": "2"}),
    "sigma elsewhere": (ValueError, "^sigma must be on the device", lambda: {"sigma": torch.ones(4, device="meta")}),
    "top_k zero": (ValueError, "^top_k must be at least 1", lambda: {"top_k": 0}),
    "top_k negative": (ValueError, "^top_k must be at least 1", lambda: {"top_k": -3}),
    "top_k a float": (TypeError, "^top_k must be an int", lambda: {"top_k": 2.0}),
    "top_k a bool": (TypeError, "^top_k must be an int", lambda: {"top_k": True}),
    "locality a tuple": (TypeError, "^locality must be", lambda: {"locality": (3, 0)}),
    "cu_seqlens a list": (TypeError, "^cu_seqlens must be an int32", lambda: {"cu_seqlens": [0, 6]}),
    "cu_seqlens int64": (TypeError, "^cu_seqlens must be", lambda: {"cu_seqlens": seqlens(0, 6, dtype=torch.int64)}),
    "cu_seqlens of rank 2": (ValueError, "^cu_seqlens must have shape", lambda: {"cu_seqlens": seqlens(0, 6)[None]}),
    "cu_seqlens of one": (ValueError, "^cu_seqlens must have shape", lambda: {"cu_seqlens": seqlens(0)}),
    "cu_seqlens elsewhere": (ValueError, "^cu_seqlens .*device", lambda: {"cu_seqlens": seqlens(0, 6).to("meta")}),
    "cu_seqlens with a batch": (
        ValueError,
        "^cu_seqlens .*batch of 2",
        lambda: {
            "q": randn(2, 4, 6, 16),
            "k": randn(2, 2, 6, 16),
            "v": randn(2, 2, 6, 16),
            "cu_seqlens": seqlens(0, 6),
        },
    ),
    "cu_seqlens with two lengths": (
        ValueError,
        "^cu_seqlens .*6 and 7",
        lambda: {"k": randn(1, 2, 7, 16), "v": randn(1, 2, 7, 16), "cu_seqlens": seqlens(0, 6)},
    ),
}


@each_backend
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    error, message, changes = BAD[case]
    changes = changes()
    for _ in range(2):  # the second time, too, whatever the first has cached
        with pytest.raises(error, match=message):
            bad(backend, **changes)


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA a sigma tensor is not read back")
@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 0.0, 1.0], [1.0, 2.0, -3.0, 1.0], [1.0, float("nan"), 1.0, 1.0]], ids=str
)
def test_bad_sigma_tensor(values):
    with pytest.raises(ValueError, match="^sigma must be positive"):
        bad(sigma=torch.tensor(values))


def test_inference_mode():
    sample = exact_sample(torch.float32)
    with torch.inference_mode():
        ends = torch.tensor([0, 30, 70], dtype=torch.int32, device=DEVICE)
        o = [krause(sample._replace(options=dict(sample.options, cu_seqlens=ends))) for _ in range(2)]
    assert torch.equal(o[0], o[1])
    assert torch.equal(o[0], krause(sample._replace(options=dict(sample.options, cu_seqlens=ends.clone()))))


@pytest.mark.parametrize("width", [8, 12, 17, 20, 264])
def test_widths_that_kernels_do_not_serve(width):
    narrow = {"q": randn(1, 4, 6, width), "k": randn(1, 2, 6, width)}
    with pytest.raises(
        ValueError, match=f"backend='triton' cannot serve.*q is {width} wide.*multiples of 8 from 16 to 256"
    ):
        bad(**narrow)
    with pytest.raises(
        ValueError, match=f"backend='triton' cannot serve.*v is {width} wide.*multiples of 8 from 16 to 256"
    ):
        bad(v=randn(1, 2, 6, width))
    tensors = {**narrow, "v": randn(1, 2, 6, width), "sigma": torch.ones(4, device=DEVICE)}
    o, _ = run(nf.krause_attention, Sample(tensors, {}), backend="reference")
    assert o.shape == (1, 4, 6, width) and torch.isfinite(o).all()


def test_float64_is_for_the_reference():
    wide = {name: randn(1, 2, 6, 16, dtype=torch.float64) for name in "qkv"}
    with pytest.raises(ValueError, match="backend='triton' cannot serve.*float64"):
        bad(**wide)
    assert bad("reference", **wide).dtype == torch.float64


def test_too_many_candidates():
    q, k = randn(1, 1, 3, 16), randn(1, 1, 1025, 16)
    for locality in (None, nf.SlidingWindow(-1, 0), nf.SlidingWindow(1000, 24)):
        with pytest.raises(ValueError, match="top_k over 1025 candidate keys.*at most 1024"):
            nf.krause_attention(q, k, k, 2.0, locality, top_k=4, backend="triton")
    few = nf.krause_attention(q, k, k, 2.0, nf.SlidingWindow(1000, 23), top_k=4, backend="triton")
    torch.testing.assert_close(few, nf.krause_attention(q, k, k, 2.0, nf.SlidingWindow(1000, 23), top_k=4,
                                                        backend="reference"), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("top_k", [None, 4])
def test_beyond_32_bit_offsets(top_k):
    """q, o, dO and dq have more than 2^31 elements each; the last rows of the last head are as computed alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    length, heads = 2**20, 33
    q = torch.randn(1, heads, length, 64, dtype=torch.float16, device="cuda")
    assert q.numel() > 2**31
    k, v = (torch.randn(1, 1, length, 64, dtype=torch.float16, device="cuda") for _ in range(2))
    tensors = {"q": q, "k": k, "v": v, "sigma": torch.full((heads,), 4.0, device="cuda")}
    options = {"locality": nf.SlidingWindow(7), "top_k": top_k}
    # The gradient is an expanded tensor, so that it needs no memory.
    do = torch.randn(64, dtype=torch.float16, device="cuda").expand(1, heads, length, 64)
    o, gradients = run(nf.krause_attention, Sample(tensors, options), do)
    tail = {"q": q[:, -1:, -40:], "k": k[:, :, -60:], "v": v[:, :, -60:], "sigma": tensors["sigma"][-1:]}
    part = Sample(tail, options)
    gradients = {"q": gradients["q"][:, -1:, -40:]}
    check(part, do[:, -1:, -40:], o[:, -1:, -40:], gradients, names=("q",))


@pytest.mark.gpu
@needs_gpu
def test_the_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    sample = exact_sample(torch.float16)
    moved = Sample({n: t.to("cuda:1") for n, t in sample.tensors.items()}, sample.options)
    o, gradients = run(nf.krause_attention, sample)
    o_moved, gradients_moved = run(nf.krause_attention, moved)
    assert torch.equal(o, o_moved.to(o.device))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_moved[name].to(o.device))


def test_leaves_keep_strides():
    """The fuzz relies on it."""
    sample = Sample({"q": randn(1, 2, 6, 16).mT, "k": randn(1, 1, 6, 16).expand(1, 2, 6, 16)}, {})
    for name, leaf in leaves(sample).items():
        assert leaf.stride() == sample.tensors[name].stride() and leaf.requires_grad
