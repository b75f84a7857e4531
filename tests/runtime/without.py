"""What calls return in a process in which nearfar found torch or Triton without one of their private names."""

import importlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch.autograd import forward_ad

LENGTH, WIDTH = 20, 16


class Hidden:
    """An attribute that a class seems not to have."""

    def __get__(self, instance, owner=None):
        raise AttributeError("hidden")


def owner_of(name):
    """What has a name, "module:attributes", and its last attribute."""
    module, attributes = name.split(":")
    owner, (*path, last) = importlib.import_module(module), attributes.split(".")
    for attribute in path:
        owner = getattr(owner, attribute)
    return owner, last


def exists(name):
    return hasattr(*owner_of(name))


def hide(name):
    """Take a name away; returns a function that brings it back."""
    owner, last = owner_of(name)
    if last in vars(owner):
        value = vars(owner)[last]
        delattr(owner, last)
        return lambda: setattr(owner, last, value)
    setattr(owner, last, Hidden())  # inherited
    return lambda: delattr(owner, last)


def load_private(name):
    """nearfar.runtime.private, imported while torch or Triton lacks this name; None: nothing is missing.

    Nothing else of nearfar is imported then, and torch itself has the name again when it needs it.
    """
    spec = importlib.util.find_spec("nearfar")  # imports nothing
    path = Path(spec.submodule_search_locations[0], "runtime/private.py")
    spec = importlib.util.spec_from_file_location("nearfar.runtime.private", path)
    private = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    bring_back = hide(name) if name else lambda: None
    spec.loader.exec_module(private)
    for each in private.TRITON:
        getattr(private, each)
    bring_back()
    return private


def results(name):
    """{case: arrays, or the type and the text of an error} in a process without this name."""
    private = load_private(name)
    import nearfar as nf
    from nearfar.runtime import plans

    assert sys.modules["nearfar.runtime.private"] is private
    assert plans.TensorGuards is private.TensorGuards
    return {case.__name__: outcome(case, nf) for case in CASES}


def outcome(case, nf):
    try:
        return [x.detach().float().cpu().numpy() for x in case(nf)]
    except Exception as error:
        return type(error).__name__, str(error)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


def qkv():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 1, LENGTH, WIDTH, generator=generator).to(DEVICE, DTYPE) for _ in range(3)]
    return [x.requires_grad_() for x in tensors]


def both_directions(call):
    """Output and gradients; on a GPU of a second call, which finds the plan of the first."""
    for _ in range(2 if DEVICE == "cuda" else 1):
        tensors = qkv()
        o = call(*tensors)
        found = [o, *torch.autograd.grad(o.float().square().sum(), tensors)]
    return found


def reference(nf):
    return both_directions(lambda q, k, v: nf.krause_attention(q, k, v, 2.0, nf.SlidingWindow(7), backend="reference"))


def packed(nf):
    ends = torch.tensor([0, 7, LENGTH], dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        found = both_directions(lambda q, k, v: nf.krause_attention(q, k, v, 2.0, cu_seqlens=ends, backend="reference"))
    return found


def softmax(nf):
    return both_directions(lambda q, k, v: nf.softmax_attention(q, k, v, causal=True, backend="triton"))


def linear(nf):
    return both_directions(lambda q, k, v: nf.linear_attention(q, k, v, causal=True, backend="triton"))


def autocast(nf):
    q, k, v = (x.detach().float() for x in qkv())
    with torch.autocast(DEVICE, torch.bfloat16):
        return [nf.softmax_attention(q, k, v, backend="reference")]


# The operator whose kernels take least to interpret serves what concerns all of them.
def order(nf, theta):
    return nf.order_parameter(theta, backend="triton")


def mapped(nf):
    return [torch.func.vmap(lambda theta: order(nf, theta))(torch.stack(qkv()).detach())]


def func_gradient(nf):
    return [torch.func.grad(lambda theta: order(nf, theta).float().sum())(qkv()[0].detach())]


def batched_gradients(nf):
    q, *_ = qkv()
    o = order(nf, q)
    return torch.autograd.grad(o, q, torch.stack((torch.ones_like(o), 2 * torch.ones_like(o))), is_grads_batched=True)


def batched_gradients_of_the_reference(nf):
    q, k, v = qkv()
    o = nf.linear_attention(q, k, v, causal=True, backend="reference")
    return torch.autograd.grad(o, (q, v), torch.stack((o.detach(), 2 * o.detach())), is_grads_batched=True)


def forward_mode(nf):
    """Refused in any case."""
    q, *_ = qkv()
    with forward_ad.dual_level():
        return [order(nf, forward_ad.make_dual(q.detach(), q.detach()))]


def double_backward(nf):
    """Likewise."""
    q, *_ = qkv()
    (gradient,) = torch.autograd.grad(order(nf, q).sum(), q, create_graph=True)
    return torch.autograd.grad(gradient.sum(), q)


def step(nf):
    state = torch.zeros(1, 1, WIDTH, WIDTH + 1, device=DEVICE)
    token = [x.detach()[:, :, :1] for x in qkv()]
    return [nf.linear_attention_step(*token, state, backend="reference"), state]


def reference_in_a_graph(nf):
    """The operator that torch.compile puts into a graph."""
    options = -1, 0, None, False, None, None, 0.0
    return both_directions(
        lambda q, k, v: torch.ops.nearfar.krause_attention_reference(q, k, v, q.new_full((1,), 2.0), *options)
    )


def checkpointed_layer(nf):
    torch.manual_seed(0)
    layer = nf.nn.AffineScaledAttention(2 * WIDTH, 2).to(DEVICE)
    x = torch.randn(1, LENGTH, 2 * WIDTH, device=DEVICE, requires_grad=True)
    o = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    return *torch.autograd.grad(o.sum(), x), *layer.buffers()


def watched_model(nf):
    torch.manual_seed(0)
    model = torch.nn.MultiheadAttention(2 * WIDTH, 2, batch_first=True, device=DEVICE).eval()
    x = torch.randn(1, LENGTH, 2 * WIDTH, device=DEVICE)
    with nf.diagnostics.watch(model) as watched:
        o, _ = model(x, x, x)
    return o, *[layer["entropy"] for layer in watched.layers.values()]


CASES = [
    reference, packed, softmax, linear, autocast, mapped, func_gradient, batched_gradients, batched_gradients_of_the_reference,
    forward_mode, double_backward, step, reference_in_a_graph, checkpointed_layer, watched_model,
]
