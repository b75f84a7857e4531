"""FlashAttention's signatures against plain attention in float64."""

import functools
import inspect
import itertools

import pytest
import torch
from harness import DEVICE, randn

from nearfar.integrations import flash_attn as fa
from nearfar.ops.affine import softmax_attention

pytestmark = pytest.mark.full

BACKENDS = ("reference", "triton") if DEVICE == "cpu" else ("auto",)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(fa, "softmax_attention", functools.partial(softmax_attention, backend=request.param))


def plain(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """FlashAttention's definition on (B, N, H, D) tensors, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    num_queries, num_keys = scores.shape[2:]
    distance = torch.arange(num_keys)[None] - torch.arange(num_queries)[:, None] - (num_keys - num_queries)
    left, right = window_size[0], 0 if causal else window_size[1]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    weights = scores.masked_fill(~seen.to(scores.device), float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def assert_equal(function, expected, tensors):
    """Outputs and gradients of function(*tensors) in float32 are those of expected."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    got, exact = function(*tensors), expected(*tensors)
    assert got.dtype == tensors[0].dtype
    torch.testing.assert_close(got, exact.to(got.dtype), rtol=1e-5, atol=1e-5)
    do = randn(*exact.shape, seed=9)
    grads, exact_grads = (torch.autograd.grad(o, tensors, do.to(o.dtype)) for o in (got, exact))
    for own, other in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=2e-5)


CALLS = [
    dict(),
    dict(causal=True),
    dict(causal=True, window_size=(3, 0)),
    dict(causal=True, window_size=(4, 4)),  # FlashAttention sets the right side to 0
    dict(window_size=(2, 3), softmax_scale=0.3),
]


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("num_queries, num_keys", [(9, 9), (3, 12), (12, 5)])
def test_attention(options, num_queries, num_keys):
    """Grouped heads, and masks aligned to the last query and key when lengths differ."""
    q, k, v = (randn(2, n, h, 16, seed=i) for i, (n, h) in enumerate([(num_queries, 4), (num_keys, 2), (num_keys, 2)]))
    assert_equal(functools.partial(fa.flash_attn_func, **options), functools.partial(plain, **options), (q, k, v))


@pytest.mark.parametrize("width", [4, 40, 59])
def test_any_width(width):
    tensors = [randn(1, 7, 2, width, seed=i) for i in range(3)]
    assert_equal(functools.partial(fa.flash_attn_func, causal=True), functools.partial(plain, causal=True), tensors)


def test_half_precision():
    q, k, v = (randn(1, 33, 2, 32, seed=i, dtype=torch.float16) for i in range(3))
    got = fa.flash_attn_func(q, k, v, causal=True)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), plain(q, k, v, causal=True), rtol=1e-3, atol=1e-3)


def test_packed_tensors():
    q, k, v = (randn(2, 8, 2, 16, seed=i) for i in range(3))
    expected = plain(q, k, v, causal=True).float()
    torch.testing.assert_close(fa.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), causal=True), expected)
    torch.testing.assert_close(fa.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), causal=True), expected)


ENDS = [0, 5, 5, 6, 14]


def test_packed_sequences():
    ends = torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)
    tensors = [randn(14, 2, 16, seed=i) for i in range(3)]

    def one_by_one(q, k, v):
        spans = zip(ENDS, ENDS[1:], strict=False)
        return torch.cat([plain(q[None, a:b], k[None, a:b], v[None, a:b], None, True, (2, 0))[0] for a, b in spans])

    options = dict(causal=True, window_size=(2, 0))
    assert_equal(lambda q, k, v: fa.flash_attn_varlen_func(q, k, v, ends, ends.clone(), 8, 8, **options), one_by_one, tensors)
    q, k, v = tensors
    expected = fa.flash_attn_varlen_func(q, k, v, ends, ends, 8, 8, **options)
    packed = fa.flash_attn_varlen_qkvpacked_func(torch.stack(tensors, 1), ends, 8, **options)
    assert torch.equal(packed, expected)
    packed = fa.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), ends, ends, 8, 8, **options)
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("lengths", [6, [2, 6, 0], None], ids=str)
@pytest.mark.parametrize("extra", ["", "new keys", "leftpad", "batch_idx"])
def test_cache(lengths, extra):
    """Against attention over each sequence's own keys; the cache holds the new keys afterwards."""
    num_queries, slots = 2, 9
    q = randn(3, num_queries, 4, 16)
    caches = [randn(4, slots, 2, 16, seed=i) for i in (1, 2)]
    k, v = ([randn(3, num_queries, 2, 16, seed=i) for i in (3, 4)] if extra == "new keys" else (None, None))
    if extra == "new keys" and lengths is None:
        with pytest.raises(ValueError, match="cache_seqlens must be given with k and v"):
            fa.flash_attn_with_kvcache(q, *caches, k, v)
        return
    order = [3, 0, 2] if extra == "batch_idx" else [0, 1, 2]
    starts = [0, 2, 0] if extra == "leftpad" else [0, 0, 0]
    ends = [slots] * 3 if lengths is None else [lengths] * 3 if isinstance(lengths, int) else lengths
    expected_caches = [x.clone() for x in caches]
    expected = []
    for i, (row, start, end) in enumerate(zip(order, starts, ends, strict=True)):
        if k is not None:
            for cache, new in zip(expected_caches, (k, v), strict=True):
                cache[row, end : end + num_queries] = new[i]
            end += num_queries
        keys, values = (cache[None, row, start:end] for cache in expected_caches)
        expected.append(plain(q[i : i + 1], keys, values, causal=True, window_size=(4, -1)))

    def tensor(numbers):
        return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)

    got = fa.flash_attn_with_kvcache(
        q, *caches, k, v, causal=True, window_size=(4, -1),
        cache_seqlens=tensor(lengths) if isinstance(lengths, list) else lengths,
        cache_batch_idx=tensor(order) if extra == "batch_idx" else None,
        cache_leftpad=tensor(starts) if extra == "leftpad" else None,
    )
    torch.testing.assert_close(got, torch.cat(expected).float(), rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, caches, expected_caches))


@pytest.mark.parametrize("options, message", [
    (dict(cache_seqlens=10), "cache_seqlens must be from 0 to 9, got 10"),
    (dict(cache_seqlens=[1, 2]), "cache_seqlens must have one number for each of 3"),
    (dict(cache_seqlens=[1, 2, 3], cache_leftpad=[0, 0, 4]), "cache_leftpad is 4 where cache_seqlens is 3"),
    (dict(cache_batch_idx=[0, 1, 4]), "cache_batch_idx must be from 0 to 3, got 4"),
])
def test_lengths_that_do_not_fit_a_cache(options, message):
    cache = randn(4, 9, 2, 16)
    options = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in options.items()}
    with pytest.raises(ValueError, match=message):
        fa.flash_attn_with_kvcache(randn(3, 1, 2, 16), cache, cache.clone(), **options)


REFUSED = {
    "dropout_p": 0.1, "softcap": 30.0, "alibi_slopes": torch.zeros(2), "block_table": torch.zeros(1, 1),
    "rotary_cos": torch.zeros(9, 8), "rotary_sin": torch.zeros(9, 8), "return_attn_probs": True, "return_softmax_lse": True,
}


@pytest.mark.parametrize("name", fa.__all__)
def test_what_is_not_computed_is_refused_by_name(name):
    function = getattr(fa, name)
    ends = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    lead = (4,) if "varlen" in name else (1, 4)
    packed = 3 if "qkvpacked" in name else 2
    q, kv = randn(*lead, 2, 16), randn(*lead, packed, 2, 16)
    tensors = (kv,) if "qkvpacked" in name else (q, kv) if "kvpacked" in name else (q, q, q)
    if "varlen" in name:
        tensors += (ends, 4) if "qkvpacked" in name else (ends, ends, 4, 4)
    function(*tensors)
    refused = set(inspect.signature(function).parameters) & set(REFUSED)
    assert len(refused) >= 4
    for argument in refused:
        with pytest.raises(NotImplementedError, match=f"nearfar does not support {argument}"):
            function(*tensors, **{argument: REFUSED[argument]})


def test_keys_have_their_own_ends():
    """Fewer keys than queries in one sequence, more in another, none in a third, and keys without queries."""
    ends, ends_k = [0, 5, 7, 9, 9], [0, 2, 8, 8, 11]
    tensors = randn(9, 4, 16), randn(11, 2, 16, seed=1), randn(11, 2, 16, seed=2)

    def one_by_one(q, k, v):
        outputs = []
        for (a, b), (c, d) in zip(itertools.pairwise(ends), itertools.pairwise(ends_k), strict=True):
            outputs.append(plain(q[None, a:b], k[None, c:d], v[None, c:d], causal=True, window_size=(2, -1))[0])
        return torch.cat(outputs)

    seqlens = [torch.tensor(e, dtype=torch.int32, device=DEVICE) for e in (ends, ends_k)]
    options = dict(causal=True, window_size=(2, -1))
    assert_equal(lambda q, k, v: fa.flash_attn_varlen_func(q, k, v, *seqlens, 5, 6, **options), one_by_one, tensors)


@pytest.mark.parametrize("call, message", [
    (lambda x: fa.flash_attn_func(x[0], x, x), r"q must have 4 dimensions \(B, N, H, D\)"),
    (lambda x: fa.flash_attn_qkvpacked_func(x), r"qkv must have shape \(B, N, 3, H, D\)"),
    (lambda x: fa.flash_attn_kvpacked_func(x, x), r"kv must have shape \(B, M, 2, Hkv, D\)"),
    (lambda x: fa.flash_attn_varlen_func(x, x, x, None, None, 4, 4), r"q must have 3 dimensions \(total, H, D\)"),
])
def test_wrong_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call(randn(1, 4, 2, 16))
