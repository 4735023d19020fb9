"""A picture of the profiles: what is wanted, what was rebuilt, and from what."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ema_triton.posthoc.profiles import profile
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
    systems = snapshots.solve([target], at=at, approximate=approximate)
    entries, (momenta, updates, ends, (solution,)) = systems.entries, systems.shown
    index = torch.cat([updates.new_zeros(1), updates])  # of each source; the initial weights' is 0
    last = int(updates[max(end for end, _ in ends) - 1])
    width = -(-(last + 1) // POINTS)
    along = range(0, last + 1, width)

    def binned(weights: Tensor) -> Tensor:
        empty = torch.zeros(len(along), dtype=weights.dtype)
        return empty.index_add(0, index[: len(weights)] // width, weights)

    def mean(sums: Tensor, end: int) -> list[float]:
        counts = binned(torch.ones(end + 1, dtype=sums.dtype))
        return (sums / counts)[: int(counts.count_nonzero())].tolist()

    *own, wanted = (binned(profile(momenta[:end, average])) for end, average in ends)
    rebuilt, all_events = torch.stack(own, dim=1) @ solution.coefficients, max(ends)[0]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=200)
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    above.plot(along, mean(wanted, all_events), color="black", linewidth=2.4, label="target")
    label = f"reconstruction (profile error {solution.profile_error:.2g})"
    above.plot(
        along, mean(rebuilt, all_events), color="tab:orange", linewidth=1.2, ls="--", label=label
    )
    above.set_ylabel("weight per update")
    above.legend(frameon=False, loc="upper left")
    labels = {entry["average"]: snapshots.averages[entry["average"]] for entry in entries}
    highest = 0.0  # of the last snapshots; the first ones are narrow and high
    for entry, (end, average), one in zip(entries, ends, own, strict=False):
        shown, label = mean(one, end), labels.pop(entry["average"], None)
        below.plot(along[: len(shown)], shown, color=f"C{average % 10}", linewidth=0.7, label=label)
        if entry["update_index"] == entries[-1]["update_index"]:
            highest = max(highest, *shown)
    below.set_ylim(0, 1.5 * highest)
    below.set_xlim(0, last)
    below.set_xlabel("update")
    below.set_ylabel("snapshots")
    below.legend(loc="upper left", framealpha=1, edgecolor="none")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
