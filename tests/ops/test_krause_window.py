"""Krause attention in shifted windows on its kernels: accuracy with and without a relative position table, and refusals."""

import math

import pytest
import torch
from harness import (
    DEVICE,
    DTYPES,
    GRADIENTS,
    LAYOUTS,
    Sample,
    accumulation,
    assert_accurate,
    assert_same,
    furthest,
    leaves,
    like,
    poison,
    randn,
    rounds_like_kernels,
    run,
)
from samples import dropout, krause
from samples.grid import mask
from test_grid import make

import nearfar as nf

S = nf.ShiftedWindow
P, SEED = 0.3, 2**40 + 7
full = pytest.mark.full
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

CASES = {
    "windows": (S((4, 6), 2), False),
    "shifted": (S((4, 6), 2, 1), True),
    "the authors'": (S((8, 8), 4, 2), True),
    "no square": (S((4, 6), (2, 3), (1, 0)), False),
    "three axes": (S((2, 4, 6), (1, 2, 3), (0, 1, 2)), True),
    "several tiles": (S((9, 12), (9, 12), (4, 5)), True),
    "one cell": (S((2, 3), 1), True),
}
each_case = pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "shifted" else full) for n in CASES])


def sample_of(name, dtype=torch.float32, **options):
    locality, has_table = CASES[name]
    sample = make(locality, dtype, batch=2, **options)
    if has_table:
        sample.tensors["bias"] = randn(2, locality.bias_size, seed=5)
    return sample


def table_index(locality):
    """(N, N): the entry of each pair of a window, from its definition."""
    cells = torch.cartesian_prod(*[torch.arange(n) for n in locality.shape])
    index = torch.zeros(len(cells), len(cells), dtype=torch.long)
    for axis, window in enumerate(locality.window):
        index = index * (2 * window - 1) + cells[:, None, axis] - cells[None, :, axis] + window - 1
    return index.masked_fill(~mask(locality), 0).to(DEVICE)


def check(sample, do, o, gradients, factor=1):
    """The rule of accuracy, by the oracle of samples/krause.py and, for the table, sums of dS over the pairs of each entry."""
    if "bias" not in sample.tensors:
        return krause.check(sample, do, o, gradients, factor=factor)
    index, dtype = table_index(sample.options["locality"]), o.dtype
    keep = krause.visible(sample).expand(*o.shape[:3], -1)

    def with_table(formula):
        return lambda q, k, v, sigma, table, keep, factor: formula(q, k, v, sigma, keep, factor, table.to(q.dtype)[:, index])

    exact = krause.evaluate(with_table(krause.dense), sample, keep, do, torch.float64, factor)
    rough = krause.evaluate(with_table(krause.plain), sample, keep, do, accumulation(dtype), factor)
    if rounds_like_kernels(dtype):
        coarse = krause.evaluate(with_table(krause.stored(dtype)), sample, keep, do, torch.float32, factor)
        for name in rough[1]:
            rough[1][name] = furthest(exact[1][name], rough[1][name], coarse[1][name])
    q, k, v, sigma, table = (x.double() for x in sample.tensors.values())
    of_o, scale = krause.scales(q, k, v, sigma, keep, do.double(), factor, table[:, index])
    pairs = (scale["pairs"] * keep).sum(0).flatten(1)
    scale["bias"] = torch.zeros_like(table).index_add_(1, index.flatten(), pairs)
    assert_accurate("o", o, exact[0], rough[0], of_o, dtype)
    for name, gradient in gradients.items():
        assert_accurate(f"gradient of {name}", gradient, exact[1][name], rough[1][name], scale[name], dtype)


@each_dtype
@each_case
def test_kernels_are_accurate(name, dtype):
    sample = sample_of(name, dtype)
    with poison():
        o, gradients = run(nf.krause_attention, sample)
    check(sample, like(o), o, gradients)


@each_dtype
@pytest.mark.parametrize("name", [pytest.param("windows", marks=full), "the authors'"])
def test_dropout(name, dtype):
    sample = sample_of(name, dtype)
    options = {**sample.options, "dropout_p": P, "seed": SEED}
    o, gradients = run(nf.krause_attention, Sample(sample.tensors, options))
    check(sample, like(o), o, gradients, dropout.of(sample, SEED, P))


@full
def test_tables_of_any_dtype_and_layout():
    sample = sample_of("the authors'")
    expected = run(nf.krause_attention, sample)
    table = torch.stack((sample.tensors["bias"], sample.tensors["bias"]), -1)[..., 0]
    assert_same(run(nf.krause_attention, Sample({**sample.tensors, "bias": table}, sample.options)), expected)
    half = {**sample.tensors, "bias": sample.tensors["bias"].half()}
    _, gradients = run(nf.krause_attention, Sample(half, sample.options))
    assert gradients["bias"].dtype == torch.float16


@full
def test_two_calls_agree_bit_for_bit():
    sample = sample_of("the authors'")
    assert_same(run(nf.krause_attention, sample), run(nf.krause_attention, sample))


@full
def test_layouts_are_read_as_they_are():
    sample = sample_of("shifted", heads=(2, 2))
    do = randn(2, 2, 24, 24, seed=7)
    expected = run(nf.krause_attention, sample, do)
    for layout in ("tokens before heads", "every other row", "width before rows"):
        strided = {n: LAYOUTS[layout](t) if n in "qkv" else t for n, t in sample.tensors.items()}
        got = run(nf.krause_attention, Sample(strided, sample.options), GRADIENTS[layout](do))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_window():
    locality = S((4, 6), 2, 1)
    sample = make(locality, heads=(1, 1))
    seen = mask(locality)[:, 8]
    for name in "kv":
        sample.tensors[name][0, 0, 8] = math.nan
    o = nf.krause_attention(**sample.tensors, **sample.options, backend="triton")[0, 0]
    assert o[seen].isnan().all() and torch.isfinite(o[~seen]).all()


@full
@pytest.mark.parametrize("name", ["windows", "shifted"])
def test_the_torch_operator(name):
    sample = sample_of(name)
    q, k, v, sigma, *table = leaves(sample).values()
    arguments = (q, k, v, sigma, *(table or [None]), None, sample.options["locality"].text, 0.0)
    torch.library.opcheck(torch.ops.nearfar.krause_attention_window.default, arguments)
    torch._dynamo.reset()  # Dynamo compiles one function 8 times, whichever tests ask for it
    compiled = torch.compile(nf.krause_attention, backend="aot_eager", fullgraph=True)
    assert_same(run(nf.krause_attention, sample), run(compiled, sample))


def test_an_empty_batch():
    sample = sample_of("shifted")
    empty = {n: t[:0] if n in "qkv" else t for n, t in sample.tensors.items()}
    o, gradients = run(nf.krause_attention, Sample(empty, sample.options))
    assert o.shape == (0, 2, 24, 24) and gradients["bias"].eq(0).all() and gradients["sigma"].eq(0).all()
