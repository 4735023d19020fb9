"""`Snapshots`: a training's averages in a folder, and any other average rebuilt from them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import torch
from torch import Tensor

from ema_triton.bank import EMABank
from ema_triton.checkpoint.interop import (
    import_safetensors,
    read_file,
    replacing,
    write_safetensors,
)
from ema_triton.distributed import collectives, dtensor
from ema_triton.model_ema import ModelEMA
from ema_triton.modules import are_sharded
from ema_triton.ops.precision import RESIDUAL_DTYPE, as_real, join_residual
from ema_triton.pairing import FLOATS, quoted
from ema_triton.posthoc.log import ALL, Log
from ema_triton.posthoc.reconstruct import Reconstruction, rebuild, solve_for
from ema_triton.schedules import PowerFunction, Schedule, check_count
from ema_triton.selection import Selection

Entry = dict[str, Any]  # what the log says of a file

LOG, NEW, KEY = "log.json", ".new", "snapshot"
EMA = "ema_model."  # what the names begin with in ema-pytorch's files


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
        dtype: Of the averages in new snapshots: float32, bfloat16, float16, or float64.

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
        if dtype not in FLOATS:
            names = ", ".join(map(str, FLOATS))
            raise ValueError(f"dtype, of the files, can only be one of {names}, but got {dtype!r}.")
        self.folder, self.dtype = Path(folder), dtype
        self._log = Log()
        if (self.folder / LOG).exists():
            self._log = Log.from_text((self.folder / LOG).read_text(encoding="utf-8"))

    @classmethod
    def from_ema_pytorch(
        cls,
        folder: str | os.PathLike[str],
        schedules: Sequence[PowerFunction],
        *,
        update_every: int = 100,
        exclude: str | Sequence[str] = (),
    ) -> Snapshots:
        """The checkpoints of ema-pytorch's `PostHocEMA`, to reconstruct from them.

        The files do not say which averages they are of: give what `PostHocEMA` was given. An update
        index counts its updates: after n of its steps it is (n - 1) // update_every + 1.

        Args:
            folder: Its `checkpoint_folder`.
            schedules: Those of its `sigma_rels` or `gammas`, in its order.
            update_every: Its argument; not passed on to it, it was 100.
            exclude: Patterns of names, as of `ModelEMA`, of its `param_or_buffer_names_no_ema`.

        Raises:
            ValueError: There are files of other averages, or without an average's weights.

        Examples:
            >>> pair = [PowerFunction(sigma_rel=0.05), PowerFunction(sigma_rel=0.28)]
            >>> Snapshots.from_ema_pytorch("folder", pair, update_every=10)  # doctest: +SKIP
        """
        every, snapshots = check_count("update_every", update_every), cls(folder)
        matches = [re.fullmatch(r"(\d+)\.(\d+)\.pt", path.name) for path in Path(folder).glob("*")]
        files = sorted((int(one[2]), int(one[1]), one[0]) for one in matches if one)
        numbers = sorted({number for _, number, _ in files})
        if numbers != [*range(len(schedules))]:
            raise ValueError(
                f"'{folder}' has files of the averages {', '.join(map(str, numbers)) or 'none'}, "
                f"by their names, <average>.<step>.pt, but {len(schedules)} schedules were given. "
                "Give those of all of PostHocEMA's sigma_rels or gammas, which no file has."
            )
        last = files[-1][-1]
        saved: Any = read_file(Path(folder) / last, mapped=True)
        names = [name[len(EMA) :] for name in saved if str(name).startswith(EMA)]
        if not names:
            raise ValueError(f"'{last}' in '{folder}' has no tensor named {EMA}*, as PostHocEMA's.")
        selection = Selection.of(None, exclude, None)
        selection.check(names, names)
        averaged = [name for name in names if selection.scale([name]) is not None]
        of_all = {
            "dtype": str(saved[EMA + names[0]].dtype).removeprefix("torch."),
            "prefix": EMA,
            "token": None,
            "factors": dict.fromkeys(averaged, 1.0),
            "copied": [name for name in names if name not in averaged],
            "complex": [],
            "ties": {},
        }
        log = snapshots._log = Log([f"{schedule.sigma_rel:.3g}" for schedule in schedules])
        for step in range(1, files[-1][0] + 1, every):
            # Before the first update KarrasEMA copies the online weights.
            decays = ((1 - 1 / (step + 1)) ** (1 + schedule.gamma) for schedule in schedules)
            log.momenta.extend(1.0 if step == 1 else 1 - decay for decay in decays)
        for step, number, file in files:
            updates = -(-step // every)
            at = {"file": file, "average": number, "update_index": updates, "events": updates}
            log.snapshots.append({**at, **of_all})
        return snapshots

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
                f"{quoted(self._log.averages)}, but got {quoted([*averages])}. Give another folder."
            )
        self._log.averages = [*averages]
        for number, average in enumerate(averages.values()):
            average._planner.recorder = partial(self._record, number if len(averages) > 1 else ALL)
        ema._planner.recorder = partial(self._record, ALL)

    def _record(self, *event: Any) -> None:  # noqa: ANN401  # as `Log.record` has them
        self._log.record(*event)  # of a log that `load_state_dict` may have replaced

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
        log = self._log
        with ema._lock, torch.no_grad():
            log.align(ema.update_index)
            log.assume([average.schedule for average in averages.values()])
            for average in averages.values():
                self._mark_inexact(average)
            if ema._planner.captured:
                log.mark("a CUDA graph has an update, whose replays are not seen")
            sharded = any(are_sharded(average._state.slots()) for average in averages.values())
            if not sharded and not collectives.is_rank0():
                return
            on_rank0: Any = collectives.on_rank0 if sharded else lambda function: function()
            entries: list[Entry] = []
            for number, (name, average) in enumerate(averages.items()):
                state = average.state_dict(full_state_dict=sharded)
                entry = {
                    "file": f"{ema.update_index:08d}-{quote(name, safe=' ')}.safetensors",
                    "average": number,
                    "update_index": log.updates,
                    "events": log.events,
                    "dtype": str(self.dtype).removeprefix("torch."),
                    "token": uuid4().hex,  # no file of an abandoned run has it
                }
                entries.append(on_rank0(partial(self._write, average, state, entry)))
            files = {entry["file"] for entry in entries}
            log.snapshots = [one for one in log.snapshots if one["file"] not in files] + entries
            on_rank0(partial(self._publish, files))

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

    def _write(self, average: ModelEMA, state: Mapping[str, Any], entry: Entry) -> Entry:
        """Write one average's file, where it does not count yet; a tied tensor once."""
        new = self.folder / NEW
        if entry["average"] == 0:
            shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        new.mkdir(parents=True, exist_ok=True)
        factors, ties = dict[str, float](), dict[str, str]()
        for pair in average._planner.latest().averaged:
            first, *others = [name for name in pair.names if name in state["weights"]] or [""]
            ties |= dict.fromkeys(others, first)
            if first and pair.scale is not None:
                factors[first] = pair.scale
        tensors = {name: value for name, value in state["weights"].items() if name not in ties}
        for name in factors:
            value, residual = as_real(tensors[name]), state["residuals"].get(name)
            exact = value if residual is None else join_residual(value, residual)
            tensors[name] = exact.to("cpu", self.dtype, copy=True)
            if bool(tensors[name].isinf().any()) and not bool(exact.isinf().any()):
                raise ValueError(
                    f"'{name}' has values up to {float(exact.abs().max()):.3g}, too large for "
                    f"{self.dtype}. Nothing was written. Give Snapshots another dtype."
                )
        described = {
            "token": entry["token"],
            "factors": factors,
            "copied": [name for name in tensors if name not in factors],
            "complex": [name for name in factors if state["weights"][name].is_complex()],
            "ties": ties,
        }
        metadata = {KEY: json.dumps(described), **ties}
        write_safetensors(new / entry["file"], tensors, entry["update_index"], metadata)
        return entry

    def _publish(self, files: Iterable[str]) -> None:
        """Show the new files, and then the log that tells of them."""
        for file in files:
            os.replace(self.folder / NEW / file, self.folder / file)
        with replacing(self.folder / LOG) as new:
            Path(new).write_text(self._log.to_text(), encoding="utf-8")
        shutil.rmtree(self.folder / NEW)

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
            path, described = self.folder / entry["file"], entry
            if path.exists():
                if "factors" not in entry:
                    with safetensors.safe_open(path, framework="pt") as file:
                        described = json.loads((file.metadata() or {}).get(KEY, "{}"))
                if described.get("token") == entry["token"]:
                    found.append({**entry, **described, "size": path.stat().st_size})
        return found

    def __repr__(self) -> str:
        """How many there are, from when, and how large."""
        text, found, names = f"Snapshots('{self.folder}'): ", self._present(), self._log.averages
        if not found:
            return f"{text}none yet"
        first, last = (found[number]["update_index"] for number in (0, -1))
        size = sum(one["size"] for one in found) / 1e6
        text += f"{len(found)} of {len(names)} averages ({', '.join(names)}), from update {first} "
        text += f"to {last}, {size:.1f} MB in {', '.join(sorted({one['dtype'] for one in found}))}"
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
        return self.reconstruct_all([target], at=at, approximate=approximate)[0]

    def reconstruct_all(
        self,
        targets: Sequence[Schedule | Tensor],
        *,
        at: int | None = None,
        approximate: bool = False,
    ) -> list[Reconstruction]:
        """The same of several targets, in one pass over the files."""
        found = self._present()
        solved = solve_for(targets, self._log, found, at, approximate=approximate)
        return rebuild(self.folder, solved)


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
