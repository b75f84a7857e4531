"""Linear and Hadamard linear attention: the dense oracle, pair by pair with the initial state beside it, and sample calls."""

import functools
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from harness import (
    DEVICE,
    Sample,
    accumulation,
    as_tuple,
    assert_accurate,
    furthest,
    generator,
    randn,
    rounded,
    rounds_like_kernels,
)

import nearfar as nf
from nearfar.kernels import linear_states
from nearfar.reference import linear as reference
from nearfar.runtime.plans import forget_plans

SAMPLES = {
    "linear_attention": {
        "elu, grouped heads": dict(widths=(24,), heads=(4, 2)),
        "causal, state in and out": dict(widths=(24,), causal=True, state=True),
        "packed, causal": dict(widths=(16,), causal=True, packed=True, feature_map="relu"),
        "identity, not normalised": dict(widths=(24,), feature_map="identity", normalize=False),
    },
    "hadamard_attention": {
        "two factors": dict(widths=(24, 16), feature_map="relu"),
        "two factors, causal, state in and out": dict(
            widths=(8, 16), heads=(2, 1), feature_map="exp", causal=True, state=True
        ),
        "three factors, causal, grouped heads": dict(widths=(8, 16, 8), heads=(2, 1), feature_map="softplus", causal=True),
        "two factors, packed, states": dict(widths=(8, 16), heads=(2, 1), packed=True, state=True),
    },
}
STATE_SCALE = 4.0


def flat(**named):
    """hadamard_attention with its factors by the names q1, q2, .., k1, k2, .."""
    qs, ks = ([named.pop(name) for name in factor_names(named, letter)] for letter in "qk")
    return nf.hadamard_attention(qs, ks, **named)


FUNCTIONS = {"linear_attention": nf.linear_attention, "hadamard_attention": flat}


def factor_names(tensors, letter):
    """q for one factor, q1, q2, .. for several."""
    return [name for name in tensors if name[0] == letter]


def make(name, dtype, device=DEVICE, length=75):
    operator = next(operator for operator, samples in SAMPLES.items() if name in samples)
    options = dict(SAMPLES[operator][name])
    widths, state, packed = options.pop("widths"), options.pop("state", False), options.pop("packed", False)
    heads, kv_heads = options.pop("heads", (2, 2))
    batch = 1 if packed or heads > kv_heads else 2
    sequences = batch
    if packed:
        ends = [0, length // 3, length // 3, 2 * length // 3, length]
        options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
        sequences = len(ends) - 1
    tensors = random_tensors(
        widths, 16, (batch, heads, length), (batch, kv_heads, length), dtype, device, numbered=operator == "hadamard_attention"
    )
    if state:
        tensors["initial_state"] = random_state((sequences, kv_heads, *widths, 17), dtype, device)
        options["return_state"] = True
    return Sample(tensors, options)


def random_tensors(widths, value_width, query_shape, key_shape, dtype, device=DEVICE, seed=1, numbered=True):
    """q, k (q1, q2, .., k1, k2, .. if numbered) of half a standard deviation, and v."""
    numbers = [str(r + 1) if numbered else "" for r in range(len(widths))]
    tensors = {}
    for letter, shape in (("q", query_shape), ("k", key_shape)):
        for number, width in zip(numbers, widths, strict=True):
            seed += 1
            tensors[letter + number] = randn(*shape, width, dtype=dtype, seed=seed, device=device) / 2
    tensors["v"] = randn(*key_shape, value_width, dtype=dtype, seed=seed + 1, device=device)
    return tensors


def random_state(shape, dtype, device=DEVICE, seed=9):
    """Such as keys with positive features leave: positive in the last column."""
    state_dtype = torch.promote_types(dtype, torch.float32)
    values = randn(*shape[:-1], shape[-1] - 1, dtype=state_dtype, seed=seed, device=device)
    weights = 0.5 + torch.rand(*shape[:-1], 1, generator=generator(seed)).to(device, state_dtype)
    return STATE_SCALE * torch.cat((values, weights), -1)


def compile_lengths(name):
    return (19, 35, 50)


# -------------------------------------------------------------------------------------------------------------- oracle

MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "relu": torch.nn.functional.relu,
    "softplus": torch.nn.functional.softplus,
    "exp": torch.exp,
}


def features(tensors, options, dtype=None):
    """phi(q_r), phi(k_r), with values, but not derivatives, rounded to a dtype if one is given."""
    phi = MAPS[options.get("feature_map", "elu")]

    def mapped(x):
        return phi(x) if dtype is None else rounded(phi(x), dtype)

    return [[mapped(tensors[name]) for name in factor_names(tensors, letter)] for letter in "qk"]


def spans(options, length):
    """(first, last + 1) of each sequence."""
    cu_seqlens = options.get("cu_seqlens")
    ends = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    return list(zip(ends, ends[1:], strict=False))


def visible(options, num_queries, num_keys, device):
    """(N, M) mask of the pairs that causality and packing allow."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if options.get("causal"):
        mask = mask.tril()
    if options.get("cu_seqlens") is None:
        return mask
    member = torch.zeros(num_queries, num_keys, dtype=torch.bool, device=device)
    for first, last in spans(options, num_queries):
        member[first:last, first:last] = True
    return mask & member


def to_query_heads(q, kv):
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)


def with_ones(v):
    return torch.cat((v, torch.ones_like(v[..., :1])), -1)


def contraction(factors, last, output):
    """einsum of (b, h, n, letter) for each factor with a `last` operand."""
    letters = "pqrstu"[: len(factors)]
    return ",".join(f"bhn{letter}" for letter in letters) + "," + last.format(letters) + "->" + output.format(letters)


def sums(xs, ys, values, state, options, dtype=None):
    """sum_j A_ij (v_j, 1) for every query, and the state after the last key of every sequence.

    dtype: products of the features of several factors are rounded to it before they enter a state.
    """
    mask = visible(options, xs[0].shape[2], values.shape[2], values.device)
    weights = functools.reduce(torch.mul, [x @ to_query_heads(x, y).mT for x, y in zip(xs, ys, strict=True)])
    total = weights.masked_fill(~mask, 0) @ to_query_heads(xs[0], values)
    if state is not None:
        read = contraction(xs, "bh{}c", "bhnc")
        packed = options.get("cu_seqlens") is not None
        earlier = []
        for index, (first, last) in enumerate(spans(options, xs[0].shape[2])):
            own = to_query_heads(xs[0], state[index : index + 1] if packed else state)
            earlier.append(torch.einsum(read, *(x[:, :, first:last] for x in xs), own))
        total = total + torch.cat(earlier, 2)
    if not options.get("return_state"):
        return total, None
    if dtype is not None and len(ys) > 1:
        return total, state_of_rounded_products(ys, values, state, options, dtype)
    build = contraction(ys, "bhnc", "bh{}c")
    final = torch.cat([
        torch.einsum(build, *(y[:, :, first:last] for y in ys), values[:, :, first:last])
        for first, last in spans(options, values.shape[2])
    ])
    return total, final if state is None else final + state


def products_of(factors, dtype=None):
    """(B, H, N, product of the widths): the products of the features of several factors, with values rounded to a dtype."""
    letters = "pqrstu"[: len(factors)]
    products = torch.einsum(",".join(f"bhn{letter}" for letter in letters) + f"->bhn{letters}", *factors).flatten(3)
    return products if dtype is None else rounded(products, dtype)


def state_of_rounded_products(ys, values, state, options, dtype):
    """The state of `sums`, of products of features that are rounded to this dtype."""
    products = products_of(ys, dtype)
    _, final = sums([products], [products], values, None, options)
    final = final.unflatten(2, [y.shape[3] for y in ys])
    return final if state is None else final + state


CHUNK = 64  # tokens between two states of causal kernels


def sums_of_states(xs, ys, values, initial, options, dtype):
    """The first of `sums`, by states that are rounded to this dtype but for their norms.

    Causal: by a state of all chunks before each chunk, within which pairs are added.
    """
    build, read = contraction(ys, "bhnc", "bh{}c"), contraction(xs, "bh{}c", "bhnc")
    packed, causal = options.get("cu_seqlens") is not None, options.get("causal")

    def state_of(index, begin, end):
        state = torch.einsum(build, *(y[:, :, begin:end] for y in ys), values[:, :, begin:end])
        if initial is not None:
            state = state + (initial[index : index + 1] if packed else initial)
        return to_query_heads(xs[0], torch.cat((rounded(state[..., :-1], dtype), state[..., -1:]), -1))

    totals = []
    for index, (first, last) in enumerate(spans(options, values.shape[2])):
        if not causal:
            rows = slice(first, last) if packed else slice(None)
            totals.append(torch.einsum(read, *(x[:, :, rows] for x in xs), state_of(index, first, last)))
        for begin in range(first, last, CHUNK) if causal else ():
            chunk = slice(begin, min(begin + CHUNK, last))
            own_xs, own_ys = ([x[:, :, chunk] for x in side] for side in (xs, ys))
            pairs, _ = sums(own_xs, own_ys, values[:, :, chunk], None, {"causal": True})
            totals.append(pairs + torch.einsum(read, *own_xs, state_of(index, first, begin)))
    return torch.cat(totals, 2)


def attend(tensors, options, dtype=None, round_states=False):
    """o, or (o, state), by plain torch operations in the dtype of the tensors; dtype: features are rounded to it.

    round_states: so are the states by which queries take sums over keys.
    """
    (xs, ys), values, initial = features(tensors, options, dtype), with_ones(tensors["v"]), tensors.get("initial_state")
    total, state = sums(xs, ys, values, initial, options, dtype)
    if round_states:
        total = sums_of_states(xs, ys, values, initial, options, dtype)
    o = total[..., :-1]
    if options.get("normalize", True):
        weight = total[..., -1:] + options.get("eps", 1e-6)
        o = o / weight.masked_fill(weight == 0, float("inf"))
    return (o, state) if options.get("return_state") else o


def gradients_of(outputs, tensors, do):
    inputs = list(tensors.values())
    gradients = torch.autograd.grad(outputs, inputs, do, allow_unused=True, materialize_grads=True)
    return dict(zip(tensors, gradients, strict=True))


def in_dtype(tensors, dtype):
    return {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}


def scales(tensors, options, do, dstate=None):
    """Outputs and gradients with every term by its absolute value: what their roundings are relative to.

    The sums are multilinear in the features, the values and the state: of positive numbers, their gradients are positive.
    """
    xs, ys = ([x.detach().abs().requires_grad_() for x in side] for side in features(tensors, options))
    values = with_ones(tensors["v"]).detach().abs().requires_grad_()
    state = tensors.get("initial_state")
    state = None if state is None else state.detach().abs().requires_grad_()
    total, final = sums(xs, ys, values, state, options)
    o = total[..., :-1].detach()
    dtotal = torch.nn.functional.pad(do.abs(), (0, 1))
    if options.get("normalize", True):
        eps = options.get("eps", 1e-6)
        weight = sums(*features(tensors, options), with_ones(tensors["v"]), tensors.get("initial_state"), options)[0][..., -1:]
        weight = (weight + eps).detach().abs()
        inverse = weight.masked_fill(weight == 0, float("inf")).reciprocal()
        lost = (total[..., -1:].detach() + eps) * inverse  # to cancellation in the denominator; 1 for positive features
        o = o * inverse * lost
        dtotal = torch.cat((do.abs(), (do.abs() * o).sum(-1, keepdim=True)), -1) * inverse * lost
    leaves = [*xs, *ys, values, *([] if state is None else [state])]
    outputs, upstream = ([total], [dtotal]) if final is None else ([total, final], [dtotal, dstate.abs()])
    found = iter(torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True))
    phi = MAPS[options.get("feature_map", "elu")]
    gradients = {}
    for name in (*factor_names(tensors, "q"), *factor_names(tensors, "k")):
        x = tensors[name].detach().requires_grad_()
        gradients[name] = next(found) * torch.autograd.grad(phi(x).sum(), x)[0].abs()
    gradients["v"] = next(found)[..., :-1]
    gradients["initial_state"] = next(found, None)
    return (o,) if final is None else (o, final.detach()), gradients


OF_ROUNDED_STATES = set()


def takes_states_rounded(*names):
    """A fixture for the tests of kernels that take these gradients from states that were rounded to 16 bits.

    Their plain formula does, too. docs/contract.md lists them ("Where accuracy falls short").
    """

    @pytest.fixture(autouse=True)
    def states():
        OF_ROUNDED_STATES.update(names)
        yield
        OF_ROUNDED_STATES.clear()

    return states


def check(sample, do, o, gradients, names=None):
    """Assert the rule of accuracy for the outputs and the gradients; names: of some tensors only.

    A feature map of plain PyTorch returns 16-bit numbers for 16-bit ones, so the plain formula has its features rounded to the
    dtype of the inputs. All else in it is float32.
    """
    options, dtype = sample.options, sample.tensors["v"].dtype
    exact, plain = in_dtype(sample.tensors, torch.float64), in_dtype(sample.tensors, accumulation(dtype))
    wide, narrow = (tuple(d.to(kind) for d in as_tuple(do)) for kind in (torch.float64, accumulation(dtype)))
    exact_o, plain_o = as_tuple(attend(exact, options)), as_tuple(attend(plain, options, dtype))
    o_scale, scale = scales(exact, options, *wide)
    o = as_tuple(o)
    assert [part.dtype for part in o] == [dtype, torch.promote_types(dtype, torch.float32)][: len(o)]
    for name, *result in zip(("o", "state")[: len(o)], o, exact_o, plain_o, o_scale, strict=True):
        assert_accurate(name, *(tensor.detach() for tensor in result), dtype)
    exact_gradients, plain_gradients = gradients_of(exact_o, exact, wide), gradients_of(plain_o, plain, narrow)
    if rounds_like_kernels(dtype) and OF_ROUNDED_STATES:
        coarse = gradients_of(as_tuple(attend(plain, options, dtype, round_states=True)), plain, narrow)
        for name in OF_ROUNDED_STATES & coarse.keys():
            plain_gradients[name] = furthest(exact_gradients[name], plain_gradients[name], coarse[name])
    for name in names or sample.tensors:
        got = gradients[name]
        assert got.dtype == sample.tensors[name].dtype
        assert_accurate(f"gradient of {name}", got, exact_gradients[name], plain_gradients[name], scale[name], dtype)


def reach(sample):
    """(N, M) mask: which tokens a row of the output may depend on."""
    queries, v = sample.tensors[factor_names(sample.tensors, "q")[0]], sample.tensors["v"]
    return visible(sample.options, queries.shape[2], v.shape[2], v.device)


@contextmanager
def form(direct, piece_length=128):
    """Reference and kernels go pair by pair, or through states with a new one every `piece_length` tokens when causal."""
    with (
        patch.object(reference, "direct_is_cheaper", lambda *_: direct),
        patch.object(linear_states, "prefers_direct", lambda *_: direct),
        patch.object(linear_states, "causal_piece_length", lambda *_: piece_length),
    ):
        forget_plans()
        yield
    forget_plans()


# ----------------------------------------------------------------------------------------------------- torch operators


def op_arguments(sample, backend="triton"):
    tensors, options = sample.tensors, sample.options
    qs, ks = ([unit_stride(tensors[name]) for name in factor_names(tensors, letter)] for letter in "qk")
    return (
        qs, ks, unit_stride(tensors["v"]), tensors.get("initial_state"), options.get("cu_seqlens"),
        options.get("feature_map", "elu"), options.get("normalize", True), options.get("causal", False),
        options.get("eps", 1e-6), options.get("return_state", False), backend, backend,
    )


def unit_stride(tensor):
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def backward_arguments(sample, do, outputs):
    arguments = op_arguments(sample)
    tensors, (*options, _, backend) = arguments[:5], arguments[5:]
    o, _, *saved = outputs
    do, dstate = do if isinstance(do, tuple) else (do, None)
    return (do, dstate, *tensors, o, *saved, *options, backend)
