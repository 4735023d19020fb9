"""`EMAHandler`: a drop-in for Ignite's, on top of `ModelEMA`.

An engine's event asks the schedule for the momentum of the next update, shows it in
`engine.state`, and applies it.
"""

from __future__ import annotations

import numbers
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

try:
    from ignite.engine import (
        CallableEventWithFilter,
        Engine,
        Events,
        EventsList,
        RemovableEventHandle,
        State,
    )
except ImportError as error:
    raise ImportError(
        "ema_triton.EMAHandler attaches to PyTorch-Ignite's engines, and ignite does not import "
        f"({error}). Install it with: pip install pytorch-ignite. Without Ignite, use "
        "ema_triton.ModelEMA."
    ) from error

from ema_triton.model_ema import ModelEMA
from ema_triton.schedules import (
    Constant,
    LinearWarmup,
    Schedule,
    schedule_from_state,
    schedule_to_state,
)

DEFAULT_MOMENTUM = 0.0002

_ENGINE_STATE = {*vars(State()), *State.event_to_attr.values()}


class EMAHandler:
    r"""Keep an exponential moving average of a model's weights while an Ignite engine trains it.

    .. math:: \theta_{EMA} \leftarrow (1 - \lambda)\,\theta_{EMA} + \lambda\,\theta

    The same constructor, `attach`, and `engine.state` attribute as Ignite's `EMAHandler`.

    Args:
        model: The online model. Of a `DistributedDataParallel` or `torch.compile`d model the
            inner module is averaged; `DataParallel` stays.
        momentum: :math:`\lambda`, the weight of the online weights, in [0, 1]; after the warm-up.
        momentum_warmup: The first update's momentum, in [0, 1]; above or below `momentum`.
        warmup_iters: Number of updates until `momentum` is reached, at least 1. Without both of
            them there is no warm-up.
        handle_buffers: "copy" copies the online buffers at every update, "update" averages the
            floating ones, "ema_train" leaves them to the EMA model, which is then in train mode.
        schedule: Any function from the update index, counting from 1, to the momentum, such as
            those of `ema_triton.schedules`; instead of the three arguments above.
        backend: "auto", "triton" or "foreach".
        ema_dtype: dtype of the EMA model's floating tensors, by default that of the model.
        precision: How a bf16 or fp16 EMA takes small steps: "exact", "stochastic" or "nearest"; see
            `ModelEMA`.
        seed: Of the stochastic rounding.

    Attributes:
        ema: The `ModelEMA`.
        schedule: What gives the momentum; may be assigned.
        update_index: The number of updates made.

    Raises:
        ValueError: An argument is not one of the accepted values.
        TypeError: An argument or a tensor is of a wrong type.

    Example:
        >>> from ignite.engine import Engine, Events
        >>> model = nn.Linear(2, 1)
        >>> trainer = Engine(lambda engine, batch: model.weight.data.fill_(batch))
        >>> handler = EMAHandler(model, momentum=0.5)
        >>> handler.attach(trainer)
        >>> _ = handler.ema_model.weight.data.fill_(0.0)
        >>> _ = trainer.run([1.0, 1.0])
        >>> handler.ema_model.weight
        Parameter containing:
        tensor([[0.7500, 0.7500]])
        >>> trainer.state.ema_momentum
        0.5
    """

    # The object that handlers last wrote into each attribute of an engine's state: by its identity
    # a momentum of theirs is told from one that somebody else put there.
    _written: ClassVar[weakref.WeakKeyDictionary[Engine, dict[str, float]]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(
        self,
        model: nn.Module,
        momentum: float = DEFAULT_MOMENTUM,
        momentum_warmup: float | None = None,
        warmup_iters: int | None = None,
        handle_buffers: str = "copy",
        *,
        schedule: Schedule | None = None,
        backend: str = "auto",
        ema_dtype: torch.dtype | None = None,
        precision: str = "exact",
        seed: int = 0,
    ) -> None:
        given = (momentum, momentum_warmup, warmup_iters)
        if schedule is None:
            schedule = _schedule_from_arguments(*given)
        elif given != (DEFAULT_MOMENTUM, None, None):
            raise ValueError(
                f"Both schedule={schedule} and momentum={momentum}, momentum_warmup="
                f"{momentum_warmup}, warmup_iters={warmup_iters} were given, and only one can "
                "decide. Give the schedule alone, or those alone."
            )
        self.schedule = schedule
        self.update_index = 0
        self.ema = ModelEMA(
            model,
            handle_buffers=handle_buffers,
            backend=backend,
            ema_dtype=ema_dtype,
            precision=precision,
            seed=seed,
        )
        self._handles: dict[Engine, RemovableEventHandle] = {}
        self._names: dict[Engine, str] = {}

    @property
    def model(self) -> nn.Module:
        """The online model, unwrapped."""
        return self.ema.model

    @property
    def ema_model(self) -> nn.Module:
        """The EMA model."""
        return self.ema.ema_model

    @property
    def handle_buffers(self) -> str:
        """How buffers are handled."""
        return self.ema.handle_buffers

    @property
    def schedule(self) -> Schedule:
        """The function from the update index to the momentum."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        if not callable(schedule):
            raise TypeError(
                f"schedule must be a function from the update index to the momentum, but got "
                f"{schedule!r}. Give one of ema_triton.schedules, e.g. HalfLife(1000), or a "
                "function of your own."
            )
        _momentum_from(schedule, 1)
        self._schedule = schedule

    @property
    def momentum(self) -> float | None:
        """The schedule's momentum, after the warm-up; None for a schedule without such a field."""
        return getattr(self.schedule, "momentum", None)

    @property
    def momentum_warmup(self) -> float | None:
        """The first update's momentum; None without warm-up."""
        return getattr(self.schedule, "momentum_warmup", None)

    @property
    def warmup_iters(self) -> int | None:
        """The updates until `momentum` is reached; None without warm-up."""
        return getattr(self.schedule, "warmup_iters", None)

    @property
    def momentum_scheduler(self) -> Schedule:
        """The schedule, under the name that it has in Ignite."""
        return self.schedule

    _momentum_lambda_obj = momentum_scheduler  # Ignite's own tests ask for this one too

    def attach(
        self,
        engine: Engine,
        name: str = "ema_momentum",
        warn_if_exists: bool = True,
        event: str | Events | CallableEventWithFilter | EventsList = Events.ITERATION_COMPLETED,
    ) -> None:
        """Update the EMA at every `event` of `engine`, and show the momentum in `engine.state`.

        As in Ignite, a constant momentum is read from `engine.state`, where others may write it (a
        state parameter scheduler, or the user before or after attaching); a warm-up or a
        `schedule` writes it there before each update.

        Args:
            engine: The trainer.
            name: The attribute of `engine.state` with the momentum: that of the last update, or
                before any update that of the next.
            warn_if_exists: Whether to warn if the attribute exists already, because the engine's
                state was loaded, or because something else uses it.
            event: When to update, e.g. `Events.ITERATION_COMPLETED(every=5)`.

        Raises:
            RuntimeError: The handler is attached to this engine already.
            TypeError: This is not an engine.
            ValueError: The engine does not have the event, or keeps something else by the name.
        """
        if engine in self._handles:
            raise RuntimeError(
                "This EMAHandler is attached to this engine already; attached twice, it would "
                "update twice per event. Call detach() first to attach it differently."
            )
        if not isinstance(engine, Engine):
            raise TypeError(
                f"engine must be an Ignite Engine, the trainer, but got {type(engine).__name__}."
            )
        if name in _ENGINE_STATE:
            raise ValueError(
                f"The engine itself keeps something in engine.state.{name}, which the momentum "
                "would overwrite. Choose another name, e.g. 'ema_momentum'."
            )
        exists = hasattr(engine.state, name)
        shown = getattr(engine.state, name, None)
        try:
            handle = engine.add_event_handler(event, self._update, name)
        except Exception:
            for part in event if isinstance(event, EventsList) else ():
                if engine.has_event_handler(self._update, part):
                    engine.remove_event_handler(self._update, part)
            raise
        again = self._names.get(engine) == name
        self._handles[engine], self._names[engine] = handle, name
        if exists and warn_if_exists and not again:
            warnings.warn(
                f"Attribute '{name}' already exists in Engine.state: either the engine has loaded "
                "its state dict, or another handler uses it. In the first case, silence this "
                "warning by warn_if_exists=False; in the second, choose another name.",
                UserWarning,
                stacklevel=2,
            )
        if not exists or self._wrote(engine, name, shown):
            self._write(engine, name, _momentum_from(self.schedule, self.update_index + 1))

    def detach(self) -> None:
        """Stop updating, on every engine; the EMA model and `engine.state` stay as they are."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def sync(self) -> None:
        """Copy the online model into the EMA model, e.g. after loading weights into it."""
        self.ema.sync()

    def state_dict(self) -> dict[str, Any]:
        """The update index, the schedule and the EMA, of plain types and tensors.

        A schedule that is not one of `ema_triton.schedules` is a function, which is not saved.
        """
        return {
            "update_index": self.update_index,
            "schedule": schedule_to_state(self.schedule),
            **self.ema.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, and go on from there, warm-up included.

        The saved schedule replaces the handler's; a warning says so where they differ. Assign
        `handler.schedule` afterwards to change it on purpose.

        Raises:
            ValueError: The state is not that of a handler, or does not fit the model. Nothing has
                been loaded then.
        """
        keys = {"update_index", "schedule"}
        if not isinstance(state_dict, Mapping) or not keys <= state_dict.keys():
            got = list(state_dict)[:5] if isinstance(state_dict, Mapping) else type(state_dict)
            raise ValueError(
                "The state must be what EMAHandler.state_dict() returned, with 'update_index' and "
                f"'schedule', but got {got}. To load a module's state dict, use "
                "handler.ema.load_state_dict(weights)."
            )
        update_index = state_dict["update_index"]
        if type(update_index) is not int or update_index < 0:
            raise ValueError(
                f"The state's update_index must be the number of updates made, but is "
                f"{update_index!r}. The checkpoint is damaged."
            )
        schedule = self.schedule
        if state_dict["schedule"] is not None:
            schedule = schedule_from_state(state_dict["schedule"])
        self.ema.load_state_dict(state_dict)
        replaced, self.schedule = self.schedule, schedule
        self.update_index = update_index
        if schedule != replaced:
            warnings.warn(
                f"The checkpoint's schedule {schedule} replaces this handler's {replaced}. To keep "
                "another one, assign handler.schedule after loading.",
                UserWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy is attached to nothing."""
        return {**self.__dict__, "_handles": {}, "_names": {}}

    def _update(self, engine: Engine, name: str) -> None:
        momentum = _momentum_from(self.schedule, self.update_index + 1)
        shown: Any = getattr(engine.state, name, None)
        driven = shown is not None and not self._wrote(engine, name, shown)
        if driven and isinstance(self.schedule, Constant):
            self.ema.update(shown)
        else:
            self.ema.update(momentum)
            self._write(engine, name, momentum)
        self.update_index += 1

    def _write(self, engine: Engine, name: str, momentum: float) -> None:
        written = momentum + 0.0  # a new object
        self._written.setdefault(engine, {})[name] = written
        setattr(engine.state, name, written)

    def _wrote(self, engine: Engine, name: str, shown: object) -> bool:
        return shown is self._written.get(engine, {}).get(name)


def _schedule_from_arguments(
    momentum: float, momentum_warmup: float | None, warmup_iters: int | None
) -> Schedule:
    constant = Constant(momentum)
    if momentum_warmup is not None and warmup_iters is not None:
        return LinearWarmup(momentum_warmup, momentum, warmup_iters)
    given, missing = ("momentum_warmup", "warmup_iters")
    if warmup_iters is not None:
        given, missing = missing, given
    if momentum_warmup is not None or warmup_iters is not None:
        # Its own errors come first; whatever is missing is filled with a valid value.
        LinearWarmup(
            momentum if momentum_warmup is None else momentum_warmup,
            momentum,
            1 if warmup_iters is None else warmup_iters,
        )
        warnings.warn(
            f"{given} was given without {missing}, so there is no warm-up: the momentum is "
            f"{momentum} from the first update. Give both for a warm-up, or neither.",
            UserWarning,
            stacklevel=3,
        )
    return constant


def _momentum_from(schedule: Schedule, update_index: int) -> float:
    momentum: Any = schedule(update_index)
    number = isinstance(momentum, numbers.Real) and not isinstance(momentum, bool)
    if not number or not 0 <= momentum <= 1:
        raise ValueError(
            f"Invalid momentum: {momentum!r}, from the schedule at update {update_index}. A "
            "schedule gives the weight of the online weights (1 - decay), in [0, 1]."
        )
    return float(momentum)
