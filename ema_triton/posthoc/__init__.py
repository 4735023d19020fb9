"""Averages after the training: snapshots, and any average rebuilt from them."""

from ema_triton.posthoc.plot import plot_profiles
from ema_triton.posthoc.reconstruct import Reconstruction
from ema_triton.posthoc.snapshots import Snapshots

__all__ = ["Reconstruction", "Snapshots", "plot_profiles"]
