"""nearfar.nn: each layer equals its operator composed by hand, keeps its locality and is a good torch citizen."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import assert_accurate
from torch import nn
from torch.testing import assert_close

import nearfar as nf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, HEADS = 64, 4


def krause(**options):
    torch.manual_seed(0)
    options = {"locality": nf.SlidingWindow(7, 0), "top_k": 4, **options}
    return nf.nn.KrauseAttention(DIM, HEADS, **options).to(DEVICE)


def tokens(batch=2, length=37):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "head_dim": 24, "bias": True}])
def test_equals_the_operator_composed_by_hand(options):
    layer, x = krause(**options), tokens()

    def heads(proj):
        y = x @ proj.weight.T + (0 if proj.bias is None else proj.bias)
        return y.reshape(2, 37, -1, options.get("head_dim", DIM // HEADS)).permute(0, 2, 1, 3).contiguous()

    q, k, v = heads(layer.q_proj), heads(layer.k_proj), heads(layer.v_proj)
    o = nf.krause_attention(q, k, v, torch.full((HEADS,), 2.5, device=DEVICE), nf.SlidingWindow(7, 0), top_k=4)
    assert_close(layer(x), layer.out_proj(o.permute(0, 2, 1, 3).reshape(2, 37, -1)))


def test_kernels_serve_the_layer_as_the_reference_does():
    results = []
    for backend in ("reference", "triton"):
        layer = krause(top_k=None, backend=backend)
        y = layer(tokens())
        results.append((y, *torch.autograd.grad(y.square().sum(), layer.parameters())))
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_projections_reach_the_operator_as_views(monkeypatch):
    seen = []

    def record(q, k, v, *arguments, **keywords):
        seen.extend((q, k, v))
        return nf.krause_attention(q, k, v, *arguments, **keywords)

    monkeypatch.setattr(nf.nn.krause, "krause_attention", record)
    krause()(tokens())
    assert len(seen) == 3
    for tensor in seen:
        assert tensor.shape == (2, HEADS, 37, DIM // HEADS)
        assert tensor.transpose(1, 2).is_contiguous()


def test_gradients_reach_every_parameter():
    layer = krause(bias=True)
    layer(tokens()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_of_log_sigma_is_the_slope_of_the_loss():
    layer, x = krause(top_k=None).double(), tokens().double()
    layer.backend = "reference"

    def loss(shift):
        with torch.no_grad():
            layer.log_sigma[1] += shift
            value = layer(x).square().sum().item()
            layer.log_sigma[1] -= shift
        return value

    layer(x).square().sum().backward()
    assert layer.log_sigma.grad[1].item() == pytest.approx((loss(1e-4) - loss(-1e-4)) / 2e-4, rel=1e-5)


def test_causal_window_sees_itself_and_seven_tokens_before():
    layer, x = krause(), tokens()
    changed = x.clone()
    changed[:, 20] += 10
    difference = (layer(changed) - layer(x)).abs().amax((0, 2))
    assert difference[:20].max() == 0
    assert difference[20] > 0
    assert difference[28:].max() == 0


def test_packed_sequences_equal_separate_ones():
    layer, x = krause(), tokens(batch=1)
    ends = torch.tensor([0, 12, 12, 37], dtype=torch.int32, device=DEVICE)
    assert_close(layer(x, cu_seqlens=ends), torch.cat((layer(x[:, :12]), layer(x[:, 12:])), 1))


def test_sigma_starts_at_its_initial_value_and_stays_positive():
    layer = krause(sigma_init=4.5)
    assert layer.log_sigma.shape == (HEADS,) and layer.log_sigma.dtype == torch.float32
    assert_close(layer.log_sigma.exp(), torch.full((HEADS,), 4.5, device=DEVICE))
    with torch.no_grad():
        layer.log_sigma.fill_(-3.0)
    assert layer(tokens()).isfinite().all()


def test_autocast_runs_in_its_dtype_and_keeps_sigma_float32():
    layer, x = krause(top_k=None), tokens()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.log_sigma.grad.dtype == torch.float32
    assert_close(y.float(), layer(x), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "locality": None, "top_k": None}])
def test_compiles_to_one_graph(options):
    torch._dynamo.reset()  # all layers share one forward, and a function is compiled for few kinds of calls
    layer, x = krause(**options), tokens()
    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected, y = layer(x), compiled(x)
    assert_close(y, expected)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), layer.log_sigma)
    (grad,) = torch.autograd.grad(y.square().sum(), layer.log_sigma)
    assert_close(grad, expected_grad)


def test_state_dict_round_trip():
    layer, x = krause(num_kv_heads=2, sigma_init=1.0), tokens()
    other = krause(num_kv_heads=2)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {
        "log_sigma", "q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"
    }


def test_extra_repr_shows_what_was_asked_for():
    text = repr(krause(num_kv_heads=2))
    for part in ("num_heads=4", "num_kv_heads=2", "head_dim=16", "SlidingWindow(left=7, right=0)", "top_k=4"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((65, 4), {}, "dim"),
        ((64, 0), {}, "num_heads"),
        ((64, 4), {"num_kv_heads": 3}, "num_kv_heads"),
        ((64, 4), {"num_kv_heads": 0}, "num_kv_heads"),
        ((64, 4), {"head_dim": 0}, "head_dim"),
        ((64, 4), {"sigma_init": 0.0}, "sigma_init"),
        ((64, 4), {"sigma_init": math.nan}, "sigma_init"),
        ((64, 4), {"causal": True, "locality": nf.SlidingWindow(3, 1)}, "causal"),
        ((64, 4), {"causal": True, "locality": nf.GridNeighborhood((2, 2), 1)}, "causal"),
    ],
)
def test_bad_arguments_raise_and_are_named(arguments, options, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        nf.nn.KrauseAttention(*arguments, **options)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "head_dim": 24, "bias": True, "top_k": None}])
def test_krause_decodes_in_pieces_what_the_forward_computes(options, backend):
    layer, x = krause(backend=backend, **options), tokens()[:, :19]  # more than two rounds of 8 slots
    splits = [(3, 1, 8, 1, 6)] if backend == "triton" else [(1,) * 19, (3, 1, 8, 1, 6), (19,)]
    for sizes in splits:
        cache = layer.init_cache(2)
        assert cache.k.shape[1:] == (layer.num_kv_heads, 8, layer.head_dim)
        addresses = [part.data_ptr() for part in cache]
        y = torch.cat([layer(part, cache=cache) for part in x.split(sizes, 1)], 1)
        assert_close(y, layer(x), atol=1e-5, rtol=1e-4)
        assert not y.requires_grad
        assert [part.data_ptr() for part in cache] == addresses and cache.length.tolist() == [19, 19]


def test_krause_sequences_of_a_cache_have_lengths_of_their_own():
    """Slots that were never filled hold NaN, and nothing of it shows."""
    layer, x = krause(num_kv_heads=2), tokens()
    alone = [layer.init_cache(1), layer.init_cache(1)]
    for row, (cache, length) in enumerate(zip(alone, (3, 12), strict=True)):
        cache.k.fill_(math.nan), cache.v.fill_(math.nan)
        layer(x[row : row + 1, :length], cache=cache)
    cache = nf.KrauseCache(*(torch.cat(parts) for parts in zip(*alone, strict=True)))
    for begin, end in ((0, 4), (4, 5), (5, 14)):
        y = layer(torch.stack((x[0, 3 + begin : 3 + end], x[1, 12 + begin : 12 + end])), cache=cache)
        for row, length in enumerate((3, 12)):
            expected = layer(x[row : row + 1, : length + end])[0, length + begin :]
            assert_close(y[row], expected, atol=1e-5, rtol=1e-4)
    assert cache.length.tolist() == [17, 26]


def test_krause_decodes_in_the_autocast_dtype():
    layer, x = krause(top_k=None), tokens()[:, :19]
    with torch.autocast(DEVICE, torch.bfloat16):
        cache = layer.init_cache(2)
        y = torch.cat([layer(part, cache=cache) for part in x.split((4, *(1,) * 15), 1)], 1)
    assert y.dtype == cache.k.dtype == cache.v.dtype == torch.bfloat16
    assert_close(y.float(), layer(x), atol=2e-2, rtol=2e-2)


def test_krause_without_a_limit_on_the_left_keeps_every_key():
    layer, x = krause(locality=None, causal=True), tokens()[:, :19]
    assert layer.locality == nf.SlidingWindow(-1)
    cache = layer.init_cache(2, 19)
    y = torch.cat([layer(part, cache=cache) for part in x.split((6, 1, 12), 1)], 1)
    assert_close(y, layer(x), atol=1e-5, rtol=1e-4)
    assert cache.length == 19


@pytest.mark.parametrize("locality", [None, nf.SlidingWindow(7, 1), nf.GridNeighborhood((6, 6), 1, global_tokens=1)], ids=str)
def test_krause_decodes_only_where_it_is_causal(locality):
    layer, x = krause(locality=locality), tokens()
    cache = krause().init_cache(2)
    for call in (lambda: layer.init_cache(2), lambda: layer(x[:, :1], cache=cache)):
        with pytest.raises(ValueError, match="a cache needs a causal layer, and this KrauseAttention has causal=False"):
            call()


def test_bad_caches_of_a_krause_layer_raise_and_are_named():
    layer, x = krause(), tokens()
    cache = layer.init_cache(2)
    with pytest.raises(ValueError, match="cache must have a slot for each of 8 keys, got 5"):
        layer(x[:, :1], cache=krause(locality=nf.SlidingWindow(4)).init_cache(2))
    for length in (1, 2):
        with pytest.raises(ValueError, match=r"\bcache.k\b"):
            layer(x[:1, :length], cache=cache)
    assert cache.length.tolist() == [0, 0] and cache.k.abs().max() == 0


@pytest.mark.parametrize(
    "locality",
    [
        nf.GridNeighborhood((6, 6), 1, global_tokens=1),
        nf.GridNeighborhood((3, 4, 3), (0, 1, 1), global_tokens=1),
        nf.ShiftedWindow((6, 6), 3, 1),
    ],
    ids=str,
)
def test_krause_layers_on_grids_see_their_locality(locality):
    layer, x = krause(locality=locality, top_k=None, backend="reference"), tokens()[:, : locality.num_tokens]
    changed = x.clone()
    changed[:, 20] += 10
    difference = (layer(changed) - layer(x)).abs().amax((0, 2))
    seen = locality.visible(torch.arange(x.shape[1]), torch.tensor(20)).to(DEVICE)
    assert (difference > 0).tolist() == seen.tolist()
    with pytest.raises(ValueError, match="neither cu_seqlens nor key_padding_mask"):
        layer(x, key_padding_mask=torch.zeros(x.shape[:2], dtype=torch.bool, device=DEVICE))


def test_krause_learns_a_table_of_relative_positions():
    locality = nf.ShiftedWindow((6, 6), 3, 1)
    layer, x = krause(locality=locality, top_k=None, position_bias=True), tokens(length=36)
    assert layer.position_table.shape == (HEADS, 25) and layer.position_table.abs().max() == 0
    with torch.no_grad():
        layer.position_table.copy_(torch.randn(HEADS, 25, generator=torch.Generator().manual_seed(2)))
    q, k, v = layer.split_heads(x)
    o = nf.krause_attention(q, k, v, 2.5, locality, bias=layer.position_table)
    assert_close(layer(x), layer.merge_heads(o))
    layer(x).square().sum().backward()
    assert layer.position_table.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"^position_bias is a table of a ShiftedWindow"):
        krause(position_bias=True)


def test_one_sigma_for_a_layer_equals_the_same_for_each_head():
    layer, heads, x = krause(sigma_per_head=False, top_k=None), krause(top_k=None), tokens()
    assert layer.log_sigma.shape == (1,) and layer.per_head == ("position_table",)
    assert_close(layer(x), heads(x))
    for each in (layer, heads):
        each(x).square().sum().backward()
    assert_close(layer.log_sigma.grad[0], heads.log_sigma.grad.sum())


def test_top_k_schedules_go_from_first_to_last():
    assert nf.nn.top_k_schedule(12, 8, 16) == [8, 9, 9, 10, 11, 12, 12, 13, 14, 15, 15, 16]
    assert nf.nn.top_k_schedule(3, 16, 8) == [16, 12, 8] and nf.nn.top_k_schedule(1, 8, 16) == [8]
    with pytest.raises(ValueError, match=r"^depth must be at least 1, got 0"):
        nf.nn.top_k_schedule(0, 8, 16)


# A Krause branch beside softmax attention -----------------------------------------------------------------------------------


def gated(**options):
    torch.manual_seed(0)
    options = {"causal": True, "locality": nf.SlidingWindow(7), "top_k": 4, "sigma_init": 1.0, **options}
    return nf.nn.KrauseGatedAttention(DIM, HEADS, **options).to(DEVICE)


def test_gated_attention_mixes_its_branches_token_by_token():
    layer, x = gated(num_kv_heads=2), tokens()
    with torch.no_grad():
        layer.gate_proj.weight *= 100
    softmax, krause = layer.softmax(x), layer.krause(x)
    q, k, v = layer.softmax.split_heads(x)
    k, v = (part.repeat_interleave(2, 1) for part in (k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(softmax, layer.softmax.merge_heads(o))
    logits = torch.cat((softmax, krause), -1) @ layer.gate_proj.weight.T + layer.gate_proj.bias
    share = torch.sigmoid(logits[..., 0] - logits[..., 1])[..., None]
    assert share.min() < 0.7 and share.max() > 0.85
    assert_close(layer(x), share * softmax + (1 - share) * krause)


def test_gated_attention_starts_in_favour_of_softmax_attention():
    layer, x = gated(), tokens()
    assert_close(layer.gate_proj.bias.softmax(0), torch.tensor([0.8, 0.2], device=DEVICE))
    assert 0.008 < layer.gate_proj.weight.std() < 0.012
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
    assert_close(layer(x), 0.8 * layer.softmax(x) + 0.2 * layer.krause(x))
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_branches_of_gated_attention_are_both_causal_or_neither():
    with pytest.raises(ValueError, match=r"^causal=False, and SlidingWindow\(left=7, right=0\) is causal"):
        gated(causal=False)
    with pytest.raises(ValueError, match="causal sees no key after the query"):
        gated(locality=nf.SlidingWindow(7, 1))
    layer = gated(causal=False, locality=nf.SlidingWindow(7, 7))
    assert not (layer.causal or layer.softmax.causal or layer.krause.causal)


# Linear and Hadamard attention ---------------------------------------------------------------------------------------------


FAR = pytest.mark.parametrize("kind", [nf.nn.LinearAttention, nf.nn.HadamardAttention])


def far(kind, **options):
    torch.manual_seed(0)
    return kind(DIM, HEADS, **options).to(DEVICE)


def far_by_formula(layer, x):
    """The layer with the whole matrix of weights, and one projection matrix for each head and factor."""
    weights = layer.state_dict()

    def project(name, heads, *widths):
        matrices = weights[f"{name}.weight"].split(list(widths) * heads)
        biases = weights.get(f"{name}.bias", torch.zeros(heads * sum(widths))).to(x).split(list(widths) * heads)
        projected = [x @ matrix.T + bias for matrix, bias in zip(matrices, biases, strict=True)]
        return [projected[head * len(widths) : (head + 1) * len(widths)] for head in range(heads)]

    widths = getattr(layer, "factor_widths", (layer.head_dim,))
    q, k = project("q_proj", layer.num_heads, *widths), project("k_proj", layer.num_kv_heads, *widths)
    v = project("v_proj", layer.num_kv_heads, layer.value_dim)
    phi, outputs = (lambda y: torch.nn.functional.elu(y) + 1), []
    for head in range(layer.num_heads):
        shared = head * layer.num_kv_heads // layer.num_heads
        matrix = math.prod(phi(a) @ phi(b).mT for a, b in zip(q[head], k[shared], strict=True))
        if layer.causal:
            matrix = matrix.tril()
        if layer.normalize:
            matrix = matrix / (matrix.sum(-1, keepdim=True) + 1e-6)
        outputs.append(matrix @ v[shared][0])
    return torch.cat(outputs, -1) @ weights["out_proj.weight"].T + weights.get("out_proj.bias", 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nf.nn.LinearAttention, {}),
        (nf.nn.LinearAttention, {"num_kv_heads": 2, "head_dim": 8, "value_dim": 24, "bias": True}),
        (nf.nn.HadamardAttention, {"normalize": False}),
        (nf.nn.HadamardAttention, {"factor_widths": (8, 24), "num_kv_heads": 1, "value_dim": 24, "bias": True}),
        (nf.nn.HadamardAttention, {"factor_widths": [8, 8, 8]}),
    ],
)
def test_far_layers_equal_their_formula(kind, options, causal):
    layer, x = far(kind, causal=causal, backend="reference", **options).double(), tokens().double()
    assert_close(layer(x), far_by_formula(layer, x))


@pytest.mark.parametrize("causal", [False, True])
@FAR
def test_kernels_serve_the_far_layers_as_the_reference_does(kind, causal):
    def results(backend, dtype=torch.float32):
        layer = far(kind, causal=causal, num_kv_heads=2, backend=backend).to(dtype)
        y = layer(tokens().to(dtype))
        gradients = torch.autograd.grad(y.square().sum(), layer.parameters())
        return {"y": y, **dict(zip(dict(layer.named_parameters()), gradients, strict=True))}

    exact, plain = results("reference", torch.float64), results("reference")
    for name, got in results("triton").items():
        assert_accurate(name, got, exact[name], plain[name], exact[name], torch.float32)


@FAR
def test_far_projections_reach_the_operator_as_views(kind, monkeypatch):
    layer, seen = far(kind), []

    def record(q, k, v, **options):
        seen.extend((*q, *k, v) if isinstance(q, tuple) else (q, k, v))
        return operator(q, k, v, **options)

    operator = kind.operator
    monkeypatch.setattr(kind, "operator", staticmethod(record))
    layer(tokens())
    assert [tensor.shape[-1] for tensor in seen] == [16] * len(seen)
    for tensor in seen:
        assert tensor.stride() == (37 * tensor.stride(2), tensor.stride(2) // HEADS, tensor.stride(2), 1)


@FAR
def test_gradients_reach_every_parameter_of_the_far_layers(kind):
    layer = far(kind, bias=True, causal=True)
    layer(tokens()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@FAR
def test_far_causal_layers_see_every_earlier_token_and_no_later_one(kind):
    layer, x = far(kind, causal=True), tokens()
    changed = x.clone()
    changed[:, 20] += 10
    difference = (layer(changed) - layer(x)).abs().amax((0, 2))
    assert difference[:20].max() == 0
    assert difference[20:].min() > 0


@pytest.mark.parametrize("causal", [False, True])
@FAR
def test_far_layers_keep_packed_sequences_apart(kind, causal):
    layer, x = far(kind, causal=causal), tokens(batch=1)
    ends = torch.tensor([0, 12, 12, 37], dtype=torch.int32, device=DEVICE)
    assert_close(layer(x, cu_seqlens=ends), torch.cat((layer(x[:, :12]), layer(x[:, 12:])), 1))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "value_dim": 24, "normalize": False}])
@FAR
def test_decoding_in_pieces_equals_the_parallel_forward(kind, options, backend):
    layer, x = far(kind, causal=True, backend=backend, **options), tokens()[:, :13]
    expected, state = layer(x), layer.init_cache(2)
    scale = expected.abs().max().item()  # sums of weights, unless they are divided by their total
    address = state.data_ptr()
    y = torch.cat([layer(part, cache=state) for part in x.split((4, *(1,) * 6, 3), 1)], 1)
    assert_close(y, expected, atol=1e-5 * scale, rtol=0)
    whole = layer.init_cache(2)
    layer(x, cache=whole)
    assert_close(state, whole, atol=1e-5, rtol=1e-4)
    assert state.data_ptr() == address and state.dtype == torch.float32
    assert not y.requires_grad


def test_a_module_as_feature_map_is_learned_and_decodes():
    features = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Softplus())
    layer, x = far(nf.nn.LinearAttention, causal=True, feature_map=features), tokens()[:, :9]
    expected = layer(x)
    state = layer.init_cache(2)
    assert state.shape == (2, HEADS, 24, 17)
    assert_close(torch.cat([layer(part, cache=state) for part in x.split((1, 1, 5, 2), 1)], 1), expected)
    expected.square().sum().backward()
    assert layer.get_parameter("feature_map.0.weight").grad.abs().max() > 0


@FAR
def test_far_layers_run_in_the_autocast_dtype_with_float32_states(kind):
    layer, x = far(kind, causal=True), tokens()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, state = layer(x), layer.init_cache(2)
        first = layer(x[:, :1], cache=state)
    assert y.dtype == first.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert_close(y.float(), layer(x), atol=2e-2, rtol=2e-2)
    assert_close(first.float(), y[:, :1].float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("backend", "dtype"), [("triton", torch.float32), ("reference", torch.float64)])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "causal": True}])
@FAR
def test_far_layers_compile_to_one_graph(kind, options, backend, dtype):
    torch._dynamo.reset()  # all layers share one forward, and a function is compiled for few kinds of calls
    layer, x = far(kind, backend=backend, **options).to(dtype), tokens(batch=1, length=9).to(dtype)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (layer, compiled):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), layer.parameters())))
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected)


@FAR
def test_state_dict_round_trip_of_the_far_layers(kind):
    layer, x = far(kind, num_kv_heads=2), tokens()
    torch.manual_seed(1)
    other = kind(DIM, HEADS, num_kv_heads=2).to(DEVICE)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"}


def test_extra_repr_of_the_far_layers_shows_what_was_asked_for():
    linear = repr(far(nf.nn.LinearAttention, num_kv_heads=2, head_dim=24, feature_map="relu", causal=True))
    hadamard = repr(far(nf.nn.HadamardAttention, factor_widths=(8, 24), value_dim=32, normalize=False))
    for part in ("num_heads=4", "num_kv_heads=2", "head_dim=24", "value_dim=16", "feature_map='relu'", "causal=True"):
        assert part in linear
    for part in ("factor_widths=(8, 24)", "value_dim=32", "causal=False", "normalize=False"):
        assert part in hadamard


@pytest.mark.parametrize(
    ("kind", "arguments", "options", "name"),
    [
        (nf.nn.LinearAttention, (65, 4), {}, "dim"),
        (nf.nn.LinearAttention, (65, 4), {"head_dim": 16}, "value_dim"),
        (nf.nn.LinearAttention, (64, 0), {}, "num_heads"),
        (nf.nn.LinearAttention, (64, 4), {"num_kv_heads": 3}, "num_kv_heads"),
        (nf.nn.LinearAttention, (64, 4), {"head_dim": 0}, "head_dim"),
        (nf.nn.LinearAttention, (64, 4), {"value_dim": 0}, "value_dim"),
        (nf.nn.HadamardAttention, (64, 4), {"factor_widths": ()}, "factor_widths"),
        (nf.nn.HadamardAttention, (64, 4), {"factor_widths": (16, 0)}, "factor_widths"),
        (nf.nn.HadamardAttention, (65, 4), {}, "value_dim"),
        (nf.nn.HadamardAttention, (64, 4), {"factor_widths": (8, 8), "head_dim": 24}, "head_dim"),
    ],
)
def test_bad_arguments_of_the_far_layers_raise_and_are_named(kind, arguments, options, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        kind(*arguments, **options)


@FAR
def test_bad_calls_of_the_far_layers_raise_and_are_named(kind):
    layer, x = far(kind, causal=True), tokens()
    state = layer.init_cache(2)
    with pytest.raises(ValueError, match=r"\binitial_state\b"):
        layer(x, cache=state[:1])
    with pytest.raises(TypeError, match=r"\bstate\b"):
        layer(x[:, :1], cache=state.double())
    with pytest.raises(ValueError, match=r"\bfeature_map\b"):
        far(kind, feature_map="tanh")(x)
    assert state.abs().max() == 0


def test_head_dim_of_hadamard_attention_makes_two_factors():
    assert far(nf.nn.HadamardAttention, head_dim=48).factor_widths == (24, 24)
    assert far(nf.nn.HadamardAttention).factor_widths == (16, 16)


# Affine-scaled attention ---------------------------------------------------------------------------------------------------


def affine(**options):
    torch.manual_seed(0)
    layer = nf.nn.AffineScaledAttention(DIM, HEADS, **{"causal": True, **options})
    with torch.no_grad():
        layer.alpha_proj.weight *= 10  # until some of clip's values are at its ends
        if layer.sink is not None:
            layer.sink.copy_(torch.linspace(-1, 1, HEADS))
    return layer.to(DEVICE)


def trained_affine(**options):
    """In eval, with an average that is not 0."""
    layer = affine(**options)
    layer(tokens())
    return layer.eval()


def angles(length, width=DIM // HEADS):
    """(cos, sin) of rotary positions, each (length, width)."""
    return nf.nn.rotary(length, width, base=100.0, device=DEVICE)


def affine_by_formula(layer, x, average, rotary=None):
    """The layer with the whole matrix of weights, and the alpha of each head (B, N, num_heads)."""
    weights = layer.state_dict()

    def project(name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def heads(name, turned):
        parts = project(name).unflatten(-1, (-1, layer.head_dim)).unbind(2)
        if turned and rotary is not None:  # as complex numbers
            half = layer.head_dim // 2
            turn = torch.complex(rotary[0], rotary[1])[:, :half]
            products = [torch.complex(part[..., :half], part[..., half:]) * turn for part in parts]
            parts = [torch.cat((product.real, product.imag), -1) for product in products]
        return parts

    length = x.shape[1]
    index = torch.arange(length, device=x.device)
    offset = index[:, None] - index
    left, right = layer.window_size
    visible = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        visible &= offset <= left
    if layer.causal or right >= 0:
        visible &= offset >= (0 if layer.causal else -right)
    logits = project("alpha_proj")
    alpha = torch.sigmoid(logits) if layer.phi == "sigmoid" else (0.1 * logits + 0.5).clamp(0, 1)
    beta = (average - alpha) / length
    q, k, v, outputs = heads("q_proj", True), heads("k_proj", True), heads("v_proj", False), []
    for head in range(layer.num_heads):
        shared = head * layer.num_kv_heads // layer.num_heads
        exps = (q[head] @ k[shared].mT / layer.head_dim**0.5).exp() * visible
        denominator = exps.sum(-1, keepdim=True) + (weights["sink"][head].exp() if layer.sink is not None else 0)
        matrix = alpha[..., head, None] * exps / denominator + beta[..., head, None] * visible
        outputs.append(matrix @ v[shared])
    o = torch.cat(outputs, -1)
    if layer.gate_proj is not None:
        o = o * torch.sigmoid(project("gate_proj"))
    return o @ weights["out_proj.weight"].T + weights.get("out_proj.bias", 0), alpha


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False, "phi": "sigmoid", "bias": True},
        {"num_kv_heads": 2, "head_dim": 24, "output_gate": True, "sink": True, "bias": True},
        {"num_kv_heads": 1, "window_size": (5, -1), "sink": True},
        {"causal": False, "window_size": (4, 2), "output_gate": True},
    ],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_affine_layer_equals_its_formula_in_training_and_in_eval(options, rotated):
    layer, x = affine(backend="reference", **options).double(), tokens().double()
    rotary = tuple(part.double() for part in angles(37, layer.head_dim)) if rotated else None
    average = torch.zeros(HEADS, dtype=torch.float64, device=DEVICE)
    for _ in range(3):
        _, alpha = affine_by_formula(layer, x, average, rotary)
        average = 0.9 * average + 0.1 * alpha.mean((0, 1))
        assert_close(layer(x, rotary=rotary), affine_by_formula(layer, x, average, rotary)[0])
        x = x.flip(1) + 0.1
    assert_close(layer.alpha_average, average)
    assert_close(layer.eval()(x, rotary=rotary), affine_by_formula(layer, x, average, rotary)[0])


def test_clip_reaches_both_its_ends_in_these_tests():
    alpha = affine_by_formula(affine(), tokens(), 0)[1]
    assert alpha.min() == 0 and alpha.max() == 1 and ((alpha > 0) & (alpha < 1)).float().mean() > 0.5


@pytest.mark.parametrize("phi", ["clip", "sigmoid"])
def test_average_follows_the_mean_of_alpha_and_is_frozen_in_eval(phi):
    layer, x = affine(phi=phi, momentum=0.75), tokens()
    mean = affine_by_formula(layer, x, 0)[1].mean((0, 1))
    assert layer.alpha_average.abs().max() == 0
    for _ in range(5):
        layer(x)
    assert_close(layer.alpha_average, (1 - 0.75**5) * mean)
    kept = layer.alpha_average.clone()
    layer.eval()(tokens() + 1)
    assert torch.equal(layer.alpha_average, kept)
    layer.train()(tokens()[:, :0])  # no token, no change
    assert torch.equal(layer.alpha_average, kept)
    assert not layer.alpha_average.requires_grad


def test_rows_of_an_affine_layer_sum_to_the_average():
    """Eq. 8 chooses b so: with values that are all alike, each head returns a_ma times that value."""
    layer = affine(causal=False, bias=True, backend="reference").double()
    with torch.no_grad():
        layer.v_proj.weight.zero_()
        layer.out_proj.weight.copy_(torch.eye(DIM))
        layer.out_proj.bias.zero_()
    y = layer(tokens().double()).unflatten(-1, (HEADS, -1))
    assert_close(y, (layer.alpha_average[:, None] * layer.v_proj.bias.unflatten(0, (HEADS, -1))).expand_as(y))


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "output_gate": True, "sink": True, "bias": True}])
def test_gradients_of_the_affine_layer_are_those_of_its_formula(options):
    layer, x = affine(backend="reference", **options).double(), tokens().double()
    layer(x).square().sum().backward()
    average, parameters = layer.alpha_average.clone(), dict(layer.named_parameters())
    layer.state_dict = lambda: parameters  # the formula, with parameters that take gradients
    expected = torch.autograd.grad(affine_by_formula(layer, x, average)[0].square().sum(), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        if name != "k_proj.bias":  # it shifts all logits of a row alike: no gradient without a sink, and rounding
            assert parameter.grad.abs().max() > 0, name
        assert_close(parameter.grad, gradient, msg=name)


def test_two_forwards_before_a_backward_accumulate_as_two_steps_do():
    layer, halves = affine(), tokens().split(1)
    sum(layer(half).square().sum() for half in halves).backward()
    together = [parameter.grad for parameter in layer.parameters()]
    layer = affine()
    for half in halves:
        layer(half).square().sum().backward()
    for parameter, expected in zip(layer.parameters(), together, strict=True):
        assert_close(parameter.grad, expected)


def test_kernels_serve_the_affine_layer_as_the_reference_does():
    results = []
    for backend in ("reference", "triton"):
        layer = affine(num_kv_heads=2, sink=True, output_gate=True, backend=backend)
        y = layer(tokens(), rotary=angles(37))
        results.append((y, layer.alpha_average, *torch.autograd.grad(y.square().sum(), layer.parameters())))
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_affine_layer_is_causal_bit_for_bit_in_eval():
    layer, x = trained_affine(sink=True, output_gate=True), tokens()
    changed = x.clone()
    changed[:, 20] += 10
    difference = (layer(changed) - layer(x)).abs().amax((0, 2))
    assert difference[:20].max() == 0
    assert difference[20:].min() > 0


def test_packed_sequences_of_the_affine_layer_divide_by_their_own_lengths():
    layer, x = trained_affine(sink=True), tokens(batch=1)
    ends = torch.tensor([0, 12, 12, 37], dtype=torch.int32, device=DEVICE)
    assert_close(layer(x, cu_seqlens=ends), torch.cat((layer(x[:, :12]), layer(x[:, 12:])), 1))


@pytest.mark.parametrize("options", [{}, {"sink": True, "output_gate": True}])
def test_affine_layer_compiles_to_one_graph_that_updates_the_average(options):
    torch._dynamo.reset()  # all layers share one forward, and a function is compiled for few kinds of calls
    results = []
    for compiles in (False, True):
        layer = affine(**options)
        # Partitioned as by inductor, which recomputes in the backward what is cheap, without its C++ compiler.
        function = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True) if compiles else layer
        # Both graphs live when the average changes: neither backward may read it again.
        loss = sum(function(x).square().sum() for x in (tokens(), tokens() + 1))
        gradients = torch.autograd.grad(loss, layer.parameters())
        average = layer.alpha_average.clone()
        layer.eval()
        results.append((*gradients, average, function(tokens()), layer.alpha_average))
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(results[1][-3], results[1][-1])


def test_affine_layer_runs_in_the_autocast_dtype_with_a_float32_average():
    layer, x = affine(sink=True, output_gate=True), tokens()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x, rotary=angles(37))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.alpha_average.dtype == layer.sink.grad.dtype == torch.float32
    expected = affine(sink=True, output_gate=True)
    assert_close(y.float(), expected(x, rotary=angles(37)), atol=2e-2, rtol=2e-2)
    assert_close(layer.alpha_average, expected.alpha_average, atol=1e-4, rtol=1e-3)


def test_a_half_precision_affine_layer_keeps_its_average_in_float32():
    layer, expected = affine(), affine()
    for _ in range(2):
        expected(tokens())
    layer(tokens())
    kept = layer.alpha_average.clone()
    model = torch.nn.Sequential(layer).to(torch.bfloat16)
    assert torch.equal(layer.alpha_average, kept) and layer.q_proj.weight.dtype == torch.bfloat16
    assert model(tokens().bfloat16()).dtype == torch.bfloat16
    assert_close(layer.alpha_average, expected.alpha_average, atol=1e-4, rtol=1e-3)
    assert model.double()[0].alpha_average.dtype == torch.float64


DECODING = [
    {},
    {"num_kv_heads": 2, "head_dim": 24, "output_gate": True, "bias": True, "phi": "sigmoid"},
    {"num_kv_heads": 1, "sink": True},
    {"num_kv_heads": 2, "window_size": (4, 0), "sink": True},
]


@pytest.mark.parametrize(("sizes", "backend"), [((1,) * 13, "auto"), ((6, 1, 1, 5), "auto"), ((6, 1, 1, 5), "triton")])
@pytest.mark.parametrize("options", DECODING)
def test_affine_decoding_equals_the_parallel_forward(options, sizes, backend):
    layer, x = trained_affine(backend=backend, **options), tokens()[:, :13]
    cos, sin = angles(13, layer.head_dim)
    expected = layer(x, rotary=(cos, sin))
    average, cache = layer.train().alpha_average.clone(), layer.init_cache(2, 16)
    cache.num_keys = 13
    addresses = cache.k.data_ptr(), cache.v.data_ptr(), cache.total.data_ptr()
    parts = zip(x.split(sizes, 1), cos.split(sizes), sin.split(sizes), strict=True)
    y = torch.cat([layer(part, cache=cache, rotary=rotary) for part, *rotary in parts], 1)
    assert_close(y, expected, atol=1e-5, rtol=1e-4)
    assert not y.requires_grad
    assert addresses == (cache.k.data_ptr(), cache.v.data_ptr(), cache.total.data_ptr())
    assert cache.length == 13 and cache.total.dtype == torch.float32
    assert_close(cache.total, cache.v[:, :, :13].sum(2))
    assert torch.equal(layer.alpha_average, average)


@pytest.mark.parametrize("options", DECODING)
def test_affine_decoding_divides_by_the_length_that_the_cache_is_for(options):
    """A part of a sequence gets what it gets in a forward of the whole."""
    layer, x = trained_affine(**options), tokens()[:, :13]
    cache = layer.init_cache(2, 13)
    y = torch.cat([layer(part, cache=cache) for part in x[:, :7].split((4, 1, 2), 1)], 1)
    assert cache.num_keys == 13
    assert_close(y, layer(x)[:, :7], atol=1e-5, rtol=1e-4)


def test_affine_decoding_under_autocast_keeps_a_half_cache_and_a_float32_sum():
    layer, x = trained_affine(), tokens()[:, :9]
    with torch.autocast(DEVICE, torch.bfloat16):
        cache = layer.init_cache(2, 9)
        y = torch.cat([layer(token, cache=cache) for token in x.split(1, 1)], 1)
    assert cache.k.dtype == cache.v.dtype == y.dtype == torch.bfloat16
    assert cache.total.dtype == torch.float32
    assert_close(y.float(), layer(x), atol=2e-2, rtol=2e-2)


def affine_worker(rank, store, results):
    """One of two processes: DDP, with different tokens and lengths, eager and compiled."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    layer = affine().cpu()
    model = torch.nn.parallel.DistributedDataParallel(layer)
    x = tokens().cpu()[rank : rank + 1, : 37 - 20 * rank]
    for _ in range(2):
        model(x).square().mean().backward()
    compiled = affine().cpu()
    function = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        function(x)
    torch.save((layer.alpha_average, layer.alpha_proj.weight.grad, compiled.alpha_average), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_on_the_average_of_all_their_tokens(tmp_path):
    mp.spawn(affine_worker, (tmp_path / "store", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    layer, x = affine().cpu(), tokens().cpu()
    alpha = affine_by_formula(layer, x, 0)[1]
    mean = torch.cat((alpha[0], alpha[1, :17])).mean(0)
    assert_close(first[0], (1 - 0.9**2) * mean)
    assert_close(first[2], first[0])


def test_state_dict_round_trip_of_the_affine_layer():
    layer, x = trained_affine(num_kv_heads=2, sink=True, output_gate=True), tokens()
    other = affine(num_kv_heads=2, sink=True, output_gate=True).eval()
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    projections = {f"{name}_proj.weight" for name in ("q", "k", "v", "out", "alpha", "gate")}
    assert set(layer.state_dict()) == projections | {"sink", "alpha_average"}
    assert set(affine().state_dict()) == projections - {"gate_proj.weight"} | {"alpha_average"}


def test_affine_sink_starts_at_0():
    sink = nf.nn.AffineScaledAttention(DIM, HEADS, sink=True).sink
    assert sink.shape == (HEADS,) and sink.abs().max() == 0 and sink.requires_grad


def test_extra_repr_of_the_affine_layer_shows_what_was_asked_for():
    text = repr(affine(num_kv_heads=2, window_size=(7, -1), phi="sigmoid", momentum=0.5))
    parts = "num_heads=4", "num_kv_heads=2", "head_dim=16", "causal=True", "window_size=(7, -1)", "'sigmoid'", "momentum=0.5"
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((65, 4), {}, "dim"),
        ((64, 0), {}, "num_heads"),
        ((64, 4), {"num_kv_heads": 3}, "num_kv_heads"),
        ((64, 4), {"head_dim": 0}, "head_dim"),
        ((64, 4), {"phi": "relu"}, "phi"),
        ((64, 4), {"momentum": 1.5}, "momentum"),
        ((64, 4), {"momentum": math.nan}, "momentum"),
    ],
)
def test_bad_arguments_of_the_affine_layer_raise_and_are_named(arguments, options, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        nf.nn.AffineScaledAttention(*arguments, **options)


def test_bad_calls_of_the_affine_layer_raise_are_named_and_change_nothing():
    layer, x = affine(), tokens()
    cos, sin = angles(37)
    for error, rotary in ((TypeError, cos), (ValueError, (cos[:5], sin)), (ValueError, (cos, sin[:, :8]))):
        with pytest.raises(error, match=r"\brotary\b"):
            layer(x, rotary=rotary)
    with pytest.raises(ValueError, match=r"\bhead_dim\b"):
        affine(head_dim=17)(x, rotary=angles(37, 16))
    with pytest.raises(TypeError, match=r"\bcu_seqlens\b"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 37], device=DEVICE))
    assert layer.alpha_average.abs().max() == 0
    with pytest.raises(ValueError, match="own key"):
        affine(window_size=(-2, 0))(x)
    cache = layer.init_cache(2, 4)
    with pytest.raises(ValueError, match=r"\bcache\b.*\b4\b"):
        layer(x, cache=cache)
    with pytest.raises(ValueError, match=r"\bbatch\b"):
        layer(x[:1, :1], cache=cache)
    assert cache.length == 0 and cache.v.abs().max() == cache.total.abs().max() == 0


# ---------------------------------------------------------------------------------------------------- synchronization


def oscillators(**options):
    torch.manual_seed(0)
    options = {"frequency_scale": 0.6 * (DIM // HEADS) ** -0.5, "bias": True, **options}
    return nf.nn.SynchronizationAttention(DIM, HEADS, **options).to(DEVICE)


@pytest.mark.parametrize("options", [{}, {"causal": True, "head_dim": 24}, {"top_k": 5, "bias": False}])
def test_synchronization_layer_equals_its_formula(options):
    """All pairs of tokens at once, with the paper's form of the weights."""
    layer, x = oscillators(**options, backend="reference").double(), tokens().double()

    def heads(proj):
        y = x @ proj.weight.T + (0 if proj.bias is None else proj.bias)
        return y.reshape(2, 37, HEADS, -1).permute(0, 2, 1, 3)

    waves = torch.exp(1j * heads(layer.theta_proj))
    mask = torch.ones(37, 37, device=DEVICE, dtype=torch.float64)
    if layer.causal:
        mask = mask.tril()
        r = (waves.cumsum(2) / torch.arange(1, 38, device=DEVICE)[:, None]).abs().mean(-1)
    else:
        r = waves.mean(2).abs().mean(-1)[..., None].expand(2, HEADS, 37)
    coupling, alpha = ((1 + p.exp()).log() for p in (layer.raw_coupling, layer.raw_bandwidth))
    omega = layer.frequency_scale * heads(layer.omega_proj)
    delta = (omega[:, :, :, None] - omega[:, :, None]).norm(dim=-1)
    near = (-alpha[:, None, None] * delta.square()).exp()
    ratio = delta / (coupling * r[..., None] * near)
    weight = mask * near * (1 - ratio.square()).clamp(min=0).sqrt()
    if layer.top_k is not None:
        weight = weight.where(weight >= weight.topk(layer.top_k).values[..., -1:], 0)
    o = weight @ heads(layer.v_proj) / weight.sum(-1, keepdim=True)
    assert_close(layer(x), layer.out_proj(o.permute(0, 2, 1, 3).flatten(2)), atol=1e-6, rtol=1e-6)
    locked = ((ratio <= 1) & (mask > 0)).sum((-2, -1)) - 37
    assert_close(layer.locked_share(x), locked / (mask.sum() - 37))
    assert 0.05 < layer.locked_share(x).mean() < 0.95


@pytest.mark.parametrize("causal", [False, True])
def test_kernels_serve_the_synchronization_layer_as_the_reference_does(causal):
    results = []
    for backend in ("reference", "triton"):
        layer = oscillators(causal=causal, grad_floor=0.1, backend=backend)
        y = layer(tokens())
        results.append((y, *torch.autograd.grad(y.square().sum(), layer.parameters())))
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected, atol=2e-4, rtol=2e-4)


def test_gradients_reach_every_parameter_of_the_osn_block():
    torch.manual_seed(0)
    block = nf.nn.OSNBlock(DIM, HEADS, frequency_scale=0.15).to(DEVICE)
    block(tokens()).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_osn_block_has_the_parameters_of_the_paper():
    block = nf.nn.OSNBlock(512, 8, hidden_dim=2048)
    assert sum(p.numel() for p in block.parameters()) == 3_152_393
    assert sum(p.numel() for p in nn.TransformerEncoderLayer(512, 8, 2048).parameters()) == 3_152_384
    for raw in (block.attention.raw_coupling, block.attention.raw_bandwidth):
        assert (raw == 1).all()


def test_osn_block_adds_its_branches_to_x():
    torch.manual_seed(0)
    block, x = nf.nn.OSNBlock(DIM, HEADS, hidden_dim=96).to(DEVICE), tokens()
    middle = x + block.attention(block.attention_norm(x))
    assert_close(block(x), middle + block.ffn(block.ffn_norm(middle)))
    assert block.ffn[0].out_features == 96 and nf.nn.OSNBlock(DIM, HEADS).ffn[0].out_features == 4 * DIM


def test_nothing_but_tokens_themselves_lock_at_the_scale_of_the_paper():
    """Heads of 64: the layer is linear in v of the token itself, and says so."""
    torch.manual_seed(0)
    x = torch.nn.functional.layer_norm(torch.randn(1, 64, 256), (256,)).to(DEVICE)
    paper = nf.nn.SynchronizationAttention(256, 4).to(DEVICE)
    assert paper.locked_share(x).max() == 0
    assert_close(paper(x), paper.out_proj(paper.v_proj(x)))
    paper.frequency_scale = 0.5 * 64**-0.5
    assert paper.locked_share(x).min() > 0.9


def test_synchronization_layer_is_causal_bit_for_bit():
    layer, x = oscillators(causal=True), tokens()
    other = x.clone()
    other[:, 20:] += 1
    assert torch.equal(layer(x)[:, :20], layer(other)[:, :20])
    assert not torch.equal(layer(x)[:, 20:], layer(other)[:, 20:])


def test_synchronization_layer_compiles_to_one_graph():
    torch._dynamo.reset()  # all layers share one forward, and a function is compiled for few kinds of calls
    layer, x = oscillators(causal=True), tokens()
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_synchronization_layer_runs_in_the_autocast_dtype():
    layer, x = oscillators(), tokens()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_state_dict_round_trip_of_the_synchronization_layer():
    layer, other, x = oscillators(), oscillators(), tokens()
    with torch.no_grad():
        layer.raw_coupling += 0.3
        layer.raw_bandwidth -= 0.2
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_extra_repr_of_the_synchronization_layer_shows_what_was_asked_for():
    text = repr(oscillators(causal=True, top_k=3, grad_floor=0.01))
    for part in ("num_heads=4", "head_dim=16", "causal=True", "top_k=3", "frequency_scale=0.15", "grad_floor=0.01"):
        assert part in text


def test_a_synchronization_cache_drops_no_tokens():
    layer, x = oscillators(causal=True), tokens()
    cache = layer.init_cache(2, 8)
    layer(x[:, :5], cache=cache)
    cache.length = 4
    with pytest.raises(ValueError, match=r"^cache cannot drop tokens: phases is the sum over 5, and length is 4"):
        layer(x[:, 4:5], cache=cache)


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((65, 4), {}, "dim"),
        ((64, 0), {}, "num_heads"),
        ((64, 4), {"head_dim": 0}, "head_dim"),
        ((64, 4), {"num_kv_heads": 2}, "num_kv_heads"),
        ((64, 4), {"frequency_scale": 0.0}, "frequency_scale"),
        ((64, 4), {"hidden_dim": 0}, "hidden_dim"),
    ],
)
def test_bad_arguments_of_the_osn_block_raise_and_are_named(arguments, options, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        nf.nn.OSNBlock(*arguments, **options)
