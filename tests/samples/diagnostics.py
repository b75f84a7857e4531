"""Streamed diagnostics: dense oracles with N x M weights, and sample calls of attention_statistics.

The generic tests differentiate what they call, so they get lse and entropy. The constants beside them, and selection_geometry,
which has no gradients at all, are tested in test_diagnostics.py.
"""

import torch
from harness import DEVICE, Sample, accumulation, assert_accurate, generator, randn

import nearfar as nf

SAMPLES = {
    "attention_statistics": {
        "statistics, causal, grouped heads": dict(causal=True, heads=(4, 2)),
        "statistics, by distance": dict(locality=nf.SlidingWindow(20, 9), heads=(4, 2), sigma=True),
        "statistics, more keys than queries": dict(more_keys=30, scale=-0.3),
    },
}
FUNCTIONS = {"attention_statistics": lambda *args, **keywords: tuple(nf.attention_statistics(*args, **keywords)[:2])}


def make(name, dtype, device=DEVICE, length=75):
    options = dict(SAMPLES["attention_statistics"][name])
    heads, kv_heads = options.pop("heads", (2, 2))
    keys, by_distance = length + options.pop("more_keys", 0), options.pop("sigma", False)
    batch = 1 if heads > 2 else 2
    tensors = {
        "q": randn(batch, heads, length, 24, dtype=dtype, seed=1, device=device),
        "k": randn(batch, kv_heads, keys, 24, dtype=dtype, seed=2, device=device),
    }
    if by_distance:
        scalars = torch.promote_types(dtype, torch.float32)
        tensors["sigma"] = (2 + torch.rand(heads, generator=generator(3))).to(device, scalars)
    return Sample(tensors, options)


def compile_lengths(name):
    return (35, 50, 71)


# -------------------------------------------------------------------------------------------------------------- oracle


def window(options):
    locality = options.get("locality")
    left, right = (-1, -1) if locality is None else (locality.left, locality.right)
    return left, 0 if options.get("causal") else right


def visible(q, k, options):
    """(N, M) mask of the pairs that causality and the locality allow."""
    left, right = window(options)
    position = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    distance = torch.arange(k.shape[2]) - position
    return (((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))).to(q.device)


def to_query_heads(q, kv):
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)


def score_factor(options, q):
    scale = options.get("scale")
    return q.shape[3] ** -0.5 if scale is None else scale


def dense_scores(options, q, k, sigma=None):
    """(B, Hq, N, M) scores, pair by pair; -inf where a query does not see a key."""
    keys = to_query_heads(q, k)[:, :, None]
    if sigma is None:
        scores = (q[:, :, :, None] * keys).sum(-1) * score_factor(options, q)
    else:
        scores = -(q[:, :, :, None] - keys).square().sum(-1) / (2 * sigma.reshape(-1, 1, 1).square())
    return scores.masked_fill(~visible(q, k, options), float("-inf"))


def plain_scores(options, q, k, sigma=None):
    """The same by a product, in the dtype of q."""
    keys = to_query_heads(q, k)
    scores = q @ keys.mT
    if sigma is None:
        scores = scores * score_factor(options, q)
    else:
        squares = q.square().sum(-1)[..., None] + keys.square().sum(-1)[..., None, :]
        scores = (scores - squares / 2) / sigma.to(q.dtype).reshape(-1, 1, 1).square()
    return scores.masked_fill(~visible(q, k, options), float("-inf"))


def lse_and_entropy(scores):
    lse, hidden = scores.logsumexp(-1), scores == float("-inf")
    log_weight = (scores.masked_fill(hidden, 0) - lse[..., None]).masked_fill(hidden, 0)
    return lse, -(log_weight.exp().masked_fill(hidden, 0) * log_weight).sum(-1)


def scales(options, do, q, k, sigma=None):
    """lse, entropy and gradients with every term by its absolute value: what their roundings are relative to."""
    scores = dense_scores(options, q, k, sigma)
    lse, entropy = lse_and_entropy(scores)
    weight = (scores - lse[..., None]).exp()
    seen = weight > 0
    # A score is rounded relative to its terms, and so are the exponentials and logarithms made of it.
    factor = torch.full((q.shape[1],), abs(score_factor(options, q)), dtype=q.dtype, device=q.device)
    keys = to_query_heads(q, k).abs()
    terms = q.abs() @ keys.mT
    if sigma is not None:
        factor = sigma.square().reciprocal().expand(q.shape[1])
        terms = terms + (q.square().sum(-1)[..., None] + keys.square().sum(-1)[..., None, :]) / 2
    factor = factor[:, None, None]
    size = torch.where(seen, terms * factor + lse.abs()[..., None], 0)
    log_weight = torch.where(seen, (scores - lse[..., None]).abs(), 0)
    typical = (weight * size).sum(-1)
    scale_of_entropy = entropy + (weight * size * (1 + log_weight + entropy[..., None])).sum(-1)
    dlse, dentropy = (part.abs()[..., None] for part in do)
    ds = weight * (dlse + dentropy * (log_weight + entropy[..., None])) * (1 + size)

    def group_sum(x):
        return x.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1])).sum(2)

    gradients = {"q": factor * (ds @ keys), "k": group_sum((factor * ds).mT @ q.abs())}
    if sigma is not None:
        gradients["q"] += factor * ds.sum(-1, keepdim=True) * q.abs()
        gradients["k"] += group_sum((factor * ds).sum(-2)[..., None] * keys)
        gradients["sigma"] = (2 / sigma) * (ds * torch.where(seen, terms * factor, 0)).sum((0, 2, 3))
    return (lse.abs() + typical, scale_of_entropy), gradients


def check(sample, do, o, gradients):
    """Assert the rule of accuracy for lse, entropy and their gradients."""
    tensors, options = sample.tensors, sample.options
    dtype = tensors["q"].dtype

    def evaluate(scores, dtype):
        inputs = {n: t.detach().to(dtype if n in "qk" else torch.promote_types(dtype, torch.float32)).requires_grad_()
                  for n, t in tensors.items()}
        results = lse_and_entropy(scores(options, **inputs))
        upstream = [part.to(result.dtype) for part, result in zip(do, results, strict=True)]
        found = torch.autograd.grad(results, list(inputs.values()), upstream)
        return [result.detach() for result in results], dict(zip(tensors, found, strict=True))

    single = accumulation(dtype)
    exact, rough = evaluate(dense_scores, torch.float64), evaluate(plain_scores, single)
    scale = scales(options, [part.double() for part in do], **{n: t.detach().double() for n, t in tensors.items()})
    for index, name in enumerate(("lse", "entropy")):
        assert o[index].dtype == single
        assert_accurate(name, o[index], exact[0][index], rough[0][index], scale[0][index], single)
    for name in tensors:
        assert gradients[name].dtype == tensors[name].dtype
        assert_accurate(f"gradient of {name}", gradients[name], exact[1][name], rough[1][name], scale[1][name], dtype)


def reach(sample):
    """(N, M) mask: which tokens a row of the output may depend on."""
    return visible(sample.tensors["q"], sample.tensors["k"], sample.options)


# ----------------------------------------------------------------------------------------------------- torch operators


def op_arguments(sample):
    q, k = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (sample.tensors["q"], sample.tensors["k"]))
    sigma = sample.tensors.get("sigma")
    return q, k, sigma, None, None, None, *window(sample.options), 1.0 if sigma is not None else score_factor(sample.options, q)


def backward_arguments(sample, do, outputs):
    q, k, sigma, _, _, _, *options = op_arguments(sample)
    return *do, q, k, sigma, *outputs[:2], *options


def random_sample(dtype=torch.float32, length=70, keys=None, heads=(2, 1), width=16, value_width=16, sigma=None, **options):
    keys = length if keys is None else keys
    tensors = {
        "q": randn(1, heads[0], length, width, dtype=dtype, seed=1),
        "k": randn(1, heads[1], keys, width, dtype=dtype, seed=2),
        "v": randn(1, heads[1], keys, value_width, dtype=dtype, seed=3),
    }
    if sigma is not None:
        tensors["sigma"] = torch.full((heads[0],), sigma, device=DEVICE)
    return Sample(tensors, options)


def statistics(sample, backend="triton"):
    tensors = {name: tensor for name, tensor in sample.tensors.items() if name != "v"}
    return nf.attention_statistics(**tensors, **sample.options, backend=backend)


def geometry(sample, top_n, backend="triton"):
    return nf.selection_geometry(**sample.tensors, top_n=top_n, **sample.options, backend=backend)


def exponent_size(scores, q, k, sigma=None):
    """What the roundings of a weight's exponent are relative to, with terms that cancel by their absolute values."""
    size = 1 + scores.masked_fill(scores == float("-inf"), 0).abs() + scores.logsumexp(-1, keepdim=True).abs()
    return size if sigma is None else size + (q.square().sum(-1) / sigma[:, None].square())[..., None]


def check_constants(sample, found):
    tensors = {name: tensor.double() for name, tensor in sample.tensors.items() if name != "v"}
    scores = dense_scores(sample.options, **tensors)
    weights = scores.softmax(-1)
    single = torch.promote_types(sample.tensors["q"].dtype, torch.float32)
    plain = plain_scores(sample.options, **{name: tensor.to(single) for name, tensor in tensors.items()}).softmax(-1)
    size = exponent_size(scores, **tensors)
    exact, rough, scale = ((w.amax(-1), w.sum(-2)) for w in (weights, plain, weights * size))
    for name, *expected in zip(("max_weight", "key_mass"), exact, rough, scale, strict=True):
        got = getattr(found, name)
        assert got.dtype == single and not got.requires_grad
        assert_accurate(name, got, *expected, single)
    assert found.max_key.dtype == torch.int64
    assert found.max_key.min() >= 0 and found.max_key.max() < weights.shape[-1]
    # A key of the largest weight, to within rounding.
    chosen = weights.gather(-1, found.max_key[..., None])[..., 0]
    assert (chosen >= exact[0] * (1 - 64 * torch.finfo(single).eps * size.amax(-1))).all()
    assert torch.equal(found.effective_support, found.entropy.exp())


def check_geometry(sample, top_n, found, exactly=0.9):
    """Counts lie between those with distances moved by rounding either way; a share `exactly` of the rows leaves no room.

    Rows whose selection a rounding of the scores can change are left out; they may be few.
    """
    tensors, dtype = {name: tensor.double() for name, tensor in sample.tensors.items()}, sample.tensors["q"].dtype
    values = to_query_heads(tensors["q"], tensors.pop("v"))
    scores = dense_scores(sample.options, **tensors)
    num_keys = scores.shape[-1]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(num_keys, device=order.device).expand_as(order))
    visible = scores > float("-inf")
    selected, outside = visible & (rank < top_n), visible & (rank >= top_n)
    count = selected.sum(-1)
    ordered = scores.gather(-1, order)
    clear, single = torch.ones_like(count, dtype=torch.bool), torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    exponent = exponent_size(scores, **tensors)
    if num_keys > top_n:
        last, next_ = ordered[..., top_n - 1], ordered[..., top_n]
        clear = (next_ == float("-inf")) | (last - next_ > 4 * single * exponent.amax(-1)) | (last == next_)

    weights = scores.softmax(-1)
    y = weights[..., None] * values[:, :, None]
    s = (y * selected[..., None]).sum(-2)
    squares = (y - s[:, :, :, None]).square().sum(-1)
    # A half-precision s is rounded as such, by half an eps, which makes a quarter of eps * size; weights are float32.
    size = weights * (weights * values.square().sum(-1)[:, :, None] + 2 * (values.abs() @ s.abs().mT).mT)
    error = (0.5 * torch.finfo(dtype).eps + 2 * single * exponent) * size + 1e-15 * squares
    infinity, bounds = float("inf"), []
    for sign in (-1, 1):
        farthest = (squares + sign * error).masked_fill(~selected, -infinity).amax(-1, keepdim=True)
        nearest = (squares + sign * error).masked_fill(~outside, infinity).amin(-1, keepdim=True)
        intruders = (outside & (squares - sign * error <= farthest)).sum(-1)
        separated = (selected & (squares - sign * error < nearest)).sum(-1)
        bounds.append((count / (count + intruders), separated / count))
    (high_precision, low_recall), (low_precision, high_recall) = bounds
    tolerance = 4 * torch.finfo(torch.float32).eps
    for got, low, high in (
        (found.precision, low_precision, high_precision), (found.recall, low_recall, high_recall)
    ):
        right = (got >= low * (1 - tolerance)) & (got <= high * (1 + tolerance))
        assert (right | ~clear).all(), f"{(~right & clear).sum()} of {clear.sum()} rows are wrong"
        assert not exactly or (low == high)[clear].double().mean() >= exactly, "the bounds are too wide to tell anything"
    f_score = 2 * found.precision * found.recall / (found.precision + found.recall)
    torch.testing.assert_close(found.f_score, f_score, rtol=1e-6, atol=0)
    assert not exactly or clear.double().mean() >= 0.9
