"""`EMACallback`: what it averages, and who sees the EMA when."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from ema_triton import Constant, Delayed  # noqa: E402
from tests.integrations.lightning_runs import (  # noqa: E402
    BATCHES,
    CONSTANT,
    MARKS,
    WARMUP,
    Net,
    Oracle,
    SigintError,
    batches,
    callback,
    ema_weights,
    fit,
    same,
    same_state,
    trainer,
    weights,
)

pytestmark = MARKS


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_it_is_updated_after_each_real_step_of_the_optimizer(accumulate: int) -> None:
    ema, oracle = callback(), Oracle()
    done = fit(Net(), ema, oracle, accumulate_grad_batches=accumulate)
    assert ema.ema.update_index == oracle.updates == done.global_step
    assert done.global_step == 2 * -(-BATCHES // accumulate)
    oracle.check(ema_weights(ema))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_training_is_what_it_is_without(accumulate: int) -> None:
    alone, model = Net(), Net()
    options = {"val_check_interval": 1, "accumulate_grad_batches": accumulate}
    fit(alone, **options)
    fit(model, callback(), **options)
    assert same(weights(alone), weights(model))


@pytest.mark.parametrize("options", [{}, {"as_module": False}, {"precision": "nearest"}])
def test_validation_sees_the_ema(options: dict[str, Any]) -> None:
    model, ema, oracle = Net(), callback(**options), Oracle()
    fit(model, ema, oracle, val_check_interval=1)
    assert len(model.seen["validate"]) == 2 * 2 * BATCHES
    assert same(model.seen["validate"][-1], ema_weights(ema))
    assert not same(model.seen["validate"][-1], oracle.online[-1])
    assert same(weights(model), oracle.online[-1])
    oracle.check(model.seen["validate"][-1])


def test_the_sanity_check_sees_the_ema() -> None:
    model, ema = Net(), callback()
    before = weights(model)
    fit(model, ema, max_epochs=1)
    assert same(model.seen["sanity"][0], before)  # it begins as a copy
    shown = ema_weights(ema)
    model.seen.clear()
    fit(model, ema, max_epochs=1)
    assert same(model.seen["sanity"][0], shown)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validate_test_and_predict_see_the_ema(inference_mode: bool) -> None:
    model, ema = Net(), callback()
    fit(model, ema)
    shown, online = ema_weights(ema), weights(model)
    model.seen.clear()
    made = trainer(ema, inference_mode=inference_mode)
    made.validate(model, batches(), verbose=False)
    made.test(model, batches(), verbose=False)
    made.predict(model, batches())
    assert [*model.seen] == ["validate", "test", "predict"]
    assert all(same(seen, shown) for stage in model.seen.values() for seen in stage)
    assert same(weights(model), online)
    assert same(ema_weights(ema), shown)
    fit(model, ema)  # what was swapped in inference mode can be trained


def test_before_a_fit_the_model_is_evaluated_as_it_is() -> None:
    model = Net()
    trainer(callback()).test(model, batches(), verbose=False)
    assert same(model.seen["test"][0], weights(model))


def test_another_model_is_evaluated_with_its_own_weights() -> None:
    model, other, ema = Net(), Net(), callback()
    fit(model, ema)
    trainer(ema).test(other, batches(), verbose=False)
    assert same(other.seen["test"][0], weights(other))


def test_another_model_without_that_part_is_evaluated_with_its_own_weights() -> None:
    class Other(pl.LightningModule):
        test_step = validation_step = lambda self, *_: None

    ema = callback(submodule="net")
    fit(Net(), ema)
    made = trainer(ema)
    made.test(Other(), batches(1), verbose=False)
    made.validate(Other(), batches(1), verbose=False)


def test_a_callback_before_it_that_has_no_ema_hides_nothing() -> None:
    model, ema = Net(), callback()
    fit(model, ema)
    trainer(callback(name="new"), ema).test(model, batches(1), verbose=False)
    assert same(model.seen["test"][0], ema_weights(ema))


def test_an_evaluation_by_another_trainer_does_not_end_the_updates() -> None:
    class Evaluates(pl.Callback):
        def on_train_epoch_end(self, made: Any, model: Any) -> None:
            trainer(ema).validate(model, batches(1), verbose=False)
            model.trainer = made

    model, ema, oracle = Net(), callback(), Oracle()
    fit(model, Evaluates(), ema, oracle)
    assert ema.ema.update_index == oracle.updates == 2 * BATCHES
    oracle.check(ema_weights(ema))


@pytest.fixture
def sigint_as_before() -> Iterator[None]:
    """Lightning ignores SIGINT once it has handled a KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("sigint_as_before")
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), SigintError()])
@pytest.mark.parametrize("stage", ["sanity", "validate", "test", "predict"])
def test_whatever_ends_an_evaluation_the_online_weights_are_back(
    stage: str, error: BaseException
) -> None:
    model, ema = Net(), callback()
    fit(model, ema)
    online, shown = weights(model), ema_weights(ema)
    model.fail_in = {stage: error}
    oracle = Oracle()
    made = trainer(ema, oracle, max_epochs=1)
    run = made.fit if stage in ("sanity", "validate") else getattr(made, stage)
    # Lightning turns a KeyboardInterrupt into SystemExit.
    with pytest.raises((ValueError, SystemExit)):
        run(model, batches(), *[batches(2)] * (run == made.fit))
    assert model.seen[stage]
    if stage == "validate":
        online, shown = oracle.online[-1], model.seen["validate"][-1]
    assert same(weights(model), online)
    assert same(ema_weights(ema), shown)
    assert same(model.seen[stage][-1], shown)
    assert not same(online, shown)
    model.fail_in = {}
    model.train()  # an exception leaves it in eval mode
    before = ema.ema.update_index
    fit(model, ema, max_epochs=1)  # nothing is left over: one update per step
    assert ema.ema.update_index == before + BATCHES


def test_an_exception_in_the_training_ends_the_updates() -> None:
    class Breaks(Net):
        def configure_optimizers(self) -> Any:
            optimizers.append(torch.optim.SGD(self.parameters(), lr=0.1))
            return optimizers[0]

    optimizers: list[Any] = []
    model, ema = Breaks(), callback()
    model.fail_in = {"train": RuntimeError("broken")}
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, ema)
    optimizers[0].step()
    assert ema.ema.update_index == 0


def test_a_callback_that_fails_first_leaves_nothing_swapped_behind() -> None:
    class Fails(pl.Callback):
        def on_exception(self, *_: Any) -> None:
            raise OSError("disk full")

    model, ema = Net(), callback()
    fit(model, ema)
    model.fail_in = {"validate": ValueError("broken")}
    with pytest.raises(OSError, match="disk full"):
        fit(model, Fails(), ema)
    model.fail_in = {}
    model.train()
    fit(model, ema)
    model.seen.clear()
    online, shown = weights(model), ema_weights(ema)
    trainer(ema).test(model, batches(), verbose=False)
    assert same(model.seen["test"][0], shown)
    assert same(weights(model), online)


class BySgd(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("dtype", ["bf16-true", "16-true"])
def test_validating_in_low_precision_leaves_the_ema_as_it_is(dtype: str) -> None:
    often, never = callback(CONSTANT), callback(CONSTANT)
    fit(BySgd(), often, precision=dtype, val_check_interval=1)
    fit(BySgd(), never, precision=dtype, limit_val_batches=0)
    assert ema_weights(often)["net.0.weight"].dtype != torch.float32
    assert often.ema.state_dict()["residuals"]
    assert same_state(often, never)


def test_a_schedule_that_never_begins_leaves_the_trained_model() -> None:
    model, ema = Net(), callback(Delayed(CONSTANT, 10_000), at_end="copy")
    before, oracle = weights(model), Oracle()
    fit(model, ema, oracle)
    assert same(weights(model), oracle.online[-1])
    assert not same(weights(model), before)


class Overflowing(Net):
    """The gradients of the batches 1 and 3 are infinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        factor = float("inf") if batch_idx in (1, 3) else 1.0
        return super().training_step(batch, batch_idx) * factor


def test_a_step_that_the_grad_scaler_skips_makes_no_update() -> None:
    ema, oracle = callback(), Oracle()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fit(Overflowing(), ema, oracle, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert ema.ema.update_index == oracle.updates == 2 * (BATCHES - 2)
    oracle.check(ema_weights(ema))


class Gan(Net):
    """Two optimizers by hand: the second one of `head` steps twice per batch."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second, second):
            optimizer.zero_grad()
            self.manual_backward(self.loss("train", batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = (self.net, self.head)
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in parts]


def test_manual_optimization_of_several_optimizers() -> None:
    net = callback(submodule="net", name="net")
    head = callback(submodule="head", name="head", optimizer=1)
    done = fit(Gan(), net, head)
    assert net.ema.update_index == 2 * BATCHES
    assert head.ema.update_index == 4 * BATCHES
    assert done.global_step == 6 * BATCHES


def test_a_second_fit_goes_on() -> None:
    model, ema, oracle = Net(), callback(), Oracle()
    fit(model, ema, oracle, max_epochs=1)
    of_first = ema.ema
    fit(model, ema, oracle, max_epochs=1)
    assert ema.ema is of_first
    assert ema.ema.update_index == 2 * BATCHES
    oracle.check(ema_weights(ema))


def test_the_fit_of_another_model_begins_anew() -> None:
    ema, oracle = callback(), Oracle()
    fit(Net(), ema)
    fit(Net(), ema, oracle, max_epochs=1)
    assert ema.ema.update_index == BATCHES
    oracle.check(ema_weights(ema))


def test_at_the_end_the_ema_is_copied_if_asked() -> None:
    kept, copied = Net(), Net()
    keeps, copies = callback(), callback(at_end="copy")
    fit(kept, keeps)
    fit(copied, copies)
    assert same(weights(copied), ema_weights(copies))
    assert same(ema_weights(keeps), ema_weights(copies))
    assert not same(weights(kept), weights(copied))


def test_a_part_of_the_model() -> None:
    model, ema, oracle = Net(), callback(submodule="net", at_end="copy"), Oracle()
    fit(model, ema, oracle)
    own = {f"net.{name}": value for name, value in ema_weights(ema).items()}
    oracle.check({**oracle.shadow.values, **own})
    assert ema.ema.model is model.net
    seen = model.seen["validate"][-1]
    assert torch.equal(seen["head.weight"], oracle.online[-1]["head.weight"])
    assert torch.equal(seen["net.0.weight"], ema_weights(ema)["0.weight"])
    assert torch.equal(weights(model)["head.weight"], oracle.online[-1]["head.weight"])
    assert torch.equal(weights(model)["net.0.weight"], ema_weights(ema)["0.weight"])


def test_the_options_are_those_of_model_ema() -> None:
    model = Net()
    ema = callback(handle_buffers="update", include="net", ema_dtype=torch.float64)
    fit(model, ema)
    assert ema.ema.handle_buffers == "update"
    own = ema_weights(ema)
    assert own["net.0.weight"].dtype == torch.float64
    assert torch.equal(own["head.weight"], model.head.weight)
    assert not torch.equal(own["net.1.running_mean"], model.net[1].running_mean)


def test_the_ema_model_has_neither_trainer_nor_data() -> None:
    model, ema = Net(), callback()
    fit(model, ema)
    assert type(ema.ema.ema_model) is Net
    assert ema.ema.ema_model._trainer is None
    assert ema.ema.ema_model.train_dataloader.__self__ is ema.ema.ema_model
    assert not ema.ema.ema_model.training


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[float]:
        return iter(range(BATCHES))


def test_data_of_unknown_length() -> None:
    ema, oracle = callback(), Oracle()
    trainer(ema, oracle).fit(Net(), DataLoader(Stream(), batch_size=1), batches(2))
    assert ema.ema.update_index == oracle.updates == 2 * BATCHES
    oracle.check(ema_weights(ema))


class Configured(Net):
    """Its layers are made by `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = None

    def configure_model(self) -> None:
        if self.extra is None:
            self.extra = nn.Linear(1, 1)

    def loss(self, stage: str, number: int) -> Tensor:
        return super().loss(stage, number) + self.extra(torch.ones(1)).square().mean()


def test_layers_made_by_configure_model_are_averaged() -> None:
    ema, oracle = callback(), Oracle()
    fit(Configured(), ema, oracle)
    assert "extra.weight" in ema_weights(ema)
    oracle.check(ema_weights(ema))


def test_compiled_submodules() -> None:
    model, plain = Net(compiled=True), Net()
    ema, of_plain = callback(), callback()
    fit(model, ema)
    fit(plain, of_plain)
    assert same_state(ema, of_plain)
    names = {name.replace("_orig_mod.", "") for name in model.seen["validate"][-1]}
    assert names == {*ema_weights(ema)}


def test_two_averages_of_one_model() -> None:
    model = Net()
    short, long = callback(Constant(0.5), name="short"), callback(Constant(0.01), name="long")
    oracles = [Oracle(Constant(0.5)), Oracle(Constant(0.01))]
    fit(model, short, long, *oracles)
    oracles[0].check(ema_weights(short))
    oracles[1].check(ema_weights(long))
    assert same(model.seen["validate"][-1], ema_weights(short))  # the first is shown
    trainer(long).test(model, batches(1), verbose=False)  # where it is the first one
    assert same(model.seen["test"][-1], ema_weights(long))


def test_a_callback_that_is_not_shown_can_be_copied_at_the_end() -> None:
    model, short = Net(), callback(Constant(0.5), name="short")
    long = callback(Constant(0.01), name="long", at_end="copy")
    fit(model, short, long)
    assert same(model.seen["validate"][-1], ema_weights(short))
    assert same(weights(model), ema_weights(long))


def test_two_averages_of_two_parts_are_both_shown() -> None:
    model, oracle = Net(), Oracle()
    net, head = callback(submodule="net", name="net"), callback(submodule="head", name="head")
    fit(model, net, head, oracle)
    oracle.check(model.seen["validate"][-1])
    assert same(weights(model), oracle.online[-1])


def test_it_can_be_copied_and_pickled() -> None:
    made = callback(submodule="net", optimizer=1, precision="nearest")
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin.ema is None
        assert twin.state_key == made.state_key
    model, ema = Net(), callback()
    fit(model, ema)
    twin = pickle.loads(pickle.dumps(ema))
    assert same_state(twin, ema)


def test_warmup_counts_updates_and_not_batches() -> None:
    momenta = []

    def schedule(index: int) -> float:
        momenta.append(index)
        return WARMUP(index)

    fit(Net(), callback(schedule), accumulate_grad_batches=2, max_epochs=1)
    assert sorted({*momenta}) == [1, 2, 3]
