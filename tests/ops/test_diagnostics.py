"""Streamed diagnostics: constants of the statistics, geometry by brute force, known cases, ties, fuzz, isolation, bad input.

What every differentiable operator promises is tested on lse and entropy in test_operators.py; selection_geometry has no
gradients and is tested here alone. The oracles are dense, in float64, and measure distances where the kernels compare excesses.
"""

import math

import hypothesis
import pytest
import torch
from harness import DEVICE, DTYPES, LAYOUTS, Largest, Sample, leaves, needs_gpu, poison, randn, run
from hypothesis import strategies as st
from samples import diagnostics as oracle
from samples.diagnostics import check_constants, check_geometry, geometry, random_sample, statistics
from torch._subclasses.fake_tensor import FakeTensorMode

import nearfar as nf
from nearfar.kernels.diagnostics import UPSTREAM_EXPONENT

pytestmark = pytest.mark.full

BACKENDS = ("triton", "reference")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


CASES = {
    "causal, grouped heads": dict(causal=True, heads=(4, 2)),
    "full, fewer queries": dict(length=33, keys=90),
    "by distance, window": dict(sigma=2.5, locality=nf.SlidingWindow(20, 9), width=24, value_width=40),
    "negative scale, few keys": dict(length=50, keys=3, scale=-0.3),
    "causal, last queries": dict(length=20, keys=77, causal=True, scale=1.0),
    "by distance, causal": dict(sigma=1.5, causal=True),
}
each_case = pytest.mark.parametrize("case", CASES)


# ---------------------------------------------------------------------------------------------------- statistics: constants


@each_dtype
@each_case
def test_constants_of_the_statistics(case, dtype):
    sample = random_sample(dtype, **CASES[case])
    check_constants(sample, statistics(sample))


@each_case
def test_constants_of_the_reference(case):
    sample = random_sample(torch.float64, **CASES[case])
    found = statistics(sample, "reference")
    check_constants(sample, found)
    scores = oracle.dense_scores(sample.options, **{n: t.double() for n, t in sample.tensors.items() if n != "v"})
    for got, expected in zip(found[:2], oracle.lse_and_entropy(scores), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@each_backend
def test_masses_and_supports_of_known_attention(backend):
    """Equal keys: every weight is 1 / (keys seen). The masses of a head add up to its queries."""
    sample = random_sample(causal=True, heads=(4, 2))
    found = statistics(sample, backend)
    torch.testing.assert_close(found.key_mass.sum(-1), torch.full((1, 4), 70.0, device=DEVICE), rtol=1e-5, atol=0)
    # Sums of whole numbers are exact: a BLAS that adds up some columns in another order leaves equal scores equal.
    whole = {"q": sample.tensors["q"].round(), "k": torch.ones_like(sample.tensors["k"])}
    equal = Sample({**sample.tensors, **whole}, sample.options)
    seen = torch.arange(1.0, 71.0, device=DEVICE).expand(1, 4, 70)
    found = statistics(equal, backend)
    torch.testing.assert_close(found.effective_support, seen, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.max_weight, 1 / seen, rtol=1e-5, atol=0)
    assert (found.max_key == 0).all()
    expected = (1 / seen).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(found.key_mass, expected, rtol=1e-5, atol=0)


@each_backend
def test_a_single_key_has_all_weight(backend):
    sample = random_sample(length=40, locality=nf.SlidingWindow(0), scale=30.0)
    found = statistics(sample, backend)
    assert (found.entropy.abs() < 1e-4).all() and (found.entropy >= 0).all()
    torch.testing.assert_close(found.max_weight, torch.ones_like(found.lse), rtol=1e-4, atol=0)
    assert (found.max_weight <= 1).all()
    assert torch.equal(found.max_key, torch.arange(40, device=DEVICE).expand(1, 2, 40))
    score = 30 * (sample.tensors["q"] * sample.tensors["k"]).sum(-1)
    torch.testing.assert_close(found.lse, score, rtol=1e-5, atol=1e-4)


@each_backend
def test_small_entropies_keep_their_digits(backend):
    """Two keys, the second lighter by e^-d: entropy is about (1 + d) e^-d, far below the roundings of lse."""
    distance = torch.tensor([2.0, 5.0, 10.0, 14.0], device=DEVICE)
    q = torch.zeros(1, 1, 4, 16, device=DEVICE)
    q[0, 0, :, 0] = distance
    k = torch.zeros(1, 1, 2, 16, device=DEVICE)
    k[0, 0, 1, 0] = -1
    if backend == "reference":
        q, k = q.double(), k.double()
    found = nf.attention_statistics(q, k, scale=1.0, backend=backend)
    light = (-distance.double()).exp()
    expected = light.log1p() + distance.double() * light / (1 + light)
    tolerance = 1e-12 if backend == "reference" else 3e-7
    assert (found.entropy[0, 0].double() - expected).abs().max() <= tolerance


@each_backend
@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_equal_and_reversed_scores(scale, backend):
    sample = random_sample(length=9, keys=40, scale=scale)
    found = statistics(sample, backend)
    check_constants(sample, found)
    if scale == 0:
        assert (found.max_key == 0).all()
        torch.testing.assert_close(found.entropy, torch.full_like(found.entropy, math.log(40)))


@each_dtype
def test_gradients_of_a_mean_over_many_rows(dtype):
    """The upstream gradients, 1e-7 each, and their products with weights are far below what float16 holds."""
    sample = random_sample(dtype, length=150, heads=(2, 1))
    tensors = leaves(Sample({name: sample.tensors[name] for name in "qk"}, {}))
    entropy = nf.attention_statistics(**tensors, backend="triton").entropy
    gradients = torch.autograd.grad(entropy, list(tensors.values()), torch.full_like(entropy, 1e-7))
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    exact = torch.autograd.grad(oracle.lse_and_entropy(oracle.dense_scores({}, **wide))[1].sum(), list(wide.values()))
    for got, want in zip(gradients, exact, strict=True):
        error = (got.double() - 1e-7 * want).abs().max()
        # float16 cannot hold the gradient itself any better than its smallest number.
        assert error <= 8 * torch.finfo(dtype).eps * 1e-7 * want.abs().max() + torch.finfo(dtype).smallest_normal * 2.0**-10
    assert 2.0**UPSTREAM_EXPONENT * 20 < torch.finfo(torch.float16).max


def test_gradients_that_are_zero():
    sample = random_sample(length=20)
    tensors = leaves(Sample({name: sample.tensors[name] for name in "qk"}, {}))
    found = nf.attention_statistics(**tensors, backend="triton")
    gradients = torch.autograd.grad(found.lse, list(tensors.values()), torch.zeros_like(found.lse))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert [part.requires_grad for part in found] == [True, True, *5 * [False]]


def test_a_sigma_that_is_not_positive_poisons_its_head():
    """Public calls refuse it on the CPU, where it can be read."""
    q, k = randn(1, 2, 9, 16), randn(1, 2, 9, 16)
    v, sigma = randn(1, 2, 9, 16), torch.tensor([-1.0, 2.0], device=DEVICE)
    statistics = torch.ops.nearfar.attention_statistics(q, k, sigma, *3 * [None], -1, -1, 1.0)
    floating = [x for x in statistics if x.is_floating_point()]
    for found in (*floating, *torch.ops.nearfar.selection_geometry(q, k, v, sigma, 3, -1, -1, 1.0)):
        assert torch.isnan(found[:, 0]).all() and torch.isfinite(found[:, 1]).all()


# ------------------------------------------------------------------------------------------------------------ geometry

SELECTIONS = {
    "causal, grouped heads": 4,
    "full, fewer queries": 13,
    "by distance, window": 3,
    "negative scale, few keys": 2,
    "causal, last queries": 20,
    "by distance, causal": 8,
}


EXACT_ROWS = {torch.float32: 0.9, torch.float16: 0.5, torch.bfloat16: 0.4}


@each_dtype
@each_case
def test_geometry_by_brute_force(case, dtype):
    sample = random_sample(dtype, **CASES[case])
    check_geometry(sample, SELECTIONS[case], geometry(sample, SELECTIONS[case]), EXACT_ROWS[dtype])


@each_case
def test_geometry_of_the_reference(case):
    sample = random_sample(torch.float64, **CASES[case])
    check_geometry(sample, SELECTIONS[case], geometry(sample, SELECTIONS[case], "reference"), 0.99)


@pytest.mark.parametrize("top_n", [7, 8, 9, 17, 256])
def test_selections_of_several_rounds(top_n):
    """Each round of a kernel goes on where the round before it ended."""
    sample = random_sample(length=6, keys=300, heads=(1, 1))
    check_geometry(sample, top_n, geometry(sample, top_n))


@each_backend
@pytest.mark.parametrize("options", [dict(causal=True), dict(sigma=3.0)], ids=["causal", "by distance"])
def test_one_selected_key_is_told_from_all_others(options, backend):
    """Of distinct values: D is 0 for the one that s is, and positive for the others."""
    for found in geometry(random_sample(**options), 1, backend):
        assert torch.equal(found, torch.ones_like(found))


@each_backend
def test_keys_that_are_all_selected(backend):
    for found in geometry(random_sample(length=30, causal=True), 30, backend):
        assert torch.equal(found, torch.ones_like(found))


@each_backend
def test_orthogonal_values_of_equal_weight(backend):
    """n selected unit vectors are nearer to their sum (n - 1) than the others are (n + 1): all are separated."""
    values = torch.eye(32, device=DEVICE)[None, None]
    q, k = torch.zeros(1, 1, 5, 16, device=DEVICE), randn(1, 1, 32, 16)
    for top_n in (1, 5, 11):
        found = nf.selection_geometry(q, k, values, top_n, backend=backend)
        assert all(torch.equal(part, torch.ones_like(part)) for part in found)


@each_backend
def test_equal_values_cannot_be_told_apart(backend):
    """Weights 1/M each: every D is the same, so all others are within reach of S, and none of S is nearer than they are."""
    ones = torch.ones(1, 1, 32, 16, device=DEVICE)
    found = nf.selection_geometry(torch.zeros_like(ones), ones, ones, 4, backend=backend)
    assert torch.equal(found.precision, torch.full_like(found.precision, 4 / 32))
    assert torch.equal(found.recall, torch.zeros_like(found.recall))
    assert torch.equal(found.f_score, torch.zeros_like(found.f_score))


@each_backend
@pytest.mark.parametrize("sigma", [None, 4.0], ids=["dot", "distance"])
def test_ties_go_to_the_smaller_key(sigma, backend):
    """Whole numbers, whose products are exact: most scores occur several times, across tiles and across the cut."""
    sample = random_sample(length=25, keys=90, sigma=sigma, scale=None if sigma else 0.25)
    for name in "qk":
        sample.tensors[name].mul_(0.7).round_()
    for top_n in (3, 10):
        check_geometry(sample, top_n, geometry(sample, top_n, backend), 0.8)
    scores = oracle.dense_scores(
        sample.options, **{name: tensor.double() for name, tensor in sample.tensors.items() if name != "v"}
    )
    first = (scores == scores.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(statistics(sample, backend).max_key, first)


@each_backend
def test_keys_of_tiny_weight_do_not_drown(backend):
    """Weights down to 1e-12, which D^2 in float32 cannot tell from 0: excesses can."""
    k = torch.zeros(1, 1, 4, 16, device=DEVICE)
    k[0, 0, :, 0] = torch.tensor([0.0, -20.0, -24.0, -27.0])
    v = torch.zeros(1, 1, 4, 16, device=DEVICE)
    v[0, 0, :, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0])  # towards s, but for the last
    q = torch.ones(1, 1, 1, 16, device=DEVICE)
    found = nf.selection_geometry(q, k, v, 2, scale=1.0, backend=backend)
    assert torch.equal(torch.stack(found), torch.ones(3, 1, 1, 1, device=DEVICE))
    v[0, 0, 1, 0] = -1.0  # now the second of S is farther than the third key, and the last is farther still but for its weight
    found = nf.selection_geometry(q, k, v, 2, scale=1.0, backend=backend)
    assert found.precision.item() == 2 / 4 and found.recall.item() == 1 / 2


# ---------------------------------------------------------------------------------------------------------------- fuzz

LENGTHS = [65, 100, 130, 1, 17]
# (dtype, widths, (Hq, Hkv), causal, (left, right), by distance, top_n): few, as a GPU compiles kernels for each of them.
COMPILED = [
    (0, (64, 64), (1, 1), True, None, False, 4),
    (1, (16, 16), (4, 2), False, None, True, 9),
    (-1, (48, 80), (2, 1), False, (70, 33), False, 2),
    (1, (144, 16), (1, 1), True, (99, 0), True, 5),
    (0, (16, 256), (2, 2), False, (0, 500), False, 16),
]


@st.composite
def calls(draw):
    """(Sample, top_n)"""
    kind, (width, value_width), heads, causal, sides, by_distance, top_n = draw(st.sampled_from(COMPILED))
    dtype, keys, seed = DTYPES[kind], draw(st.sampled_from(LENGTHS)), draw(st.integers(0, 2**20))
    limited = causal or sides is not None
    length = draw(st.sampled_from([n for n in LENGTHS if n <= keys or not limited]))
    shapes = {"q": (1, heads[0], length, width), "k": (1, heads[1], keys, width), "v": (1, heads[1], keys, value_width)}
    magnitude = draw(st.sampled_from([1.0, 1.0, 0.02, 3.0]))
    tensors = {}
    for offset, (name, shape) in enumerate(shapes.items()):
        numbers = magnitude * randn(*shape, dtype=dtype, seed=seed + offset)
        tensors[name] = LAYOUTS[draw(st.sampled_from([name for name in LAYOUTS if "one" not in name]))](numbers)
    options = {"causal": causal, "locality": None if sides is None else nf.SlidingWindow(*sides)}
    if by_distance:
        tensors["sigma"] = torch.full((heads[0],), draw(st.sampled_from([1.0, 4.0])) * width**0.25, device=DEVICE)
    else:
        options["scale"] = draw(st.sampled_from([None, -0.1]))
    return Sample(tensors, options), top_n


@hypothesis.settings(max_examples=hypothesis.settings.default.max_examples // 4)
@hypothesis.given(calls())
def test_fuzz(case):
    sample, top_n = case
    check_constants(sample, statistics(sample))
    check_geometry(sample, top_n, geometry(sample, top_n), exactly=0)


# ------------------------------------------------------------------------------- isolation, memory, torch citizenship


def everything(sample, top_n=3):
    return *statistics(sample), *geometry(sample, top_n)


@pytest.mark.parametrize("locality", [None, nf.SlidingWindow(12, 0)], ids=["causal", "window"])
def test_what_a_query_cannot_see_changes_no_bit(locality):
    """From token 50 on all is new: rows before are the same, and so is the mass of keys that only those rows see."""
    sample = random_sample(length=90, causal=True, locality=locality)
    other = Sample({name: tensor.clone() for name, tensor in sample.tensors.items()}, sample.options)
    for tensor in other.tensors.values():
        tensor[:, :, 50:] = 100 * randn(*tensor[:, :, 50:].shape, seed=9)
    for name, a, b in zip((*nf.ops.diagnostics.AttentionStatistics._fields, "precision", "recall", "f_score"),
                          everything(sample), everything(other), strict=True):
        settled = (38 if locality else 0) if name == "key_mass" else 50
        assert torch.equal(a[..., :settled], b[..., :settled]), name
        assert name == "weight_sum" or not torch.equal(a, b), name
    if locality:  # and what lies before the windows
        first = Sample({name: tensor.clone() for name, tensor in sample.tensors.items()}, sample.options)
        for tensor in first.tensors.values():
            tensor[:, :, :20] = 100 * randn(*tensor[:, :, :20].shape, seed=9)
        for a, b in zip(everything(sample), everything(first), strict=True):
            assert torch.equal(a[..., 32:], b[..., 32:])


@pytest.mark.parametrize("sigma", [None, 2.0], ids=["dot", "distance"])
def test_every_element_is_written_and_the_same_every_time(sigma):
    sample = random_sample(torch.float16, length=45, heads=(4, 2), sigma=sigma, causal=True)
    first = everything(sample, 9)
    with poison():
        poisoned = everything(sample, 9)
    for repeat in range(20 if DEVICE == "cuda" else 1):
        for a, b, c in zip(first, poisoned, everything(sample, 9), strict=True):
            assert torch.equal(a, b), "depends on what its memory held"
            assert torch.equal(a, c), f"differs in repeat {repeat}"


def test_selection_geometry_as_a_torch_operator():
    sample = random_sample(length=19, causal=True)
    q, k, v = sample.tensors.values()
    arguments = q, k, v, None, 3, -1, 0, 0.25
    torch.library.opcheck(torch.ops.nearfar.selection_geometry.default, arguments)
    expected = geometry(sample, 3)
    with FakeTensorMode() as mode:
        fake = torch.ops.nearfar.selection_geometry(*map(mode.from_tensor, (q, k, v)), *arguments[3:])
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in expected]
    torch._dynamo.reset()
    compiled = torch.compile(nf.selection_geometry, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    found = compiled(q, k, v, 3, causal=True, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_backend
def test_geometry_is_a_constant(backend):
    sample = random_sample(length=9)
    found = geometry(Sample(leaves(sample), {}), 2, backend)
    assert not any(part.requires_grad for part in found)
    assert all(torch.equal(a, b) for a, b in zip(found, geometry(sample, 2, backend), strict=True))


@each_backend
def test_geometry_under_autocast(backend):
    sample = random_sample(length=19, causal=True)
    half = Sample({name: tensor.half() for name, tensor in sample.tensors.items()}, sample.options)
    with torch.autocast(DEVICE, dtype=torch.float16):
        found = geometry(sample, 3, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, geometry(half, 3, backend), strict=True))
    assert found.precision.dtype == torch.float32


def test_auto_and_explain():
    sample = random_sample(length=9)
    chosen = "triton" if DEVICE == "cuda" else "reference"
    for a, b in zip(geometry(sample, 2, "auto"), geometry(sample, 2, chosen), strict=True):
        assert torch.equal(a, b)
    assert f"served by {chosen}" in nf.explain(nf.selection_geometry, **sample.tensors, top_n=2)
    assert f"served by {chosen}" in nf.explain(nf.attention_statistics, sample.tensors["q"], sample.tensors["k"])


@each_backend
@pytest.mark.parametrize("sigma", [None, 2.0], ids=["dot", "distance"])
def test_no_queries(sigma, backend):
    sample = random_sample(length=0, keys=7, sigma=sigma)
    found = statistics(sample, backend)
    assert [part.shape for part in found[:4]] == 4 * [(1, 2, 0)]
    assert torch.equal(found.key_mass, torch.zeros(1, 2, 7, device=DEVICE))
    assert [part.shape for part in geometry(sample, 3, backend)] == 3 * [(1, 2, 0)]
    tensors = leaves(Sample({name: sample.tensors[name] for name in "qk"}, {}))
    gradients = torch.autograd.grad(nf.attention_statistics(**tensors, backend=backend).lse.sum(), list(tensors.values()))
    assert torch.equal(gradients[1], torch.zeros_like(gradients[1]))


def test_reference_memory_grows_with_the_length_only():
    sample = random_sample(length=2048, heads=(2, 2), causal=True)
    sample = Sample({name: tensor.cpu() for name, tensor in sample.tensors.items()}, sample.options)
    with Largest() as largest:
        statistics(sample, "reference")
        geometry(sample, 4, "reference")
    assert largest.numel <= 2 * 128 * 2048


# ----------------------------------------------------------------------------------------------------------- bad input


BAD = {
    "q of integers": (TypeError, "^q must be float16", lambda: {"q": randn(1, 4, 6, 16, dtype=torch.int64)}),
    "q of rank 3": (ValueError, "^q must have 4", lambda: {"q": randn(4, 6, 16)}),
    "k a list": (TypeError, "^k must be a torch.Tensor", lambda: {"k": [1.0]}),
    "k of another width": (ValueError, "^k must have the width of q, 16, got 24", lambda: {"k": randn(1, 2, 6, 24)}),
    "heads that do not divide": (ValueError, "^q must have a multiple of the 2 heads", lambda: {"q": randn(1, 3, 6, 16)}),
    "no key": (ValueError, "^k must have at least one key", lambda: {"k": randn(1, 2, 0, 16), "v": randn(1, 2, 0, 16)}),
    "causal with fewer keys": (
        ValueError,
        "^k must be at least as long as q, 6, .*got 5",
        lambda: {"k": randn(1, 2, 5, 16), "v": randn(1, 2, 5, 16), "causal": True},
    ),
    "window with fewer keys": (
        ValueError,
        "^k must be at least as long as q, 6, .*got 5",
        lambda: {"k": randn(1, 2, 5, 16), "v": randn(1, 2, 5, 16), "locality": nf.SlidingWindow(2, -1)},
    ),
    "causal with keys ahead": (
        ValueError, "^causal .*right of -1 or 0, got 2", lambda: {"causal": True, "locality": nf.SlidingWindow(2, 2)}
    ),
    "locality a pair": (TypeError, "^locality must be None, a SlidingWindow, .*got tuple", lambda: {"locality": (1, 2)}),
    "scale infinite": (ValueError, "^scale must be finite", lambda: {"scale": float("inf")}),
    "scale a string": (TypeError, "^scale must be a number or None", lambda: {"scale": "1"}),
    "scale with a sigma": (ValueError, "^scale is for dot products", lambda: {"scale": 1.0, "sigma": 2.0}),
    "sigma zero": (ValueError, "^sigma must be positive", lambda: {"sigma": 0.0}),
    "sigma per kv head": (ValueError, r"^sigma must be .*\(4,\), got \(2,\)", lambda: {"sigma": torch.ones(2, device=DEVICE)}),
}
BAD_SELECTION = {
    "top_n zero": (ValueError, "^top_n must be from 1 to 256, got 0", lambda: {"top_n": 0}),
    "top_n too large": (ValueError, "^top_n must be from 1 to 256, got 257", lambda: {"top_n": 257}),
    "top_n a float": (TypeError, "^top_n must be an int, got float", lambda: {"top_n": 2.0}),
    "top_n a bool": (TypeError, "^top_n must be an int, got bool", lambda: {"top_n": True}),
    "v of another length": (ValueError, "^v must have the heads and length", lambda: {"v": randn(1, 2, 7, 16)}),
    "v missing": (TypeError, "^v must be a torch.Tensor, got NoneType", lambda: {"v": None}),
    "v of half precision": (TypeError, "^v must have the dtype of q", lambda: {"v": randn(1, 2, 6, 16, dtype=torch.float16)}),
}


@each_backend
@pytest.mark.parametrize("case", (*BAD, *BAD_SELECTION))
def test_bad_input(case, backend):
    error, message, changes = (BAD | BAD_SELECTION)[case]
    call = {"q": randn(1, 4, 6, 16), "k": randn(1, 2, 6, 16), "v": randn(1, 2, 6, 16), "top_n": 2, **changes()}
    for _ in range(2):  # the second time, too, whatever the first has cached
        with pytest.raises(error, match=message):
            nf.selection_geometry(**call, backend=backend)
        if case in BAD:
            with pytest.raises(error, match=message):
                nf.attention_statistics(**{n: x for n, x in call.items() if n not in ("v", "top_n")}, backend=backend)


def test_widths_and_dtypes_that_kernels_do_not_serve():
    q = randn(1, 2, 6, 20)
    for width, named in ((20, "q"), (16, "v")):
        v = randn(1, 2, 6, 20 if width == 16 else 16)
        with pytest.raises(ValueError, match=f"backend='triton' cannot serve.*{named} is 20 wide"):
            nf.selection_geometry(randn(1, 2, 6, width), randn(1, 2, 6, width), v, 2, backend="triton")
    with pytest.raises(ValueError, match="backend='triton' cannot serve.*q is 20 wide"):
        nf.attention_statistics(q, q, backend="triton")
    with pytest.raises(ValueError, match="backend='triton' cannot serve.*float64"):
        nf.attention_statistics(q.double(), q.double(), backend="triton")
    assert nf.attention_statistics(q.double(), q.double(), backend="reference").lse.dtype == torch.float64


# ----------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_every_row_of_a_long_sequence(width, causal):
    """bfloat16 against the float32 kernels, whose products and pipelines are others; every row, many times."""
    q, k, v = (randn(1, 4, 4096, width, dtype=torch.bfloat16, seed=seed) for seed in range(3))

    def run(dtype):
        a, b, c = (x.to(dtype) for x in (q, k, v))
        leaves = a.requires_grad_(), b.requires_grad_()
        found = nf.attention_statistics(*leaves, causal=causal, backend="triton")
        gradients = torch.autograd.grad((found.lse.sum(), found.entropy.sum()), leaves)
        selected = nf.selection_geometry(a, b, c, 4, causal=causal, backend="triton")
        return [part.detach() for part in found], gradients, selected

    exact, first = run(torch.float32), run(torch.bfloat16)
    for index, (got, want) in enumerate(zip(first[0], exact[0], strict=True)):
        wrong = (got != want) if index == 3 else (got - want).abs() > 1e-4 * want.abs().clamp_min(1e-3)
        assert wrong.sum() <= (8 if index == 3 else 0), f"{int(wrong.sum())} elements of statistic {index} are wrong"
    for got, want in zip(first[1], exact[1], strict=True):
        largest = torch.nn.functional.max_pool1d(want.abs().amax(-1)[0], 129, stride=1, padding=64)
        assert ((got.float() - want).abs().amax(-1)[0] <= 0.05 * largest).all()
    for got, want in zip(first[2], exact[2], strict=True):
        assert (got - want).abs().mean() < 0.01  # s is rounded to bfloat16: distances nearly equal may change sides
    for repeat in range(20):
        again = run(torch.bfloat16)
        for a, b in zip(sum(map(list, first), []), sum(map(list, again), []), strict=True):
            assert torch.equal(a, b), f"differs in repeat {repeat}"


@pytest.mark.gpu
@needs_gpu
def test_memory_at_131072_tokens():
    """Besides the tensors: a few numbers for each query and entry of top_n, where the scores would take 137 GB a head."""
    q, k, v = (torch.randn(1, 8, 131072, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    found = nf.attention_statistics(q, k, causal=True)
    nf.selection_geometry(q, k, v, 4, causal=True)
    rows = 8 * 131072
    assert torch.cuda.max_memory_allocated() - held <= rows * (5 * 8 + 12 * 4 + 2 * 64 + 8 * 4) + 2**22
    torch.testing.assert_close(found.key_mass.sum(-1), torch.full((1, 8), 131072.0, device="cuda"), rtol=1e-3, atol=0)


@pytest.mark.gpu
@needs_gpu
def test_beyond_32_bit_offsets():
    """q has more than 2^31 elements; the last rows of the last head are as computed alone."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free GPU memory")
    length, heads = 2**20, 33
    q = torch.randn(1, heads, length, 64, dtype=torch.float16, device="cuda")
    assert q.numel() > 2**31
    k, v = (torch.randn(1, 1, length, 64, dtype=torch.float16, device="cuda") for _ in range(2))
    window = nf.SlidingWindow(7, 0)
    found = (*nf.attention_statistics(q, k, locality=window)[:3], *nf.selection_geometry(q, k, v, 3, locality=window))
    last = q[:, -1:, -40:], k[:, :, -60:], v[:, :, -60:]
    alone = (*nf.attention_statistics(*last[:2], locality=window)[:3], *nf.selection_geometry(*last, 3, locality=window))
    for whole, part in zip(found, alone, strict=True):
        torch.testing.assert_close(whole[:, -1:, -40:], part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [None, 2.0])
@pytest.mark.parametrize("where", "qkv")
def test_nan_reaches_the_rows_that_see_it(where, sigma):
    """Comparisons pass NaN by: a broken query must not look like one that selects perfectly."""
    tensors = {"q": randn(1, 2, 30, 16, seed=1), "k": randn(1, 2, 30, 16, seed=2), "v": randn(1, 2, 30, 16, seed=3)}
    window = nf.SlidingWindow(9, 2)
    tensors[where][0, 1, 17, 3] = math.nan
    seen = torch.zeros(1, 2, 30, dtype=torch.bool, device=DEVICE)
    seen[0, 1, slice(17, 18) if where == "q" else slice(15, 27)] = True
    geometry = nf.selection_geometry(*tensors.values(), 3, locality=window, sigma=sigma, backend="triton")
    for name, part in geometry._asdict().items():
        assert torch.equal(part.isnan(), seen), name
    if where != "v":
        statistics = nf.attention_statistics(tensors["q"], tensors["k"], locality=window, sigma=sigma, backend="triton")
        for name in ("lse", "entropy", "max_weight"):
            assert torch.equal(getattr(statistics, name).isnan(), seen), name
        # A key has lost its mass where a row that sees it has.
        rows, keys = torch.arange(30)[:, None], torch.arange(30)
        visible = ((rows - keys <= 9) & (keys - rows <= 2)).to(DEVICE)
        assert torch.equal(statistics.key_mass.isnan(), (seen[..., None] & visible).any(2))


@pytest.mark.parametrize("sigma", [False, True])
def test_gradients_do_not_depend_on_the_batch(sigma):
    """Bit for bit, whatever the size of the others' gradients; and what is not a number stays in its batch element."""
    tensors = {"q": randn(3, 2, 9, 16, dtype=torch.float16, seed=1), "k": randn(3, 1, 9, 16, dtype=torch.float16, seed=2)}
    options = {"sigma": torch.tensor([2.0, 1.5], device=DEVICE)} if sigma else {}
    do = randn(3, 2, 9, seed=3), randn(3, 2, 9, seed=4)
    do[0][2] *= 1e6

    def gradients(elements):
        sample = Sample({name: tensor[elements] for name, tensor in tensors.items()}, {"causal": True, **options})
        upstream = tuple(part[elements] for part in do)
        return run(lambda **keywords: tuple(nf.attention_statistics(**keywords)[:2]), sample, upstream)[1]

    together = gradients(slice(0, 3))
    for index in range(3):
        alone = gradients(slice(index, index + 1))
        for name in "qk":
            assert torch.equal(together[name][index : index + 1], alone[name]), name
    do[1][1, 0, 3] = math.nan
    broken = gradients(slice(0, 3))
    for name in "qk":
        assert broken[name][1].isnan().any()
        assert torch.equal(together[name][::2], broken[name][::2]), name
