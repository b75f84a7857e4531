"""Krause attention: the dense oracle by direct distances, and sample calls."""

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
    rounded,
    rounds_like_kernels,
    with_gradient_in,
)

import nearfar as nf
from samples import grid

SAMPLES = {
    "krause_attention": {
        "all keys": dict(),
        "causal window": dict(locality=nf.SlidingWindow(37)),
        "two-sided window, top 5, shared sigma": dict(locality=nf.SlidingWindow(20, 9), top_k=5, sigma=()),
        "top 7 of all keys": dict(top_k=7),
        "packed": dict(locality=nf.SlidingWindow(30, 3), packed=True),
        "packed, top 6": dict(locality=nf.SlidingWindow(30, 3), top_k=6, packed=True),
    }
}
FUNCTIONS = {"krause_attention": nf.krause_attention}


def make(name, dtype, device=DEVICE, length=75):
    options = dict(SAMPLES["krause_attention"][name])
    sigma_shape, packed = options.pop("sigma", None), options.pop("packed", False)
    batch, heads = (1, 4) if packed or "locality" in options else (2, 2)
    if packed:
        ends = [0, length // 3, length // 3, 2 * length // 3, length]
        options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    tensors = {
        "q": randn(batch, heads, length, 24, dtype=dtype, seed=1, device=device),
        "k": randn(batch, heads // 2, length, 24, dtype=dtype, seed=2, device=device),
        "v": randn(batch, heads // 2, length, 16, dtype=dtype, seed=3, device=device),
        "sigma": 2 + torch.rand((heads,) if sigma_shape is None else sigma_shape, generator=generator(4)).to(device),
    }
    if dtype == torch.float64:
        tensors["sigma"] = tensors["sigma"].double()
    return Sample(tensors, options)


def compile_lengths(name):
    """With top_k over all keys the saved bits double at powers of two, and graphs with them; a window has no step."""
    return (19, 35, 50)


def window(options):
    locality = options.get("locality")
    return (-1, -1) if locality is None else (locality.left, locality.right)


def visible(sample):
    """(N, M) mask of the pairs that locality and packing allow."""
    q, k = sample.tensors["q"], sample.tensors["k"]
    if isinstance(sample.options.get("locality"), (nf.GridNeighborhood, nf.ShiftedWindow)):
        return grid.mask(sample.options["locality"]).to(q.device)
    left, right = window(sample.options)
    i = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
    j = torch.arange(k.shape[2], device=q.device)[None, :]
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if left != -1:
        mask &= i - j <= left
    if right != -1:
        mask &= j - i <= right
    if sample.options.get("cu_seqlens") is not None:
        ends = sample.options["cu_seqlens"].tolist()
        lengths = torch.tensor(ends[1:]) - torch.tensor(ends[:-1])
        member = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(q.device)
        mask &= member[:, None] == member[None, :]
    return mask


def by_head(sigma, heads):
    return sigma.reshape(-1).expand(heads)[None, :, None, None]


def to_query_heads(q, kv):
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)


def scores(q, k, sigma):
    """-|q - k|^2 / (2 sigma^2), by the difference itself."""
    return -squared_distances(q, k) / (2 * by_head(sigma, q.shape[1]).square())


def squared_distances(q, k):
    return (q[:, :, :, None] - to_query_heads(q, k)[:, :, None]).square().sum(-1)


def weights(score, keep):
    score = score.masked_fill(~keep, float("-inf"))
    if score.shape[-1]:
        top = score.detach().amax(-1, keepdim=True)
        score = score - torch.where(top == float("-inf"), 0, top)
    weight = score.exp()
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total == 0, 1, total)


def dense(q, k, v, sigma, keep, factor=1, bias=0):
    """factor: of each weight, where some are dropped. bias: of each score."""
    return (weights(scores(q, k, sigma) + bias, keep) * factor) @ to_query_heads(q, v)


def plain(q, k, v, sigma, keep, factor=1, bias=0):
    """The formula that the kernels use, |q|^2 cancelled, by plain torch operations in the dtype of q."""
    k = to_query_heads(q, k)
    scale = by_head(sigma, q.shape[1]).square().reciprocal().to(q.dtype)
    score = (q @ k.mT - k.square().sum(-1)[:, :, None] / 2) * scale + bias
    empty = ~keep.any(-1, keepdim=True)
    weight = score.masked_fill(~(keep | empty), float("-inf")).softmax(-1).masked_fill(empty, 0)
    return (weight * factor) @ to_query_heads(q, v)


def stored(dtype):
    """The formula as 16-bit kernels compute gradients: with delta = dO . o of the rounded o, P and dS rounded."""

    def formula(q, k, v, sigma, keep, factor=1, bias=0):
        distances = with_gradient_in(squared_distances(q, k), dtype)
        score = -distances / (2 * by_head(sigma, q.shape[1]).square()) + bias
        score = score.masked_fill(~keep, float("-inf"))
        level = score.detach().logsumexp(-1, keepdim=True)
        weight = (score - level.masked_fill(level == float("-inf"), 0)).exp()
        return normalized(rounded(weight * factor, dtype) @ to_query_heads(q, v), weight.sum(-1, keepdim=True), dtype)

    return formula


def best(sample):
    """(B, Hq, N, M) mask of the selection: the top_k largest scores of float64, equal ones by the smaller key index, or all."""
    q, k, sigma = (sample.tensors[name].double() for name in ("q", "k", "sigma"))
    mask = visible(sample).expand(q.shape[0], q.shape[1], -1, -1)
    if sample.options.get("top_k") is None:
        return mask
    if keeps_ties(sample):
        score = scores(q, k, sigma).masked_fill(~mask, float("-inf"))
        last = min(sample.options["top_k"], k.shape[2]) - 1
        return mask & (score >= score.sort(dim=-1, descending=True).values[..., last : last + 1])
    order = scores(q, k, sigma).masked_fill(~mask, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(k.shape[2], device=q.device).expand(order.shape))
    return mask & (rank < sample.options["top_k"])


def keeps_ties(sample):
    return sample.options.get("ties") == "keep" and sample.options.get("top_k") is not None


def keys_like(kind, k):
    """Keys in the shape of k whose scores are hard to tell apart, or to tell apart along with the others."""
    if kind == "equal":
        return k[:, :, :1].expand(k.shape).contiguous()
    if kind == "outliers":
        k = k.clone()
        k[:, :, ::37] *= 64
        return k
    if kind == "close":  # apart by an eps, with some far off that take up the range of the scores
        k = torch.zeros_like(k)
        order = torch.randperm(k.shape[2], generator=generator(5)).to(k)
        k[..., 0] = 1 + torch.finfo(k.dtype).eps * (order % 128)
        k[:, :, ::8, 0] = 30
        return k
    high = {"signs": 1, "integers": 3}[kind]
    return (k * high).round().clamp(-high, high)


def decode(bits, num_keys):
    """(..., M) mask of a saved selection: key j is bit j modulo the 32 * words bits of its row's ring."""
    key = torch.arange(num_keys, device=bits.device) % (32 * bits.shape[-1])
    return (bits[..., key // 32] >> (key % 32)) & 1 == 1


def kernel_selection(sample):
    """The set that the kernels used, from the bits that they save."""
    mask = visible(sample)
    if sample.options.get("top_k") is None or not sample.tensors["q"].numel() or not sample.tensors["k"].shape[2]:
        return best(sample)
    bits = torch.ops.nearfar.krause_attention(*op_arguments(sample))[2]
    return decode(bits, mask.shape[1]) & mask


def reference_selection(sample, backend="reference"):
    """The set that the reference used: with the identity for v its outputs are the weights themselves."""
    if sample.options.get("top_k") is None:
        return best(sample)
    tensors = sample.tensors
    if backend == "reference":  # it computes in float32; its output in float16 would lose the smallest weights
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    k = tensors["k"]
    v = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
    return nf.krause_attention(**{**tensors, "v": v}, **sample.options, backend=backend) > 0


def score_rounding(q, keys, sigma):
    """What rounding may do to a float32 score, summed in any order: (D + 8) half eps of its terms' absolute values."""
    terms = (q.abs() @ keys.abs().mT + keys.square().sum(-1)[:, :, None] / 2) / by_head(sigma, q.shape[1]).square()
    return (q.shape[-1] + 8) * 2.0**-24 * terms


def assert_optimal(sample, selected):
    """Every row keeps min(top_k, keys in reach), and none of them scores below one left out by more than rounding."""
    q, k, sigma = (sample.tensors[name].double() for name in ("q", "k", "sigma"))
    mask = visible(sample).expand(selected.shape)
    if not selected.numel():
        return
    counts = mask.sum(-1).clamp(max=sample.options["top_k"])
    assert torch.equal(selected.sum(-1), counts), "a row keeps the wrong number of keys"
    rounding = score_rounding(q, to_query_heads(q, k), sigma)
    score = scores(q, k, sigma)
    kept = (score + rounding).masked_fill(~selected, float("inf")).amin(-1)
    left_out = (score - rounding).masked_fill(selected | ~mask, float("-inf")).amax(-1)
    assert (kept >= left_out).all(), "a key was kept before one that is nearer by more than rounding"


def scales(q, k, v, sigma, keep, do, factor=1, bias=None):
    """Outputs and gradients with every term by its absolute value: what their roundings are relative to."""
    sigma_by_head, heads, batch = by_head(sigma, q.shape[1]), q.shape[1], q.shape[0]
    keys, values = to_query_heads(q, k), to_query_heads(q, v)
    shift = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
    weight = weights(scores(q, k, sigma) + shift, keep)
    o = (weight * factor) @ values.abs()
    dp = do.abs() @ values.abs().mT * factor
    ds = weight * (dp + (weight * dp).sum(-1, keepdim=True))
    to_keys = ds / sigma_by_head.square()
    log_weight = torch.where(weight > 0, weight, 1).log()
    # A weight of 1 has log 0, but the score that says so is rounded: without that term one key in reach would allow nothing.
    log_scale = log_weight.abs() + shift.abs() + score_rounding(q, keys, sigma)
    per_head = 2 * (ds * log_scale).sum((0, 2, 3)) / sigma.reshape(-1)

    def group_sum(x):
        return x.reshape(batch, k.shape[1], heads // k.shape[1], *x.shape[2:]).sum(2)

    return o, {
        "pairs": ds,
        "q": to_keys @ keys.abs(),
        "k": group_sum(to_keys.mT @ q.abs() + to_keys.sum(2)[..., None] * keys.abs()),
        "v": group_sum((weight * factor).mT @ do.abs()),
        "sigma": per_head.sum_to_size(sigma.reshape(-1).shape).reshape(sigma.shape),
    }


def evaluate(formula, sample, selected, do, dtype, factor=1):
    """(o, gradients by name) of `dense` or `plain` with this selection, in this dtype."""
    inputs = {n: t.detach().to(dtype if n in "qkv" else accumulation(dtype), copy=True).requires_grad_()
              for n, t in sample.tensors.items()}
    o = formula(*inputs.values(), selected, torch.as_tensor(factor, dtype=dtype))
    return o.detach(), dict(zip(inputs, torch.autograd.grad(o, list(inputs.values()), do.to(dtype)), strict=True))


def check(sample, do, o, gradients, selected=None, names=("q", "k", "v", "sigma"), factor=1):
    """Assert the rule of accuracy for o and the gradients, given the set that the kernels selected and the factor of dropout.

    In 16 bits no kernel has more of dq, dk and dv than `stored` has.
    """
    tensors, dtype = sample.tensors, sample.tensors["q"].dtype
    if selected is None:
        selected = kernel_selection(sample)
    if sample.options.get("top_k") is not None:
        assert_optimal(sample, selected)

    exact = evaluate(dense, sample, selected, do, torch.float64, factor)
    rough = evaluate(plain, sample, selected, do, accumulation(dtype), factor)
    if rounds_like_kernels(dtype):
        coarse = evaluate(stored(dtype), sample, selected, do, torch.float32, factor)[1]
        for name in "qkv":
            rough[1][name] = furthest(exact[1][name], rough[1][name], coarse[name])
    scale = scales(*(t.double() for t in tensors.values()), selected, do.double(), factor)
    assert o.dtype == dtype
    assert_accurate("o", o, exact[0], rough[0], scale[0], dtype)
    for name in names:
        assert gradients[name].dtype == tensors[name].dtype
        assert_accurate(f"gradient of {name}", gradients[name], exact[1][name], rough[1][name], scale[1][name], dtype)


def reach(sample):
    """(N, M) mask: which tokens a row of the output may depend on."""
    return visible(sample)


# ----------------------------------------------------------------------------------------------------- torch operators


def op_arguments(sample):
    q, k, v, sigma = sample.tensors.values()
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    sigma = sigma.reshape(-1).to(torch.promote_types(q.dtype, torch.float32))
    selection = sample.options.get("top_k"), keeps_ties(sample)
    return (q, k, v, sigma, sample.options.get("cu_seqlens"), None, *window(sample.options), *selection, 0.0)


def backward_arguments(sample, do, outputs):
    *tensors, left, right, top_k, keep_ties, dropout_p = op_arguments(sample)
    return (do, *tensors, *outputs, left, right, top_k, keep_ties, dropout_p)
