"""The handler's documented examples, run as written there with their blanks filled in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

from ema_triton import EMAHandler
from tests.oracle import Shadow

EPOCHS = 3
BATCHES = 10
EVERY = 5


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_follows(ema_model: nn.Module, shadow: Shadow, updates: int, largest: float) -> None:
    """Each update errs by up to one eps of the largest value so far, plus the rounded momentum's.

    The latter is half an eps of a difference between two values: at most another eps.
    """
    assert updates >= 2
    bound = 2 * updates * torch.finfo(torch.float32).eps * largest
    assert len(shadow.values) >= 2
    for name, value in ema_model.named_parameters():
        error = (value.double() - shadow.values[name]).abs().max()
        assert error <= bound, f"{name}: {error.item():g}"


def data() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """A noisy line to fit, in batches: for training and for validation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES + 2, 16, 2, generator=generator)
    y = x @ torch.tensor([[2.0], [-1.0]]) + 0.5
    y += 0.5 * torch.randn(y.shape, generator=generator)
    pairs = list(zip(x, y, strict=True))
    return pairs[:BATCHES], pairs[BATCHES:]


class Recorded:
    """What one run of the example shows to the test."""

    def __init__(self) -> None:
        self.validations: list[float] = []
        self.expected: list[float] = []
        self.model: Any = None
        self.handler: Any = None
        self.trainer: Any = None
        self.evaluator: Any = None
        self.shadow: Any = None
        self.largest = 0.0


def run_first_example(
    folder: Path, epochs: int, resume_from: str | None = None, **kwargs: Any
) -> Recorded:
    recorded = Recorded()
    train_data_loader, val_data_loader = data()

    def build_train_step_fn(model: nn.Module) -> Callable[[Engine, Any], float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def train_step_fn(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            return loss.item()

        return train_step_fn

    def get_val_step_fn(model: nn.Module) -> Callable[[Engine, Any], float]:
        @torch.no_grad()
        def val_step_fn(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
            return nn.functional.mse_loss(model(batch[0]), batch[1]).item()

        return val_step_fn

    # The example.
    device = torch.device("cpu")
    model = nn.Linear(2, 1).to(device)
    train_step_fn = build_train_step_fn(model)
    # update the ema every 5 iterations
    ema_handler = EMAHandler(model, **kwargs)
    # get the ema model, which is an instance of nn.Module
    ema_model = ema_handler.ema_model
    trainer = Engine(train_step_fn)
    to_load = {"model": model, "ema_model": ema_model, "trainer": trainer}
    if resume_from is not None:
        Checkpoint.load_objects(to_load, checkpoint=resume_from)

    recorded.shadow = Shadow(weights(ema_model))  # the test's

    # update the EMA model every 5 iterations
    ema_handler.attach(trainer, name="ema_momentum", event=Events.ITERATION_COMPLETED(every=EVERY))

    # add other handlers
    to_save = to_load
    ckpt_handler = Checkpoint(
        to_save, DiskSaver(str(folder), create_dir=True, require_empty=False), n_saved=None
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, ckpt_handler)

    # current momentum can be retrieved from engine.state,
    # the attribute name is the `name` parameter used in the attach function
    @trainer.on(Events.ITERATION_COMPLETED)
    def print_ema_momentum(engine: Engine) -> None:
        print(f"current momentum: {engine.state.ema_momentum}")  # noqa: T201

    # use ema model for validation
    val_step_fn = get_val_step_fn(ema_model)
    evaluator = Engine(val_step_fn)

    @trainer.on(Events.EPOCH_COMPLETED)
    def run_validation(engine: Engine) -> None:
        evaluator.run(val_data_loader)

    # The test's own bookkeeping.
    @trainer.on(Events.STARTED | Events.ITERATION_COMPLETED)
    def size(engine: Engine) -> None:
        for value in (*model.parameters(), *ema_model.parameters()):
            recorded.largest = max(recorded.largest, value.abs().max().item())

    @trainer.on(Events.ITERATION_COMPLETED(every=EVERY))
    def follow(engine: Engine) -> None:
        recorded.shadow.update(weights(model), engine.state.ema_momentum)

    @evaluator.on(Events.ITERATION_COMPLETED)
    def note(engine: Engine) -> None:
        recorded.validations.append(engine.state.output)
        x, y = engine.state.batch
        truth = recorded.shadow.values
        error = x.double() @ truth["weight"].T + truth["bias"] - y.double()
        recorded.expected.append(error.square().mean().item())

    trainer.run(train_data_loader, max_epochs=epochs)
    recorded.model, recorded.handler = model, ema_handler
    recorded.trainer, recorded.evaluator = trainer, evaluator
    return recorded


AS_WRITTEN = {"momentum": 0.0002, "momentum_warmup": 0.0001, "warmup_iters": 10000}
FASTER = {"momentum": 0.5, "momentum_warmup": 0.1, "warmup_iters": 5}


def warmup(kwargs: dict[str, Any], updates: int) -> list[float]:
    start, end, iters = kwargs["momentum_warmup"], kwargs["momentum"], kwargs["warmup_iters"]
    return [start + (end - start) * min(index, iters - 1) / (iters - 1) for index in range(updates)]


@pytest.mark.parametrize("kwargs", [AS_WRITTEN, FASTER], ids=["as written", "faster"])
def test_one_model(
    kwargs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = run_first_example(tmp_path, EPOCHS, **kwargs)
    updates = EPOCHS * BATCHES // EVERY

    # The momentum warms up with the updates, and is printed at every iteration.
    printed = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == EPOCHS * BATCHES
    # Three roundings of values up to 1 on either side.
    exact = pytest.approx(warmup(kwargs, updates), rel=0, abs=2**-50)
    assert printed[EVERY - 1 :: EVERY] == exact
    assert recorded.trainer.state.ema_momentum == printed[-1]

    # The EMA model is what the formula says, in eval mode, and not the online model.
    ema_model = recorded.handler.ema_model
    assert_follows(ema_model, recorded.shadow, updates, recorded.largest)
    assert not ema_model.training
    assert not torch.equal(ema_model.weight, recorded.model.weight)

    # The validation runs once an epoch, on the EMA model.
    assert len(recorded.validations) == 2 * EPOCHS
    # The predictions are a few values up to 10, whose squares are averaged over 16: 1e-4 is more
    # than 100 eps of them, and far less than what separates the two models.
    assert recorded.validations == pytest.approx(recorded.expected, abs=1e-4)
    with torch.no_grad():
        x, y = recorded.evaluator.state.batch
        online = nn.functional.mse_loss(recorded.model(x), y).item()
    assert abs(online - recorded.validations[-1]) > 0.01

    # One checkpoint an epoch, the last of which holds these weights.
    paths = sorted(tmp_path.glob("checkpoint_*.pt"), key=lambda path: int(path.stem.split("_")[1]))
    assert [path.stem for path in paths] == ["checkpoint_10", "checkpoint_20", "checkpoint_30"]
    saved = torch.load(paths[-1], weights_only=True)
    assert saved.keys() == {"model", "ema_model", "trainer"}
    assert torch.equal(saved["ema_model"]["weight"], ema_model.weight)
    assert torch.equal(saved["model"]["weight"], recorded.model.weight)
    first = torch.load(paths[0], weights_only=True)
    assert not torch.equal(first["ema_model"]["weight"], ema_model.weight)


def test_one_model_resumed(tmp_path: Path) -> None:
    first = run_first_example(tmp_path, 1, **FASTER)
    before = weights(first.handler.ema_model)
    again = run_first_example(
        tmp_path, EPOCHS, resume_from=str(tmp_path / "checkpoint_10.pt"), **FASTER
    )
    assert again.trainer.state.iteration == EPOCHS * BATCHES
    updates = (EPOCHS - 1) * BATCHES // EVERY
    assert again.handler.update_index == updates
    assert_follows(again.handler.ema_model, again.shadow, updates, again.largest)
    assert not torch.equal(again.handler.ema_model.weight, before["weight"])
    assert torch.equal(weights(first.handler.ema_model)["weight"], before["weight"])

    # The online weights went on as those of an uncut training, which starts from the same seed.
    torch.manual_seed(0)
    uncut = run_first_example(tmp_path / "uncut", EPOCHS, **FASTER)
    assert torch.equal(uncut.model.weight, again.model.weight)
    assert not torch.equal(first.model.weight, again.model.weight)


def test_generator_and_discriminator(capsys: pytest.CaptureFixture[str]) -> None:
    def build_generator() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))

    def build_discriminator() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def get_step_fn(generator: nn.Module, discriminator: nn.Module) -> Callable:
        generator_steps = torch.optim.Adam(generator.parameters(), lr=0.05)
        discriminator_steps = torch.optim.Adam(discriminator.parameters(), lr=0.05)
        loss = nn.functional.binary_cross_entropy_with_logits

        def step_fn(engine: Engine, real: Tensor) -> None:
            true, false = torch.ones(len(real), 1), torch.zeros(len(real), 1)
            fake = generator(torch.randn(len(real), 2))
            discriminator_steps.zero_grad()
            judged = loss(discriminator(real), true) + loss(discriminator(fake.detach()), false)
            judged.backward()
            discriminator_steps.step()
            generator_steps.zero_grad()
            loss(discriminator(fake), true).backward()
            generator_steps.step()

        return step_fn

    # The example.
    generator = build_generator()
    discriminator = build_discriminator()

    gen_handler = EMAHandler(generator)
    disc_handler = EMAHandler(discriminator)

    step_fn = get_step_fn(generator, discriminator)
    engine = Engine(step_fn)

    # update EMA model of generator every 1 iteration
    gen_handler.attach(engine, "gen_ema_momentum", event=Events.ITERATION_COMPLETED)
    # update EMA model of discriminator every 2 iteration
    disc_handler.attach(engine, "disc_ema_momentum", event=Events.ITERATION_COMPLETED(every=2))

    @engine.on(Events.ITERATION_COMPLETED)
    def print_ema_momentum(engine: Engine) -> None:
        print(f"current momentum for generator: {engine.state.gen_ema_momentum}")  # noqa: T201
        print(  # noqa: T201
            f"current momentum for discriminator: {engine.state.disc_ema_momentum}"
        )

    # The test's own bookkeeping.
    models = [generator, discriminator]
    shadows = [Shadow(weights(model)) for model in models]
    start = [weights(model) for model in models]
    largest = [0.0, 0.0]

    @engine.on(Events.STARTED | Events.ITERATION_COMPLETED)
    def size(engine: Engine) -> None:
        for index, model in enumerate(models):
            for value in model.parameters():
                largest[index] = max(largest[index], value.abs().max().item())

    @engine.on(Events.ITERATION_COMPLETED)
    def follow(engine: Engine) -> None:
        shadows[0].update(weights(generator), 0.0002)
        if engine.state.iteration % 2 == 0:
            shadows[1].update(weights(discriminator), 0.0002)

    generator_seed = torch.Generator().manual_seed(1)
    engine.run([1 + torch.randn(16, 1, generator=generator_seed) for _ in range(20)], max_epochs=2)

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 40
    assert set(lines) == {
        "current momentum for generator: 0.0002",
        "current momentum for discriminator: 0.0002",
    }
    assert (gen_handler.update_index, disc_handler.update_index) == (40, 20)
    assert not hasattr(engine.state, "ema_momentum")
    for index, handler in enumerate((gen_handler, disc_handler)):
        assert_follows(handler.ema_model, shadows[index], handler.update_index, largest[index])
        online = models[index]
        for name, value in handler.ema_model.named_parameters():
            moved = (online.get_parameter(name) - start[index][name]).abs().max()
            assert moved > 0.01, "the training moved nothing"
            assert not torch.equal(value, start[index][name])
            assert (value - start[index][name]).abs().max() < moved


def test_the_shadow_notices_a_missed_update() -> None:
    """The negative control of this file's comparison."""
    model = nn.Linear(2, 1)
    handler = EMAHandler(model)
    shadow = Shadow(weights(handler.ema_model))
    engine = Engine(lambda engine, batch: model.weight.data.add_(0.7))
    handler.attach(engine)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: shadow.update(weights(model), 0.0002)
    )
    engine.run(range(3))
    largest = model.weight.abs().max().item() + 1
    assert_follows(handler.ema_model, shadow, 3, largest)
    shadow.update(weights(model), 0.0002)
    with pytest.raises(AssertionError, match="weight"):
        assert_follows(handler.ema_model, shadow, 3, largest)
