"""Linear and Hadamard linear attention: fuzz, forms, states, decoding, isolation, feature maps, extremes, bad input.

What every operator promises is tested on its samples in test_operators.py; the oracle is in samples/linear.py.
"""

import math
from unittest.mock import patch

import hypothesis
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from harness import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    Largest,
    Sample,
    as_tuple,
    assert_same,
    like,
    needs_gpu,
    randn,
    run,
)
from hypothesis import strategies as st
from samples.linear import (
    FUNCTIONS,
    MAPS,
    SAMPLES,
    attend,
    check,
    features,
    flat,
    form,
    in_dtype,
    make,
    random_state,
    random_tensors,
    to_query_heads,
    visible,
    with_ones,
)
from triton.runtime.interpreter import InterpreterBuilder

import nearfar as nf
from nearfar.kernels import linear_states
from nearfar.reference import linear as reference
from nearfar.reference import pairwise
from triton_kernels.linear_tiles import to_tf32

pytestmark = pytest.mark.full

BACKENDS = ("triton", "reference")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_direction = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
each_widths = pytest.mark.parametrize("widths", [(16,), (8, 8)], ids=str)
up_to_three_factors = pytest.mark.parametrize("widths", [(16,), (8, 16), (8, 8, 8)], ids=str)  # slow in the interpreter


def sample_of(
    widths, length=70, keys=None, dtype=torch.float32, heads=2, kv_heads=1, batch=1, value_width=16, state=False, seed=1,
    device=DEVICE, **options,
):
    """A call of flat() with random numbers. state: one comes in and is asked for."""
    keys = length if keys is None else keys
    tensors = random_tensors(
        widths, value_width, (batch, heads, length), (batch, kv_heads, keys), dtype, device=device, seed=seed
    )
    if state:
        cu_seqlens = options.get("cu_seqlens")
        sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        tensors["initial_state"] = random_state((sequences, kv_heads, *widths, value_width + 1), dtype, device)
        options["return_state"] = True
    return Sample(tensors, options)


def seqlens(*ends, dtype=torch.int32):
    return torch.tensor(ends, dtype=dtype, device=DEVICE)


# --------------------------------------------------------------------------------------------------------------- forms


@each_backend
@each_direction
@pytest.mark.parametrize("widths, length", [((16,), 70), ((16,), 300), ((8, 16), 300), ((8, 8, 8), 70)], ids=str)
def test_pair_by_pair_and_through_states(widths, length, causal, backend):
    sample = sample_of(widths, length, causal=causal)
    do = like(flat(**sample.tensors, **sample.options, backend="reference"))
    results = []
    for direct in (True, False):
        with form(direct):
            results.append(run(flat, sample, do, backend))
            check(sample, do, *results[-1])
    if causal and (backend == "triton" or length <= pairwise.CHUNK):
        return  # one chunk, or kernels that always take their pieces
    assert not torch.equal(results[0][0], results[1][0])  # they do sum in another order


@each_widths
def test_shapes_decide_the_form_of_the_kernels(widths):
    """Lengths on either side of the crossover give the results of the formula."""
    value_width = 16
    longest = max(n for n in range(1, 20_000) if linear_states.prefers_direct(widths, value_width, n, n))
    assert not linear_states.prefers_direct(widths, value_width, longest + 1, longest + 1)
    if DEVICE == "cpu" and longest > 400:
        pytest.skip(f"a crossover at {longest} tokens is for the GPU")
    for length in (longest, longest + 1):
        sample = sample_of(widths, length, heads=1)
        do = like(flat(**sample.tensors, backend="triton"))
        check(sample, do, *run(flat, sample, do))


@pytest.mark.parametrize("length, unused", [(16, "Build"), (17, "Pairs")])
def test_the_reference_takes_the_cheaper_form(length, unused):
    """Pairs cost 33 N^2 and a state 2 N 16 17: the crossover is at 16.5 tokens."""
    q = randn(1, 1, length, 16, device="cpu")
    with patch.object(reference, unused, None):
        nf.linear_attention(q, q, q, backend="reference")


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"normalize": False, "feature_map": "identity"}], ids=str)
@each_direction
@pytest.mark.parametrize("direct", [False, True], ids=["states", "pairs"])
@pytest.mark.parametrize("widths", [(3,), (2, 3), (2, 1, 3), (1, 2, 1, 2)], ids=str)
def test_derivatives_of_the_reference_across_chunks(widths, direct, causal, options):
    options = dict(options, causal=causal)
    if options.pop("packed", False):
        options["cu_seqlens"] = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    sample = sample_of(widths, 7, value_width=2, dtype=torch.float64, state=True, device="cpu", **options)
    tensors = {name: tensor.requires_grad_() for name, tensor in sample.tensors.items()}

    def function(*values):
        return flat(**dict(zip(tensors, values, strict=True)), **sample.options, backend="reference")

    with form(direct), patch.object(pairwise, "CHUNK", 3):
        torch.testing.assert_close(function(*tensors.values()), attend(tensors, sample.options))
        assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tuple(tensors.values()), fast_mode=True)


@each_direction
def test_reference_memory_does_not_grow_with_the_features(causal):
    """It never makes, let alone keeps, N x prod d_r numbers; all grows as N does."""
    kept, widths = {}, (32, 32)
    for length in (2048, 4096):
        sample = sample_of(widths, length, heads=1, causal=causal, device="cpu")
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
            return tensor

        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(flat, sample, backend="reference")
        assert largest.numel <= max(32 * length, 1024 * pairwise.CHUNK)
        kept[length] = sum(nbytes for _, nbytes in storages.values())
    assert kept[4096] < 2.1 * kept[2048]
    assert kept[4096] < 4096 * 1024 * 4 / 2  # half of the features of either side


# ------------------------------------------------------------------------------------------------------- independent facts


@each_backend
@each_direction
@up_to_three_factors
def test_gradients_pass_through_the_denominator(widths, causal, backend):
    """Against float64 formulas with and without it: they differ, and ours is the full one."""
    sample = sample_of(widths, 40, causal=causal)
    do = like(flat(**sample.tensors, **sample.options, backend="reference"))
    tensors = in_dtype(sample.tensors, torch.float64)
    (xs, ys), mask = features(tensors, {}), visible(sample.options, 40, 40, do.device)
    weights = torch.ones((), dtype=torch.float64, device=do.device)
    for x, y in zip(xs, ys, strict=True):
        weights = weights * (x @ to_query_heads(x, y).mT)
    weights = weights * mask
    numerator, weight = weights @ to_query_heads(xs[0], tensors["v"]), weights.sum(-1, keepdim=True) + 1e-6
    full, without = (
        dict(zip(tensors, torch.autograd.grad(numerator / w, tensors.values(), do.double(), retain_graph=True), strict=True))
        for w in (weight, weight.detach())
    )
    _, gradients = run(flat, sample, do, backend)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), full[name], rtol=1e-4, atol=1e-6)
        lost = (full[name] - without[name]).norm() / full[name].norm()
        assert lost == 0 if name == "v" else lost > 0.05


@each_backend
@each_direction
def test_linear_attention_is_the_case_of_one_factor(causal, backend):
    sample = sample_of((24,), state=True, causal=causal)
    q, k, v, state = sample.tensors.values()
    one = Sample({"q": q, "k": k, "v": v, "initial_state": state}, sample.options)
    hadamard, linear = run(flat, sample, backend=backend), run(nf.linear_attention, one, backend=backend)
    assert_same(hadamard, (linear[0], dict(zip(hadamard[1], linear[1].values(), strict=True))))


@each_backend
def test_linearized_attention_of_a_data_set(backend):
    """arXiv 2603.13085: f(X) = X X^T X is identity features, no denominator; its kernel is G^3."""
    x = randn(1, 1, 50, 16) / 4
    o = nf.linear_attention(x, x, x, feature_map="identity", normalize=False, backend=backend)
    gram = (x @ x.mT).double()
    torch.testing.assert_close(o.double(), gram @ x.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((o @ o.mT).double(), gram @ gram @ gram, rtol=1e-4, atol=1e-4)


@each_backend
@up_to_three_factors
def test_a_repeated_factor_is_a_power(widths, backend):
    """Equal factors of equal features: weights are those of one factor to the power of R."""
    q, k, v = (randn(1, 2, 40, 16, seed=seed) for seed in range(3))
    count = len(widths)
    o = nf.hadamard_attention([q[..., :8]] * count, [k[..., :8]] * count, v, feature_map="softplus", backend=backend)
    x, y = (torch.nn.functional.softplus(t[..., :8].double()) for t in (q, k))
    weights = (x @ y.mT) ** count
    torch.testing.assert_close(
        o.double(), weights @ v.double() / (weights.sum(-1, keepdim=True) + 1e-6), rtol=1e-4, atol=1e-6
    )


@each_backend
@up_to_three_factors
def test_token_by_token(widths, backend):
    """The recurrent form in float64, and the decoding step of the backend, against causal attention."""
    sample = sample_of(widths, 9, heads=4, kv_heads=2, state=True, causal=True)
    o, state = flat(**sample.tensors, **sample.options, backend=backend)
    tensors = {name: tensor.double() for name, tensor in sample.tensors.items()}
    (xs, ys), values = features(tensors, {}), with_ones(tensors["v"])
    running, stepped = tensors["initial_state"].clone(), sample.tensors["initial_state"].clone()
    address = stepped.data_ptr()
    for i in range(9):
        outer = values[:, :, i]
        for y in reversed(ys):
            outer = y[:, :, i].reshape(*y.shape[:2], -1, *[1] * (outer.dim() - 2)) * outer[:, :, None]
        running += outer
        read = to_query_heads(xs[0], running)
        for x in xs:
            read = (x[:, :, i].reshape(*x.shape[:2], -1, *[1] * (read.dim() - 3)) * read).sum(2)
        expected = read[..., :-1] / (read[..., -1:] + 1e-6)
        torch.testing.assert_close(o[:, :, i].double(), expected, rtol=1e-5, atol=1e-6)
        token = [sample.tensors[name][:, :, i : i + 1] for name in sample.tensors if name != "initial_state"]
        count, out = len(widths), torch.full_like(o[:, :, i : i + 1], float("nan"))
        result = nf.hadamard_attention_step(token[:count], token[count:-1], token[-1], stepped, out=out, backend=backend)
        assert result is out and stepped.data_ptr() == address
        torch.testing.assert_close(out[:, :, 0].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.double(), running, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stepped.double(), running, rtol=1e-5, atol=1e-5)


def test_a_compiled_reference_serves_other_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(flat, backend="aot_eager")
    for ends in ((0, 2, 9), (0, 0, 9, 9), (0, 9, 40)):
        sample = sample_of((8,), ends[-1], causal=True, device="cpu", cu_seqlens=torch.tensor(ends, dtype=torch.int32))
        expected = flat(**sample.tensors, **sample.options, backend="reference")
        assert torch.equal(compiled(**sample.tensors, **sample.options), expected), ends


# -------------------------------------------------------------------------------------------------------------- states


def chained(cuts):
    """flat(), piece after piece through the state. Bidirectional: every piece of keys for all queries, the last one counts."""

    def function(backend, causal=False, initial_state=None, return_state=True, **tensors):
        state, outputs = initial_state, []
        for first, last in zip((0, *cuts), (*cuts, tensors["v"].shape[2]), strict=True):
            piece = {n: t if n[0] == "q" and not causal else t[:, :, first:last] for n, t in tensors.items()}
            o, state = flat(**piece, causal=causal, initial_state=state, return_state=True, backend=backend)
            outputs.append(o)
        return torch.cat(outputs, 2) if causal else outputs[-1], state

    return function


@each_backend
@each_direction
@hypothesis.settings(max_examples=max(1, hypothesis.settings.default.max_examples // 4))
@hypothesis.given(cuts=st.lists(st.integers(0, 140), max_size=3).map(sorted), widths=st.sampled_from([(16,), (8, 8)]))
def test_any_split_chained_through_the_state_is_the_whole(causal, backend, cuts, widths):
    """In outputs, states and all gradients, by the rule of accuracy; whether a piece is empty or one token."""
    length = 140 if causal else 35  # beyond one piece of 128 tokens, which only causal attention has
    cuts = [cut * length // 140 for cut in cuts]
    sample = sample_of(widths, length, heads=1, state=True, causal=causal)
    do = like((sample.tensors["q1"][..., :1].expand(-1, -1, -1, 16), sample.tensors["initial_state"]))
    check(sample, do, *run(chained(cuts), sample, do, backend))


@each_backend
@each_direction
@each_widths
def test_states_do_not_depend_on_normalize_or_queries(widths, causal, backend):
    sample = sample_of(widths, state=True, causal=causal)
    _, state = flat(**sample.tensors, **sample.options, backend=backend)
    _, unnormalized = flat(**sample.tensors, **sample.options, normalize=False, backend=backend)
    other = {n: t + 1 if n[0] == "q" else t for n, t in sample.tensors.items()}
    _, other_queries = flat(**other, **sample.options, backend=backend)
    assert torch.equal(state, unnormalized) and torch.equal(state, other_queries)


@each_backend
@each_dtype
def test_states_are_float32(dtype, backend):
    """With features that are exact in every dtype, bits of float32 survive: 1000 + 2^-10 is no number of float16."""
    q = torch.ones(1, 1, 2, 16, dtype=dtype, device=DEVICE)
    v = torch.tensor([1000.0, 2.0**-10], dtype=dtype, device=DEVICE)[:, None].expand(1, 1, 2, 16)
    for causal in (False, True):
        _, state = nf.linear_attention(q, q, v, feature_map="identity", causal=causal, return_state=True, backend=backend)
        assert state.dtype == torch.float32
        assert torch.equal(state[..., :-1], torch.full((1, 1, 16, 16), 1000 + 2.0**-10, device=DEVICE))
        assert torch.equal(state[..., -1], torch.full((1, 1, 16), 2.0, device=DEVICE))
    state = state.clone()
    nf.linear_attention_step(q[:, :, :1], q[:, :, :1], v[:, :, 1:], state, feature_map="identity", backend=backend)
    assert torch.equal(state[..., :-1], torch.full((1, 1, 16, 16), 1000 + 2.0**-9, device=DEVICE))


@each_backend
def test_step_in_half_precision_and_without_out(backend):
    q, k, v = (randn(2, heads, 1, 16, dtype=torch.float16, seed=heads) for heads in (4, 2, 2))
    state = random_state((2, 2, 16, 17), torch.float16)
    expected, final = nf.linear_attention(
        q, k, v, causal=True, initial_state=state, return_state=True, feature_map="relu", backend=backend
    )
    o = nf.linear_attention_step(q.requires_grad_(), k, v, state, feature_map="relu", backend=backend)
    assert o.dtype == torch.float16 and not o.requires_grad
    torch.testing.assert_close(o, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(state, final, rtol=1e-3, atol=1e-3)


@each_backend
def test_step_under_autocast(backend):
    q, k, v = (randn(1, 2, 1, 16, seed=seed) for seed in range(3))
    states = [random_state((1, 2, 16, 17), torch.float32) for _ in range(2)]
    expected = nf.linear_attention_step(*(t.half() for t in (q, k, v)), states[0], backend=backend)
    with torch.autocast(DEVICE, dtype=torch.float16):
        o = nf.linear_attention_step(q, k, v, states[1], backend=backend)
    assert o.dtype == torch.float16 and torch.equal(o, expected) and torch.equal(*states)


@pytest.mark.gpu
@needs_gpu
def test_step_allocates_nothing():
    q, k, v = (randn(2, 2, 1, 64, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    state, out = torch.zeros(2, 2, 64, 65, device=DEVICE), torch.empty_like(v)
    nf.linear_attention_step(q, k, v, state, out=out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    nf.linear_attention_step(q, k, v, state, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


# ----------------------------------------------------------------------------------------------------------- isolation


@each_backend
@each_dtype
@pytest.mark.parametrize("direct", [True, False], ids=["pairs", "states"])
@each_widths
def test_the_future_changes_no_bit(widths, direct, dtype, backend):
    """Token 140 changes: rows before it keep o and dq; keys after it keep dk and dv when only its query and dO change."""
    sample = sample_of(widths, 150, heads=1, dtype=dtype, causal=True, feature_map="softplus", return_state=not direct)
    with form(direct):
        outputs, gradients = run(flat, sample, backend=backend)
        do = like(outputs)

        changed = {n: t.clone() for n, t in sample.tensors.items()}
        for name in changed:
            changed[name][:, :, 140] = 100
        changed_outputs, changed_gradients = run(flat, Sample(changed, sample.options), do, backend)
        o, changed_o = as_tuple(outputs)[0], as_tuple(changed_outputs)[0]
        assert torch.equal(o[:, :, :140], changed_o[:, :, :140])
        assert (o[:, :, 140:] != changed_o[:, :, 140:]).any(-1).all()
        for name in gradients:
            if name[0] == "q":
                assert torch.equal(gradients[name][:, :, :140], changed_gradients[name][:, :, :140]), name

        changed = {n: t.clone() for n, t in sample.tensors.items()}
        for name in changed:
            if name[0] == "q":
                changed[name][:, :, 140] = 10
        do = tuple(d.clone() for d in as_tuple(do))
        do[0][:, :, 140] = 100
        changed_o, changed_gradients = run(flat, Sample(changed, sample.options), do, backend)
        others = torch.arange(150, device=DEVICE) != 140
        assert torch.equal(o[:, :, others], as_tuple(changed_o)[0][:, :, others])
        for name in gradients:
            kept = others if name[0] == "q" else slice(141, None)
            assert torch.equal(gradients[name][:, :, kept], changed_gradients[name][:, :, kept]), name
            assert not torch.equal(gradients[name][:, :, 140], changed_gradients[name][:, :, 140]), name


ENDS = (0, 0, 21, 21, 47, 70)


@each_backend
@each_dtype
@each_direction
@pytest.mark.parametrize("state", [False, True], ids=["alone", "with states"])
@each_widths
def test_packed_neighbours_change_no_bit(widths, state, causal, dtype, backend):
    """Tokens 21 to 46 and what belongs to them change, and the state of an empty sequence beside them."""
    sample = sample_of(widths, dtype=dtype, state=state, causal=causal, cu_seqlens=seqlens(*ENDS), feature_map="softplus")
    outputs, gradients = run(flat, sample, backend=backend)
    do = as_tuple(like(outputs))
    changed = {n: t.clone() for n, t in sample.tensors.items()}
    for name, tensor in changed.items():
        (tensor[2:4] if name == "initial_state" else tensor[:, :, 21:47])[:] = 100
    changed_do = tuple(d.clone() for d in do)
    changed_do[0][:, :, 21:47] = 100
    if state:
        changed_do[1][2:4] = 100
    changed_outputs, changed_gradients = run(flat, Sample(changed, sample.options), changed_do, backend)
    tokens = torch.cat((torch.arange(21), torch.arange(47, 70))).to(DEVICE)
    sequences = torch.tensor([0, 1, 4], device=DEVICE)
    o, changed_o = as_tuple(outputs)[0], as_tuple(changed_outputs)[0]
    assert torch.equal(o[:, :, tokens], changed_o[:, :, tokens])
    assert (o[:, :, 21:47] != changed_o[:, :, 21:47]).any(-1).all()
    if state:
        assert torch.equal(outputs[1][sequences], changed_outputs[1][sequences])
        assert torch.equal(changed_outputs[1][2], changed["initial_state"][2])
    for name in gradients:
        kept = (sequences,) if name == "initial_state" else (slice(None), slice(None), tokens)
        assert torch.equal(gradients[name][kept], changed_gradients[name][kept]), name


@each_backend
@each_direction
@each_widths
def test_packed_sequences_are_computed_as_if_alone(widths, causal, backend):
    sample = sample_of(widths, state=True, causal=causal, cu_seqlens=seqlens(*ENDS))
    outputs, gradients = run(flat, sample, backend=backend)
    do = like(outputs)
    options = {"causal": causal, "return_state": True}
    for index, (a, b) in enumerate(zip(ENDS, ENDS[1:], strict=False)):
        alone = Sample(
            {n: t[index : index + 1] if n == "initial_state" else t[:, :, a:b] for n, t in sample.tensors.items()}, options
        )
        alone_do = do[0][:, :, a:b], do[1][index : index + 1]
        alone_outputs, alone_gradients = run(flat, alone, alone_do, backend)
        torch.testing.assert_close(outputs[0][:, :, a:b], alone_outputs[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outputs[1][index : index + 1], alone_outputs[1], rtol=1e-5, atol=1e-5)
        for name, gradient in alone_gradients.items():
            own = gradients[name][index : index + 1] if name == "initial_state" else gradients[name][:, :, a:b]
            torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_bit(layout, backend):
    sample = sample_of((8, 8), 40, kv_heads=2, batch=2, causal=True, state=True)
    tokens = {n: LAYOUTS[layout](t) if n != "initial_state" else t for n, t in sample.tensors.items()}
    dense = {n: t.contiguous() for n, t in tokens.items()}
    moved = dict(tokens, initial_state=tokens["initial_state"].transpose(2, 4).contiguous().transpose(2, 4))
    expected = run(flat, Sample(dense, sample.options), backend=backend)
    result = run(flat, Sample(moved, sample.options), backend=backend)
    if backend == "triton":
        assert_same(expected, result)
    torch.testing.assert_close(expected, result, rtol=1e-5, atol=1e-5)  # matrix products on the CPU depend on strides


# -------------------------------------------------------------------------------------------------------- feature maps


@each_backend
@pytest.mark.parametrize("name", MAPS)
def test_feature_maps_and_their_derivatives(name, backend):
    """A single key leaves its features in the last column of the state."""
    k = torch.tensor([-80.0, -20, -8, -3, -1, -0.5, -1e-3, 0, 1e-3, 0.5, 1, 3, 8, 15, 21, 40], device=DEVICE)
    k = k.reshape(1, 1, 1, 16).requires_grad_()
    v = randn(1, 1, 1, 16)
    _, state = nf.linear_attention(k.detach(), k, v, feature_map=name, return_state=True, backend=backend)
    wide = k.detach().double().requires_grad_()
    expected = MAPS[name](wide)
    got, slope = state[0, 0, :, -1], torch.autograd.grad(state[..., -1].sum(), k)[0]
    torch.testing.assert_close(got.double(), expected.detach().reshape(16), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(slope.double(), torch.autograd.grad(expected.sum(), wide)[0], rtol=2e-6, atol=1e-7)


@each_backend
@each_direction
def test_a_function_as_feature_map(causal, backend):
    """It may change the width, and its parameters get gradients."""
    linear = torch.nn.Linear(12, 16, device=DEVICE)
    x = {name: randn(1, 2, 30, 12, seed=seed) for seed, name in enumerate(("q", "k"))}
    v = randn(1, 2, 30, 16, seed=5)

    def feature_map(t):
        return linear(t).exp()

    o = nf.linear_attention(**x, v=v, feature_map=feature_map, causal=causal, backend=backend)
    gradient = torch.autograd.grad(o, linear.weight, like(o))[0]
    q, k = linear(x["q"]), linear(x["k"])
    expected = nf.linear_attention(q, k, v, feature_map="exp", causal=causal, backend=backend)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, linear.weight, like(o))[0], rtol=1e-4, atol=1e-5)
    step = nf.linear_attention_step(
        *(t[:, :, :1] for t in (x["q"], x["k"], v)), torch.zeros(1, 2, 16, 17, device=DEVICE), feature_map=feature_map,
        backend=backend,
    )
    torch.testing.assert_close(step, v[:, :, :1], rtol=1e-4, atol=1e-5)


def test_other_sizes_on_the_reference():
    """Any number of factors of any width."""
    for widths in ((1,), (3,), (5, 7), (2, 3, 4, 2), (300,)):
        sample = sample_of(widths, 20, value_width=5, state=True, causal=True, device="cpu")
        do = like(flat(**sample.tensors, **sample.options, backend="reference"))
        check(sample, do, *run(flat, sample, do, "reference"))


# ---------------------------------------------------------------------------------------------------------- precision


@triton.jit
def rounded(x, o, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(o + index, to_tf32(tl.load(x + index)))


def test_rounding_to_tf32():
    x = torch.cat((randn(1020), torch.tensor([0, math.inf, -math.inf, 3e38], device=DEVICE)))
    o = torch.empty_like(x)
    rounded[(1,)](x, o, x.numel())
    assert not (o.view(torch.int32) & 0x1FFF).any()
    assert ((o == x) | ((o - x).abs() <= 2.0**-11 * x.abs())).all()
    every_nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32, device=DEVICE).view(torch.float32)
    o = torch.empty_like(every_nan)
    rounded[(1,)](every_nan, o, every_nan.numel())
    assert o.isnan().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="looks at products in Triton's interpreter")
@pytest.mark.parametrize("name", [name for samples in SAMPLES.values() for name in samples])
def test_products_of_float16_calls_cut_nothing(name):
    """Tensor cores drop the lower 13 bits of tf32 operands, and sums of positive numbers become too small; this does not."""
    multiply, cut = InterpreterBuilder.create_dot, []

    def create_dot(builder, a, b, *arguments):
        cut.extend((np.ascontiguousarray(x.data).view(np.uint32) & 0x1FFF).any() for x in (a, b))
        return multiply(builder, a, b, *arguments)

    with patch.object(InterpreterBuilder, "create_dot", create_dot):
        run(FUNCTIONS["linear_attention" if name in SAMPLES["linear_attention"] else "hadamard_attention"],
            make(name, torch.float16, length=40))
    assert cut and not any(cut)


# ------------------------------------------------------------------------------------------------------- nothing there


@each_backend
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("batch, length, keys, causal", [
    (0, 5, 5, False), (0, 5, 5, True), (1, 0, 0, False), (1, 0, 0, True), (2, 0, 9, False), (2, 9, 0, False), (0, 0, 0, True),
])
@each_widths
def test_empty(widths, batch, length, keys, causal, state, backend):
    sample = sample_of(widths, length, keys, batch=batch, state=state, causal=causal)
    do = like(flat(**sample.tensors, **sample.options, backend="reference"))
    outputs, gradients = run(flat, sample, do, backend)
    check(sample, do, outputs, gradients)
    if not state:
        assert torch.equal(outputs, torch.zeros(batch, 2, length, 16, device=DEVICE))
        assert not any(gradient.any() for gradient in gradients.values())
    elif not keys:
        assert torch.equal(outputs[1], sample.tensors["initial_state"])


@each_backend
@pytest.mark.parametrize("state", [False, True])
def test_empty_packed_batch(state, backend):
    sample = sample_of((16,), 0, state=state, cu_seqlens=seqlens(0, 0, 0))
    outputs, _ = run(flat, sample, backend=backend)
    assert as_tuple(outputs)[0].shape == (1, 2, 0, 16)
    if state:
        assert torch.equal(outputs[1], sample.tensors["initial_state"])


@each_backend
@each_direction
@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("direct", [True, False], ids=["pairs", "states"])
def test_queries_without_weight_give_zeros_and_get_zero_gradients(direct, eps, causal, backend):
    """relu leaves nothing of half of the queries; without keys nothing is left for any."""
    sample = sample_of((8, 16), eps=eps, causal=causal, feature_map="relu")
    for name in ("q1", "q2"):
        sample.tensors[name][:, :, ::2] = -1
    with form(direct):
        o, gradients = run(flat, sample, backend=backend)
        others = run(flat, sample, lambda o: like(o) * (torch.arange(70, device=DEVICE) % 2)[:, None], backend)
    assert not o[:, :, ::2].any() and o[:, :, 1::2].any()
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all()
        if name[0] == "q":
            assert not gradient[:, :, ::2].any() and gradient[:, :, 1::2].any()
        assert torch.equal(gradient, others[1][name])


# ----------------------------------------------------------------------------------------------------------- bad input


def bad(backend="triton", function=nf.hadamard_attention, **changes):
    q, k, v = randn(1, 4, 6, 16), randn(1, 2, 6, 16), randn(1, 2, 6, 24)
    return function(**{"qs": [q, q[..., :8]], "ks": [k, k[..., :8]], "v": v, **changes}, backend=backend)


def half(*shape):
    return randn(*shape, dtype=torch.float16)


BAD = {
    "qs a tensor": (TypeError, "^qs must be a list or tuple", lambda: {"qs": randn(2, 4, 6, 16)}),
    "ks None": (TypeError, "^ks must be a list or tuple", lambda: {"ks": None}),
    "no factors": (ValueError, "^qs must have at least one factor", lambda: {"qs": [], "ks": []}),
    "fewer ks": (ValueError, "^ks must have as many factors as qs, 2, got 1", lambda: {"ks": [randn(1, 2, 6, 16)]}),
    "no ks": (ValueError, "^ks must have as many factors as qs, 2, got 0", lambda: {"ks": ()}),
    "qs of numbers": (TypeError, r"^qs\[1\] must be a torch.Tensor", lambda: {"qs": [randn(1, 4, 6, 16), 1.0]}),
    "v None": (TypeError, "^v must be a torch.Tensor", lambda: {"v": None}),
    "first q of rank 3": (ValueError, r"^qs\[0\] must have 4", lambda: {"qs": [randn(4, 6, 16), randn(1, 4, 6, 8)]}),
    "second q of rank 3": (ValueError, r"^qs\[1\] must have the shape of qs\[0\]", lambda: {
        "qs": [randn(1, 4, 6, 16), randn(4, 6, 8)]}),
    "second q longer": (ValueError, r"^qs\[1\] must have the shape of qs\[0\]", lambda: {
        "qs": [randn(1, 4, 6, 16), randn(1, 4, 7, 8)]}),
    "second k of other heads": (ValueError, r"^ks\[1\] must have the shape of ks\[0\]", lambda: {
        "ks": [randn(1, 2, 6, 16), randn(1, 4, 6, 8)]}),
    "second q in half": (TypeError, r"^qs\[1\] must have the dtype of qs\[0\]", lambda: {
        "qs": [randn(1, 4, 6, 16), half(1, 4, 6, 8)]}),
    "second k elsewhere": (ValueError, r"^ks\[1\] must be on the device of ks\[0\]", lambda: {
        "ks": [randn(1, 2, 6, 16), randn(1, 2, 6, 8, device="meta")]}),
    "second k of another width": (ValueError, r"^ks\[1\] must have the width of qs\[1\], 8, got 16", lambda: {
        "ks": [randn(1, 2, 6, 16), randn(1, 2, 6, 16)]}),
    "first k of another width": (ValueError, r"^ks\[0\] must have the width of qs\[0\], 16, got 8", lambda: {
        "ks": [randn(1, 2, 6, 8), randn(1, 2, 6, 8)]}),
    "ks of another batch": (ValueError, r"^ks\[0\] must have the batch size of qs\[0\]", lambda: {
        "ks": [randn(2, 2, 6, 16), randn(2, 2, 6, 8)]}),
    "heads that do not divide": (ValueError, r"^qs\[0\] must have a multiple of the 2 heads of ks\[0\] and v", lambda: {
        "qs": [randn(1, 3, 6, 16), randn(1, 3, 6, 8)]}),
    "v of another length": (ValueError, r"^v must have the heads and length of ks\[0\]", lambda: {"v": randn(1, 2, 7, 24)}),
    "v in half": (TypeError, r"^v must have the dtype of qs\[0\]", lambda: {"v": half(1, 2, 6, 24)}),
    "integers": (TypeError, r"^qs\[0\] must be float", lambda: {"qs": [torch.ones(1, 4, 6, 16, dtype=torch.int64)] * 2}),
    "unknown feature map": (ValueError, '^feature_map must be "identity", "elu".*or a function, got \'gelu\'', lambda: {
        "feature_map": "gelu"}),
    "feature map of None": (TypeError, "^feature_map must be a name or a function", lambda: {"feature_map": None}),
    "eps negative": (ValueError, "^eps must not be negative", lambda: {"eps": -1e-6}),
    "eps NaN": (ValueError, "^eps must not be negative", lambda: {"eps": float("nan")}),
    "eps a string": (TypeError, "^eps must be a number", lambda: {"eps": "1e-6"}),
    "causal of two lengths": (ValueError, "^causal needs q and k of one length, got 5 and 6", lambda: {
        "qs": [randn(1, 4, 5, 16), randn(1, 4, 5, 8)], "causal": True}),
    "state a list": (TypeError, "^initial_state must be a torch.Tensor", lambda: {"initial_state": [0.0]}),
    "state in half": (TypeError, "^initial_state must be torch.float32, got torch.float16", lambda: {
        "initial_state": half(1, 2, 16, 8, 25)}),
    "state in double": (TypeError, "^initial_state must be torch.float32", lambda: {
        "initial_state": randn(1, 2, 16, 8, 25, dtype=torch.float64)}),
    "state without its last column": (ValueError, r"^initial_state must have shape \(1, 2, 16, 8, 25\)", lambda: {
        "initial_state": randn(1, 2, 16, 8, 24)}),
    "state of query heads": (ValueError, "^initial_state must have shape", lambda: {"initial_state": randn(1, 4, 16, 8, 25)}),
    "state flattened": (ValueError, "^initial_state must have shape", lambda: {"initial_state": randn(1, 2, 128, 25)}),
    "state elsewhere": (ValueError, "^initial_state must be on", lambda: {
        "initial_state": randn(1, 2, 16, 8, 25, device="meta")}),
    "one state for two sequences": (ValueError, r"^initial_state must have shape \(2, 2, 16, 8, 25\)", lambda: {
        "initial_state": randn(1, 2, 16, 8, 25), "cu_seqlens": seqlens(0, 2, 6)}),
    "cu_seqlens a list": (TypeError, "^cu_seqlens must be an int32", lambda: {"cu_seqlens": [0, 6]}),
    "cu_seqlens with two lengths": (ValueError, "^cu_seqlens .*5 and 6", lambda: {
        "qs": [randn(1, 4, 5, 16), randn(1, 4, 5, 8)], "cu_seqlens": seqlens(0, 6)}),
    "unknown backend": (ValueError, "^backend must be", lambda: {"backend": "cudnn"}),
}


@each_backend
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    error, message, changes = BAD[case]
    for _ in range(2):  # the second time, too, whatever the first has cached
        with pytest.raises(error, match=message):
            bad(**{"backend": backend, **changes()})


@each_backend
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_linear_attention_calls_its_arguments_by_name(argument, backend):
    good = {"q": randn(1, 4, 6, 16), "k": randn(1, 2, 6, 16), "v": randn(1, 2, 6, 16)}
    with pytest.raises(ValueError, match=f"^{argument} must have 4 dimensions"):
        nf.linear_attention(**{**good, argument: randn(4, 6, 16)}, backend=backend)
    with pytest.raises(TypeError, match=f"^{argument} must be a torch.Tensor"):
        nf.linear_attention(**{**good, argument: [1.0]}, feature_map=torch.exp, backend=backend)
    with pytest.raises(ValueError, match="^k must have the width of q, 16, got 8"):
        nf.linear_attention(good["q"], good["k"][..., :8], good["v"], backend=backend)


STEPS = {
    "two tokens": (ValueError, "^a step takes 1 token, got q of length 2", lambda: {
        "q": randn(1, 4, 2, 16), "k": randn(1, 2, 2, 16), "v": randn(1, 2, 2, 16)}),
    "no state": (TypeError, "^state must be a torch.Tensor", lambda: {"state": None}),
    "state of wrong shape": (ValueError, r"^state must have shape \(1, 2, 16, 17\)", lambda: {"state": randn(1, 2, 16, 16)}),
    "state in half": (TypeError, "^state must be torch.float32", lambda: {"state": half(1, 2, 16, 17)}),
    "state with strides": (ValueError, "^state must be contiguous", lambda: {"state": randn(1, 2, 17, 16).mT}),
    "out a list": (TypeError, "^out must be a torch.Tensor", lambda: {"out": [0.0]}),
    "out of wrong shape": (ValueError, r"^out must have shape \(1, 4, 1, 16\)", lambda: {"out": randn(1, 2, 1, 16)}),
    "out in half": (TypeError, "^out must be torch.float32", lambda: {"out": half(1, 4, 1, 16)}),
    "eps negative": (ValueError, "^eps must not be negative", lambda: {"eps": -1.0}),
    "feature map": (ValueError, "^feature_map must be", lambda: {"feature_map": "gelu"}),
}


@each_backend
@pytest.mark.parametrize("case", STEPS)
def test_bad_step(case, backend):
    error, message, changes = STEPS[case]
    state = torch.zeros(1, 2, 16, 17, device=DEVICE)
    call = {"q": randn(1, 4, 1, 16), "k": randn(1, 2, 1, 16), "v": randn(1, 2, 1, 16), "state": state}
    with pytest.raises(error, match=message):
        nf.linear_attention_step(**{**call, **changes()}, backend=backend)
    assert not state.any()


@pytest.mark.parametrize("widths, value_width, reason", [
    ((12, 8), 16, r"qs\[0\] is 12 wide; kernels take multiples of 8 from 8 to 256"),
    ((8, 264), 16, r"qs\[1\] is 264 wide; kernels take multiples of 8 from 8 to 256"),
    ((8, 8), 8, "v is 8 wide; kernels take multiples of 8 from 16 to 256"),
    ((8, 8, 8, 8), 16, "qs has 4 factors; kernels take up to 3"),
    ((32, 32, 24), 16, "the widths of qs multiply to 24576; kernels take up to 16384"),
], ids=str)
def test_sizes_that_kernels_do_not_serve(widths, value_width, reason):
    sample = sample_of(widths, 3, value_width=value_width)
    with pytest.raises(ValueError, match=f"backend='triton' cannot serve this call: {reason}"):
        flat(**sample.tensors, backend="triton")
    assert torch.isfinite(flat(**sample.tensors, backend="reference")).all()
    qs, ks = ([t for n, t in sample.tensors.items() if n[0] == letter] for letter in "qk")
    state = torch.zeros(1, 1, *widths, value_width + 1, device=DEVICE)
    with pytest.raises(ValueError, match=reason):
        nf.hadamard_attention_step(
            [q[:, :, :1] for q in qs], [k[:, :, :1] for k in ks], sample.tensors["v"][:, :, :1], state, backend="triton"
        )


def test_float64_is_for_the_reference():
    wide = {name: randn(1, 2, 6, 16, dtype=torch.float64) for name in "qkv"}
    with pytest.raises(ValueError, match="backend='triton' cannot serve.*float64"):
        nf.linear_attention(**wide, backend="triton")
    o, state = nf.linear_attention(**wide, return_state=True, backend="reference")
    assert o.dtype == state.dtype == torch.float64
    with pytest.raises(TypeError, match="^initial_state must be torch.float64"):
        nf.linear_attention(**wide, initial_state=state.float(), backend="reference")


def test_explain_knows_both():
    q = randn(1, 2, 6, 16)
    text = nf.explain(nf.hadamard_attention, [q] * 4, [q] * 4, q, causal=True, return_state=True)
    assert all("4 factors" in line for line in text.split("\n")[1:3])
    text = nf.explain("linear_attention", q, q, q, backend="triton")
    assert text.startswith("linear_attention: served by triton")
    with pytest.raises(ValueError, match="^initial_state must have shape"):
        nf.explain(nf.linear_attention, q, q, q, initial_state=torch.zeros(1, 2, 16, 16, device=DEVICE))


def test_every_function_of_the_samples_is_public():
    assert set(FUNCTIONS) <= set(nf.__all__)


def test_the_gradient_of_a_state_that_does_not_exist():
    """The torch operator returns an empty state where none is asked for, and gets an empty gradient for it."""
    q, k, v = (randn(1, 2, 70, 16, seed=seed).requires_grad_() for seed in range(3))
    initial = randn(1, 2, 16, 17, seed=4).abs()
    options = "elu", True, True, 1e-6, False, "triton", "triton"
    o, state, *_ = torch.ops.nearfar.hadamard_attention([q], [k], v, initial, None, *options)
    assert state.shape == (0,)
    alone = torch.autograd.grad(o, (q, k, v), torch.ones_like(o), retain_graph=True)
    both = torch.autograd.grad((o, state), (q, k, v), (torch.ones_like(o), torch.ones_like(state)))
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


# ----------------------------------------------------------------------------------------------------------------- GPU


def state_in_float64(ks, v, phi):
    """The state after all keys, (B, H, prod d_r, Dv + 1), chunk by chunk."""
    state = 0
    for *factors, values in zip(*(t.split(4096, 2) for t in (*ks, v)), strict=True):
        product = phi(factors[0].double())
        for k in factors[1:]:
            product = (product[..., None] * phi(k.double())[..., None, :]).flatten(-2)
        state = state + product.mT @ with_ones(values.double())
    return state


@pytest.mark.gpu
@needs_gpu
@each_direction
def test_long_sequences_keep_float32_states(causal):
    """262,144 tokens in bfloat16. relu leaves k exact, so that nothing but the sums can lose accuracy.

    A sum of positive numbers in bfloat16 would stop growing after some hundred; in float32 its roundings are some
    thousand, of random sign, one for each chunk.
    """
    length, tail = 2**18, 1024
    sample = sample_of((64,), length, dtype=torch.bfloat16, heads=2, kv_heads=2, value_width=64, causal=causal)
    tensors = dict(sample.tensors, v=sample.tensors["v"] + 1)
    o, state = flat(**tensors, feature_map="relu", causal=causal, return_state=True, backend="triton")
    exact = state_in_float64([tensors["k1"]], tensors["v"], torch.relu)
    assert (state.double() - exact).norm() <= 2e-5 * exact.norm()
    assert ((state.double() - exact) / exact).abs().max() <= 2e-4
    q, k, v = (tensors[name][:, :, -tail:] for name in ("q1", "k1", "v"))
    before = state_in_float64([tensors["k1"][:, :, :-tail]], tensors["v"][:, :, :-tail], torch.relu) if causal else exact
    own = Sample({"q1": q, "k1": k, "v": v, "initial_state": before.reshape(1, 2, 64, 65).float()},
                 {"feature_map": "relu", "causal": True})
    if not causal:
        own = Sample({n: t[:, :, :0] if n in ("k1", "v") else t for n, t in own.tensors.items()}, {"feature_map": "relu"})
    expected = attend({n: t.double() for n, t in own.tensors.items()}, own.options)
    eps = torch.finfo(torch.bfloat16).eps
    assert (o[:, :, -tail:].double() - expected).abs().max() <= 4 * eps * tensors["v"].abs().max()


@pytest.mark.gpu
@needs_gpu
@each_direction
def test_beyond_32_bit_offsets(causal):
    """q, o, dO and dq have more than 2^31 elements each; the last rows of the last head are as computed alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    length, heads, tail = 2**20, 33, 40
    q = torch.randn(1, heads, length, 64, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    k, v = (torch.randn(1, 1, length, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    # The gradient is an expanded tensor, so that it needs no memory.
    do = torch.randn(64, dtype=torch.bfloat16, device="cuda").expand(1, heads, length, 64)
    o, gradients = run(flat, Sample({"q1": q, "k1": k, "v": v}, {"causal": causal}), do)
    seen = length - tail if causal else length
    state = state_in_float64([k[:, :, :seen]], v[:, :, :seen], MAPS["elu"]).reshape(1, 1, 64, 65).float()
    part = Sample(
        {"q1": q[:, -1:, -tail:], "k1": k[:, :, seen:], "v": v[:, :, seen:], "initial_state": state}, {"causal": causal}
    )
    check(part, do[:, -1:, -tail:], o[:, -1:, -tail:], {"q1": gradients["q1"][:, -1:, -tail:]}, names=("q1",))


@pytest.mark.gpu
@needs_gpu
def test_the_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    sample = sample_of((8, 16), dtype=torch.float16, state=True, causal=True)
    moved = Sample({n: t.to("cuda:1") for n, t in sample.tensors.items()}, sample.options)
    outputs, gradients = run(flat, sample)
    do = tuple(d.to("cuda:1") for d in like(outputs))
    moved_outputs, moved_gradients = run(flat, moved, do)
    home = tuple(t.to(outputs[0].device) for t in moved_outputs)
    assert_same((outputs, gradients), (home, {n: t.to(outputs[0].device) for n, t in moved_gradients.items()}))


def test_long_causal_calls_keep_half_of_the_states():
    """A million tokens of 16 x 16 features: states (float32 partial sums, rounded for the forward and for the backward) within
    half of the bytes of q, k, v, o and their gradients."""

    def pieces(length):
        qs = [torch.empty(1, 8, length, 16, dtype=torch.bfloat16, device="meta") for _ in range(2)]
        v = torch.empty(1, 8, length, 64, dtype=torch.bfloat16, device="meta")
        return linear_states.piece_length_of(qs, v, True, "triton")

    assert (pieces(4096), pieces(2**20)) == (256, 512)
    states, tensors = (4 + 2 + 2) * 256 * 65 / pieces(2**20), 2 * 2 * (32 + 32 + 64 + 64)
    assert states <= 0.5 * tensors
