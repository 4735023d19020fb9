"""What users say to `ModelEMA`, checked before anything is done."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from inspect import signature
from typing import TypedDict

import torch
from torch import Tensor, nn

from ema_triton.modules import Slots, are_sharded, check_model, unwrap
from ema_triton.ops.precision import PRECISIONS, RESIDUAL_DTYPE
from ema_triton.plan import Launch
from ema_triton.schedules import check_schedule

BACKENDS = ("auto", "triton", "foreach")

# Of each argument: the accepted values, and what they mean.
CHOICES: dict[str, tuple[tuple[object, ...], str]] = {
    "handle_buffers": (
        ("copy", "update", "ema_train"),
        "'copy' copies the online buffers, 'update' averages them, 'ema_train' leaves them to the "
        "EMA model in train mode.",
    ),
    "backend": (
        BACKENDS,
        "'auto' takes the Triton kernel where it can run and torch._foreach_lerp_ elsewhere.",
    ),
    "ema_dtype": (
        (None, torch.float64, torch.float32, torch.bfloat16, torch.float16),
        "It is the dtype of the EMA model's floating tensors.",
    ),
    "precision": (
        PRECISIONS,
        "It says how a bf16 or fp16 EMA takes steps smaller than its dtype's: 'exact' keeps a "
        "residual for each weight, 'stochastic' rounds by chance, 'nearest' drops it.",
    ),
    "at_end": (
        ("keep", "copy"),
        "It says whether the EMA is copied into the model when a fit has ended.",
    ),
    "nonfinite": (
        ("propagate", "skip"),
        "It says what becomes of NaN and Inf: 'propagate' lets them into the EMA, 'skip' keeps the "
        "EMA's old value there and counts.",
    ),
}


class Options(TypedDict, total=False):
    """The keyword arguments of `ModelEMA` that `EMAHandler` hands on."""

    ema_model: nn.Module | None
    as_module: bool
    backend: str
    ema_dtype: torch.dtype | None
    precision: str
    seed: int
    include: str | Sequence[str] | None
    exclude: str | Sequence[str]
    momentum_scale: Mapping[str, float] | None
    nonfinite: str


def check_choices(seed: object, **given: object) -> None:
    """Raise ValueError unless each argument is one of the accepted values."""
    for name, value in given.items():
        accepted, meaning = CHOICES[name]
        if value not in accepted:
            raise ValueError(
                f"{name} can only be one of {', '.join(map(repr, accepted))}, but got {value!r}. "
                f"{meaning}"
            )
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(
            f"seed must be an int from 0 to 2**63 - 1, but got {seed!r}. Stochastic rounding draws "
            "its random numbers from it."
        )


def check_holder(
    model: nn.Module, ema_model: nn.Module | None, as_module: bool, handle_buffers: str
) -> nn.Module | None:
    """The given EMA model, unwrapped; raise unless the EMA can be held as it is asked to be."""
    if not as_module and ema_model is not None:
        raise ValueError(
            "as_module=False makes an EMA without a module, but an ema_model is given. Leave one "
            "of the two out."
        )
    if not as_module and handle_buffers == "ema_train":
        raise ValueError(
            "handle_buffers='ema_train' leaves the buffers to the EMA model, but with "
            "as_module=False there is none. Give 'copy' or 'update', or leave as_module out."
        )
    if ema_model is None:
        return None
    check_model(ema_model)
    if unwrap(ema_model) is model:
        raise ValueError(
            "ema_model is the online model itself, so there is nothing to average. Give another "
            "instance of it, or leave ema_model out to have a copy made."
        )
    return unwrap(ema_model)


def check_has_module(module: nn.Module | None, slots: Slots) -> nn.Module:
    """The EMA model; raise RuntimeError if there is none.

    Args:
        module: The EMA model.
        slots: Where the EMA's tensors live.
    """
    if module is None:
        reason, remedy = "The EMA was built with as_module=False", "leave as_module out"
        if are_sharded(slots):
            reason = "The model is sharded, so that its EMA is kept in parts"
            remedy = "give an ema_model that is sharded likewise"
        raise RuntimeError(
            f"{reason}, and there is no ema_model. Evaluate the online model with the EMA's "
            f"weights (with ema.swapped() as model: ...), or {remedy}."
        )
    return module


def refuse_in_bank(name: str | None, what: str) -> None:
    """Raise RuntimeError if the EMA is one of a bank's, by this name."""
    if name is not None:
        raise RuntimeError(
            f"{what} of the average {name!r} alone, which is one of an EMABank's: they are updated "
            "together, in one launch. Call the bank's."
        )


def check_schedules(schedules: object) -> None:
    """Raise unless they are schedules by name."""
    if not isinstance(schedules, Mapping) or not schedules:
        raise (ValueError if isinstance(schedules, Mapping) else TypeError)(
            f"schedules must map names of averages to their schedules, but got {schedules!r}. Give "
            "e.g. {'short': HalfLife(100), 'long': HalfLife(10_000)}."
        )
    for name, schedule in schedules.items():
        if not isinstance(name, str):
            raise TypeError(f"The name of an average must be a string, but got {name!r}.")
        check_schedule(schedule)


def check_names(what: str, given: object, own: Iterable[str]) -> None:
    """Raise unless something was given for each average of a bank, by its name."""
    names = ", ".join(map(repr, own))
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{what} must map the names of this bank's averages, {names}, each to its own, but got "
            f"{given!r}."
        )
    if {*given} != {*own}:
        raise ValueError(
            f"{what} has {', '.join(map(repr, given)) or 'nothing'}, but this bank has {names}. "
            "Give one for each."
        )


def check_options(
    owner: type, options: Mapping[str, object], accepts: type, *, but_for: Collection[str] = ()
) -> None:
    """Raise TypeError if an argument is neither `owner`'s nor, after the model, `accepts`'s.

    Args:
        owner: What they were given to.
        options: The arguments.
        accepts: To what `owner` hands them on.
        but_for: Those of `accepts` that `owner` gives itself.
    """
    known = [*signature(owner).parameters, *[*signature(accepts).parameters][1:]]
    accepted = dict.fromkeys(name for name in known if name not in but_for)
    for name in options.keys() - accepted:
        names = ", ".join(one for one in accepted if one != "options")
        raise TypeError(
            f"{owner.__name__} got an unexpected keyword argument {name!r}, which would do "
            f"nothing. It takes: {names}."
        )


def check_momentum(momentum: object) -> float | Tensor:
    """The momentum as a float, or the 0-d tensor on a device that it is.

    Raises:
        ValueError: It is no weight of an average.
        TypeError: It is no number.
    """
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            raise ValueError(
                f"Invalid momentum: a {momentum.dtype} tensor of shape {tuple(momentum.shape)}. "
                "It weighs all tensors alike: give a float, or a 0-d floating tensor."
            )
        if momentum.device.type != "cpu":
            return momentum
    elif not isinstance(momentum, numbers.Real) or isinstance(momentum, bool):
        raise TypeError(
            f"Invalid momentum: {momentum!r}. It is the weight of the online weights: give a float "
            "in [0, 1], or a 0-d floating tensor."
        )
    value = float(momentum)
    if not 0 <= value <= 1:
        raise ValueError(
            f"Invalid momentum: {value}. It is the weight of the online weights (1 - decay), and "
            "outside [0, 1] the EMA diverges. Give a value in [0, 1]."
        )
    return value


def check_momentum_fits(momentum: float | Tensor, launches: Iterable[Launch]) -> str | None:
    """A remark if most of an update with this momentum would round away; else None.

    Raises:
        ValueError: It is a tensor on another device than a launch.
    """
    for launch in launches:
        dtype = launch.kind.dtype
        if isinstance(momentum, Tensor):
            if momentum.device != launch.kind.device:
                raise ValueError(
                    f"The momentum is a tensor on {momentum.device}, but '{launch.names[0]}' is on "
                    f"{launch.kind.device}, where using it would wait for the device. Give a "
                    "float, or a tensor on the model's only device."
                )
        elif launch.kind.precision == "nearest" and dtype in RESIDUAL_DTYPE and launch.scale:
            effective, resolution = launch.effective_momentum(momentum), torch.finfo(dtype).eps
            if 0 < effective < resolution:
                return (
                    f"momentum {effective:g} is below the resolution of {dtype} ({resolution:g}): "
                    "most updates of the EMA round away, and it stands still. precision='exact', "
                    "the default, keeps what precision='nearest' rounds away."
                )
    return None
