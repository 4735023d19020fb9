"""`Snapshots`: a training's averages in a folder, and any other average rebuilt from them."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import uuid4

import torch
from torch import Tensor

from ema_triton.bank import EMABank
from ema_triton.checkpoint.interop import import_safetensors, write_safetensors
from ema_triton.distributed import collectives, dtensor
from ema_triton.model_ema import ModelEMA
from ema_triton.modules import are_sharded
from ema_triton.ops.precision import RESIDUAL_DTYPE, as_real, join_residual
from ema_triton.pairing import memory_key, quoted
from ema_triton.posthoc.log import ALL, Log
from ema_triton.posthoc.reconstruct import Reconstruction, Systems, add_up, solve_for
from ema_triton.schedules import Schedule

T = TypeVar("T")
Entry = dict[str, Any]  # what the log says of a file

LOG, NEW, KEY = "log.json", ".new", "snapshot"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Snapshots:
    """Snapshots of a training's averages in a folder, from which any other average is rebuilt.

    Two power functions are enough for most: `EMABank(model, {"0.05":
    PowerFunction(sigma_rel=0.05), "0.10": PowerFunction(sigma_rel=0.10)})`. Every momentum from the
    first update on is logged (8 bytes per average), also what `sync` and loads did, so that a
    reconstruction knows exactly of which updates a snapshot consists. What the host cannot know (a
    momentum given as a tensor, replays of a CUDA graph, EMA tensors that were replaced, skipped
    values, rounded averages) makes the log inexact, with the reason.

    A process that is killed leaves a valid folder. Save `state_dict()` in the training's
    checkpoints; after a resume newer snapshots are ignored and overwritten.

    Args:
        folder: Where they are; made by `save`.
        dtype: Of the averages in new snapshots: float32, bfloat16 or float16.

    Raises:
        ValueError: The dtype is another one, or the folder's log is damaged.

    Examples:
        >>> import tempfile
        >>> from ema_triton import PowerFunction
        >>> model = torch.nn.Linear(2, 1)
        >>> sigmas = "0.05", "0.10"
        >>> bank = EMABank(model, {s: PowerFunction(sigma_rel=float(s)) for s in sigmas})
        >>> snapshots = Snapshots(tempfile.mkdtemp())
        >>> snapshots.record(bank)
        >>> for update_index in range(1, 65):
        ...     bank.update()
        ...     if update_index % 4 == 0:
        ...         snapshots.save(bank)
        >>> result = snapshots.reconstruct(PowerFunction(sigma_rel=0.07))
        >>> model.load_state_dict(result.weights), result.profile_error < 0.02
        (<All keys matched successfully>, True)
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(
                f"dtype can only be one of {', '.join(map(str, DTYPES))}, but got {dtype!r}. It is "
                "that of the averages in the files; float32 is the largest, and rounds the least."
            )
        self.folder, self.dtype = Path(folder), dtype
        self._log = Log()
        if (self.folder / LOG).exists():
            self._log = Log.from_text((self.folder / LOG).read_text(encoding="utf-8"))

    @property
    def averages(self) -> list[str]:
        """The names of the averages, in their order."""
        return [*self._log.averages]

    def record(self, ema: ModelEMA | EMABank) -> None:
        """Log what happens to the averages from now on: call it before the first update.

        `save` calls it too. Updates made before this call are logged with their schedules' momenta,
        and the log is inexact, unless the folder's log or `load_state_dict` has those updates.

        Args:
            ema: Of a handler, its `ema`.

        Raises:
            TypeError: It is neither a `ModelEMA` nor an `EMABank`.
            ValueError: The folder's log is of other averages.
        """
        averages = averages_of(ema)
        if self._log.averages and self._log.averages != [*averages]:
            raise ValueError(
                f"The snapshots in '{self.folder}' are of the averages "
                f"{quoted(self._log.averages)}, but got {quoted([*averages])}. One log cannot tell "
                "of both. Give another folder, or the same averages."
            )
        self._log.averages = [*averages]
        for number, average in enumerate(averages.values()):
            average._planner.recorder = partial(self._record, number if len(averages) > 1 else ALL)
        ema._planner.recorder = partial(self._record, ALL)

    def _record(self, average: int, kind: str, index: int, momenta: Sequence[Any]) -> None:
        self._log.record(average, kind, index, momenta)

    def save(self, ema: ModelEMA | EMABank) -> None:
        """Write a snapshot of each average as it is now, to `<update index>-<average>.safetensors`.

        What an exact EMA keeps beside its weights is in it. Only rank 0 writes; of a sharded model
        all ranks have to call this.

        Args:
            ema: The EMA; during a swap too.

        Raises:
            ValueError: As of `record`; a value is too large for float16, or a tensor is of a kind
                that safetensors cannot hold. The snapshots before are as they were.
            ImportError: safetensors is not installed.
        """
        averages = averages_of(ema)
        self.record(ema)
        with ema._lock, torch.no_grad():
            self._log.align(ema.update_index)
            if self._log.given_up:
                last = self._log.given_up.pop()["update_index"]
                self._log.given_up.clear()
                warnings.warn(
                    f"'{self.folder}' has snapshots of another training, up to update {last}, and "
                    "this one began anew: they are given up, and files of the same names "
                    "overwritten. Give Snapshots another folder to keep them.",
                    UserWarning,
                    stacklevel=2,
                )
            self._log.assume([average.schedule for average in averages.values()])
            for average in averages.values():
                self._mark_inexact(average)
            if ema._planner.captured:
                self._log.mark("a CUDA graph has an update, whose replays are not seen")
            sharded = any(are_sharded(average._state.slots()) for average in averages.values())
            entries = list[Entry]()
            for number, (name, average) in enumerate(averages.items()):
                state = average.state_dict(full_state_dict=sharded)
                file = f"{ema.update_index:08d}-{quote(name, safe=' ')}.safetensors"
                entry = {
                    "file": file,
                    "average": number,
                    "update_index": self._log.updates,
                    "events": self._log.events,
                    "dtype": str(self.dtype).removeprefix("torch."),
                    "token": uuid4().hex,  # no file of an abandoned run has it
                }
                write = partial(self._write, average, state, entry)
                entries += _on_rank0(write, sharded)
            self._log.snapshots = _on_rank0(partial(self._publish, entries), sharded)

    def _mark_inexact(self, average: ModelEMA) -> None:
        """Say what values a log of momenta does not tell."""
        for dtype in {bucket.kind.dtype for bucket in average._state.buckets} & {*RESIDUAL_DTYPE}:
            if (precision := average.precision) != "exact":
                self._log.mark(f"precision={precision!r} rounds the EMA's {dtype} at every update")
        if average.nonfinite == "skip":
            counts = torch.tensor([average.nonfinite_count()], dtype=torch.float64)
            wholes = [slot.whole() for slot in average._state.slots().values()]
            for whole in [whole for whole in wholes if dtensor.is_sharded(whole)][:1]:
                counts = dtensor.sum_over_ranks(counts, whole)
            if counts.item():
                self._log.mark("nonfinite='skip' kept values out of the EMA")

    def _write(self, average: ModelEMA, state: Mapping[str, Any], entry: Entry) -> list[Entry]:
        """Write one average's file, where it does not count yet; a tied tensor once."""
        new = self.folder / NEW
        if entry["average"] == 0:
            shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
            new.mkdir(parents=True)
        factors = {
            name: pair.scale
            for pair in average._planner.latest().averaged
            if pair.scale is not None
            for name in pair.names
        }
        first: dict[object, str] = {}
        tensors, ties = dict[str, Tensor](), dict[str, str]()
        whole = average._state.tensors()
        for name, value in sorted(state["weights"].items()):
            part = dtensor.local_part(whole[name])
            key = memory_key(part)
            if part.numel() and first.setdefault(key, name) != name:
                ties[name] = first[key]
                continue
            if name in factors:
                residual = state["residuals"].get(name)
                value = as_real(value)
                exact = value if residual is None else join_residual(value, residual)
                value = exact.to("cpu", self.dtype, copy=True)
                if bool(value.isinf().any()) and not bool(exact.isinf().any()):
                    raise ValueError(
                        f"'{name}' has values up to {float(exact.abs().max()):.3g}, too large for "
                        f"snapshots in {self.dtype}, which would have Inf. Nothing was written. "
                        "Give Snapshots another dtype."
                    )
            tensors[name] = value
        factors = {name: factor for name, factor in factors.items() if name in tensors}
        described = {
            "token": entry["token"],
            "factors": factors,
            "complex": [name for name in factors if state["weights"][name].is_complex()],
            "ties": ties,
        }
        metadata = {KEY: json.dumps(described), **ties}
        write_safetensors(new / entry["file"], tensors, entry["update_index"], metadata)
        return [entry]

    def _publish(self, entries: list[Entry]) -> list[Entry]:
        """Replace the log, and only then show the files that it tells of."""
        new, files = self.folder / NEW, [one["file"] for one in entries]
        kept = [one for one in self._log.snapshots if one["file"] not in files]
        with open(new / LOG, "w", encoding="utf-8") as log:
            log.write(self._log.to_text(kept + entries))
            log.flush()
            os.fsync(log.fileno())
        for name in (LOG, *files):
            os.replace(new / name, self.folder / name)
        shutil.rmtree(new)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return kept + entries

    def state_dict(self) -> dict[str, Any]:
        """The log as one string, for the training's checkpoints."""
        return {"log": self._log.to_text()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, before or after the EMA loads; newer snapshots are ignored.

        Raises:
            ValueError: It is not what `state_dict` returned.
        """
        self._log = Log.from_text(state.get("log"))

    def _present(self) -> list[Entry]:
        """The log's snapshots that are there, with their files' metadata, in their order."""
        safetensors, found = import_safetensors(), []
        for entry in sorted(self._log.snapshots, key=lambda one: (one["events"], one["average"])):
            path = self.folder / entry["file"]
            if path.exists():
                with safetensors.safe_open(path, framework="pt") as file:
                    described = json.loads((file.metadata() or {}).get(KEY, "{}"))
                if described.get("token") == entry["token"]:
                    found.append({**entry, **described, "size": path.stat().st_size})
        return found

    def __repr__(self) -> str:
        """How many there are, from when, and how large."""
        found = self._present()
        if not found:
            return f"Snapshots('{self.folder}'): none yet"
        indices = [one["update_index"] for one in found]
        names = ", ".join(self._log.averages)
        dtypes = ", ".join(sorted({one["dtype"] for one in found}))
        text = (
            f"Snapshots('{self.folder}'): {len(found)} of {len(self._log.averages)} averages "
            f"({names}), from update {min(indices)} to {max(indices)}, "
            f"{sum(one['size'] for one in found) / 1e6:.1f} MB in {dtypes}"
        )
        reasons = "; ".join(reason for _, reason in self._log.inexact)
        return f"{text}; inexact: {reasons}" if reasons else text

    def reconstruct(
        self,
        target: Schedule | Tensor,
        *,
        at: int | None = None,
        approximate: bool = False,
    ) -> Reconstruction:
        """Rebuild an average that was not tracked, as a combination of the snapshots.

        In fp64, tensor by tensor: beside the result it takes the memory of a few tensors. With
        tqdm a terminal shows the progress. A sync or load of all averages is the target's too.

        Args:
            target: Any schedule; or the weights of the updates' online weights, a tensor [at] of
                values from 0 on, which are divided by their sum.
            at: After which update; by default the last snapshot's.
            approximate: Whether to accept an inexact log, and a target that is out of reach, with a
                warning.

        Raises:
            ValueError: There are no snapshots, the log is inexact or ends before `at`, or the
                profile error is above 20 % (above 2 % it is a warning); or the files do not fit
                each other.
            TypeError: The target is neither a schedule nor a tensor.
            ImportError: safetensors is not installed.
        """
        systems = self.solve([target], at=at, approximate=approximate)
        return add_up(self.folder, systems)[0]

    def reconstruct_all(
        self,
        targets: Sequence[Schedule | Tensor],
        *,
        at: int | None = None,
        approximate: bool = False,
    ) -> list[Reconstruction]:
        """The same of several targets, in one pass over the files."""
        systems = self.solve(targets, at=at, approximate=approximate)
        return add_up(self.folder, systems)

    def solve(
        self, targets: Sequence[Schedule | Tensor], *, at: int | None, approximate: bool
    ) -> Systems:
        """What `reconstruct` solves, from the log alone."""
        entries = self._present()
        if not entries:
            raise ValueError(
                f"There are no snapshots in '{self.folder}', so there is nothing to combine. Give "
                "the folder in which a training saves them: Snapshots(folder).save(ema)."
            )
        return solve_for(targets, self._log, entries, at, approximate=approximate)


def averages_of(ema: ModelEMA | EMABank) -> dict[str, ModelEMA]:
    """The averages by name; that of a `ModelEMA` is called "ema"."""
    if isinstance(ema, EMABank):
        return dict(ema)
    if isinstance(ema, ModelEMA):
        return {"ema": ema}
    raise TypeError(
        f"Snapshots are made of a ModelEMA or an EMABank, but got a {type(ema).__name__}. Of an "
        "EMAHandler, give handler.ema."
    )


def _on_rank0(function: Callable[[], list[T]], together: bool) -> list[T]:
    """What it returns on rank 0; on the others the same if all call this together, else nothing."""
    if together:
        return collectives.on_rank0(function)
    return function() if collectives.is_rank0() else []
