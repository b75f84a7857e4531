"""The CUDA kernels of Krause attention without a GPU, in the emulation."""

import pytest
import torch
from emulated import Conditions, Extension, Guarded, build, launch
from harness import GRADIENTS, LAYOUTS, MISALIGNED, Sample, like, randn
from samples.krause import best, check, decode, dense, keys_like, op_arguments, visible

import nearfar as nf
from nearfar import _cuda
from nearfar.runtime.packing import token_bounds

pytestmark = pytest.mark.full

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


# ------------------------------------------------------------------------------------------------------ the emulated kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The functions krause_forward, krause_backward and krause_step, by name."""
    names = ("forward", "backward", "step")
    return build(tmp_path_factory.mktemp("emulated"), **{f"krause__{name}": [f"krause_{name}"] for name in names})


FEW_STRIPS = Conditions()


def dtype_of(tensors):
    return str(tensors["q"].dtype).removeprefix("torch.")


def run(kernels, sample, do, conditions=FEW_STRIPS, backward=True):
    """(o, lse, bits or None) and the gradients by name."""
    guarded = Guarded(poison=conditions.seed)
    q, k, v, sigma, cu_seqlens, _, back, ahead, top_k, *_ = op_arguments(sample)
    bounds = None if cu_seqlens is None else token_bounds(cu_seqlens, q.shape[2])
    inputs = dict(q=q, k=k, v=v, sigma=sigma, token_bounds=bounds, grad_o=do)
    inputs = {name: guarded.copy(tensor) for name, tensor in inputs.items()}
    numbers = dict(
        sigma_stride=1 if sigma.numel() > 1 else 0, batches=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1],
        num_queries=q.shape[2], num_keys=k.shape[2], width=q.shape[3], back=back, ahead=ahead,
    )
    words = 2 if back + ahead + 1 <= 64 else 4
    saved = dict(o=guarded.empty(q.shape, q.dtype), lse=guarded.empty(q.shape[:3], torch.float32))
    saved["bits"] = guarded.empty((*q.shape[:3], words), torch.int32) if top_k else None
    launch(kernels["krause_forward"], dtype_of(inputs), inputs | saved, conditions, **numbers, top_k=top_k or 0)
    gradients = {name: guarded.empty(inputs[name].shape, inputs[name].dtype) for name in ("q", "k", "v", "sigma")}
    if backward:
        partials = guarded.empty((*q.shape[:2], -(-max(q.shape[2], k.shape[2]) // 64)), torch.float32)
        filled = {f"d{name}": gradient for name, gradient in gradients.items()} | {"partials": partials}
        launch(kernels["krause_backward"], dtype_of(inputs), inputs | saved | filled, conditions, **numbers)
    guarded.assert_intact()
    return tuple(saved.values()), gradients


# ------------------------------------------------------------------------------------------------------------- the tests


def make(dtype, width=32, heads=(1, 1), length=200, keys=None, batch=1, sigmas=None, **options):
    keys = length if keys is None else keys
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32)
    tensors = {
        "q": randn(batch, heads[0], length, width, dtype=dtype, seed=1, device="cpu"),
        "k": randn(batch, heads[1], keys, width, dtype=dtype, seed=2, device="cpu"),
        "v": randn(batch, heads[1], keys, width, dtype=dtype, seed=3, device="cpu"),
        "sigma": torch.linspace(0.6, 1.2, sigmas or heads[0]) * width**0.5,
    }
    return Sample(tensors, options)


def upstream(sample):
    """A gradient of o, half of it random, half such that all rows pull sigma the same way.

    The gradient of sigma is a sum over all pairs. Of random terms most would cancel, and the few that are left be smaller than
    what rounding is allowed: half of them could be missing.
    """
    exact = {name: tensor.double() for name, tensor in sample.tensors.items()}
    change = dense(**{**exact, "sigma": 1.1 * exact["sigma"]}, keep=best(sample)) - dense(**exact, keep=best(sample))
    size = change.square().mean().sqrt().clamp(min=1e-9)  # 0 with one key in reach
    return like(sample.tensors["q"]) + (change / size).to(sample.tensors["q"].dtype)


def selection(sample, saved):
    if sample.options.get("top_k") is None:
        return best(sample)
    mask = visible(sample)
    return decode(saved[2], mask.shape[1]) & mask


SAMPLES = {
    "causal, 128 keys": dict(width=64, length=333, locality=nf.SlidingWindow(127), top_k=96),
    "causal, 128 keys, all": dict(width=64, length=333, locality=nf.SlidingWindow(127)),
    "128 wide": dict(width=128, locality=nf.SlidingWindow(127), top_k=50),
    "128 wide, 64 keys, all": dict(width=128, locality=nf.SlidingWindow(40, 23)),
    "64 keys": dict(width=64, locality=nf.SlidingWindow(63), top_k=48),
    "65 keys on both sides": dict(locality=nf.SlidingWindow(33, 31), top_k=20),
    "keys ahead only": dict(locality=nf.SlidingWindow(0, 127), top_k=64),
    "16 keys": dict(width=64, locality=nf.SlidingWindow(15), top_k=5),
    "its own key only": dict(length=65, locality=nf.SlidingWindow(0), top_k=1),
    "heads share keys": dict(heads=(4, 2), batch=2, length=150, locality=nf.SlidingWindow(100, 9), top_k=30),
    "three heads share keys and sigma": dict(heads=(3, 1), sigmas=1, length=260, locality=nf.SlidingWindow(90)),
    "packed": dict(cu_seqlens=[0, 0, 5, 100, 101, 101, 260], length=260, locality=nf.SlidingWindow(60, 40), top_k=20),
    "packed, all": dict(width=64, cu_seqlens=[0, 130, 133, 190], length=190, locality=nf.SlidingWindow(127)),
    "more keys": dict(width=64, heads=(2, 1), length=70, keys=333, locality=nf.SlidingWindow(80, 9), top_k=33),
    "fewer keys": dict(length=200, keys=90, locality=nf.SlidingWindow(99), top_k=10),
    "one query": dict(heads=(2, 2), length=1, keys=200, locality=nf.SlidingWindow(127), top_k=50),
    "forty heads share sigma": dict(heads=(40, 20), sigmas=1, length=9, locality=nf.SlidingWindow(8)),
}


@each_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_against_the_oracle(name, dtype, kernels):
    """Whatever the order of the lanes, the time at which copies land, and the number of tiles in a strip."""
    sample = make(dtype, **SAMPLES[name])
    do = upstream(sample)
    saved, gradients = run(kernels, sample, do)
    gradients = {name: gradient.view_as(sample.tensors[name]) for name, gradient in gradients.items()}
    check(sample, do, saved[0], gradients, selection(sample, saved))
    for conditions in (FEW_STRIPS._replace(late_copies=True, seed=1), Conditions(device=63, late_copies=True, seed=2)):
        again, gradients_again = run(kernels, sample, do, conditions)
        for first, second in zip(saved, again, strict=True):
            assert first is None or torch.equal(first, second)
        for name, gradient in gradients.items():  # that of sigma is summed strip by strip
            if name != "sigma" or conditions.device == FEW_STRIPS.device:
                assert torch.equal(gradient, gradients_again[name]), name


@each_dtype
@pytest.mark.parametrize("top_k", [1, 50, 127])
@pytest.mark.parametrize("kind", ["equal", "outliers", "close", "signs", "integers"])
def test_selection_is_exact(kind, top_k, dtype, kernels):
    """Scores that float32 holds exactly, most of them many times over, so that no rounding excuses another set."""
    sample = make(dtype, length=140, locality=nf.SlidingWindow(127), top_k=top_k)
    high = 0 if kind == "close" else 3
    sample.tensors["q"].copy_((sample.tensors["q"] * high).round().clamp(-high, high))
    exact = keys_like("integers", sample.tensors["k"]) if kind in ("equal", "outliers") else sample.tensors["k"]
    sample.tensors["k"].copy_(keys_like(kind, exact))
    saved, _ = run(kernels, sample, like(sample.tensors["q"]), backward=False)
    assert torch.equal(selection(sample, saved), best(sample))


@each_dtype
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize("top_k", [None, 20])
def test_nan_stays_in_its_sequence(top_k, name, dtype, kernels):
    """Of packed sequences: the others keep every bit, and who does see it shows it."""
    options = dict(cu_seqlens=[0, 40, 75, 130], length=130, locality=nf.SlidingWindow(33, 20), top_k=top_k)
    sample = make(dtype, **options)
    do = like(sample.tensors["q"])
    saved, gradients = run(kernels, sample, do)
    {**sample.tensors, "do": do}[name][:, :, 40:75, 3] = float("nan")
    saved_then, gradients_then = run(kernels, sample, do)
    others = torch.cat((torch.arange(40), torch.arange(75, 130)))
    assert torch.equal(saved[0][:, :, others], saved_then[0][:, :, others])
    assert name == "do" or saved_then[0][:, :, 40:75].isnan().any(-1).all()
    for gradient in "qkv":
        assert torch.equal(gradients[gradient][:, :, others], gradients_then[gradient][:, :, others]), gradient
        assert (name, gradient) == ("v", "v") or gradients_then[gradient][:, :, 40:75].isnan().any(), gradient


@pytest.mark.parametrize("layout", ["tokens before heads", "off by eight bytes"])
@pytest.mark.parametrize("top_k", [None, 30])
def test_through_the_operator(layout, top_k, kernels, monkeypatch):
    """Arguments arrive where they belong, forward and backward, and what does not start at 16 bytes is copied."""
    monkeypatch.setattr(_cuda, "extension", Extension(kernels, KRAUSE_WINDOW=128, KRAUSE_TILE=64))
    monkeypatch.setattr(_cuda, "stream_of", lambda tensor: 0)
    sample = make(torch.float16, heads=(4, 2), batch=2, length=150, keys=170, locality=nf.SlidingWindow(99, 3), top_k=top_k)
    change = {**LAYOUTS, **MISALIGNED}[layout]
    tensors = {name: (change(x) if x.dim() == 4 else x).requires_grad_() for name, x in sample.tensors.items()}
    assert layout in LAYOUTS or tensors["q"].data_ptr() % 16
    strided = Sample(tensors, sample.options)
    saved = torch.ops.nearfar.krause_attention(*op_arguments(strided), "cuda", "cuda")
    do = GRADIENTS["width before rows"](like(sample.tensors["q"]))
    gradients = torch.autograd.grad(saved[0], list(tensors.values()), do)
    gradients = dict(zip(tensors, gradients, strict=True))
    saved = [x.detach() for x in saved]
    check(sample, do, saved[0], gradients, selection(sample, saved))


def test_errors_are_reported(kernels):
    """By the launcher, and by the emulation: a row that does not start at a multiple of 16 bytes."""
    sample = make(torch.float16, locality=nf.SlidingWindow(128))
    with pytest.raises(AssertionError, match="a window of 1 to 128 keys"):
        run(kernels, sample, like(sample.tensors["q"]))
    sample = make(torch.float16, locality=nf.SlidingWindow(127))
    q, k, v = (sample.tensors[name] for name in "qkv")
    shifted = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view_as(q)
    tensors = dict(q=shifted, k=k, v=v, sigma=sample.tensors["sigma"], o=torch.empty_like(q), lse=torch.empty(1, 1, 200))
    with pytest.raises(AssertionError, match="cp.async: global address not a multiple of 16"):
        launch(
            kernels["krause_forward"], dtype_of(tensors), tensors, FEW_STRIPS, batches=1, heads=1, kv_heads=1,
            num_queries=200, num_keys=200, width=32, back=127, ahead=0,
        )


@each_dtype
@pytest.mark.parametrize(
    "width, heads, window, top_k",
    [(32, (2, 2), 40, None), (64, (8, 2), 130, 50), (128, (3, 1), 70, 7), (64, (9, 1), 33, 33), (32, (4, 4), 1, 1)],
    ids=str,
)
def test_decoding(width, heads, window, top_k, dtype, kernels):
    """Sequences of three lengths: rows are those of the float64 reference, and of the slots only those of new tokens change."""
    tokens = [randn(3, count, 1, width, dtype=dtype, seed=seed, device="cpu") for seed, count in enumerate((*heads, heads[1]))]
    cached = [randn(3, heads[1], window, width, dtype=dtype, seed=seed, device="cpu") for seed in (4, 5)]
    for integers in (*tokens[:2], cached[0]):  # exact scores, many of them equal: the position decides
        integers.round_()
    length = torch.tensor([0, window - 1, 3 * window + window // 2], dtype=torch.int32)
    sigma = torch.linspace(0.6, 1.2, heads[0]) * width**0.5
    cache = nf.KrauseCache(*(x.double() for x in cached), length.clone())
    expected = nf.krause_attention_step(*(x.double() for x in tokens), cache, sigma.double(), top_k=top_k)
    for seed in (1, 2):
        guarded = Guarded(poison=seed)
        filled = {
            name: guarded.empty(x.shape, dtype).copy_(x) for name, x in zip(("cached_k", "cached_v"), cached, strict=True)
        }
        tensors = {name: guarded.copy(x) for name, x in zip("qkv", tokens, strict=True)} | filled
        tensors |= {"length": length, "sigma": sigma, "o": guarded.empty(expected.shape, dtype)}
        numbers = dict(
            sigma_stride=1, batches=3, heads=heads[0], kv_heads=heads[1], window=window, width=width, top_k=top_k or 0
        )
        launch(kernels["krause_step"], dtype_of(tensors), tensors, Conditions(seed=seed), **numbers)
        guarded.assert_intact()
        error = (tensors["o"].double() - expected).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * expected.abs().max()
        assert torch.equal(filled["cached_k"].double(), cache.k) and torch.equal(filled["cached_v"].double(), cache.v)
