"""The baselines: one module per operator, and here what they share. Each function returns a callable (*inputs) -> o."""

import functools

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {"sdpa": None, "sdpa-flash": "FLASH_ATTENTION", "sdpa-cudnn": "CUDNN_ATTENTION"}


def sdpa(name="sdpa", causal=True):
    """Softmax over all keys by scaled_dot_product_attention, on one of its backends or on the one it picks."""

    def run(q, k, v):
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    backend = SDPA[name]
    return run if backend is None else sdpa_kernel(getattr(SDPBackend, backend))(run)


@functools.cache
def static(function):
    """The function compiled for each shape; a full graph, as the fallback, eager mode, is no competitor."""
    # Donated buffers forbid retain_graph, which timing a backward pass alone needs.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, fullgraph=True)
