"""`EMAHandler`: a drop-in for Ignite's, on top of `ModelEMA`.

At an engine's event it computes the momentum of the next update from the schedule, writes it to
`engine.state`, and updates the EMA with it.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

try:
    from ignite.engine import CallableEventWithFilter, Engine, Events, EventsList, State
except ImportError as error:
    raise ImportError(
        "ema_triton.EMAHandler attaches to PyTorch-Ignite's engines, and ignite does not import "
        f"({error}). Install it with: pip install pytorch-ignite. Without Ignite, use "
        "ema_triton.ModelEMA."
    ) from error

from ema_triton.arguments import check_options
from ema_triton.bank import EMABank
from ema_triton.model_ema import ModelEMA
from ema_triton.modules import unwrap
from ema_triton.pairing import quoted
from ema_triton.schedules import Constant, LinearWarmup, Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ema_triton.arguments import Options

DEFAULT_MOMENTUM = 0.0002

# Where a swapped evaluation ends: the weights are swapped back before anything else happens there.
_SWAP_ENDS = (Events.COMPLETED, Events.TERMINATE, Events.INTERRUPT, Events.EXCEPTION_RAISED)


@dataclass(eq=False)
class _Attachment:
    """What the handler does on one engine, which may be unhashable, and is not kept alive."""

    engine: weakref.ReferenceType[Engine]
    undo: ExitStack | None = None  # removes the listeners; None while detached
    name: str = ""  # of the momentum in engine.state; empty where runs are swapped
    # What the handler last wrote there.
    written: float | dict[str, float] | None = None


class EMAHandler:
    """Keep an exponential moving average of a model's weights while an Ignite engine trains it.

        ema = (1 - momentum) * ema + momentum * online

    It has the constructor, `attach`, and `engine.state` attribute of Ignite's `EMAHandler`, and
    likewise a subclass may override `attach` and `_update_ema_model`.

    Args:
        model: The online model. A `DistributedDataParallel` or `torch.compile` wrapper is taken
            off; `DataParallel` stays.
        momentum: The weight of the online weights, in [0, 1]; after the warm-up. By default 0.0002.
        momentum_warmup: The first update's momentum, in [0, 1]; above or below `momentum`.
        warmup_iters: Number of updates until `momentum` is reached; 0 means 1. There is a warm-up
            only if this and `momentum_warmup` are given.
        handle_buffers: "copy" copies the online buffers at every update, "update" averages the
            floating ones, "ema_train" leaves them to the EMA model, which is then in train mode.
            "update" copies spectral norm's unit vectors and pruning's masks all the same, whose
            averages would be neither; name other buffers that are no running statistics in
            `exclude`.
        schedule: Any function from the update index, counting from 1, to the momentum, such as
            those of `ema_triton.schedules`; instead of the three arguments above. Or several by
            name, for an average each: `ema` is an `EMABank` then, and `engine.state` shows a dict.
        **options: The other keyword arguments of `ModelEMA`: `ema_model`, `as_module`, `backend`,
            `ema_dtype`, `precision`, `seed`, `include`, `exclude`, `momentum_scale`, `nonfinite`.

    Attributes:
        ema: The `ModelEMA`, or the `EMABank`.
        schedule: The function from the update index to the momentum; may be assigned.
        update_index: The number of updates made.
        momentum_scheduler: None; a subclass may keep its own scheduler here, as Ignite's `attach`
            does.

    Raises:
        ValueError: An argument is not one of the accepted values.
        TypeError: An argument is unknown, or an argument or a tensor is of a wrong type.

    Examples:
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
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        **options: Unpack[Options],
    ) -> None:
        arguments = (momentum, momentum_warmup, warmup_iters)
        if schedule is None:
            schedule = _schedule_from_arguments(*arguments)
        elif arguments != (DEFAULT_MOMENTUM, None, None):
            raise ValueError(
                f"schedule={schedule} and (momentum, momentum_warmup, warmup_iters)={arguments} "
                "were given, and only one can decide. Give the schedule alone, or leave it out."
            )
        check_options(EMAHandler, options, ModelEMA)
        self.ema: ModelEMA | EMABank
        if isinstance(schedule, Mapping):
            self.ema = EMABank(model, schedule, handle_buffers=handle_buffers, **options)
        else:
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
    def model(self, model: nn.Module) -> None:
        self.ema.model = model  # an AttributeError that says why

    @property
    def ema_model(self) -> nn.Module:
        """The EMA model; of a bank, an error that names the averages."""
        return self.ema.ema_model

    @ema_model.setter
    def ema_model(self, _: nn.Module) -> NoReturn:
        raise AttributeError(
            "EMAHandler.ema_model cannot be assigned: updates write into its tensors. Load weights "
            "into it (handler.ema.load_weights), or build a new EMAHandler(model, ema_model=...)."
        )

    @property
    def handle_buffers(self) -> str:
        """How buffers are handled."""
        return self.ema.handle_buffers

    @handle_buffers.setter
    def handle_buffers(self, _: str) -> NoReturn:
        raise AttributeError(
            "EMAHandler.handle_buffers cannot be assigned: the tensors were laid out for it. Give "
            "it at construction: EMAHandler(model, handle_buffers=...)."
        )

    @property
    def update_index(self) -> int:
        """The number of updates made."""
        return self.ema.update_index

    @property
    def schedule(self) -> Any:  # noqa: ANN401  # a function, or of a bank several by name
        """The function from the update index to the momentum; of a bank, a dict of them."""
        return self.ema.schedule

    @schedule.setter
    def schedule(self, schedule: Any) -> None:  # noqa: ANN401
        self.ema.schedule = schedule
        for attachment in self._attachments:
            engine = attachment.engine()
            if engine is not None and attachment.undo is not None and attachment.name:
                self._write_momentum(engine, attachment)

    @property
    def momentum(self) -> float | None:
        """The momentum after the warm-up, which may be assigned; None if the schedule has none."""
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

        As in Ignite, a constant momentum is read from `engine.state`, where the user or a state
        parameter scheduler may write it, before or after attaching; a warm-up or a `schedule`
        overwrites it before each update.

        Args:
            engine: The trainer.
            name: The attribute of `engine.state` with the momentum of the last update, and before
                any update of the next.
            warn_if_exists: Whether to warn if the attribute exists already, because the engine's
                state was loaded, or because another handler uses it.
            event: When to update, e.g. `Events.ITERATION_COMPLETED(every=5)`.

        Raises:
            RuntimeError: The handler updates or swaps on this engine already.
            TypeError: This is not an engine.
            ValueError: The engine does not have the event, or needs the attribute itself.
        """
        attachment = self._attachment_to(engine, "engine")
        if hasattr(State(), name):
            raise ValueError(
                f"engine.state.{name} belongs to the engine itself, and the momentum would "
                "overwrite it. Choose another name, e.g. 'ema_momentum'."
            )
        # In this order, as in Ignite: an override reads the momentum of its update in engine.state.
        events = event if isinstance(event, EventsList) else [event]
        method = getattr(self._update_ema_model, "__func__", None)
        with ExitStack() as undo:  # a later event of the list may be unknown to the engine
            for one in events:
                undo.enter_context(engine.add_event_handler(one, self._show_momentum, attachment))
                undo.enter_context(engine.add_event_handler(one, self._update_ema_model, name))
                if method is not EMAHandler._update_ema_model:
                    undo.enter_context(engine.add_event_handler(one, self._count_event))
            attachment.undo = undo.pop_all()
        if attachment.name != name:
            attachment.name, attachment.written = name, None
            if warn_if_exists and hasattr(engine.state, name):
                warnings.warn(
                    f"Attribute '{name}' already exists in Engine.state: either the engine has "
                    "loaded its state dict, or another handler uses it. In the first case, silence "
                    "this warning by warn_if_exists=False; in the second, choose another name.",
                    UserWarning,
                    stacklevel=2,
                )
        saved = [_saved_by(entry) for one in events for entry in engine._event_handlers[one]]
        if any(map(self._is_among, saved)):
            warnings.warn(
                "A Checkpoint that saves this EMAHandler is attached to the same event already, "
                "and so runs before each update: what it saves lacks the last one, and a resumed "
                "run will differ. Attach the EMAHandler before the Checkpoint.",
                UserWarning,
                stacklevel=2,
            )
        if getattr(engine.state, name, attachment.written) == attachment.written:
            self._write_momentum(engine, attachment)

    def detach(self) -> None:
        """Stop updating and swapping on every engine; nothing else changes."""
        for attachment in self._attachments:
            if attachment.undo is not None:
                attachment.undo.close()
                attachment.undo = None
            engine = attachment.engine()
            # While this key exists, even without listeners, an engine does not raise exceptions.
            if engine is not None and not engine._event_handlers.get(Events.EXCEPTION_RAISED, True):
                del engine._event_handlers[Events.EXCEPTION_RAISED]

    def attach_swap(self, evaluator: Engine, *, average: str | None = None) -> None:
        """Make every run of this engine evaluate the online model with the EMA's weights.

        The weights are swapped at EPOCH_STARTED, and swapped back before anything else happens at
        COMPLETED, TERMINATE, INTERRUPT or EXCEPTION_RAISED. A `Checkpoint` at COMPLETED that keeps
        the best score has to save the EMA, `{"ema": handler}`: of the online model, whose weights
        have another score, there is a warning. See `ModelEMA.swapped`.

        Args:
            evaluator: The engine that evaluates `model`; not the trainer.
            average: Of a bank, the name of the average to evaluate.

        Raises:
            RuntimeError: The handler swaps or updates on this engine already.
            TypeError: This is not an engine.
            ValueError: The average is not one of a bank's.
        """
        ema = self._average(average)
        attachment = self._attachment_to(evaluator, "evaluator")
        entered: list[AbstractContextManager[nn.Module]] = []
        warned: set[str] = set()  # of these keys of a Checkpoint

        def begin() -> None:
            if not entered:
                self._warn_of_online_weights(evaluator, warned)  # one attached since then
                context = ema.swapped()
                context.__enter__()
                entered.append(context)

        def end() -> None:
            while entered:
                entered.pop().__exit__(None, None, None)

        def fail(engine: Engine, error: BaseException) -> None:
            end()
            # With a listener, the engine itself does not raise: the only listener has to.
            if len(engine._event_handlers[Events.EXCEPTION_RAISED]) == 1:
                raise error

        undo = attachment.undo = ExitStack()
        # An engine that was interrupted continues without another EPOCH_STARTED.
        for event in (Events.EPOCH_STARTED, Events.ITERATION_STARTED):
            undo.enter_context(evaluator.add_event_handler(event, begin))
        for event in _SWAP_ENDS:
            listener = fail if event is Events.EXCEPTION_RAISED else end
            undo.enter_context(evaluator.add_event_handler(event, listener))
            listeners = evaluator._event_handlers[event]
            listeners.insert(0, listeners.pop())
        undo.callback(end)
        attachment.name = ""
        self._warn_of_online_weights(evaluator, warned)

    def sync(self) -> None:
        """Copy the online model into the EMA model, e.g. after loading weights into the former."""
        self.ema.sync()

    def state_dict(self, *, clone: bool = False, full_state_dict: bool = False) -> dict[str, Any]:
        """The state of `ema`: update index, schedule and weights, as plain types and tensors.

        Only the schedules of `ema_triton.schedules` are saved, and no other function.

        Args:
            clone: Whether to copy the tensors, for a thread that saves while another one trains.
            full_state_dict: Whether to gather whole tensors on rank 0; see `ModelEMA.state_dict`.
        """
        return self.ema.state_dict(clone=clone, full_state_dict=full_state_dict)

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any] | None,
        *,
        full_state_dict: bool = False,
        strict: bool = True,
    ) -> None:
        """Load what `state_dict` returned, and continue from there, warm-up included.

        The saved schedule replaces the handler's, with a warning if they differ. Assign
        `handler.schedule` afterwards to change it on purpose. A module's state dict can be loaded
        too, e.g. that of the EMA model of Ignite's handler; it has no schedule.

        Args:
            state_dict: The state.
            full_state_dict: Whether only rank 0 has the state, as whole tensors; see
                `ModelEMA.load_state_dict`.
            strict: Whether names must match; see `ModelEMA.load_state_dict`.

        Raises:
            ValueError: The state is of neither kind, or does not fit the model. Nothing has been
                loaded then.
        """
        self.ema.load_state_dict(state_dict, full_state_dict=full_state_dict, strict=strict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is attached to no engine."""
        return {**self.__dict__, "_attachments": []}

    def _show_momentum(self, engine: Engine, attachment: _Attachment) -> None:
        """Write the momentum of the next update into `engine.state`, unless the user drives it."""
        shown: Any = getattr(engine.state, attachment.name, None)
        # The user wrote a value that differs from the last one written here. A tensor is not
        # compared: reading it would wait for the device.
        driven = isinstance(self.schedule, Constant) and (
            isinstance(shown, Tensor) or (shown is not None and shown != attachment.written)
        )
        if not driven:
            self._write_momentum(engine, attachment)
        self._event_index = self.update_index + 1

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        """Update the EMA with the momentum in `engine.state`; may be overridden, as in Ignite.

        Args:
            engine: The engine whose event this is.
            name: The attribute of `engine.state` that has the momentum of this update.
        """
        self.ema.update(getattr(engine.state, name))

    def _count_event(self) -> None:
        """Count an event whose override did not call `ema.update`, as Ignite's warm-up does."""
        if self.ema.update_index < self._event_index:
            self.ema.update_index = self._event_index

    def _write_momentum(self, engine: Engine, attachment: _Attachment) -> None:
        attachment.written = self.ema.next_momentum()
        setattr(engine.state, attachment.name, attachment.written)

    def _average(self, name: str | None) -> ModelEMA:
        """The EMA, or that of a bank with this name."""
        if isinstance(self.ema, ModelEMA) and name is None:
            return self.ema
        if isinstance(self.ema, EMABank) and name is not None and name in self.ema:
            return self.ema[name]
        names = "None" if isinstance(self.ema, ModelEMA) else ", ".join(map(repr, self.ema))
        raise ValueError(
            f"average={name!r} does not say what is to be evaluated. It can only be one of {names}."
        )

    def _attachment_to(self, engine: Engine, argument: str) -> _Attachment:
        """The engine's attachment, new or detached; an error if it is attached."""
        if not isinstance(engine, Engine):
            raise TypeError(
                f"{argument} must be an Ignite Engine, but got {type(engine).__name__}. Give the "
                "trainer to attach(), and the engine that evaluates the model to attach_swap()."
            )
        self._attachments = [one for one in self._attachments if one.engine() is not None]
        attachment = next((one for one in self._attachments if one.engine() is engine), None)
        if attachment is None:
            attachment = _Attachment(weakref.ref(engine))
            self._attachments.append(attachment)
        if attachment.undo is not None:
            raise RuntimeError(
                f"This EMAHandler {'updates' if attachment.name else 'swaps'} on this engine "
                "already: attached again, it would update twice per event, or while the weights "
                "are swapped. Use another engine, or call detach() first."
            )
        return attachment

    def _is_among(self, saved: Mapping[str, object]) -> bool:
        """Whether the EMA is among what a Checkpoint saves, in whatever form."""
        averages = [*self.ema.values()] if isinstance(self.ema, EMABank) else [self.ema]
        own = (self, self.ema, *averages, *(average._state.module for average in averages))
        objects = [unwrap(one) if isinstance(one, nn.Module) else one for one in saved.values()]
        return any(one is not None and one is part for one in objects for part in own)

    def _warn_of_online_weights(self, evaluator: Engine, warned: set[str]) -> None:
        """Warn of Checkpoints that save the online model by the EMA's score, of each key once.

        A Checkpoint without a score is one of the training, and right.
        """
        parameters = {id(parameter) for parameter in self.model.parameters()}
        keys = []
        for event in _SWAP_ENDS:
            for entry in evaluator._event_handlers.get(event, ()):
                saved = _saved_by(entry, with_score=True)
                if not self._is_among(saved):
                    keys += [
                        key
                        for key, one in saved.items()
                        if isinstance(one, nn.Module)
                        and not parameters.isdisjoint(map(id, one.parameters()))
                    ]
        keys = [key for key in dict.fromkeys(keys) if key not in warned]
        if keys:
            warned.update(keys)
            has_module = isinstance(self.ema, ModelEMA) and self.ema._state.module is not None
            alone = ", or handler.ema_model alone" if has_module else ""
            warnings.warn(
                f"The Checkpoint on this evaluator saves the online model ({quoted(keys)}) under "
                "the EMA's score: the evaluation runs with the EMA's weights, and they are swapped "
                "back before COMPLETED. What it saves as the best was never evaluated. Save "
                f"{{'ema': handler}} instead{alone}.",
                UserWarning,
                stacklevel=3,
            )


def _saved_by(
    entry: tuple[Any, tuple[Any, ...], dict[str, Any]], *, with_score: bool = False
) -> dict[str, object]:
    """What a listener of an engine saves, by key; nothing if it is no Checkpoint.

    Args:
        entry: The listener and its arguments, as the engine has them.
        with_score: Whether only Checkpoints count that keep what has the best score.
    """
    listener, args, kwargs = entry
    # From sys.modules: importing it is slow, and if it is not imported there is no Checkpoint.
    checkpoint = sys.modules.get("ignite.handlers.checkpoint")
    listener = getattr(listener, "__wrapped__", listener)  # Ignite wraps those with a filter
    if checkpoint is None or not isinstance(listener, checkpoint.Checkpoint):
        return {}
    if with_score and listener.score_function is None:
        return {}
    # A ModelCheckpoint gets its objects as an argument, when the event fires.
    arguments = [value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)]
    return {key: one for objects in (listener.to_save, *arguments) for key, one in objects.items()}


def _schedule_from_arguments(
    momentum: float, momentum_warmup: float | None, warmup_iters: float | None
) -> Schedule:
    # Half a warm-up is checked too.
    warmup = LinearWarmup(
        momentum if momentum_warmup is None else momentum_warmup,
        momentum,
        0 if warmup_iters is None else warmup_iters,
    )
    if momentum_warmup is not None and warmup_iters is not None:
        return warmup
    if momentum_warmup is not None or warmup.warmup_iters > 0:
        warnings.warn(
            f"momentum_warmup={momentum_warmup} was given with warmup_iters={warmup_iters}, so "
            f"there is no warm-up: the momentum is {momentum} from the first update. Give both for "
            "a warm-up, or neither.",
            UserWarning,
            stacklevel=3,
        )
    return Constant(momentum)
