"""What holds for every reference: memory, tokens far from the origin, NaN, hidden keys, derivatives under transforms."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import nearfar as nf
from nearfar.reference import krause, pairwise
from nearfar.reference.synchronization import lock

pytestmark = pytest.mark.full

B, H, D = 1, 2, 16


def tokens(length, seed, dtype=torch.float32, size=1.0, heads=H, width=D):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(B, heads, length, width, generator=generator, dtype=torch.float64)).to(dtype)


def qkv(length, dtype=torch.float32, **options):
    return [tokens(length, seed, dtype, **options) for seed in range(3)]


def sums(statistics):
    return statistics.lse + statistics.entropy


WINDOW = nf.SlidingWindow(2 * pairwise.CHUNK)
HALF = torch.tensor([0.5, 0.75])
# Functions of q, k and v; those of frequencies take q and k as such, small enough for tokens to lock.
CALLS = {
    "krause": lambda q, k, v: nf.krause_attention(q, k, v, HALF.to(v.dtype) * 8, backend="reference"),
    "krause window": lambda q, k, v: nf.krause_attention(q, k, v, HALF.to(v.dtype) * 8, WINDOW, backend="reference"),
    "krause top_k": lambda q, k, v: nf.krause_attention(q, k, v, 4.0, top_k=9, backend="reference"),
    "softmax": lambda q, k, v: nf.softmax_attention(q, k, v, backend="reference"),
    "softmax causal": lambda q, k, v: nf.softmax_attention(q, k, v, causal=True, backend="reference"),
    "affine": lambda q, k, v: nf.affine_attention(
        q, k, v, q[..., 0], k[..., 0], causal=True, sink=HALF.to(v.dtype), backend="reference"
    ),
    "statistics": lambda q, k, v: sums(nf.attention_statistics(q, k, causal=True, backend="reference"))[..., None] * v,
    "statistics sigma": lambda q, k, v: sums(nf.attention_statistics(q, k, sigma=HALF.to(v.dtype) * 8, backend="reference"))[
        ..., None
    ]
    * v,
    "synchronization": lambda q, k, v: nf.synchronization_attention(
        0.05 * q, v, 1.3, 1.3, HALF[None].to(v.dtype), backend="reference"
    ),
    "synchronization top_k": lambda q, k, v: nf.synchronization_attention(
        0.05 * q, v, 1.3, 1.3, HALF[None, :, None].expand(q.shape[:3]).to(v.dtype), omega_k=0.05 * k, top_k=9, causal=True,
        backend="reference",
    ),
    "linear": lambda q, k, v: nf.linear_attention(q, k, v, backend="reference"),
    "linear causal": lambda q, k, v: nf.linear_attention(q, k, v, causal=True, backend="reference"),
}


def peak(call):
    """The most bytes that a call holds at a time beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def with_gradients(function, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return lambda: function(*leaves).square().sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward_take_three_times_the_memory_of_sdpa(name):
    """Of all pairs it would be 20 times as much here, 80 times at 4,096 tokens; by chunks, all peaks grow like N."""
    tensors = qkv(1024, width=64)
    sdpa = peak(with_gradients(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), *tensors))
    assert sdpa >= 6 * tensors[0].nbytes  # o and its gradient, those of q, k and v, and the square
    assert peak(with_gradients(CALLS[name], *tensors)) <= 3 * sdpa


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1000])
def test_tokens_far_from_the_origin(offset, dtype):
    """Whatever depends on distances alone is as exact there; differences in float64 of the same rounded tokens are right."""
    size = 0.3 if dtype == torch.float32 or not offset else 3.0  # 16 bits have steps of 0.5 and 4 there
    q, k = (offset + tokens(40, seed, torch.float64, size) for seed in range(2))
    q, k, v = q.to(dtype), k.to(dtype), tokens(40, 2, dtype)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = -(leaves[0][:, :, :, None] - leaves[1][:, :, None]).square().sum(-1) / 18
    weights = scores.softmax(-1)
    expected = weights @ leaves[2]
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    error = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps

    given = [x.detach().requires_grad_() for x in (q, k, v)]
    o = nf.krause_attention(*given, 3.0, backend="reference")
    torch.testing.assert_close(o.double(), expected, rtol=error, atol=error)
    for got, want in zip(torch.autograd.grad(o.square().sum(), given), gradients, strict=True):
        assert (got.double() - want).norm() <= error * max(want.norm().item(), 1)

    statistics = nf.attention_statistics(q, k, sigma=3.0, backend="reference")
    torch.testing.assert_close(statistics.lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    entropy = torch.special.entr(weights).sum(-1)
    torch.testing.assert_close(statistics.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(statistics.max_key, scores.argmax(-1)) or dtype != torch.float32

    cache = nf.KrauseCache.after(k[:, :, :39], v[:, :, :39], 40)
    last = nf.krause_attention_step(q[:, :, 39:], k[:, :, 39:], v[:, :, 39:], cache, 3.0, backend="reference")
    torch.testing.assert_close(last.double(), expected[:, :, 39:], rtol=error, atol=error)

    order = torch.full((B, H), 0.5)
    delta2 = (leaves[0][:, :, :, None] - leaves[1][:, :, None]).square().sum(-1)
    reach = delta2.median().sqrt().item()
    s = (torch.exp(-2e-3 * delta2) - delta2 / reach**2).clamp(min=0).sqrt()
    expected = s @ leaves[2] / (s.sum(-1, keepdim=True) + 1e-8)
    o = nf.synchronization_attention(q, v, 2 * reach, 1e-3, order, omega_k=k, backend="reference")
    torch.testing.assert_close(o.double(), expected, rtol=10 * error, atol=10 * error)
    share = nf.locked_share(q, 2 * reach, 1e-3, order, omega_k=k)
    torch.testing.assert_close(share.double(), (s > 0).double().mean((-2, -1)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("offset", [0.0, 1000.0, 3.7])
@pytest.mark.parametrize("width", [1, 5, 64, 256, 600])
def test_equal_tokens_are_at_distance_0(width, offset):
    w = offset + tokens(70, 0, width=width)[:, :, None]
    distances = pairwise.squared_distances(w, w[:, :, 0])
    assert distances.diagonal(dim1=-2, dim2=-1).eq(0).all()
    assert distances.eq(0).sum() == B * H * 70


def test_pairs_do_not_depend_on_other_tokens():
    q, k, v = (100 + x for x in qkv(200))
    before = nf.krause_attention(q, k, v, 2.0, nf.SlidingWindow(9), backend="reference")
    k[:, :, 120:], v[:, :, 120:] = 1e4, 7
    after = nf.krause_attention(q, k, v, 2.0, nf.SlidingWindow(9), backend="reference")
    assert torch.equal(before[:, :, :120], after[:, :, :120]) and not torch.equal(before, after)


def locking(omega, v, radius, grad_floor=1e-3, alpha=1.3):
    """o by differences in float64, with every pair's derivative as the operator defines it; radius K r: one for each row."""
    delta2 = (omega[:, :, :, None] - omega[:, :, None]).square().sum(-1)
    margin = torch.exp(-2 * alpha * delta2) - delta2 / radius[..., None, None].square()
    s = lock(margin, grad_floor)
    return s @ v / (s.sum(-1, keepdim=True) + 1e-8)


@pytest.mark.parametrize("r", [1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-12, 1e-13, 0.0])
@pytest.mark.parametrize("causal", [False, True])
def test_synchronization_gradients_of_equal_tokens_are_0_at_every_order(r, causal):
    omega = torch.full((1, 2, 70, 16), 3.7, requires_grad=True)
    coupling, bandwidth = torch.tensor(1.3, requires_grad=True), torch.tensor(1.3, requires_grad=True)
    order = torch.full((1, 2, 70), r, requires_grad=True)
    o = nf.synchronization_attention(omega, tokens(70, 1), coupling, bandwidth, order, causal=causal, backend="reference")
    for gradient in torch.autograd.grad(o.square().sum(), (omega, coupling, bandwidth, order)):
        assert gradient.isfinite().all() and gradient.abs().max() <= 1e-2


@pytest.mark.parametrize("r", [1e-1, 1e-3, 1e-5, 1e-6])
def test_synchronization_gradients_inside_a_small_lock_radius(r):
    """They are of size 1 / (K r), and right: pairs of tokens 0.4 K r apart, which float32 can tell from each other."""
    generator = torch.Generator().manual_seed(0)
    base = 0.25 * torch.randint(1, 4, (1, 2, 10, 1), generator=generator) + torch.arange(10.0)[:, None] / 8
    base = base.expand(-1, -1, -1, 3).repeat_interleave(2, 2)
    step = torch.zeros_like(base)
    step[:, :, 1::2, 0] = 0.4 * r
    omega = (base + step).requires_grad_()
    v, order = tokens(20, 1, width=8), torch.full((1, 2), r, requires_grad=True)
    got = torch.autograd.grad(
        nf.synchronization_attention(omega, v, 1.0, 1.3, order, backend="reference")[..., 0].sum(), (omega, order)
    )
    exact = omega.detach().double().requires_grad_(), order.detach().double().requires_grad_()
    want = torch.autograd.grad(locking(exact[0], v.double(), exact[1])[..., 0].sum(), exact)
    assert want[0].abs().max() > 0.05 / r
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 / r)


@pytest.mark.parametrize("coupling, r", [(1.3, 1e-9), (1.3, 1e-10), (1.3, 1e-11), (1.3, 1e-13), (1e-10, 0.5), (1.3, 0.0)])
def test_synchronization_gradients_of_parameters_are_finite(coupling, r):
    omega = 0.1 * tokens(8, 0)
    omega[:, :, 4:] = omega[:, :, :4]
    omega.requires_grad_()
    parameters = torch.tensor(coupling, requires_grad=True), torch.full((1, 2), r, requires_grad=True)
    o = nf.synchronization_attention(omega, tokens(8, 1), parameters[0], 1.3, parameters[1], backend="reference")
    first = torch.autograd.grad(o.square().sum(), (omega, *parameters), create_graph=True)
    second = torch.autograd.grad(sum(gradient.sum() for gradient in first), (omega, *parameters))
    assert all(gradient.eq(0).all() for gradient in first[1:])
    assert all(gradient.isfinite().all() for gradient in (*first, *second))


def rows_with_nan(o):
    return o.isnan().any(-1)[0, 0].nonzero().flatten().tolist()


@pytest.mark.parametrize("top_k", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_makes_its_rows_nan_and_no_other(where, count, top_k):
    """count: how many tokens are NaN, more than top_k takes among them."""
    bad = list(range(3, 3 + count))
    seen = bad if where == 0 else list(range(3, 10 + count))

    def spoilt():
        tensors = qkv(20)
        tensors[where][:, 0, bad] = math.nan
        return tensors

    o = nf.krause_attention(*spoilt(), 2.0, nf.SlidingWindow(7), top_k=top_k, backend="reference")
    assert rows_with_nan(o) == seen and o[:, 1].isfinite().all()
    ends = torch.tensor([0, 20, 40], dtype=torch.int32)
    packed = [torch.cat((tensor, tokens(20, 9)), 2) for tensor in spoilt()]
    o = nf.krause_attention(*packed, 2.0, top_k=top_k, cu_seqlens=ends, backend="reference")
    assert o[:, :, 20:].isfinite().all() and o[:, 0, bad].isnan().all()

    q, k, v = spoilt()
    order = torch.full((B, H), 0.5)
    o = nf.synchronization_attention(0.1 * q, v, 1.3, 1.3, order, omega_k=0.1 * k, top_k=top_k, backend="reference")
    assert rows_with_nan(o) == (bad if where == 0 else list(range(20))) and o[:, 1].isfinite().all()


@pytest.mark.parametrize("sigma", [None, 2.0])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_shows_in_the_diagnostics(where, sigma):
    tensors = qkv(40)
    tensors[where][:, 0, 17] = math.nan
    seen = [17] if where == 0 else list(range(17, 40))
    for part in nf.selection_geometry(*tensors, 3, causal=True, sigma=sigma, backend="reference"):
        assert part[0, 0].isnan().nonzero().flatten().tolist() == seen and part[:, 1].isfinite().all()
    if where < 2:
        statistics = nf.attention_statistics(*tensors[:2], causal=True, sigma=sigma, backend="reference")
        for part in (statistics.lse, statistics.entropy, statistics.max_weight):
            assert part[0, 0].isnan().nonzero().flatten().tolist() == seen
        assert (statistics.max_key < 40).all()


@pytest.mark.parametrize("name", CALLS)
def test_hidden_keys_of_huge_scores_leave_derivatives_finite(name):
    """A key hidden from most rows by causality or window, of which exp is inf; and by the first and second derivative."""
    q, k, v = qkv(24)
    k[:, :, 20:] = 90 * k[:, :, 20:].sign()
    q[:, :, :20] = q[:, :, :20].abs() * k[:, :, 20:21].sign() * 5
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = CALLS[name](*leaves)
    first = torch.autograd.grad(o[:, :, :20].sum(), leaves, create_graph=True, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in first)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in second)


@pytest.mark.parametrize("name", CALLS)
def test_chunks_are_differentiable_twice(name):
    """Chunks of 2 rows, each evaluated again in the backward: gradients that differences confirm, of the gradients too."""
    tensors = [x.requires_grad_() for x in qkv(5, torch.float64, width=2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairwise, "CHUNK", 2)
        assert torch.autograd.gradcheck(CALLS[name], tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(CALLS[name], tensors, fast_mode=True)


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("linear")])
def test_transforms_see_the_same_derivatives(name):
    """torch.func, batches of gradients and forward AD, over several chunks."""
    q, k, v = qkv(2 * pairwise.CHUNK + 3)
    function = CALLS[name]

    def loss(*tensors):
        return function(*tensors).square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)
    for got, gradient in zip(torch.func.grad(loss, (0, 1, 2))(q, k, v), want, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-4)
    o = function(*leaves)
    batch = torch.stack((o.detach(), 2 * o.detach()))
    batched = torch.autograd.grad(o, leaves, 2 * batch, is_grads_batched=True, materialize_grads=True)
    for got, gradient in zip(batched, want, strict=True):
        expected = torch.stack((gradient, 2 * gradient))
        torch.testing.assert_close(got.expand_as(expected), expected, rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(loss, (q, k, v), (q, k, v))
    expected = sum((x * gradient).sum() for x, gradient in zip((q, k, v), want, strict=True))
    torch.testing.assert_close(tangent, expected, rtol=1e-3, atol=1e-3)
    several = torch.func.vmap(function)(*(torch.stack((x, x + 0.1)) for x in (q, k, v)))
    torch.testing.assert_close(several[1], function(q + 0.1, k + 0.1, v + 0.1), rtol=1e-4, atol=1e-4)


def test_a_write_between_forward_and_backward_is_noticed():
    """Chunks are evaluated again from tensors that autograd watches."""
    q, k, v = qkv(2 * pairwise.CHUNK)
    k_own = k.requires_grad_().clone()
    o = nf.krause_attention(q, k_own, v, 2.0, backend="reference")
    with torch.no_grad():
        k_own += 1
    with pytest.raises(RuntimeError, match="modified"):
        o.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_other_default_device(name):
    tensors = qkv(20)
    want = with_default(torch.device("cpu"), CALLS[name], tensors)
    got = with_default(torch.device("meta"), CALLS[name], tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def with_default(device, function, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with device:
        o = function(*leaves)
        return o, *torch.autograd.grad(o.sum(), leaves, materialize_grads=True)


def test_only_a_parameter_needs_gradients():
    q, k, v = qkv(200)
    sigma = torch.tensor(2.0, requires_grad=True)
    krause.krause_attention(q, k, v, sigma.reshape(1), -1, -1).square().sum().backward()
    step = 1e-3
    above, below = (nf.krause_attention(q, k, v, 2.0 + x, backend="reference").double().square().sum() for x in (step, -step))
    torch.testing.assert_close(sigma.grad.double(), (above - below) / (2 * step), rtol=1e-2, atol=1e-3)
