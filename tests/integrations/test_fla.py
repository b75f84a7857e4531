"""fla's call of linear attention against its recurrence in float64."""

import functools

import pytest
import torch
from harness import DEVICE, randn

from nearfar.integrations import fla
from nearfar.ops.linear import linear_attention

BACKENDS = ("reference", "triton") if DEVICE == "cpu" else ("auto",)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(fla, "linear_attention", functools.partial(linear_attention, backend=request.param))


def recurrence(q, k, v, scale=None, initial_state=None, normalize=True):
    """fla's definition, token by token, in float64: o (B, T, H, V) and the state (B, H, K, V)."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[3]) if initial_state is None else initial_state.double()
    total, outputs = q.new_zeros(q.shape[0], *q.shape[2:]), []
    for t in range(q.shape[1]):
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        total = total + k[:, t]
        o = scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state)
        outputs.append(o / (scale * (q[:, t] * total).sum(-1, keepdim=True) + 1e-10) if normalize else o)
    return torch.stack(outputs, 1), state


def inputs(batch=2, length=21, width=16, value_width=24):
    """q and k positive, as the feature maps of fla's layers make them."""
    q, k = (randn(batch, length, 2, width, seed=i).abs() + 0.1 for i in range(2))
    return q, k, randn(batch, length, 2, value_width, seed=2)


def close(got, exact):
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("widths", [(16, 24), (12, 20)], ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("normalize", [True, False])
def test_attention(normalize, scale, widths):
    tensors = [x.requires_grad_() for x in inputs(width=widths[0], value_width=widths[1])]
    got, state = fla.chunk_linear_attn(*tensors, scale=scale, normalize=normalize)
    exact, _ = recurrence(*tensors, scale, normalize=normalize)
    assert state is None
    close(got, exact)
    do = randn(*exact.shape, seed=5)
    for own, other in zip(*(torch.autograd.grad(o, tensors, do.to(o.dtype)) for o in (got, exact)), strict=True):
        close(own, other.double())


def test_states():
    """Both halves of a sequence, the second from the state of the first."""
    q, k, v = inputs()
    first, second = ([x[:, :9] for x in (q, k, v)], [x[:, 9:] for x in (q, k, v)])
    exact, exact_state = recurrence(q, k, v, normalize=False)
    o1, state = fla.chunk_linear_attn(*first, normalize=False, output_final_state=True)
    o2, state = fla.fused_chunk_linear_attn(*second, initial_state=state, normalize=False, output_final_state=True)
    close(torch.cat((o1, o2), 1), exact)
    assert state.dtype == torch.float32
    close(state, exact_state)


def test_packed_sequences():
    q, k, v = inputs(batch=1)
    ends = torch.tensor([0, 9, 21], device=DEVICE)
    got, _ = fla.fused_recurrent_linear_attn(q, k, v, cu_seqlens=ends)
    close(got, torch.cat([recurrence(*(x[:, a:b] for x in (q, k, v)))[0] for a, b in ((0, 9), (9, 21))], 1))


@pytest.mark.parametrize("options, error, message", [
    (dict(head_first=True), NotImplementedError, "head_first must be False"),
    (dict(output_final_state=True), NotImplementedError, "output_final_state needs normalize=False"),
    (dict(initial_state=torch.zeros(2, 2, 16, 24)), NotImplementedError, "initial_state needs normalize=False"),
    (dict(initial_state=torch.zeros(2, 2, 16, 16), normalize=False), ValueError, "initial_state must have.*K=16 and V=24"),
    (dict(scale=0.0), ValueError, "scale must be positive"),
])
def test_what_is_not_computed_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        fla.chunk_linear_attn(*inputs(), **options)
