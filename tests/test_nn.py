"""nearfar.nn: each layer equals its operator composed by hand, keeps its locality and is a good torch citizen."""

import math

import pytest
import torch
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
    }  # fmt: skip


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
    ],
)
def test_bad_arguments_raise_and_are_named(arguments, options, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        nf.nn.KrauseAttention(*arguments, **options)


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
    results = []
    for backend in ("reference", "triton"):
        layer = far(kind, causal=causal, num_kv_heads=2, backend=backend)
        y, state = layer(tokens(), return_state=True)
        results.append((y, state, *torch.autograd.grad(y.square().sum() + state.sum(), layer.parameters())))
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected, atol=1e-3, rtol=1e-4)


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
def test_far_layers_keep_packed_sequences_and_their_states_apart(kind, causal):
    layer, x = far(kind, causal=causal), tokens(batch=1)
    ends = torch.tensor([0, 12, 12, 37], dtype=torch.int32, device=DEVICE)
    parts = [x[:, :12], x[:, 12:12], x[:, 12:]]
    state = torch.rand_like(layer.init_state(3))
    y, after = layer(x, cu_seqlens=ends, state=state, return_state=True)
    for index, (part, begin) in enumerate(zip(parts, (0, 12, 12), strict=True)):
        expected, expected_after = layer(part, state=state[index : index + 1], return_state=True)
        assert_close(y[:, begin : begin + part.shape[1]], expected)
        assert_close(after[index : index + 1], expected_after)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "value_dim": 24, "normalize": False}])
@FAR
def test_decoding_token_by_token_equals_the_parallel_forward(kind, options, backend):
    layer, x = far(kind, causal=True, backend=backend, **options), tokens()[:, :13]
    expected, expected_state = layer(x, return_state=True)
    scale = expected.abs().max().item()  # sums of weights, unless they are divided by their total
    state = layer.init_state(2)
    address = state.data_ptr()
    y = torch.cat([layer.step(token, state) for token in x.split(1, 1)], 1)
    assert_close(y, expected, atol=1e-5 * scale, rtol=0)
    assert_close(state, expected_state, atol=1e-5, rtol=1e-4)
    assert state.data_ptr() == address and state.dtype == torch.float32
    assert not y.requires_grad


@FAR
def test_decoding_goes_on_from_the_state_of_a_prompt(kind):
    layer, x = far(kind, causal=True), tokens()
    expected = layer(x)
    y, state = layer(x[:, :30], return_state=True)
    assert_close(y, expected[:, :30])
    state = state.detach()
    assert_close(torch.cat([layer.step(token, state) for token in x[:, 30:].split(1, 1)], 1), expected[:, 30:])


@FAR
def test_parts_chained_by_states_equal_the_whole_with_gradients(kind):
    layer, x = far(kind, causal=True, backend="reference").double(), tokens().double()

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))

    x.requires_grad_()
    whole = layer(x)
    outputs, state = [], layer.init_state(2)
    assert state.dtype == torch.float64
    for part in x.split([5, 20, 12], 1):
        y, state = layer(part, state=state, return_state=True)
        outputs.append(y)
    chained = torch.cat(outputs, 1)
    assert_close(chained, whole)
    for got, expected in zip(gradients(chained), gradients(whole), strict=True):
        assert_close(got, expected)


def test_a_module_as_feature_map_is_learned_and_decodes():
    features = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Softplus())
    layer, x = far(nf.nn.LinearAttention, causal=True, feature_map=features), tokens()[:, :9]
    expected = layer(x)
    state = layer.init_state(2)
    assert state.shape == (2, HEADS, 24, 17)
    assert_close(torch.cat([layer.step(token, state) for token in x.split(1, 1)], 1), expected)
    expected.square().sum().backward()
    assert layer.get_parameter("feature_map.0.weight").grad.abs().max() > 0


@FAR
def test_far_layers_run_in_the_autocast_dtype_with_float32_states(kind):
    layer, x = far(kind, causal=True), tokens()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, state = layer(x, return_state=True)
        decoding = layer.init_state(2)
        first = layer.step(x[:, :1], decoding)
    assert y.dtype == first.dtype == torch.bfloat16
    assert state.dtype == decoding.dtype == torch.float32
    assert_close(y.float(), layer(x), atol=2e-2, rtol=2e-2)
    assert_close(first.float(), y[:, :1].float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("backend", "dtype"), [("triton", torch.float32), ("reference", torch.float64)])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "causal": True}])
@FAR
def test_far_layers_compile_to_one_graph(kind, options, backend, dtype):
    layer, x = far(kind, backend=backend, **options).to(dtype), tokens(batch=1, length=9).to(dtype)
    state = torch.rand_like(layer.init_state(1))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (layer, compiled):
        y, after = function(x, state=state, return_state=True)
        results.append((y, after, *torch.autograd.grad(y.square().sum() + after.sum(), layer.parameters())))
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
    ],
)
def test_bad_arguments_of_the_far_layers_raise_and_are_named(kind, arguments, options, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        kind(*arguments, **options)


@FAR
def test_bad_calls_of_the_far_layers_raise_and_are_named(kind):
    layer, x = far(kind, causal=True), tokens()
    state = layer.init_state(2)
    with pytest.raises(ValueError, match=r"\binitial_state\b"):
        layer(x, state=state[:1])
    with pytest.raises(TypeError, match=r"\bstate\b"):
        layer.step(x[:, :1], state.double())
    with pytest.raises(ValueError, match="1 token"):
        layer.step(x[:, :2], state)
    with pytest.raises(ValueError, match=r"\bcausal\b"):
        far(kind).step(x[:, :1], state)
    with pytest.raises(ValueError, match=r"\bfeature_map\b"):
        far(kind, feature_map="tanh")(x)
    assert state.abs().max() == 0
