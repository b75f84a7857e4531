"""Selective synchronization attention: the dense oracle, which forms all differences w_i - w_j, and sample calls."""

import torch
from harness import DEVICE, Sample, accumulation, assert_accurate, generator, randn

import nearfar as nf

SAMPLES = {
    "synchronization_attention": {
        "full": dict(),
        "causal": dict(causal=True),
        "separate queries, grouped heads": dict(heads=(2, 1), more_keys=30, separate=True, causal=True),
        "top_k": dict(top_k=5),
    },
    "order_parameter": {
        "phases": dict(),
        "phases, causal": dict(causal=True),
    },
}
FUNCTIONS = {"synchronization_attention": nf.synchronization_attention, "order_parameter": nf.order_parameter}
WIDTH = 24


def make(name, dtype, device=DEVICE, length=75):
    if name in SAMPLES["order_parameter"]:
        theta = randn(2, 2, length, WIDTH, dtype=dtype, seed=1, device=device)
        return Sample({"theta": theta}, dict(SAMPLES["order_parameter"][name]))
    options = dict(SAMPLES["synchronization_attention"][name])
    (heads, kv_heads), separate = options.pop("heads", (2, 2)), options.pop("separate", False)
    keys, by_token = length + options.pop("more_keys", 0), options.get("causal", False)
    batch = 2 if name == "full" else 1
    scalars = torch.promote_types(dtype, torch.float32)
    tensors = {"omega": frequencies(batch, heads, length, dtype=dtype, seed=1, device=device)}
    if separate:
        tensors["omega_k"] = frequencies(batch, kv_heads, keys, dtype=dtype, seed=2, device=device)
    tensors["v"] = randn(batch, kv_heads, keys, 16, dtype=dtype, seed=3, device=device)
    tensors |= parameters((batch, heads, length) if by_token else (batch, heads), scalars, device)
    return Sample(tensors, options)


def frequencies(*shape, **keywords):
    """Two groups of tokens, by turns, that lock within but not between each other, clearly: no pair is near its lock boundary.

    There roundings grow like 1 / S^2 in gradients; test_synchronization.py has random frequencies, too.
    """
    noise = 0.4 * WIDTH**-0.5 * randn(*shape, WIDTH, **keywords)
    group = 1 - 2 * (torch.arange(shape[-1], device=noise.device) % 2)
    return noise + (group * WIDTH**-0.5).to(noise.dtype)[:, None]


def parameters(rows, dtype=torch.float32, device=DEVICE, seed=4):
    """coupling, bandwidth by head, and orders of moderate size."""
    heads = rows[1]
    return {
        "coupling": torch.tensor(2.5, dtype=dtype, device=device),
        "bandwidth": (0.1 + 0.1 * torch.arange(heads)).to(device, dtype),
        "order": (0.5 + 0.4 * torch.rand(rows, generator=generator(seed))).to(device, dtype),
    }


def compile_lengths(name):
    return (35, 50, 71)


# -------------------------------------------------------------------------------------------------------------- oracle


def visible(sample):
    """(N, M) mask of the pairs that causality allows."""
    if "theta" in sample.tensors:
        queries = keys = sample.tensors["theta"].shape[2]
    else:
        queries, keys = sample.tensors["omega"].shape[2], sample.tensors["v"].shape[2]
    position = torch.arange(keys - queries, keys)[:, None]
    mask = torch.arange(keys)[None, :] <= position if sample.options.get("causal") else torch.ones(queries, keys) > 0
    return mask.to(next(iter(sample.tensors.values())).device)


def by_head(w, kv):
    return kv.repeat_interleave(w.shape[1] // kv.shape[1], 1)


def per_row(w, parameter):
    """A parameter as (.., H, N, 1)."""
    if parameter.dim() == 3:
        return parameter[..., None]
    return parameter.expand(w.shape[:2])[..., None, None]


class FlooredRoot(torch.autograd.Function):
    """sqrt(max(0, x)) with the derivative that grad_floor asks for."""

    @staticmethod
    def forward(ctx, x, floor):
        root = x.clamp(min=0).sqrt()
        ctx.save_for_backward(x, root)
        ctx.floor = floor
        return root

    @staticmethod
    def backward(ctx, gradient):
        x, root = ctx.saved_tensors
        return torch.where(x > 0, gradient / (2 * root.clamp(min=ctx.floor)), 0), None


def margin(w, k, coupling, bandwidth, order, distance):
    c = (per_row(w, coupling) * per_row(w, order)) ** -2
    delta2 = distance(w, by_head(w, k))
    return (-2 * per_row(w, bandwidth) * delta2).exp() - c * delta2


def weights(x, mask, floor, top_k, selected):
    weight = FlooredRoot.apply(x, floor) * mask
    if top_k is not None:
        chosen = selection(weight, top_k) if selected is None else selected
        weight = weight * chosen
    return weight


def selection(weight, top_k):
    """Mask of the top_k largest, equal ones by the smaller index, by sorting."""
    places = weight.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(weight, dtype=torch.bool).scatter(-1, places, True)


def differences(w, k):
    return (w[:, :, :, None] - k[:, :, None]).square().sum(-1)


def products(w, k):
    """Squared distances by products, as the kernels and every fast implementation form them."""
    squares = w.square().sum(-1)[..., None] + k.square().sum(-1)[..., None, :]
    return (squares - 2 * (w @ k.mT)).clamp(min=0)


def evaluate(sample, dtype, distance, do, selected=None):
    """(o, gradients by name, selection) of the dense formula in this dtype."""
    mask, options = visible(sample), sample.options
    tensors = {n: t.detach().to(dtype).requires_grad_() for n, t in sample.tensors.items()}
    w, v = tensors["omega"], tensors["v"]
    k = tensors.get("omega_k", w)

    def own(w, k):
        delta2 = distance(w, k)
        return delta2 if "omega_k" in tensors else delta2 * (1 - torch.eye(w.shape[2], dtype=dtype, device=w.device))

    x = margin(w, k, tensors["coupling"], tensors["bandwidth"], tensors["order"], own)
    weight = weights(x, mask, options.get("grad_floor", 1e-3), options.get("top_k"), selected)
    o = weight @ by_head(w, v) / (weight.sum(-1, keepdim=True) + 1e-8)
    found = torch.autograd.grad(o, list(tensors.values()), do.to(dtype))
    return o.detach(), dict(zip(tensors, found, strict=True)), weight.detach() > 0


def scales(sample, do, chosen):
    """Output and gradients with every term by its absolute value; delta2 is a sum of |w|^2, |k|^2 and 2 |w k|."""
    t = {n: tensor.detach().double() for n, tensor in sample.tensors.items()}
    w, do = t["omega"], do.double().abs()
    k, v = by_head(w, t.get("omega_k", w)), by_head(w, t["v"]).abs()
    rate, reach = per_row(w, t["bandwidth"]), per_row(w, t["coupling"]) * per_row(w, t["order"])
    c, floor = reach**-2, sample.options.get("grad_floor", 1e-3)
    delta2 = differences(w, k)
    terms = w.square().sum(-1)[..., None] + k.square().sum(-1)[..., None, :] + 2 * (w.abs() @ k.abs().mT)
    near = (-2 * rate * delta2).exp()
    root = (near - c * delta2).clamp(min=0).sqrt()
    inverse = chosen / root.clamp(min=floor)
    weight = chosen * root
    total = weight.sum(-1, keepdim=True) + 1e-8
    o = weight @ v / total
    slope = (do @ v.mT + (do * o).sum(-1, keepdim=True)) / total * inverse
    pull = slope * (2 * rate * near + c)

    def group_sum(x):
        kv_heads = sample.tensors["v"].shape[1]
        return x.unflatten(1, (kv_heads, -1)).sum(2)

    of_queries = pull @ k.abs() + pull.sum(-1, keepdim=True) * w.abs()
    of_keys = group_sum(pull.mT @ w.abs() + pull.sum(-2)[..., None] * k.abs())
    radius = (slope * terms * c / reach).sum(-1)
    order = t["coupling"] * radius
    return o, {
        "omega": of_queries if "omega_k" in t else of_queries + of_keys,
        "omega_k": of_keys,
        "v": group_sum((weight / total).mT @ do),
        "coupling": (radius * per_row(w, t["order"])[..., 0]).sum(),
        "bandwidth": (slope * near * terms).sum((0, 2, 3)),
        "order": order if t["order"].dim() == 3 else order.sum(-1),
    }


def order(sample, do, dtype):
    """(r, gradient of theta) of the order parameter in this dtype: one mean for every query that sees all of its tokens."""
    theta = sample.tensors["theta"].detach().to(dtype).requires_grad_()
    mask = visible(sample).to(dtype)
    if not sample.options.get("causal"):
        mask = mask[:1]
    share = mask / mask.sum(-1, keepdim=True)
    r = ((share @ theta.cos()).square() + (share @ theta.sin()).square()).sqrt().mean(-1)
    r = r if sample.options.get("causal") else r[..., 0]
    return r.detach(), torch.autograd.grad(r, theta, do.to(dtype))[0]


def check_order(sample, do, o, gradients):
    dtype, single = sample.tensors["theta"].dtype, accumulation(sample.tensors["theta"].dtype)
    exact, exact_gradient = order(sample, do, torch.float64)
    plain, plain_gradient = order(sample, do, single)
    mask = visible(sample).double()
    if sample.options.get("causal"):
        pulls = (do.double().abs() / mask.sum(-1)) @ mask
    else:
        pulls = (do.double().abs() / mask.shape[0])[..., None]
    scale = (2 * pulls / exact_gradient.shape[3])[..., None].expand(exact_gradient.shape)
    assert o.dtype == single
    assert_accurate("order parameter", o, exact, plain, torch.ones_like(exact), single)
    assert_accurate("gradient of theta", gradients["theta"], exact_gradient, plain_gradient, scale, dtype)


def check(sample, do, o, gradients, names=None):
    """Assert the rule of accuracy for o and the gradients; names: of some tensors only.

    The plain formula keeps its row sums and parameters in the dtype of omega, too. A selection is that of the oracle: the
    samples have no two weights within rounding at their cut.
    """
    if "theta" in sample.tensors:
        check_order(sample, do, o, gradients)
        return
    dtype = sample.tensors["omega"].dtype
    exact_o, exact, chosen = evaluate(sample, torch.float64, differences, do)
    selected = chosen if "top_k" in sample.options else None
    plain_o, plain, _ = evaluate(sample, accumulation(dtype), products, do, selected)
    scale_o, scale = scales(sample, do, chosen)
    assert o.dtype == dtype
    assert_accurate("o", o, exact_o, plain_o, scale_o, dtype)
    for name in sample.tensors if names is None else names:
        assert gradients[name].dtype == sample.tensors[name].dtype
        assert_accurate(f"gradient of {name}", gradients[name], exact[name], plain[name], scale[name], dtype)


def reach(sample):
    """(N, M) mask: which tokens a row of the output may depend on."""
    return visible(sample)


# ----------------------------------------------------------------------------------------------------- torch operators


def op_arguments(sample):
    if "theta" in sample.tensors:
        return sample.tensors["theta"], bool(sample.options.get("causal"))
    t, options = sample.tensors, sample.options
    dtype = torch.float32
    w, v = t["omega"], t["v"]
    parameters = t["coupling"].reshape(1).to(dtype), t["bandwidth"].to(dtype), t["order"].to(dtype)
    flags = bool(options.get("causal")), options.get("top_k"), options.get("grad_floor", 1e-3)
    return w, t.get("omega_k"), v, *parameters, *flags


def backward_arguments(sample, do, outputs):
    if "theta" in sample.tensors:
        return do, *op_arguments(sample)
    tensors, flags = op_arguments(sample)[:6], op_arguments(sample)[6:]
    return do, *tensors, *outputs, *flags
