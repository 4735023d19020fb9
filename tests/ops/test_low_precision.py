"""What a bf16 or fp16 EMA promises in each precision, tested from outside as a user would."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.tolerances import update_bound

LOW = (torch.bfloat16, torch.float16)
PRECISIONS = ("exact", "stochastic", "nearest")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(params=["foreach", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def device(backend: str, kernel_device: torch.device) -> torch.device:
    return kernel_device if backend == "triton" else torch.device("cpu")


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def join(weight: Tensor, residual: Tensor | None) -> Tensor:
    """The accumulated value of a weight and what a state dict holds beside it."""
    weight = weight.detach()
    if residual is None:
        return weight
    assert residual.shape == weight.shape
    if weight.dtype == torch.float16:
        assert residual.dtype == torch.float32
        return residual
    assert (weight.dtype, residual.dtype) == (torch.bfloat16, torch.int16)
    bits = (weight.contiguous().view(torch.int16).int() << 16) + residual.contiguous().int()
    return bits.view(torch.float32)


def accumulated(ema: ModelEMA) -> dict[str, Tensor]:
    return joined(ema.state_dict())


def joined(state: dict) -> dict[str, Tensor]:
    """What a state holds."""
    weights, residuals = state["weights"], state["residuals"]
    values = {}
    for name, weight in weights.items():
        values[name] = join(weight, residuals.get(name)).clone()
        if state["precision"] == "exact" and weight.dtype in LOW:
            values[name] = values[name].float()  # without a residual, the weight is all there is
    return values


def bits(value: Tensor) -> Tensor:
    """Its bits, where every NaN has the same ones."""
    value = value.detach().contiguous()
    if value.is_complex():
        value = torch.view_as_real(value)
    if value.is_floating_point():
        value = torch.where(value.isnan(), torch.full_like(value, float("nan")), value)
    return value.view(BITS[value.element_size()])


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        assert torch.equal(bits(value).cpu(), bits(other).cpu()), name


def floating(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if value.is_floating_point()}


def magnitude(pattern: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 values of the bit patterns of |x|; infinity as the next power of two, as IEEE has."""
    value = pattern.to(torch.int16).view(dtype).double()
    return torch.where(value.isinf(), torch.tensor(2.0, dtype=torch.float64) ** top(dtype), value)


def top(dtype: torch.dtype) -> int:
    return 128 if dtype == torch.bfloat16 else 16


def spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of |value| to the next larger value of `dtype`, in float64."""
    pattern = value.detach().contiguous().to(dtype).view(torch.int16).int() & 0x7FFF
    return magnitude(pattern + 1, dtype) - magnitude(pattern, dtype)


def assert_nearest(weight: Tensor, value: Tensor) -> None:
    """No neighbour of `weight` in its dtype is nearer to `value` than it is."""
    dtype = weight.dtype
    weight, value = weight.detach().contiguous().cpu(), value.detach().contiguous().cpu()
    assert torch.equal(weight.isnan(), value.isnan())
    assert weight[value.isinf()].equal(value[value.isinf()].to(dtype))
    weight, value = weight[value.isfinite()], value[value.isfinite()].double()
    assert torch.equal(weight.signbit()[weight != 0], value.signbit()[weight != 0])
    pattern = weight.view(torch.int16).int() & 0x7FFF
    infinite = weight.isinf()
    error = (value.abs() - magnitude(pattern, dtype)).abs()
    above = (value.abs() - magnitude((pattern + 1).where(~infinite, pattern), dtype)).abs()
    below = (value.abs() - magnitude((pattern - 1).clamp(min=0), dtype)).abs()
    assert (error <= above).all()
    assert (error <= below).all()


def zoo(dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """A model of every kind of tensor: odd, 0-d, empty, tied, and in several memory layouts."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    model = nn.Module()
    model.odd = nn.Parameter(randn(7, 13))
    model.scalar = nn.Parameter(randn())
    model.one = nn.Parameter(randn(1))
    model.empty = nn.Parameter(randn(3, 0, 2))
    model.transposed = nn.Parameter(randn(5, 9).t())
    model.image = nn.Parameter(randn(5, 3, 3, 3).to(memory_format=torch.channels_last))
    model.strided = nn.Parameter(randn(9, 6)[:, ::2])
    model.left = nn.Parameter(randn(6, 5))
    model.right = nn.Parameter(randn(6, 5))
    model.tied = model.odd
    model.frozen = nn.Parameter(randn(17), requires_grad=False)
    model.register_buffer("stat", randn(11))
    model.register_buffer("count", torch.tensor(3, device=device))
    return model


@torch.no_grad()
def move(model: nn.Module, step: int) -> None:
    """Change the online model as training would, by the same values for the same `step`."""
    generator = torch.Generator().manual_seed(1000 + step)
    for _, value in sorted((*model.named_parameters(), *model.named_buffers())):
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.add_((0.1 * noise).to(value))
        else:
            value.add_(1)


def run(ema: ModelEMA, steps: range, momentum: float = 0.05) -> None:
    for step in steps:
        move(ema.model, step)
        ema.update(momentum)


# 1. exact


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


def tie(model: nn.Module) -> None:
    model.right = model.left


def untie(model: nn.Module) -> None:
    model.tied = nn.Parameter(model.odd.detach().clone() + 1)


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
        mine, theirs = accumulated(exact), accumulated(wide)
        for name in ("stat", "count"):
            mine.pop(name), theirs.pop(name)
        assert_same_bits(mine, theirs)


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
    """Every bf16 pattern with rests at and around a half; NaN of any payload among them."""
    high = torch.arange(-(2**15), 2**15, 37, dtype=torch.int32) << 16
    rest = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x3001], dtype=torch.int32)
    ends = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 1])
    return torch.cat([(high[:, None] + rest).flatten(), ends.int()]).view(torch.float32)


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


# 2. weights written beside their residuals


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
    """An exact EMA that holds rests of both signs beside its weights."""
    ema = ModelEMA(zoo(dtype, device), backend=backend)
    run(ema, range(2), 0.013)
    rest = accumulated(ema)["odd"].double() - ema.ema_model.odd.double()
    assert (rest < 0).any()
    assert (rest > 0).any()
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
def test_exact_keeps_its_digits_where_nobody_writes(
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


# 3. state


def small(dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    return model.to(dtype).to(device)


def plain(dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu") -> nn.Sequential:
    """Without buffers, which keep no more than their dtype."""
    model = small(dtype, torch.device(device), seed)
    return nn.Sequential(model[0], model[2])


def saved(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_ema(left: ModelEMA, right: ModelEMA) -> None:
    mine, theirs = left.state_dict(), right.state_dict()
    assert_same_bits(mine["weights"], theirs["weights"])
    assert_same_bits(joined(mine), joined(theirs))
    assert (mine["precision"], mine["random_state"]) == (
        theirs["precision"],
        theirs["random_state"],
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", LOW)
def test_resumed_run_is_the_uncut_one(
    dtype: torch.dtype, precision: str, backend: str, device: torch.device
) -> None:
    options = {"backend": backend, "precision": precision, "handle_buffers": "update"}
    ema = ModelEMA(small(dtype, device), seed=11, **options)
    run(ema, range(2))
    state, online = saved(ema.state_dict()), copy.deepcopy(ema.model.state_dict())
    twins = [copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))]
    run(ema, range(2, 4))
    resumed = ModelEMA(small(dtype, device, 1), seed=99, **options)
    resumed.model.load_state_dict(online)
    with no_warning():
        resumed.load_state_dict(state)
    for other in (resumed, *twins):
        run(other, range(2, 4))
        assert_same_ema(other, ema)
    assert ema.state_dict()["random_state"] == (
        {"seed": 11, "updates": 4} if precision == "stochastic" else None
    )
    # A run that starts from the weights alone ends elsewhere.
    fresh = ModelEMA(small(dtype, device, 1), seed=99, **options)
    fresh.model.load_state_dict(online)
    fresh.ema_model.load_state_dict(state["weights"])
    run(fresh, range(2, 4))
    same = torch.equal(accumulated(fresh)["0.weight"], accumulated(ema)["0.weight"])
    assert same == (precision == "nearest")


@pytest.mark.parametrize("there", ["foreach", "triton"])
@pytest.mark.parametrize("precision", ["exact", "stochastic"])
@pytest.mark.parametrize("dtype", LOW)
def test_run_goes_on_under_the_other_backend(
    dtype: torch.dtype, precision: str, there: str, kernel_device: torch.device
) -> None:
    pytest.importorskip("triton")
    other = {"foreach": "triton", "triton": "foreach"}[there]
    model = small(dtype, kernel_device)
    first = ModelEMA(model, backend=there, precision=precision, seed=5)
    # Halves and quarters make products exact: with FMA or without, a step has the same bits.
    run(first, range(2), 0.25)
    second = ModelEMA(small(dtype, kernel_device, 1), backend=other, precision=precision)
    second.model.load_state_dict(model.state_dict())
    second.load_state_dict(saved(first.state_dict()))
    run(first, range(2, 4), 0.25)
    run(second, range(2, 4), 0.25)
    assert_same_ema(first, second)


DTYPES = (torch.float32, *LOW)


def fractions(model: nn.Module, digits: int) -> None:
    """Values in [1, 2) that need exactly `digits` binary digits after the point."""
    generator = torch.Generator().manual_seed(digits)
    with torch.no_grad():
        for value in model.parameters():
            odd = 2 * torch.randint(2 ** (digits - 1), value.shape, generator=generator) + 1
            value.copy_(1 + odd.double() * 2.0**-digits)


@pytest.mark.parametrize("there", PRECISIONS)
@pytest.mark.parametrize("here", PRECISIONS)
def test_states_of_any_precision_and_dtype_load(here: str, there: str) -> None:
    for ema_dtype in DTYPES:
        for own_dtype in DTYPES:
            # An fp32 model of 20 digits: each low dtype loses some, where it keeps no residual.
            source = ModelEMA(plain(torch.float32), **_of(there, ema_dtype))
            fractions(source.model, 20)
            source.sync()
            values = joined(saved(source.state_dict()))
            target = ModelEMA(plain(torch.float32, 1), **_of(here, own_dtype))
            digits = {torch.float32: 20, torch.bfloat16: 7, torch.float16: 10}
            held = 20 if there == "exact" else digits[ema_dtype]
            keeps = 20 if here == "exact" else digits[own_dtype]
            assert (values["0.weight"].double() * 2.0**held).frac().eq(0).all()
            state = saved(source.state_dict())
            if held == 7 and own_dtype == torch.float16:
                continue  # 7 digits fit: see the next test
            if keeps < held:
                with pytest.warns(UserWarning, match="^The state was loaded; but .*rounded"):
                    target.load_state_dict(state)
            else:
                with no_warning():
                    target.load_state_dict(state)
            for name, value in floating(values).items():
                loaded = joined(target.state_dict())[name]
                expected = value.float() if keeps >= held else value.to(own_dtype).float()
                assert torch.equal(loaded.float(), expected), (ema_dtype, own_dtype, name)


def _of(precision: str, dtype: torch.dtype) -> dict:
    return {"precision": precision, "ema_dtype": dtype, "backend": "foreach"}


@pytest.mark.parametrize("here", PRECISIONS)
@pytest.mark.parametrize("own_dtype", LOW)
def test_representable_values_load_without_a_warning(own_dtype: torch.dtype, here: str) -> None:
    for ema_dtype in DTYPES:
        for there in PRECISIONS:
            source = ModelEMA(plain(torch.float32), **_of(there, ema_dtype))
            fractions(source.model, 6)
            source.sync()
            target = ModelEMA(plain(torch.float32, 1), **_of(here, own_dtype))
            with no_warning():
                target.load_state_dict(saved(source.state_dict()))
            for name, value in source.model.named_parameters():
                assert torch.equal(accumulated(target)[name].float(), value)


def test_double_values_are_said_to_be_rounded() -> None:
    source = ModelEMA(plain(torch.float64), backend="foreach")
    fractions(source.model, 40)
    source.sync()
    target = ModelEMA(plain(torch.bfloat16, 1), backend="foreach")
    with pytest.warns(UserWarning, match=r"^The state was loaded; but .*rounded"):
        target.load_state_dict(source.state_dict())
    for name, value in source.model.named_parameters():
        assert torch.equal(accumulated(target)[name], value.float())


@pytest.mark.parametrize("dtype", LOW)
def test_state_of_a_module_loads_and_says_what_it_does_not_know(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    ema = ModelEMA(plain(dtype, 0, device), backend=backend)
    run(ema, range(3))
    module = saved(plain(dtype, 4, device).state_dict())
    with pytest.warns(UserWarning, match="^The state was loaded; but .*module's state dict"):
        ema.load_state_dict(module)
    weights = {name: value.float() for name, value in module.items()}
    assert_same_bits(accumulated(ema), weights)
    wider = saved(plain(torch.float32, 5, device).state_dict())
    with no_warning():
        ema.load_state_dict(wider)
    assert_same_bits(
        accumulated(ema),
        dict(wider),
    )
    wide = ModelEMA(plain(torch.float32, 0, device), backend=backend)
    wide.load_state_dict(wider)
    with no_warning():
        for step in range(3):
            for one in (ema, wide):
                one.model.load_state_dict(plain(dtype, 20 + step, device).state_dict())
                one.update(0.01)
    assert_same_bits(
        accumulated(ema),
        accumulated(wide),
    )


@pytest.mark.parametrize("dtype", LOW)
def test_state_of_a_tied_model_loads_into_an_untied_one(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    source = ModelEMA(zoo(dtype, device), backend=backend)
    run(source, range(2), 0.013)
    model = zoo(dtype, device, 1)
    untie(model)
    exact = ModelEMA(model, backend=backend)
    wide = ModelEMA(model, backend=backend, ema_dtype=torch.float32)
    truth = accumulated(source)["odd"]
    for target in (exact, wide):
        target.load_state_dict(source.state_dict())
        for name in ("odd", "tied"):
            assert torch.equal(accumulated(target)[name], truth), name


def _damage(name: str, state: dict) -> None:
    residuals, weight = state["residuals"], "0.weight"
    if name == "shape":
        residuals[weight] = residuals[weight][:-1].clone()
    elif name == "transposed":
        residuals[weight] = residuals[weight].t().clone()
    elif name == "flat":
        residuals[weight] = residuals[weight].flatten()
    elif name == "dtype":
        residuals[weight] = residuals[weight].to(torch.int32)
    elif name == "float16":
        residuals[weight] = residuals[weight].to(torch.float16)
    elif name == "unknown":
        residuals["nobody"] = residuals[weight]
    elif name == "of an integer":
        residuals["1.num_batches_tracked"] = torch.tensor(0, dtype=torch.int16)
    elif name == "no tensor":
        residuals[weight] = residuals[weight].tolist()
    elif name == "none":
        residuals[weight] = None
    elif name == "list":
        state["residuals"] = list(residuals.values())
    elif name == "precision":
        state["precision"] = "kahan"
    elif name == "version":
        state["version"] = 1000
    elif name == "weight shape":
        state["weights"]["2.bias"] = torch.zeros(4)
    elif name == "weight missing":
        del state["weights"]["2.bias"]
    else:
        del state[name.removeprefix("no ")]


DAMAGES = [
    "shape",
    "transposed",
    "flat",
    "dtype",
    "float16",
    "unknown",
    "of an integer",
    "no tensor",
    "none",
    "list",
    "precision",
    "version",
    "weight shape",
    "weight missing",
    "no version",
    "no weights",
    "no precision",
    "no residuals",
    "no random_state",
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("dtype", LOW)
def test_damaged_state_changes_nothing(dtype: torch.dtype, damage: str) -> None:
    cpu = torch.device("cpu")
    source = ModelEMA(small(dtype, cpu, 1), backend="foreach")
    run(source, range(3))
    state = saved(source.state_dict())
    target = ModelEMA(small(dtype, cpu, 2), backend="foreach")
    run(target, range(2))
    before = copy.deepcopy(target)
    _damage(damage, state)
    with pytest.raises(ValueError, match=r"\w"):
        target.load_state_dict(state)
    assert_same_ema(target, before)
    for ema in (target, before):
        run(ema, range(2, 4))
    assert_same_ema(target, before)


@pytest.mark.parametrize(
    "random_state",
    [
        {"seed": -1, "updates": 0},
        {"seed": 2**63, "updates": 0},
        {"seed": True, "updates": 0},
        {"seed": 0, "updates": -1},
        {"seed": 0, "updates": 0.5},
        {"seed": 0},
        {"updates": 0},
        [0, 0],
        "0",
    ],
)
def test_a_damaged_random_state_changes_nothing(random_state: object) -> None:
    cpu = torch.device("cpu")
    options = {"backend": "foreach", "precision": "stochastic"}
    state = saved(ModelEMA(small(torch.bfloat16, cpu, 1), **options).state_dict())
    target = ModelEMA(small(torch.bfloat16, cpu, 2), seed=3, **options)
    run(target, range(2))
    before = copy.deepcopy(target)
    state["random_state"] = random_state
    with pytest.raises(ValueError, match=r"\w"):
        target.load_state_dict(state)
    assert_same_ema(target, before)


# 4. stochastic


def stochastic(values: Tensor, dtype: torch.dtype, backend: str, seed: int = 0) -> ModelEMA:
    """A stochastic EMA that an update by 1 sets to the rounded `values`."""
    model = nn.ParameterList([nn.Parameter(values, requires_grad=False)])
    return ModelEMA(model, ema_dtype=dtype, precision="stochastic", backend=backend, seed=seed)


# A quarter of a normal's spacing above 1; both sides of 0; subnormals; a large one; near a power
# of two, where the spacing changes. The rest of each in units of its spacing is its chance.
PARTS = (0.25, 0.5, 0.03, 0.9)


def between(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    starts = [0.0, tiny, 5 * tiny, info.smallest_normal - tiny, info.smallest_normal, 0.1, 1.0]
    starts += [2 - info.eps, 3.0, 1000.0, info.max / 4, info.max / 2]
    low = torch.tensor(starts, dtype=torch.float64).to(dtype)
    values = low.double()[:, None] + spacing(low, dtype)[:, None] * torch.tensor(PARTS).double()
    values = values.flatten()
    return torch.cat([values, -values]).float()


def z_scores(result: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the count of draws away from zero, by value; asserts that only neighbours occur."""
    values = values.double()
    count = result.shape[1]
    grid = values.abs().to(dtype).view(torch.int16).int()
    low = magnitude(grid, dtype)
    grid = torch.where(low > values.abs(), grid - 1, grid)
    low, high = magnitude(grid, dtype), magnitude(grid + 1, dtype)
    shown = result.double() * torch.where(values < 0, -1.0, 1.0)[:, None]
    away = shown == high[:, None]
    assert (away | (shown == low[:, None])).all()
    chance = (values.abs() - low) / (high - low)
    spread = (count * chance * (1 - chance)).sqrt()
    return (away.sum(1) - count * chance) / spread


# 96 values a run, 8 runs and a fixed seed: by chance one z passes 5 in about 1 of 1,000 suites.
Z = 5.0


@pytest.mark.parametrize("momentum", [1.0, 0.25])
@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_draws_each_neighbour_by_its_distance(
    dtype: torch.dtype, momentum: float, backend: str, device: torch.device
) -> None:
    values = between(dtype)
    if momentum < 1:
        # From 0 a quarter of the online value is exact; what underflows fp32 cannot be asked.
        values = values[(values.abs() < 2.0**14) & (values.abs() > 2.0**-120)]
    count = 2000
    online = (values / momentum)[:, None].repeat(1, count).to(device)
    ema = stochastic(torch.zeros_like(online), dtype, backend)
    ema.model[0].copy_(online)
    ema.update(momentum)
    result = ema.ema_model[0]
    assert result.dtype == dtype
    scores = z_scores(result.cpu(), values, dtype)
    assert scores.abs().max() < Z
    # A bias too small for one value shows in all: the sum is chi-squared, of variance 2 n.
    assert scores.square().sum() < len(values) + Z * (2 * len(values)) ** 0.5
    # Nearest rounding would not pass.
    assert z_scores(online.cpu().mul(momentum).to(dtype), values, dtype).abs().max() > 10


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_keeps_what_is_representable(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    values = torch.arange(-(2**15), 2**15, 5).to(torch.int16).view(dtype)
    values = values[values.isfinite()].to(device)
    ema = stochastic(values.float(), dtype, backend)
    assert_same_bits(accumulated(ema), {"0": values})
    for momentum in (0.25, 1.0, 1e-4):
        ema.update(momentum)
        assert torch.equal(ema.ema_model[0], values)


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_keeps_what_is_not_finite(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    special = torch.tensor([0x7F800000, 0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0x7F80FFFF]).int()
    special = torch.cat([special, special | -(2**31)]).view(torch.float32)
    values = special[:, None].repeat(1, 500).to(device)
    shown = values.to(dtype)
    ema = stochastic(values, dtype, backend)
    assert_same_bits(accumulated(ema), {"0": shown})
    ema.sync()
    assert_same_bits(accumulated(ema), {"0": shown})
    ema = stochastic(torch.ones_like(values), dtype, backend)
    ema.model[0].copy_(values)
    ema.update(0.25)
    assert_same_bits(accumulated(ema), {"0": shown})
    ema.model[0].zero_()
    ema.update(0.25)
    lerp = torch.lerp(shown.float(), torch.zeros_like(values), 0.25).to(dtype)
    assert_same_bits(accumulated(ema), {"0": lerp})


def coins(
    backend: str,
    device: torch.device,
    seed: int = 0,
    updates: int = 1,
    count: int = 16_000,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """0 or 1 by element: whether 1 and a half spacing was rounded up by the last update."""
    info = torch.finfo(dtype)
    values = torch.full((count,), 1 + info.eps / 2, device=device)
    ema = stochastic(values, dtype, backend, seed)
    for _ in range(updates):
        ema.update(1.0)
    result = ema.ema_model[0]
    assert set(result.tolist()) == {1.0, 1 + info.eps}
    return (result > 1).double().cpu()


def correlation(left: Tensor, right: Tensor) -> float:
    """Of two series of fair coins, in standard deviations."""
    return float(((2 * left - 1) * (2 * right - 1)).sum() / len(left) ** 0.5)


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_depends_on_seed_and_update_alone(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    first = coins(backend, device, dtype=dtype)
    torch.manual_seed(123)
    torch.rand(10, device=device)
    assert torch.equal(first, coins(backend, device, dtype=dtype))
    # An element's draw depends on its place, not on how many others there are.
    for count in (1, 7, 8, 9, 4099, 8192):
        few = stochastic(
            torch.full((count,), 1 + torch.finfo(dtype).eps / 2, device=device), dtype, backend
        )
        few.update(1.0)
        assert torch.equal((few.ema_model[0] > 1).double().cpu(), first[:count])
    others = [coins(backend, device, seed, dtype=dtype) for seed in (1, 2**32, 2**62, 2**63 - 1)]
    others += [coins(backend, device, 0, updates, dtype=dtype) for updates in (2, 3)]
    for other in others:
        assert not torch.equal(first, other)
    series = [first, *others]
    for i, left in enumerate(series):
        for right in series[:i]:
            assert abs(correlation(left, right)) < Z
    assert abs(correlation(first, first)) > 10 * Z


def test_stochastic_draws_of_neighbouring_elements_are_independent(
    backend: str, device: torch.device
) -> None:
    lanes = coins(backend, device).view(-1, 8)
    for i in range(8):
        for j in range(i):
            assert abs(correlation(lanes[:, i], lanes[:, j])) < Z
    flat = lanes.flatten()
    for lag in (8, 16, 256, 1024, 2048, 4096):
        assert abs(correlation(flat[lag:], flat[:-lag])) < Z


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_parameters_do_not_share_their_draws(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    value = torch.full((64, 64), 1 + torch.finfo(dtype).eps / 2, device=device)
    model = nn.ParameterList([nn.Parameter(value.clone(), requires_grad=False) for _ in range(3)])
    ema = ModelEMA(model, ema_dtype=dtype, precision="stochastic", backend=backend)
    ema.update(1.0)
    draws = [(shown > 1).double().flatten().cpu() for shown in ema.ema_model]
    for i in range(3):
        assert abs(correlation(draws[i], draws[i - 1])) < Z


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_is_the_same_under_both_backends(
    dtype: torch.dtype, kernel_device: torch.device
) -> None:
    pytest.importorskip("triton")
    emas = [
        ModelEMA(zoo(dtype, kernel_device), precision="stochastic", backend=backend, seed=9)
        for backend in ("foreach", "triton")
    ]
    for ema in emas:
        run(ema, range(4), 0.25)
    assert_same_ema(*emas)


# 5. long runs

MOMENTUM, REPLICAS = 1e-4, 512
# An update of the stochastic kind takes some 0.35 ms on a CPU: fp16 has a quarter of them.
RUNS = [(torch.bfloat16, 20_000), (torch.float16, 5_000)]


def long_run(dtype: torch.dtype, precision: str, updates: int) -> tuple[ModelEMA, float]:
    """Updates of an EMA that starts at 1, and the float64 EMA of the same targets.

    They drift from 1.25 to 1.5 and back: every value is inside [1, 2).
    """
    model = nn.ParameterList([nn.Parameter(torch.ones(REPLICAS), requires_grad=False)])
    ema = ModelEMA(model, ema_dtype=dtype, precision=precision, backend="foreach", seed=1)
    truth = 1.0
    for step in range(updates):
        online = 1.25 + 0.25 * (1 - abs(1 - 2 * step / updates))
        online = float(torch.tensor(online, dtype=torch.float32))
        model[0].fill_(online)
        ema.update(MOMENTUM)
        truth += MOMENTUM * (online - truth)
    assert 1.1 < truth < 1.5  # far from where it started
    return ema, truth


@pytest.mark.parametrize(("dtype", "updates"), RUNS)
def test_exact_long_run_is_right(dtype: torch.dtype, updates: int) -> None:
    ema, truth = long_run(dtype, "exact", updates)
    # An fp32 update errs by at most eps * 2 (no value exceeds 2), the momentum's own rounding
    # included; what is there shrinks by 1 - momentum at each: in sum at most 2 eps / momentum.
    bound = 2 * torch.finfo(torch.float32).eps / MOMENTUM
    assert bound < (truth - 1) / 50
    assert (accumulated(ema)["0"].double() - truth).abs().max() <= bound
    half = torch.finfo(dtype).eps / 2
    assert (ema.ema_model[0].double() - truth).abs().max() <= bound + half


@pytest.mark.parametrize(("dtype", "updates"), RUNS)
def test_stochastic_long_run_is_right_in_the_mean(dtype: torch.dtype, updates: int) -> None:
    ema, truth = long_run(dtype, "stochastic", updates)
    shown = ema.ema_model[0].double()
    eps = torch.finfo(dtype).eps
    assert shown.min() >= 1
    assert shown.max() < 2
    # A step s from a representable value is rounded with a variance of at most |s| * spacing,
    # |s| <= momentum (targets and EMA are within 1 of each other), spacing <= eps below 2. Steps
    # are independent and shrink by 1 - momentum: momentum * eps / (1 - (1 - momentum)**2)
    # < 0.51 * eps in sum, for each of the replicas. Rounding in fp32 comes before, as above.
    deviation = (0.51 * eps) ** 0.5
    rounding = 2 * torch.finfo(torch.float32).eps / MOMENTUM
    bound = Z * deviation / REPLICAS**0.5 + rounding
    assert bound < (truth - 1) / 10
    assert abs(shown.mean() - truth) <= bound
    # A sample's deviation scatters by 1 in sqrt(2 * 512) = 32 parts; the bound is generous anyway.
    assert 0 < shown.std() < deviation * (1 + Z / 32)


@pytest.mark.parametrize(("dtype", "updates"), RUNS)
def test_nearest_long_run_stands_still_and_says_so(dtype: torch.dtype, updates: int) -> None:
    with pytest.warns(UserWarning, match="stands still") as caught:
        ema, _ = long_run(dtype, "nearest", updates)
    assert len(caught) == 1
    assert torch.equal(ema.ema_model[0].float(), torch.ones(REPLICAS))


def test_nearest_does_not_warn_where_the_dtype_resolves_the_momentum(
    backend: str, device: torch.device
) -> None:
    ema = ModelEMA(small(torch.bfloat16, device), precision="nearest", backend=backend)
    wide = ModelEMA(small(torch.float32, device), precision="nearest", backend=backend)
    with no_warning():
        ema.update(0.1)
        wide.update(1e-4)


@pytest.mark.parametrize("dtype", LOW)
def test_nearest_rounds_as_torch_does(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    ema = ModelEMA(zoo(dtype, device), precision="nearest", backend=backend)
    for step in range(3):
        before = {name: v.float() for name, v in ema.state_dict()["weights"].items()}
        move(ema.model, step)
        ema.update(0.25)
        for name, value in ema.model.named_parameters(remove_duplicate=False):
            # A quarter is exact: the sum is rounded to fp32 and then to nearest, both once.
            expected = torch.lerp(before[name], value.float(), 0.25).to(dtype)
            assert torch.equal(ema.state_dict()["weights"][name], expected)


# 6. errors


@pytest.mark.parametrize("precision", ["kahan", "Exact", "", None, torch.float32])
def test_unknown_precision(precision: object) -> None:
    with pytest.raises(ValueError, match="'exact', 'stochastic', 'nearest'") as caught:
        ModelEMA(nn.Linear(2, 1), precision=precision)
    assert repr(precision) in str(caught.value)


@pytest.mark.parametrize("seed", [-1, True, 2**63, 1.0, "0", None])
def test_unknown_seed(seed: object) -> None:
    for precision in PRECISIONS:
        with pytest.raises(ValueError, match=re.escape("from 0 to 2**63 - 1")) as caught:
            ModelEMA(nn.Linear(2, 1), precision=precision, seed=seed)
        assert repr(seed) in str(caught.value)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_ends_of_the_seeds(seed: int) -> None:
    ema = ModelEMA(nn.Linear(2, 1).bfloat16(), precision="stochastic", seed=seed)
    ema.update(0.5)
    assert saved(ema.state_dict())["random_state"] == {"seed": seed, "updates": 1}


# 7. mixtures

MIXED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


@pytest.mark.parametrize("backend_name", ["foreach", "triton"])
@settings(max_examples=20)
@given(data=st.data())
def test_mixtures_of_dtypes(data: st.DataObject, backend_name: str) -> None:
    if backend_name == "triton":
        pytest.importorskip("triton")
    device = torch.device(
        "cuda" if backend_name == "triton" and torch.cuda.is_available() else "cpu"
    )
    kinds = data.draw(
        st.lists(
            st.tuples(st.sampled_from(MIXED), st.lists(st.integers(0, 9), max_size=3).map(tuple)),
            min_size=1,
            max_size=7,
        )
    )
    momenta = data.draw(
        st.lists(
            st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1, width=32)),
            min_size=1,
            max_size=5,
        )
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))

    def values() -> list[Tensor]:
        drawn = []
        for dtype, shape in kinds:
            value = torch.randn((*shape, 2), generator=generator, dtype=torch.float64)
            value = torch.view_as_complex(value) if dtype.is_complex else value[..., 0].clone()
            drawn.append(value.to(dtype).to(device))
        return drawn

    model = nn.ParameterList([nn.Parameter(value) for value in values()])
    exact = ModelEMA(model, backend=backend_name)
    wide = ModelEMA(model, backend=backend_name, ema_dtype=torch.float32)

    def real(value: Tensor) -> Tensor:
        value = value.detach()
        return torch.view_as_real(value) if value.is_complex() else value

    truth = [real(value).double().clone() for value in model]
    largest = [value.abs() for value in truth]
    for momentum in momenta:
        for parameter, value in zip(model, values(), strict=True):
            parameter.data.copy_(value)
        exact.update(momentum)
        wide.update(momentum)
        online = [real(value).double() for value in model]
        truth = [torch.lerp(e, o, momentum) for e, o in zip(truth, online, strict=True)]
        largest = [torch.maximum(a, o.abs()) for a, o in zip(largest, online, strict=True)]
    sums = accumulated(exact)
    for index, (dtype, _) in enumerate(kinds):
        shown, value = exact.ema_model[index], sums[str(index)]
        assert shown.dtype == dtype
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        # Each update errs by one bound at most, and an average never exceeds the largest value.
        bound = len(momenta) * update_bound(largest[index], largest[index], accumulator)
        error = (real(value).double() - truth[index]).abs()
        assert (error <= bound).all()
        if dtype in LOW:
            assert_same_bits({"": value}, {"": accumulated(wide)[str(index)]})
            assert_nearest(shown, value)
        else:
            assert torch.equal(shown, value)


def test_a_parameter_may_be_called_like_extra_state() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.my_extra_state = nn.Parameter(torch.randn(4).bfloat16())

    net = Net()
    ema = ModelEMA(net)
    net.my_extra_state.data.add_(1.0)
    ema.update(1e-3)
    state = copy.deepcopy(ema.state_dict())
    assert state["residuals"]["my_extra_state"].any()
    other = ModelEMA(net)
    other.load_state_dict(state)
    assert torch.equal(
        other.state_dict()["residuals"]["my_extra_state"], state["residuals"]["my_extra_state"]
    )
