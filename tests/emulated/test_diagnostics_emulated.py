"""The CUDA kernels of the streamed diagnostics without a GPU, in the emulation."""

import math

import pytest
import torch
from emulated import Conditions, Guarded, build, launch
from harness import Sample, assert_accurate, randn
from samples import diagnostics as oracle
from samples.diagnostics import check_constants, check_geometry

import nearfar as nf
from nearfar.ops.diagnostics import AttentionStatistics, SelectionGeometry

pytestmark = pytest.mark.full

TILE = 128  # kDiagnosticsTile
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The functions statistics, geometry_select and geometry_separate, by name."""
    return build(
        tmp_path_factory.mktemp("emulated"),
        diagnostics__statistics=["statistics"],
        diagnostics__geometry=["geometry_select", "geometry_separate"],
    )


# Copies that land at once, with products that read late, and the other way round; each in another order of lanes.
ALL_CONDITIONS = (Conditions(), Conditions(late_copies=True, seed=1), Conditions(seed=2))


def make(dtype, width=64, heads=(1, 1), length=200, keys=None, batch=1, whole=False, **options):
    """whole: whole numbers in q and k, whose products float32 holds exactly, most of them many times over."""
    keys = length if keys is None else keys
    tensors = {
        name: randn(batch, count, rows, width, dtype=dtype, seed=seed, device="cpu")
        for seed, (name, count, rows) in enumerate((("q", heads[0], length), ("k", heads[1], keys), ("v", heads[1], keys)))
    }
    if whole:
        for name in "qk":
            tensors[name].mul_(0.7).round_()
    return Sample(tensors, options)


def numbers_of(sample):
    q, k = sample.tensors["q"], sample.tensors["k"]
    left, right = oracle.window(sample.options)
    return dict(
        batches=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1], num_queries=q.shape[2], num_keys=k.shape[2],
        width=q.shape[3], left=left, right=right, scale=oracle.score_factor(sample.options, q),
    )


def dtype_of(sample):
    return str(sample.tensors["q"].dtype).removeprefix("torch.")


def whole_tiles(rows):
    return -(-rows // TILE) * TILE


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


# -------------------------------------------------------------------------------------------------------------- statistics


def statistics(kernels, sample, conditions, view=lambda x: x):
    guarded = Guarded(poison=conditions.seed)
    q, k = (view(guarded.copy(sample.tensors[name])) for name in "qk")
    rows = q.shape[:3]
    outputs = {name: guarded.empty(rows, torch.float32) for name in ("lse", "entropy", "max_weight")}
    outputs["max_key"] = guarded.empty(rows, torch.int64)
    outputs["mass"] = guarded.empty((*rows[:2], k.shape[2]), torch.float32)
    levels = guarded.empty((*rows[:2], whole_tiles(rows[2])), torch.float32)
    tensors = dict(q=q, k=k, levels=levels) | outputs
    launch(kernels["statistics"], dtype_of(sample), tensors, conditions, **numbers_of(sample))
    guarded.assert_intact()
    nothing = torch.zeros(0)  # the mean logit and the sum of weights are no kernel's
    return AttentionStatistics(*outputs.values(), nothing, nothing)


# A ring has three or four slots for tiles of 64 or 128 rows: with 1,200 of them each slot serves several times.
STATISTICS = {
    "causal, heads share keys": dict(heads=(2, 1), length=300, causal=True),
    "several batches": dict(heads=(2, 2), batch=2, length=40),
    "whole tiles": dict(length=256),
    "more keys, 128 wide": dict(width=128, length=33, keys=1200),
    "more keys, causal": dict(length=70, keys=400, causal=True),
    "window on both sides": dict(length=330, locality=nf.SlidingWindow(70, 9), scale=0.5),
    "window ahead, more keys": dict(width=128, length=200, keys=290, locality=nf.SlidingWindow(0, 150)),
    "its own key only": dict(length=130, locality=nf.SlidingWindow(0), scale=3.0),
    "fewer keys": dict(length=1200, keys=3),
    "one token": dict(length=1),
    "the last query": dict(heads=(2, 1), length=1, keys=129, causal=True),
}


@each_dtype
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name, dtype, kernels):
    """Against float64, whatever the order of the lanes and the time at which copies land."""
    sample = make(dtype, **STATISTICS[name])
    found = statistics(kernels, sample, ALL_CONDITIONS[0])
    check_constants(sample, found)
    tensors = {name: sample.tensors[name].double() for name in "qk"}
    exact = oracle.lse_and_entropy(oracle.dense_scores(sample.options, **tensors))
    plain = oracle.lse_and_entropy(oracle.plain_scores(sample.options, **{n: x.float() for n, x in tensors.items()}))
    scales = oracle.scales(sample.options, [torch.zeros_like(x) for x in exact], **tensors)[0]
    for part, *expected in zip(("lse", "entropy"), exact, plain, scales, strict=True):
        assert_accurate(part, getattr(found, part), *expected, torch.float32)
    for conditions in ALL_CONDITIONS[1:]:
        assert_same(found, statistics(kernels, sample, conditions))


def test_dimensions_of_one_have_any_stride(kernels):
    sample = make(torch.float16, length=9)
    found = statistics(kernels, sample, ALL_CONDITIONS[0])
    assert_same(found, statistics(kernels, sample, ALL_CONDITIONS[0], lambda x: x.as_strided(x.shape, (3, 5, 64, 1))))


@each_dtype
def test_the_largest_weight_is_of_the_first_key(dtype, kernels):
    sample = make(dtype, heads=(2, 1), length=90, keys=300, causal=True, whole=True)
    scores = oracle.plain_scores(sample.options, **{name: sample.tensors[name].double() for name in "qk"})
    first = (scores == scores.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(statistics(kernels, sample, ALL_CONDITIONS[0]).max_key, first)


# ---------------------------------------------------------------------------------------------------------------- geometry


def centre(v, scores, chosen, scale):
    """s in the dtype of v, shift, farthest and excess, as `separate` takes them: see csrc/diagnostics/geometry.h."""
    exponents = scores.double() * scale / math.log(2)
    shift = torch.logsumexp(exponents * math.log(2), -1, keepdim=True) / math.log(2)
    weights = (exponents - shift).exp2()
    heads = oracle.to_query_heads(scores, v).double()
    values = heads.gather(2, chosen.long().flatten(2)[..., None].expand(-1, -1, -1, v.shape[3])).unflatten(2, chosen.shape[2:])
    s = (weights[..., None] * values).sum(-2).to(v.dtype)
    excess = weights * (0.5 * weights * values.square().sum(-1) - (values @ s.double()[..., None]).squeeze(-1))
    absent = scores == float("-inf")
    farthest = excess.masked_fill(absent, float("-inf")).amax(-1)
    return s, shift.squeeze(-1).float(), farthest.float(), excess.masked_fill(absent, float("inf")).float()


def geometry(kernels, sample, top_n, conditions, change=lambda tensors: None):
    """(scores, chosen) and what came of them. change: of what `separate` gets, in place."""
    guarded = Guarded(poison=conditions.seed)
    tensors = {name: guarded.copy(tensor) for name, tensor in sample.tensors.items()}
    rows, v = tensors["q"].shape[:3], sample.tensors["v"]
    selected = {
        "scores": guarded.empty((*rows, top_n), torch.float32), "chosen": guarded.empty((*rows, top_n), torch.int32)
    }
    numbers = numbers_of(sample) | {"top_n": top_n}
    launch(kernels["geometry_select"], dtype_of(sample), tensors | selected, conditions, **numbers)
    for name, x in zip(("s", "shift", "farthest", "excess"), centre(v, **selected, scale=numbers["scale"]), strict=True):
        tensors[name] = guarded.empty(x.shape, x.dtype).copy_(x)
    tensors["squares"] = guarded.empty((*v.shape[:2], whole_tiles(v.shape[2])), torch.float32)
    tensors["squares"][..., : v.shape[2]] = v.float().square().sum(-1)
    change(tensors)
    outputs = {name: guarded.empty(rows, torch.float32) for name in SelectionGeometry._fields}
    launch(kernels["geometry_separate"], dtype_of(sample), tensors | selected | outputs, conditions, **numbers)
    guarded.assert_intact()
    return tuple(selected.values()), SelectionGeometry(*outputs.values())


def ranked(sample):
    """Scores before the scale, the largest first, of equal ones that of the first key; and their keys."""
    exact = {name: sample.tensors[name].double() for name in "qk"}
    return oracle.plain_scores(sample.options | {"scale": 1.0}, **exact).sort(dim=-1, descending=True, stable=True)


def check_separation(sample, top_n, s, found):
    """Counts lie between those with excesses moved by rounding either way, with the very s that the kernel got."""
    scores, keys = ranked(sample)
    v = oracle.to_query_heads(scores, sample.tensors["v"]).double()
    exponents = scores * oracle.score_factor(sample.options, sample.tensors["q"])
    weights = (exponents - exponents[..., :top_n].logsumexp(-1, keepdim=True)).exp()
    half = 0.5 * v.square().sum(-1)[:, :, None].expand_as(keys).gather(-1, keys)
    excess = weights * (weights * half - (s.double() @ v.mT).gather(-1, keys))
    size = weights * (weights * half + (s.double().abs() @ v.abs().mT).gather(-1, keys))
    error = 4 * torch.finfo(torch.float32).eps * size * (1 + exponents.abs().nan_to_num(posinf=0))
    visible, infinity = scores > -math.inf, math.inf
    selected, outside = visible & (torch.arange(scores.shape[-1]) < top_n), visible & (torch.arange(scores.shape[-1]) >= top_n)
    count, bounds = selected.sum(-1), []
    for sign in (-1, 1):
        farthest = (excess + sign * error).masked_fill(~selected, -infinity).amax(-1, keepdim=True)
        nearest = (excess + sign * error).masked_fill(~outside, infinity).amin(-1, keepdim=True)
        intruders = (outside & (excess - sign * error <= farthest)).sum(-1)
        separated = (selected & (excess - sign * error < nearest)).sum(-1)
        bounds.append((count / (count + intruders), separated / count))
    (high_precision, low_recall), (low_precision, high_recall) = bounds
    for got, low, high in ((found.precision, low_precision, high_precision), (found.recall, low_recall, high_recall)):
        assert ((low == high).double().mean()) > 0.95, "the bounds are too wide to tell anything"
        assert ((got >= low * (1 - 1e-6)) & (got <= high * (1 + 1e-6))).all()
    f_score = 2 * found.precision * found.recall / (found.precision + found.recall)
    torch.testing.assert_close(found.f_score, f_score, rtol=1e-6, atol=0)


GEOMETRIES = {
    "one key, causal, heads share keys": (1, dict(heads=(2, 1), length=270, causal=True)),
    "four keys, window on both sides": (4, dict(length=300, locality=nf.SlidingWindow(90, 9))),
    "eight keys, 128 wide": (8, dict(width=128, length=200, keys=1200)),
    "nine keys, several batches": (9, dict(heads=(2, 2), batch=2, length=50, keys=130)),
    "nine keys, the last queries": (9, dict(length=70, keys=1200, causal=True)),
    "20 keys, causal, 128 wide": (20, dict(width=128, length=193, keys=260, causal=True)),
    "20 keys of a window of 9": (20, dict(length=100, locality=nf.SlidingWindow(8))),
    "more than there are": (9, dict(length=30, keys=3)),
    "one token": (4, dict(length=1)),
}


@each_dtype
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(name, dtype, kernels):
    """The very keys of the largest scores, and what lies near them, against float64."""
    top_n, options = GEOMETRIES[name]
    sample = make(dtype, whole=True, **options)
    got = {}
    (scores, chosen), found = geometry(kernels, sample, top_n, ALL_CONDITIONS[0], got.update)
    expected, keys = (x[..., :top_n] for x in ranked(sample))
    there = expected.shape[-1]
    assert torch.equal(scores[..., :there].double(), expected) and (scores[..., there:] == -math.inf).all()
    assert torch.equal(chosen[..., :there].long(), keys.masked_fill(expected == -math.inf, 0)) and not chosen[..., there:].any()
    check_separation(sample, top_n, got["s"], found)
    for conditions in ALL_CONDITIONS[1:]:
        again, found_again = geometry(kernels, sample, top_n, conditions)
        assert_same((scores, chosen, *found), (*again, *found_again))


@each_dtype
def test_equal_values_cannot_be_told_apart(dtype, kernels):
    """Every excess is the same number, whether a key comes in the tile of the last that was selected or after it."""
    sample = make(dtype, length=5, keys=200)
    for tensor in sample.tensors.values():
        tensor.fill_(1)
    _, found = geometry(kernels, sample, 4, ALL_CONDITIONS[0])
    assert (found.precision == 4 / 200).all() and (found.recall == 0).all() and (found.f_score == 0).all()


@each_dtype
def test_geometry_of_random_scores(dtype, kernels):
    """A score has the very bits by which it was selected or not, and rows that have no number have no results."""
    sample = make(dtype, length=100, keys=300)

    def spoil(tensors):
        tensors["farthest"][0, 0, 5] = math.nan

    _, found = geometry(kernels, sample, 13, ALL_CONDITIONS[0])
    check_geometry(sample, 13, found, 0.3)
    _, spoilt = geometry(kernels, sample, 13, ALL_CONDITIONS[0], spoil)
    for one, other in zip(found, spoilt, strict=True):
        assert torch.isnan(other[0, 0, 5])
        assert torch.equal(one[0, 0, 5:].roll(-1)[:-1], other[0, 0, 5:].roll(-1)[:-1])


# ------------------------------------------------------------------------------------------------------------------ errors


def test_errors_are_reported(kernels):
    """By the launcher, and by the encoder of tensor maps: a row that does not start at a multiple of 16 bytes."""
    with pytest.raises(AssertionError, match="width must be 64 or 128"):
        statistics(kernels, make(torch.float16, width=32, length=9), Conditions())
    sample = make(torch.float16, length=9)
    shifted = torch.zeros(9 * 64 + 1, dtype=torch.float16)[1:].view(1, 1, 9, 64)
    with pytest.raises(AssertionError, match="cuTensorMapEncodeTiled: error 1"):
        tensors = dict(q=shifted, k=sample.tensors["k"])
        launch(kernels["statistics"], "float16", tensors, Conditions(), **numbers_of(sample))
