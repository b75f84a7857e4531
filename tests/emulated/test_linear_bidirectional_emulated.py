"""The CUDA kernels of bidirectional linear attention without a GPU, in the emulation."""

import pytest
import torch
from emulated import Conditions, Extension, Guarded, build, launch
from harness import GRADIENTS, LAYOUTS, MISALIGNED, Sample, like, randn
from samples.linear import check, features, op_arguments, random_state, spans, takes_states_rounded

from nearfar import _cuda

pytestmark = pytest.mark.full

states = takes_states_rounded("q")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The four functions, by name."""
    return build(
        tmp_path_factory.mktemp("emulated"),
        linear__bidirectional_forward=["linear_bidirectional_sums", "linear_bidirectional_read"],
        linear__bidirectional_backward=["linear_bidirectional_grad_queries", "linear_bidirectional_grad_keys"],
    )


def pieces_of(sample, length, tokens):
    """(3, pieces) int32, begins, ends and sequences of the pieces of every sequence and of an empty piece."""
    cut = [
        (begin, min(begin + length, end), index)
        for index, (first, end) in enumerate(spans(sample.options, tokens))
        for begin in range(first, end, length)
    ]
    return torch.tensor([*cut, (tokens, tokens, 0)], dtype=torch.int32).T.contiguous()


def combine(partials, partial_norms, sequence_of, initial):
    """As Triton's kernel of that name: (states, norms), sums over the pieces of each sequence, onto its initial state."""
    sums = torch.cat((partials, partial_norms[..., None]), -1)  # (B, H, pieces, D, D + 1)
    if sequence_of is None:
        total = sums.sum(2, keepdim=True)
        total = total if initial is None else total + initial[:, :, None]
    else:
        last = int(sequence_of.max()) + 1 if initial is None else initial.shape[0]
        total = torch.stack([sums[:, :, sequence_of == index].sum(2) for index in range(last)], 2)
        total = total if initial is None else total + initial.transpose(0, 1)[None]
    return total[..., :-1].contiguous(), total[..., -1].contiguous()


ANY = Conditions()


def run(kernels, sample, do, piece_length, conditions=ANY):
    """(o, inverse or None) and the gradients by name."""
    guarded, tensors, options = Guarded(poison=conditions.seed), sample.tensors, sample.options
    fill = lambda x: guarded.empty(x.shape, x.dtype).copy_(x)  # noqa: E731
    q, k, v, do = (guarded.copy(x) for x in (*(tensors[name] for name in "qkv"), do))
    feature_map, normalize = options.get("feature_map", "elu"), options.get("normalize", True)
    initial, packed = tensors.get("initial_state"), "cu_seqlens" in options
    heads, width = k.shape[1], k.shape[3]

    def sizes(tokens):
        """What depends on the number of tokens, the places of pieces and the sequences of all but the empty one."""
        pieces = pieces_of(sample, piece_length, tokens)
        count = pieces.shape[1] if packed else pieces.shape[1] - 1
        numbers = dict(
            batches=q.shape[0], heads=q.shape[1], kv_heads=heads, num_tokens=tokens, width=width, num_pieces=count,
            piece_length=piece_length, num_states=options["cu_seqlens"].numel() - 1 if packed else 1,
        )
        partials = dict(
            partials=guarded.empty((q.shape[0], heads, count, width, width), torch.float32),
            partial_norms=guarded.empty((q.shape[0], heads, count, width), torch.float32),
        )
        return numbers, partials, {"pieces": fill(pieces)} if packed else {}, pieces[2, :-1] if packed else None

    def state_of(partials, sequence_of, initial):
        filled = [x[:, :, : len(sequence_of)] if packed else x for x in partials.values()]
        found = combine(*filled, sequence_of, initial)
        assert not any(x.isnan().any() for x in found)
        return {name: fill(x) for name, x in zip(("states", "norms"), found, strict=True)}

    inputs = dict(q=q, k=k, v=v, grad_o=do)
    saved = dict(o=guarded.empty(q.shape, q.dtype), inverse=guarded.empty(q.shape[:3], torch.float32) if normalize else None)
    gradients = {name: guarded.empty(inputs[name].shape, q.dtype) for name in "qkv"}
    everything = inputs | saved | {f"d{name}": gradient for name, gradient in gradients.items()}

    def call(name, given, numbers, **rest):
        launch(kernels[f"linear_bidirectional_{name}"], feature_map, everything | given, conditions, **numbers, **rest)

    of_keys, key_partials, key_pieces, key_sequences = sizes(k.shape[2])
    of_queries, query_partials, query_pieces, query_sequences = sizes(q.shape[2])
    call("sums", key_partials | key_pieces, of_keys)
    state = state_of(key_partials, key_sequences, initial)
    call("read", state | query_pieces, of_queries, eps=options.get("eps", 1e-6))
    call("grad_queries", state | query_partials | query_pieces, of_queries)
    grad_state = state_of(query_partials, query_sequences, None if initial is None else torch.zeros_like(initial))
    call("grad_keys", grad_state | key_pieces, of_keys)
    guarded.assert_intact()
    if initial is not None:
        whole = torch.cat((grad_state["states"], grad_state["norms"][..., None]), -1)
        gradients["initial_state"] = whole[0].transpose(0, 1) if packed else whole[:, :, 0]
    return tuple(saved.values()), gradients


def make(width=64, heads=(1, 1), length=200, keys=None, batch=1, state=False, **options):
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32)
    shapes = (("q", heads[0], length, 0.5), ("k", heads[1], keys or length, 0.5), ("v", heads[1], keys or length, 1))
    tensors = {
        name: randn(batch, count, rows, width, dtype=torch.bfloat16, seed=seed, device="cpu") * factor
        for seed, (name, count, rows, factor) in enumerate(shapes)
    }
    tensors["v"] += 1  # their mean, o, would be small
    if state:
        sequences = options["cu_seqlens"].numel() - 1 if "cu_seqlens" in options else batch
        tensors["initial_state"] = random_state((sequences, heads[1], width, width + 1), torch.bfloat16, device="cpu")
    return Sample(tensors, options)


SAMPLES = {
    "one chunk": (dict(length=50), 256),
    "whole chunks": (dict(length=512), 256),
    "128 wide": (dict(width=128, length=300), 256),
    "a last piece of one token": (dict(length=257, feature_map="exp"), 256),
    "a last chunk of one token, 128 wide": (dict(width=128, length=385, feature_map="exp"), 512),
    "heads share keys, pieces": (dict(heads=(3, 1), batch=2, length=300, feature_map="relu", eps=0.5), 128),
    "heads share keys, 128 wide": (dict(width=128, heads=(4, 2), length=200, feature_map="softplus"), 256),
    "more keys": (dict(heads=(2, 2), length=70, keys=300, feature_map="softplus"), 128),
    "more queries": (dict(length=300, keys=33), 128),
    "not normalised": (dict(heads=(2, 2), length=300, normalize=False, feature_map="identity"), 256),
    "a state comes in": (dict(length=300, batch=2, state=True, feature_map="softplus"), 256),
    "packed": (dict(cu_seqlens=[0, 5, 200, 201, 520], length=520), 256),
    "packed, states, 128 wide": (dict(width=128, heads=(2, 1), cu_seqlens=[0, 70, 70, 300], length=300, state=True), 128),
    "packed, not normalised": (dict(cu_seqlens=[0, 150, 300], length=300, normalize=False), 128),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_against_the_oracle(name, kernels):
    """Whatever the order of the lanes and the time at which copies land."""
    options, piece_length = SAMPLES[name]
    sample = make(**options)
    do = like(sample.tensors["q"]) + 1  # so that dO . o is not small, and does not cancel in sums over queries
    saved, gradients = run(kernels, sample, do, piece_length)
    check(sample, do, saved[0], gradients)
    again, gradients_again = run(kernels, sample, do, piece_length, Conditions(late_copies=True, seed=1))
    for first, second in zip((*saved, *gradients.values()), (*again, *gradients_again.values()), strict=True):
        assert first is None or torch.equal(first, second)


@pytest.mark.parametrize("width", [64, 128])
def test_norms_are_as_exact_as_float32(width, kernels):
    """Norms are operands as two numbers; weights of rows beyond the last one are not among them."""
    sample = make(width=width, length=333)
    (_, inverse), _ = run(kernels, sample, like(sample.tensors["q"]), 128)
    (x,), (y,) = features({name: tensor.float() for name, tensor in sample.tensors.items()}, sample.options)
    weights = x.bfloat16().double() @ y.bfloat16().double().mT
    torch.testing.assert_close(inverse.double(), 1 / (weights.sum(-1) + 1e-6), rtol=3e-5, atol=0)


OPTIONS = {
    "elu": dict(batch=2, length=300),
    "not normalised, relu": dict(batch=2, length=150, normalize=False, feature_map="relu"),
    "more keys, states": dict(length=150, keys=300, state=True, return_state=True),
    "packed, states": dict(length=300, state=True, return_state=True, cu_seqlens=[0, 0, 7, 270, 300]),
}


@pytest.mark.parametrize("layout", ["tokens before heads", "off by eight bytes"])
@pytest.mark.parametrize("name", OPTIONS)
def test_through_the_operator(name, layout, kernels, monkeypatch):
    """Arguments arrive where they belong, forward and backward, and what does not start at 16 bytes is copied."""
    monkeypatch.setattr(_cuda, "extension", Extension(kernels))
    monkeypatch.setattr(_cuda, "stream_of", lambda tensor: 0)
    sample = make(heads=(4, 2), **OPTIONS[name])
    change = {**LAYOUTS, **MISALIGNED}[layout]
    tensors = {name: (change(x) if name in "qkv" else x).requires_grad_() for name, x in sample.tensors.items()}
    assert layout in LAYOUTS or tensors["q"].data_ptr() % 16
    outputs = torch.ops.nearfar.hadamard_attention(*op_arguments(Sample(tensors, sample.options), "cuda"))
    outputs = outputs[:2] if sample.options.get("return_state") else outputs[:1]
    do = tuple(like(x.detach()) for x in outputs)
    upstream = GRADIENTS["width before rows"](do[0]), *do[1:]
    gradients = torch.autograd.grad(outputs, list(tensors.values()), upstream)
    given = (do, tuple(x.detach() for x in outputs)) if len(do) > 1 else (do[0], outputs[0].detach())
    check(sample, *given, dict(zip(tensors, gradients, strict=True)))
