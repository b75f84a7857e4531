"""Upstream gradients come in any layout: that of whatever the user did next with an output."""

import pytest
import samples
import torch
from harness import as_tuple, leaves, like, randn
from samples import public
from torch.utils._pytree import tree_leaves

import nearfar as nf
from nearfar.registry import OPERATORS

pytestmark = pytest.mark.full

CASES = [
    pytest.param(operator, name, id=f"{operator.room}-{name}")
    for operator in OPERATORS if operator.differentiable for name in samples.names(operator)
]


def stored(x, order):
    """The same numbers, with the dimensions in this order in memory."""
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def offset(x):
    """The same numbers, one element after an aligned address."""
    return torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape)


def sliced(x):
    """The same numbers as the middle of larger rows, and every other one along all other dimensions."""
    for d in range(x.dim() - 1):
        x = torch.stack((x, x + 1), d + 1).flatten(d, d + 1)
    x = torch.nn.functional.pad(x, (1, 2), value=9)[..., 1:-2]
    for d in range(x.dim() - 1):
        x = x.unflatten(d, (-1, 2)).select(d + 1, 0)
    return x


LAYOUTS = {
    "reversed": lambda x: stored(x, list(range(x.dim()))[::-1]),
    "first dimensions swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows before heads": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "sliced": sliced,
    "offset by one element": offset,
    "a row expanded": lambda x: x.narrow(-1, 0, 1).expand(x.shape),
    "of a sum": lambda x: x.flatten()[0].expand(x.shape),
}


def assert_any_layout(backward, do, names=LAYOUTS):
    """backward(do) -> gradients. Upstream gradients do give the same bits in each layout as the same numbers do in order."""
    for name in names:
        changed = [LAYOUTS[name](part) for part in do]
        plain = [part.clone(memory_format=torch.contiguous_format) for part in changed]
        for a, b in zip(tree_leaves(backward(changed)), tree_leaves(backward(plain)), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("operator, name", CASES)
def test_through_autograd(operator, name):
    sample = samples.of(operator).make(name, torch.float16, length=5)
    tensors = leaves(sample)
    o = as_tuple(public(operator)(**tensors, **sample.options, backend="triton"))
    do = like(o)

    def backward(do):
        return torch.autograd.grad(o, list(tensors.values()), do, retain_graph=True)

    assert_any_layout(backward, do)


@pytest.mark.parametrize("operator, name", CASES)
def test_through_the_torch_operator(operator, name):
    module, op = samples.of(operator), getattr(torch.ops.nearfar, operator.op)
    sample = module.make(name, torch.float16, length=5)
    outputs = op(*module.op_arguments(sample))
    do = as_tuple(like(public(operator)(**sample.tensors, **sample.options, backend="triton")))
    operator_backward = getattr(torch.ops.nearfar, f"{operator.op}_backward")

    def backward(do):
        return operator_backward(*module.backward_arguments(sample, tuple(do) if len(do) > 1 else do[0], outputs))

    assert_any_layout(backward, do, ["reversed", "sliced"])


@pytest.mark.parametrize("causal", [False, True])
def test_of_the_order_parameter(causal):
    theta = randn(2, 3, 40, 16).requires_grad_()
    r = nf.order_parameter(theta, causal=causal, backend="triton")
    do = (like(r.detach()),)
    assert_any_layout(lambda do: torch.autograd.grad(r, theta, do, retain_graph=True), do)
    assert_any_layout(lambda do: torch.ops.nearfar.order_parameter_backward(*do, theta.detach(), causal), do)
