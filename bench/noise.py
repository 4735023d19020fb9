"""The noise floor: where a table says "=", because two timings do not tell two updates apart.

It is measured. Every group of peers that take turns has its first peer timed twice, as two peers
(`AGAIN`), so that any factor between these two medians is noise: what ran before it, the memory's
pages, other processes. The floor of a model and figure is the largest such factor over all cases
and groups of the run. Models have their own, because noise is not the same for all: on the H200
the device time of an eager update strays by a factor of 2.47 for ResNet-50, where the GPU waits for
a host with cold caches, and by 1.02 at 7 B parameters.

A ratio is a difference where it is beyond the floor *and* each median is outside the other's 10 %
to 90 %: a few pairs may be alike by luck. Where nothing was timed twice, nothing is known of the
noise, and nothing differs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from bench.results import AGAIN, NO_EMA, Results, Spread, StepRow

EQUAL = "="


def pairs(results: Results) -> Iterator[tuple[str, str, Spread, Spread]]:
    """Model, figure, and the two timings of one update; the second is the row behind the first."""
    for first, again in zip(results.rows, results.rows[1:], strict=False):
        if again.peer == AGAIN:
            for figure, spread in again.times.items():
                yield first.model, figure, first.times[figure], spread


def floors(results: Results) -> dict[tuple[str, str], float]:
    """The noise floor by model and figure: a factor, 1 or more; infinite where it is unknown."""
    found: dict[tuple[str, str], float] = defaultdict(lambda: math.inf)
    for model, figure, first, again in pairs(results):
        factor = _factor(first, again)
        found[model, figure] = max(factor, found.get((model, figure), 1.0))
    return found


def differ(one: Spread, other: Spread, floor: float) -> bool:
    """Whether two timings are of updates that take different times."""
    return _factor(one, other) > floor and not (
        _within(one.median, other) or _within(other.median, one)
    )


def adds(row: StepRow, rows: list[StepRow]) -> bool:
    """Whether an EMA changes the time of a training step.

    Where it adds no more than rounds without EMA differ by, or nothing in some of its own rounds,
    that is not known.
    """
    noise = [other.added for other in rows if (other.model, other.peer) == (row.model, AGAIN)]
    if row.added is None or row.peer in (NO_EMA, AGAIN) or noise in ([], [None]):
        return False
    return not (_within(0.0, row.added) or _within(row.added.median, noise[0]))


def _factor(one: Spread, other: Spread) -> float:
    return max(one.median / other.median, other.median / one.median)


def _within(value: float, spread: Spread) -> bool:
    return spread.low <= value <= spread.high
