"""The CUDA kernels of bidirectional Hadamard linear attention with two factors without a GPU, in the emulation."""

import pytest
import torch
from emulated import Conditions, Extension, Guarded, Kernel, build, launch
from harness import GRADIENTS, LAYOUTS, MISALIGNED, Sample, randn
from samples.linear import MAPS, check, op_arguments, random_tensors

from nearfar import _cuda

pytestmark = pytest.mark.full

WIDTH, CHUNK = 64, 64

@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    names = "features", "accumulate", "read"
    launchers = {f"hadamard__bidirectional_{name}": [f"hadamard_bidirectional_{name}"] for name in names}
    return build(tmp_path_factory.mktemp("emulated"), **launchers)


def random(*shape, seed):
    return randn(*shape, dtype=torch.bfloat16, seed=seed, device="cpu")


def vector(guarded, *shape, seed):
    return guarded.copy(randn(*shape, dtype=torch.float32, seed=seed, device="cpu"))


def per_token(x):
    return 1.0 if x is None else x[..., None]


def rounded_features(outer, inner, feature_map, factors):
    """(B, H, N, 64) float64 each: what the kernels multiply with, before they round products."""
    phi = MAPS[feature_map]
    return (phi(outer.float()) * per_token(factors)).bfloat16().double(), phi(inner.float()).bfloat16().double()


def unpermuted(tiles):
    """Rows of tiles (.., 64, 64), as csrc/common/tile.cuh permutes them, in their order."""
    row, column = torch.arange(64)[:, None], torch.arange(64)[None, :]
    return tiles.gather(-1, ((column // 8 ^ row % 8) * 8 + column % 8).expand(tiles.shape))


def accumulated(outer, inner, y, heads):
    """sum of f y^T over tokens and over the heads of a group: (B, Hs, 64, 64, Dv), f rounded."""
    f = (outer[..., :, None] * inner[..., None, :]).bfloat16().double()
    return torch.einsum("bhnac,bhnd->bhacd", f, y.double()).unflatten(1, (heads, -1)).sum(2)


# heads of the tokens and of the state, batch, tokens, width of the values, length of a piece, feature map, with factors
ACCUMULATE = {
    "two pieces": (1, 1, 1, 200, 128, 128, "elu", False),
    "heads of a group, factors, 64 wide": (4, 2, 1, 150, 64, 256, "relu", True),
    "a chunk of one token": (1, 1, 2, 193, 128, 256, "exp", True),
    "more chunks than slots": (1, 1, 1, 640, 64, 640, "softplus", False),
    "many short spans": (2, 2, 2, 64, 64, 256, "identity", False),
}


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("name", ACCUMULATE)
def test_accumulate(name, late_copies, kernels):
    heads, state_heads, batch, tokens, width, piece_length, feature_map, with_factors = ACCUMULATE[name]
    conditions = Conditions(late_copies=late_copies, seed=int(late_copies))
    guarded = Guarded(poison=conditions.seed)
    outer, inner = (guarded.copy(random(batch, heads, tokens, WIDTH, seed=seed)) for seed in (1, 2))
    y = guarded.copy(random(batch, heads, tokens, width, seed=3))
    factors, weights = (vector(guarded, batch, heads, tokens, seed=seed) if with_factors else None for seed in (4, 5))
    chunks, pieces = -(-tokens // CHUNK), -(-tokens // piece_length)
    tiles = [guarded.empty((batch, heads, chunks, 64, 64), torch.bfloat16) for _ in range(3 if with_factors else 2)]
    given = dict(outer=outer, inner=inner, factors=factors, weights=weights)
    filled = dict(outer_tiles=tiles[0], inner_tiles=tiles[1], weighted_tiles=tiles[2] if with_factors else None)
    partials = guarded.empty((batch, state_heads, pieces, 64, 64, width), torch.float32)
    partial_norms = guarded.empty((batch, state_heads, pieces, 64, 64), torch.float32)
    sums = dict(y=y, partials=partials, partial_norms=partial_norms, counter=guarded.empty((1,), torch.int32))
    numbers = dict(
        batches=batch, heads=heads, state_heads=state_heads, num_tokens=tokens, width=width, num_pieces=pieces,
        piece_length=piece_length,
    )
    launch(kernels["hadamard_bidirectional_features"], feature_map, given | filled | sums, conditions, **numbers)

    scaled, mapped = rounded_features(outer, inner, feature_map, factors)
    weighted, _ = rounded_features(outer, inner, feature_map, weights)
    padding = chunks * CHUNK - tokens
    pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, padding)).unflatten(2, (chunks, CHUNK)).to(x.dtype)  # noqa: E731
    close = dict(rtol=2**-7, atol=1e-30)  # the exponentials of the kernels are approximate
    torch.testing.assert_close(unpermuted(tiles[0]).double(), pad(scaled).mT, **close)
    torch.testing.assert_close(unpermuted(tiles[1]).double(), pad(mapped), **close)
    if with_factors:
        torch.testing.assert_close(unpermuted(tiles[2]).double(), pad(weighted).mT, **close)

    launch(kernels["hadamard_bidirectional_accumulate"], "", given | filled | sums, conditions, **numbers)
    guarded.assert_intact()
    scaled, mapped = unpermuted(tiles[0]).mT.flatten(2, 3).double(), unpermuted(tiles[1]).flatten(2, 3).double()
    weighted = unpermuted(tiles[-1 if with_factors else 0]).mT.flatten(2, 3).double()
    for piece in range(pieces):
        span = slice(piece * piece_length, min(tokens, (piece + 1) * piece_length))
        expected = accumulated(scaled[:, :, span], mapped[:, :, span], y[:, :, span], state_heads)
        torch.testing.assert_close(partials[:, :, piece].double(), expected, rtol=1e-4, atol=1e-3)
        norms = torch.einsum("bhna,bhnc->bhac", weighted[:, :, span], mapped[:, :, span]).unflatten(1, (state_heads, -1)).sum(2)
        torch.testing.assert_close(partial_norms[:, :, piece].double(), norms, rtol=1e-4, atol=1e-3)


# heads of the rows and of the state, batch, rows, width of the values, feature map, normalised
READ = {
    "a tile": (1, 1, 1, 256, 128, "elu", True),
    "ragged, heads share a state": (2, 1, 1, 300, 128, "relu", True),
    "not normalised, 64 wide": (2, 2, 1, 130, 64, "identity", False),
    "64 wide, several spans of a block": (3, 1, 1, 520, 64, "exp", True),
    "one row": (1, 1, 2, 1, 128, "softplus", True),
}


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("name", READ)
def test_read(name, late_copies, kernels):
    heads, state_heads, batch, rows, width, feature_map, normalised = READ[name]
    conditions = Conditions(late_copies=late_copies, seed=int(late_copies))
    guarded = Guarded(poison=conditions.seed)
    outer, inner = (guarded.copy(random(batch, heads, rows, WIDTH, seed=seed)) for seed in (1, 2))
    states = guarded.empty((batch, state_heads, 4096, width), torch.bfloat16)
    states.copy_(random(*states.shape, seed=3))
    norms = guarded.empty((batch, state_heads, 4096), torch.float32)
    norms.copy_(randn(*norms.shape, dtype=torch.float32, seed=4, device="cpu").abs() + 0.1)
    out = guarded.empty((batch, rows, heads, width), torch.bfloat16).transpose(1, 2)
    inverse = guarded.empty((batch, heads, rows), torch.float32) if normalised else None
    tensors = dict(
        outer=outer, inner=inner, states=states, norms=norms, out=out, inverse=inverse,
        counter=guarded.empty((1,), torch.int32), norm_tiles=guarded.empty((batch, state_heads, 2, 64, 64), torch.bfloat16),
    )
    numbers = dict(batches=batch, heads=heads, state_heads=state_heads, num_tokens=rows, width=width, eps=0.25)
    launch(kernels["hadamard_bidirectional_read"], feature_map, tensors, conditions, **numbers)
    guarded.assert_intact()
    x1, x2 = rounded_features(outer, inner, feature_map, None)
    group = heads // state_heads
    f = (x1[..., :, None] * x2[..., None, :]).bfloat16().double().flatten(-2)
    expected = f @ states.double().repeat_interleave(group, 1)
    scale = f.abs() @ states.double().abs().repeat_interleave(group, 1)
    if normalised:
        exact = (x1[..., :, None] * x2[..., None, :]).flatten(-2)
        total = (exact @ norms.double().repeat_interleave(group, 1)[..., None])[..., 0] + 0.25
        reciprocal = 1 / total
        size = (exact.abs() @ norms.double().repeat_interleave(group, 1)[..., None])[..., 0] * reciprocal**2
        exponentials = 2**-6 if feature_map in ("elu", "exp", "softplus") else 2**-15  # roundings on the other side
        assert ((inverse.double() - reciprocal).abs() <= exponentials * size).all()
        expected, scale = expected * reciprocal[..., None], scale * size[..., None] / reciprocal.abs()[..., None]
    assert ((out.double() - expected).abs() <= 2**-6 * scale).all()
    assert (out.double() - expected).norm() <= 2**-7 * expected.norm()


def both(kernels):
    """The kernels, with that of features ahead of accumulate, as the binding launches them."""
    features, accumulate = (kernels[f"hadamard_bidirectional_{name}"] for name in ("features", "accumulate"))
    run = lambda *call: features.launch(*call) or accumulate.launch(*call)  # noqa: E731
    return kernels | {"hadamard_bidirectional_accumulate": Kernel(run, accumulate.arguments)}


@pytest.mark.parametrize(
    "options, layout",
    [({}, "tokens before heads"), ({"normalize": False, "feature_map": "relu"}, "off by eight bytes")],
    ids=str,
)
def test_through_the_operator(options, layout, kernels, monkeypatch):
    """Arguments arrive where they belong, and what does not start at 16 bytes is copied; a returned state brings states about.

    Of the backward, dv needs nothing of Triton's products, which its interpreter gets wrong in bfloat16.
    """
    constants = dict(HADAMARD_BIDIRECTIONAL_CHUNK=CHUNK, HADAMARD_BIDIRECTIONAL_WIDTH=WIDTH)
    extension = Extension(both(kernels), **constants)
    monkeypatch.setattr(_cuda, "extension", extension)
    monkeypatch.setattr(_cuda, "stream_of", lambda tensor: 0)
    tensors = random_tensors((64, 64), 64, (1, 2, 100), (1, 1, 100), torch.bfloat16, "cpu")
    sample = Sample(tensors, dict(options, return_state=True))
    change = {**LAYOUTS, **MISALIGNED}[layout]
    tensors = {name: change(x).requires_grad_() for name, x in tensors.items()}
    assert layout in LAYOUTS or tensors["q1"].data_ptr() % 16
    o, state, *_ = torch.ops.nearfar.hadamard_attention(*op_arguments(Sample(tensors, sample.options), "cuda"))
    do = GRADIENTS["width before rows"](random(*o.shape, seed=11))
    dstate = torch.zeros_like(state)
    (dv,) = torch.autograd.grad((o, state), [tensors["v"]], (do, dstate))
    assert extension.launched == [f"hadamard_bidirectional_{name}" for name in ("accumulate", "read")] * 2
    check(sample, (do, dstate), (o.detach(), state.detach()), {"v": dv}, names=["v"])
