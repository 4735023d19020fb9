"""Where a tensor was, to be put back there whatever became of it."""

from __future__ import annotations

from torch import Tensor

from ema_triton import shards
from ema_triton.pairs import elements


class Place:
    """A slot, the tensor in it, and that tensor's memory; `part` is what of it is on this rank."""

    def __init__(self, owner: dict[str, Tensor | None], key: str, tensor: Tensor) -> None:
        self.owner, self.key, self.tensor = owner, key, tensor
        self.part: Tensor = shards.local(tensor)
        self._data = self.part.detach()

    def put_back(self) -> bool:
        """Whether another tensor, or other memory, was there."""
        found = self.owner.get(self.key) is not self.tensor
        if found:
            self.owner[self.key] = self.tensor
        if shards.local(self.tensor) is not self.part:
            self.tensor._local_tensor = self.part  # type: ignore[attr-defined]
            found = True
        if elements(self.part) != elements(self._data):
            self.part.data = self._data
            found = True
        return found
