"""Diagnostics of attention heads: head regimes, `watch` for a whole model, plots."""

from nearfar.diagnostics.plot import plot
from nearfar.diagnostics.regimes import REGIMES, HeadRegimes, Thresholds, classify, head_regimes
from nearfar.diagnostics.watch import Watch, watch

__all__ = ["REGIMES", "HeadRegimes", "Thresholds", "Watch", "classify", "head_regimes", "plot", "watch"]
