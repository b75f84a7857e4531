"""One convention for every layer of nf.nn: constructor, call, cache, padding, positions, names."""

import inspect

import pytest
import torch
from samples.layers import DIM, HEADS, LAYERS, WINDOW
from torch import nn
from torch.testing import assert_close

import nearfar as nf

EACH = pytest.mark.parametrize("kind", LAYERS)
KINDS = [getattr(nf.nn, name) for name in nf.nn.__all__ if name.endswith("Attention")]
LENGTH = 13
WIDTHS = {"hadamard": (8, 16)}  # of rotary positions, where they are not those of one head


def made(kind, **options):
    """In eval and float64: weights near the edge of locking magnify rounding."""
    torch.manual_seed(0)
    layer = LAYERS[kind](**options).double().eval()
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if name.split(".")[-1] in ("sink", "alpha_average"):
                tensor.copy_(torch.linspace(0.1, 0.8, HEADS))
    return layer


def tokens(batch=2, length=LENGTH):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def turns(kind, positions=LENGTH):
    return nf.nn.rotary(positions, WIDTHS.get(kind, DIM // HEADS), base=100.0, dtype=torch.float64)


def part_of(rotary, which):
    return tuple(angle[..., which, :] for angle in rotary)


# Constructor and names ----------------------------------------------------------------------------------------------------

COMMON = {
    "num_kv_heads": None, "head_dim": None, "causal": False, "bias": False, "qk_norm": False, "device": None, "dtype": None
}
CALL = ["self", "x", "rotary", "key_padding_mask", "cu_seqlens", "cache"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_constructors_begin_alike_with_equal_defaults(kind):
    parameters = list(inspect.signature(kind.__init__).parameters.values())
    assert [p.name for p in parameters[:10]] == ["self", "dim", "num_heads", *COMMON]
    assert {p.name: p.default for p in parameters[3:10]} == COMMON
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[3:])
    assert not kind(DIM, HEADS).causal


@pytest.mark.parametrize("kind", [*KINDS, nf.nn.OSNBlock], ids=lambda kind: kind.__name__)
def test_calls_and_caches_have_one_signature(kind):
    parameters = list(inspect.signature(kind.forward).parameters.values())
    assert [p.name for p in parameters] == CALL
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in parameters[2:])
    parameters = list(inspect.signature(kind.init_cache).parameters.values())
    assert [p.name for p in parameters] == ["self", "batch", "max_length", "dtype", "device"]
    assert not hasattr(kind, "step")


PROJECTIONS = {f"{name}_proj.weight" for name in ("q", "k", "v", "out")}
NAMES = {
    "krause": PROJECTIONS | {"log_sigma"},
    "softmax": PROJECTIONS | {"sink"},
    "gated": {f"softmax.{name}" for name in PROJECTIONS}
    | {f"krause.{name}" for name in (*PROJECTIONS, "log_sigma")}
    | {"gate_proj.weight", "gate_proj.bias"},
    "linear": PROJECTIONS,
    "hadamard": PROJECTIONS,
    "affine": PROJECTIONS | {"alpha_proj.weight", "gate_proj.weight", "sink", "alpha_average"},
    "synchronization": {f"{name}_proj.weight" for name in ("omega", "theta", "v", "out")} | {"raw_coupling", "raw_bandwidth"},
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_a_state_dict_are_those_of_checkpoints(kind):
    layer = made(kind)
    assert set(layer.state_dict()) == NAMES[kind]
    normed = set(made(kind, qk_norm=True).state_dict()) - NAMES[kind]
    assert {name.split(".")[-2] for name in normed} <= {"q_norm", "k_norm", "omega_norm"} and normed


@EACH
def test_repr_shows_the_settings(kind):
    text = repr(made(kind, backend="reference"))
    assert "causal=True" in text and "backend='reference'" in text and "num_heads=4" in text and "qk_norm=False" in text


@EACH
def test_device_and_dtype_are_those_of_the_parameters(kind):
    layer = LAYERS[kind](device="meta", dtype=torch.bfloat16)
    for name, tensor in layer.state_dict().items():
        own = name.split(".")[-1] not in ("weight", "bias")
        inner = name.startswith("feature_map")  # a module of the caller's
        assert tensor.is_meta != inner, name
        assert tensor.dtype == (torch.float32 if own or inner else torch.bfloat16), name
    double = LAYERS[kind](dtype=torch.float64).state_dict()
    assert {x.dtype for name, x in double.items() if not name.startswith("feature_map")} == {torch.float64}


# Caches -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "bias": True}], ids=["plain", "norm"])
@EACH
def test_pieces_of_any_size_equal_the_whole(kind, options):
    layer, x, rotary = made(kind, **options), tokens(), turns(kind)
    expected = layer(x, rotary=rotary)
    for sizes in ((1,) * LENGTH, (6, 1, 1, 5), (LENGTH,)):
        cache, begin, outputs = layer.init_cache(2, LENGTH), 0, []
        for size in sizes:
            now = slice(begin, begin + size)
            outputs.append(layer(x[:, now], rotary=part_of(rotary, now), cache=cache))
            begin += size
        y = torch.cat(outputs, 1)
        assert not y.requires_grad
        assert_close(y, expected)


@EACH
def test_a_training_layer_decodes_without_a_trace(kind):
    layer, x = made(kind), tokens()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    expected = layer(x)
    y = layer.train()(x, cache=layer.init_cache(2, LENGTH))
    assert_close(y, expected)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@EACH
def test_bad_calls_with_a_cache_raise_are_named_and_change_nothing(kind):
    layer, x = made(kind), tokens()
    cache = layer.init_cache(2, 3)
    mask, ends = torch.zeros(2, LENGTH, dtype=torch.bool), torch.tensor([0, LENGTH], dtype=torch.int32)
    with pytest.raises(ValueError, match="neither key_padding_mask nor cu_seqlens"):
        layer(x, cache=cache, key_padding_mask=mask)
    with pytest.raises(ValueError, match="neither key_padding_mask nor cu_seqlens"):
        layer(x, cache=cache, cu_seqlens=ends)
    with pytest.raises(TypeError, match="^cache must be what init_cache of this .*Attention returns, a .*, got dict"):
        layer(x, cache={})
    with pytest.raises(ValueError, match="at least one token"):
        layer(x[:, :0], cache=cache)
    inner = getattr(layer, "attention", layer)
    inner.causal = False
    for call in (lambda: layer.init_cache(2, 3), lambda: layer(x, cache=cache)):
        with pytest.raises(ValueError, match=r"^a cache needs a causal layer, and this .*Attention has causal=False"):
            call()
    inner.causal = True
    fresh = torch.utils._pytree.tree_leaves(layer.init_cache(2, 3))
    assert_close(torch.utils._pytree.tree_leaves(cache), fresh)


GROWING = ["krause-all", "softmax", "gated", "affine", "synchronization", "osn"]


@pytest.mark.parametrize("kind", GROWING)
def test_caches_that_grow_have_room_for_max_length(kind):
    layer, x = made(kind), tokens()
    with pytest.raises(ValueError, match="^max_length must be given"):
        layer.init_cache(2)
    with pytest.raises(ValueError, match="^cache has room for 3 tokens, and these would make 4"):
        layer(x[:, :4], cache=layer.init_cache(2, 3))
    with pytest.raises(ValueError, match="^x must have the batch size of cache, 3, got 2"):
        layer(x[:, :4], cache=layer.init_cache(3, 9))


@pytest.mark.parametrize("kind", ["softmax", "krause-all", "affine"])
def test_a_length_set_back_drops_the_last_tokens(kind):
    layer, x = made(kind), tokens()
    cache = layer.init_cache(2, LENGTH)
    layer(tokens(length=9).flip(1), cache=cache)
    cache.length = 0
    layer(x[:, :8], cache=cache)
    layer(tokens(length=3), cache=cache)
    cache.length = 8
    assert_close(layer(x[:, 8:], cache=cache), layer(x)[:, 8:])


# Padding and packing ------------------------------------------------------------------------------------------------------


def padding(*patterns):
    """"x" for tokens, "." for padding."""
    return torch.tensor([[character == "." for character in pattern] for pattern in patterns])


MASKS = {
    "left": padding("....xxxxxxxxx", "xxxxxxxxxxxxx"),
    "right": padding("xxxxxxx......", "xxxxxxxxxxxx."),
    "both, between and all": padding(".xx..xxxxx...", "............."),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@EACH
def test_padded_sequences_equal_those_without_padding(kind, mask):
    layer, rotary = made(kind), turns(kind)
    x = tokens().requires_grad_()
    y = layer(x.masked_fill(mask[..., None], 1e3), rotary=rotary, key_padding_mask=mask)
    (gradient,) = torch.autograd.grad(y[~mask].square().sum(), x)
    for row, keep in enumerate(~mask):
        alone = x.detach()[row : row + 1, keep].requires_grad_()
        expected = layer(alone, rotary=part_of(rotary, keep))
        assert_close(y[row : row + 1, keep], expected)
        (expected,) = torch.autograd.grad(expected.square().sum(), alone)
        assert_close(gradient[row : row + 1, keep], expected)
    if kind != "osn":  # a block adds to x
        assert y[mask].abs().max() == 0
        assert gradient[mask].abs().max() == 0


@pytest.mark.parametrize("causal", [False, True])
@EACH
def test_packed_sequences_equal_separate_ones(kind, causal):
    layer = made(kind)
    if not causal:
        layer = {
            "krause": lambda: nf.nn.KrauseAttention(DIM, HEADS, locality=nf.SlidingWindow(3, 2)),
            "gated": lambda: nf.nn.KrauseGatedAttention(DIM, HEADS, top_k=3),
        }.get(kind, lambda: type(layer)(DIM, HEADS))()
        assert not getattr(layer, "attention", layer).causal
    layer, x = layer.double().eval(), tokens(batch=1)
    ends = torch.tensor([0, 5, 5, LENGTH], dtype=torch.int32)
    got = layer(x, cu_seqlens=ends)
    assert_close(got, torch.cat((layer(x[:, :5]), layer(x[:, 5:])), 1))


@EACH
def test_bad_masks_raise_and_are_named(kind):
    layer, x, mask = made(kind), tokens(), MASKS["left"]
    ends = torch.tensor([0, LENGTH], dtype=torch.int32)
    for bad, error in ((mask.long(), TypeError), ([[True]], TypeError), (mask[:1], ValueError), (mask.to("meta"), ValueError)):
        with pytest.raises(error, match=r"^key_padding_mask must"):
            layer(x, key_padding_mask=bad)
    with pytest.raises(ValueError, match="key_padding_mask or cu_seqlens, not both"):
        layer(x[:1], key_padding_mask=mask[:1], cu_seqlens=ends)
    with pytest.raises((TypeError, ValueError), match="cu_seqlens"):
        layer(x, cu_seqlens=ends)


def test_padding_of_an_affine_layer_in_training_does_not_enter_the_average():
    x, mask = tokens(), MASKS["left"]
    layers = made("affine").train(), made("affine").train()
    layers[0](x, key_padding_mask=mask)
    layers[1](x[~mask][None])
    assert_close(layers[0].alpha_average, layers[1].alpha_average)
    assert (layers[0].alpha_average - made("affine").alpha_average).abs().max() > 1e-3


# Positions ----------------------------------------------------------------------------------------------------------------


def test_rotary_turns_pairs_of_halves_by_multiples_of_the_position():
    cos, sin = nf.nn.rotary(7, 6, base=100.0, dtype=torch.float64)
    assert cos.shape == sin.shape == (7, 6) and torch.equal(cos[:, :3], cos[:, 3:])
    heads = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    got = nf.nn.positions.rotate(heads, cos, sin)
    angle = torch.arange(7)[:, None] * torch.tensor([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)], dtype=torch.float64)
    turned = torch.complex(heads[..., :3], heads[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    assert_close(got, torch.cat((turned.real, turned.imag), -1))


def test_rotary_of_positions_and_factors():
    positions = torch.tensor([[3, 4, 5], [0, 0, 9]])
    cos, sin = nf.nn.rotary(positions, (8, 16))
    assert cos.shape == (2, 1, 3, 24) and cos.dtype == torch.float32
    for columns, width in ((slice(0, 8), 8), (slice(8, 24), 16)):
        each = nf.nn.rotary(10, width)
        assert_close(cos[:, 0, :, columns], each[0][positions])
        assert_close(sin[:, 0, :, columns], each[1][positions])
    for arguments, name in (((4, 7), "width"), ((4, 0), "width"), ((positions[None], 8), "positions")):
        with pytest.raises(ValueError, match=rf"^{name} must"):
            nf.nn.rotary(*arguments)
    with pytest.raises(ValueError, match="^base must"):
        nf.nn.rotary(4, 8, base=0)


RELATIVE = [kind for kind in LAYERS if kind not in ("linear", "features", "hadamard")]  # their feature maps come after it


@pytest.mark.parametrize("kind", RELATIVE)
def test_rotary_makes_scores_of_relative_positions(kind):
    layer, x = made(kind), tokens()
    expected = layer(x, rotary=turns(kind))
    assert_close(layer(x, rotary=turns(kind, torch.arange(LENGTH) + 100)), expected)
    assert (layer(x) - expected).abs().max() > 1e-4
    for bad, error in (("cos", TypeError), (turns(kind, 5), ValueError)):
        with pytest.raises(error, match="^rotary"):
            layer(x, rotary=bad)


def test_heads_of_normalised_queries_and_keys_do_not_depend_on_the_size_of_x():
    layer, x = nf.nn.SoftmaxAttention(DIM, HEADS, qk_norm=True).double(), tokens()
    q, k, v = layer.split_heads(x)
    for name, heads in (("q_proj", q), ("k_proj", k)):
        raw = getattr(layer, name)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        assert_close(heads, raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert isinstance(layer.q_norm, nn.RMSNorm)
    assert_close(layer.split_heads(7 * x)[0], q, atol=1e-3, rtol=1e-3)
    assert_close(layer.split_heads(7 * x)[2], 7 * v)


def test_a_window_of_the_samples_is_shorter_than_their_sequences():
    assert WINDOW.left + 1 < LENGTH
