"""`python -m bench run --averages 1,2,3`: several averages at once beside one by one.

Both are timed in turns, caches flushed, beside a copy of the bytes that the averages at once move.
A prefix "=" says that the two differ by less than either of them varies.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench import jobs, measure
from bench.cases import Case
from bench.jobs import gib
from bench.machine import available_memory
from bench.measure import Stopwatch, Subject
from bench.models import Model, make_module
from bench.results import Spread
from ema_triton import Constant, EMABank, ModelEMA

# One per average; none is 1, which copies.
MOMENTA = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)

# Averages that the kernel takes in one launch.
TOGETHER = 3


class Timed(NamedTuple):
    """The averages of one model in one case."""

    count: int
    at_once: Spread
    one_by_one: Spread
    copy: Spread

    @property
    def ratio(self) -> str:
        """How many times as long one by one takes."""
        apart = self.at_once.high < self.one_by_one.low or self.one_by_one.high < self.at_once.low
        return f"{'' if apart else '='}{self.one_by_one.median / self.at_once.median:.2f}"


def moved(case: Case, count: int, *, reads_once: bool) -> int:
    """Bytes per element that an update of so many averages moves.

    Args:
        case: What is averaged into what.
        count: How many averages.
        reads_once: Whether the online weights are read once for up to three of them.
    """
    reads = -(-count // TOGETHER) if reads_once else count
    return reads * case.online_dtype.itemsize + count * 2 * case.stored


def parse(text: str) -> list[int]:
    """The counts on the command line."""
    counts = [int(part) for part in text.split(",") if part.isdigit()]
    if len(counts) != text.count(",") + 1 or not 0 < min(counts) <= max(counts) <= len(MOMENTA):
        raise SystemExit(f"--averages: numbers from 1 to {len(MOMENTA)}, as 1,2,3, but got {text}")
    return counts


def main(
    models: list[Model],
    cases: dict[str, Case],
    counts: list[int],
    stopwatch: Stopwatch,
    rounds: int,
    seconds: float,
) -> None:
    """Measure, and print a table."""
    on_gpu = stopwatch.device.type == "cuda"
    print("model      case                   averages   bytes at once / one by one per element")
    print("           milliseconds (10 % .. 90 %) at once, one by one, copy; one by one / at once")
    for model in models:
        for name, case in cases.items():
            for count in counts:
                need = memory(model, case, count)
                room = jobs.usable(available_memory(stopwatch.device), stopwatch.device)
                head = f"{model.name:10s} {name:22s} {count:8d}   "
                if need > room:
                    print(f"{head}needs {gib(need)}, of {gib(room)}")
                    continue
                at_once = moved(case, count, reads_once=on_gpu)
                print(f"{head}{at_once} / {moved(case, count, reads_once=False)}")
                timed = measured(model, case, count, stopwatch, rounds, seconds)
                spreads = (timed.at_once, timed.one_by_one, timed.copy)
                print(f"           {', '.join(map(milliseconds, spreads))}; {timed.ratio}")


def memory(model: Model, case: Case, count: int) -> int:
    """Bytes that are alive at a time: the online model, all averages twice, the copy's buffers."""
    averages = 2 * count * model.elements * case.stored
    return model.elements * case.online_dtype.itemsize + averages + 2 * measure.COPY_BUFFER


def milliseconds(spread: Spread) -> str:
    """The median, and between which values most samples are."""
    values = (spread.median, spread.low, spread.high)
    return "{:.3f} ({:.3f} .. {:.3f})".format(*(value / 1e3 for value in values))


def measured(
    model: Model, case: Case, count: int, stopwatch: Stopwatch, rounds: int, seconds: float
) -> Timed:
    """Time them; on a GPU the device's time, on a CPU the wall's."""
    gc.collect()
    online = make_module(model, case.online_dtype, stopwatch.device)
    options = {"ema_dtype": case.ema_dtype, "precision": case.precision}
    momenta = MOMENTA[:count]
    bank = EMABank(online, {str(m): Constant(m) for m in momenta}, **options)
    singles = [ModelEMA(online, **options) for _ in momenta]
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.neg_()  # or an update would change nothing
    updates = [partial(ema.update, m) for ema, m in zip(singles, momenta, strict=True)]
    check(bank, singles, updates)

    def one_by_one() -> None:
        for update in updates:
            update()

    at_once = moved(case, count, reads_once=stopwatch.device.type == "cuda")
    subjects = {
        "at once": Subject(bank.update),
        "one by one": Subject(one_by_one),
        "copy": Subject(measure.copy_of(model.elements * at_once, stopwatch.device)),
    }
    samples = measure.interleaved(subjects, stopwatch.sample, rounds, seconds)
    figure = "device" if stopwatch.device.type == "cuda" else "wall"
    return Timed(count, *(Spread.of(samples[name][figure]) for name in subjects))


def check(bank: EMABank, singles: list[ModelEMA], updates: list[Callable[[], object]]) -> None:
    """Raise unless both make the same averages, to the bit."""
    with warnings.catch_warnings():  # that precision="nearest" stands still
        warnings.simplefilter("ignore")
        bank.update()
        for update in updates:
            update()
    for (name, average), single in zip(bank.items(), singles, strict=True):
        for one, other in zip(tensors_of(average), tensors_of(single), strict=True):
            if not torch.equal(one, other):
                raise AssertionError(f"the average of momentum {name} differs")


def tensors_of(ema: ModelEMA) -> Iterator[Tensor]:
    """Of an EMA, all that an update writes."""
    for bucket in ema._state.buckets:
        yield bucket.flat
        if bucket.residual is not None:
            yield bucket.residual
