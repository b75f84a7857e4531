"""nearfar: fused kernels for near-field (localized) and far-field (linear) attention."""

import importlib
from typing import TYPE_CHECKING, Any

import torch

from nearfar import nn
from nearfar.explain import explain
from nearfar.localities import GridNeighborhood, ShiftedWindow, SlidingWindow
from nearfar.ops.affine import affine_attention, softmax_attention
from nearfar.ops.diagnostics import attention_statistics, selection_geometry
from nearfar.ops.krause import krause_attention
from nearfar.ops.krause_step import KrauseCache, krause_attention_step
from nearfar.ops.linear import hadamard_attention, hadamard_attention_step, linear_attention, linear_attention_step
from nearfar.ops.synchronization import locked_share, order_parameter, synchronization_attention
from nearfar.runtime.packing import check_cu_seqlens
from nearfar.version import __version__

if TYPE_CHECKING:
    from nearfar import diagnostics, distributed, integrations, theory
    from nearfar.diagnostics import head_regimes

__all__ = [
    "GridNeighborhood",
    "KrauseCache",
    "ShiftedWindow",
    "SlidingWindow",
    "__version__",
    "affine_attention",
    "attention_statistics",
    "check_cu_seqlens",
    "diagnostics",
    "distributed",
    "explain",
    "hadamard_attention",
    "hadamard_attention_step",
    "head_regimes",
    "integrations",
    "krause_attention",
    "krause_attention_step",
    "linear_attention",
    "linear_attention_step",
    "locked_share",
    "nn",
    "order_parameter",
    "selection_geometry",
    "softmax_attention",
    "synchronization_attention",
    "theory",
]

# Lets torch.load with its default, weights_only=True, load caches and configurations that contain localities.
torch.serialization.add_safe_globals([KrauseCache, GridNeighborhood, ShiftedWindow, SlidingWindow])


def __getattr__(name: str) -> Any:
    """Import at first use the subpackages that operators and layers do not need, to keep `import nearfar` light."""
    if name in ("diagnostics", "distributed", "integrations", "theory"):
        return importlib.import_module(f"nearfar.{name}")
    if name == "head_regimes":
        globals()[name] = importlib.import_module("nearfar.diagnostics").head_regimes
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
