"""What happened to the averages: their momenta, syncs and loads, as an EMA's recorder saw them."""

from __future__ import annotations

import base64
import json
import math
import warnings
import zlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ema_triton.posthoc.profiles import momenta_of
from ema_triton.schedules import Schedule, momentum_from

VERSION = 2
ALL = -1  # an event of all averages


class Log:
    """The momenta of all events: of updates, and of syncs and loads, which have 1 or 0.

    Attributes:
        averages: Their names.
        momenta: A float64 for each event and average; NaN: unknown.
        others: The numbers of the events that are no updates.
        inexact: What this cannot tell, as [update index, reason].
        snapshots: Those that belong to it, as `Snapshots.save` describes them.
    """

    def __init__(self, averages: Sequence[str] = ()) -> None:
        self.averages = [*averages]
        self.momenta = array("d")
        self.others: list[int] = []
        self.inexact: list[tuple[int, str]] = []
        self.snapshots: list[dict[str, Any]] = []
        self._begun = False  # until the first event the EMA may be loading what this describes

    @property
    def events(self) -> int:
        """How many there are."""
        return len(self.momenta) // max(1, len(self.averages))

    @property
    def updates(self) -> int:
        """How many of them are updates."""
        return self.events - len(self.others)

    def record(
        self, average: int, kind: str, update_index: int, momenta: Sequence[float | Tensor] = ()
    ) -> None:
        """Take down an event of an average, or of `ALL`, as a `Planner` tells its recorder.

        The update index is the one before an update, or after a load. The kinds are "update", whose
        momenta are each average's; "sync", "load_weights()", "load_state_dict()"; and "replaced",
        an EMA tensor by another one.
        """
        if kind == "load_state_dict()" and not self._begun:
            return
        if update_index != self.updates or not self._begun:
            self.align(update_index)
        if kind == "update":
            self.momenta.extend(math.nan if isinstance(m, Tensor) else m for m in momenta)
            if Tensor in map(type, momenta):
                self.mark("a momentum was a tensor, whose value only the device knows")
        elif kind == "replaced":
            self.mark("tensors of the EMA were replaced by others, of unknown values")
        else:
            self.others.append(self.events)
            self.momenta.extend(float(average in (ALL, n)) for n in range(len(self.averages)))

    def mark(self, reason: str) -> None:
        """Say that from this update on the log is not all that happened."""
        if all(reason != known for _, known in self.inexact):
            self.inexact.append((self.updates, reason))

    def align(self, update_index: int) -> None:
        """Go on from an update: forget those after it, and note those that were not recorded."""
        if update_index < self.updates:
            if update_index == 0 and self.snapshots:
                warnings.warn(
                    "The folder has snapshots of another training, up to update "
                    f"{self.snapshots[-1]['update_index']}, and this one begins anew: they are "
                    "given up. Give Snapshots another folder to keep them.",
                    stacklevel=3,
                )
            self.others = [at for n, at in enumerate(self.others) if at - n <= update_index]
            del self.momenta[(update_index + len(self.others)) * len(self.averages) :]
            self.inexact = [known for known in self.inexact if known[0] <= update_index]
            self.snapshots = [one for one in self.snapshots if one["update_index"] <= update_index]
        elif update_index > self.updates:
            first, missing = self.updates + 1, update_index - self.updates
            self.momenta.extend([math.nan] * missing * len(self.averages))
            self.mark(f"updates {first} to {update_index} were not recorded")
        self._begun = True

    def assume(self, schedules: Sequence[Schedule | None]) -> None:
        """Put in the schedules' momenta where they are unknown."""
        if self.inexact:
            rows, happened, _ = self._events()
            for event, average in rows.isnan().nonzero().tolist():
                if schedule := schedules[average]:
                    momentum = momentum_from(schedule, int(happened[event]))
                    self.momenta[event * len(schedules) + average] = momentum

    def _events(self) -> tuple[Tensor, Tensor, Tensor]:
        """Momenta, fp64 [events, averages]; of each event the updates up to it; is it an update."""
        rows = torch.empty(0, dtype=torch.float64)
        if self.momenta:
            rows = torch.frombuffer(self.momenta, dtype=torch.float64).clone()
        is_update = torch.ones(self.events, dtype=torch.bool)
        is_update[self.others] = False
        return rows.reshape(self.events, len(self.averages)), is_update.cumsum(0), is_update

    def matrix(
        self, factor: float, targets: Sequence[Schedule | Tensor], updates: int
    ) -> tuple[Tensor, Tensor]:
        """Momenta, fp64 [events, averages + targets]; of each event the updates up to it, int64.

        A target takes part in the syncs and loads of all averages, as an average of its own would;
        not one that is weights over the updates.

        Args:
            factor: Of the momentum, as `momentum_scale` says.
            targets: Schedules; or weights over the updates, fp64 [updates].
            updates: How many the targets consist of. After them they change no more.
        """
        rows, happened, is_update = self._events()
        columns = [*scaled(rows, factor).unbind(1)]
        for target in targets:
            column = torch.zeros(self.events, dtype=torch.float64)
            if isinstance(target, Tensor):
                momenta = momenta_of(target)
            else:
                given = [momentum_from(target, index) for index in range(1, updates + 1)]
                momenta = scaled(torch.tensor(given, dtype=torch.float64), factor)
                column[~is_update & (rows == 1).all(1)] = 1
            column[is_update.nonzero()[:updates, 0]] = momenta
            columns.append(column)
        return torch.stack(columns, dim=1), happened

    def to_text(self) -> str:
        """All of it as one string of JSON."""
        packed = base64.b64encode(zlib.compress(self.momenta.tobytes(), 1)).decode()
        public = {name: value for name, value in vars(self).items() if name != "_begun"}
        return json.dumps({"version": VERSION, **public, "momenta": packed})

    @classmethod
    def from_text(cls, text: object) -> Log:
        """What `to_text` returned; ValueError if it is damaged, or of another version."""
        try:
            found = json.loads(text)  # type: ignore[arg-type]  # a TypeError says so
            if found["version"] != VERSION:
                raise ValueError(f"version {found['version']}, and this release reads {VERSION}")
            log = cls(found["averages"])
            log.momenta.frombytes(zlib.decompress(base64.b64decode(found["momenta"])))
            log.others, log.snapshots = found["others"], found["snapshots"]
            log.inexact = [(at, reason) for at, reason in found["inexact"]]
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(
                f"The snapshots' log cannot be read ({type(error).__name__}: {error}). Give what "
                "Snapshots.state_dict() returned, or another copy of the folder's log.json."
            ) from error
        return log


def scaled(momenta: Tensor, factor: float) -> Tensor:
    """The momenta times `momentum_scale`'s factor, as `Launch.effective_momentum` has them."""
    return torch.where(momenta == 1, momenta, (momenta * factor).clamp(max=1))
