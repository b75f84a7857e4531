"""Softmax and affine-scaled attention in CUDA C++ without a GPU, in the emulation."""

import math

import pytest
import torch
from emulated import Conditions, Extension, Guarded, build, launch, through_the_operator
from harness import Sample, accumulation, assert_accurate, randn
from samples import affine as oracle

from nearfar import _cuda

pytestmark = pytest.mark.full

CHUNK = 128  # kAffineChunk, and kAffineTerms


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    launchers = {f"affine__{name}": [f"affine_{name}"] for name in ("forward", "backward")}
    return build(tmp_path_factory.mktemp("emulated"), **launchers)


# Copies that land at once, with products that read late, and the other way round; each in another order of lanes.
ALL_CONDITIONS = (Conditions(), Conditions(late_copies=True, seed=1))

SAMPLES = {
    "causal": dict(length=300, causal=True, affine=True),
    "causal, plain": dict(length=300, causal=True),
    "128 wide, heads share keys": dict(width=128, heads=(4, 2), length=150, causal=True, affine=True, sink=True),
    "full": dict(length=70, keys=300, affine=True),
    "full, whole tiles": dict(length=128, keys=256, affine=True, batch=2),
    "last queries": dict(length=40, keys=700, causal=True, affine=True, sink=True),
    "some keys ahead": dict(length=150, window_size=(-1, 70), affine=True),
    "queries without keys": dict(length=200, keys=60, causal=True, affine=True, sink=True),
    "one token": dict(length=1, causal=True, affine=True),
    "sharp weights": dict(length=140, scale=2.0, causal=True),
}


def make(dtype, width=64, heads=(1, 1), length=200, keys=None, batch=1, affine=False, sink=False, **options):
    keys = length if keys is None else keys
    tensors = {
        name: randn(batch, count, rows, width, dtype=dtype, seed=seed, device="cpu")
        for seed, (name, count, rows) in enumerate((("q", heads[0], length), ("k", heads[1], keys), ("v", heads[1], keys)))
    }
    if affine:
        for seed, name in enumerate(("alpha", "beta")):
            tensors[name] = randn(batch, heads[0], length, seed=7 + seed, device="cpu")
    if sink:
        tensors["sink"] = randn(heads[0], seed=9, device="cpu")
    return Sample(tensors, options)


def numbers(q, k, sample):
    """What both launchers take beside tensors."""
    return dict(
        batches=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1], num_queries=q.shape[2], num_keys=k.shape[2],
        width=q.shape[3], right=oracle.window(sample.options)[1], scale=oracle.score_factor(sample.options, q),
    )


def guard(guarded, sample):
    """The inputs, and the sums of values that beta needs."""
    given = {name: guarded.copy(x) if x.dim() == 4 else x for name, x in sample.tensors.items()}
    if "beta" in given:
        v = given["v"].float()
        padded = torch.nn.functional.pad(v, (0, 0, 0, -v.shape[2] % CHUNK))
        given["sums"] = padded.unflatten(2, (-1, CHUNK)).sum(3).cumsum(2).contiguous()
    return given


def forward(kernels, sample, conditions):
    guarded = Guarded(poison=conditions.seed)
    given = guard(guarded, sample)
    q, k, _ = (given[name] for name in "qkv")
    found = dict(o=guarded.copy(torch.full_like(q, math.nan)), lse=guarded.empty(q.shape[:3], torch.float32))
    if "alpha" in given:
        found["u"] = guarded.empty(q.shape, q.dtype)
    tensors = given | found | dict(counter=guarded.empty((1,), torch.int32))
    kind = str(q.dtype).removeprefix("torch.")
    launch(kernels["affine_forward"], kind, tensors, conditions, **numbers(q, k, sample))
    guarded.assert_intact()
    return found


def backward(kernels, sample, do, found, conditions):
    """Gradients by name, of what the forward has found."""
    guarded = Guarded(poison=conditions.seed)
    given = guard(guarded, sample)
    q, k, v = (given[name] for name in "qkv")
    rows, padded = q.shape[:3], -(-q.shape[2] // CHUNK) * CHUNK
    given |= dict(grad_o=guarded.copy(do), lse=found["lse"], u=guarded.copy(found.get("u", found["o"])))
    gradients = {f"d{name}": guarded.copy(torch.full_like(x, math.nan)) for name, x in dict(q=q, k=k, v=v).items()}
    gradients["m"] = guarded.empty(rows, torch.float32)
    if "beta" in given:
        gradients["dbeta"] = guarded.empty(rows, torch.float32)
    spaces = dict(
        terms=guarded.empty((4, *rows[:2], padded), torch.float32), counters=guarded.empty((2,), torch.int32)
    )
    kind = str(q.dtype).removeprefix("torch.")
    tensors = given | gradients | spaces
    exact = "alpha" in given or "sink" in given
    launch(kernels["affine_backward"], kind, tensors, conditions, exact=exact, **numbers(q, k, sample))
    guarded.assert_intact()
    m = gradients.pop("m")
    return gradients | (dict(dalpha=m) if "alpha" in given else {})


def check(sample, found):
    tensors, dtype = sample.tensors, sample.tensors["q"].dtype
    call = oracle.visible(sample), oracle.score_factor(sample.options, tensors["q"])
    for name in ("o", "u") if "u" in found else ("o",):
        inputs = {n: x for n, x in tensors.items() if name == "o" or n not in ("alpha", "beta")}

        def evaluate(function, dtype, inputs=inputs):
            numbers = torch.promote_types(dtype, torch.float32)
            return function(*call, **{n: x.to(dtype if n in "qkv" else numbers) for n, x in inputs.items()})

        exact, rough = evaluate(oracle.dense, torch.float64), evaluate(oracle.plain, accumulation(dtype))
        scale = oracle.scales(*call, torch.ones_like(exact), **{n: x.double() for n, x in inputs.items()})[0]
        assert_accurate(name, found[name], exact, rough, scale, dtype)
    q, k = (tensors[name].double() for name in "qk")
    scores = ((q @ oracle.to_query_heads(q, k).mT) * call[1]).masked_fill(~call[0], -math.inf)
    if "sink" in tensors:
        scores = torch.cat((scores, tensors["sink"].double()[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    lse = torch.where(call[0].any(-1), scores.logsumexp(-1) * math.log2(math.e), 0)
    torch.testing.assert_close(found["lse"].double(), lse, rtol=1e-5, atol=1e-5)


def check_gradients(sample, do, o, gradients):
    named = {name: gradients[f"d{name}"] for name in sample.tensors if name != "sink"}  # that of the sink is torch's work
    oracle.check(sample, do, o, named, names=list(named))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_against_the_oracle(kernels, name, dtype):
    sample = make(dtype, **SAMPLES[name])
    do = randn(*sample.tensors["q"].shape, dtype=dtype, seed=11, device="cpu")
    first = None
    for conditions in ALL_CONDITIONS:
        found = forward(kernels, sample, conditions)
        check(sample, found)
        gradients = backward(kernels, sample, do, found, conditions)
        check_gradients(sample, do, found["o"], gradients)
        found |= gradients
        first = found if first is None else first
        for which, x in found.items():
            assert torch.equal(x, first[which]), f"{which} depends on the order"


def test_what_a_query_cannot_see_changes_no_bit(kernels):
    """Later keys change nothing for it, nor later queries for the keys that only they see."""
    sample = make(torch.float16, length=300, causal=True, affine=True)
    do = randn(*sample.tensors["q"].shape, dtype=torch.float16, seed=11, device="cpu")
    do[:, :, 130:] = 0
    before = forward(kernels, sample, Conditions())
    before |= backward(kernels, sample, do, before, Conditions())
    for name in "qkv":
        sample.tensors[name][:, :, 130:] = 1e3 * randn(*sample.tensors[name][:, :, 130:].shape, seed=5, device="cpu")
    for name in ("alpha", "beta"):
        sample.tensors[name][:, :, 130:] = 9
    after = forward(kernels, sample, Conditions(seed=3))
    after |= backward(kernels, sample, do, after, Conditions(seed=3))
    for name, x in before.items():
        assert torch.equal(x[:, :, :130], after[name][:, :, :130]), name


@pytest.mark.parametrize(
    ("affine", "layout", "backends"),
    [
        (True, "tokens before heads", ("cuda", "cuda")),
        (True, "tokens before heads", ("cuda", "triton")),
        (True, "off by eight bytes", ("triton", "cuda")),
        (False, "off by eight bytes", ("cuda", "cuda")),
        (False, "tokens before heads", ("cuda", "triton")),
        (False, "tokens before heads", ("triton", "cuda")),
    ],
    ids=str,
)
def test_through_the_operator(affine, layout, backends, kernels, monkeypatch):
    """Arguments arrive where they belong, and either backward takes what either forward saves."""
    monkeypatch.setattr(_cuda, "extension", Extension(kernels, AFFINE_CHUNK=CHUNK, AFFINE_TERMS=CHUNK))
    monkeypatch.setattr(_cuda, "stream_of", lambda tensor: 0)
    sample = make(torch.float16, heads=(2, 1), batch=2, length=150, keys=170, causal=True, affine=affine, sink=True)
    operator = torch.ops.nearfar.affine_attention
    oracle.check(sample, *through_the_operator(operator, oracle.op_arguments, sample, layout, backends))
