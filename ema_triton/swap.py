"""Exchanging the online and the EMA model's values in place, for an evaluation, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ema_triton.distributed import dtensor
from ema_triton.pairing import memory_key, quoted
from ema_triton.plan import Launch, Plan


class Swap:
    """The online model has the EMA's values from `enter` to `leave`, at its own addresses.

    Where both sides have one dtype they change places, and what an exact EMA has beside its weights
    stays where it is. Elsewhere, and for the tensors that are copied at each update, the online
    values wait in a copy, and the EMA model keeps its own.
    """

    def __init__(self, model: nn.Module, ema_model: nn.Module | None, plan: Plan) -> None:
        self._models = [model] if ema_model is None else [model, ema_model]
        self._plan = plan
        self.stream = torch.cuda.current_stream() if plan.on_cuda else None
        overlapping = self._overlapping = _overlapping(plan.launches)
        self._in_place = [
            launch
            for launch in plan.launches
            if launch.kind.dtype == launch.online_dtype
            and launch.dense
            and launch not in overlapping
        ]
        aside = [launch for launch in plan.launches if launch not in self._in_place]
        online = plan.copies.read()
        assert online is not None  # the plan is not stale
        kept = [(pair.online_slots[0].read(), pair.ema_slots[0].read()) for pair in plan.sync_only]
        # Online tensors that wait, and what they hold meanwhile.
        self._aside = [
            *((o, e) for one in aside for o, e in zip(one.sources, one.targets, strict=True)),
            *zip(online, plan.copies.ema, strict=True),
            *((o, e) for o, e in kept if o is not None and e is not None),
        ]
        for tensor, _ in self._aside:
            _check_writable(tensor)
        self._waiting: list[Tensor] = []
        self._exchanged: list[Launch] = []
        names = {name for launch in self._in_place for name in launch.names}
        self._pairs = plan.averaged
        self._moved = [pair for pair in self._pairs if pair.name in names]
        self._places = [
            Snapshot(slot.owner, slot.key, whole)
            for pair in self._pairs
            for slot in (*pair.online_slots, *pair.ema_slots)
            if (whole := slot.whole()) is not None
        ]
        self._copies = [
            Snapshot(owner, key, owner[key])
            for owner, key in zip(plan.copies.owners, plan.copies.keys, strict=True)
        ]
        self._versions: list[int] = []
        self._warning: Any = None

    def enter(self) -> None:
        """Put the EMA's values into the online model; if that fails, it has its own again."""
        dtensor.reshard(*self._models)
        self._waiting = [tensor.detach().clone() for tensor, _ in self._aside]
        try:
            with torch.no_grad():
                for launch in self._in_place:
                    launch.backend.exchange(launch)
                    self._exchanged.append(launch)
                for tensor, value in self._aside:
                    tensor.detach().copy_(value)
                self._check_overlapping()
        except BaseException:
            self._restore()
            raise
        self._tell()
        self._versions = self._current_versions()
        self._warning = self._models[0].register_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _warn_of_ema_values
        )

    def leave(self) -> None:
        """Put both sides' values back, whatever became of the tensors meanwhile; warn of writes."""
        self._warning.remove()
        dtensor.reshard(*self._models)  # what was gathered is the EMA's
        versions = self._current_versions()
        written = {
            id(place.part)
            for place, before, now in zip(self._places, self._versions, versions, strict=True)
            if before != now
        }
        replaced = [place.restore() for place in self._places]
        for place in self._copies:
            place.restore()
        self._restore()
        self._tell()
        touched = [p for p in self._pairs if {id(p.online), id(p.ema)} & written]
        if touched or any(replaced):
            what = [pair.name for pair in touched] or ["a tensor"]
            warnings.warn(
                f"{quoted(what)} was written, or replaced, while the models' weights were swapped "
                "(by an optimizer's step, a load_state_dict, a cast?). What was written into the "
                "online model went into the EMA's values, and what was replaced is as before. "
                "Leave the swap before training on.",
                UserWarning,
                stacklevel=4,
            )

    def outside(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The EMA model's weights, some of whose values are in the online model now."""
        online = {name: pair.online.detach() for pair in self._moved for name in pair.names}
        return {
            name: dtensor.wrap_like(online[name], value) if name in online else value
            for name, value in weights.items()
        }

    def _restore(self) -> None:
        with torch.no_grad():
            while self._exchanged:
                self._exchanged[-1].backend.exchange(self._exchanged[-1])
                self._exchanged.pop()
            for (tensor, _), value in zip(self._aside, self._waiting, strict=True):
                tensor.detach().copy_(value)
        self._waiting = []

    def _check_overlapping(self) -> None:
        """Online tensors that share memory cannot hold different values of the EMA."""
        for launch in self._overlapping:
            for name, online, ema in zip(launch.names, launch.sources, launch.targets, strict=True):
                if not torch.equal(online.nan_to_num(), ema.to(online.dtype).nan_to_num()):
                    raise ValueError(
                        f"'{name}' shares its memory with another tensor of the online model, but "
                        "not its values with that one's in the EMA model, so the online model "
                        "cannot hold both. Tie them before building the EMA, or evaluate ema_model."
                    )

    def _tell(self) -> None:
        """Autograd, which sees no kernel's writes."""
        torch.autograd.graph.increment_version(
            [
                tensor
                for pair in self._moved
                for tensor in dtensor.version_owners(pair.online_slots[0].whole())
                if not tensor.is_inference()
            ]
        )
        self._plan.bump_versions()

    def _current_versions(self) -> list[int]:
        return [dtensor.version(place.tensor) for place in self._places]


def _overlapping(launches: Iterable[Launch]) -> list[Launch]:
    """Those with an online tensor that shares memory with another one.

    Exchanged one after the other such tensors would not come back as they were.
    """
    launches = [*launches]
    spans = sorted(
        (source.data_ptr(), source.data_ptr() + _extent(source), number)
        for number, launch in enumerate(launches)
        for source in launch.sources
    )
    found, last, owner = set(), 0, 0
    for begin, end, number in spans:
        if begin < last:
            found |= {owner, number}
        if end > last:
            last, owner = end, number
    return [launch for number, launch in enumerate(launches) if number in found]


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _check_writable(tensor: Tensor) -> None:
    if any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(
            f"An online tensor of shape {tuple(tensor.shape)} is expanded: several of its elements "
            "share one place in memory, which cannot hold the EMA's values of all of them. Assign "
            "a contiguous copy of it to the model before swapping."
        )


def _warn_of_ema_values(module: nn.Module, prefix: str, keep_vars: bool) -> None:  # noqa: ARG001
    warnings.warn(
        "The online model's state_dict() is asked for while it holds the EMA's weights. A "
        "checkpoint of the training made of it would resume from those. Save it outside of "
        "swapped(); the EMA's weights are in ema.state_dict().",
        UserWarning,
        stacklevel=3,
    )


class Snapshot:
    """A slot, the tensor in it, and that tensor's memory; `part` is what of it is on this rank."""

    def __init__(self, owner: dict[str, Tensor | None], key: str, tensor: Tensor) -> None:
        self.owner, self.key, self.tensor = owner, key, tensor
        self.part: Tensor = dtensor.local_part(tensor)
        self._data = self.part.detach()

    def restore(self) -> bool:
        """Whether another tensor, or other memory, was there."""
        found = self.owner.get(self.key) is not self.tensor
        if found:
            self.owner[self.key] = self.tensor
        if dtensor.local_part(self.tensor) is not self.part:
            self.tensor._local_tensor = self.part  # type: ignore[attr-defined]
            found = True
        if memory_key(self.part) != memory_key(self._data):
            self.part.data = self._data
            found = True
        return found
