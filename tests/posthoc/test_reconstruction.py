"""Rebuilt averages against averages that were tracked, and what is said where that cannot be."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import Constant, EMABank, EqualAverage, HalfLife, ModelEMA, PowerFunction
from ema_triton.posthoc import Snapshots, plot_profiles
from ema_triton.posthoc.log import Log
from ema_triton.posthoc.profiles import profile

pytest.importorskip("safetensors")

PAIR = {"0.05": PowerFunction(sigma_rel=0.05), "0.10": PowerFunction(sigma_rel=0.10)}


def half(update_index: int) -> float:
    """The equal average of the updates after 120."""
    return 1.0 if update_index <= 120 else 1 / (update_index - 120)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = {"power": PowerFunction(sigma_rel=0.08), "half-life": HalfLife(25), "tail": half}


class Training:
    """A small net on digits, with snapshots in every dtype, and other averages tracked beside."""

    def __init__(self, folder: Path, updates: int = 240, every: int = 12):
        torch.manual_seed(0)
        datasets = pytest.importorskip("sklearn.datasets")
        digits, labels = datasets.load_digits(return_X_y=True)
        inputs, labels = torch.tensor(digits / 16), torch.tensor(labels)
        model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).double()
        banks = {dtype: EMABank(model, PAIR) for dtype in DTYPES}
        self.tracked = {name: ModelEMA(model) for name in TARGETS}
        self.snapshots = {d: Snapshots(folder / str(d), dtype=d) for d in DTYPES}
        for dtype, bank in banks.items():
            self.snapshots[dtype].record(bank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
        self.online = [nn.utils.parameters_to_vector(model.parameters()).detach()]
        for update_index in range(1, updates + 1):
            batch = torch.randint(len(inputs), (32,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            for bank in banks.values():
                bank.update()
            for name, ema in self.tracked.items():
                ema.update(TARGETS[name](update_index))
            self.online.append(nn.utils.parameters_to_vector(model.parameters()).detach())
            if update_index % every == 0:
                for dtype, bank in banks.items():
                    self.snapshots[dtype].save(bank)

    def bound(self, name: str, result: Any, eps: float) -> float:
        """The most that profile error and rounding can do, by Cauchy and Schwarz."""
        momenta = torch.tensor([TARGETS[name](t) for t in range(1, len(self.online))])
        online = torch.stack(self.online)
        spread = float((online - online.mean(0)).norm())
        by_profile = result.profile_error * float(profile(momenta.double()).norm()) * spread
        largest = max(float(one.norm()) for one in self.online)
        # Each snapshot rounds by at most half a spacing; each coefficient adds its own.
        return by_profile + eps / 2 * largest * sum(map(abs, result.coefficients.values()))


def flat(weights: dict[str, Tensor], model: nn.Module) -> Tensor:
    return torch.cat([weights[name].double().flatten() for name, _ in model.named_parameters()])


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Training:
    return Training(tmp_path_factory.mktemp("snapshots"))


@pytest.mark.filterwarnings("ignore:These snapshots do not make")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_average_that_was_tracked_within_what_it_says(training, dtype) -> None:
    again, eps = Snapshots(training.snapshots[dtype].folder), torch.finfo(dtype).eps
    results = again.reconstruct_all([*TARGETS.values()])
    for name, result in zip(TARGETS, results, strict=True):
        model = training.tracked[name].ema_model
        truth = nn.utils.parameters_to_vector(model.parameters())
        rebuilt, bound = flat(result.weights, model), training.bound(name, result, eps)
        assert float((rebuilt - truth).norm()) <= bound
        assert float((rebuilt - truth).norm()) / float(truth.norm()) < 3 * result.expected_error
        # Control: a coefficient that is 10 % off is not within it.
        file, x = max(result.coefficients.items(), key=lambda pair: abs(pair[1]))
        assert bound < 0.1 * abs(x) * float(truth.norm())
        broken = again.folder / file
        off = 0.1 * x * flat(again_read(broken), model)
        assert float((rebuilt + off - truth).norm()) > bound
        model.load_state_dict(result.weights)


def again_read(path: Path) -> dict[str, Any]:
    from ema_triton.checkpoint.interop import read_file

    return read_file(path)  # type: ignore[return-value]


def walk(model: nn.Module, seed: int) -> None:
    """Move the online model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * step.to(parameter.dtype))


def run(
    folder: Path,
    schedules: dict[str, Any] = PAIR,
    *,
    model: nn.Module | None = None,
    updates: int = 60,
    every: int = 5,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[EMABank, Snapshots]:
    torch.manual_seed(0)
    bank = EMABank(model or nn.Linear(3, 2).double(), schedules, **options)
    snapshots = Snapshots(folder, dtype=dtype)
    snapshots.record(bank)
    go_on(bank, snapshots, updates, every)
    return bank, snapshots


def go_on(bank: EMABank, snapshots: Snapshots, updates: int, every: int = 5) -> None:
    while bank.update_index < updates:
        walk(bank.model, bank.update_index)
        bank.update()
        if bank.update_index % every == 0:
            snapshots.save(bank)


def follow(
    folder: Path, target: Any, *, updates: int = 24, disturb: Any = None
) -> tuple[Snapshots, ModelEMA, ModelEMA]:
    """Snapshots of each update's raw weights, which make any average, and one that is tracked."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema, tracked = ModelEMA(model), ModelEMA(model)
    snapshots = Snapshots(folder)
    snapshots.save(ema)
    for update_index in range(1, updates + 1):
        walk(model, update_index)
        ema.update(1.0)
        tracked.update(target(update_index))
        snapshots.save(ema)
        if disturb is not None:
            disturb(update_index, ema, tracked)
    return snapshots, ema, tracked


def check_same(result: Any, tracked: ModelEMA) -> None:
    assert result.profile_error < 1e-6
    for name, value in tracked.ema_model.state_dict().items():
        torch.testing.assert_close(result.weights[name].to(value.dtype), value, rtol=0, atol=3e-6)


def test_the_initial_weights_are_update_0(tmp_path) -> None:
    snapshots, _, tracked = follow(tmp_path, Constant(0.02))
    check_same(snapshots.reconstruct(Constant(0.02)), tracked)


def test_momentum_factors_have_a_system_each(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1)).double()
    options = {"momentum_scale": {"0": 0.25, "1.weight": 30.0}}
    averages = {"a": Constant(0.2), "b": Constant(0.05), "target": Constant(0.1)}
    ours = {name: averages[name] for name in "ab"}
    torch.manual_seed(0)
    bank, tracked = EMABank(model, ours, **options), ModelEMA(model, **options)
    snapshots = Snapshots(tmp_path)
    snapshots.save(bank)
    for update_index in range(30):
        walk(model, update_index)
        bank.update()
        tracked.update(0.1)
        snapshots.save(bank)
    result = snapshots.reconstruct(Constant(0.1))
    check_same(result, tracked)


def test_weights_over_the_updates_are_a_target(tmp_path) -> None:
    snapshots, _, tracked = follow(tmp_path, EqualAverage(), updates=12)
    check_same(snapshots.reconstruct(torch.full((12,), 5)), tracked)
    with pytest.raises(ValueError, match=r"a tensor of 12 finite values from 0 on.*shape \(11,\)"):
        snapshots.reconstruct(torch.ones(11))
    with pytest.raises(ValueError, match=r"not all 0, but got shape \(12,\), tensor\(\[-1"):
        snapshots.reconstruct(-torch.ones(12))
    with pytest.raises(ValueError, match="all 0"):
        snapshots.reconstruct(torch.zeros(12))


def test_at_is_any_update(tmp_path) -> None:
    taken: dict[int, dict[str, Tensor]] = {}

    def keep(update_index: int, _: ModelEMA, tracked: ModelEMA) -> None:
        state = tracked.ema_model.state_dict()
        taken[update_index] = {name: value.clone() for name, value in state.items()}

    snapshots, _, _ = follow(tmp_path, Constant(0.3), disturb=keep)
    result = snapshots.reconstruct(Constant(0.3), at=9)
    assert result.update_index == 9
    for name, value in taken[9].items():
        torch.testing.assert_close(result.weights[name].double(), value, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="at=25, but the log has updates 1 to 24"):
        snapshots.reconstruct(Constant(0.3), at=25)


@pytest.mark.parametrize("kind", ["sync", "load_weights", "load_state_dict"])
def test_a_sync_or_load_is_the_targets_too(tmp_path, kind) -> None:
    snapshots = Snapshots(tmp_path)
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema, tracked = ModelEMA(model), ModelEMA(model)
    snapshots.record(ema)
    for update_index in range(1, 25):
        walk(model, update_index)
        ema.update(1.0)
        tracked.update(0.05)
        snapshots.save(ema)
        if update_index == 15:
            walk(model, 1000)
            given = {"load_weights": model.state_dict(), "load_state_dict": {}, "sync": {}}[kind]
            if kind == "load_state_dict":
                given = ModelEMA(nn.Linear(3, 2).double()).state_dict() | {"update_index": 15}
            for one in (ema, tracked):
                getattr(one, kind)(*([given] if given else []))
            snapshots.save(ema)
    check_same(snapshots.reconstruct(Constant(0.05)), tracked)


def test_a_sync_of_a_bank_is_one_source_for_all_its_averages(tmp_path) -> None:
    bank, snapshots = run(tmp_path, {**PAIR, "raw": Constant(1.0)}, updates=10)
    bank.sync()
    snapshots.save(bank)
    result = snapshots.reconstruct(HalfLife(3))
    assert result.profile_error < 1e-6
    for name, value in bank["0.05"].ema_model.state_dict().items():
        torch.testing.assert_close(result.weights[name].double(), value, rtol=0, atol=1e-6)


def test_several_targets_are_one_pass_over_the_files(tmp_path, monkeypatch) -> None:
    _, snapshots = run(tmp_path)
    import safetensors

    opened = []
    original = safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda path, **how: opened.append(path) or original(path, **how)
    )
    snapshots.reconstruct(PowerFunction(sigma_rel=0.08))
    for_one = len(opened)
    results = snapshots.reconstruct_all([PowerFunction(sigma_rel=s) for s in (0.07, 0.08, 0.09)])
    assert len(opened) == 2 * for_one
    assert [round(one.noise_gain, 3) for one in results][1] == round(
        snapshots.reconstruct(PowerFunction(sigma_rel=0.08)).noise_gain, 3
    )


def test_many_groups_of_tensors_give_what_one_gives(tmp_path, monkeypatch) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))).double()
    _, snapshots = run(tmp_path, model=model)
    whole = snapshots.reconstruct(PowerFunction(sigma_rel=0.08)).weights
    monkeypatch.setattr("ema_triton.posthoc.reconstruct.ELEMENTS", 10)
    parts = snapshots.reconstruct(PowerFunction(sigma_rel=0.08)).weights
    assert [*whole] == [*parts]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_buffers_complex_and_tied_tensors_come_back(tmp_path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(3, dtype=torch.complex64))
            self.b = nn.Linear(2, 2)
            self.c = nn.Linear(2, 2)
            self.c.weight = self.b.weight
            self.d = nn.Parameter(torch.ones(2), requires_grad=False)
            self.register_buffer("count", torch.tensor(0))

    model, target = Model(), Constant(0.1)
    snapshots, ema, tracked = None, ModelEMA(model, exclude="d"), ModelEMA(model, exclude="d")
    snapshots = Snapshots(tmp_path)
    snapshots.save(ema)
    for _ in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.count += 1
        ema.update(1.0)
        tracked.update(0.1)
        snapshots.save(ema)
    result = snapshots.reconstruct(target)
    state = tracked.ema_model.state_dict()
    assert result.weights.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(result.weights[name], value, rtol=0, atol=1e-6)
    assert result.weights["c.weight"] is result.weights["b.weight"]
    assert int(snapshots.reconstruct(target, at=7).weights["count"]) == 7
    Model().load_state_dict(result.weights)


def test_an_exact_bf16_ema_gives_what_it_accumulates(tmp_path) -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(model.weight.bfloat16())
        model.bias.copy_(model.bias.bfloat16())
    ema = ModelEMA(model, ema_dtype=torch.bfloat16)
    fine = ModelEMA(model)
    snapshots = Snapshots(tmp_path)
    snapshots.record(ema)
    for update_index in range(1, 9):
        walk(model, update_index)
        ema.update(0.1)
        fine.update(0.1)
        snapshots.save(ema)
    result = snapshots.reconstruct(Constant(0.1))
    for name, value in fine.ema_model.state_dict().items():
        torch.testing.assert_close(result.weights[name], value, rtol=0, atol=1e-6)
    assert not torch.equal(result.weights["weight"], result.weights["weight"].bfloat16().float())


def test_a_target_out_of_reach_is_said_and_an_error_where_it_is_far(tmp_path) -> None:
    _, snapshots = run(tmp_path, updates=400, every=100)
    far = r"do not make Constant\(momentum=0.1\) at update 400: the profile error is (\d+)\."
    with pytest.raises(ValueError, match=far) as error:
        snapshots.reconstruct(Constant(0.1))
    assert "Below 2% it is with snapshots every 12 updates from 0 on." in str(error.value)
    assert "approximate=True" in str(error.value)
    with pytest.warns(UserWarning, match=far):
        result = snapshots.reconstruct(Constant(0.1), approximate=True)
    assert result.profile_error > 0.2
    with pytest.warns(UserWarning, match=r"PowerFunction.* the profile error is \d"):
        assert 0.02 < snapshots.reconstruct(PowerFunction(sigma_rel=0.03)).profile_error < 0.2
    snapshots.reconstruct(PowerFunction(sigma_rel=0.1))  # silent
    _, dense = run(tmp_path / "dense", updates=400, every=10)
    assert dense.reconstruct(Constant(0.1)).profile_error < 0.02


def test_no_number_of_snapshots_is_said_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ema_triton.posthoc.profiles.MOST", 32)
    _, snapshots = run(tmp_path, {"slow": Constant(0.001)}, updates=200, every=100)
    raw = torch.zeros(200)
    raw[-1] = 1
    with pytest.raises(
        ValueError,
        match=r"make the weights .*snapshots of an average more like it",
    ):
        snapshots.reconstruct(raw)


def test_fp16_that_would_overflow_is_an_error_before_anything_is_written(tmp_path) -> None:
    bank, snapshots = run(tmp_path, dtype=torch.float16)
    before = sorted(p.name for p in tmp_path.iterdir()), (tmp_path / "log.json").read_text()
    with torch.no_grad():
        bank.model.weight.fill_(1e6)
    bank.sync()
    with pytest.raises(ValueError, match=r"'weight' has values up to 1e\+06, too large for"):
        snapshots.save(bank)
    after = sorted(p.name for p in tmp_path.iterdir() if p.name != ".new")
    assert (after, (tmp_path / "log.json").read_text()) == before


def test_a_picture_is_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    _, snapshots = run(tmp_path, updates=1500, every=100)
    path = tmp_path / "profiles.png"
    plot_profiles(path, snapshots, PowerFunction(sigma_rel=0.07))
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    import matplotlib.image

    height, width, _ = matplotlib.image.imread(path).shape
    assert (width, height) == (1280, 840)


def test_what_is_no_target_or_no_folder_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="There are no snapshots in"):
        Snapshots(tmp_path).reconstruct(Constant(0.1))
    _, snapshots = run(tmp_path)
    with pytest.raises(TypeError, match="schedule must be a function"):
        snapshots.reconstruct(0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"can only be one of torch\.float64"):
        Snapshots(tmp_path, dtype=torch.int8)


def test_files_of_another_model_are_an_error(tmp_path) -> None:
    run(tmp_path, updates=10)
    small = Snapshots(tmp_path)
    model = nn.Linear(4, 2).double()
    bank = EMABank(model, PAIR)
    bank.update_index = 10
    small.record(bank)
    walk(model, 1)
    bank.update()
    small.save(bank)
    with pytest.raises(
        ValueError, match=r"'weight' cannot be read from .*shape \[2, 3\], but \[2, 4\]"
    ):
        small.reconstruct(PowerFunction(sigma_rel=0.08), approximate=True)


def test_a_folder_whose_log_is_damaged_says_so(tmp_path) -> None:
    run(tmp_path)
    (tmp_path / "log.json").write_text("{")
    with pytest.raises(ValueError, match="The snapshots' log cannot be read"):
        Snapshots(tmp_path)
    (tmp_path / "log.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        Snapshots(tmp_path)
    assert math.isnan(float("nan"))
    assert Log.from_text(Log("ab").to_text()).averages == ["a", "b"]
