"""Checkpoints of ema-pytorch's PostHocEMA: what is rebuilt from them is what was tracked."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import Constant, EqualAverage, PowerFunction
from ema_triton.posthoc import Snapshots
from ema_triton.posthoc.__main__ import main
from ema_triton.posthoc.profiles import profile

post_hoc_ema = pytest.importorskip("ema_pytorch.post_hoc_ema")

FP64 = torch.float64
SIGMAS = 0.05, 0.12
PAIR = [PowerFunction(sigma_rel=sigma) for sigma in SIGMAS]


class Training:
    """A model that moves, ema-pytorch's averages of it, and the online weights in fp64."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module | None = None,
        *,
        steps: int,
        save: int,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.model, self.folder, self.every = model or nn.Linear(4, 3), folder, every
        self.peer = post_hoc_ema.PostHocEMA(
            self.model,
            sigma_rels=SIGMAS,
            update_every=every,
            checkpoint_every_num_steps=save,
            checkpoint_folder=str(folder),
            checkpoint_dtype=dtype,
        )
        self.initial, self.online = self.flat(self.model), list[Tensor]()
        direction = [torch.randn_like(p) for p in self.model.parameters()]
        for step in range(1, steps + 1):
            with torch.no_grad():
                for parameter, along in zip(self.model.parameters(), direction, strict=True):
                    parameter.add_(0.02 * along + 0.05 * torch.randn_like(parameter))
            self.peer.update()
            if (step - 1) % every == 0:
                self.online.append(self.flat(self.model))

    def flat(self, model: nn.Module) -> Tensor:
        return nn.utils.parameters_to_vector(model.parameters()).detach().double()

    def of(self, weights: dict[str, Tensor]) -> Tensor:
        names = [name for name, _ in self.model.named_parameters()]
        return torch.cat([weights[name].double().flatten() for name in names])

    def tracked(self, target: Any, at: int | None = None) -> Tensor:
        """The target's average of the online weights up to update `at`, in fp64."""
        average = self.initial
        for update_index, online in enumerate(self.online[:at], 1):
            average = average + target(update_index) * (online - average)
        return average

    def bound(self, target: Any, result: Any, eps: float) -> float:
        """The most that profile error and rounding can do, by Cauchy and Schwarz."""
        online = torch.stack(self.online[: result.update_index])
        momenta = torch.tensor([target(t) for t in range(1, len(online) + 1)], dtype=FP64)
        spread = float((online - online.mean(0)).norm())
        largest = float(online.norm(dim=1).max())
        by_profile = result.profile_error * float(profile(momenta).norm()) * spread
        # Beside the files', the peer's rounding in fp32: half a spacing at every update, of
        # which the average keeps as much as it has of a weight in 1 / momentum updates.
        rounding = eps / 2 + len(online) * torch.finfo(torch.float32).eps / 2
        return by_profile + rounding * largest * sum(map(abs, result.coefficients.values()))

    def opened(self, **changed: Any) -> Snapshots:
        given: dict[str, Any] = {"schedules": PAIR, "update_every": self.every} | changed
        return Snapshots.from_ema_pytorch(self.folder, **given)


CASES = {
    "every step": {"steps": 240, "save": 12},
    "every third": {"steps": 725, "save": 25, "every": 3},
    "fp16": {"steps": 240, "save": 12, "dtype": torch.float16},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_rebuilt_is_what_was_tracked(tmp_path: Path, case: str) -> None:
    training = Training(tmp_path, **CASES[case])
    eps = torch.finfo(CASES[case].get("dtype", torch.float32)).eps
    # Of an average that is updated every third step, ema-pytorch's decay is still that of single
    # steps, so that it is wider.
    sigma = 0.08 if training.every == 1 else 0.2
    for target in (PowerFunction(sigma_rel=sigma), PowerFunction(sigma_rel=1.3 * sigma)):
        result = training.opened().reconstruct(target)
        assert result.update_index == len(training.online)
        off = training.of(result.weights) - training.tracked(target)
        assert result.profile_error < 0.02
        assert float(off.norm()) <= training.bound(target, result, eps)
        training.model.load_state_dict(result.weights)
        # ema-pytorch's own is farther off.
        peer = training.peer.synthesize_ema_model(gamma=target.gamma).ema_model
        assert float((training.flat(peer) - training.tracked(target)).norm()) > 2 * off.norm()


def off(training: Training, snapshots: Snapshots, target: Any) -> tuple[float, float]:
    """How far the result is from what was tracked, and the most that it may be."""
    result = snapshots.reconstruct(target)
    apart = training.of(result.weights) - training.tracked(target)
    bound = training.bound(target, result, torch.finfo(torch.float32).eps)
    return float(apart.norm()), bound


@pytest.mark.parametrize("every", [1, 3])
def test_the_momenta_are_those_that_were_used(tmp_path: Path, every: int) -> None:
    """A checkpoint of every update tells the online weights, and nothing hides an error."""
    training, target = Training(tmp_path, steps=40, save=1, every=every), PowerFunction(gamma=3)
    exact, bound = off(training, training.opened(), target)
    assert exact <= bound < 1e-3
    # Controls: averages of other widths, and the step of the momentum is the one before.
    wider = training.opened(schedules=[PowerFunction(sigma_rel=1.02 * sigma) for sigma in SIGMAS])
    before = training.opened()
    momenta = before._log.momenta
    for update in range(1, len(training.online)):
        for number, schedule in enumerate(PAIR):
            momenta[2 * update + number] = schedule(1 + update * every)
    for broken in (wider, before):
        apart, bound = off(training, broken, target)
        assert apart > bound


def test_an_update_index_counts_updates_and_at_is_one(tmp_path: Path) -> None:
    training = Training(tmp_path, steps=60, save=1, every=4)
    snapshots = training.opened()
    assert "120 of 2 averages (0.05, 0.12), from update 1 to 15, 0." in str(snapshots)
    assert " MB in float32" in str(snapshots)
    result = snapshots.reconstruct(EqualAverage(), at=9, approximate=True)
    mean = torch.stack(training.online[:9]).mean(0)
    assert result.profile_error < 1e-6
    torch.testing.assert_close(training.of(result.weights), mean, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_before_the_first_update_is_the_initial_weights(tmp_path: Path) -> None:
    training = Training(tmp_path / "other", steps=1, save=9)
    model = nn.Linear(4, 3)
    peer = post_hoc_ema.PostHocEMA(
        model, sigma_rels=SIGMAS, update_every=1, checkpoint_folder=str(tmp_path)
    )
    peer.checkpoint()
    first = copy.deepcopy(model.state_dict())
    peer.update()
    peer.checkpoint()
    snapshots = Snapshots.from_ema_pytorch(tmp_path, PAIR, update_every=1)
    result = snapshots.reconstruct(Constant(0.25))
    torch.testing.assert_close(result.weights, first, rtol=1e-3, atol=1e-3)
    assert result.weights.keys() == training.model.state_dict().keys()


def test_integers_and_names_are_the_online_models(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[1].num_batches_tracked.fill_(37)
    training = Training(tmp_path, model, steps=24, save=2, dtype=torch.float16)
    result = training.opened().reconstruct(PowerFunction(sigma_rel=0.09))
    assert result.weights.keys() == model.state_dict().keys()
    model.load_state_dict(result.weights)
    assert int(model[1].num_batches_tracked) == 37


def test_values_beyond_fp16_are_an_error_but_not_steps(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    training = Training(tmp_path, model, steps=24, save=2, dtype=torch.float16)
    peer = training.peer
    for ema in peer.ema_models:
        ema.step.fill_(70_000)
    peer.checkpoint()
    state = torch.load(tmp_path / "0.70000.pt", weights_only=True)
    assert state["step"].isinf()
    for path in tmp_path.glob("*.70000.pt"):
        path.rename(path.with_name(path.name.replace("70000", "24")))
    assert training.opened().reconstruct(PowerFunction(sigma_rel=0.09)).update_index == 24
    for path in tmp_path.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        state["ema_model.1.num_batches_tracked"] = torch.tensor(1e6).half()
        torch.save(state, path)
    with pytest.raises(ValueError, match=r"'1\.num_batches.*Inf or NaN, as torch.float16 has"):
        training.opened().reconstruct(PowerFunction(sigma_rel=0.09))
    # What was not averaged is the last file's.
    result = training.opened(exclude="1.num*").reconstruct(PowerFunction(sigma_rel=0.09))
    assert result.weights["1.num_batches_tracked"].isinf()
    assert result.weights["0.weight"].isfinite().all()


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    training = Training(tmp_path / "a", steps=4, save=2)
    with pytest.raises(ValueError, match=r"files of the averages 0, 1, .*but 3 schedules"):
        training.opened(schedules=[*PAIR, PowerFunction(gamma=1)])
    with pytest.raises(ValueError, match=r"files of the averages none, .*but 2 schedules"):
        Snapshots.from_ema_pytorch(tmp_path, PAIR)
    with pytest.raises(ValueError, match="update_every"):
        training.opened(update_every=0)
    with pytest.raises(ValueError, match="'wieght' matches no parameter"):
        training.opened(exclude="wieght")
    torch.save({"weight": torch.ones(2)}, tmp_path / "a" / "1.4.pt")
    with pytest.raises(ValueError, match=r"'1\.4\.pt' .*no tensor named ema_model"):
        training.opened()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(tmp_path / "a", steps=240, save=12)
    out, folder = str(tmp_path / "out"), str(training.folder)
    files = [folder, "--ema-pytorch", "0.05,0.12", "--update-every", "1"]
    assert main(["snapshots", *files]) == 0
    assert "40 of 2 averages (0.05, 0.12), from update 12 to 240" in capsys.readouterr().out
    assert main(["reconstruct", *files, "--sigma-rel", "0.08", "--out", out]) == 0
    from ema_triton.checkpoint.interop import read_file

    expected = training.opened().reconstruct(PowerFunction(sigma_rel=0.08)).weights
    found: Any = read_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert "of 40 snapshots" in capsys.readouterr().out
