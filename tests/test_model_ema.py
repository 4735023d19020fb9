"""ModelEMA: buffers, wrappers, copies, state, autograd, and its errors."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_triton import ModelEMA


class Everything(nn.Module):
    """Parameters and buffers of every kind that a user may have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.Parameter(torch.arange(5.0), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.phase = nn.Parameter(torch.complex(torch.ones(4, 3), torch.rand(4, 3).round()).t())
        self.integers = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.arange(3.0), persistent=False)


@pytest.fixture(autouse=True)
def _dyadic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial values with few digits, so that the sums of these tests are exact."""

    def uniform_(tensor: torch.Tensor, a: float = 0.0, b: float = 1.0) -> torch.Tensor:
        with torch.no_grad():
            return tensor.copy_(torch.randint(-64, 64, tensor.shape) / 64)

    monkeypatch.setattr(nn.init, "uniform_", uniform_)
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, a: uniform_(tensor))


def change(model: nn.Module) -> None:
    """Add 1 to every number, invert every boolean."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dtype == torch.bool:
                tensor.logical_not_()
            else:
                tensor.add_(1)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("backend", ["foreach", "triton"])
@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_every_kind_of_tensor(
    backend: str, handle_buffers: str, kernel_device: torch.device
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    model = Everything().to(kernel_device)
    ema = ModelEMA(model, backend=backend, handle_buffers=handle_buffers)
    before = {name: tensor.clone() for name, tensor in tensors(ema.ema_model).items()}
    change(model)
    ema.update(0.25)
    buffers = {name for name, _ in model.named_buffers()}
    for name, online in tensors(model).items():
        ours = tensors(ema.ema_model)[name]
        if name in buffers and handle_buffers == "ema_train":
            expected = before[name]
        elif (name in buffers and handle_buffers == "copy") or not (
            online.is_floating_point() or online.is_complex()
        ):
            expected = online
        else:
            expected = before[name] + 0.25
        assert torch.equal(ours, expected), name
        if ours.numel():
            assert ours.untyped_storage().data_ptr() != online.untyped_storage().data_ptr(), name


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_mode_and_gradients(handle_buffers: str) -> None:
    ema = ModelEMA(Everything().train(), handle_buffers=handle_buffers)
    assert ema.ema_model.training == (handle_buffers == "ema_train")
    assert not any(p.requires_grad for p in ema.ema_model.parameters())
    assert ema.model.conv.weight.requires_grad


def test_sync_copies_everything() -> None:
    for handle_buffers in ("copy", "update", "ema_train"):
        model = Everything()
        ema = ModelEMA(model, handle_buffers=handle_buffers)
        change(model)
        ema.sync()
        for name, online in tensors(model).items():
            assert torch.equal(tensors(ema.ema_model)[name], online)
        change(model)
        assert not torch.equal(ema.ema_model.scalar, model.scalar)


def test_buffers_that_are_assigned_anew_are_followed() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.register_buffer("count", torch.zeros(()))

    for handle_buffers, expected in (("copy", 3.0), ("update", 1.0 / 8 + 2.0 / 4 + 3.0 / 2)):
        model = Counter()
        ema = ModelEMA(model, handle_buffers=handle_buffers)
        for _ in range(3):
            model.count = model.count + 1
            ema.update(0.5)
        assert ema.ema_model.count == expected
        assert ema.ema_model.count.data_ptr() != model.count.data_ptr()


def test_a_buffer_with_a_graph_does_not_leak_it_into_the_ema() -> None:
    model = nn.BatchNorm1d(2)
    ema = ModelEMA(model)
    model.running_mean = model.weight * 2
    ema.update(0.5)
    assert not ema.ema_model.running_mean.requires_grad


def test_a_given_ema_model_keeps_its_values_and_shares_no_memory() -> None:
    model, twin = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    twin.weight.data.fill_(5.0)
    twin.running_mean = model.running_mean
    twin.bias = model.bias
    ema = ModelEMA(model, ema_model=twin)
    assert ema.ema_model is twin
    assert twin.weight.eq(5.0).all()
    for name, online in tensors(model).items():
        ours = tensors(twin)[name]
        assert ours.untyped_storage().data_ptr() != online.untyped_storage().data_ptr(), name


def test_the_model_cannot_be_its_own_ema() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="ema_model is the online model itself"):
        ModelEMA(model, ema_model=model)


def test_a_given_ema_model_that_does_not_fit_is_left_alone() -> None:
    twin = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    storage = twin[0].weight.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match=r"'1.weight'"):
        ModelEMA(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ema_model=twin)
    assert twin[0].weight.untyped_storage().data_ptr() == storage
    assert twin.training
    assert twin[0].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_with_a_wide_ema_do_not_stall(dtype: torch.dtype) -> None:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    model.weight.data.fill_(1.0)
    ema = ModelEMA(model, ema_dtype=torch.float32)
    model.weight.data.fill_(1.5)
    for _ in range(2000):
        ema.update(2e-4)
    # Each update errs by at most one eps of 1.5, see tolerances.py.
    expected, bound = 1.5 - 0.5 * (1 - 2e-4) ** 2000, 2000 * torch.finfo(torch.float32).eps * 1.5
    assert ema.ema_model.weight.item() == pytest.approx(expected, abs=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounded_to_nearest_warns_once_and_stands_still(dtype: torch.dtype) -> None:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    model.weight.data.fill_(1.0)
    ema = ModelEMA(model, precision="nearest")
    model.weight.data.fill_(1.5)
    text = r"momentum 0.0002 is below the resolution of torch\.\w+ \(0\.0.*precision='exact'"
    with pytest.warns(UserWarning, match=text):
        ema.update(2e-4)
    for _ in range(100):
        ema.update(2e-4)
    assert ema.ema_model.weight.item() == 1.0


def test_ema_dtype_casts_the_floating_tensors_only() -> None:
    for handle_buffers in ("copy", "update"):
        model = Everything()
        ema = ModelEMA(model, ema_dtype=torch.float64, handle_buffers=handle_buffers)
        change(model)
        ema.update(0.5)
        for name, ours in tensors(ema.ema_model).items():
            online = tensors(model)[name].dtype
            assert ours.dtype == (torch.float64 if online == torch.float32 else online), name


def test_a_cast_online_model_leaves_the_ema_its_dtype() -> None:
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)
    model.bfloat16()
    ema.update(0.5)
    assert ema.ema_model.weight.dtype == torch.float32


def test_compiled_parts_get_clean_names_and_are_averaged() -> None:
    inner = torch.compile(nn.Linear(2, 2), backend="eager")
    model = torch.compile(nn.Sequential(nn.Linear(2, 2), inner), backend="eager")
    ema = ModelEMA(model)
    assert [*ema.ema_model.state_dict()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert type(ema.model) is nn.Sequential
    inner.weight.data.fill_(7.0)
    ema.update(1.0)
    assert ema.ema_model[1].weight.eq(7.0).all()


def test_data_parallel_stays_and_compiled_inside_it_goes() -> None:
    inner = nn.Linear(2, 2)
    for model in (
        nn.DataParallel(inner),
        nn.DataParallel(torch.compile(inner, backend="eager")),
        torch.compile(nn.DataParallel(inner), backend="eager"),
    ):
        ema = ModelEMA(model)
        assert isinstance(ema.ema_model, nn.DataParallel)
        assert [*ema.ema_model.state_dict()] == ["module.weight", "module.bias"]
        ema.update(0.5)


def copies() -> list[tuple[str, Callable[[Any], Any]]]:
    def saved(thing: object) -> object:
        file = io.BytesIO()
        torch.save(thing, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return [
        ("deepcopy", copy.deepcopy),
        ("pickle", lambda thing: pickle.loads(pickle.dumps(thing))),
        ("torch.save", saved),
    ]


@pytest.mark.parametrize(("name", "duplicate"), copies(), ids=[name for name, _ in copies()])
def test_a_copy_is_independent(name: str, duplicate: Callable[[Any], Any]) -> None:
    model = Everything()
    ema = ModelEMA(model, handle_buffers="update")
    before = {name: tensor.clone() for name, tensor in tensors(ema.ema_model).items()}
    for copied in (duplicate(ema.ema_model), duplicate(ema).ema_model):
        with torch.no_grad():
            for tensor in copied.parameters():
                tensor.zero_()
        for tensor_name, tensor in tensors(ema.ema_model).items():
            assert torch.equal(tensor, before[tensor_name]), tensor_name
    other = duplicate(ema)
    change(other.model)
    other.update(0.5)
    assert torch.equal(other.ema_model.frozen, before["frozen"] + 0.5)
    assert torch.equal(ema.ema_model.frozen, before["frozen"])
    ema.update(0.5)
    assert torch.equal(ema.ema_model.frozen, before["frozen"])


def test_saving_writes_each_byte_once() -> None:
    model = nn.Sequential(*[nn.Linear(50, 50) for _ in range(20)])
    payload = sum(p.nbytes for p in model.parameters())
    ema = ModelEMA(model)

    def size(thing: object) -> int:
        file = io.BytesIO()
        torch.save(thing, file)
        return len(file.getvalue())

    assert payload < size(ema.ema_model) < 1.3 * payload
    assert payload < size(ema.state_dict()) < 1.3 * payload
    part = ema.ema_model[0].state_dict()
    assert size(part) < 1.3 * payload / 20
    assert size({name: tensor.clone() for name, tensor in part.items()}) < payload / 10


def test_safetensors_accepts_the_ema_weights(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    ema = ModelEMA(model, handle_buffers="update")
    change(model)
    ema.update(0.5)
    safetensors.save_file(ema.ema_model.state_dict(), tmp_path / "ema.safetensors")
    loaded = safetensors.load_file(tmp_path / "ema.safetensors")
    for name, tensor in ema.ema_model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_state_round_trip() -> None:
    model = Everything()
    ema = ModelEMA(model, handle_buffers="update")
    change(model)
    ema.update(0.3)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = ModelEMA(copy.deepcopy(model), handle_buffers="update")
    other.load_state_dict(state)
    for name, tensor in ema.ema_model.state_dict().items():
        assert torch.equal(other.ema_model.state_dict()[name], tensor), name
    ema.update(0.3)
    other.update(0.3)
    assert torch.equal(other.ema_model.frozen, ema.ema_model.frozen)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda s: s["weights"].pop("weight"), r"'weight' is missing.*Nothing was loaded"),
        (lambda s: s["weights"].update(more=torch.ones(1)), "'more' is unexpected"),
        (
            lambda s: s["weights"].update(bias=torch.ones(7)),
            r"'bias' is \(7,\) in the state but \(2,\) here",
        ),
        (lambda s: s["weights"].update(bias="x"), "'bias' is a str, not a tensor"),
        (
            lambda s: s["weights"].update(bias=torch.ones(2, dtype=torch.complex64)),
            "'bias' is torch.complex64 in the state but torch.float32 here",
        ),
        (
            lambda s: s.pop("weights"),
            r"must be what ModelEMA.state_dict\(\) returned, with 'version' and 'weights'",
        ),
        (lambda s: s.update(version=99), "has version 99.*reads version 2"),
    ],
)
def test_a_state_that_does_not_fit_loads_nothing(
    damage: Callable[[dict[str, Any]], object], text: str
) -> None:
    ema = ModelEMA(nn.Linear(2, 2))
    state = copy.deepcopy(ema.state_dict())
    for tensor in state["weights"].values():
        tensor.add_(1)
    damage(state)
    before = copy.deepcopy(ema.ema_model.state_dict())
    with pytest.raises(ValueError, match=text):
        ema.load_state_dict(state)
    torch.testing.assert_close(ema.ema_model.state_dict(), before, rtol=0, atol=0)


def test_updates_are_seen_by_autograd() -> None:
    ema = ModelEMA(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    inputs = torch.ones(1, 2, requires_grad=True)
    loss = ema.ema_model(inputs).sum()
    ema.update(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_switched_on_in_the_ema_model_are_harmless() -> None:
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)
    ema.ema_model.requires_grad_(True)
    change(model)
    before = ema.ema_model.weight.detach().clone()
    ema.update(0.5)
    assert torch.equal(ema.ema_model.weight, before + 0.5)
    assert ema.ema_model.weight.grad_fn is None


@pytest.mark.parametrize("ema_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_built_and_updated_in_inference_mode(ema_dtype: torch.dtype) -> None:
    model = nn.BatchNorm1d(2)
    with torch.inference_mode():
        ema = ModelEMA(model, handle_buffers="update", ema_dtype=ema_dtype)
        ema.update(0.5)
    change(model)
    ema.update(0.5)
    assert ema.ema_model.weight.eq(1.5).all()


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan"), torch.tensor(2.0)])
def test_a_momentum_outside_its_range_is_an_error(momentum: object) -> None:
    with pytest.raises(ValueError, match=r"Invalid momentum: .*weight of the online.*\[0, 1\]"):
        ModelEMA(nn.Linear(2, 2)).update(momentum)


@pytest.mark.parametrize("momentum", [torch.ones(2), torch.tensor(1)])
def test_a_momentum_tensor_must_be_one_floating_number(momentum: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"Invalid momentum: a torch\.\w+ tensor of shape"):
        ModelEMA(nn.Linear(2, 2)).update(momentum)


@pytest.mark.parametrize("momentum", ["0.1", None, True])
def test_a_momentum_must_be_a_number(momentum: object) -> None:
    with pytest.raises(TypeError, match="Invalid momentum: "):
        ModelEMA(nn.Linear(2, 2)).update(momentum)


def test_a_momentum_tensor_on_the_cpu_is_a_number() -> None:
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)
    change(model)
    before = ema.ema_model.bias.clone()
    ema.update(torch.tensor(0.5))
    assert torch.equal(ema.ema_model.bias, before + 0.5)


def test_a_momentum_tensor_on_another_device_is_an_error() -> None:
    ema = ModelEMA(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"momentum is a tensor on meta, but 'bias' is on cpu"):
        ema.update(torch.tensor(0.5, device="meta"))
    assert ema.update_index == 0


def test_bad_arguments_list_the_accepted_ones() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'copy', 'update', 'ema_train', but got 'swap'"):
        ModelEMA(model, handle_buffers="swap")
    with pytest.raises(ValueError, match=r"ema_dtype can only be one of None, .*float16, but got"):
        ModelEMA(model, ema_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"model should be an instance of nn.Module .* got str"):
        ModelEMA("model")
    with pytest.raises(TypeError, match="unexpected keyword argument 'decay'"):
        ModelEMA(model, decay=0.9)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_module_is_a_clear_error() -> None:
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="module '0' is a TorchScript module"):
        ModelEMA(nn.Sequential(scripted))


class Lazy(nn.Module):
    """Makes buffers in its first forward pass, like caches and normalizers do."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("later", None, persistent)
        self.persistent = persistent

    def forward(self) -> None:
        self.later = torch.ones(2)
        self.register_buffer("another", torch.ones(2), self.persistent)


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_a_cache_that_one_model_made_is_its_own(handle_buffers: str) -> None:
    model = Lazy(persistent=False)
    ema = ModelEMA(model, handle_buffers=handle_buffers)
    model()
    ema.update(0.5)
    assert ema.ema_model.later is None
    ema.ema_model()
    model.weight.data.fill_(3.0)
    ema.update(0.5)
    assert ema.ema_model.weight.eq(2.0).all()


def test_a_persistent_buffer_that_appears_is_copied_at_once() -> None:
    model = Lazy(persistent=True)
    ema = ModelEMA(model)
    model()
    ema.update(0.5)
    assert torch.equal(ema.ema_model.another, model.another)
    assert torch.equal(ema.ema_model.later, model.later)
    assert ema.state_dict()["weights"].keys() == model.state_dict().keys()


def test_a_parameter_in_place_of_none_is_an_error_at_once() -> None:
    model = nn.Linear(2, 2, bias=False)
    ema = ModelEMA(model)
    model.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"tensors that the EMA model lacks: 'bias'"):
        ema.update(0.5)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_inside_a_compiled_step(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ema = ModelEMA(model)
    shadow = {name: p.detach().double() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counter = CompileCounterWithBackend(backend)

    @torch.compile(backend=counter)
    def step(inputs: torch.Tensor, momentum: float) -> torch.Tensor:
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum)
        return loss

    compiled = []
    for index in range(1, 13):
        momentum = 1 / (index + 1)
        step(torch.randn(8, 4), momentum)
        compiled.append(counter.frame_count)
        for name, parameter in model.named_parameters():
            shadow[name] = torch.lerp(shadow[name], parameter.detach().double(), momentum)
    # The first values may compile anew (a constant turns into a variable); after that, never.
    assert compiled[3:] == [compiled[3]] * 9, compiled
    for name, ours in ema.ema_model.named_parameters():
        torch.testing.assert_close(ours.double(), shadow[name], rtol=0, atol=12 * 2e-7)
