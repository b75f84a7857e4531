"""The attention layers of nf.nn, each in a form that has what is special to it, for the tests of what holds for all."""

from torch import nn

import nearfar as nf

DIM, HEADS = 32, 4
WINDOW = nf.SlidingWindow(5)


def with_features(**options):
    features = nn.Sequential(nn.Linear(8, 12), nn.Softplus())
    return nf.nn.LinearAttention(DIM, HEADS, num_kv_heads=2, causal=True, feature_map=features, **options)


LAYERS = {
    "krause": lambda **options: nf.nn.KrauseAttention(
        DIM, HEADS, num_kv_heads=2, causal=True, locality=WINDOW, top_k=4, **options
    ),
    "krause-all": lambda **options: nf.nn.KrauseAttention(DIM, HEADS, causal=True, sigma_per_head=False, **options),
    "softmax": lambda **options: nf.nn.SoftmaxAttention(DIM, HEADS, num_kv_heads=2, causal=True, sink=True, **options),
    "gated": lambda **options: nf.nn.KrauseGatedAttention(
        DIM, HEADS, num_kv_heads=2, causal=True, locality=WINDOW, top_k=4, **options
    ),
    "linear": lambda **options: nf.nn.LinearAttention(DIM, HEADS, value_dim=16, causal=True, **options),
    "features": with_features,
    "hadamard": lambda **options: nf.nn.HadamardAttention(
        DIM, HEADS, factor_widths=(8, 16), num_kv_heads=2, causal=True, **options
    ),
    "affine": lambda **options: nf.nn.AffineScaledAttention(
        DIM, HEADS, num_kv_heads=2, causal=True, output_gate=True, sink=True, **options
    ),
    "synchronization": lambda **options: nf.nn.SynchronizationAttention(
        DIM, HEADS, causal=True, frequency_scale=0.2, **options
    ),
    "osn": lambda **options: nf.nn.OSNBlock(DIM, HEADS, causal=True, frequency_scale=0.2, **options),
}
