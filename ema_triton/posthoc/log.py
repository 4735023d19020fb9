"""What happened to the averages: their momenta, syncs and loads, as an EMA's recorder saw them."""

from __future__ import annotations

import base64
import json
import math
import zlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ema_triton.posthoc.profiles import momenta_of
from ema_triton.schedules import Schedule, momentum_from

VERSION = 1
ALL = -1  # an event of all averages


class Log:
    """The momenta of all updates, and between them what else wrote the averages.

    Attributes:
        averages: Their names.
        momenta: Of the updates one by one, with a float64 for each average; NaN: unknown.
        others: Syncs and loads as [number of updates before it, number of the average or `ALL`].
        inexact: What this cannot tell, as [update index, reason].
        snapshots: Those that belong to it, as `Snapshots.save` describes them.
        given_up: Those of another training, where one began anew.
    """

    def __init__(self, averages: Sequence[str] = ()) -> None:
        self.averages = [*averages]
        self.momenta = array("d")
        self.others: list[list[int]] = []
        self.inexact: list[tuple[int, str]] = []
        self.snapshots: list[dict[str, Any]] = []
        self.given_up: list[dict[str, Any]] = []
        self._begun = False  # until the first event the EMA may be loading what this describes

    @property
    def updates(self) -> int:
        """How many there are."""
        return len(self.momenta) // max(1, len(self.averages))

    @property
    def events(self) -> int:
        """Updates, syncs and loads."""
        return self.updates + len(self.others)

    def record(
        self, average: int, kind: str, update_index: int, momenta: Sequence[float | Tensor] = ()
    ) -> None:
        """Take down an event; what a `Planner` calls as its recorder, with the first given.

        Args:
            average: Its number, or `ALL`.
            kind: "update", "sync", "load_state_dict()", "load_weights()"; or "replaced", an EMA
                tensor by another one.
            update_index: The EMA's, before an update and after a load.
            momenta: Of an update, for each average. A tensor's value is on the device, unknown.
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
            self.others.append([self.updates, average])

    def mark(self, reason: str) -> None:
        """Say that from this update on the log is not all that happened."""
        if all(reason != known for _, known in self.inexact):
            self.inexact.append((self.updates, reason))

    def align(self, update_index: int) -> None:
        """Go on from an update: forget those after it, and note those that were not recorded."""
        if update_index < self.updates:
            if update_index == 0:
                self.given_up += self.snapshots
            del self.momenta[update_index * len(self.averages) :]
            self.others = [other for other in self.others if other[0] <= update_index]
            self.inexact = [known for known in self.inexact if known[0] <= update_index]
            self.snapshots = [one for one in self.snapshots if one["update_index"] <= update_index]
        elif update_index > self.updates:
            first, missing = self.updates + 1, update_index - self.updates
            self.momenta.extend([math.nan] * missing * len(self.averages))
            self.mark(f"updates {first} to {update_index} were not recorded")
        self._begun = True

    def assume(self, schedules: Sequence[Schedule | None]) -> None:
        """Put in the schedules' momenta where they are unknown."""
        if not self.inexact:
            return
        for at, momentum in enumerate(self.momenta):
            schedule = schedules[at % len(schedules)]
            if math.isnan(momentum) and schedule is not None:
                self.momenta[at] = momentum_from(schedule, at // len(schedules) + 1)

    def matrix(
        self, factor: float, targets: Sequence[Schedule | Tensor], updates: int
    ) -> tuple[Tensor, Tensor]:
        """The momenta of averages and targets, and what happened when.

        A target takes part in the syncs and loads of all averages, as an average of its own would;
        not one that is weights over the updates.

        Args:
            factor: Of the momentum, as `momentum_scale` says.
            targets: Schedules; or weights over the updates, fp64 [updates].
            updates: How many the targets consist of. After them they change no more.

        Returns:
            Momenta, fp64 [events, averages + targets]; and of each event the number of updates up
            to it, int64 [events].
        """
        columns = [scaled(self._own(), factor)]
        for target in targets:
            of_target = torch.zeros(self.updates, 1, dtype=torch.float64)
            if isinstance(target, Tensor):
                of_target[:updates, 0] = momenta_of(target)
            else:
                momenta = [momentum_from(target, index) for index in range(1, updates + 1)]
                given = torch.tensor(momenta, dtype=torch.float64)
                of_target[:updates, 0] = scaled(given, factor)
            columns.append(of_target)
        before = torch.tensor([at for at, _ in self.others], dtype=torch.int64)
        updated = torch.arange(self.updates)
        rows = updated + torch.searchsorted(before, updated, right=True)
        found = torch.zeros(self.events, len(self.averages) + len(targets), dtype=torch.float64)
        found[rows] = torch.cat(columns, dim=1)
        happened = torch.zeros(self.events, dtype=torch.int64)
        happened[rows] = updated + 1
        own = len(self.averages)
        live = [own + i for i, target in enumerate(targets) if not isinstance(target, Tensor)]
        for number, (at, average) in enumerate(self.others):
            of_all = average == ALL or own == 1
            concerned = [*range(own), *live] if of_all else [average]
            found[at + number, concerned] = 1.0
            happened[at + number] = at
        return found, happened

    def _own(self) -> Tensor:
        averages = len(self.averages)
        if not self.momenta:
            return torch.zeros(0, averages, dtype=torch.float64)
        return torch.frombuffer(self.momenta, dtype=torch.float64).clone().view(-1, averages)

    def to_text(self, snapshots: Sequence[dict[str, Any]] | None = None) -> str:
        """All of it as one string of JSON, perhaps with other snapshots."""
        packed = base64.b64encode(zlib.compress(self.momenta.tobytes(), 1)).decode()
        return json.dumps(
            {
                "version": VERSION,
                "averages": self.averages,
                "momenta": packed,
                "others": self.others,
                "inexact": self.inexact,
                "snapshots": self.snapshots if snapshots is None else snapshots,
            }
        )

    @classmethod
    def from_text(cls, text: object) -> Log:
        """What `to_text` returned.

        Raises:
            ValueError: It is damaged, or of another version.
        """
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
                f"The snapshots' log cannot be read ({type(error).__name__}: {error}). It "
                "says of which updates the snapshots consist. Give what Snapshots.state_dict() "
                "returned, or another copy of the folder's log.json."
            ) from error
        return log


def scaled(momenta: Tensor, factor: float) -> Tensor:
    """The momenta times `momentum_scale`'s factor, as `Launch.effective_momentum` has them."""
    return torch.where(momenta == 1, momenta, (momenta * factor).clamp(max=1))
