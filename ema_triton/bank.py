"""`EMABank`: several averages of one model, each with a schedule, updated together."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ema_triton import arguments
from ema_triton.checkpoint.state_dict import SavedState, scatter_state
from ema_triton.following import Following
from ema_triton.model_ema import ModelEMA
from ema_triton.modules import slots_of
from ema_triton.planner import Planner
from ema_triton.schedules import Schedule, check_schedule
from ema_triton.swap import refuse_inside

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ema_triton.arguments import Options


class EMABank(Mapping[str, ModelEMA]):
    r"""Several exponential moving averages of one model's weights, in one launch per update.

    Which decay is best is known after the training only. An update looks once whether a tensor has
    moved, and on a GPU reads the online weights once for up to three averages: 4 + 8 K bytes per
    fp32 parameter instead of 12 K. The averages are bit by bit what K `ModelEMA` would be. (One
    whose momentum is 1 in an update, or a tensor, takes a launch of its own then.)

    It is a mapping from names to `ModelEMA`, to be evaluated, saved and measured as any other;
    only `update` and `follow` are the bank's.

    Args:
        model: The online model, as of `ModelEMA`.
        schedules: By name, the function from the update index, counting from 1, to the momentum of
            each average.
        handle_buffers: As of `ModelEMA`.
        **options: The other keyword arguments of `ModelEMA`, for all averages, but for `ema_model`.

    Raises:
        ValueError: There is no schedule, or an argument is not one of the accepted values.
        TypeError: A name is no string, a schedule no function, or an argument is unknown.
        RuntimeError: The model cannot be copied, or backend="triton" cannot run here.

    Example:
        >>> from ema_triton import PowerFunction
        >>> model = torch.nn.Linear(2, 1)
        >>> bank = EMABank(model, {s: PowerFunction(sigma_rel=float(s)) for s in ("0.05", "0.10")})
        >>> bank.update()
        >>> bank.update_index, [*bank]
        (1, ['0.05', '0.10'])
        >>> torch.equal(bank["0.05"].ema_model.weight, model.weight)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        schedules: Mapping[str, Schedule],
        *,
        handle_buffers: str = "copy",
        **options: Unpack[Options],
    ) -> None:
        _check_schedules(schedules)
        arguments.check_options("EMABank", options, EMABank, ModelEMA)
        if options.get("ema_model") is not None:
            raise ValueError(
                "An EMABank makes an EMA model for each of its averages, but ema_model was given, "
                "which cannot be all of them. Leave it out."
            )
        self._averages = {
            name: ModelEMA(model, handle_buffers=handle_buffers, **options) for name in schedules
        }
        first = next(iter(self._averages.values()))
        self._model, self.handle_buffers = first.model, handle_buffers
        self._following: Following | None = None
        self._join()
        self.schedule = schedules
        states = [average._state for average in self.values()]
        self._planner = Planner(self._model, states, options.get("backend", "auto"))
        self._planner.make(slots_of(self._model))

    def _join(self) -> None:
        """Have one lock for all averages, and have them updated here alone."""
        self._lock = threading.RLock()
        for name, average in self.items():
            average._lock, average._name_in_bank = self._lock, name

    def __getitem__(self, name: str) -> ModelEMA:
        if name not in self._averages:
            raise KeyError(f"There is no average {name!r}. The bank has {self._listed()}.")
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    # As of objects; a mapping's would compare tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def model(self) -> nn.Module:
        """The online model, unwrapped."""
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        next(iter(self.values())).model = model  # an AttributeError that says why

    @property
    def ema_model(self) -> NoReturn:
        """An error that names the averages.

        Raises:
            RuntimeError: Each average has an EMA model of its own.
        """
        raise RuntimeError(
            "There is no single ema_model: each average has its own. Take that of one of them, "
            f"e.g. bank[{next(iter(self))!r}].ema_model. The bank has {self._listed()}."
        )

    @property
    def schedule(self) -> dict[str, Schedule]:
        """Each average's function from the update index to the momentum; may be assigned."""
        return {name: average._schedule_set() for name, average in self.items()}

    @schedule.setter
    def schedule(self, schedules: Mapping[str, Schedule]) -> None:
        _check_schedules(schedules)
        self._check_names("schedule", schedules)
        for name, average in self.items():
            average.schedule = schedules[name]

    @property
    def update_index(self) -> int:
        """The number of updates made; may be assigned."""
        return max(average.update_index for average in self.values())

    @update_index.setter
    def update_index(self, index: int) -> None:
        for average in self.values():
            average.update_index = index

    @property
    def backend(self) -> str:
        """What runs: "triton" or "foreach"."""
        return self._planner.latest().backend

    @property
    def backend_reason(self) -> str:
        """Why that backend was chosen, and what the foreach backend does instead."""
        return self._planner.latest().reason

    def next_momentum(self) -> dict[str, float]:
        """The schedules' momenta for the next update, by name."""
        return {name: average.next_momentum() for name, average in self.items()}

    @_disable_dynamo
    def update(self, momenta: Mapping[str, float | Tensor] | None = None) -> None:
        """Move every average towards the online model, each by its own momentum.

        Args:
            momenta: By name, instead of the schedules'; each as for `ModelEMA.update`.

        Raises:
            ValueError: A momentum is missing, unknown or out of range, or an averaged tensor
                changed its shape or vanished.
            RuntimeError: A tensor moved during CUDA graph capture; or the models' weights are
                swapped.
        """
        if momenta is None:
            momenta = self.next_momentum()
        self._check_names("momenta", momenta)
        checked = [arguments.check_momentum(momenta[name]) for name in self]
        with self._lock, torch.no_grad():
            swaps = (average._swap for average in self.values() if average._swap is not None)
            plan, online = self._planner.outside_swap(next(swaps, None), "update()")
            for average, momentum in zip(self.values(), checked, strict=True):
                average._warn_if_it_stands_still(momentum, plan.launches)
            self._planner.update(plan, online, *checked)
            for average in self.values():
                average.update_index += 1

    def sync(self) -> None:
        """Copy the online model into every average; see `ModelEMA.sync`."""
        for average in self.values():
            average.sync()

    def follow(self, optimizer: object, *, every: int = 1) -> Following:
        """Update after every step that the optimizer really makes, or after every n-th.

        Arguments, result and errors are those of `ModelEMA.follow`, without a schedule.
        """
        self._following = Following(optimizer, self._model, self.update, every, self._following)
        return self._following

    def state_dict(self, *, clone: bool = False, full_state_dict: bool = False) -> dict[str, Any]:
        """The averages' states by name; see `ModelEMA.state_dict` for each and for the arguments.

        On other ranks than 0 the states are empty with `full_state_dict`.
        """
        states = {
            name: average.state_dict(clone=clone, full_state_dict=full_state_dict)
            for name, average in self.items()
        }
        return {"averages": states}

    def load_state_dict(
        self,
        state: Mapping[str, Any] | None,
        *,
        full_state_dict: bool = False,
        strict: bool = True,
    ) -> None:
        """Load what `state_dict` returned, all averages or, if one does not fit, none.

        Arguments and errors are those of `ModelEMA.load_state_dict`, for each average.

        Raises:
            ValueError: The state is no bank's, has other names, or does not fit.
            RuntimeError: The models' weights are swapped.
        """
