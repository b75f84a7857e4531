"""Statistics and geometry of weights with a selection, sinks, alpha and beta: those that the operators use.

The oracle has N x M weights in float64, once as the operators return them for values that are columns of the identity, and once
by formulas that share no code with nearfar.
"""

import math

import pytest
import torch
from harness import DEVICE, DTYPES, LAYOUTS, accumulation, assert_accurate, generator, leaves, poison, randn, run
from harness import Sample as Call

import nearfar as nf

NUMBERS = ("lse", "entropy", "max_weight", "key_mass", "mean_logit", "weight_sum")
W, G = nf.SlidingWindow, nf.GridNeighborhood((4, 5), 1, global_tokens=2)

# Names of random tensors, then options. The operator whose weights they are follows from them.
CASES = {
    "krause, top_k": (("sigma",), dict(locality=W(9), top_k=4)),
    "krause, top_k larger than the window": (("sigma",), dict(locality=W(2, 1), top_k=9)),
    "krause, grid, top_k": (("sigma",), dict(locality=G, top_k=3)),
    "softmax, sink": (("sink",), dict(locality=W(-1, 0))),
    "softmax, grid, sink": (("sink",), dict(locality=G)),
    "affine": (("alpha", "beta"), dict(scale=-0.4)),
    "affine, window, sink": (("alpha", "beta", "sink"), dict(locality=W(8, 3))),
    "affine, alpha alone": (("alpha",), dict(locality=W(-1, 0))),
    "affine, shifted window": (("beta",), dict(locality=nf.ShiftedWindow((4, 6), 2, 1))),
}
# No operator has these weights.
OTHERS = {
    "by distance, sink, alpha, beta": (("sigma", "alpha", "beta", "sink"), dict(locality=W(8, 3))),
    "softmax, top_k, sink": (("sink",), dict(top_k=5)),
}
ON_KERNELS = [name for name, (_, options) in (CASES | OTHERS).items()
              if isinstance(options.get("locality", W(1)), W) and "top_k" not in options]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(case, dtype=torch.float64, length=21, more=6, device=DEVICE):
    names, options = (CASES | OTHERS)[case]
    locality = options.get("locality")
    if hasattr(locality, "num_tokens"):
        length, more = locality.num_tokens, 0
    heads, wide = 4, accumulation(dtype)
    uniform = torch.rand(2, heads, length, generator=generator(3))
    tensors = {
        "q": randn(2, heads, length, 16, dtype=dtype, seed=1, device=device),
        "k": randn(2, 2, length + more, 16, dtype=dtype, seed=2, device=device),
        "sigma": (2 + uniform[0, :, 0]).to(device, wide),
        "alpha": (0.2 + uniform).to(device, wide),
        "beta": 0.05 * randn(2, heads, length, dtype=wide, seed=4, device=device),
        "sink": randn(heads, dtype=wide, seed=5, device=device),
    }
    return Call({name: tensors[name] for name in ("q", "k", *names)}, options)


def visible(call):
    """(N, M), by the definition that localities have."""
    num_queries, num_keys = call.tensors["q"].shape[2], call.tensors["k"].shape[2]
    key = torch.arange(num_keys)
    query = torch.arange(num_queries)[:, None] + num_keys - num_queries
    locality = call.options.get("locality")
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool) if locality is None else locality.visible(query, key)
    return seen.to(call.tensors["q"].device)


def dense(call, q, k, sigma=None, alpha=None, beta=None, sink=None):
    """(scores, keep, weights, lse, entropy), pair by pair, in the dtype of q."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = call.options.get("scale") or q.shape[-1] ** -0.5
    if sigma is None:
        scores = (q[:, :, :, None] * keys[:, :, None]).sum(-1) * scale
    else:
        scores = (q[:, :, :, None] - keys[:, :, None]).square().sum(-1) / (-2 * sigma[:, None, None].square())
    keep = visible(call).expand(scores.shape)
    if top_k := call.options.get("top_k"):
        ranks = scores.masked_fill(~keep, -math.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        keep = keep & (ranks < top_k)
    total = scores.masked_fill(~keep, -math.inf).exp().sum(-1)
    if sink is not None:
        total = total + sink[:, None].exp()
    weights = scores.exp() / total[..., None]
    if alpha is not None:
        weights = weights * alpha[..., None]
    if beta is not None:
        weights = weights + beta[..., None]
    weights = torch.where(keep, weights, 0)
    return scores, keep, weights, total.log(), entropy_of(weights, keep)


def entropy_of(weights, keep):
    shares = torch.where(keep, weights.abs() / weights.abs().sum(-1, keepdim=True), 1)
    return -(shares * shares.log()).sum(-1)


def expected_numbers(scores, keep, weights):
    highest = scores.masked_fill(~keep, -math.inf).argmax(-1, keepdim=True)
    return {
        "max_weight": weights.gather(-1, highest)[..., 0],
        "key_mass": weights.sum(-2),
        "mean_logit": torch.where(keep, scores, 0).sum(-1) / keep.sum(-1),
        "weight_sum": weights.sum(-1),
    }


def operators_weights(call):
    """(B, Hq, N, M): what the operator returns for values that are columns of the identity."""
    tensors, options = dict(call.tensors), dict(call.options)
    k = tensors["k"]
    tensors["v"] = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
    if "sigma" in tensors:
        return nf.krause_attention(**tensors, **options, backend="reference")
    if "alpha" in tensors or "beta" in tensors:
        return nf.affine_attention(**{"alpha": None, "beta": None} | tensors, **options, backend="reference")
    return nf.softmax_attention(**tensors, **options, backend="reference")


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_the_operators(case):
    call = make(case)
    found = nf.attention_statistics(**call.tensors, **call.options, backend="reference")
    weights, keep = operators_weights(call), dense(call, **call.tensors)[1]
    assert torch.equal(weights != 0, keep)
    close = dict(rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.entropy, entropy_of(weights, keep), **close)
    torch.testing.assert_close(found.weight_sum, weights.sum(-1), **close)
    torch.testing.assert_close(found.key_mass, weights.sum(-2), **close)
    torch.testing.assert_close(found.first_mass(3), weights[..., :3].sum(-1).mean(-1), **close)
    torch.testing.assert_close(found.max_weight, weights.gather(-1, found.max_key[..., None])[..., 0], **close)
    largest = weights.masked_fill(~keep, -math.inf).amax(-1)
    torch.testing.assert_close(found.max_weight, largest, **close)  # as alpha is positive
    top_k = call.options.get("top_k")
    assert top_k is None or (found.effective_support <= top_k + 1e-9).all()


def test_a_selection_bounds_the_support():
    """What the statistics once said of Krause attention was the support of the whole window."""
    q = randn(1, 2, 200, 32, dtype=torch.float64, device="cpu")
    options = dict(sigma=5.5, locality=W(31))
    whole = nf.attention_statistics(q, q, **options).effective_support[..., 40:].mean()
    kept = nf.attention_statistics(q, q, **options, top_k=16).effective_support[..., 40:].mean()
    assert 25 < whole < 32 and 10 < kept < 16


def evaluated(call, dtype):
    """The six numbers, and the gradients of lse and entropy, by the dense formulas in this dtype."""
    tensors = {name: x.detach().to(dtype).requires_grad_() for name, x in call.tensors.items()}
    scores, keep, weights, *differentiable = dense(call, **tensors)
    do = [x.to(dtype) for x in upstream_of(differentiable)]
    gradients = torch.autograd.grad(differentiable, list(tensors.values()), do)
    numbers = dict(zip(("lse", "entropy"), differentiable, strict=True)) | expected_numbers(scores, keep, weights)
    return {name: x.detach() for name, x in numbers.items()}, dict(zip(tensors, gradients, strict=True))


def scales(call):
    """What the roundings of the gradients are relative to: every sum with its terms by absolute value, in float64.

    A weight alpha P + beta near 0 is off by the roundings of its two terms, and its logarithm by that over the weight.
    """
    x = {name: tensor.double() for name, tensor in call.tensors.items()}
    scores, keep, weights, lse, entropy = dense(call, **x)
    alpha, beta = (x.get(name, torch.full_like(lse, other)) for name, other in (("alpha", 1.0), ("beta", 0.0)))
    dlse, dentropy = (part.abs()[..., None] for part in upstream_of((lse, entropy)))
    softmax = torch.where(keep, (scores - lse[..., None]).exp(), 0)
    exponent = 1 + scores.abs() + lse.abs()[..., None]
    total = weights.abs().sum(-1, keepdim=True)
    sizes = torch.where(keep, weights.abs(), total)
    off = (alpha[..., None] * softmax * exponent + beta.abs()[..., None]) / sizes
    of_weights = torch.where(keep, dentropy / total * ((sizes / total).log().abs() + entropy[..., None] + off), 0)
    of_softmax = (softmax * exponent * of_weights).sum(-1)
    of_scores = softmax * (dlse + alpha[..., None] * (exponent * of_weights + of_softmax[..., None]))
    keys = x["k"].repeat_interleave(2, 1).abs()
    factor = abs(call.options.get("scale") or keys.shape[-1] ** -0.5)
    found = {"alpha": of_softmax, "beta": of_weights.sum(-1), "sink": (dlse[..., 0] + alpha * of_softmax).sum((0, 2))}
    found |= {"q": factor * of_scores @ keys, "k": factor * of_scores.mT @ x["q"].abs()}
    if "sigma" in x:
        precision = x["sigma"][:, None, None] ** -2
        found["q"] = precision * (of_scores @ keys + of_scores.sum(-1, keepdim=True) * x["q"].abs())
        found["k"] = precision * (of_scores.mT @ x["q"].abs() + of_scores.sum(-2)[..., None] * keys)
        found["sigma"] = 2 / x["sigma"] * (of_scores * scores.abs()).sum((0, 2, 3))
    found["k"] = found["k"].unflatten(1, (2, 2)).sum(2)
    return found


def upstream_of(outputs):
    return tuple(randn(*x.shape, dtype=torch.float64, seed=7 + i, device=x.device) for i, x in enumerate(outputs))


def measured(call, backend):
    """The six numbers and the gradients of lse and entropy."""
    tensors = leaves(call)
    found = nf.attention_statistics(**tensors, **call.options, backend=backend)
    do = [x.to(found.lse.dtype) for x in upstream_of(found[:2])]
    gradients = torch.autograd.grad(found[:2], list(tensors.values()), do, allow_unused=True, materialize_grads=True)
    return {name: getattr(found, name).detach() for name in NUMBERS}, dict(zip(tensors, gradients, strict=True))


@pytest.mark.parametrize("case", CASES | OTHERS)
def test_the_reference_against_dense_formulas(case):
    call = make(case)
    for found, exact in zip(measured(call, "reference"), evaluated(call, torch.float64), strict=True):
        for name, expected in exact.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12, msg=name)


@each_dtype
@pytest.mark.parametrize("case", ON_KERNELS)
def test_kernels_against_dense_formulas(case, dtype):
    """The rule of accuracy; scores and the logarithms of weights are at most 8 here."""
    call = make(case, dtype)
    wide = accumulation(dtype)
    (numbers, gradients), exact, plain = measured(call, "triton"), evaluated(call, torch.float64), evaluated(call, wide)
    sizes = scales(call)
    for name, got in numbers.items():
        assert got.dtype == wide
        scale = exact[0][name].abs() + (8 if name in ("lse", "entropy", "mean_logit") else 1)
        assert_accurate(name, got, exact[0][name], plain[0][name], scale, wide)
    for name, got in gradients.items():
        assert got.dtype == call.tensors[name].dtype
        assert_accurate(f"gradient of {name}", got, exact[1][name], plain[1][name], sizes[name], dtype)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_known_weights(backend):
    """Equal keys: the softmax weights are 1 / (n + e^sink), and those with a beta add up to 1 - n / 2 m, of both signs."""
    q, k = torch.zeros(1, 1, 4, 16, device=DEVICE), randn(1, 1, 4, 16)
    sink = torch.tensor([2.0], device=DEVICE).log()
    found = nf.attention_statistics(q, k, causal=True, sink=sink, backend=backend)
    seen = torch.arange(1.0, 5.0, device=DEVICE).expand(1, 1, 4)
    torch.testing.assert_close(found.lse, (seen + 2).log())
    torch.testing.assert_close(found.weight_sum, seen / (seen + 2))
    torch.testing.assert_close(found.effective_support, seen)
    torch.testing.assert_close(found.first_mass(), (1 / (seen + 2)).mean(-1))
    # Weights of 1/2 and three times 1/6, less 1/4 each: shares of 1/2 and three times 1/6.
    k = torch.zeros(1, 1, 4, 16, device=DEVICE)
    k[0, 0, 2, 0], q = math.log(3), torch.zeros(1, 1, 1, 16, device=DEVICE)
    q[..., 0] = 1
    found = nf.attention_statistics(q, k, scale=1.0, beta=torch.full((1, 1, 1), -0.25, device=DEVICE), backend=backend)
    assert found.entropy.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(6), rel=1e-5)
    assert found.max_weight.item() == pytest.approx(0.25, rel=1e-5) and found.max_key.item() == 2
    assert found.weight_sum.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_weights_that_are_all_zero_have_no_entropy(backend):
    q, zeros = randn(1, 1, 3, 16), torch.zeros(1, 1, 3, device=DEVICE)
    found = nf.attention_statistics(q, q, alpha=zeros, beta=zeros, backend=backend)
    assert found.entropy.isnan().all() and found.lse.isfinite().all() and (found.key_mass == 0).all()


@pytest.mark.parametrize("case, backend", [
    ("krause, top_k", "reference"), ("affine, window, sink", "reference"), ("affine, window, sink", "triton"),
])
def test_the_last_query_is_as_among_all(case, backend):
    call = make(case, torch.float32)
    every, last = (nf.attention_statistics(**call.tensors, **call.options, queries=queries, backend=backend)
                   for queries in ("all", "last"))
    for name in ("lse", "entropy", "max_weight", "max_key", "mean_logit", "weight_sum"):
        assert getattr(last, name).shape == (2, 4, 1)
        torch.testing.assert_close(getattr(last, name), getattr(every, name)[..., -1:], rtol=1e-5, atol=1e-6)
    weights = dense(call, **call.tensors)[2]
    torch.testing.assert_close(last.key_mass, weights[:, :, -1], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("kind", ["norm", "cosine"])
@pytest.mark.parametrize("case", [name for name in CASES | OTHERS if "alone" not in name])
def test_geometry_by_distances(case, kind):
    call = make(case)
    v = randn(2, 2, call.tensors["k"].shape[2], 24, dtype=torch.float64, seed=6)
    found = nf.selection_geometry(**call.tensors, v=v, top_n=2, distance=kind, **call.options, backend="reference")
    scores, keep, weights, _, _ = dense(call, **call.tensors)
    order = scores.masked_fill(~keep, -math.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    chosen, others = keep & (order < 2), keep & (order >= 2)
    y = weights[..., None] * v.repeat_interleave(2, 1)[:, :, None]
    s = (y * chosen[..., None]).sum(-2, keepdim=True)
    distance = (y - s).norm(dim=-1) if kind == "norm" else 1 - torch.cosine_similarity(y, s, dim=-1)
    farthest = distance.masked_fill(~chosen, -math.inf).amax(-1, keepdim=True)
    nearest = distance.masked_fill(~others, math.inf).amin(-1, keepdim=True)
    precision = chosen.sum(-1) / (chosen.sum(-1) + (others & (distance <= farthest)).sum(-1))
    recall = (chosen & (distance < nearest)).sum(-1) / chosen.sum(-1)
    torch.testing.assert_close(found.precision, precision.double())
    torch.testing.assert_close(found.recall, recall.double())


def test_geometry_of_the_last_query():
    call = make("affine, window, sink")
    v = randn(2, 2, call.tensors["k"].shape[2], 24, dtype=torch.float64, seed=6)
    every, last = (nf.selection_geometry(**call.tensors, v=v, top_n=3, **call.options, queries=queries, backend="reference")
                   for queries in ("all", "last"))
    for a, b in zip(every, last, strict=True):
        assert torch.equal(a[..., -1:], b)


def test_sinks_and_alpha_change_no_geometry():
    """So the kernels serve them: they multiply all weights of a query."""
    call = make("affine, window, sink", torch.float32)
    v, beta = randn(2, 2, call.tensors["k"].shape[2], 24, seed=6), call.tensors.pop("beta")
    plain = {name: call.tensors[name] for name in "qk"}
    bare = nf.selection_geometry(**plain, v=v, top_n=3, **call.options, backend="triton")
    for a, b in zip(bare, nf.selection_geometry(**call.tensors, v=v, top_n=3, **call.options, backend="triton"), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="no kernel of the geometry knows weights with a beta"):
        nf.selection_geometry(**call.tensors, beta=beta, v=v, top_n=3, **call.options, backend="triton")


# ------------------------------------------------------------------------------------------------- promises of operators


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_a_query_cannot_see_changes_no_bit(backend):
    """Neither NaN does, of keys and of numbers of queries."""
    call = make("affine, window, sink", torch.float32)
    other = {name: x.clone() for name, x in call.tensors.items()}
    other["k"][:, :, 20:] = math.nan
    other["q"][:, :, 17], other["alpha"][:, :, 18], other["beta"][:, :, 19] = math.nan, math.nan, math.nan
    before, after = (nf.attention_statistics(**x, **call.options, backend=backend) for x in (call.tensors, other))
    settled = 20 - 3 - 6  # queries come 6 keys behind, and see 3 ahead
    for name in (*NUMBERS, "max_key"):
        a, b = getattr(before, name), getattr(after, name)
        if name == "key_mass":
            assert torch.equal(a[..., : settled + 6 - 8], b[..., : settled + 6 - 8])
        else:
            assert torch.equal(a[..., :settled], b[..., :settled]), name
        if name in ("lse", "entropy", "max_weight", "mean_logit", "weight_sum"):
            assert b[..., settled:].isnan().all(), name


@pytest.mark.full
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_any_layout_gives_the_same_numbers(backend):
    call = make("by distance, sink, alpha, beta", torch.float32)
    expected = measured(call, backend)
    for layout in ("tokens before heads", "every other row", "slice of wider rows"):
        tensors = {name: LAYOUTS[layout](x) if x.dim() == 4 else x for name, x in call.tensors.items()}
        tensors |= {name: LAYOUTS[layout](call.tensors[name][..., None])[..., 0] for name in ("alpha", "beta")}
        assert any(not x.is_contiguous() for x in tensors.values())
        for old, new in zip(expected, measured(Call(tensors, call.options), backend), strict=True):
            for name, x in old.items():
                torch.testing.assert_close(new[name], x, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.full
def test_every_element_is_written():
    call = make("by distance, sink, alpha, beta", torch.float16)
    first = measured(call, "triton")
    with poison():
        again = measured(call, "triton")
    for old, new in zip(first, again, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.full
def test_shifted_entropy_as_a_torch_operator():
    call = make("affine, window, sink", torch.float32)
    q, k, alpha, beta, _ = (x.requires_grad_() for x in leaves(call).values())
    lse = nf.attention_statistics(q, k, **call.options).lse.detach().requires_grad_()
    arguments = q, k, None, alpha, beta, lse, 8, 3, 0.25
    torch.library.opcheck(torch.ops.nearfar.shifted_entropy.default, arguments)
    outputs = [x.detach() for x in torch.ops.nearfar.shifted_entropy(*arguments)]
    backward = torch.randn_like(outputs[0]), *arguments[:6], *outputs, *arguments[6:]
    torch.library.opcheck(torch.ops.nearfar.shifted_entropy_backward.default, [
        x.detach() if isinstance(x, torch.Tensor) else x for x in backward
    ])


@pytest.mark.full
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_torch_compile(backend):
    call = make("affine, window, sink", torch.float32)
    torch._dynamo.reset()

    def entropy(**tensors):
        return nf.attention_statistics(**tensors, **call.options, backend=backend).entropy

    expected = run(lambda backend, **tensors: entropy(**tensors), Call(call.tensors, {}))
    compiled = torch.compile(entropy, fullgraph=True, backend="aot_eager")
    found = run(lambda backend, **tensors: compiled(**tensors), Call(call.tensors, {}))
    torch.testing.assert_close(found[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_second_derivatives_of_the_reference():
    call = make("affine, window, sink", length=5, more=2)
    tensors = [x[:1] if x.dim() > 1 else x for x in call.tensors.values()]

    def entropy(*tensors):
        return nf.attention_statistics(**dict(zip(call.tensors, tensors, strict=True)), **call.options).entropy.sum()

    assert torch.autograd.gradgradcheck(entropy, [x.requires_grad_() for x in tensors])


# ----------------------------------------------------------------------------------------------------------- bad input

BAD = {
    "top_k zero": (ValueError, "^top_k must be at least 1, got 0", {"top_k": 0}),
    "alpha a float": (TypeError, "^alpha must be a torch.Tensor, got float", {"alpha": 1.0}),
    "beta of keys": (ValueError, r"^beta must have shape \(B, Hq, N\).*\(1, 2, 6\), got \(1, 2, 7\)",
                     {"beta": torch.ones(1, 2, 7)}),
    "sink per key head": (ValueError, r"^sink must have shape \(Hq,\).*\(2,\), got \(1,\)", {"sink": torch.ones(1)}),
    "queries unknown": (ValueError, "^queries must be \"all\" or \"last\", got 'first'", {"queries": "first"}),
    "last of a grid": (ValueError, '^queries="last" is for sequences',
                       {"queries": "last", "locality": nf.ShiftedWindow((2, 3), 1)}),
    "alpha of the last query": (ValueError, r"^alpha must have shape", {"queries": "last", "alpha": torch.ones(1, 2, 1)}),
    "causal grid": (ValueError, "^causal is for sequences", {"causal": True, "locality": nf.ShiftedWindow((2, 3), 1)}),
    "grid of other tokens": (ValueError, "^locality: shape .2, 2. has 4 cells", {"locality": nf.ShiftedWindow((2, 2), 1)}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, options = BAD[case]
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    q, k, v = randn(1, 2, 6, 16), randn(1, 1, 6, 16), randn(1, 1, 6, 16)
    with pytest.raises(error, match=message):
        nf.attention_statistics(q, k, **options)
    with pytest.raises(error, match=message):
        nf.selection_geometry(q, k, v, 2, **options)


def test_an_unknown_distance():
    q = randn(1, 2, 6, 16)
    with pytest.raises(ValueError, match='^distance must be "norm" or "cosine", got \'l1\''):
        nf.selection_geometry(q, q, q, 2, distance="l1")
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: the kernels compare norms"):
        nf.selection_geometry(q, q, q, 2, distance="cosine", backend="triton")


def test_what_kernels_lack_has_a_reason():
    q = randn(1, 2, 6, 16)
    sink = torch.zeros(2, device=DEVICE)
    assert "know no alpha, beta or sink" in nf.explain(nf.attention_statistics, q, q, sink=sink, backend="cuda").split("\n")[0]
    for options, reason in (({"top_k": 2}, "selects top_k keys"), ({"locality": nf.ShiftedWindow((2, 3), 1)}, "serves grids")):
        for backend in ("cuda", "triton"):
            with pytest.raises(ValueError, match=f"backend='{backend}' cannot serve this call: no kernel .*{reason}"):
                nf.attention_statistics(q, q, **options, backend=backend)
