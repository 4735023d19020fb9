"""`attach`: the EMA of what a transformers `Trainer` trains, evaluated, saved and resumed by it."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

try:
    import transformers
    from transformers import Trainer, TrainerCallback

    if (*map(int, transformers.__version__.split(".")[:2]),) < (4, 50):
        raise ImportError(f"version {transformers.__version__} is older than 4.50")
except ImportError as error:
    raise ImportError(
        f"attach() takes transformers 4.50 or later, whose Trainer does not import ({error}). Run: "
        "pip install --upgrade 'transformers[torch]>=4.50'. Elsewhere, use ema_triton.ModelEMA."
    ) from error

from ema_triton.arguments import CHOICES, check_choices, check_options
from ema_triton.checkpoint.interop import read_file, replacing
from ema_triton.model_ema import ModelEMA
from ema_triton.modules import are_sharded, slots_of, unwrap
from ema_triton.schedules import Schedule, check_schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ema_triton.arguments import Options

FILE = "ema.pt"  # in each folder checkpoint-N: ModelEMA.state_dict(), by torch.save


def attach(
    trainer: Trainer,
    schedule: Schedule,
    *,
    handle_buffers: str = "copy",
    **options: Unpack[Options],
) -> TrainerEMA:
    """Keep an EMA of the model that a `Trainer` trains, and evaluate, save and resume it there.

    It is updated after every real optimizer step. `evaluate` and `predict` see it; `save_model` and
    callbacks, the online model. Each `checkpoint-N` has it in `ema.pt`, and a resumed training goes
    on bit for bit. With `load_best_model_at_end`, it is the best checkpoint's at the end.

    Args:
        trainer: The trainer, before its `train()`; on every rank.
        schedule: The function from the update index, counting from 1, to the momentum.
        handle_buffers: As for `ModelEMA`.
        **options: The other arguments of `ModelEMA`, e.g. `include` and `as_module`.

    Raises:
        RuntimeError: The trainer has an EMA already.
        TypeError: An argument is unknown, or of a wrong type.
        ValueError: An argument is not one of the accepted values.

    Examples:
        >>> import tempfile
        >>> class Net(torch.nn.Linear):
        ...     forward = lambda self, x: {"loss": (self.weight * x).mean()}
        >>> arguments = transformers.TrainingArguments(tempfile.mkdtemp(), use_cpu=True)
        >>> trainer = Trainer(Net(1, 1), arguments, train_dataset=[{"x": [1.0]}] * 8)
        >>> attached = attach(trainer, lambda update_index: 0.1)
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> attached.ema.update_index
        3
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer must be a transformers Trainer, but got {type(trainer).__name__}. In another "
            "training loop, use ema_triton.ModelEMA and its follow()."
        )
    if any(isinstance(callback, TrainerEMA) for callback in trainer.callback_handler.callbacks):
        raise RuntimeError(
            "This trainer has an EMA already: a second one could be neither swapped in nor saved "
            "beside it. Use what the first attach() returned, or trainer.remove_callback() it."
        )
    check_options(attach, options, ModelEMA)  # type: ignore[arg-type]  # it is a function
    check_schedule(schedule)
    chosen = {name: value for name, value in options.items() if name in CHOICES}
    check_choices(options.get("seed", 0), handle_buffers=handle_buffers, **chosen)
    build = partial(ModelEMA, handle_buffers=handle_buffers, **options)
    return TrainerEMA(trainer, schedule, build)


class TrainerEMA(TrainerCallback):
    """What `attach` returns; its `ema` is the `ModelEMA`. It is made by `attach` alone."""

    # No event comes before an evaluation, or says from where a training resumes, which the inner
    # loop is told. `on_save` comes after a checkpoint is complete, and not at SIGTERM.

    def __init__(self, trainer: Trainer, schedule: Schedule, build: partial[ModelEMA]) -> None:
        self._schedule, self._build = schedule, build
        self._trainer: Any = trainer  # whose model is typed as optional
        self._ema: ModelEMA | None = None
        self._at_end = ExitStack()
        self._resume_from: str | None = None
        self._saved_in: Path | None = None
        loops = ("evaluation_loop", "prediction_loop")  # transformers 4 has both
        wrappers: Any = {n: partial(self._evaluate, n) for n in loops if hasattr(trainer, n)}
        wrappers |= {"_inner_training_loop": self._train, "save_model": self._save_model}
        self._replaced = {name: vars(trainer)[name] for name in wrappers if name in vars(trainer)}
        vars(trainer).update(wrappers)
        trainer.add_callback(self)

    @property
    def ema(self) -> ModelEMA:
        """The EMA of the latest training; RuntimeError before the first."""
        if self._ema is None:
            raise RuntimeError(
                "There is no EMA before trainer.train(), which moves and wraps the model. For that "
                f"of a checkpoint, load torch.load('checkpoint-N/{FILE}') into a ModelEMA(model)."
            )
        return self._ema

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Build the EMA if the model is a new one, load it if the training is resumed; follow."""
        if not self._is_of_the_model():
            self._ema = self._build(self._trainer.model)
        schedule = self.ema.schedule or self._schedule
        self._at_end.callback(self.ema.follow(self._trainer.optimizer, schedule).remove)
        begins = "The EMA begins with its online weights, and the schedule with update 1."
        if self._resume_from is not None and not self._load(self._resume_from, begins):
            self.ema.sync()
            self.ema.update_index = 0

    def on_train_end(self, *_: object, **__: object) -> None:
        """Load the best checkpoint's EMA if the trainer has loaded its weights."""
        best = self._trainer.state.best_model_checkpoint
        if self._trainer.args.load_best_model_at_end and best is not None:
            self._load(best, "The EMA stays that of the last step.")

    def on_save(self, *_: object, **__: object) -> None:
        """Save the EMA where a subclass writes its checkpoints without `save_model`."""
        run = self._trainer._get_output_dir(self._trainer._trial)
        folder = Path(run, f"checkpoint-{self._trainer.state.global_step}")
        if folder != self._saved_in:
            self._save(folder, create=False)

    def _own(self, name: str) -> Any:  # noqa: ANN401
        """The trainer's own method. It is not kept: unpickled, it would be the wrapper."""
        return self._replaced.get(name, partial(getattr(type(self._trainer), name), self._trainer))

    def _is_of_the_model(self) -> bool:
        ema, callbacks = self._ema, self._trainer.callback_handler.callbacks
        return self in callbacks and ema is not None and ema.model is unwrap(self._trainer.model)

    def _train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self._resume_from, self._saved_in = kwargs.get("resume_from_checkpoint"), None
        with self._at_end:
            return self._own("_inner_training_loop")(*args, **kwargs)

    def _evaluate(self, name: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not self._is_of_the_model() or self.ema._swap is not None:
            return self._own(name)(*args, **kwargs)
        # A schedule-free optimizer writes weights; called by the loop, it would write the EMA's.
        getattr(self._trainer.optimizer, "eval", lambda: None)()
        with self.ema.swapped():
            return self._own(name)(*args, **kwargs)

    def _save_model(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        folder = args[0] if args else kwargs.get("output_dir")
        # An internal call without a folder is push_to_hub's.
        if folder is None or not kwargs.get("_internal_call") or not self._is_of_the_model():
            return self._own("save_model")(*args, **kwargs)
        if self._trainer.args.should_save:
            Path(folder, FILE).unlink(missing_ok=True)  # an earlier run's, of other weights
        result = self._own("save_model")(*args, **kwargs)
        # Then come the trainer's state, without which nothing resumes, and the ranks' barrier.
        self._save(Path(folder), create=True)
        return result

    def _save(self, folder: Path, *, create: bool) -> None:
        self._saved_in = folder
        state = self.ema.state_dict(full_state_dict=are_sharded(slots_of(self.ema.model)))
        if self._trainer.args.should_save and state and (create or folder.is_dir()):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / FILE) as new:
                torch.save(state, new)

    def _load(self, folder: str, otherwise: str) -> bool:
        """Load a checkpoint's EMA; if it has none, warn of what happens instead."""
        path = Path(folder, FILE)
        if not path.is_file():
            text = f"The checkpoint '{folder}' has no EMA ({FILE}): attach() did not save it. "
            warnings.warn(text + otherwise, UserWarning, stacklevel=2)
            return False
        try:
            self.ema.load_state_dict(read_file(path, mapped=True))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"The EMA in '{path}' cannot be loaded. {error}") from error
        return True
