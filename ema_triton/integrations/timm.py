"""`ModelEmaV3`: the constructor and methods of timm's, and each update in one launch.

timm's train script, tasks and checkpoint saver take it as their own. It does not import timm.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ema_triton.model_ema import ModelEMA
from ema_triton.modules import are_sharded, check_model, slots_of, unwrap
from ema_triton.schedules import check_in_range


class ModelEmaV3(nn.Module):
    """timm's `ModelEmaV3`: the EMA of a model, as a module around the EMA model.

        decay = clip(1 - (1 + s / warmup_gamma) ** -warmup_power, min_decay, decay)

    with `use_warmup`, where s = step - update_after_step - 1; constant otherwise. While s is not
    above 0, the online weights are copied; and without a step `decay` counts as it is. An fp32 EMA
    has timm's values bit for bit, but tied weights are averaged once, not once per name.

    Args:
        model: The online model; a DistributedDataParallel or torch.compile wrapper is taken off.
        decay: The weight of the old value, in [0, 1]; may be assigned later, as the next five.
        min_decay: With `use_warmup`, the decay after the copies is never below it; in [0, 1].
        update_after_step: So many steps, and one more, copy the online weights.
        use_warmup: Whether the decay grows with the step.
        warmup_gamma: Above 0, in steps.
        warmup_power: Above 0.
        device: The model's, or None: there is no EMA on another one.
        dtype: dtype of the EMA's floating tensors, by default the online ones'.
        stochastic_rounding: Whether bf16 and fp16 tensors of the EMA are rounded by chance, right
            in the mean. Otherwise to nearest, and with a usual decay they stand still.
        stochastic_rounding_seed: From 0 to 2**63 - 1; the same on all ranks keeps them equal.
        foreach: Without effect; there is one launch either way.
        exclude_buffers: Whether floating buffers are copied as all others are, and not averaged.
        precision: "exact", "stochastic" or "nearest", instead of `stochastic_rounding`. "exact"
            accumulates as an fp32 EMA does, in 2 more bytes per bf16 parameter (4 per fp16 one),
            which are in `ema.state_dict()` and not in timm's checkpoints.
        backend: As of `ModelEMA`.
        include: As of `ModelEMA`.
        exclude: As of `ModelEMA`, e.g. floating buffers that are no statistics.
        momentum_scale: As of `ModelEMA`, factors for 1 - decay.
        nonfinite: As of `ModelEMA`.

    Attributes:
        module: The EMA model, in eval mode; what timm's `unwrap_model` and saver take.
        ema: The `ModelEMA`, with all that it can: `distance()`, `swapped()`, `copy_to(model)`.

    Raises:
        ValueError: An argument is not one of the accepted values.
        TypeError: An argument is no number, or a tensor is of a kind that cannot be averaged.
        NotImplementedError: `device` is not the model's, or the model is sharded.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = ModelEmaV3(model, decay=0.75)
        >>> _ = model.weight.data.fill_(1.0), ema.module.weight.data.fill_(0.0)
        >>> ema.update(model, step=2)
        >>> ema.module.weight
        Parameter containing:
        tensor([[0.2500, 0.2500]])
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        *,
        precision: str | None = None,
        backend: str = "auto",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        momentum_scale: Mapping[str, float] | None = None,
        nonfinite: str = "propagate",
    ) -> None:
        super().__init__()
        fraction = "Outside [0, 1] the EMA is no average and may diverge: give a value in [0, 1]."
        positive = "The warm-up's decay would not rise: give a finite value above 0."
        least, most = math.ulp(0.0), sys.float_info.max
        self.decay = check_in_range("decay", decay, 0, 1, fraction)
        self.min_decay = check_in_range("min_decay", min_decay, 0, 1, fraction)
        self.warmup_gamma = check_in_range("warmup_gamma", warmup_gamma, least, most, positive)
        self.warmup_power = check_in_range("warmup_power", warmup_power, least, most, positive)
        self.update_after_step, self.use_warmup = update_after_step, use_warmup
        self.device, self.dtype, self.foreach = device, dtype, foreach
        self.exclude_buffers, self.stochastic_rounding = exclude_buffers, stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed
        check_model(model)
        _check_whole_and_here(model, device)
        self._build = partial(
            ModelEMA,
            handle_buffers="copy" if exclude_buffers else "update",
            ema_dtype=dtype,
            precision=precision or ("stochastic" if stochastic_rounding else "nearest"),
            seed=stochastic_rounding_seed,
            backend=backend,
            include=include,
            exclude=exclude,
            momentum_scale=momentum_scale,
            nonfinite=nonfinite,
        )
        self.ema = self._build(model)
        self.module = self.ema.ema_model

    def get_decay(self, step: int | None = None) -> float:
        """The decay of the update after this step of the optimizer, counting from 1."""
        if step is not None and step <= self.update_after_step + 1:
            return 0.0
        if step is None or not self.use_warmup:
            return self.decay
        since = step - self.update_after_step - 1
        decay = 1 - math.pow(1 + since / self.warmup_gamma, -self.warmup_power)
        return max(min(decay, self.decay), self.min_decay)

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Move the EMA towards the model: ema = lerp(ema, online, 1 - get_decay(step)).

        Args:
            model: The online model, in any wrapper; or another one with its names and shapes,
                which is the online model from then on.
            step: The optimizer's step, counting from 1, also of a resumed training. None: no
                warm-up, and no copies before.

        Raises:
            ValueError: Names or shapes do not fit. The EMA stays as it is then.
        """
        momentum = 1 - self.get_decay(step)
        self._pair_with(model)
        if step is not None and self.ema.update_index == 0:
            # timm's checkpoints have no random state: a resumed training draws by its step.
            self.ema._state.set_random_state(self.stochastic_rounding_seed, max(0, step - 1))
        self.ema.update(momentum)

    def set(self, model: nn.Module) -> None:
        """Copy the model into the EMA model, buffers too; argument and errors are `update`'s."""
        self._pair_with(model)
        self.ema.sync()

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """What the EMA model computes."""
        return self.module(*args, **kwargs)

    def _pair_with(self, model: nn.Module) -> None:
        """Have `ema` be of this online model and of `module`, which both may be others."""
        own, averaged = unwrap(self.module), self.ema._state.module
        if own is averaged and _innermost(model) is _innermost(self.ema.model):
            return
        ema = self._build(model, ema_model=own)
        if own is averaged:
            ema.load_state_dict(self.ema.state_dict(clone=True))
        self.ema = ema


def _innermost(model: nn.Module) -> nn.Module:
    """The model without wrappers, as timm's tasks give it to `update`."""
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    return _innermost(inner) if isinstance(inner, nn.Module) else model


def _check_whole_and_here(model: nn.Module, device: torch.device | str | None) -> None:
    """Raise NotImplementedError if the model is sharded, or is on another device than asked."""
    if are_sharded(slots_of(unwrap(model))):
        raise NotImplementedError(
            "The model is sharded (FSDP2, DTensor), so that its EMA is kept in parts, and there is "
            "no EMA model for timm to validate and save. Use ema_triton.ModelEMA: validate in its "
            "swapped(), and save its state_dict(full_state_dict=True)."
        )
    wanted = None if device is None else torch.device(device)
    for name, parameter in model.named_parameters():
        found = parameter.device
        if wanted and (found.type != wanted.type or wanted.index not in (None, found.index)):
            raise NotImplementedError(
                f"device={str(device)!r}, but '{name}' is on {found}, and this EMA is where the "
                "online model is, for one launch to read both. Leave device out (in timm's script "
                "--model-ema-force-cpu), with dtype=torch.bfloat16 if memory is short; or take "
                "timm.utils.ModelEmaV3, which copies the model to the other device at every update."
            )
