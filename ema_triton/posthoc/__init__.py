"""Averages after the training: of snapshots, any average rebuilt from them, and of checkpoints."""

from ema_triton.posthoc.merging import merge
from ema_triton.posthoc.plot import plot_profiles
from ema_triton.posthoc.reconstruct import Reconstruction
from ema_triton.posthoc.snapshots import Snapshots

__all__ = ["Reconstruction", "Snapshots", "merge", "plot_profiles"]
