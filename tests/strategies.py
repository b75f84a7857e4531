"""One way to draw calls of every operator and step, and to check them.

CALLS has for each function a strategy of specifications, dicts of plain numbers that hypothesis shrinks and prints, and a check
that makes the call of one and compares it with the float64 oracle of tests/samples by the rule of accuracy.
"""

import math
import random
from contextlib import nullcontext

import hypothesis
import torch
from harness import (
    DEVICE,
    DTYPES,
    FEW_KERNELS,
    GRADIENTS,
    LAYOUTS,
    Sample,
    accumulation,
    as_tuple,
    assert_accurate,
    generator,
    like,
    of_the_reference,
    randn,
)
from harness import run as run_sample
from hypothesis import strategies as st
from samples import affine, diagnostics, krause, linear, steps, synchronization

import nearfar as nf
from nearfar.registry import STEPS

BACKENDS = ("triton", "reference")
LENGTHS = (17, 0, 1, 2, 33, 64, 65, 100, 130)  # from nothing to beyond two blocks of 64
WIDTHS = (16, 24, 40, 64, 16, 64, 136, 256)  # narrow ones twice: wide ones take the interpreter long
SIDES = (-1, 0, 1, 31, 500)  # 500 is wider than any sequence
MAGNITUDES = (1.0, 1 / 64, 8.0)
NUMBERS = ("random", "equal", "off the origin")  # of q and k
ALL_LAYOUTS = {
    **LAYOUTS,
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "offset by one": lambda x: torch.cat((x.new_ones(1), x.flatten()))[1:].view(x.shape),
}


def kernels(draw):
    """choose(options): a draw of what kernels are compiled for; on a GPU, which compiles, of few combinations of them."""
    if not FEW_KERNELS:
        return lambda options: draw(st.sampled_from(list(options)))
    combination = random.Random(draw(st.integers(0, 5)))
    return lambda options: combination.choice(list(options))


def pairs(draw, choose, packs=True, keys_at_least=False, one_length=False):
    """What every operator on queries and keys draws: sizes, layouts, numbers."""
    spec = {
        "dtype": choose(range(len(DTYPES))),
        "backend": draw(st.sampled_from(BACKENDS)),
        "width": choose(WIDTHS),
        "value_width": choose(WIDTHS),
        "packed": packs and choose([False, False, False, True]),
    }
    wide = spec["width"] + spec["value_width"] > 160  # of few rows, for the interpreter's sake
    lengths = LENGTHS if FEW_KERNELS or not wide else [length for length in LENGTHS if length < 66]
    length = draw(st.sampled_from(lengths))
    same = one_length or spec["packed"] or draw(st.booleans())
    keys = length if same else draw(st.sampled_from(lengths))
    if keys_at_least:
        length, keys = max(1, min(length, keys)), max(1, length, keys)
    small = length + keys <= 70 and not wide  # what the interpreter computes in a moment
    spec |= {
        "length": length,
        "keys": keys,
        "batch": draw(st.integers(0, 3)) if small and not spec["packed"] else 1,
        "kv_heads": draw(st.integers(1, 2)) if small else 1,
        "group": choose([1, 2, 3]) if small or FEW_KERNELS else choose([1, 2]),
        "magnitude": draw(st.sampled_from(MAGNITUDES)),
        "numbers": draw(st.sampled_from(NUMBERS)),
        "seed": draw(st.integers(0, 2**16)),
        "layouts": [draw(st.sampled_from(list(ALL_LAYOUTS))) for _ in range(3)],
        "gradients": [draw(st.sampled_from(list(GRADIENTS))) for _ in range(2)],
    }
    spec["ends"] = [0, *sorted(draw(st.lists(st.integers(0, length), max_size=4))), length] if spec["packed"] else None
    return spec


def laid(spec, index, tensor):
    return ALL_LAYOUTS[spec["layouts"][index % 3]](tensor) if tensor.numel() else tensor


def dtype_of(spec):
    return DTYPES[spec["dtype"]]


def shaped(spec, heads, length, width, seed, spread=1.0):
    x = spread * randn(spec["batch"], heads, length, width, seed=spec["seed"] + seed)
    return x.to(dtype_of(spec))


def qkv(spec, spread=1.0):
    heads, kv_heads = spec["kv_heads"] * spec["group"], spec["kv_heads"]
    q = shaped(spec, heads, spec["length"], spec["width"], 0, spread)
    k = shaped(spec, kv_heads, spec["keys"], spec["width"], 1, spread)
    v = shaped(spec, kv_heads, spec["keys"], spec["value_width"], 2, spec["magnitude"])
    if spec["numbers"] == "equal":
        k = k[:, :, :1].expand(k.shape).clone()
    if spec["numbers"] == "off the origin":
        q, k = q + 4 * spread, k + 4 * spread
    return {name: laid(spec, index, x) for index, (name, x) in enumerate(zip("qkv", (q, k, v), strict=True))}


def packed(spec):
    return {} if spec["ends"] is None else {"cu_seqlens": torch.tensor(spec["ends"], dtype=torch.int32, device=DEVICE)}


def upstream(spec, outputs):
    """A gradient for each output, in the layouts of the specification."""
    found = []
    for index, part in enumerate(as_tuple(outputs)):
        d = like(part, 7 + index)
        found.append(GRADIENTS[spec["gradients"][index % 2]](d) if d.numel() and d.dim() > 3 else d)
    return tuple(found) if isinstance(outputs, tuple) else found[0]


def compare(spec, function, oracle, sample, **keywords):
    outputs, _ = run_sample(function, sample, backend=spec["backend"])
    do = upstream(spec, outputs)
    outputs, gradients = run_sample(function, sample, do, spec["backend"])
    with of_the_reference() if spec["backend"] == "reference" else nullcontext():
        oracle.check(sample, do, outputs, gradients, **keywords)


# ------------------------------------------------------------------------------------------------------------ operators


@st.composite
def krause_calls(draw):
    choose = kernels(draw)
    spec = pairs(draw, choose)
    spec["window"] = choose([None, (choose(SIDES), choose(SIDES))])
    spec["top_k"] = choose([None, 1, 2, 8, 1000])
    spec["spread"] = draw(st.sampled_from([0.5, 1.0, 4.0]))  # of bandwidths, around the root of the width
    spec["sigma"] = draw(st.sampled_from(["by head", "one", "0-d"]))
    return spec


def check_krause(spec):
    sample = Sample(qkv(spec), packed(spec))
    sample.options["locality"] = None if spec["window"] is None else nf.SlidingWindow(*spec["window"])
    if spec["top_k"] is not None:
        sample.options["top_k"] = spec["top_k"]
    shape = {"by head": (spec["kv_heads"] * spec["group"],), "one": (1,), "0-d": ()}[spec["sigma"]]
    factors = 0.75 + 0.5 * torch.rand(shape, generator=generator(spec["seed"]))
    sample.tensors["sigma"] = (spec["spread"] * spec["width"] ** 0.5 * factors).to(DEVICE)
    selected = krause.reference_selection(sample) if spec["backend"] == "reference" else None
    compare(spec, nf.krause_attention, krause, sample, selected=selected)


@st.composite
def affine_calls(draw):
    choose = kernels(draw)
    spec = pairs(draw, choose)
    spec["causal"] = choose([False, True])
    spec["window"] = choose(SIDES), -1 if spec["causal"] else choose(SIDES)
    spec["scale"], spec["sink"] = draw(st.sampled_from([None, 0.5, -0.1])), choose([None, 0.5, 4.0])
    return spec


def check_affine(spec, scaled=True):
    options = {"causal": spec["causal"], "window_size": tuple(spec["window"]), "scale": spec["scale"]}
    sample = Sample(qkv(spec), {**packed(spec), **options})
    rows = sample.tensors["q"].shape[:3]
    if scaled:
        numbers = affine.random_rows(rows, seed=spec["seed"])
        sample.tensors.update({n: laid(spec, i, x[..., None])[..., 0] for i, (n, x) in enumerate(numbers.items())})
    if spec["sink"] is not None:
        sample.tensors["sink"] = spec["sink"] * randn(rows[1], seed=spec["seed"])
    compare(spec, nf.affine_attention if scaled else nf.softmax_attention, affine, sample)


@st.composite
def linear_calls(draw, factors=1):
    choose = kernels(draw)
    spec = pairs(draw, choose)
    spec["widths"] = [choose([16, 8, 24] if factors == 1 else [8, 16]) for _ in range(factors)]
    spec["causal"] = choose([False, True])
    if spec["causal"]:
        spec["keys"] = spec["length"]
    spec["value_width"] = min(spec["value_width"], 24)
    spec["direct"] = draw(st.booleans())  # pair by pair, not through states
    spec["feature_map"] = choose(linear.MAPS)
    # Sums of signed weights may vanish, and dividing by them has no accuracy to speak of.
    spec["normalize"] = spec["feature_map"] != "identity"
    spec["eps"] = draw(st.sampled_from([1e-6, 0.0, 1.0]))
    spec["state"], spec["return_state"] = choose([False, True]), choose([False, True])
    hypothesis.assume(not is_open_case(spec))
    return spec


def is_open_case(spec):
    """Some calls of several factors in float16 miss the rule of the norm (docs/contract.md). tests/ops/test_fuzz.py has two."""
    return len(spec["widths"]) > 1 and dtype_of(spec) == torch.float16 and spec["backend"] == "triton"


def check_linear(spec):
    heads, kv_heads = spec["kv_heads"] * spec["group"], spec["kv_heads"]
    batch, many = spec["batch"], len(spec["widths"]) > 1
    tensors = linear.random_tensors(
        spec["widths"], spec["value_width"], (batch, heads, spec["length"]), (batch, kv_heads, spec["keys"]),
        dtype_of(spec), seed=spec["seed"], numbered=many,
    )
    tensors["v"] = tensors["v"] * spec["magnitude"]
    tensors = {name: laid(spec, index, x) for index, (name, x) in enumerate(tensors.items())}
    options = {key: spec[key] for key in ("causal", "feature_map", "normalize", "eps", "return_state")} | packed(spec)
    if spec["state"]:
        sequences = batch if spec["ends"] is None else len(spec["ends"]) - 1
        shape = sequences, kv_heads, *spec["widths"], spec["value_width"] + 1
        tensors["initial_state"] = linear.random_state(shape, dtype_of(spec), seed=spec["seed"])
    with linear.form(spec["direct"]):
        compare(spec, linear.flat if many else nf.linear_attention, linear, Sample(tensors, options))


@st.composite
def synchronization_calls(draw):
    choose = kernels(draw)
    separate = choose([False, True])
    spec = pairs(draw, choose, packs=False, one_length=not separate)
    spec["separate"], spec["causal"] = separate, choose([False, True])
    spec["by_token"] = spec["causal"] or choose([False, True])
    spec["top_k"] = choose([None, 1, 5, 1000])
    spec["spread"] = draw(st.sampled_from([1.0, 0.3, 8.0]))
    if not separate:
        spec["group"] = 1
    return spec


def check_synchronization(spec):
    """With a high floor of gradients: 1 / S^2 at the lock boundary leaves no accuracy to speak of."""
    numbers = qkv(spec, spec["spread"] * spec["width"] ** -0.5)
    tensors = {"omega": numbers["q"]}
    if spec["separate"]:
        tensors["omega_k"] = numbers["k"]
    tensors["v"] = numbers["v"]
    rows = tensors["omega"].shape[: 3 if spec["by_token"] else 2]
    tensors |= synchronization.parameters(rows, seed=spec["seed"])
    options = {"causal": spec["causal"], "grad_floor": 0.1}
    if spec["top_k"] is not None:
        options["top_k"] = spec["top_k"]
    compare(spec, nf.synchronization_attention, synchronization, Sample(tensors, options))


@st.composite
def statistics_calls(draw):
    choose = kernels(draw)
    spec = pairs(draw, choose, packs=False, keys_at_least=True)
    spec["causal"] = choose([False, True])
    spec["window"] = choose([None, (choose(SIDES), -1 if spec["causal"] else choose(SIDES))])
    spec["by_distance"] = choose([False, True])
    spec["scale"] = None if spec["by_distance"] else draw(st.sampled_from([None, -0.1, 0.5]))
    spec["batch"] = max(spec["batch"], 1)
    return spec


def check_statistics(spec):
    tensors = {name: x for name, x in qkv(spec).items() if name != "v"}
    options = {"causal": spec["causal"]}
    if spec["window"] is not None:
        options["locality"] = nf.SlidingWindow(*spec["window"])
    if spec["by_distance"]:
        heads = tensors["q"].shape[1]
        tensors["sigma"] = spec["width"] ** 0.5 * (0.75 + 0.5 * torch.rand(heads, generator=generator(spec["seed"]))).to(DEVICE)
    else:
        options["scale"] = spec["scale"]
    compare(spec, diagnostics.FUNCTIONS["attention_statistics"], diagnostics, Sample(tensors, options))


@st.composite
def order_calls(draw):
    choose = kernels(draw)
    spec = pairs(draw, choose, packs=False, one_length=True)
    spec["causal"] = choose([False, True])
    spec["length"] = max(spec["length"], 1)
    return spec


def check_order(spec):
    theta = laid(spec, 0, 3 * shaped(spec, spec["kv_heads"], spec["length"], spec["width"], 0))
    compare(spec, nf.order_parameter, synchronization, Sample({"theta": theta}, {"causal": spec["causal"]}))


# ---------------------------------------------------------------------------------------------------------------- steps


@st.composite
def step_calls(draw):
    return {
        "dtype": draw(st.sampled_from(range(len(DTYPES)))),
        "backend": draw(st.sampled_from(BACKENDS)),
        "batch": draw(st.integers(0, 3)),
        "tokens": draw(st.integers(0, 12)),
        "layout": draw(st.sampled_from([name for name in ALL_LAYOUTS if "expanded" not in name])),
        "out": draw(st.booleans()),
    }


def check_step(step, spec):
    dtype, krauses = dtype_of(spec), step.memory == "cache"
    sample = steps.make(step, dtype, batch=spec["batch"], tokens=spec["tokens"])
    before = steps.clone(sample)
    move = ALL_LAYOUTS[spec["layout"]] if spec["batch"] else lambda x: x
    sample = sample._replace(tensors={n: move(t) for n, t in sample.tensors.items()})
    keywords = {"out": torch.full_like(sample.tensors["v"], math.nan).repeat(1, 2, 1, 1)} if spec["out"] else {}
    o = steps.call(step, sample, backend=spec["backend"], **keywords)
    if not spec["batch"]:
        assert not o.numel()
    elif krauses:
        check_krause_step(spec, o, dtype)
    else:
        options = {"causal": True, "return_state": True}
        tensors = {**before.tensors, "initial_state": before.memory["state"]}
        wide, single = (linear.in_dtype(tensors, kind) for kind in (torch.float64, accumulation(dtype)))
        exact, plain = linear.attend(wide, options), linear.attend(single, options)
        sizes, _ = linear.scales(wide, options, *(torch.ones_like(part) for part in exact))
        for what, *result in zip(("o", "state"), (o, sample.memory["state"]), exact, plain, sizes, strict=True):
            assert_accurate(what, *(part.detach() for part in result), dtype)


def check_krause_step(spec, o, dtype):
    """The last row of the whole sequence, of which the cache holds what its window needs."""
    whole = steps.krause_sample(dtype, DEVICE, spec["batch"], spec["tokens"] + 1)
    first = max(0, spec["tokens"] - whole.options["locality"].left)
    q, k, v, sigma = whole.tensors.values()
    seen = Sample({"q": q[:, :, -1:], "k": k[:, :, first:], "v": v[:, :, first:], "sigma": sigma}, whole.options)
    keep = krause.best(seen)
    wide, single = ([x.to(kind) for x in seen.tensors.values()] for kind in (torch.float64, accumulation(dtype)))
    exact = krause.dense(*wide, keep)
    scale = krause.scales(*wide, keep, torch.ones_like(exact))[0]
    assert_accurate("o", o, exact, krause.plain(*single, keep), scale, dtype)


CALLS = {
    "krause_attention": (krause_calls(), check_krause),
    "linear_attention": (linear_calls(), check_linear),
    "hadamard_attention": (linear_calls(factors=2), check_linear),
    "affine_attention": (affine_calls(), check_affine),
    "softmax_attention": (affine_calls(), lambda spec: check_affine(spec, scaled=False)),
    "synchronization_attention": (synchronization_calls(), check_synchronization),
    "attention_statistics": (statistics_calls(), check_statistics),
    "order_parameter": (order_calls(), check_order),
    **{step.function.__name__: (step_calls(), lambda spec, step=step: check_step(step, spec)) for step in STEPS},
}
