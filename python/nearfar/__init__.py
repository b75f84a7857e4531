"""nearfar: fused kernels for near-field (localized) and far-field (linear) attention."""

from nearfar import nn
from nearfar.explain import explain
from nearfar.localities import SlidingWindow
from nearfar.ops.krause import krause_attention
from nearfar.version import __version__

__all__ = ["SlidingWindow", "__version__", "explain", "krause_attention", "nn"]
