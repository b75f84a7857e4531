"""Diagnostics of attention heads: head regimes, `watch` for a whole model, `Monitor` for a training, plots."""

from nearfar.diagnostics.bootstrap import Interval, bootstrap
from nearfar.diagnostics.monitor import Monitor
from nearfar.diagnostics.plot import plot, plot_history
from nearfar.diagnostics.regimes import REGIMES, HeadRegimes, Thresholds, classify, head_regimes
from nearfar.diagnostics.watch import Watch, watch

__all__ = [
    "REGIMES",
    "HeadRegimes",
    "Interval",
    "Monitor",
    "Thresholds",
    "Watch",
    "bootstrap",
    "classify",
    "head_regimes",
    "plot",
    "plot_history",
    "watch",
]
