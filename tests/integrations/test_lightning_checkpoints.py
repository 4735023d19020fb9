"""`EMACallback`'s checkpoints: what is in them, and trainings that go on from them bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import (  # noqa: E402
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.tuner import Tuner  # noqa: E402

from ema_triton import Constant, Delayed, EqualAverage  # noqa: E402
from tests.integrations.lightning_runs import (  # noqa: E402
    BATCHES,
    CONSTANT,
    MARKS,
    Net,
    Oracle,
    Save,
    batches,
    callback,
    ema_weights,
    fit,
    load,
    same,
    same_state,
    trainer,
    weights,
)
from tests.oracle import Shadow  # noqa: E402

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before:UserWarning"
    ),
]

KEY = "EMACallback{'name': 'ema'}"


def save(made: Any, path: Path) -> dict[str, Any]:
    made.save_checkpoint(path)
    return load(path)


def test_the_checkpoint_has_the_ema_and_the_online_weights_beside_it(tmp_path: Path) -> None:
    model, ema = Net(), callback()
    saved = save(fit(model, ema), tmp_path / "a.ckpt")
    assert same(saved["state_dict"], ema_weights(ema))
    assert same(saved["current_model_state"], weights(model))
    assert not same(saved["state_dict"], saved["current_model_state"])
    assert [*saved["callbacks"]] == [KEY]


def test_what_the_ema_does_not_hold_is_in_it_too(tmp_path: Path) -> None:
    class More(Net):
        def __init__(self) -> None:
            super().__init__()
            self.tied = nn.Linear(1, 1)
            self.tied.weight = self.head.weight
            self.count = 3

        def get_extra_state(self) -> Tensor:
            return torch.tensor(self.count)

        def set_extra_state(self, state: Tensor) -> None:
            self.count = int(state)

    model, ema = More(), callback(include="net", as_module=False)
    saved = save(fit(model, ema), tmp_path / "a.ckpt")
    assert saved["state_dict"].keys() == model.state_dict().keys()
    assert saved["state_dict"]["_extra_state"] == 3
    assert torch.equal(saved["state_dict"]["tied.weight"], model.head.weight)
    assert torch.equal(saved["state_dict"]["net.0.weight"], ema_weights(ema)["net.0.weight"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_what_is_loaded_from_a_checkpoint_is_the_ema(tmp_path: Path) -> None:
    model, ema = Net(), callback()
    made = fit(model, ema, Save(tmp_path))
    early = load(tmp_path / "3.ckpt")["state_dict"]
    assert same(weights(Net.load_from_checkpoint(tmp_path / "3.ckpt")), early)
    # With a trainer of the EMA in memory, and with one that has no EMA, or no such callback.
    for tester in (made, trainer(callback()), trainer()):
        for stage in ("validate", "test", "predict"):
            other = model if tester is made else Net()
            other.seen.clear()
            getattr(tester, stage)(other, batches(), ckpt_path=tmp_path / "3.ckpt")
            assert same(other.seen[stage][0], early), stage
    assert ema.ema.update_index == 2 * BATCHES  # as the test loads nothing into it


def test_the_best_checkpoint_is_tested_with_its_ema(tmp_path: Path) -> None:
    model, ema = Net(), callback()
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_top_k=1)
    made = fit(model, ema, best, enable_checkpointing=True, max_epochs=4)
    stored = load(best.best_model_path)
    model.seen.clear()
    made.test(model, batches(1), ckpt_path="best", verbose=False)
    assert same(model.seen["test"][0], stored["state_dict"])
    assert not same(stored["state_dict"], ema_weights(ema))
    with torch.no_grad():
        loss = (Net.load_from_checkpoint(best.best_model_path).eval()).loss("again", 1000)
        loss += (Net.load_from_checkpoint(best.best_model_path).eval()).loss("again", 1001)
    assert best.best_model_score == pytest.approx(loss.item() / 2, rel=1e-6)


def test_a_checkpoint_of_weights_alone_is_warned_of(tmp_path: Path) -> None:
    model, ema = Net(), callback()
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match=r"save_weights_only=True.*online weights.*Leave it out"):
        made = fit(model, ema, saver, enable_checkpointing=True)
    assert same(load(saver.best_model_path)["state_dict"], weights(model))
    online = weights(model)
    model.seen.clear()
    made.test(model, batches(1), ckpt_path=saver.best_model_path, verbose=False)
    assert same(model.seen["test"][0], online)  # what was loaded, and not the EMA in memory


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_crash_after_any_batch(accumulate: int, tmp_path: Path) -> None:
    model, whole = Net(), callback()
    fit(model, whole, Save(tmp_path), accumulate_grad_batches=accumulate)
    for batch in range(1, 2 * BATCHES):
        resumed, alone, ema = Net(), Net(), callback()
        path = tmp_path / f"{batch}.ckpt"
        made = fit(resumed, ema, accumulate_grad_batches=accumulate, ckpt_path=path)
        within = batch % BATCHES % accumulate and batch % BATCHES != 0
        if not within:
            assert same(weights(resumed), weights(model)), batch
            made.test(resumed, batches(1), verbose=False)  # without ckpt_path: what is in memory
            assert same(resumed.seen["test"][0], ema_weights(ema))
            assert same_state(ema, whole), batch
            continue
        # Lightning drops what had been accumulated: as without the EMA, so with it.
        plain = load(path)
        plain["state_dict"] = plain.pop("current_model_state")
        state = plain["callbacks"].pop(KEY)
        torch.save(plain, tmp_path / "plain.ckpt")
        oracle = Oracle()
        oracle.updates, own = state["update_index"], dict(alone.named_parameters())
        oracle.shadow = Shadow({name: state["weights"][name] for name in own})
        fit(alone, oracle, accumulate_grad_batches=accumulate, ckpt_path=tmp_path / "plain.ckpt")
        assert same(weights(resumed), weights(alone)), batch
        assert ema.ema.update_index == oracle.updates == 2 * -(-BATCHES // accumulate), batch
        oracle.check(ema_weights(ema))


def test_a_checkpoint_within_an_accumulation_has_the_ema_of_the_last_step(tmp_path: Path) -> None:
    ema = callback()
    fit(Net(), ema, Save(tmp_path), accumulate_grad_batches=3)
    saved = [load(tmp_path / f"{n}.ckpt")["callbacks"][KEY] for n in range(1, 11)]
    assert [one["update_index"] for one in saved] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4]
    assert same(saved[2]["weights"], saved[3]["weights"])
    assert not same(saved[3]["weights"], saved[4]["weights"])


@pytest.mark.parametrize(
    "options",
    [
        {"submodule": "net"},
        {"as_module": False, "exclude": "head"},
        {"handle_buffers": "update"},
        {"at_end": "copy"},
    ],
)
def test_options_and_resuming(options: dict[str, Any], tmp_path: Path) -> None:
    model, whole = Net(), callback(**options)
    fit(model, whole, Save(tmp_path))
    for batch in (4, 5, 7):
        resumed, ema = Net(), callback(**options)
        fit(resumed, ema, ckpt_path=tmp_path / f"{batch}.ckpt")
        assert same(weights(resumed), weights(model))
        assert same_state(ema, whole)


@pytest.mark.parametrize("precision", ["exact", "stochastic", "nearest"])
@pytest.mark.filterwarnings("ignore:momentum .* is below the resolution:UserWarning")
def test_resuming_in_low_precision(precision: str, tmp_path: Path) -> None:
    options = {"precision": "bf16-true"}
    model, whole = Net(), callback(Constant(0.001), precision=precision)
    fit(model, whole, Save(tmp_path), **options)
    resumed, ema = Net(), callback(Constant(0.001), precision=precision)
    fit(resumed, ema, ckpt_path=tmp_path / "7.ckpt", **options)
    assert same(weights(resumed), weights(model))
    assert same_state(ema, whole)


def test_resuming_with_compiled_submodules(tmp_path: Path) -> None:
    model, whole = Net(compiled=True), callback()
    fit(model, whole, Save(tmp_path))
    saved = load(tmp_path / "7.ckpt")
    assert "net._orig_mod.0.weight" in saved["state_dict"]
    assert not torch.equal(
        saved["state_dict"]["net._orig_mod.0.weight"],
        saved["current_model_state"]["net._orig_mod.0.weight"],
    )
    resumed, ema = Net(compiled=True), callback()
    fit(resumed, ema, ckpt_path=tmp_path / "7.ckpt")
    assert same(weights(resumed), weights(model))
    assert same_state(ema, whole)
    for part in ("net", "net._orig_mod"):
        of_part = callback(submodule=part)
        saved = save(fit(Net(compiled=True), of_part, max_epochs=1), tmp_path / "part.ckpt")
        own = ema_weights(of_part)["0.weight"]
        assert torch.equal(saved["state_dict"]["net._orig_mod.0.weight"], own)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_real_crash_and_the_checkpoint_of_the_exception(tmp_path: Path) -> None:
    model, whole = Net(), callback()
    fit(model, whole)
    crashing = Net()
    crashing.fail_in = {"validate": RuntimeError("power")}
    with pytest.raises(RuntimeError, match="power"):
        fit(
            crashing,
            ModelCheckpoint(
                tmp_path, "crash", save_on_exception=True, save_on_train_epoch_end=False
            ),
            callback(),
            enable_checkpointing=True,
        )
    saved = load(tmp_path / "crash.ckpt")
    assert same(saved["current_model_state"], weights(crashing))
    resumed, ema = Net(), callback()
    fit(resumed, ema, ckpt_path=tmp_path / "crash.ckpt")
    assert same(weights(resumed), weights(model))
    assert same_state(ema, whole)


class SavesInValidation(pl.Callback):
    """Before `EMACallback` among the callbacks, so that the weights are swapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, made: Any, model: Any) -> None:
        if not made.sanity_checking:
            made.save_checkpoint(self.folder / f"{made.current_epoch}.ckpt")


@pytest.mark.parametrize("parts", [[""], ["net"], ["net", "head"], ["head", "", "net"]])
def test_a_checkpoint_written_while_the_weights_are_swapped(
    parts: list[str], tmp_path: Path
) -> None:
    def averages() -> list[Any]:
        return [callback(submodule=part, name=f"of {part}") for part in parts]

    model, whole, oracle = Net(), averages(), Oracle()
    fit(model, SavesInValidation(tmp_path), *whole, oracle)
    saved = load(tmp_path / "0.ckpt")
    assert same(saved["current_model_state"], oracle.online[BATCHES - 1])
    assert same(saved["state_dict"], model.seen["validate"][0])
    resumed, emas = Net(), averages()
    fit(resumed, *emas, ckpt_path=tmp_path / "0.ckpt")
    assert same(weights(resumed), weights(model))
    assert all(map(same_state, emas, whole))


@pytest.mark.filterwarnings("ignore:The online model's state_dict.. was called while:UserWarning")
def test_a_checkpoint_written_inside_swapped(tmp_path: Path) -> None:
    model, ema = Net(), callback()
    made = fit(model, ema)
    online, shown = weights(model), ema_weights(ema)
    with ema.ema.swapped():
        saved = save(made, tmp_path / "a.ckpt")
        assert same(weights(model), shown)
    assert same(saved["state_dict"], shown)
    assert same(saved["current_model_state"], online)
    assert same(weights(model), online)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_crash_and_the_trainers_own_checkpoint(epoch: int, tmp_path: Path) -> None:
    class Crashes(Net):
        crash = 100

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.current_epoch == self.crash:
                raise RuntimeError("crash")
            return super().training_step(batch, batch_idx)

    options = {"max_epochs": 5, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    model, whole = Crashes(), callback(at_end="copy")
    fit(model, whole, **options, default_root_dir=tmp_path / "whole")
    crashing = Crashes()
    crashing.crash = epoch
    with pytest.raises(RuntimeError, match="crash"):
        fit(crashing, callback(at_end="copy"), **options, default_root_dir=tmp_path)
    (path,) = (tmp_path / "checkpoints").iterdir()
    resumed, ema = Crashes.load_from_checkpoint(path), callback(at_end="copy")
    fit(resumed, ema, **options, default_root_dir=tmp_path, ckpt_path=path)
    assert same(weights(resumed), weights(model))
    assert same_state(ema, whole)


def test_the_last_checkpoint_is_written_before_the_ema_is_copied(tmp_path: Path) -> None:
    model, whole = Net(), callback(at_end="copy")
    fit(model, whole, max_epochs=4)
    half, ema, oracle = Net(), callback(at_end="copy"), Oracle()
    last = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=100)
    fit(half, ema, oracle, last, enable_checkpointing=True)
    assert same(load(tmp_path / "last.ckpt")["current_model_state"], oracle.online[-1])
    assert same(load(tmp_path / "last.ckpt")["state_dict"], weights(half))
    resumed, ema = Net(), callback(at_end="copy")
    path, last = tmp_path / "last.ckpt", ModelCheckpoint(tmp_path, every_n_train_steps=100)
    fit(resumed, ema, last, enable_checkpointing=True, max_epochs=4, ckpt_path=path)
    assert same(weights(resumed), weights(model))
    assert same_state(ema, whole)


def test_two_averages_are_both_saved(tmp_path: Path) -> None:
    def averages() -> list[Any]:
        return [callback(Constant(0.5), name="short"), callback(CONSTANT, name="long")]

    model, whole = Net(), averages()
    made = fit(model, *whole, Save(tmp_path))
    saved = save(made, tmp_path / "last.ckpt")
    assert same(saved["state_dict"], ema_weights(whole[0]))
    assert same(saved["current_model_state"], weights(model))
    assert same(saved["callbacks"]["EMACallback{'name': 'long'}"]["weights"], ema_weights(whole[1]))
    resumed, emas = Net(), averages()
    fit(resumed, *emas, ckpt_path=tmp_path / "4.ckpt")
    assert same(weights(resumed), weights(model))
    assert all(map(same_state, emas, whole))


def test_two_parts_are_both_under_state_dict(tmp_path: Path) -> None:
    def averages() -> list[Any]:
        return [callback(submodule=part, name=part) for part in ("net", "head")]

    model, whole = Net(), averages()
    made = fit(model, *whole, Save(tmp_path))
    saved = save(made, tmp_path / "last.ckpt")
    both = {
        f"{ema.name}.{name}": value for ema in whole for name, value in ema_weights(ema).items()
    }
    assert same(saved["state_dict"], both)
    resumed, emas = Net(), averages()
    fit(resumed, *emas, ckpt_path=tmp_path / "4.ckpt")
    assert all(map(same_state, emas, whole))


def test_a_checkpoint_without_an_ema_begins_it_as_a_copy(tmp_path: Path) -> None:
    model, oracle = Net(), Oracle()
    fit(Net(), Save(tmp_path), max_epochs=1)
    ema = callback()
    fit(model, ema)  # what it has from another fit is not the checkpoint's
    fit(model, ema, oracle, ckpt_path=tmp_path / "5.ckpt")
    assert ema.ema.update_index == oracle.updates == BATCHES
    oracle.check(ema_weights(ema))


def test_another_schedule_of_the_checkpoint_is_warned_of(tmp_path: Path) -> None:
    fit(Net(), callback(), Save(tmp_path), max_epochs=1)
    ema = callback(CONSTANT)
    with pytest.warns(UserWarning, match="checkpoint's schedule LinearWarmup.* replaces Constant"):
        fit(Net(), ema, ckpt_path=tmp_path / "5.ckpt")
    assert ema.ema.schedule == callback()._schedule


def test_a_damaged_state_is_refused_before_the_training(tmp_path: Path) -> None:
    fit(Net(), callback(), Save(tmp_path), max_epochs=1)
    saved = load(tmp_path / "4.ckpt")
    del saved["callbacks"][KEY]["weights"]["head.weight"]
    torch.save(saved, tmp_path / "broken.ckpt")
    with pytest.raises(ValueError, match=r"'head.weight' is missing. Nothing was loaded"):
        fit(Net(), callback(), ckpt_path=tmp_path / "broken.ckpt")


def of_lightning(**options: Any) -> Any:
    weight_averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    return weight_averaging.EMAWeightAveraging(decay=0.9, **options)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_training_with_lightnings_own_averaging_goes_on(compiled: bool, tmp_path: Path) -> None:
    peer, model = of_lightning(), Net(compiled=compiled)
    fit(model, peer, Save(tmp_path))
    own = peer._average_model.module
    ema = callback(Delayed(Constant(0.1), 1), handle_buffers="update")
    fit(Net(compiled=compiled), ema, ckpt_path=tmp_path / "4.ckpt")
    assert ema.ema.update_index == 2 * BATCHES
    for (name, value), other in zip(
        own.named_parameters(), ema.ema.ema_model.parameters(), strict=True
    ):
        torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-7, msg=name)
    saved = load(tmp_path / "4.ckpt")
    assert saved["averaging_state"]["n_averaged"] == 4


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_part_of_lightnings_own_averaging(tmp_path: Path) -> None:
    fit(Net(), of_lightning(), Save(tmp_path), max_epochs=1)
    saved = load(tmp_path / "5.ckpt")
    ema = callback(submodule="net")
    made = fit(Net(), ema, ckpt_path=tmp_path / "5.ckpt", max_epochs=1)
    assert ema.ema.update_index == BATCHES
    again = save(made, tmp_path / "again.ckpt")
    for name, value in again["state_dict"].items():
        kind = "state_dict" if name.startswith("net.") else "current_model_state"
        assert torch.equal(value, saved[kind][name]), name


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_what_a_metric_saves_is_no_part_of_an_average(tmp_path: Path) -> None:
    class Measured(Net):
        def __init__(self) -> None:
            super().__init__()
            self.metric = torchmetrics.MeanMetric()
            self.metric.persistent(True)

    torchmetrics = pytest.importorskip("torchmetrics")
    fit(Measured(), of_lightning(), Save(tmp_path), max_epochs=1)
    ema = callback()
    with pytest.warns(UserWarning, match=r"'metric.mean_value'.*were left out"):
        made = fit(Measured(), ema, ckpt_path=tmp_path / "5.ckpt", max_epochs=1)
    assert ema.ema.update_index == BATCHES
    made.save_checkpoint(tmp_path / "own.ckpt")
    assert "metric.mean_value" in load(tmp_path / "own.ckpt")["state_dict"]
    fit(Measured(), callback(), ckpt_path=tmp_path / "own.ckpt")


def test_the_checkpoint_of_another_model_has_its_own_weights(tmp_path: Path) -> None:
    ema, other = callback(), Net()
    fit(Net(), ema)
    made = trainer(ema)
    made.validate(other, batches(1), verbose=False)
    saved = save(made, tmp_path / "other.ckpt")
    assert same(saved["state_dict"], weights(other))
    assert "current_model_state" not in saved


class Tuned(Net):
    lr = 0.05
    batch_size = 1

    def train_dataloader(self) -> Any:
        return DataLoader(torch.arange(BATCHES).float(), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.arange(8.0), batch_size=self.batch_size)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_finder(first: bool, tmp_path: Path) -> None:
    ema, oracle, finder = callback(), Oracle(), LearningRateFinder(num_training_steps=4)
    ordered = (finder, ema) if first else (ema, finder)
    fit(Tuned(), *ordered, oracle, default_root_dir=tmp_path)
    assert ema.ema.update_index == oracle.updates == 2 * BATCHES
    oracle.check(ema_weights(ema))


def test_a_learning_rate_finder_in_the_midst_of_a_training(tmp_path: Path) -> None:
    class AtEpoch1(LearningRateFinder):
        def on_fit_start(self, *_: Any) -> None:
            pass

        def on_train_epoch_start(self, made: Any, model: Any) -> None:
            if made.current_epoch == 1:
                self.lr_find(made, model)

    model, ema, other = Tuned(), callback(), callback(CONSTANT, name="other")
    oracle, of_other = Oracle(), Oracle(CONSTANT)
    finder = AtEpoch1(num_training_steps=4)
    fit(model, finder, ema, other, oracle, of_other, max_epochs=3, default_root_dir=tmp_path)
    assert ema.ema.update_index == oracle.updates == 3 * BATCHES
    oracle.check(ema_weights(ema))
    of_other.check(ema_weights(other))
    assert same(model.seen["validate"][-1], ema_weights(ema))


@pytest.mark.parametrize("method", ["lr_find", "fit", "validate"])
def test_the_tuner_between_two_fits(method: str, tmp_path: Path) -> None:
    model, ema, oracle = Tuned(), callback(), Oracle()
    fit(model, ema, oracle)
    online, shown = weights(model), ema_weights(ema)
    made = trainer(ema, oracle, default_root_dir=tmp_path)
    if method == "lr_find":
        Tuner(made).lr_find(model, num_training=4)
    else:
        Tuner(made).scale_batch_size(model, method=method, max_trials=2)
    assert same(weights(model), online)
    assert same(ema_weights(ema), shown)
    model.seen.clear()
    trainer(ema).test(model, batches(1), verbose=False)
    assert same(model.seen["test"][0], shown)
    model.train()
    made.fit(model)
    assert ema.ema.update_index == oracle.updates > 2 * BATCHES
    oracle.check(ema_weights(ema))


@pytest.mark.parametrize("of_checkpoint", [True, False])
def test_a_validation_with_a_batch_size_finder(of_checkpoint: bool, tmp_path: Path) -> None:
    model, ema = Tuned(), callback()
    fit(model, ema, Save(tmp_path))
    online, shown = weights(model), ema_weights(ema)
    early, path = load(tmp_path / "3.ckpt")["state_dict"], tmp_path / "3.ckpt"
    finder = BatchSizeFinder(max_trials=1, steps_per_trial=1)
    made = trainer(ema, finder, default_root_dir=tmp_path)
    made.validate(model, ckpt_path=path if of_checkpoint else None, verbose=False)
    assert same(model.seen["validate"][-1], early if of_checkpoint else shown)
    assert same(weights(model), early if of_checkpoint else online)
    assert same(ema_weights(ema), shown)


def test_a_checkpoint_saved_after_the_training_resumes(tmp_path: Path) -> None:
    model, whole = Net(), callback(EqualAverage())
    fit(model, whole, max_epochs=2)
    half, ema = Net(), callback(EqualAverage())
    made = fit(half, ema, max_epochs=1)
    made.save_checkpoint(tmp_path / "half.ckpt")
    resumed, ema = Net(), callback(EqualAverage())
    fit(resumed, ema, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(resumed), weights(model))
    assert same_state(ema, whole)


def test_the_weights_of_the_ema_are_in_the_file_once(tmp_path: Path) -> None:
    model, ema = Net(width=3000), callback()
    fit(model, ema).save_checkpoint(tmp_path / "a.ckpt")
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    moments = 2 * sum(value.numel() * value.element_size() for value in model.parameters())
    assert (tmp_path / "a.ckpt").stat().st_size < 2.2 * size + moments
