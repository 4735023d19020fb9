"""`EMABank`: several averages of one model, each with a schedule, updated together."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ema_triton import arguments
from ema_triton.checkpoint.state_dict import read_several, restore_several
from ema_triton.distributed import collectives
from ema_triton.following import Following
from ema_triton.interrupts import DeferSigint
from ema_triton.model_ema import ModelEMA
from ema_triton.modules import slots_of, unwrap
from ema_triton.ops import foreach_backend
from ema_triton.planner import Planner
from ema_triton.schedules import Schedule
from ema_triton.swap import Swap, refuse_inside

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ema_triton.arguments import Options


class EMABank(Mapping[str, ModelEMA]):
    """Several exponential moving averages of one model's weights, in one launch per update.

    Which decay is best is known after the training only. It is a mapping from names to `ModelEMA`,
    to be evaluated, saved and measured as any other, and bit by bit what each would be alone; only
    `update` and `follow` are the bank's. An update looks once whether a tensor has moved, and on a
    GPU reads the online weights once for up to three averages. (One whose momentum is 1 in an
    update, or a tensor, takes a launch of its own then.)

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

    Examples:
        >>> from ema_triton import PowerFunction
        >>> model = torch.nn.Linear(2, 1)
        >>> bank = EMABank(model, {s: PowerFunction(sigma_rel=float(s)) for s in ("0.05", "0.10")})
        >>> bank.update()
        >>> bank.update_index, [*bank]
        (1, ['0.05', '0.10'])
    """

    def __init__(
        self,
        model: nn.Module,
        schedules: Mapping[str, Schedule],
        *,
        handle_buffers: str = "copy",
        **options: Unpack[Options],
    ) -> None:
        arguments.check_schedules(schedules)
        arguments.check_options(EMABank, options, ModelEMA)
        if options.get("ema_model") is not None:
            raise ValueError(
                "ema_model was given, but each average has one of its own. Leave it out."
            )
        self._averages = {
            name: ModelEMA(model, handle_buffers=handle_buffers, **options) for name in schedules
        }
        self._model = unwrap(model)
        self.handle_buffers = handle_buffers
        self._following: Following | None = None
        self._lock = threading.RLock()
        self._join()
        self.schedule = schedules
        states = [average._state for average in self.values()]
        self._planner = Planner(self.model, states, options.get("backend", "auto"))
        self._planner.make(slots_of(self.model))

    def _join(self) -> None:
        """Have the averages updated here alone, and by one thread at a time."""
        for name, average in self.items():
            average._lock, average._name_in_bank = self._lock, name

    def __getitem__(self, name: str) -> ModelEMA:
        if name not in self._averages:
            raise KeyError(f"There is no average {name!r} in this bank, but {', '.join(self)}.")
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    @property
    def model(self) -> nn.Module:
        """The online model, unwrapped."""
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        next(iter(self.values())).model = model  # an AttributeError that says why

    @property
    def ema_model(self) -> NoReturn:
        """A RuntimeError: each average has its own."""
        raise RuntimeError(
            f"There are several EMA models, one of each average: {', '.join(self)}. Take one, e.g. "
            f"bank[{next(iter(self))!r}].ema_model."
        )

    @property
    def schedule(self) -> dict[str, Schedule | None]:
        """Each average's function from the update index to the momentum; may be assigned."""
        return {name: average.schedule for name, average in self.items()}

    @schedule.setter
    def schedule(self, schedules: Mapping[str, Schedule]) -> None:
        arguments.check_schedules(schedules)
        arguments.check_names("schedule", schedules, self)
        for name, average in self.items():
            average.schedule = schedules[name]

    @property
    def update_index(self) -> int:
        """The number of updates made; may be assigned, to all averages."""
        return max(average.update_index for average in self.values())

    @update_index.setter
    def update_index(self, index: int) -> None:
        for average in self.values():
            average.update_index = index

    def next_momentum(self) -> dict[str, float]:
        """The schedules' momenta for the next update, by name."""
        return {name: average.next_momentum() for name, average in self.items()}

    @_disable_dynamo
    def update(self, momentum: Mapping[str, float | Tensor] | None = None) -> None:
        """Move every average towards the online model, by its schedule.

        Args:
            momentum: By name, as of `ModelEMA.update`, instead of the schedules'.

        Raises:
            ValueError: A name is missing or unknown; and as of `ModelEMA.update`.
            RuntimeError: As of `ModelEMA.update`.
        """
        given = self.next_momentum() if momentum is None else momentum
        arguments.check_names("momentum", given, self)
        momenta = [arguments.check_momentum(given[name]) for name in self]
        with self._lock, torch.no_grad():
            plan, online = self._planner.outside_swap(self._swap, "update()")
            for number, average in enumerate(self.values()):
                launches = [launch for launch in plan.launches if launch.state_number == number]
                average._check_fits(momenta[number], launches)
            self._planner.update(plan, online, *momenta)

    @_disable_dynamo
    def sync(self) -> None:
        """Copy the online model into every average; see `ModelEMA.sync`."""
        with self._lock, DeferSigint(), torch.no_grad():
            foreach_backend.sync(*self._planner.outside_swap(self._swap, "sync()"))
            self._planner.record("sync")

    @property
    def _swap(self) -> Swap | None:
        """That of the average whose `swapped()` is entered, if one is."""
        return next((one._swap for one in self.values() if one._swap is not None), None)

    def follow(self, optimizer: object, *, every: int = 1) -> Following:
        """Update after every step that the optimizer really makes, or after every n-th.

        Arguments, result and errors are those of `ModelEMA.follow`, without the schedule.
        """
        self._following = Following(optimizer, self.model, self.update, every, self._following)
        return self._following

    def state_dict(self, *, clone: bool = False, full_state_dict: bool = False) -> dict[str, Any]:
        """The averages' states by name; each of them, and the arguments, as of `ModelEMA`."""
        with self._lock:
            states = {
                name: average.state_dict(clone=clone, full_state_dict=full_state_dict)
                for name, average in self.items()
            }
        return {"averages": states} if any(states.values()) else {}

    def load_state_dict(
        self, state: Mapping[str, Any] | None, *, full_state_dict: bool = False, strict: bool = True
    ) -> None:
        """Load what `state_dict` returned: all averages, or none if one does not fit.

        Arguments and warnings are those of `ModelEMA.load_state_dict`, for each average.

        Raises:
            ValueError: The state is not a bank's, has other names, or does not fit.
            RuntimeError: The models' weights are swapped.
        """
        emas = {name: average._state for name, average in self.items()}
        with self._lock, torch.no_grad():
            refuse_inside(self._swap, "load_state_dict()")
            if full_state_dict:
                self._planner.reshard()
                collectives.on_rank0(lambda: self._check_state(state))
            else:
                self._check_state(state)
            found = read_several(state, emas, full_state_dict=full_state_dict, strict=strict)
            self._planner.current()  # replaced tensors are in the states' buckets again
            with DeferSigint():
                said = restore_several(found, emas)
                self._planner.plan.wrote()
                for average in self.values():  # each has loaded weights of its own
                    average._planner.record("load_state_dict()")
        for remark in said:
            warnings.warn(remark, UserWarning, stacklevel=2)

    def _check_state(self, state: object) -> None:
        if not isinstance(state, Mapping) or not isinstance(state.get("averages"), Mapping):
            got = f"keys {[*state][:5]}" if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                "The state must be what EMABank.state_dict() returned, with 'averages', but got "
                f"{got}. One average's state is loaded by bank[name].load_state_dict()."
            )
        arguments.check_names("The state", state["averages"], self)

    def __getstate__(self) -> dict[str, Any]:
        """Without what follows an optimizer, which a copy does not."""
        return {**self.__dict__, "_following": None, "_lock": None}

    __deepcopy__ = ModelEMA.__deepcopy__  # under the lock, by the two methods beside it

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())
        self._join()
