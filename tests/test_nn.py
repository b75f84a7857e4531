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
