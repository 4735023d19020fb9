"""Noticing that a plan is stale, and the tensors that are copied at every update.

Both are looked at before every update, in passes that stay in C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, repeat, starmap
from operator import attrgetter, getitem, is_, ne
from typing import Any

import torch
from torch import Tensor, nn

from ema_triton.distributed import dtensor
from ema_triton.modules import Slot
from ema_triton.pairing import Pair


@dataclass(frozen=True, eq=False)
class Staleness:
    """Notices that an averaged tensor or a module was replaced, moved, cast, reshaped or added.

    Attributes:
        look: Yields the addresses, sizes and so on as they are now.
        remembered: What it yielded when the plan was made; None, the default, is always stale.
    """

    look: Callable[[], Iterable[Any]] = list
    remembered: list[Any] | None = None

    @classmethod
    def over(
        cls,
        model: nn.Module,
        ema_models: Sequence[nn.Module],
        pairs: list[Pair],
        shared: Iterable[tuple[Slot, Slot]] = (),
    ) -> Staleness:
        """Remember the models and the pairs' tensors as they are now, and what they share.

        An online tensor that is paired with several EMAs is looked at once.

        Addresses are enough to notice a move, because the plan keeps every storage alive. Sizes,
        strides and conjugation are compared because a view that replaces its tensor may have the
        tensor's address. EMA tensors are written, so they must be the same objects. The strides of
        vectors, and of EMA tensors that stay at their address, are not compared, which saves 0.1 ms
        per 1000 tensors.
        """
        modules = [*model.modules()]
        ema_modules = [module for ema_model in ema_models for module in ema_model.modules()]
        parents = [m._modules for m in (*modules, *ema_modules) if m._modules]
        children = [*map(dict, parents)]
        dicts = [d for m in modules for d in (m._parameters, m._buffers)]
        filled = [d for d in dicts if d]
        empty = [d for d in dicts + [m._modules for m in modules] if not d]
        vacant = [(d, key) for d in filled for key in d if d[key] is None]
        # The strides of the first slots are compared, of matrices: most tensors are vectors, and a
        # dense vector has one stride only.
        places = {(id(s.owner), s.key): (s, p.online) for p in pairs for s in p.online_slots}
        matrices = [slot for slot, online in places.values() if online.dim() > 1]
        vectors = [slot for slot, online in places.values() if online.dim() <= 1]
        strided, online = len(matrices), len(matrices + vectors)
        slots = matrices + vectors + [s for pair in pairs for s in pair.ema_slots]
        owners, keys = [slot.owner for slot in slots], [slot.key for slot in slots]
        originals: list[Any] = [slot.read() for slot in slots]
        ema = originals[online:]
        complex_at = [index for index, tensor in enumerate(originals) if tensor.is_complex()]
        sharded = [dtensor.is_sharded(slot.whole()) for slot in slots]
        any_sharded = any(sharded)
        both = [[(slot.owner, slot.key) for slot in slots] for slots in zip(*shared, strict=True)]

        def look() -> Iterator[Any]:
            tensors: list[Any] = [*map(getitem, owners, keys)]
            if any_sharded:
                tensors = [
                    tensor._local_tensor if is_sharded else tensor
                    for tensor, is_sharded in zip(tensors, sharded, strict=True)
                ]
            yield [*map(Tensor.data_ptr, tensors)]
            yield [*map(Tensor.numel, tensors[:online])]
            yield [*map(Tensor.stride, tensors[:strided])]
            yield all(map(is_, tensors[online:], ema))
            yield any(map(Tensor.is_conj, map(tensors.__getitem__, complex_at)))
            yield parents == children
            yield any(empty)
            yield all(map(is_, starmap(getitem, vacant), repeat(None)))
            yield all(map(is_, *(starmap(getitem, slots) for slots in both))) if both else True
            yield [*map(len, filled)]

        return cls(look, [*look()])

    def is_stale(self) -> bool:
        """Whether anything differs from what was remembered."""
        try:
            return self.remembered is None or any(map(ne, self.look(), self.remembered))
        # A tensor vanished, is None, has no address, or is no longer sharded.
        except (KeyError, TypeError, RuntimeError, AttributeError):
            return True


# The buffers of most models, which keep their sizes: not looking saves 0.05 us for each.
BATCH_NORM_KEYS = ("running_mean", "running_var", "num_batches_tracked")


class Copies:
    """The tensors that are copied at every update, each into an EMA tensor of its own.

    Modules assign buffers anew as a matter of course (`self.count = self.count + 1`), so the online
    ones are read from their slots every time. Those of one kind are a run, next to each other: on
    CUDA `torch._foreach_copy_` copies a list of one dtype in a launch, but a mixed one tensor by
    tensor, which are 159 launches for ResNet-50's means, variances and counts.

    One of another shape takes a new plan, 11 ms for ResNet-50's tensors on a CPU.

    Args:
        pairs: The pairs, with one slot each.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs = sorted(pairs, key=_run)
        slots = [pair.online_slots[0] for pair in pairs] + [pair.ema_slots[0] for pair in pairs]
        self._owners, self._keys = [slot.owner for slot in slots], [slot.key for slot in slots]
        self._sharded = any(dtensor.is_sharded(slot.whole()) for slot in slots)
        self._kinds = [_kind(pair.online) for pair in pairs]
        self._ema = [pair.ema for pair in pairs]
        # Observers of quantization resize their buffers in place, the EMA model's too.
        self._resizable = [
            pair.ema for pair in pairs if pair.ema_slots[0].key not in BATCH_NORM_KEYS
        ]
        self._sizes = [*map(Tensor.numel, self._resizable)]
        ends = [*accumulate(len([*run]) for _, run in groupby(pairs, _run))]
        self._runs = [*map(slice, [0, *ends], ends)]

    def read(self) -> list[Tensor] | None:
        """The online tensors as they are now; None if anything does not fit the plan any more."""
        try:
            tensors: list[Any] = [*map(getitem, self._owners, self._keys)]
            if self._sharded:
                tensors = [*map(dtensor.local_part, tensors)]
            online, ema = tensors[: len(self._ema)], tensors[len(self._ema) :]
            if (
                [*map(_kind, online)] == self._kinds
                and all(map(is_, ema, self._ema))
                and [*map(Tensor.numel, self._resizable)] == self._sizes
            ):
                return online
        except (AttributeError, KeyError):  # a tensor vanished, or is None
            pass
        return None

    def write(self, online: list[Tensor]) -> None:
        """Copy what `read` returned into the EMA tensors."""
        for run in self._runs:
            torch._foreach_copy_(self._ema[run], online[run])


_kind = attrgetter("shape", "dtype", "device", "layout")


def _run(pair: Pair) -> list[str]:
    """What `torch._foreach_copy_` needs to be equal for a launch of several tensors."""
    online, ema = pair.online, pair.ema
    same_strides = online.stride() == ema.stride()
    return [*map(str, (online.dtype, ema.dtype, online.device, same_strides))]
