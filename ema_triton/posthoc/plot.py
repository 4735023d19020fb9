"""A picture of the profiles: what is wanted, what was rebuilt, and from what."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ema_triton.posthoc.profiles import profile
from ema_triton.posthoc.reconstruct import solve_for
from ema_triton.posthoc.snapshots import Snapshots
from ema_triton.schedules import Schedule

POINTS = 1000  # at most, along the axis


def plot_profiles(
    path: str | os.PathLike[str],
    snapshots: Snapshots,
    target: Schedule | Tensor,
    *,
    at: int | None = None,
    approximate: bool = False,
) -> None:
    """Draw the weights over the updates of target, reconstruction and snapshots, as a PNG.

    With momentum factors, those of the factor 1, or of the smallest one.

    Args:
        path: The file.
        snapshots: The folder's.
        target: As of `Snapshots.reconstruct`, with `at` and `approximate`, and its errors.
        at: After which update.
        approximate: Whether to draw what cannot be reached, too.

    Raises:
        ValueError: As of `Snapshots.reconstruct`.
        ImportError: matplotlib is not installed.

    Examples:
        >>> from ema_triton import HalfLife
        >>> plot_profiles("profiles.png", Snapshots("run"), HalfLife(1000))  # doctest: +SKIP
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_profiles() takes the package matplotlib, which is not installed. Install it: "
            "pip install matplotlib."
        ) from error
    found = snapshots._present()
    solved = solve_for([target], snapshots._log, found, at, approximate=approximate)
    momenta, updates, ends, (solution,) = next(iter(solved.systems.values()))
    *own, wanted = (profile(momenta[:end, average]) for end, average in ends)
    rebuilt = torch.zeros(max(map(len, own)), dtype=wanted.dtype)
    for coefficient, one in zip(solution.coefficients, own, strict=True):
        rebuilt[: len(one)] += coefficient * one
    index = torch.cat([updates.new_zeros(1), updates])  # of each source; the initial weights' is 0
    width = -(-int(index[len(rebuilt) - 1] + 1) // POINTS)

    def points(weights: Tensor) -> tuple[list[int], list[float]]:
        """The means of `width` updates each."""
        bins = index[: len(weights)] // width
        means = bins.bincount(weights) / bins.bincount()
        return [width * place for place in range(len(means))], means.tolist()

    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=200)
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    above.plot(*points(wanted), color="black", linewidth=2.4, label="target")
    label = f"reconstruction (profile error {solution.profile_error:.2g})"
    above.plot(*points(rebuilt), color="tab:orange", linewidth=1.2, ls="--", label=label)
    above.set_ylabel("weight per update")
    above.legend(frameon=False, loc="upper left")
    names = dict(enumerate(snapshots.averages))
    highest = 0.0  # of the last snapshots; the first ones are narrow and high
    for one, (end, average) in zip(own, ends, strict=False):
        along, means = points(one)
        name = names.pop(average, None)
        below.plot(along, means, color=f"C{average % 10}", linewidth=0.7, label=name)
        if end == ends[len(own) - 1][0]:
            highest = max(highest, *means)
    below.set_ylim(0, 1.5 * highest)
    below.set_xlim(0, along[-1])
    below.set_xlabel("update")
    below.set_ylabel("snapshots")
    below.legend(loc="upper left", framealpha=1, edgecolor="none")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
