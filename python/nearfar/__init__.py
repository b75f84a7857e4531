"""nearfar: fused kernels for near-field (localized) and far-field (linear) attention."""

from nearfar.version import __version__

__all__ = ["__version__"]
