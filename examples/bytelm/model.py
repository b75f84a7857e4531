"""The model, and the attentions in which its variants differ."""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import nearfar as nf

BYTES = 256


class Size(NamedTuple):
    dim: int
    heads: int
    layers: int
    context: int


class Attention(nn.Module):
    """Causal softmax attention, with a sigmoid gate on its output if asked for. Subclasses change `attend`.

    All variants draw the same four projections. What they add is drawn aside (`own_parameters`), so that models of one seed
    start from the same values wherever they have the same parameters.
    """

    def __init__(self, dim: int, heads: int, gate: bool = False):
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        with torch.random.fork_rng(devices=[]):
            self.gate_proj = nn.Linear(dim, dim, bias=False) if gate else None
            self.own_parameters(dim)

    def own_parameters(self, dim: int) -> None:
        """Make what this attention has beside the projections."""

    def project(self, x):
        """q, k, v (B, H, N, D) of x (B, N, dim)."""
        return (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))

    def attend(self, x, q, k, v):
        """The heads' outputs (B, H, N, Dv), linear in v."""
        return nf.softmax_attention(q, k, v, causal=True)

    def forward(self, x):
        o = self.attend(x, *self.project(x)).transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid()
        return self.out_proj(o)

    @torch.no_grad()
    def weights(self, x):
        """(B, H, N, N) float32: the factor of every value in every output, before a gate.

        The operators never hold these weights: they come out when the columns of the identity go in as values, as many at a
        time as a head is wide.
        """
        q, k, v = self.project(x)
        identity = torch.eye(x.shape[1], device=v.device, dtype=v.dtype).expand(*v.shape[:2], -1, -1)
        return torch.cat([self.attend(x, q, k, columns.contiguous()).float() for columns in identity.split(self.width, -1)], -1)


class Sink(Attention):
    """Softmax attention with exp of a learnable logit a head, at first 0, in the denominator."""

    def own_parameters(self, dim):
        self.sink = nn.Parameter(torch.zeros(self.heads))

    def attend(self, x, q, k, v):
        return nf.softmax_attention(q, k, v, causal=True, sink=self.sink)


class Halved(Attention):
    """Half of softmax attention: what affine scales are at first, and nothing else of them."""

    def attend(self, x, q, k, v):
        return 0.5 * super().attend(x, q, k, v)


class Affine(Attention):
    """arXiv 2602.23057, eq. 6 to 11: alpha = clip(0.1 W x + 0.5, 0, 1), beta = (its moving average - alpha) / N."""

    def own_parameters(self, dim):
        self.alpha_proj = nn.Linear(dim, self.heads, bias=False)
        self.register_buffer("alpha_average", torch.zeros(self.heads))

    def attend(self, x, q, k, v):
        alpha = (0.1 * self.alpha_proj(x).float() + 0.5).clamp(0, 1).transpose(1, 2)
        if self.training:
            self.alpha_average.lerp_(alpha.detach().mean((0, 2)), 0.1)
        beta = (self.alpha_average[:, None] - alpha) / x.shape[1]
        return nf.affine_attention(q, k, v, alpha, beta, causal=True)


class Krause(Attention):
    """arXiv 2602.11534: of the last 32 bytes the 16 nearest, as in the authors' language model."""

    def own_parameters(self, dim):
        self.log_sigma = nn.Parameter(torch.full((self.heads,), math.log(2.5)))

    def attend(self, x, q, k, v):
        return nf.krause_attention(q, k, v, self.log_sigma.exp(), nf.SlidingWindow(31), top_k=16)


class KrauseGated(Attention):
    """A Krause branch beside the softmax branch, mixed by a softmax gate a token that starts at 0.8 for the softmax branch.

    `weights` are those of the softmax branch.
    """

    def own_parameters(self, dim):
        self.krause = Krause(dim, self.heads)
        self.mix_proj = nn.Linear(2 * dim, 2)
        with torch.no_grad():
            self.mix_proj.bias.copy_(torch.tensor([math.log(0.8 / 0.2), 0.0]))

    def forward(self, x):
        branches = super().forward(x), self.krause(x)
        shares = self.mix_proj(torch.cat(branches, -1)).softmax(-1)
        return shares[..., :1] * branches[0] + shares[..., 1:] * branches[1]


class Linear(Attention):
    """Linear attention with the features elu + 1."""

    def attend(self, x, q, k, v):
        return nf.linear_attention(q, k, v, causal=True)


class Hadamard(Attention):
    """Two factors of half the width: as many numbers a token as linear attention has, and their products as features."""

    def attend(self, x, q, k, v):
        return nf.hadamard_attention(q.chunk(2, -1), k.chunk(2, -1), v, causal=True)


class Synchronization(Attention):
    """arXiv 2602.14445: queries are frequencies, keys phases. scale: of frequencies, 1 in the paper; None for 0.5 D^-1/2."""

    def __init__(self, dim: int, heads: int, scale: float | None = None):
        super().__init__(dim, heads)
        self.scale = 0.5 * self.width**-0.5 if scale is None else scale

    def own_parameters(self, dim):
        self.raw_coupling = nn.Parameter(torch.ones(1))
        self.raw_bandwidth = nn.Parameter(torch.ones(self.heads))

    def oscillators(self, frequencies, phases):
        """omega, coupling, bandwidth and the order parameter of every prefix."""
        order = nf.order_parameter(phases, causal=True)
        return self.scale * frequencies, F.softplus(self.raw_coupling), F.softplus(self.raw_bandwidth), order

    def attend(self, x, q, k, v):
        omega, *parameters = self.oscillators(q, k)
        return nf.synchronization_attention(omega, v, *parameters, causal=True)

    @torch.no_grad()
    def locked_share(self, x):
        """Share of the pairs of different tokens that lock, mean over sequences and heads."""
        q, k, _ = self.project(x)
        return nf.locked_share(*self.oscillators(q, k), causal=True).mean().item()


ATTENTIONS = {
    "softmax": Attention,
    "sink": Sink,
    "gated": partial(Attention, gate=True),
    "affine": Affine,
    "affine gated": partial(Affine, gate=True),
    "halved": Halved,
    "krause": Krause,
    "krause gated": KrauseGated,
    "linear": Linear,
    "hadamard": Hadamard,
    "synchronization": Synchronization,
}


class Block(nn.Module):
    def __init__(self, attention, size):
        super().__init__()
        dim = size.dim
        self.attention_norm, self.attention = nn.LayerNorm(dim), attention(dim, size.heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ByteModel(nn.Module):
    """Bytes (B, N) to logits (B, N, 256) of the next byte; learned positions."""

    def __init__(self, attention, size: Size):
        super().__init__()
        self.byte, self.position = nn.Embedding(BYTES, size.dim), nn.Embedding(size.context, size.dim)
        self.blocks = nn.Sequential(*(Block(attention, size) for _ in range(size.layers)))
        self.norm, self.head = nn.LayerNorm(size.dim), nn.Linear(size.dim, BYTES)

    def embed(self, tokens):
        return self.byte(tokens) + self.position.weight[: tokens.shape[1]]

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens))))

    def bits_per_byte(self, windows):
        """Mean negative log-likelihood of windows (B, N + 1) in bits, differentiable."""
        logits = self(windows[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)

    @torch.no_grad()
    def attention_inputs(self, tokens):
        """(attention, its input) of every layer."""
        x = self.embed(tokens)
        for block in self.blocks:
            yield block.attention, block.attention_norm(x)
            x = block(x)
