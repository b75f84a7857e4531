"""Affine-scaled and softmax attention: the dense oracle, with N x N masks and weights, and sample calls."""

import itertools

import torch
from harness import (
    DEVICE,
    Sample,
    accumulation,
    assert_accurate,
    furthest,
    generator,
    normalized,
    randn,
    rounds_like_kernels,
    with_gradient_in,
)

import nearfar as nf

SAMPLES = {
    "affine_attention": {
        "affine, full": dict(),
        "affine, causal, grouped heads": dict(causal=True, heads=(4, 2)),
        "affine, two-sided window, sink": dict(window_size=(20, 9), heads=(4, 2), sink=True),
        "affine, packed, causal": dict(causal=True, packed=True),
    },
    "softmax_attention": {
        "softmax, causal, sink": dict(causal=True, sink=True),
        "softmax, packed with other keys, causal": dict(causal=True, heads=(4, 2), packed=True, more_keys=30),
        "softmax, more keys than queries": dict(heads=(4, 2), more_keys=30, window_size=(40, -1)),
    },
}
FUNCTIONS = {"affine_attention": nf.affine_attention, "softmax_attention": nf.softmax_attention}


def make(name, dtype, device=DEVICE, length=75):
    operator = next(operator for operator, samples in SAMPLES.items() if name in samples)
    options = dict(SAMPLES[operator][name])
    (heads, kv_heads), packed = options.pop("heads", (2, 2)), options.pop("packed", False)
    keys, sink = length + options.pop("more_keys", 0), options.pop("sink", False)
    batch = 1 if packed or heads > 2 else 2
    if packed:
        ends = [0, length // 3, length // 3, 2 * length // 3, length]
        options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
        if keys > length:  # of one sequence more, of two less, and those of one without queries
            ends_k = [0, keys // 2, keys // 2 + 7, keys // 2 + 9, keys]
            options["cu_seqlens_k"] = torch.tensor(ends_k, dtype=torch.int32, device=device)
    tensors = {
        "q": randn(batch, heads, length, 24, dtype=dtype, seed=1, device=device),
        "k": randn(batch, kv_heads, keys, 24, dtype=dtype, seed=2, device=device),
        "v": randn(batch, kv_heads, keys, 16, dtype=dtype, seed=3, device=device),
    }
    scalars = torch.promote_types(dtype, torch.float32)
    if operator == "affine_attention":
        tensors |= random_rows((batch, heads, length), scalars, device)
    if sink:
        tensors["sink"] = randn(heads, dtype=scalars, seed=6, device=device)
    return Sample(tensors, options)


def random_rows(shape, dtype=torch.float32, device=DEVICE, seed=4):
    """alpha in [0, 1] as the layer makes it, and beta of either sign, of the size of the weights."""
    alpha = torch.rand(shape, generator=generator(seed)).to(device, dtype)
    return {"alpha": alpha, "beta": randn(*shape, dtype=dtype, seed=seed + 1, device=device) / max(shape[2], 1) ** 0.5}


def compile_lengths(name):
    return (35, 50, 71)


# -------------------------------------------------------------------------------------------------------------- oracle


def window(options):
    left, right = options.get("window_size", (-1, -1))
    return left, 0 if options.get("causal") else right


def visible(sample):
    """(N, M) mask of the pairs that causality, window and packing allow."""
    q, k = sample.tensors["q"], sample.tensors["k"]
    left, right = window(sample.options)
    distance = torch.arange(k.shape[2])[None, :] - (torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2])
    mask, member = torch.ones_like(distance, dtype=torch.bool), None
    if sample.options.get("cu_seqlens") is not None:
        ends = sample.options["cu_seqlens"].tolist()
        ends_k = sample.options.get("cu_seqlens_k", sample.options["cu_seqlens"]).tolist()
        member = torch.zeros_like(mask)
        for rows, keys in zip(itertools.pairwise(ends), itertools.pairwise(ends_k), strict=True):
            member[slice(*rows), slice(*keys)] = True
            distance[slice(*rows)] += k.shape[2] - q.shape[2] - (keys[1] - rows[1])
    if left != -1:
        mask &= distance >= -left
    if right != -1:
        mask &= distance <= right
    if member is not None:
        mask &= member
    return mask.to(q.device)


def to_query_heads(q, kv):
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)


def score_factor(options, q):
    scale = options.get("scale")
    return q.shape[3] ** -0.5 if scale is None else scale


def weights(q, k, sink, mask, scale):
    """Softmax weights of the keys, and that of the sink (.., N, 1), 0 without one."""
    score = (q[:, :, :, None] * to_query_heads(q, k)[:, :, None]).sum(-1) * scale
    logit = q.new_full((), float("-inf")) if sink is None else sink[:, None, None]
    score = torch.cat((logit.expand(*score.shape[:-1], 1), score.masked_fill(~mask, float("-inf"))), -1)
    top = score.detach().amax(-1, keepdim=True)
    weight = (score - torch.where(top == float("-inf"), 0, top)).exp()
    total = weight.sum(-1, keepdim=True)
    weight = weight / torch.where(total == 0, 1, total)
    return weight[..., 1:], weight[..., :1]


def dense(mask, scale, q, k, v, alpha=None, beta=None, sink=None, factor=1):
    """factor: of each softmax weight, where some are dropped."""
    values = to_query_heads(q, v)
    weight = weights(q, k, sink, mask, scale)[0] * factor
    if alpha is not None:
        weight = weight * alpha[..., None]
    if beta is not None:
        weight = weight + mask * beta[..., None]
    return weight @ values


def plain(mask, scale, q, k, v, alpha=None, beta=None, sink=None, factor=1):
    """The formula that the kernels use, by plain torch operations in the dtype of q."""
    values = to_query_heads(q, v)
    score = ((q @ to_query_heads(q, k).mT) * scale).masked_fill(~mask, float("-inf"))
    if sink is not None:
        score = torch.cat((score, sink.to(q.dtype)[:, None, None].expand(*score.shape[:-1], 1)), -1)
    empty = (score == float("-inf")).all(-1, keepdim=True)
    weight = score.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)[..., : mask.shape[1]]
    o = (weight * factor) @ values
    if alpha is not None:
        o = o * alpha.to(q.dtype)[..., None]
    if beta is not None:
        o = o + beta.to(q.dtype)[..., None] * (mask.to(q.dtype) @ values)
    return o


def stored(dtype):
    """`plain` as 16-bit kernels compute gradients.

    delta = dO . u is of the rounded u; dS, and the weights alpha P + beta of the values, are rounded before their products.
    """

    def formula(mask, scale, q, k, v, alpha=None, beta=None, sink=None, factor=1):
        values, fixed = to_query_heads(q, v), to_query_heads(q, v.detach())
        score = ((with_gradient_in(q @ to_query_heads(q, k).mT, dtype)) * scale).masked_fill(~mask, float("-inf"))
        if sink is not None:
            score = torch.cat((score, sink.to(q.dtype)[:, None, None].expand(*score.shape[:-1], 1)), -1)
        level = score.detach().logsumexp(-1, keepdim=True)
        weight = (score - level.masked_fill(level == float("-inf"), 0)).exp()
        total, weight = weight.sum(-1, keepdim=True), weight[..., : mask.shape[1]] * factor
        o, combined = normalized(weight @ fixed, total, dtype), weight.detach()
        if alpha is not None:
            o, combined = o * alpha[..., None], combined * alpha.detach()[..., None]
        if beta is not None:
            o, combined = o + beta[..., None] * (mask.to(q.dtype) @ fixed), combined + beta.detach()[..., None] * mask
        of_values = combined.to(dtype).to(q.dtype) @ values
        return o + of_values - of_values.detach()

    return formula


def scales(mask, scale, do, q, k, v, alpha=None, beta=None, sink=None, factor=1):
    """Output and gradients with every term by its absolute value: what their roundings are relative to.

    A score is rounded relative to its terms, and so is the weight made of it.
    """
    keys, values, do = to_query_heads(q, k).abs(), to_query_heads(q, v).abs(), do.abs()
    weight, sink_weight = weights(q, k, sink, mask, scale)
    weight = weight * (1 + abs(scale) * (q.abs() @ keys.mT))
    dropped = weight * factor
    slope = torch.ones_like(do[..., :1]) if alpha is None else alpha.abs()[..., None]
    shift = torch.zeros_like(slope) if beta is None else beta.abs()[..., None]
    u, c = dropped @ values, mask.to(q.dtype) @ values
    dp = do @ values.mT * factor
    delta = (do * u).sum(-1, keepdim=True)
    ds = slope * weight * (dp + delta) * abs(scale)

    def group_sum(x):
        return x.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1])).sum(2)

    return slope * u + shift * c, {
        "q": ds @ keys,
        "k": group_sum(ds.mT @ q.abs()),
        "v": group_sum(dropped.mT @ (slope * do) + mask.to(q.dtype).mT @ (shift * do)),
        "alpha": delta[..., 0],
        "beta": (do * c).sum(-1),
        "sink": (sink_weight * slope * delta).sum((0, 2, 3)),
    }


def evaluate(formula, sample, do, dtype, factor=1):
    """(o, gradients by name) of `dense` or `plain` in this dtype."""
    inputs = {n: t.detach().to(dtype if n in "qkv" else accumulation(dtype)).requires_grad_()
              for n, t in sample.tensors.items()}
    scale, factor = score_factor(sample.options, inputs["q"]), torch.as_tensor(factor, dtype=dtype)
    o = formula(visible(sample), scale, **inputs, factor=factor)
    return o.detach(), dict(zip(inputs, torch.autograd.grad(o, list(inputs.values()), do.to(dtype)), strict=True))


def check(sample, do, o, gradients, names=None, factor=1):
    """Assert the rule of accuracy for o and the gradients; names: of some tensors only; factor: of dropout.

    In 16 bits no kernel has more of dq, dk and dv than `stored` has.
    """
    tensors, dtype = sample.tensors, sample.tensors["q"].dtype
    exact = evaluate(dense, sample, do, torch.float64, factor)
    rough = evaluate(plain, sample, do, accumulation(dtype), factor)
    if rounds_like_kernels(dtype):
        coarse = evaluate(stored(dtype), sample, do, torch.float32, factor)[1]
        for name in "qkv":
            rough[1][name] = furthest(exact[1][name], rough[1][name], coarse[name])
    wide = {n: t.detach().double() for n, t in tensors.items()}
    scale = scales(visible(sample), score_factor(sample.options, tensors["q"]), do.double(), **wide, factor=factor)
    assert o.dtype == dtype
    assert_accurate("o", o, exact[0], rough[0], scale[0], dtype)
    for name in names or tensors:
        assert gradients[name].dtype == tensors[name].dtype
        assert_accurate(f"gradient of {name}", gradients[name], exact[1][name], rough[1][name], scale[1][name], dtype)


def reach(sample):
    """(N, M) mask: which tokens a row of the output may depend on."""
    return visible(sample)


# ----------------------------------------------------------------------------------------------------- torch operators


def op_arguments(sample):
    tensors, options = sample.tensors, sample.options
    q, k, v = (tensors[name] if tensors[name].stride(-1) == 1 else tensors[name].contiguous() for name in "qkv")
    scalars = (tensors.get(name) for name in ("alpha", "beta", "sink"))
    tensors = q, k, v, *scalars, *map(options.get, ("cu_seqlens", "cu_seqlens_k")), None
    return (*tensors, *window(options), score_factor(options, q), 0.0)


def backward_arguments(sample, do, outputs):
    *tensors, left, right, scale, dropout_p = op_arguments(sample)
    return (do, *tensors, *outputs, left, right, scale, dropout_p)


def attention(sample):
    """The public function of these tensors."""
    return nf.affine_attention if "alpha" in sample.tensors else nf.softmax_attention
