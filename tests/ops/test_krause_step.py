"""Decoding with Krause attention: every step against the row of the whole sequence, ties, lengths, graphs, bad input."""

import pytest
import torch
from harness import DEVICE, DTYPES, Sample, accumulation, assert_accurate, needs_gpu, randn
from samples.krause import best, dense, plain, scales
from samples.krause_step import FORMS, cache_before, garbage, positions_of, sample_of, step, token

import nearfar as nf
from nearfar import _cuda
from nearfar.kernels.krause import MAX_CANDIDATES
from nearfar.ops import krause_step as operator
from nearfar.runtime import choices
from nearfar.runtime.tensors import Layout

needs_extension = pytest.mark.skipif(
    DEVICE != "cuda" or _cuda.extension is None, reason=f"needs a CUDA device and nearfar._C ({_cuda.unavailable_reason})"
)
BACKENDS = ["triton", "reference", pytest.param("cuda", marks=[pytest.mark.gpu, needs_extension])]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def seen(sample, b, position):
    """The part of a sample that a query of sequence b sees, as a sample: one query, and its keys in the order of positions."""
    first = max(0, position - sample.options["locality"].left)
    q, k, v, sigma = sample.tensors.values()
    keys = slice(first, position + 1)
    return Sample({"q": q[b : b + 1, :, [position]], "k": k[b : b + 1, :, keys], "v": v[b : b + 1, :, keys], "sigma": sigma},
                  sample.options)


def check(sample, positions, o):
    """Assert the rule of accuracy for each sequence; with top_k scores must be exact, so that there is one selection."""
    for b, position in enumerate(positions):
        part = seen(sample, b, position)
        keep, (q, k, v, sigma) = best(part), part.tensors.values()
        wide = [x.double() for x in (q, k, v, sigma)]
        exact, rough = dense(*wide, keep), plain(*(x.to(accumulation(v.dtype)) for x in (q, k, v, sigma)), keep)
        scale, _ = scales(*wide, keep, torch.ones_like(exact))
        assert o.dtype == v.dtype
        assert_accurate(f"o of sequence {b}", o[b : b + 1], exact, rough, scale, v.dtype)


# ---------------------------------------------------------------------------------------------------------- sequences


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_token_by_token(dtype, backend):
    """Over more than two rounds of the ring, in place, with keys that tie."""
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernel takes 16-bit numbers")
    sample = sample_of(7, 17, dtype, high=1, top_k=3)
    whole = nf.krause_attention(**sample.tensors, **sample.options, backend="reference")
    _, k, v, _ = sample.tensors.values()
    cache = garbage(7, k, v)
    addresses = [x.data_ptr() for x in cache]
    for p in range(17):
        out = torch.full_like(whole[:, :, :1], float("nan"))
        assert step(sample, [p, p], cache, backend, out=out) is out
        check(sample, [p, p], out)
        torch.testing.assert_close(out, whole[:, :, p : p + 1], rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=2e-3)
        expected = cache_before(sample, [p + 1, p + 1])
        for name, x, y in zip(cache._fields, cache, expected, strict=True):
            assert torch.equal(x.nan_to_num(7), y.nan_to_num(7)), name
    assert [x.data_ptr() for x in cache] == addresses


@each_backend
@each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_sequences_of_different_lengths(form, dtype, backend):
    options = FORMS[form]
    if backend == "cuda" and (dtype == torch.float32 or options.get("width", 32) not in _cuda.KRAUSE_WIDTHS):
        pytest.skip("the CUDA kernel takes 16-bit numbers, 32, 64 or 128 wide")
    if DEVICE == "cpu" and dtype != torch.float32 and backend == "triton" and options["window"] > 100:
        pytest.skip("slow in the interpreter")
    positions = positions_of(**options)
    sample = sample_of(dtype=dtype, batch=len(positions), **options)
    cache = cache_before(sample, positions)
    o = step(sample, positions, cache, backend)
    check(sample, positions, o)
    expected = cache_before(sample, [p + 1 for p in positions])
    for name, x, y in zip(cache._fields, cache, expected, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7)), name


@each_backend
def test_of_equal_keys_the_oldest_are_kept_whatever_their_slots(backend):
    """All keys are equal, top_k is 3: the output is the mean of the three oldest values."""
    dtype = torch.float16
    sample = sample_of(10, 30, dtype, batch=30, top_k=3)
    sample.tensors["k"].copy_(sample.tensors["k"][:, :, :1].expand(-1, -1, 30, -1))
    positions = list(range(30))
    o = step(sample, positions, cache_before(sample, positions), backend).double()
    for p in positions:
        first = max(0, p - 9)
        values = sample.tensors["v"][p, :, first : min(first + 3, p + 1)].double()
        expected = values.mean(1).repeat_interleave(2, 0)
        assert (o[p, :, 0] - expected).abs().max() <= 2 * torch.finfo(dtype).eps * values.abs().max(), p


def test_reference_in_float64():
    sample = sample_of(9, 30, torch.float64, batch=4, width=5, value_width=3, top_k=4)
    sample.tensors["sigma"] = sample.tensors["sigma"].double()
    positions = [0, 8, 9, 29]
    o = step(sample, positions, cache_before(sample, positions), "reference")
    for b, position in enumerate(positions):
        part = seen(sample, b, position)
        torch.testing.assert_close(o[b : b + 1], dense(**part.tensors, keep=best(part)), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------- what a step leaves alone


@each_backend
def test_a_sequence_does_not_see_others_and_starts_anew_at_length_0(backend):
    dtype = torch.float16
    sample, positions = sample_of(12, 30, dtype), [20, 29]
    cache = cache_before(sample, positions)
    cache.k[1], cache.v[1], cache.length[1] = float("nan"), float("inf"), 0
    o = step(sample, positions, cache, backend)
    torch.testing.assert_close(o[1], sample.tensors["v"][1, :, 29:30].repeat_interleave(2, 0))  # its own value alone
    assert torch.equal(o[:1], step(sample, positions, cache_before(sample, positions), backend)[:1])
    assert cache.length.tolist() == [21, 1]


@each_backend
@each_dtype
def test_a_bandwidth_that_is_not_positive_is_not_hidden(dtype, backend):
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernel takes 16-bit numbers")
    sample, positions = sample_of(12, 30, dtype, top_k=3), [20, 29]
    sample.tensors["sigma"][1] = -1.0
    cache = cache_before(sample, positions)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="^sigma must be positive, got -1"):
            step(sample, positions, cache, backend)
        assert cache.length.tolist() == positions  # nothing was written
    elif backend != "reference":
        o = step(sample, positions, cache, backend)
        assert o[:, 1].isnan().all() and o[:, [0, 2, 3]].isfinite().all()


@each_backend
def test_strided_tokens_and_no_gradient(backend):
    """As a projection leaves them, (B, 1, H, D), and with a head dimension that is not contiguous."""
    sample, positions = sample_of(6, 20, torch.float16), [3, 19]
    expected = step(sample, positions, cache_before(sample, positions), backend)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in token(sample, positions))
    sigma = sample.tensors["sigma"].clone().requires_grad_()
    o = nf.krause_attention_step(q, k, v, cache_before(sample, positions), sigma, backend=backend)
    assert torch.equal(o, expected) and not o.requires_grad
    q, k, v = (x.detach().repeat_interleave(2, 3)[..., ::2] for x in (q, k, v))
    assert torch.equal(nf.krause_attention_step(q, k, v, cache_before(sample, positions), sigma, backend=backend), expected)


@each_backend
def test_under_autocast(backend):
    sample, positions = sample_of(6, 20), [3, 19]
    half = Sample({n: x if n == "sigma" else x.half() for n, x in sample.tensors.items()}, sample.options)
    caches = [cache_before(half, positions) for _ in range(2)]
    with torch.autocast(DEVICE, dtype=torch.float16):
        o = step(sample, positions, caches[0], backend)
    assert o.dtype == torch.float16 and torch.equal(o, step(half, positions, caches[1], backend))


@each_backend
def test_an_empty_batch(backend):
    sample = sample_of(6, 1, torch.float16, batch=1)
    q, k, v = (x[:0] for x in token(sample, [0]))
    o = nf.krause_attention_step(q, k, v, garbage(6, k, v), 2.0, backend=backend)
    assert o.shape == (0, 4, 1, 32)


# ------------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_extension)])
def test_allocates_nothing(backend):
    sample = sample_of(64, 70, torch.bfloat16, width=64, value_width=64, top_k=9)
    arguments, cache = token(sample, [69, 9]), cache_before(sample, [69, 9])
    out = torch.empty_like(arguments[0])
    for _ in range(2):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        nf.krause_attention_step(*arguments, cache, sample.tensors["sigma"], top_k=9, out=out, backend=backend)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_extension)])
def test_a_graph_replays_steps(backend):
    """One graph, replayed for each token: the cache counts on the device."""
    sample = sample_of(20, 50, torch.bfloat16, width=64, value_width=64, high=2, top_k=7)
    cache, static = cache_before(sample, [0, 0]), token(sample, [0, 0])
    out = torch.empty_like(static[0])

    def run():
        nf.krause_attention_step(*static, cache, sample.tensors["sigma"], top_k=7, out=out, backend=backend)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    cache.length.zero_()
    for p in range(50):
        for x, new in zip(static, token(sample, [p, p]), strict=True):
            x.copy_(new)
        graph.replay()
        check(sample, [p, p], out)
    assert cache.length.tolist() == [50, 50]


# -------------------------------------------------------------------------------------------- what the CUDA kernel serves


class Claimed:
    """A meta tensor that claims to be on a CUDA device."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, width=64, dtype=torch.float16, row=72, start=0):
        tensor = torch.empty(2, 4, 1, row, dtype=dtype, device="meta")[..., start : start + width]
        self.shape, self.dtype, self.stride = tensor.shape, tensor.dtype, tensor.stride
        self.data_ptr = lambda: 4096 + 2 * start


REASONS = {
    None: lambda: (Claimed(), Claimed(), Claimed()),
    "q is on cpu": lambda: [torch.empty(2, 4, 1, 64, dtype=torch.float16)] * 3,
    "q has dtype torch.float32": lambda: [Claimed(dtype=torch.float32)] * 3,
    "48 and 48 wide": lambda: [Claimed(48)] * 3,
    "64 and 32 wide": lambda: (Claimed(), Claimed(), Claimed(32)),
    "rows of k do not start": lambda: (Claimed(), Claimed(start=4), Claimed()),
    "rows of v do not start": lambda: (Claimed(), Claimed(), Claimed(row=68)),
    "rows of cache.k or cache.v do not start": lambda: (Claimed(), Claimed(), Claimed(), Claimed(start=4)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_the_cuda_kernel_does_not_serve_a_call(reason, monkeypatch):
    monkeypatch.setattr(_cuda, "extension", object())
    monkeypatch.setattr(_cuda, "_architecture_reason", lambda index: None)
    q, k, v, *rest = REASONS[reason]()
    cached = rest[0] if rest else Claimed()
    found = _cuda.krause_step_reason(q, k, v, nf.KrauseCache(Claimed(), cached, None))
    assert found is None if reason is None else reason in found


@pytest.mark.skipif(_cuda.extension is None, reason=str(_cuda.unavailable_reason))
def test_the_kernel_serves_every_cache():
    assert _cuda.extension.KRAUSE_STEP_WINDOW == MAX_CANDIDATES  # which is what the public function checks


@pytest.mark.gpu
@needs_extension
@each_dtype
def test_cuda_and_triton_agree_where_scores_are_exact(dtype):
    if dtype == torch.float32:
        pytest.skip("the CUDA kernel takes 16-bit numbers")
    for window, width, heads in ((128, 64, 8), (1024, 128, 32), (32, 32, 2), (500, 64, 1)):
        sample = sample_of(window, 1100, dtype, heads=heads, kv_heads=1, width=width, value_width=width, high=1, top_k=30)
        results = [step(sample, [1099, 40], cache_before(sample, [1099, 40]), backend) for backend in ("triton", "cuda")]
        torch.testing.assert_close(*results, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------------------------------- bad input


def call(**changes):
    """Arguments of a call that is right, but for what changes."""
    cache = nf.KrauseCache.empty(2, 2, 6, 16, 24, device=DEVICE)
    q, k, v = randn(2, 4, 1, 16), randn(2, 2, 1, 16, seed=1), randn(2, 2, 1, 24, seed=2)
    return {"q": q, "k": k, "v": v, "cache": cache, "sigma": 2.0, **changes}


def cache(batch=2, heads=2, window=6, width=16, value_width=24, dtype=torch.float32, device=DEVICE, **parts):
    return nf.KrauseCache.empty(batch, heads, window, width, value_width, dtype=dtype, device=device)._replace(**parts)


BAD = {
    "^cache must be a KrauseCache, got tuple": lambda: dict(cache=tuple(cache())),
    "^a step takes 1 token, got q of length 2": lambda: dict(q=randn(2, 4, 2, 16)),
    "^a step takes 1 token, got k of length 3": lambda: dict(k=randn(2, 2, 3, 16), v=randn(2, 2, 3, 24)),
    "^k must have the width of q, 16, got 8": lambda: dict(k=randn(2, 2, 1, 8)),
    "^q must have a multiple of the 2 heads": lambda: dict(q=randn(2, 3, 1, 16)),
    "^v must have the dtype of q": lambda: dict(v=randn(2, 2, 1, 24, dtype=torch.float16)),
    "^q must be a torch.Tensor": lambda: dict(q=[1.0]),
    r"^cache.k must have shape \(2, 2, 6, 16\), got \(2, 1, 6, 16\)": lambda: dict(cache=cache(heads=1)),
    r"^cache.k must have shape \(2, 2, 6, 16\), got \(3, 2, 6, 16\)": lambda: dict(cache=cache(batch=3)),
    r"^cache.v must have shape \(2, 2, 6, 24\), got \(2, 2, 6, 16\)": lambda: dict(cache=cache(value_width=16)),
    r"^cache.v must have shape \(2, 2, 6, 24\), got \(2, 2, 7, 24\)": lambda: dict(cache=cache(v=cache(window=7).v)),
    "^cache.k must be torch.float32, got torch.float16": lambda: dict(cache=cache(dtype=torch.float16)),
    "^cache.k must be on .*, got meta": lambda: dict(cache=cache(device="meta")),
    "^cache.length must be torch.int32, got torch.int64": lambda: dict(cache=cache(length=torch.zeros(2, dtype=torch.int64))),
    r"^cache.length must have shape \(2,\), got \(3,\)": lambda: dict(cache=cache(length=cache(batch=3).length)),
    "^cache.length must be a torch.Tensor, got int": lambda: dict(cache=cache(length=3)),
    "^cache.k must have shape .* at least one slot": lambda: dict(cache=cache(k=torch.zeros(2, 2, 0, 16, device=DEVICE))),
    "^cache.v must be contiguous": lambda: dict(cache=cache(v=torch.zeros(2, 2, 24, 6, device=DEVICE).mT)),
    "^top_k must be at least 1, got 0": lambda: dict(top_k=0),
    "^top_k must be an int or None, got float": lambda: dict(top_k=2.0),
    "^sigma must be positive, got -2": lambda: dict(sigma=-2),
    "^sigma must be a number or one number per query head": lambda: dict(sigma=torch.ones(3, device=DEVICE)),
    r"^out must have shape \(2, 4, 1, 24\), got \(2, 4, 1, 16\)": lambda: dict(out=randn(2, 4, 1, 16)),
    "^out must be torch.float32, got torch.float16": lambda: dict(out=randn(2, 4, 1, 24, dtype=torch.float16)),
    "^out must have a contiguous last dimension": lambda: dict(out=torch.zeros(2, 4, 24, 2, device=DEVICE)[..., :1].mT),
    "^backend must be": lambda: dict(backend="cudnn"),
    "cannot serve this call: cache has 1025 slots; kernels take at most 1024": lambda: dict(
        cache=cache(window=1025), backend="triton"
    ),
    "cannot serve this call: v is 20 wide": lambda: dict(
        v=randn(2, 2, 1, 20), cache=cache(value_width=20), backend="triton"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError), match=message):
        nf.krause_attention_step(**call(**BAD[message]()))


def test_the_call_that_bad_input_spoils_is_right():
    nf.krause_attention_step(**call())


@pytest.mark.parametrize("window", [0, -1])
def test_a_cache_has_a_slot(window):
    with pytest.raises(ValueError, match=f"^window must be at least 1, got {window}"):
        nf.KrauseCache.empty(1, 1, window, 16)


@pytest.mark.parametrize("length, given", [(0, 0), (4, 4), (7, 7), (16, 16), (16, 7), (16, 11)])
def test_the_cache_after_a_prompt_is_that_of_its_tokens(length, given):
    sample = sample_of(7, 20, torch.float16, value_width=24)
    _, k, v, _ = (x[:, :, length - given : length] if x.dim() == 4 else x for x in sample.tensors.values())
    made = nf.KrauseCache.after(k, v, 7, length=length)
    for x, y in zip(made, cache_before(sample, [length, length]), strict=True):
        assert torch.equal(x, y.nan_to_num(0)) and x.dtype == y.dtype and x.is_contiguous()


@pytest.mark.parametrize("length", [3, 16])
def test_a_prompt_must_be_whole_or_fill_the_window(length):
    k = randn(1, 1, 6, 16)
    with pytest.raises(ValueError, match=f"^k and v must be those of all {length} tokens or of the last 7 or more, got 6"):
        nf.KrauseCache.after(k, k, 7, length=length)
    with pytest.raises(ValueError, match=r"^v must have the heads and length of k, \(1, 6\), got \(1, 5\)"):
        nf.KrauseCache.after(k, k[:, :, :5], 7)


def test_an_empty_cache():
    made = nf.KrauseCache.empty(3, 2, 7, 16, device=DEVICE, dtype=torch.float16)
    assert made.k.shape == made.v.shape == (3, 2, 7, 16) and made.k.dtype == made.v.dtype == torch.float16
    assert made.length.dtype == torch.int32 and made.length.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("window", "selects", "first"), [
    (1, False, "triton"), (32, True, "cuda"), (33, False, "cuda"), (1024, True, "cuda"), (1025, False, "triton"),
])
@pytest.mark.parametrize("hopper", [True, False])
def test_auto_asks_first_what_was_measured_faster(window, selects, first, hopper, monkeypatch):
    monkeypatch.setattr(choices, "_capability", lambda index: 9 if hopper else 8)

    def layout(*shape, dtype=torch.bfloat16):
        return Layout(torch.Size(shape), torch.empty(shape, device="meta").stride(), dtype, torch.device("cuda", 0))

    q, k, length = layout(2, 4, 1, 64), layout(2, 4, window, 64), layout(2, dtype=torch.int32)
    _, order, _ = operator._checked.__wrapped__((q, q, q, k, k, length), 3, selects)
    assert order[0] == (first if hopper else "triton")
