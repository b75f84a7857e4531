"""Triton kernels, one file per operator over shared tile helpers. Installed as ``nearfar.triton_kernels``."""
