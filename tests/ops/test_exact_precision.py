"""`precision="exact"`: a bf16 or fp16 EMA accumulates what an fp32 one does."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.low_precision import (
    LOW,
    PRECISIONS,
    accumulated,
    assert_nearest,
    assert_same_bits,
    assert_same_ema,
    floating,
    move,
    run,
    spacing,
    tie,
    untie,
    zoo,
)
from tests.tolerances import update_bound


def replace_data(model: nn.Module) -> None:
    for value in model.parameters():
        value.data = value.data.clone() * 2


def replace_parameters(model: nn.Module) -> None:
    for name in ("scalar", "empty", "transposed", "image", "strided", "left"):
        value = getattr(model, name).detach()
        setattr(model, name, nn.Parameter((value * -3).clone()))


def reformat(model: nn.Module) -> None:
    model.image.data = model.image.data.contiguous()
    model.transposed.data = model.transposed.data.contiguous()
    model.odd.data = model.odd.data.t().contiguous().t()


def flatten(model: nn.Module) -> None:
    values = list(model.parameters())
    flat = torch.cat([value.detach().flatten() for value in values])
    for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
        value.data = part.view(value.shape)


def to_channels_last(model: nn.Module) -> None:
    model.left.data = model.left.data.t().contiguous().t()
    model.image.data = model.image.data.contiguous()
    model.to(memory_format=torch.channels_last)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "none": lambda model: None,
    "data": replace_data,
    "parameters": replace_parameters,
    "layout": reformat,
    "channels_last": to_channels_last,
    "flat": flatten,
    "float32": lambda model: model.float(),
    "float64": lambda model: model.double(),
    "float16": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "tie": tie,
    "untie": untie,
}


# fp16 takes the same way through the library, so a part of the changes is enough.
@pytest.mark.parametrize(
    ("dtype", "change"),
    [(torch.bfloat16, change) for change in CHANGES]
    + [(torch.float16, change) for change in ("none", "parameters", "channels_last", "untie")],
)
def test_exact_accumulates_what_an_fp32_ema_does(
    dtype: torch.dtype, change: str, backend: str, device: torch.device
) -> None:
    model = zoo(dtype, device)
    exact = ModelEMA(model, backend=backend)
    wide = ModelEMA(model, backend=backend, ema_dtype=torch.float32)
    assert exact.precision == "exact"
    for step, momentum in enumerate((0.3, 1e-4, 0.7, 1e-3)):
        move(model, step)
        if step == 2:
            CHANGES[change](model)
        exact.update(momentum)
        wide.update(momentum)
    shown, sums, truth = exact.state_dict()["weights"], accumulated(exact), accumulated(wide)
    for name in ("stat", "count"):  # copied buffers are no averages
        truth.pop(name)
        sums.pop(name)
    assert_same_bits(sums, truth)
    for name, value in sums.items():
        assert shown[name].dtype == dtype
        assert_nearest(shown[name], value)
        assert shown[name].equal(
            dict(exact.ema_model.named_parameters(remove_duplicate=False))[name]
        )
    # Without its residual the EMA would hold something else.
    assert not torch.equal(shown["odd"].float(), sums["odd"])


@pytest.mark.parametrize("dtype", LOW)
def test_exact_follows_a_tie_that_is_made_and_undone(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    model = zoo(dtype, device)
    exact = ModelEMA(model, backend=backend)
    wide = ModelEMA(model, backend=backend, ema_dtype=torch.float32)
    for step, change in enumerate((tie, replace_data, untie, tie, replace_parameters, reformat)):
        move(model, step)
        change(model)
        exact.update(0.013)
        wide.update(0.013)
        sums, truth = accumulated(exact), accumulated(wide)
        for name in ("stat", "count"):
            sums.pop(name), truth.pop(name)
        assert_same_bits(sums, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW)
def test_exact_keeps_its_digits_where_the_model_moves_between_devices(dtype: torch.dtype) -> None:
    model = zoo(dtype, torch.device("cpu"))
    exact, wide = ModelEMA(model), ModelEMA(model, ema_dtype=torch.float32)
    for step, device in enumerate(("cpu", "cuda", "cuda", "cpu", "cuda")):
        model.to(device)
        move(model, step)
        exact.update(0.013)
        wide.update(0.013)
    assert_same_bits(
        {n: v for n, v in accumulated(exact).items() if n not in ("stat", "count")},
        {n: v for n, v in accumulated(wide).items() if n not in ("stat", "count")},
    )


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", LOW)
def test_narrower_exact_ema_starts_from_the_online_values(
    dtype: torch.dtype, source: torch.dtype, backend: str, device: torch.device
) -> None:
    model = zoo(source, device)
    exact = ModelEMA(model, backend=backend, ema_dtype=dtype, handle_buffers="update")
    wide = ModelEMA(model, backend=backend, ema_dtype=torch.float32, handle_buffers="update")
    assert {v.dtype for v in exact.ema_model.parameters()} == {dtype}
    for step in range(4):
        assert_same_bits(accumulated(exact), accumulated(wide))
        move(model, step)
        exact.update(1e-3)
        wide.update(1e-3)
    exact.sync()
    wide.sync()
    assert_same_bits(accumulated(exact), accumulated(wide))
    for name, value in floating(accumulated(exact)).items():
        assert value.equal(model.state_dict()[name].float())
        assert_nearest(exact.state_dict()["weights"][name], value)


@pytest.mark.parametrize("dtype", LOW)
def test_exact_averages_buffers_alike(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    model = zoo(dtype, device)
    exact = ModelEMA(model, backend=backend, handle_buffers="update")
    wide = ModelEMA(model, backend=backend, handle_buffers="update", ema_dtype=torch.float32)
    for step in range(5):
        move(model, step)
        exact.update(1e-3)
        wide.update(1e-3)
    assert_same_bits(accumulated(exact), accumulated(wide))
    assert exact.ema_model.stat.dtype == dtype
    assert not torch.equal(exact.ema_model.stat.float(), accumulated(exact)["stat"])
    assert_nearest(exact.ema_model.stat, accumulated(exact)["stat"])


def patterns() -> Tensor:
    """Every bf16 pattern with low halves at and around a half; NaN of any payload among them."""
    high = torch.arange(-(2**15), 2**15, 37, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x3001], dtype=torch.int32)
    ends = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 1])
    return torch.cat([(high[:, None] + low).flatten(), ends.int()]).view(torch.float32)


@pytest.mark.parametrize("dtype", LOW)
def test_exact_shows_the_nearest_weights(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    values = patterns() if dtype == torch.bfloat16 else patterns() * 2**-20
    half_ways = torch.arange(0, 0x7C00, 11, dtype=torch.int16).view(torch.float16).float()
    if dtype == torch.float16:
        ends = torch.tensor([65504.0, 65519.996, 65520.0, 65520.004, 65536.0, 1e6])
        middle = (half_ways[1:] + half_ways[:-1]) / 2
        values = torch.cat([values, half_ways, middle, -middle, ends, -ends])
    model = nn.ParameterList([nn.Parameter(values.to(device))])
    exact = ModelEMA(model, backend=backend, ema_dtype=dtype)
    for act in (lambda: None, exact.sync):
        act()
        assert_same_bits(accumulated(exact), {"0": values})
        assert_nearest(exact.ema_model[0], values)
    wide = ModelEMA(model, backend=backend, ema_dtype=torch.float32)
    model[0].data.zero_()
    exact.update(0.3)
    wide.update(0.3)
    assert_same_bits(accumulated(exact), accumulated(wide))
    assert_nearest(exact.ema_model[0], accumulated(exact)["0"])


WRITES = {
    "in place": lambda model, values: model.load_state_dict(values),
    "assign": lambda model, values: model.load_state_dict(
        {name: value.clone() for name, value in values.items()}, assign=True
    ),
}


def written_values(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Values to write, also zeros, powers of two (the spacing below halves), and the largest."""
    values = {name: value.clone() for name, value in zoo_like(model, seed).items()}
    for value in values.values():
        if value.is_floating_point() and value.numel() > 9:
            flat = value.view(-1) if value.is_contiguous() else None
            if flat is not None:
                flat[:8] = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -0.5, 1024.0, 2**-13])
                flat[8:10] = torch.tensor([1.0, -1.0]).double() * torch.finfo(value.dtype).max
    return values


def zoo_like(model: nn.Module, seed: int) -> dict[str, Tensor]:
    value = next(model.parameters())
    return zoo(value.dtype, value.device, seed).state_dict()


def prepared(dtype: torch.dtype, backend: str, device: torch.device) -> ModelEMA:
    """An exact EMA that has residuals of both signs."""
    ema = ModelEMA(zoo(dtype, device), backend=backend)
    run(ema, range(2), 0.013)
    residual = accumulated(ema)["odd"].double() - ema.ema_model.odd.double()
    assert (residual < 0).any()
    assert (residual > 0).any()
    return ema


def parameters_of(ema: ModelEMA) -> dict[str, Tensor]:
    buffers = dict(ema.ema_model.named_buffers())
    return {name: value for name, value in accumulated(ema).items() if name not in buffers}


def beyond(ema: ModelEMA, starts: dict[str, Tensor], momentum: float) -> dict[str, Tensor]:
    """Which values are not those of an update from the starts, or from what rounds to them.

    A residual that was there before a weight was written is at most half a spacing, of which an
    update leaves 1 - momentum; and the update rounds in fp32.
    """
    online, found = ema.model.state_dict(), {}
    for name, value in parameters_of(ema).items():
        start, new = starts[name].double(), online[name].double()
        half = spacing(start, ema.ema_model.odd.dtype) / 2
        bound = (1 - momentum) * half + update_bound(start.abs() + half, new, torch.float32)
        error = (value.double() - ((1 - momentum) * start + momentum * new)).abs()
        found[name] = error > bound
    return found


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("dtype", LOW)
def test_exact_goes_on_within_half_a_spacing_of_written_weights(
    dtype: torch.dtype, write: str, backend: str, device: torch.device
) -> None:
    ema = prepared(dtype, backend, device)
    before = parameters_of(ema)
    WRITES[write](ema.ema_model, written_values(ema.model, 7))
    written = {name: value.clone() for name, value in ema.ema_model.state_dict().items()}
    twin, resumed = copy.deepcopy(ema), ModelEMA(ema.model, backend=backend)
    resumed.load_state_dict(ema.state_dict())
    for one in (ema, twin, resumed):
        one.update(0.25)
        assert not any(mask.any() for mask in beyond(one, written, 0.25).values())
        weights = dict(one.ema_model.named_parameters(remove_duplicate=False))
        for name, value in parameters_of(one).items():
            assert weights[name].dtype == dtype
            assert_nearest(weights[name], value)
    assert_same_ema(ema, twin)
    # The check fails for the values of before, and for what is one spacing away.
    away = {name: written[name].double() + spacing(written[name], dtype) for name in before}
    for starts in (before, away):
        assert all(mask.any() for mask in beyond(ema, starts, 0.25).values() if mask.numel())


@pytest.mark.parametrize("dtype", LOW)
def test_exact_keeps_its_digits_where_nothing_is_written(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    model = zoo(dtype, device)
    exact = ModelEMA(model, backend=backend)
    wide = ModelEMA(model, backend=backend, ema_dtype=torch.float32)
    for step in range(4):
        move(model, step)
        exact.update(0.013)
        wide.update(0.013)
        exact.ema_model.requires_grad_(False).eval()
        exact.state_dict()
        copy.deepcopy(exact.ema_model.state_dict())
        copy.deepcopy(exact)
        _ = [value.sum().item() for value in exact.ema_model.parameters()]
        torch.save(exact.state_dict(), io.BytesIO())
        exact.ema_model.to(dtype).to(device)
    assert_same_bits(parameters_of(exact), parameters_of(wide))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", LOW)
def test_own_writes_bump_the_versions_of_the_weights(
    dtype: torch.dtype, precision: str, backend: str, device: torch.device
) -> None:
    ema = ModelEMA(zoo(dtype, device), backend=backend, precision=precision)
    for act in (lambda: ema.update(0.25), ema.sync, lambda: ema.update(0.5)):
        names = {n: p for n, p in ema.ema_model.named_parameters() if p.numel()}
        before = {name: value._version for name, value in names.items()}
        act()
        assert all(value._version > before[name] for name, value in names.items())
