"""`EMAHandler`: a drop-in for Ignite's, on top of `ModelEMA`.

An engine's event asks the schedule for the momentum of the next update, shows it in
`engine.state`, and applies it.
"""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

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
from ema_triton.schedules import Constant, LinearWarmup, Schedule, check_schedule, momentum_from

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ema_triton.arguments import Options

DEFAULT_MOMENTUM = 0.0002

_ENGINE_STATE = {*vars(State()), *State.event_to_attr.values()}


@dataclass(eq=False)
class _Attachment:
    """What belongs to an engine, which may be unhashable, and which this does not keep alive."""

    engine: weakref.ReferenceType[Engine]
    handles: list[RemovableEventHandle] = field(default_factory=list)  # empty once detached
    name: str | None = None  # of the momentum in engine.state; None where runs are swapped
    written: float | None = None  # the momentum that was last written there
    swap_out: Callable[[], None] | None = None


class EMAHandler:
    r"""Keep an exponential moving average of a model's weights while an Ignite engine trains it.

    .. math:: \theta_{EMA} \leftarrow (1 - \lambda)\,\theta_{EMA} + \lambda\,\theta

    The same constructor, `attach`, and `engine.state` attribute as Ignite's `EMAHandler`. A
    subclass may override `attach` and `_update_ema_model`, as one of Ignite's.

    Args:
        model: The online model. Of a `DistributedDataParallel` or `torch.compile`d model the
            inner module is averaged; `DataParallel` stays.
        momentum: :math:`\lambda`, the weight of the online weights, in [0, 1]; after the warm-up.
        momentum_warmup: The first update's momentum, in [0, 1]; above or below `momentum`.
        warmup_iters: Number of updates until `momentum` is reached; 0 is as 1. Without both of them
            there is no warm-up.
        handle_buffers: "copy" copies the online buffers at every update, "update" averages the
            floating ones, "ema_train" leaves them to the EMA model, which is then in train mode.
        schedule: Any function from the update index, counting from 1, to the momentum, such as
            those of `ema_triton.schedules`; instead of the three arguments above.
        **options: The other keyword arguments of `ModelEMA`: `ema_model`, `as_module`, `backend`,
            `ema_dtype`, `precision`, `seed`, `include`, `exclude`, `momentum_scale`, `nonfinite`.

    Attributes:
        ema: The `ModelEMA`.
        schedule: What gives the momentum; may be assigned.
        update_index: The number of updates made.
        momentum_scheduler: None; for a subclass to keep a scheduler of its own in, as Ignite's
            `attach` does.

    Raises:
        ValueError: An argument is not one of the accepted values.
        TypeError: An argument is unknown, or of a wrong type, or a tensor is.

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

    def __init__(
        self,
        model: nn.Module,
        momentum: float = DEFAULT_MOMENTUM,
        momentum_warmup: float | None = None,
        warmup_iters: float | None = None,
        handle_buffers: str = "copy",
        *,
        schedule: Schedule | None = None,
        **options: Unpack[Options],
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
        check_schedule(schedule)
        _check_options(options)
        self.ema = ModelEMA(model, handle_buffers=handle_buffers, **options)
        self._attachments: list[_Attachment] = []
        self.schedule = schedule
        self.momentum_scheduler: Any = None
        self._event_index = 0

    @property
    def model(self) -> nn.Module:
        """The online model, unwrapped."""
        return self.ema.model

    @model.setter
    def model(self, _: nn.Module) -> NoReturn:
        raise AttributeError(
            "EMAHandler.model cannot be assigned: the EMA's tensors are paired with those of the "
            "model that it was built for. Load other weights into that model and call "
            "handler.sync(), or build a new EMAHandler for the other model."
        )

    @property
    def ema_model(self) -> nn.Module:
        """The EMA model."""
        return self.ema.ema_model

    @ema_model.setter
    def ema_model(self, _: nn.Module) -> NoReturn:
        raise AttributeError(
            "EMAHandler.ema_model cannot be assigned: updates write into its tensors. Give another "
            "one at construction, EMAHandler(model, ema_model=...), or load weights into this one: "
            "handler.ema_model.load_state_dict(...), handler.ema.load_weights(...)."
        )

    @property
    def handle_buffers(self) -> str:
        """How buffers are handled."""
        return self.ema.handle_buffers

    @handle_buffers.setter
    def handle_buffers(self, _: str) -> NoReturn:
        raise AttributeError(
            "EMAHandler.handle_buffers cannot be assigned: it decides which tensors are averaged, "
            "and whether the EMA model is in train mode, when those are laid out. Give it at "
            "construction: EMAHandler(model, handle_buffers=...)."
        )

    @property
    def update_index(self) -> int:
        """The number of updates made."""
        return self.ema.update_index

    @property
    def schedule(self) -> Schedule:
        """The function from the update index to the momentum."""
        assert self.ema.schedule is not None  # since construction
        return self.ema.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        check_schedule(schedule)
        self.ema.schedule = schedule
        for attachment in self._attachments:
            engine = attachment.engine()
            if engine is not None and attachment.handles and attachment.name is not None:
                self._write_momentum(engine, attachment, attachment.name)

    @property
    def momentum(self) -> float | None:
        """The momentum after the warm-up; None for a schedule without such a field.

        May be assigned where there is one, attached or not.
        """
        return getattr(self.schedule, "momentum", None)

    @momentum.setter
    def momentum(self, momentum: float) -> None:
        if not isinstance(self.schedule, Constant | LinearWarmup):
            raise AttributeError(
                f"EMAHandler.momentum cannot be assigned: {self.schedule!r} gives the momentum of "
                "each update. Assign handler.schedule instead."
            )
        self.schedule = replace(self.schedule, momentum=momentum)

    @property
    def momentum_warmup(self) -> float | None:
        """The first update's momentum; None without warm-up."""
        return getattr(self.schedule, "momentum_warmup", None)

    @property
    def warmup_iters(self) -> int | None:
        """The updates until `momentum` is reached; None without warm-up."""
        return getattr(self.schedule, "warmup_iters", None)

    @property
    def _momentum_lambda_obj(self) -> Schedule | None:
        """The schedule under its name in Ignite, where subclasses read and assign it."""
        return None if isinstance(self.schedule, Constant) else self.schedule

    @_momentum_lambda_obj.setter
    def _momentum_lambda_obj(self, schedule: Schedule | None) -> None:
        momentum: Any = self.momentum  # Constant refuses None
        self.schedule = Constant(momentum) if schedule is None else schedule

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
        _check_engine(engine, "engine", "the trainer")
        last = self._attachment_of(engine)
        if last is not None and last.handles:
            if last.swap_out is not None:
                raise RuntimeError(
                    "This EMAHandler swaps around this engine's runs, and cannot update inside of "
                    "them. Attach it to the trainer."
                )
            raise RuntimeError(
                "This EMAHandler is attached to this engine already; attached twice, it would "
                "update twice per event. Call detach() first to attach it differently."
            )
        if name in _ENGINE_STATE:
            raise ValueError(
                f"The engine itself keeps something in engine.state.{name}, which the momentum "
                "would overwrite. Choose another name, e.g. 'ema_momentum'."
            )
        exists = hasattr(engine.state, name)
        listeners = {event: [*found] for event, found in engine._event_handlers.items()}
        # In this order, as in Ignite: an override reads the momentum of its update in engine.state.
        steps = [self._show_momentum, self._update_ema_model]
        if getattr(self._update_ema_model, "__func__", None) is not EMAHandler._update_ema_model:
            steps.append(self._count_event)
        try:
            handles = [engine.add_event_handler(event, step, name) for step in steps]
        except Exception:
            for part in event if isinstance(event, EventsList) else ():
                for step in steps:
                    if engine.has_event_handler(step, part):
                        engine.remove_event_handler(step, part)
            raise
        again = last is not None and last.name == name
        written = last.written if last is not None and again else None
        attachment = _Attachment(weakref.ref(engine), handles, name, written)
        self._keep(attachment)
        if exists and warn_if_exists and not again:
            warnings.warn(
                f"Attribute '{name}' already exists in Engine.state: either the engine has loaded "
                "its state dict, or another handler uses it. In the first case, silence this "
                "warning by warn_if_exists=False; in the second, choose another name.",
                UserWarning,
                stacklevel=2,
            )
        earlier = [
            listener
            for event, found in engine._event_handlers.items()
            if len(found) > len(listeners.get(event, ()))
            for listener in listeners.get(event, ())
        ]
        if any(self._is_saved_by(*listener) for listener in earlier):
            warnings.warn(
                "A Checkpoint that saves this EMAHandler is attached to the same event already, "
                "and so runs before each update: what it saves lacks the last one, and a resumed "
                "run will differ. Attach the EMAHandler before the Checkpoint.",
                UserWarning,
                stacklevel=2,
            )
        if not exists or getattr(engine.state, name) == attachment.written:
            self._write_momentum(engine, attachment, name)

    def detach(self) -> None:
        """Stop updating and swapping, on every engine; all else stays as it is."""
        for attachment in self._attachments:
            engine = attachment.engine()
            if attachment.swap_out is not None:
                attachment.swap_out()
            for handle in attachment.handles:
                handle.remove()
            attachment.handles.clear()
            # An engine that finds this key, even without listeners, does not raise exceptions.
            if engine is not None and not engine._event_handlers.get(Events.EXCEPTION_RAISED, True):
                del engine._event_handlers[Events.EXCEPTION_RAISED]

    def attach_swap(self, evaluator: Engine) -> None:
        """Have every run of this engine evaluate the online model with the EMA's weights.

        They are swapped from EPOCH_STARTED on, and back before anything else happens at COMPLETED,
        TERMINATE, INTERRUPT or EXCEPTION_RAISED: a `Checkpoint` at COMPLETED saves the online
        weights. See `ModelEMA.swapped`.

        Args:
            evaluator: The engine that evaluates `model`; not the trainer.

        Raises:
            RuntimeError: The handler swaps or updates on this engine already.
            TypeError: This is not an engine.
        """
        _check_engine(evaluator, "evaluator", "that evaluates the model")
        last = self._attachment_of(evaluator)
        if last is not None and last.handles:
            what = "updates" if last.swap_out is None else "swaps"
            raise RuntimeError(
                f"This EMAHandler {what} on this engine already, and cannot swap around its runs. "
                "Give an engine of its own to the evaluation, or call detach() first."
            )
        entered: list[AbstractContextManager[nn.Module]] = []

        def begin() -> None:
            if not entered:
                entered.append(self.ema.swapped())
                try:
                    entered[0].__enter__()
                except BaseException:
                    entered.clear()
                    raise

        def end() -> None:
            while entered:
                entered.pop().__exit__(None, None, None)

        def fail(engine: Engine, error: BaseException) -> None:
            end()
            # The engine raises only without listeners, and this is the only one.
            if len(engine._event_handlers[Events.EXCEPTION_RAISED]) == 1:
                raise error

        # An engine that was interrupted goes on without another EPOCH_STARTED.
        begins = [Events.EPOCH_STARTED, Events.ITERATION_STARTED]
        ends = [Events.COMPLETED, Events.TERMINATE, Events.INTERRUPT]
        handles = [evaluator.add_event_handler(event, begin) for event in begins]
        handles += [evaluator.add_event_handler(event, end) for event in ends]
        handles.append(evaluator.add_event_handler(Events.EXCEPTION_RAISED, fail))
        for event in [*ends, Events.EXCEPTION_RAISED]:
            listeners = evaluator._event_handlers[event]
            listeners.insert(0, listeners.pop())
        self._keep(_Attachment(weakref.ref(evaluator), handles, swap_out=end))

    def sync(self) -> None:
        """Copy the online model into the EMA model, e.g. after loading weights into it."""
        self.ema.sync()

    def state_dict(self, *, clone: bool = False, full_state_dict: bool = False) -> dict[str, Any]:
        """The state of `ema`: update index, schedule and weights, of plain types and tensors.

        A schedule that is not one of `ema_triton.schedules` is a function, which is not saved.

        Args:
            clone: Whether to copy the tensors, for a thread that saves while another one trains.
            full_state_dict: Whether to gather whole tensors on rank 0; see `ModelEMA.state_dict`.
        """
        return self.ema.state_dict(clone=clone, full_state_dict=full_state_dict)

    def load_state_dict(
        self, state_dict: Mapping[str, Any] | None, *, full_state_dict: bool = False
    ) -> None:
        """Load what `state_dict` returned, and go on from there, warm-up included.

        The saved schedule replaces the handler's; a warning says so where they differ. Assign
        `handler.schedule` afterwards to change it on purpose. A module's state dict, such as that
        of an EMA model which Ignite's handler made, is loaded too, and has no schedule.

        Args:
            state_dict: The state.
            full_state_dict: Whether rank 0 alone has it, whole; see `ModelEMA.load_state_dict`.

        Raises:
            ValueError: The state is of neither kind, or does not fit the model. Nothing has been
                loaded then.
        """
        self.ema.load_state_dict(state_dict, full_state_dict=full_state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is attached to no engine."""
        return {**self.__dict__, "_attachments": []}

    def _show_momentum(self, engine: Engine, name: str) -> None:
        """Write the momentum of the next update into `engine.state`, unless the user drives it."""
        attachment = self._attachment_of(engine)
        assert attachment is not None  # attach() registers this
        shown: Any = getattr(engine.state, name, None)
        # What differs from what was written last, the user wrote. A tensor's value is not asked
        # for: reading it would wait for the device.
        driven = isinstance(shown, Tensor) or (shown is not None and shown != attachment.written)
        if not (driven and isinstance(self.schedule, Constant)):
            self._write_momentum(engine, attachment, name)
        self._event_index = self.update_index + 1

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        """Update the EMA with the momentum in `engine.state`; may be overridden, as in Ignite.

        Args:
            engine: The engine whose event this is.
            name: The attribute of `engine.state` that has the momentum of this update.
        """
        self.ema.update(getattr(engine.state, name))

    def _count_event(self, engine: Engine, name: str) -> None:  # noqa: ARG002
        """Count an event whose override did not call `ema.update`, as Ignite's warm-up does."""
        self.ema.update_index = max(self.ema.update_index, self._event_index)

    def _write_momentum(self, engine: Engine, attachment: _Attachment, name: str) -> None:
        attachment.written = momentum_from(self.schedule, self.update_index + 1)
        setattr(engine.state, name, attachment.written)

    def _attachment_of(self, engine: Engine) -> _Attachment | None:
        return next((found for found in self._attachments if found.engine() is engine), None)

    def _keep(self, attachment: _Attachment) -> None:
        """Remember it in place of the engine's last one, and forget engines that are gone."""
        gone = (None, attachment.engine())
        kept = [a for a in self._attachments if all(a.engine() is not one for one in gone)]
        self._attachments = [*kept, attachment]

    def _is_saved_by(
        self, listener: object, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> bool:
        # Not imported here: this takes a while, and without it there is no Checkpoint.
        checkpoint = sys.modules.get("ignite.handlers.checkpoint")
        listener = getattr(listener, "__wrapped__", listener)  # Ignite wraps those with a filter
        if checkpoint is None or not isinstance(listener, checkpoint.Checkpoint):
            return False
        # A ModelCheckpoint is given its objects when the event fires.
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)]
        own = (self, self.ema, self.ema._state.module)
        return any(
            saved is one
            for objects in (listener.to_save, *given)
            for saved in objects.values()
            for one in own
        )


def _check_options(options: Mapping[str, object]) -> None:
    accepted = [*inspect.signature(ModelEMA).parameters]
    for name in options.keys() - accepted:
        own = inspect.signature(EMAHandler).parameters
        names = ", ".join(one for one in dict.fromkeys([*own, *accepted]) if one != "options")
        raise TypeError(
            f"EMAHandler got an unexpected keyword argument {name!r}, which would do nothing. It "
            f"takes: {names}."
        )


def _check_engine(engine: object, argument: str, which: str) -> None:
    if not isinstance(engine, Engine):
        raise TypeError(
            f"{argument} must be an Ignite Engine, {which}, but got {type(engine).__name__}."
        )


def _schedule_from_arguments(
    momentum: float, momentum_warmup: float | None, warmup_iters: float | None
) -> Schedule:
    constant = Constant(momentum)
    if momentum_warmup is not None and warmup_iters is not None:
        return LinearWarmup(momentum_warmup, momentum, warmup_iters)
    given, missing = ("momentum_warmup", "warmup_iters")
    if warmup_iters is not None:
        given, missing = missing, given
    if momentum_warmup is not None or warmup_iters not in (None, 0):
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
