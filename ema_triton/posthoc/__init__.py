"""Averages that are made after the training: of checkpoints, of snapshots."""

from ema_triton.posthoc.merging import merge

__all__ = ["merge"]
