"""`EMAHandler`: a drop-in for Ignite's, on top of `ModelEMA`.

An engine's event asks the schedule for the momentum of the next update, shows it in
`engine.state`, and applies it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
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

from ema_triton.distance import Distance
from ema_triton.model_ema import ModelEMA
from ema_triton.saved import Saved
from ema_triton.schedules import (
    Constant,
    LinearWarmup,
    Schedule,
    check_schedule,
    momentum_from,
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
        ema_model: The EMA model to use, by default a copy of `model`.
        backend: "auto", "triton" or "foreach".
        ema_dtype: dtype of the EMA model's floating tensors, by default that of the model.
        precision: How a bf16 or fp16 EMA takes small steps: "exact", "stochastic" or "nearest"; see
            `ModelEMA`.
        seed: Of the stochastic rounding.
        include: Names or globs of what to average, by default all; the rest is copied.
        exclude: Those of `include` to copy all the same.
        momentum_scale: Factors for the momentum by name or glob.
        nonfinite: "propagate", "skip" or "raise": what NaN and Inf do to the EMA; see `ModelEMA`.

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

    def __init__(
        self,
        model: nn.Module,
        momentum: float = DEFAULT_MOMENTUM,
        momentum_warmup: float | None = None,
        warmup_iters: int | None = None,
        handle_buffers: str = "copy",
        *,
        schedule: Schedule | None = None,
        ema_model: nn.Module | None = None,
        backend: str = "auto",
        ema_dtype: torch.dtype | None = None,
        precision: str = "exact",
        seed: int = 0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        momentum_scale: Mapping[str, float] | None = None,
        nonfinite: str = "propagate",
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
        self.ema = ModelEMA(
            model,
            ema_model=ema_model,
            handle_buffers=handle_buffers,
            backend=backend,
            ema_dtype=ema_dtype,
            precision=precision,
            seed=seed,
            include=include,
            exclude=exclude,
            momentum_scale=momentum_scale,
            nonfinite=nonfinite,
        )
        self.schedule = schedule
        self._handles: dict[Engine, RemovableEventHandle] = {}
        self._names: dict[Engine, str] = {}
        self._written: dict[Engine, float] = {}  # the momentum last written into engine.state
        self._distances: dict[Engine, dict[str, int]] = {}
        self._swaps: dict[Engine, tuple[Callable[[], None], list[RemovableEventHandle]]] = {}

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
        _check_engine(engine, "engine", "the trainer")
        if engine in self._swaps:
            raise RuntimeError(
                "This EMAHandler swaps around this engine's runs, and cannot update inside of "
                "them. Attach it to the trainer."
            )
        if name in _ENGINE_STATE:
            raise ValueError(
                f"The engine itself keeps something in engine.state.{name}, which the momentum "
                "would overwrite. Choose another name, e.g. 'ema_momentum'."
            )
        exists = hasattr(engine.state, name)
        shown = getattr(engine.state, name, None)
        earlier = {key: len(listeners) for key, listeners in engine._event_handlers.items()}
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
        if any(map(self._is_saved_by, _before_the_last(engine, earlier))):
            warnings.warn(
                "A Checkpoint that saves this EMAHandler is attached to the same event already, "
                "and so runs before each update: what it saves lacks the last one, and a resumed "
                "run will differ. Attach the EMAHandler before the Checkpoint.",
                UserWarning,
                stacklevel=2,
            )
        if not exists or (again and shown == self._written.get(engine)):
            self._write(engine, name, momentum_from(self.schedule, self.update_index + 1))

    def detach(self) -> None:
        """Stop updating and swapping, on every engine; all else stays as it is."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._distances.clear()
        for engine, (end, handles) in self._swaps.items():
            end()
            for handle in handles:
                handle.remove()
            # An engine that finds this key keeps exceptions to itself, even if nobody listens.
            if not engine._event_handlers[Events.EXCEPTION_RAISED]:
                del engine._event_handlers[Events.EXCEPTION_RAISED]
        self._swaps.clear()

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
        if evaluator in self._swaps or evaluator in self._handles:
            what = "swaps" if evaluator in self._swaps else "updates"
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

        def fail(error: BaseException) -> None:
            end()
            # The engine raises only if nobody listens, and nobody else does.
            if len(evaluator._event_handlers[Events.EXCEPTION_RAISED]) == 1:
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
        self._swaps[evaluator] = (end, handles)

    def attach_distance(self, engine: Engine, every: int = 100, name: str = "ema_distance") -> None:
        """Show in `engine.state` how far the EMA is from the online model.

        Args:
            engine: The trainer, attached already.
            every: Updates from one measurement to the next, each of which waits for the device.
            name: The attribute of `engine.state`, a dict of floats: "distance", "norm", and
                "modules" with the same by top-level module; see `ModelEMA.distance`.

        Raises:
            RuntimeError: The handler is not attached to this engine.
            ValueError: `every` is below 1, or the engine keeps something else by this name.
        """
        if engine not in self._handles:
            raise RuntimeError(
                "This EMAHandler is not attached to this engine, so there are no updates to "
                "measure after. Call attach(engine) first."
            )
        if type(every) is not int or every < 1:
            raise ValueError(
                f"every must be a number of updates, but got {every!r}. The distance is measured "
                "after each so many of them: give an int from 1 on."
            )
        mine = self._distances.setdefault(engine, {})
        if name not in mine and hasattr(engine.state, name):
            raise ValueError(
                f"Something else is kept in engine.state.{name}, which the distance would "
                "overwrite. Choose another name."
            )
        mine[name] = every

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
        `handler.schedule` afterwards to change it on purpose.

        Args:
            state_dict: The state.
            full_state_dict: Whether rank 0 alone has it, whole; see `ModelEMA.load_state_dict`.

        Raises:
            ValueError: The state is not that of a handler, or does not fit the model. Nothing has
                been loaded then.
        """
        for remark in self.ema._load_state(state_dict, _saved_by_handler, full_state_dict):
            warnings.warn(remark, UserWarning, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is attached to nothing."""
        empty: dict[str, Any] = {"_handles": {}, "_names": {}, "_written": {}}
        return {**self.__dict__, **empty, "_distances": {}, "_swaps": {}}

    def _update(self, engine: Engine, name: str) -> None:
        shown: Any = getattr(engine.state, name, None)
        if isinstance(self.schedule, Constant) and self._is_driven(engine, shown):
            self.ema.update(shown)
        else:
            momentum = momentum_from(self.schedule, self.update_index + 1)
            self.ema.update(momentum)
            self._write(engine, name, momentum)
        for attribute, every in self._distances.get(engine, {}).items():
            if self.update_index % every == 0:
                setattr(engine.state, attribute, _as_dict(self.ema.distance()))

    def _is_saved_by(self, listener: object) -> bool:
        # Whoever has a Checkpoint has imported this, which takes a while.
        checkpoint = sys.modules.get("ignite.handlers.checkpoint")
        if checkpoint is None or not isinstance(listener, checkpoint.Checkpoint):
            return False
        mine = (self, self.ema, self.ema._ema_model)
        return any(saved is own for saved in listener.to_save.values() for own in mine)

    def _write(self, engine: Engine, name: str, momentum: float) -> None:
        self._written[engine] = momentum
        setattr(engine.state, name, momentum)

    def _is_driven(self, engine: Engine, shown: object) -> bool:
        """Whether the user wrote it: it differs from what the handler wrote last."""
        # A tensor's value is not asked for: reading it would wait for the device.
        written = self._written.get(engine)
        return isinstance(shown, Tensor) or (shown is not None and shown != written)


def _before_the_last(engine: Engine, earlier: Mapping[Any, int]) -> Iterator[object]:
    """What listens to the events that have one listener more than `earlier`."""
    for event, listeners in engine._event_handlers.items():
        if len(listeners) > earlier.get(event, 0):
            for listener, _, _ in listeners[:-1]:
                # Ignite wraps the listeners of an event with a filter.
                yield getattr(listener, "__wrapped__", listener)


def _check_engine(engine: object, argument: str, which: str) -> None:
    if not isinstance(engine, Engine):
        raise TypeError(
            f"{argument} must be an Ignite Engine, {which}, but got {type(engine).__name__}."
        )


def _saved_by_handler(state: object) -> Saved:
    keys = {"update_index", "schedule"}
    if not isinstance(state, Mapping) or not keys <= state.keys():
        got = list(state)[:5] if isinstance(state, Mapping) else type(state)
        raise ValueError(
            "The state must be what EMAHandler.state_dict() returned, with 'update_index' and "
            f"'schedule', but got {got}. To load a module's state dict, use "
            "handler.ema.load_weights(weights)."
        )
    return Saved.of(state)


def _as_dict(distance: Distance) -> dict[str, Any]:
    """For loggers, which name the entries of dicts and number those of tuples."""
    norms = {"distance": distance.distance, "norm": distance.norm}
    if not distance.modules:
        return norms
    modules = {name: _as_dict(of_module) for name, of_module in distance.modules.items()}
    return {**norms, "modules": modules}


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
