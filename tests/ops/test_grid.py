"""Krause attention on grids: references and kernels against the dense oracle of samples/krause.py, and what is refused."""

import math

import hypothesis
import pytest
import torch
from harness import (
    DEVICE,
    DTYPES,
    GRADIENTS,
    LAYOUTS,
    Sample,
    assert_same,
    generator,
    leaves,
    like,
    of_the_reference,
    randn,
    run,
)
from hypothesis import strategies as st
from samples.grid import mask
from samples.krause import best, by_head, check, scores, to_query_heads, weights

import nearfar as nf
from nearfar import tiling
from nearfar.kernels.krause_grid import decoded
from nearfar.reference import pairwise

G, S = nf.GridNeighborhood, nf.ShiftedWindow
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(locality, dtype=torch.float32, top_k=None, heads=(2, 1), width=16, width_v=24, batch=1, device=DEVICE):
    heads_q, heads_kv = heads
    length = locality.num_tokens
    tensors = {
        "q": randn(batch, heads_q, length, width, dtype=dtype, seed=1, device=device),
        "k": randn(batch, heads_kv, length, width, dtype=dtype, seed=2, device=device),
        "v": randn(batch, heads_kv, length, width_v, dtype=dtype, seed=3, device=device),
        "sigma": 3 + torch.rand(heads_q, generator=generator(4)).to(device),
    }
    if dtype == torch.float64:
        tensors["sigma"] = tensors["sigma"].double()
    return Sample(tensors, dict(locality=locality, top_k=top_k))


def selection(sample, backend="triton"):
    """The set that a backend selects: with columns of the identity for v its outputs are the weights themselves."""
    if sample.options["top_k"] is None:
        return best(sample)
    k = sample.tensors["k"]
    wide = -(-k.shape[2] // 8) * 8
    columns = torch.eye(k.shape[2], wide, dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1).split(256, -1)
    parts = [nf.krause_attention(**{**sample.tensors, "v": v}, **sample.options, backend=backend) for v in columns]
    return torch.cat(parts, -1)[..., : k.shape[2]] > 0


# ----------------------------------------------------------------------------------------------------------- references

LOCALITIES = [
    G((5, 30), (1, 2)),
    G((12, 12), 2, global_tokens=1),
    G((9, 9), 3, "manhattan", global_tokens=70),
    G((3, 5, 6), (1, 1, 2), dilation=(1, 2, 1)),
    G((1, 70), 40),
    S((8, 12), 4, 2),
    S((2, 4, 6), (1, 2, 3), (0, 1, 2)),
]


@each_dtype
@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("locality", LOCALITIES, ids=str)
def test_the_reference_is_the_formula(locality, top_k, dtype):
    sample = make(locality, dtype, top_k)
    o, gradients = run(nf.krause_attention, sample, backend="reference")
    wide = Sample({n: t.float() for n, t in sample.tensors.items()}, sample.options)
    with of_the_reference():
        check(sample, like(o), o, gradients, selection(wide, "reference"))


@pytest.mark.full
@pytest.mark.parametrize("locality", [G((3, 3), 1, global_tokens=1), S((4, 4), 2, 1)], ids=str)
@pytest.mark.parametrize("top_k", [None, 2])
def test_the_reference_is_differentiable_twice(locality, top_k):
    sample = make(locality, torch.float64, top_k, width=3, width_v=2, device="cpu")
    tensors = list(leaves(sample).values())
    if isinstance(locality, S):
        tensors.append(randn(2, locality.bias_size, dtype=torch.float64, seed=5, device="cpu").requires_grad_())

    def call(q, k, v, sigma, *bias):
        bias = bias[0] if bias else None
        return nf.krause_attention(q, k, v, sigma, bias=bias, **sample.options, backend="reference")

    torch.autograd.gradcheck(call, tensors)
    torch.autograd.gradgradcheck(call, tensors)


def test_chunks_of_the_reference_are_cropped(monkeypatch):
    """A block of queries meets the keys of its span and the global tokens, no more."""
    seen = []
    scores_of = pairwise.distance_scores
    monkeypatch.setattr("nearfar.reference.grid.distance_scores", lambda q, k, s: seen.append(k.shape[2]) or scores_of(q, k, s))
    locality = G((64, 16), 1, global_tokens=2)
    nf.krause_attention(**make(locality, width=2).tensors, locality=locality, backend="reference")
    assert seen[0] == locality.num_tokens and max(seen[1:]) <= 4 * pairwise.CHUNK + 2


def swin(q, k, v, sigma, bias, shape, window, shift):
    """Krause attention as Swin's code is written: roll, cut into windows, add the table and the mask, and back. One head."""

    def cut(x):
        x = torch.roll(x.reshape(*shape, -1), (-shift, -shift), (0, 1))
        return x.reshape(shape[0] // window, window, shape[1] // window, window, -1).transpose(1, 2).reshape(
            -1, window * window, x.shape[-1]
        )

    region, count = torch.zeros(shape, dtype=torch.long), 0
    for rows in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
        for columns in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
            region[rows, columns], count = count, count + 1
    region = region.reshape(shape[0] // window, window, shape[1] // window, window).transpose(1, 2).reshape(-1, window**2)
    places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    offset = (places[:, :, None] - places[:, None, :]) + window - 1
    index = offset[0] * (2 * window - 1) + offset[1]
    score = -(cut(q)[:, :, None] - cut(k)[:, None]).square().sum(-1) / (2 * sigma**2) + bias[index]
    score = score.masked_fill(region[:, :, None] != region[:, None, :], float("-inf"))
    o = (score.softmax(-1) @ cut(v)).reshape(shape[0] // window, shape[1] // window, window, window, -1).transpose(1, 2)
    return torch.roll(o.reshape(*shape, -1), (shift, shift), (0, 1)).flatten(0, 1)


def test_a_shifted_window_is_swins():
    locality = S((8, 12), 4, 2)
    tensors = leaves(make(locality, torch.float64, heads=(1, 1), device="cpu"))
    bias = randn(1, 49, dtype=torch.float64, seed=5, device="cpu").requires_grad_()
    o = nf.krause_attention(**tensors, locality=locality, bias=bias, backend="reference")
    q, k, v, sigma = (x.flatten(0, 2) if x.dim() == 4 else x for x in tensors.values())
    expected = swin(q, k, v, sigma, bias[0], (8, 12), 4, 2)
    torch.testing.assert_close(o[0, 0], expected, rtol=0, atol=1e-12)
    inputs, do = [*tensors.values(), bias], like(o)
    gradients = torch.autograd.grad(o, inputs, do)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, do[0, 0]), rtol=0, atol=1e-12)
    assert gradients[-1].abs().min() > 0


def test_the_table_takes_part_in_the_selection():
    locality = S((4, 4), 2)
    sample = make(locality, torch.float64, heads=(2, 2), device="cpu")
    bias = randn(2, 9, dtype=torch.float64, seed=5, device="cpu") * 9
    q, k, v, sigma = sample.tensors.values()
    position = torch.arange(16)
    index = locality.bias_index(position[:, None], position[None, :])
    score = scores(q, k, sigma) + bias[:, index]
    keep = mask(locality).expand_as(score)
    kept = score.masked_fill(~keep, float("-inf")).topk(2).indices
    expected = weights(score, torch.zeros_like(keep).scatter_(-1, kept, True)) @ v
    o = nf.krause_attention(**sample.tensors, locality=locality, bias=bias, top_k=2, backend="reference")
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(o, nf.krause_attention(**sample.tensors, locality=locality, top_k=2, backend="reference"))


# -------------------------------------------------------------------------------------------------------------- kernels

# What the interpreter can do in seconds: few cells, yet several boxes, steps of a walk, axes of one cell, every metric.
SERVED = {
    "square": (G((9, 20), 1), None),
    "square, global tokens": (G((5, 6), 2, global_tokens=3), None),
    "manhattan": (G((6, 7), 2, "manhattan", global_tokens=1), None),
    "dilated": (G((7, 5), (1, 2), dilation=(2, 3)), None),
    "column": (G((20, 1), 3), None),
    "one cell": (G((1, 1), 0), None),
    "cube": (G((3, 4, 5), (1, 1, 2), global_tokens=1), None),
    "cube, manhattan": (G((3, 3, 4), 1, "manhattan"), None),
    "farther than the grid": (G((3, 7), (1, 99)), None),
    "square, top 4": (G((9, 20), 1), 4),
    "square, global tokens, top 5": (G((5, 6), 2, global_tokens=3), 5),
    "long lines, global token, top 6": (G((2, 40), (1, 3), global_tokens=1), 6),
    "manhattan, dilated, top 3": (G((6, 7), 2, "manhattan", dilation=2), 3),
    "cube, global token, top 4": (G((3, 4, 5), (1, 1, 2), global_tokens=1), 4),
    "top 99 of 9": (G((4, 5), 1), 99),
}
FAST = ("square, global tokens", "square, global tokens, top 5", "one cell")
each_served = pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.full) for n in SERVED])


@each_dtype
@each_served
def test_kernels_are_accurate(name, dtype):
    locality, top_k = SERVED[name]
    sample = make(locality, dtype, top_k)
    o, gradients = run(nf.krause_attention, sample)
    check(sample, like(o), o, gradients, selection(sample))


@pytest.mark.full
@each_dtype
@pytest.mark.parametrize("top_k", [None, 12])
def test_the_authors_image_model(top_k, dtype):
    """14 x 14 patches and CLS, radius 2, of D = 64."""
    sample = make(G((14, 14), 2, global_tokens=1), dtype, top_k, heads=(1, 1), width=64, width_v=64)
    sample.tensors["sigma"].fill_(8)
    o, gradients = run(nf.krause_attention, sample)
    check(sample, like(o), o, gradients, selection(sample))


@each_dtype
@pytest.mark.parametrize("name", ["square, global tokens, top 5", "long lines, global token, top 6"])
@pytest.mark.parametrize("high", [0, 1])
def test_of_equal_scores_the_first_are_kept(name, high, dtype):
    """Small integers: scores are exact, and most cuts go through ties; with 0 all keys are equal."""
    locality, top_k = SERVED[name]
    sample = make(locality, dtype, top_k, heads=(1, 1))
    for key in "qk":
        tensor = sample.tensors[key]
        tensor.copy_(torch.randint(-high, high + 1, tensor.shape, generator=generator(6)))
    sample.tensors["sigma"].fill_(4)
    assert torch.equal(selection(sample), best(sample))


@pytest.mark.full
@pytest.mark.parametrize("name", ["square, global tokens", "square, global tokens, top 5"])
def test_two_calls_agree_bit_for_bit(name):
    locality, top_k = SERVED[name]
    sample = make(locality, top_k=top_k)
    assert_same(run(nf.krause_attention, sample), run(nf.krause_attention, sample))


@pytest.mark.full
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_layouts_are_read_as_they_are(layout):
    sample = make(G((3, 4), 1, global_tokens=1), heads=(2, 2), top_k=5)
    strided = {n: LAYOUTS[layout](t) if n in "qkv" else t for n, t in sample.tensors.items()}
    contiguous = {n: t.contiguous() for n, t in strided.items()}
    got, expected = (run(nf.krause_attention, Sample(tensors, sample.options)) for tensors in (strided, contiguous))
    assert_same(got, expected, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", [name for name in GRADIENTS if name != "contiguous"])
def test_upstream_gradients_are_read_as_they_are(layout):
    sample = make(G((3, 4), 1, global_tokens=1), heads=(2, 2))
    do = GRADIENTS[layout](randn(1, 2, 13, 24, seed=7))
    (o, got), (_, expected) = (run(nf.krause_attention, sample, x) for x in (do, do.contiguous()))
    # Rows of 24 and of 48 numbers are other kernels to Triton, as only the latter start at multiples of 16: sums may have
    # another order.
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=lambda text, name=name: f"gradient of {name}, {layout}: {text}")


def test_rows_depend_on_nothing_but_what_they_see():
    """Bit for bit, and across the batch."""
    locality = G((4, 5), 1)
    sample = make(locality, batch=2)
    o = nf.krause_attention(**sample.tensors, locality=locality, backend="triton")
    key, seen = 7, mask(locality)[:, 7]
    for name in "kv":
        sample.tensors[name][0, :, key] += 1
    changed = nf.krause_attention(**sample.tensors, locality=locality, backend="triton")
    assert torch.equal(o[1], changed[1]) and torch.equal(o[0, :, ~seen], changed[0, :, ~seen])
    assert (o[0, :, seen] != changed[0, :, seen]).any(-1).all()


def test_nan_stays_where_it_is_seen():
    locality = G((9, 20), 1)
    sample = make(locality, heads=(1, 1))
    sample.tensors["k"][0, 0, 0] = math.nan
    o = nf.krause_attention(**sample.tensors, locality=locality, backend="triton")[0, 0]
    seen = mask(locality)[:, 0]
    assert o[seen].isnan().all() and torch.isfinite(o[~seen]).all()


def test_a_sigma_that_is_no_tensor_and_one_for_all_heads():
    locality = G((3, 4), 1)
    tensors = make(locality).tensors
    sigma = tensors.pop("sigma")[:1].fill_(2.5)
    o, shared = (nf.krause_attention(**tensors, sigma=x, locality=locality, backend="triton") for x in (2.5, sigma))
    assert torch.equal(o, shared)
    sample = Sample({**tensors, "sigma": sigma}, dict(locality=locality, top_k=None))
    o, gradients = run(nf.krause_attention, sample)
    check(sample, like(o), o, gradients)


@pytest.mark.parametrize("top_k", [None, 3])
def test_an_empty_batch(top_k):
    locality = G((2, 3), 1, global_tokens=1)
    o, gradients = run(nf.krause_attention, make(locality, top_k=top_k, batch=0))
    assert o.shape == (0, 2, 7, 24)
    assert gradients["q"].shape == (0, 2, 7, 16) and gradients["sigma"].eq(0).all()


@pytest.mark.full
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_torch_operator(top_k):
    sample = make(G((2, 3), 1, global_tokens=1), top_k=top_k)
    arguments = (*leaves(sample).values(), None, sample.options["locality"].text, top_k, False, 0.0)
    torch.library.opcheck(torch.ops.nearfar.krause_attention_grid.default, arguments)
    torch._dynamo.reset()  # Dynamo compiles one function 8 times, whichever tests ask for it
    compiled = torch.compile(nf.krause_attention, backend="aot_eager", fullgraph=True)
    for backend in ("triton", "reference"):
        assert_same(run(nf.krause_attention, sample, backend=backend), run(compiled, sample, backend=backend), backend)


def test_one_compiled_function_takes_several_grids():
    """Dynamo makes symbols of the numbers that differ."""
    torch._dynamo.reset()  # Dynamo compiles one function 8 times, whichever tests ask for it
    compiled = torch.compile(nf.krause_attention, backend="aot_eager", fullgraph=True)
    for locality in (G((2, 3), 1), G((3, 4), 2), nf.ShiftedWindow((2, 4), 2), nf.ShiftedWindow((3, 6), 3, shift=1)):
        sample = make(locality)
        assert_same(run(nf.krause_attention, sample, backend="reference"), run(compiled, sample, backend="reference"))


@pytest.mark.parametrize("locality", LOCALITIES, ids=str)
def test_localities_go_through_a_schema(locality):
    assert decoded(locality.text) == locality


# --------------------------------------------------------------------------------------------------------------- tiling


@st.composite
def grids(draw):
    axes = draw(st.integers(2, 3))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(axes))
    metric = draw(st.sampled_from(["chebyshev", "manhattan"]))
    radius = tuple(draw(st.integers(0, 4)) for _ in range(axes)) if metric == "chebyshev" else draw(st.integers(0, 6))
    return G(shape, radius, metric, draw(st.integers(0, 2)), draw(st.integers(1, 3)))


@hypothesis.given(grids(), st.sampled_from([16, 32, 64]), st.sampled_from([32, 64]), st.booleans())
def test_codes_tell_what_is_seen(locality, block_m, block_n, selects):
    """By all offsets that lanes of a box and of a step of its walk have, whether they are cells or not."""
    geometry = tiling.geometry_of(locality)
    tiles = tiling.choose_tiles(geometry, block_m, block_n, selects)
    hypothesis.assume(tiles is not None)
    assert math.prod(tiles.box) == block_m and tiles.key_h * tiles.key_w == block_n
    step_t, step_h, step_w, bias, guards = tiling.forms(geometry, tiles)
    ends = zip(tiles.box, geometry.radius, (1, tiles.key_h, tiles.key_w), strict=True)
    ranges = [torch.arange(-(b + r - 1), b + r + k - 1) for b, r, k in ends]
    t, h, w = torch.meshgrid(*ranges, indexing="ij")
    code = t * step_t + h * step_h + w * step_w
    seen = (bias + code) & (bias - code) & guards == guards
    if geometry.manhattan is None:
        near = [x.abs() <= r for x, r in zip((t, h, w), geometry.radius, strict=True)]
        expected = near[0] & near[1] & near[2]
    else:
        expected = t.abs() + h.abs() + w.abs() <= geometry.manhattan
    within = [x.abs() < n for x, n in zip((t, h, w), geometry.cells, strict=True)]  # others are no pairs of cells
    within = within[0] & within[1] & within[2]
    assert torch.equal(seen & within, expected & within)
    assert (bias + code).abs().max() < 2**31


def test_boxes_of_large_grids_waste_little():
    """Scores of a query: at most so many times the keys that it sees."""
    for locality, most in ((G((256, 256), 6), 3.1), (G((30, 48, 80), (8, 11, 11)), 1.8)):
        geometry = tiling.geometry_of(locality)
        scored = tiling.choose_tiles(geometry, 64, 64, False).steps(geometry) * 64
        assert scored <= most * math.prod(2 * r + 1 for r in locality.radii)
    authors = tiling.geometry_of(G((14, 14), 2, global_tokens=1))
    assert tiling.choose_tiles(authors, 64, 64, False).steps(authors) == 2


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(match, locality, error=ValueError, **options):
    tensors = {**make(locality).tensors, **options.pop("tensors", {})}
    with pytest.raises(error, match=match):
        nf.krause_attention(**tensors, locality=locality, **options)


def test_bad_input():
    locality, windows = G((2, 3), 1, global_tokens=1), S((2, 4), 2)
    q = make(G((2, 3), 1)).tensors["q"]
    refused("6 cells and 1 global tokens, so q must have 7 tokens, got 6", locality, tensors=dict(q=q))
    refused("grids cannot be packed", locality, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32, device=DEVICE))
    refused("top_k must be at least 1", locality, top_k=0)
    refused("sigma must be positive", locality, tensors=dict(sigma=-1.0))
    refused("bias is a table of a ShiftedWindow's offsets; locality is a GridNeighborhood", locality, bias=torch.zeros(2, 9))
    refused(r"bias must have shape \(Hq, 3 x 3\), \(2, 9\), got \(2, 8\)", windows, bias=torch.zeros(2, 8, device=DEVICE))
    refused("bias must be float16", windows, TypeError, bias=torch.zeros(2, 9, dtype=torch.int32, device=DEVICE))
    refused("bias must be a torch.Tensor", windows, TypeError, bias=[0.0])
    tensors = make(locality).tensors
    with pytest.raises(ValueError, match="bias is a table of a ShiftedWindow's offsets"):
        nf.krause_attention(**tensors, bias=torch.zeros(2, 9))
    with pytest.raises(TypeError, match="locality must be None, a SlidingWindow, a GridNeighborhood or a ShiftedWindow"):
        nf.krause_attention(**tensors, locality="grid")


UNSERVED = {
    "top_k in a ShiftedWindow; its kernels do not select yet": (S((2, 4), 2), 3),
    "windows of 1056 cells; kernels take at most 1024": (S((32, 33), (32, 33)), None),
    "17 global tokens; kernels take at most 16": (G((2, 4), 2, global_tokens=17), None),
    "top_k with a radius of 16 along the last axis": (G((2, 40), (1, 16)), 3),
    "top_k with both global tokens and a dilation": (G((2, 4), 1, global_tokens=1, dilation=2), 3),
    "top_k among 16384 keys": (G((48, 8, 48), (24, 4, 15)), 3),
    "does not fit the 31 bits": (G((300, 300, 300), 100, "manhattan"), None),
}


@pytest.mark.parametrize("message", UNSERVED)
def test_what_kernels_do_not_serve_is_said(message):
    locality, top_k = UNSERVED[message]
    tensors = {n: t for n, t in zip("qkv", [torch.empty(1, 2, locality.num_tokens, 16, device="meta")] * 3, strict=True)}
    with pytest.raises(ValueError, match=message):
        nf.krause_attention(**tensors, sigma=2.0, locality=locality, top_k=top_k, backend="triton")
    text = nf.explain(nf.krause_attention, **tensors, sigma=2.0, locality=locality, top_k=top_k)
    assert message in text and "the CUDA kernels take windows, not grids" in text


def test_the_cpu_takes_the_reference():
    sample = make(S((2, 4), 2), device="cpu")
    with of_the_reference():
        o, gradients = run(nf.krause_attention, sample, backend="auto")
        check(sample, like(o), o, gradients)


def test_heads_of_a_group_share_a_key_head():
    """What the oracle takes for granted."""
    sample = make(G((2, 3), 1))
    q, k, v, sigma = sample.tensors.values()
    repeated = dict(q=q, k=to_query_heads(q, k), v=to_query_heads(q, v), sigma=sigma)
    o, same = (nf.krause_attention(**x, locality=G((2, 3), 1), backend="triton") for x in (sample.tensors, repeated))
    assert torch.equal(o, same) and by_head(sigma, 2).shape[1] == 2


# --------------------------------------------------------------------------------------------------- softmax and affine


def affine_sample(locality):
    tensors = make(locality, torch.float64, device="cpu").tensors
    tensors.pop("sigma")
    rows = (1, 2, locality.num_tokens)
    alpha, beta = (randn(*rows, dtype=torch.float64, seed=seed, device="cpu") for seed in (8, 9))
    return {**tensors, "alpha": alpha, "beta": beta}


@pytest.mark.parametrize("locality", LOCALITIES, ids=str)
def test_affine_attention_on_a_grid(locality):
    tensors = affine_sample(locality)
    q, k, v, alpha, beta = tensors.values()
    sink = torch.tensor([0.3, -0.4], dtype=torch.float64)
    seen, keys, values = mask(locality), to_query_heads(q, k), to_query_heads(q, v)
    score = (q @ keys.mT / 4).masked_fill(~seen, float("-inf"))
    softmax = torch.cat((score, sink[None, :, None, None].expand(*score.shape[:3], 1)), -1).softmax(-1)[..., :-1]
    expected = alpha[..., None] * (softmax @ values) + beta[..., None] * (seen.double() @ values)
    o = nf.affine_attention(**tensors, sink=sink, locality=locality)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    o = nf.softmax_attention(q, k, v, locality=locality)
    torch.testing.assert_close(o, score.softmax(-1) @ values, rtol=0, atol=1e-12)


@pytest.mark.full
def test_affine_attention_on_a_grid_is_differentiable_twice():
    locality = G((2, 3), 1, global_tokens=1)
    tensors = [x[..., :3].requires_grad_() if x.dim() == 4 else x.requires_grad_() for x in affine_sample(locality).values()]
    torch.autograd.gradcheck(lambda *x: nf.affine_attention(*x, locality=locality), tensors)
    torch.autograd.gradgradcheck(lambda *x: nf.affine_attention(*x, locality=locality), tensors)


def test_a_sliding_window_is_a_locality_of_softmax_attention():
    q = randn(1, 2, 20, 16)
    for backend in ("triton", "reference"):
        o = nf.softmax_attention(q, q, q, locality=nf.SlidingWindow(5, 2), backend=backend)
        assert torch.equal(o, nf.softmax_attention(q, q, q, window_size=(5, 2), backend=backend))


def test_bad_input_of_softmax_attention():
    q, locality = randn(1, 2, 6, 16), G((2, 3), 1)
    for options in (dict(causal=True), dict(window_size=(3, 0))):
        with pytest.raises(ValueError, match="leave window_size and causal out"):
            nf.softmax_attention(q, q, q, locality=locality, **options)
    with pytest.raises(ValueError, match="so q must have 12 tokens, got 6"):
        nf.softmax_attention(q, q, q, locality=G((3, 4), 1))
    with pytest.raises(ValueError, match="grids cannot be packed"):
        nf.softmax_attention(q, q, q, locality=locality, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32, device=DEVICE))
    with pytest.raises(TypeError, match="locality must be None, a SlidingWindow, a GridNeighborhood or a ShiftedWindow"):
        nf.softmax_attention(q, q, q, locality=3)
    with pytest.raises(ValueError, match="no kernel of softmax and affine attention serves grids yet"):
        nf.softmax_attention(q, q, q, locality=locality, backend="triton")
