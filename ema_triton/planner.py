"""The plan of EMAs as their tensors lie now: made anew when one has moved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ema_triton.backend import choose
from ema_triton.distributed import dtensor
from ema_triton.modules import Slots, slots_of
from ema_triton.plan import Plan, make_plan
from ema_triton.state import EMAState
from ema_triton.swap import Swap, open_swaps, refuse_inside

logger = logging.getLogger("ema_triton")


class Planner:
    """Has the plan of an online model and its EMAs' states, and replaces it when it is stale.

    Args:
        model: The online model.
        states: Of one EMA, or of several that are updated together.
        backend: "auto", "triton" or "foreach".

    Attributes:
        plan: The latest plan.
        captured: Plans whose chunk tables CUDA graphs go on reading.
        recorder: Told what happens to the EMAs, if there is one: the kind, the update index, and
            the momenta of an update. A copy has none.
    """

    def __init__(self, model: nn.Module, states: Sequence[EMAState], backend: str) -> None:
        self._model, self._states, self._backend = model, states, backend
        self.plan = Plan.unknown()
        self.captured: list[Plan] = []
        self.recorder: Callable[[str, int, Sequence[float | Tensor]], None] | None = None

    def latest(self) -> Plan:
        """The latest plan, stale or not; the first one of a copy."""
        return self.plan if self.plan.reason else self.make(slots_of(self._model))

    def current(self) -> tuple[Plan, list[Tensor]]:
        """A plan that is not stale, and the online tensors that it copies."""
        online = self.plan.online_copies()
        if online is None:
            # Perhaps a forward has only gathered the shards.
            dtensor.reshard_fsdp2(self._model)
            self.reshard()
            online = self.plan.online_copies()
        if online is None:
            online = self.make(slots_of(self._model)).online_copies()
        assert online is not None  # just planned
        return self.plan, online

    def outside_swap(self, own: Swap | None, what: str) -> tuple[Plan, list[Tensor]]:
        """The same; raise if the online model is swapped.

        Args:
            own: The swap of this EMA, if it is entered.
            what: The method that needs the online model's own weights.
        """
        refuse_inside(own, what)
        if open_swaps:  # looked at before a new plan copies buffers that are made inside of one
            online = [slot.read() for slot in slots_of(self._model).values()]
            online += [pair.online for pair in self.plan.averaged]
            if any(swap.has_any_of(online) for swap in open_swaps):
                raise RuntimeError(
                    f"{what} while another EMA of this online model is swapped: the online model "
                    "holds that EMA's weights. Leave the context of its swapped() first. Nothing "
                    "was changed."
                )
        return self.current()

    def update(self, plan: Plan, online: list[Tensor], *momenta: float | Tensor) -> None:
        """Make the update of `current`'s plan, with a momentum for each EMA."""
        plan.copies.write(online)
        plan.update(*momenta)
        if plan.on_cuda and torch.cuda.is_current_stream_capturing():
            self.captured.append(plan)  # the graph goes on reading its chunk tables
        if self.recorder is not None:
            self.recorder("update", self._states[0].update_index, momenta)
        for state in self._states:
            state.update_index += 1

    def record(self, kind: str) -> None:
        """Tell the recorder that something else than an update happened."""
        if self.recorder is not None:
            self.recorder(kind, self._states[0].update_index, ())

    def reshard(self) -> None:
        """Have the modules of an EMA model that is sharded show their shards."""
        dtensor.reshard_fsdp2(*[s.module for s in self._states if s.module is not None])

    def make(self, online: Slots, ema_dtype: torch.dtype | None = None) -> Plan:
        """Make a new plan.

        Args:
            online: The online model's slots.
            ema_dtype: Cast the EMA's real floating tensors to it; None leaves their dtypes.

        Raises:
            RuntimeError: A CUDA graph is being captured, or backend="triton" cannot run.
            ValueError: The models' tensors do not fit each other.
            TypeError: A tensor is of a kind that cannot be averaged.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A CUDA graph is being captured, and the EMA is not ready for it: it is new, or a "
                "tensor of the online or the EMA model moved since the last update, and the graph "
                "would keep old addresses. Call update() once after the last change of the models, "
                "then capture."
            )
        devices = {bucket.kind.device for state in self._states for bucket in state.buckets}
        _synchronize(devices)  # updates on other streams may still be writing the EMA
        # Tensors made in inference mode could never be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            pairs = [state.lay_out(self._model, online, ema_dtype) for state in self._states]
            plan = make_plan(self._states, pairs, self._model)
            _synchronize(devices)  # with the last plan, memory is freed that is being copied
            choose(self._backend, plan)
        if plan.reason != self.plan.reason:
            logger.info("EMA backend: %s (%s)", plan.backend, plan.reason)
        old, new = ({*map(id, one.ema_tensors)} for one in (self.plan, plan))
        if old and old != new:
            self.record("replaced")
        self.plan = plan
        return plan

    def __getstate__(self) -> dict[str, Any]:
        """Without plans: their addresses mean nothing to a copy or to another process."""
        return {**self.__dict__, "plan": None, "captured": [], "recorder": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, plan=Plan.unknown())


def _synchronize(devices: set[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
