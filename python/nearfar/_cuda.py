"""The CUDA extension ``nearfar._C``, where it was built, behind functions that take tensors."""

import torch

from nearfar.version import __version__

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def _load():
    """Returns (module, None), or (None, why there is none)."""
    try:
        import nearfar._C as module
    except ModuleNotFoundError:
        return None, "nearfar was built without its CUDA extension (no nvcc at build time, or NEARFAR_CUDA=0)"
    except ImportError as error:  # It is there, but does not fit this Python or this system.
        return None, f"nearfar._C cannot be loaded: {error}"
    if module.version() != __version__:  # An editable install whose sources have moved on.
        return None, f"nearfar._C is of nearfar {module.version()}, the package of {__version__}: install nearfar again"
    return module, None


extension, unavailable_reason = _load()
"""The module ``nearfar._C`` or None, and the reason why it is None (itself None if the module is there)."""


def row_sumsq(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each row, ``x.float().square().sum(-1)``, read in one pass by the CUDA kernel.

    The raw kernel: not differentiable, and the same bits for the same input on the same device.

    Args:
        x: (B, H, N, D) float16, bfloat16 or float32 on a CUDA device. The last dimension must be contiguous, the others
            may have any strides. Fastest if rows start at multiples of 16 bytes and are a multiple of 16 bytes long.

    Returns:
        (B, H, N) float32, contiguous, on x's device.

    Raises:
        TypeError: x has another dtype.
        ValueError: x has another rank, is not on a CUDA device, or its last dimension is not contiguous.
        RuntimeError: there is no CUDA extension (the message says why), or CUDA reported an error.
    """
    if extension is None:
        raise RuntimeError(unavailable_reason)
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, H, N, D), not {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32, not {x.dtype}")
    *strides, last_stride = x.stride()
    if last_stride != 1 and x.shape[-1] > 1:
        raise ValueError(f"x's last dimension must be contiguous (stride 1, not {last_stride}): pass x.contiguous()")
    if x.device.type != "cuda":
        raise ValueError(f"x must be on a CUDA device, not on {x.device}")
    out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    extension.row_sumsq(x.data_ptr(), out.data_ptr(), _DTYPES[x.dtype], x.shape, strides, x.device.index, stream)
    return out
