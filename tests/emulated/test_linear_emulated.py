"""The CUDA kernels of causal linear and Hadamard attention without a GPU, in the emulation."""

import pytest
import torch
from emulated import Conditions, Extension, Guarded, build, launch
from harness import GRADIENTS, LAYOUTS, MISALIGNED, Sample, randn
from samples.linear import (
    check,
    features,
    op_arguments,
    random_state,
    random_tensors,
    spans,
    takes_states_rounded,
    with_ones,
)

from nearfar import _cuda

pytestmark = pytest.mark.full

states = takes_states_rounded("q", "q1", "q2")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The launchers of causal attention with one factor and with two, by name."""
    grads = ["grad_queries", "grad_keys"]
    return build(
        tmp_path_factory.mktemp("emulated"),
        linear__causal_forward=["linear_causal_forward"],
        linear__causal_backward=[f"linear_causal_{name}" for name in grads],
        linear__causal_backward_hopper=[f"linear_causal_{name}_hopper" for name in grads],
        hadamard__causal_forward=["hadamard_causal_forward"],
        hadamard__causal_backward=[f"hadamard_causal_{name}" for name in grads],
    )


def pieces_of(sample, length):
    """(2, pieces) int32, begins and ends of the pieces of every sequence and of an empty piece."""
    tokens = sample.tensors["v"].shape[2]
    pairs = [(b, min(b + length, end)) for first, end in spans(sample.options, tokens) for b in range(first, end, length)]
    return torch.tensor([*pairs, (tokens, tokens)], dtype=torch.int32).T.contiguous()


def to_key_heads(x, heads):
    """The sum over the query heads of each group."""
    return x.unflatten(1, (heads, -1)).sum(2)


def states_of(sample, pieces, xs, ys, initial, of_keys):
    """float32 sums of x y^T over the tokens before each piece in its sequence, or after it, y one column wider than v.

    Returns (B, H, pieces, D, Dv) and, from the last column, (B, H, pieces, D).
    """
    heads, states = sample.tensors["v"].shape[1], []
    sequences = spans(sample.options, ys.shape[2])
    for begin, end in pieces.T.tolist():
        index = next((i for i, (first, last) in enumerate(sequences) if first <= begin < last), 0)
        span = slice(sequences[index][0], begin) if of_keys else slice(end, sequences[index][1])
        total = to_key_heads(xs[:, :, span].double().mT @ ys[:, :, span].double(), heads)
        if initial is not None:
            own = initial[index : index + 1] if "cu_seqlens" in sample.options else initial
            total = total + own.flatten(2, -2)
        states.append(total.float())
    states = torch.stack(states, 2)
    return states[..., :-1], states[..., -1]


ANY = Conditions()


def run(kernels, sample, do, piece_length=None, conditions=ANY, hopper=False):
    """(o, inverse or None, weights) and the gradients by name.

    piece_length: of pieces with states, None for one without. hopper: the kernels that are for Hopper where there are two.
    """
    guarded, tensors, options = Guarded(poison=conditions.seed), sample.tensors, sample.options
    fill = lambda x: guarded.empty(x.shape, x.dtype).copy_(x)  # noqa: E731
    inputs = {name: guarded.copy(x) for name, x in tensors.items() if name != "initial_state"}
    inputs["grad_o"], v = guarded.copy(do), inputs["v"]
    feature_map, normalize = options.get("feature_map", "elu"), options.get("normalize", True)
    numbers = dict(
        batches=v.shape[0], heads=do.shape[1], kv_heads=v.shape[1], num_tokens=v.shape[2],
        num_pieces=1, piece_length=v.shape[2],
    )
    operator = "linear" if "q" in tensors else "hadamard"
    if operator == "linear":
        numbers["width"] = v.shape[3]
    places = {}
    if piece_length is not None:
        pieces = pieces_of(sample, piece_length)
        if "cu_seqlens" in options:
            places["pieces"] = fill(pieces)
        else:
            pieces = pieces[:, :-1]
        numbers |= dict(num_pieces=pieces.shape[1], piece_length=piece_length)
    xs, ys = map(face_split, features({name: x.float() for name, x in tensors.items()}, options))

    def with_states(rows, values, initial, of_keys):
        if piece_length is None:
            return places
        found = states_of(sample, pieces, rows, values, initial, of_keys)
        return places | {name: fill(x) for name, x in zip(("states", "norms"), found, strict=True)}

    saved = dict(
        o=guarded.empty(do.shape, v.dtype), inverse=guarded.empty(do.shape[:3], torch.float32) if normalize else None,
        weights=guarded.empty(do.shape[:3], torch.float32),
    )
    gradients = {name: guarded.empty(x.shape, v.dtype) for name, x in inputs.items() if name != "grad_o"}
    filled = {f"d{name}": gradient for name, gradient in gradients.items()}
    before = with_states(ys, with_ones(tensors["v"]), tensors.get("initial_state"), True)

    def run_one(which, tensors, **more):
        launch(kernels[f"{operator}_causal_{which}"], feature_map, tensors, conditions, **numbers, **more)

    run_one("forward", before | inputs | saved, eps=options.get("eps", 1e-6))
    everything = inputs | saved | filled
    run_one("grad_queries" + ("_hopper" if hopper else ""), before | everything, eps=options.get("eps", 1e-6))
    grads = do.float() * (saved["inverse"][..., None] if normalize else 1)
    after = with_states(xs, torch.cat((grads, saved["weights"][..., None]), -1), None, False)
    run_one("grad_keys" + ("_hopper" if hopper else ""), after | everything)
    guarded.assert_intact()
    return tuple(saved.values()), gradients


def face_split(factors):
    """(B, H, N, P) of factors (B, H, N, d_r)."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[..., :, None] * factor[..., None, :]).flatten(-2)
    return product


def make(width=64, heads=(1, 1), length=200, batch=1, state=False, **options):
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32)
    widths, width = ((16, 16), 64) if width == TWO_FACTORS else ((width,), width)
    shapes = (batch, heads[0], length), (batch, heads[1], length)
    tensors = random_tensors(widths, width, *shapes, torch.bfloat16, device="cpu", numbered=len(widths) > 1)
    for name in [name for name in tensors if name[1:]]:  # factors, whose features are not to be alike
        tensors[name] += torch.linspace(-1, 1, 16, dtype=torch.bfloat16)
    tensors["v"] += 1  # its mean, o, would be small
    if state:
        sequences = options["cu_seqlens"].numel() - 1 if "cu_seqlens" in options else batch
        tensors["initial_state"] = random_state((sequences, heads[1], *widths, width + 1), torch.bfloat16, device="cpu")
    return Sample(tensors, dict(causal=True, **options))


TWO_FACTORS = "two factors"  # of 16 features each, for a width

SAMPLES = {
    "one chunk": (dict(length=50), None),
    "whole chunks": (dict(length=384), None),
    "128 wide": (dict(width=128, length=200), None),
    "a last chunk of one token": (dict(length=257, feature_map="exp"), None),
    "heads share keys, pieces": (dict(heads=(3, 1), batch=2, length=300, feature_map="relu", eps=0.5), 128),
    "not normalised": (dict(heads=(2, 2), length=300, normalize=False, feature_map="identity"), None),
    "a state comes in": (dict(length=300, state=True, feature_map="softplus"), 256),
    "packed": (dict(cu_seqlens=[0, 0, 5, 200, 201, 520], length=520), 256),
    "packed, states, 128 wide": (dict(width=128, heads=(2, 1), cu_seqlens=[0, 70, 70, 300], length=300, state=True), 128),
    "packed, not normalised": (dict(cu_seqlens=[0, 150, 300], length=300, normalize=False), 128),
    "two factors": (dict(width=TWO_FACTORS, length=257), None),
    "two factors, one chunk": (dict(width=TWO_FACTORS, length=50, feature_map="exp"), None),
    "two factors, heads share keys, pieces": (
        dict(width=TWO_FACTORS, heads=(3, 1), batch=2, length=300, feature_map="relu", eps=0.5),
        128,
    ),
    "two factors, a state comes in": (dict(width=TWO_FACTORS, length=300, state=True, feature_map="softplus"), 256),
    "two factors, not normalised": (
        dict(width=TWO_FACTORS, heads=(2, 2), length=300, normalize=False, feature_map="identity"),
        None,
    ),
    "two factors, packed": (dict(width=TWO_FACTORS, heads=(2, 1), cu_seqlens=[0, 0, 5, 200, 201, 420], length=420), 256),
}


def upstream(sample):
    v, heads = sample.tensors["v"], next(iter(sample.tensors.values())).shape[1]
    return 1 + randn(v.shape[0], heads, *v.shape[2:], dtype=v.dtype, seed=11, device="cpu")


@pytest.mark.parametrize("name", SAMPLES)
def test_against_the_oracle(name, kernels):
    """Whatever the order of the lanes and the time at which copies land."""
    options, piece_length = SAMPLES[name]
    sample = make(**options)
    do = upstream(sample)
    saved, gradients = run(kernels, sample, do, piece_length)
    check(sample, do, saved[0], gradients, names=list(gradients))
    again, gradients_again = run(kernels, sample, do, piece_length, Conditions(late_copies=True, seed=1))
    for first, second in zip((*saved, *gradients.values()), (*again, *gradients_again.values()), strict=True):
        assert first is None or torch.equal(first, second)


@pytest.mark.parametrize("name", [name for name, (options, _) in SAMPLES.items() if options.get("width", 64) == 64])
def test_hopper_kernels_against_the_oracle(name, kernels):
    options, piece_length = SAMPLES[name]
    sample = make(**options)
    do = upstream(sample)
    saved, gradients = run(kernels, sample, do, piece_length, hopper=True)
    check(sample, do, saved[0], gradients, names=list(gradients))
    _, again = run(kernels, sample, do, piece_length, Conditions(late_copies=True, seed=1), hopper=True)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("width, chunk", [(64, 128), (128, 64), (TWO_FACTORS, 128)])
def test_norms_are_as_exact_as_float32(width, chunk, kernels):
    """The last query is alone in its chunk and takes all keys but one by the norm of the state, kept as two numbers."""
    sample = make(width=width, length=2 * chunk + 1)
    (_, inverse, _), _ = run(kernels, sample, upstream(sample))
    xs, ys = features({name: tensor.float() for name, tensor in sample.tensors.items()}, sample.options)
    x = face_split([factor.bfloat16().double() for factor in xs])  # queries' features meet the norms factor by factor
    y = face_split([factor.bfloat16() for factor in ys]).double()  # those of keys are rounded
    expected = 1 / ((x[:, :, -1:] * y).sum((-1, -2)) + 1e-6)
    torch.testing.assert_close(inverse[:, :, -1].double(), expected, rtol=3e-5, atol=0)


@pytest.mark.parametrize("layout", ["tokens before heads", "off by eight bytes"])
@pytest.mark.parametrize("options", [{}, {"normalize": False, "feature_map": "relu"}, {"width": TWO_FACTORS}], ids=str)
def test_through_the_operator(options, layout, kernels, monkeypatch):
    """Arguments arrive where they belong, forward and backward, and what does not start at 16 bytes is copied."""
    monkeypatch.setattr(_cuda, "extension", Extension(kernels))
    monkeypatch.setattr(_cuda, "stream_of", lambda tensor: 0)
    sample = make(heads=(4, 2), batch=2, length=150, **options)
    change = {**LAYOUTS, **MISALIGNED}[layout]
    tensors = {name: change(x).requires_grad_() for name, x in sample.tensors.items()}
    assert layout in LAYOUTS or next(iter(tensors.values())).data_ptr() % 16
    o, *_ = torch.ops.nearfar.hadamard_attention(*op_arguments(Sample(tensors, sample.options), "cuda"))
    do = GRADIENTS["width before rows"](upstream(sample))
    gradients = torch.autograd.grad(o, list(tensors.values()), do)
    check(sample, do, o.detach(), dict(zip(tensors, gradients, strict=True)))
