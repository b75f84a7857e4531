"""Dropout of attention weights: what a seed drops, the same in every backend and direction, and where seeds come from."""

import numpy as np
import pytest
import samples.affine
import samples.krause
import torch
import triton
import triton.language as tl
from harness import DEVICE, DTYPES, Sample, assert_same, leaves, like, of_the_reference, randn, run
from nearfar.triton_kernels.dropout import keeps, keeps_of
from samples import dropout
from samples.grid import mask
from test_grid import make as make_on_grid
from torch.utils.checkpoint import checkpoint

import nearfar as nf
from nearfar.reference.dropout import philox

P, SEED = 0.3, -(2**62) + 12345
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
full = pytest.mark.full

# ---------------------------------------------------------------------------------------------------------------- words

# From the known answers of Random123, the authors' library: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_words_are_those_of_philox(counter, key, words):
    assert [int(x) for x in philox([torch.tensor(c) for c in counter], key)] == words
    assert [int(x) for x in dropout.philox(counter, key)] == words


@triton.jit
def store_masks(seed, first, second, batch_head, first_row, first_key, drop_below, ROWS: tl.constexpr, KEYS: tl.constexpr):
    rows, columns = first_row + tl.arange(0, ROWS), tl.arange(0, KEYS)
    places = tl.arange(0, ROWS)[:, None] * KEYS + columns[None, :]
    tl.store(first + places, keeps(seed, batch_head, rows, first_key, drop_below, KEYS).to(tl.int8))
    tl.store(second + places, keeps_of(seed, batch_head, rows, first_key + columns, drop_below).to(tl.int8))


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1])
def test_kernels_drop_the_same(seed):
    expected = dropout.factor(seed, P, 1, 6, 80, 112)[0, 5, 64:80, 48:112] > 0
    masks = torch.empty(2, 16, 64, dtype=torch.int8, device=DEVICE)
    store_masks[(1,)](torch.tensor([seed], device=DEVICE), *masks, 5, 64, 48, round(P * 2**31), 16, 64)
    for found in masks:
        assert torch.equal(found.cpu().bool(), expected)


def test_weights_are_dropped_at_the_rate_and_independently():
    """Of 2^19 weights: five standard deviations of the mean, and of the correlations with the neighbours in each direction."""
    kept = (dropout.factor(SEED, P, 2, 4, 256, 256) > 0).numpy().astype(np.float64)
    deviations = (kept - (1 - P)) / np.sqrt(P * (1 - P))
    bound = 5 / np.sqrt(kept.size)
    assert abs(deviations.mean()) < bound
    for axis in range(4):
        neighbours = np.roll(deviations, 1, axis)
        assert abs((deviations * neighbours).mean()) < bound


# --------------------------------------------------------------------------------------------------------------- Krause

N = 24
ENDS = torch.tensor([0, 7, 7, N], dtype=torch.int32, device=DEVICE)
KRAUSE = {
    "window": dict(locality=nf.SlidingWindow(9, 2), batch=2),
    "window, top 5": dict(locality=nf.SlidingWindow(9, 4), top_k=5),
    "every key": dict(locality=None),
    "packed, top 6": dict(locality=nf.SlidingWindow(15), top_k=6, cu_seqlens=ENDS),
    "more keys": dict(locality=nf.SlidingWindow(9), keys=33),
    "grid": dict(locality=nf.GridNeighborhood((4, 5), 1, global_tokens=2)),
    "grid, top 5": dict(locality=nf.GridNeighborhood((4, 5), 1, global_tokens=2), top_k=5),
}
each_krause = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("window", "grid") else full) for n in KRAUSE]
)


def make(name, dtype):
    options = dict(KRAUSE[name])
    if isinstance(options["locality"], nf.GridNeighborhood):
        return make_on_grid(options["locality"], dtype, options.get("top_k"))
    batch, keys = options.pop("batch", 1), options.pop("keys", N)
    shapes = {"q": (batch, 2, N, 16), "k": (batch, 1, keys, 16), "v": (batch, 1, keys, 24)}
    tensors = {x: randn(*shape, dtype=dtype, seed=seed) for seed, (x, shape) in enumerate(shapes.items())}
    return Sample({**tensors, "sigma": torch.tensor([2.5, 3.0], device=DEVICE)}, options)


def dropping(sample, **options):
    return Sample(sample.tensors, {**sample.options, "dropout_p": P, "seed": SEED, **options})


def selected(sample):
    """Dropout does not touch the selection."""
    if isinstance(sample.options["locality"], nf.GridNeighborhood) and sample.options["top_k"] is not None:
        wide = -(-sample.tensors["k"].shape[2] // 8) * 8
        k = sample.tensors["k"]
        v = torch.eye(k.shape[2], wide, dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        return nf.krause_attention(**{**sample.tensors, "v": v}, **sample.options, backend="triton")[..., : k.shape[2]] > 0
    return None if sample.options.get("top_k") is None else samples.krause.kernel_selection(sample)


def selected_or_all(sample):
    found = selected(sample)
    return samples.krause.best(sample) if found is None else found


@each_dtype
@each_krause
def test_krause_kernels_are_accurate(name, dtype):
    sample = make(name, dtype)
    o, gradients = run(nf.krause_attention, dropping(sample))
    samples.krause.check(sample, like(o), o, gradients, selected_or_all(sample), factor=dropout.of(sample, SEED, P))


@pytest.mark.parametrize("name", KRAUSE)
def test_the_reference_of_krause_is_the_formula(name):
    sample = make(name, torch.float32)
    o, gradients = run(nf.krause_attention, dropping(sample), backend="reference")
    with of_the_reference():
        keep = samples.krause.best(sample)
        samples.krause.check(sample, like(o), o, gradients, keep, factor=dropout.of(sample, SEED, P))


# --------------------------------------------------------------------------------------------------- affine and softmax

AFFINE = {
    "affine": dict(causal=True, sink=True),
    "affine, window": dict(window_size=(12, 3), more_keys=9),
    "affine, packed": dict(causal=True, packed=True),
    "softmax": dict(more_keys=9),
    "softmax, sink": dict(causal=True, sink=True),
}


def make_affine(name, dtype):
    options = dict(AFFINE[name])
    packed, sink, keys = options.pop("packed", False), options.pop("sink", False), N + options.pop("more_keys", 0)
    if packed:
        options["cu_seqlens"] = ENDS
    shapes = {"q": (1, 2, N, 16), "k": (1, 1, keys, 16), "v": (1, 1, keys, 16)}
    tensors = {x: randn(*shape, dtype=dtype, seed=seed) for seed, (x, shape) in enumerate(shapes.items())}
    if name.startswith("affine"):
        tensors |= samples.affine.random_rows((1, 2, N))
    if sink:
        tensors["sink"] = randn(2, seed=6)
    return Sample(tensors, options)


@each_dtype
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "affine" else full) for n in AFFINE])
def test_affine_kernels_are_accurate(name, dtype):
    sample = make_affine(name, dtype)
    o, gradients = run(samples.affine.attention(sample), dropping(sample))
    samples.affine.check(sample, like(o), o, gradients, factor=dropout.of(sample, SEED, P))


@pytest.mark.parametrize("name", AFFINE)
def test_the_reference_of_affine_is_the_formula(name):
    sample = make_affine(name, torch.float32)
    o, gradients = run(samples.affine.attention(sample), dropping(sample), backend="reference")
    with of_the_reference():
        samples.affine.check(sample, like(o), o, gradients, factor=dropout.of(sample, SEED, P))


def test_the_reference_of_softmax_on_a_grid_is_the_formula():
    locality = nf.ShiftedWindow((6, 8), 2, 1)
    q, k, v, _ = make_on_grid(locality).tensors.values()
    sample = Sample({"q": q, "k": k, "v": v}, {})
    o = nf.softmax_attention(q, k, v, locality=locality, dropout_p=P, seed=SEED, backend="reference")
    expected = samples.affine.dense(
        mask(locality).to(q.device), 0.25, *(x.double() for x in (q, k, v)), factor=dropout.of(sample, SEED, P)
    )
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-5)


@full
def test_the_torch_operator_of_affine():
    sample = make_affine("affine", torch.float32)
    arguments = list(samples.affine.op_arguments(Sample(leaves(sample), sample.options)))
    arguments[7], arguments[-1] = torch.tensor([SEED], device=DEVICE), P
    torch.library.opcheck(torch.ops.nearfar.affine_attention.default, tuple(arguments))


# ---------------------------------------------------------------------------------------------------------------- seeds


def small():
    return make("window, top 5", torch.float32)


def call(sample, **options):
    return nf.krause_attention(**sample.tensors, **sample.options, dropout_p=P, **options)


def test_seeds_are_numbers_tensors_or_drawn():
    sample = small()
    torch.manual_seed(3)
    first, second = call(sample), call(sample)
    torch.manual_seed(3)
    assert torch.equal(call(sample), first) and not torch.equal(first, second)
    number, vector, scalar = (
        call(sample, seed=seed) for seed in (7, torch.tensor([7], device=DEVICE), torch.tensor(7, device=DEVICE))
    )
    assert torch.equal(number, vector) and torch.equal(number, scalar)
    assert not torch.equal(number, call(sample, seed=8))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=full)])
def test_checkpoints_drop_the_same_again(backend):
    sample = small()

    def attend(*tensors):
        o = call(Sample(dict(zip(sample.tensors, tensors, strict=True)), sample.options), backend=backend)
        return o + call(Sample(dict(zip(sample.tensors, tensors, strict=True)), sample.options), backend=backend)

    found = []
    for function in (attend, lambda *tensors: checkpoint(attend, *tensors, use_reentrant=False)):
        torch.manual_seed(5)
        tensors = leaves(sample)
        o = function(*tensors.values())
        found.append((o.detach(), dict(zip(tensors, torch.autograd.grad(o, list(tensors.values()), like(o)), strict=True))))
    assert_same(*found)


@full
def test_without_dropout_the_seed_does_not_count():
    sample = small()
    plain, seeded = (
        nf.krause_attention(**sample.tensors, **sample.options, **seed, backend="triton") for seed in ({}, {"seed": 3})
    )
    assert torch.equal(plain, seeded)


@full
@pytest.mark.parametrize("name", ["window, top 5", "grid"])
def test_compiled_calls(name):
    sample = dropping(make(name, torch.float32), seed=torch.tensor([SEED], device=DEVICE))
    compiled = torch.compile(nf.krause_attention, backend="aot_eager", fullgraph=True)
    for backend in ("triton", "reference"):
        assert_same(run(nf.krause_attention, sample, backend=backend), run(compiled, sample, backend=backend), backend)
    drawn = {**sample.options, "seed": None}
    assert not torch.equal(compiled(**sample.tensors, **drawn), compiled(**sample.tensors, **drawn))


@full
def test_the_torch_operator():
    sample = small()
    arguments = list(samples.krause.op_arguments(Sample(leaves(sample), sample.options)))
    arguments[5], arguments[-1] = torch.tensor([SEED], device=DEVICE), P
    torch.library.opcheck(torch.ops.nearfar.krause_attention.default, tuple(arguments))


@full
def test_the_reference_is_differentiable_twice():
    sample = make("window", torch.float64)
    tensors = [x[:, :, :4, :2].double().detach().cpu().requires_grad_() for x in list(sample.tensors.values())[:3]]

    def attend(q, k, v):
        return nf.krause_attention(q, k, v, 2.0, nf.SlidingWindow(3), dropout_p=P, seed=SEED, backend="reference")

    torch.autograd.gradcheck(attend, tensors)
    torch.autograd.gradgradcheck(attend, tensors)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_cuda_says_why_it_does_not_drop():
    sample = make("window, top 5", torch.float16)
    assert "the CUDA kernels have no dropout" in nf.explain(
        nf.krause_attention, **sample.tensors, **sample.options, dropout_p=P, backend="reference"
    )
    with pytest.raises(ValueError, match="no dropout"):
        call(sample, backend="cuda")
    q, k, v, _ = sample.tensors.values()
    with pytest.raises(ValueError, match="no dropout"):
        nf.softmax_attention(q, k, v, dropout_p=P, backend="cuda")


def test_explaining_draws_nothing():
    sample = small()
    torch.manual_seed(3)
    expected = call(sample, backend="reference")
    torch.manual_seed(3)
    nf.explain(nf.krause_attention, **sample.tensors, **sample.options, dropout_p=P)
    assert torch.equal(call(sample, backend="reference"), expected)


BAD = [
    (dict(dropout_p=1.0), ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
    (dict(dropout_p=-0.1), ValueError, "dropout_p must be at least 0"),
    (dict(dropout_p=float("nan")), ValueError, "dropout_p must be at least 0"),
    (dict(dropout_p="0.1"), TypeError, "dropout_p must be a number, got str"),
    (dict(dropout_p=True), TypeError, "dropout_p must be a number, got bool"),
    (dict(dropout_p=0.1, seed=1.5), TypeError, "seed must be an int or an int64 tensor, got float"),
    (dict(dropout_p=0.1, seed=2**63), ValueError, "seed must be a number of 64 bits"),
    (dict(dropout_p=0.1, seed=torch.zeros(1)), TypeError, "int64 tensor, got torch.float32"),
    (dict(seed=torch.zeros(2, dtype=torch.int64)), ValueError, r"must be one number, got shape \(2,\)"),
    (
        dict(dropout_p=0.1, seed=torch.zeros(1, dtype=torch.int64, device="meta")),
        ValueError,
        "seed must be on the device of q",
    ),
]


@pytest.mark.parametrize("options, error, message", BAD)
def test_bad_input(options, error, message):
    sample = small()
    with pytest.raises(error, match=message):
        nf.krause_attention(**sample.tensors, **sample.options, **options)
    q, k, v, _ = sample.tensors.values()
    with pytest.raises(error, match=message):
        nf.softmax_attention(q, k, v, **options)
