"""`EMACallback`: the EMA of a model that Lightning's Trainer trains, on top of `ModelEMA`."""

from __future__ import annotations

import copy
import importlib
import warnings
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any

from torch import nn

from ema_triton.arguments import Options, check_choices, check_options
from ema_triton.checkpoint.state_dict import of_weight_averaging, with_weights
from ema_triton.distributed import collectives, dtensor
from ema_triton.model_ema import ModelEMA
from ema_triton.modules import are_sharded, check_model, slots_of, submodule_of
from ema_triton.schedules import Schedule, check_schedule

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from typing_extensions import Unpack
else:
    # Of both packages, as each has a Trainer. An old one beside a new torch may raise anything.
    found = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(Exception):
            found.append(importlib.import_module(package))
    new = [one for one in found if tuple(map(int, one.__version__.split(".")[:2])) >= (2, 4)]
    if not new:
        numbers = [f"{one.__name__} {one.__version__}" for one in found] or "none to import"
        what = f"EMACallback needs Lightning 2.4 or later, but found {numbers}. Install it with:"
        raise ImportError(f"{what} pip install 'lightning>=2.4'. Or use ModelEMA.")
    Callback = type("Callback", tuple(one.Callback for one in new), {})


class EMACallback(Callback):
    """Keep an exponential moving average of a model's weights while Lightning's Trainer trains it.

    It is updated after each real step of the optimizer. Validation (the sanity check too), test and
    predict see the EMA, and whatever ends them, the online weights are back. In checkpoints
    `state_dict` has the EMA, `current_model_state` the online weights. `ema` is the `ModelEMA`.

    Args:
        schedule: The function from the update index, counting from 1, to the momentum.
        submodule: The name of the part of the LightningModule to average; by default all of it.
        optimizer: The index of the optimizer whose steps count, in `configure_optimizers`' order.
        at_end: "copy" copies the EMA into the model when a fit has ended, "keep" does not.
        name: What checkpoints call this EMA; each callback of a Trainer needs its own.
        handle_buffers: As for `ModelEMA`.
        **options: The other keyword arguments of `ModelEMA`, except `ema_model`.

    Raises:
        ValueError, TypeError: An argument is not accepted, or unknown.

    Examples:
        >>> from ema_triton import HalfLife
        >>> callback = EMACallback(HalfLife(1000))  # for Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        submodule: str = "",
        optimizer: int = 0,
        at_end: str = "keep",
        name: str = "ema",
        handle_buffers: str = "copy",
        **options: Unpack[Options],
    ) -> None:
        check_schedule(schedule)
        check_options(EMACallback, options, ModelEMA, but_for=["ema_model"])
        check_choices(options.get("seed", 0), at_end=at_end)
        self._build = partial(ModelEMA, handle_buffers=handle_buffers, **options)
        # An EMA of nothing refuses the other arguments; patterns would match nothing there.
        self._build(nn.Module(), include=None, exclude=(), momentum_scale=None)
        self.ema: ModelEMA | None = None
        self.name, self.submodule, self.at_end = name, submodule, at_end
        self._schedule, self._optimizer = schedule, optimizer
        self._load: list[dict[str, Any]] = []  # arguments of load_state_dict, for a new EMA
        self._loaded: bool | None = None  # whether this run evaluates a checkpoint
        self._following, self._swap = ExitStack(), ExitStack()

    @property
    def state_key(self) -> str:
        """What the state is called in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the EMA: by now the model is in its place, and sharded if it is to be."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if any(base.__name__ == "WeightAveraging" for base in type(other).__mro__):
                both = f"EMACallback and {type(other).__name__} would both be validated and saved"
                raise ValueError(f"{both} under state_dict. Take one of them out of the Trainer.")
        if self._optimizer not in range(count := len(trainer.optimizers)):
            made = f"but configure_optimizers() made {count} optimizer(s)"
            raise ValueError(f"optimizer={self._optimizer}, {made}. Give the index of one, from 0.")
        if any(getattr(one, "save_weights_only", False) for one in trainer.checkpoint_callbacks):
            what = "A ModelCheckpoint with save_weights_only=True saves the online weights, as it"
            warnings.warn(f"{what} asks no callback for the EMA. Leave it out.", stacklevel=2)
        check_model(trainer.strategy.model)  # FSDP1 may be around the LightningModule only
        self._prepare(pl_module)

    def _prepare(self, pl_module: LightningModule) -> ModelEMA:
        module = submodule_of(pl_module, self.submodule)
        if self.ema is None or self.ema.model is not module:
            self.ema = self._build(module)
            self.ema.schedule = self._schedule
        while self._load:
            self.ema.load_state_dict(**self._load.pop())
        return self.ema

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizer: by now its state is restored, which with FSDP2 takes a step."""
        ema, optimizer = self._prepare(pl_module), trainer.optimizers[self._optimizer]
        self._following.enter_context(ema.follow(optimizer, ema.schedule or self._schedule))

    def _shown(self, trainer: Trainer, pl_module: LightningModule) -> ModelEMA | None:
        """The EMA, if it is of this model and no callback before has any of its parameters."""
        if self._loaded is None:  # later, ckpt_path may be what the Tuner saved
            self._loaded = trainer.state.fn != "fit" and bool(trainer.ckpt_path)
        before = takewhile(lambda one: one is not self, _averages(trainer))
        others = chain(*(one.ema.model.parameters() for one in before if one.ema))
        with suppress(ValueError):  # another model may have no such part
            if self.ema and self.ema.model is submodule_of(pl_module, self.submodule):
                return self.ema if {*self.ema.model.parameters()}.isdisjoint(others) else None
        return None

    def _swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (ema := self._shown(trainer, pl_module)) and not self._loaded:
            self._swap.enter_context(ema.swapped())
            ema._swap._warning.remove()  # type: ignore[union-attr]  # see on_save_checkpoint

    def _swap_out(self, *_: object, **__: object) -> None:
        self._swap.close()

    def _end(self, trainer: Trainer, *_: object, **__: object) -> None:
        self._load, self._loaded = [], None
        self._swap.close()
        if trainer.state.fn == "fit":  # and no evaluation in the midst of one
            self._following.close()

    on_validation_start = on_test_start = on_predict_start = _swap_in
    on_validation_end = on_test_end = on_predict_end = _swap_out
    setup = on_train_end = on_exception = teardown = _end

    def on_fit_end(self, *_: object, **__: object) -> None:
        """Copy the EMA into the model if asked; every checkpoint has been written."""
        if self.at_end == "copy" and self.ema is not None:
            self.ema.copy_to(self.ema.model)

    def state_dict(self) -> dict[str, Any]:
        """The EMA's state, if it is built; of a sharded model with whole tensors, on rank 0."""
        full = self.ema is not None and are_sharded(slots_of(self.ema.model))
        return {} if self.ema is None else self.ema.state_dict(full_state_dict=full)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the EMA under `state_dict`, and the online weights under `current_model_state`."""
        ema, shown = self._shown(trainer, pl_module), checkpoint["state_dict"]
        if ema is None:
            return
        in_shards = any(map(dtensor.is_sharded, shown.values()))
        if "current_model_state" not in checkpoint:
            swapped = [one.ema for one in _averages(trainer) if one.ema and one.ema._swap]
            for one in swapped:
                one.swap_out()
            online = trainer.strategy.lightning_module_state_dict() if swapped else shown
            if in_shards:  # beside state_dict, Lightning saves what rank 0 has
                online = collectives.gather_model(pl_module)
            checkpoint["current_model_state"] = copy.deepcopy(online) if swapped else online
            for one in swapped:
                one.swap_in()
                one._swap._warning.remove()  # type: ignore[union-attr]
        state = ema.state_dict() if in_shards else checkpoint["callbacks"].get(self.state_key, {})
        checkpoint["state_dict"] = with_weights(shown, state.get("weights", {}), self.submodule)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the online weights, and keep the EMA's state until it is built."""
        state = checkpoint["callbacks"].get(self.state_key)
        if self._loaded is not None:  # within a run, the Tuner restores what it saved before
            if self.ema and state:
                self.ema.load_state_dict(state)
        elif trainer.state.fn != "fit":
            return  # it is to be evaluated
        else:
            found = state or of_weight_averaging(checkpoint, self.submodule)
            self.ema, self._load = None, [{"state": found, "strict": bool(state)}] if found else []
        if online := checkpoint.get("current_model_state"):
            collectives.load_model(pl_module, online, strict=pl_module.strict_loading)


def _averages(of: Trainer) -> list[EMACallback]:
    return [c for c in of.callbacks if isinstance(c, EMACallback)]  # type: ignore[attr-defined]
