"""A run that was cut anywhere and resumed is, to the bit, the one that was not cut."""

import copy
import multiprocessing
import random
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

from ema_triton import EMAHandler, ModelEMA
from ema_triton.schedules import (
    Constant,
    CountWarmup,
    Delayed,
    HalfLife,
    InverseDecay,
    LinearWarmup,
    Schedule,
)
from tests.states import PRECISIONS, same, saved

pytestmark = pytest.mark.usefixtures("one_thread")


ITERATION, EPOCH = Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED


CPU = torch.device("cpu")


class Net(nn.Module):
    """With batch statistics, and a parameter that is not trained and comes to be NaN."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)
        self.layers = nn.Sequential(*layers)
        self.told = nn.Parameter(torch.zeros(5), requires_grad=False)


def loss_at(model: nn.Module, iteration: int, device: torch.device) -> Tensor:
    """The loss of a batch that depends on the iteration alone."""
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(iteration))
    with torch.no_grad():
        model.told.fill_(float(iteration))[iteration % 5] = float("nan")
    return model.layers(inputs.to(device)).square().mean()


class Training:
    """All that a script sets up."""

    def __init__(
        self, handlers: dict[str, tuple[dict[str, Any], Any]], seed: int, device: Any = CPU
    ) -> None:
        torch.manual_seed(seed)
        model = Net().to(device)
        optimizer = torch.optim.AdamW(model.layers.parameters(), lr=0.1)
        self.handlers = {name: EMAHandler(model, **how) for name, (how, _) in handlers.items()}

        def step(engine: Engine, batch: object) -> None:
            optimizer.zero_grad()
            loss_at(model, engine.state.iteration, device).backward()
            optimizer.step()
            for handler in self.handlers.values():
                if handler.handle_buffers == "ema_train":
                    loss_at(handler.ema_model, engine.state.iteration, device)

        self.trainer = Engine(step)
        for name, (_, event) in handlers.items():
            self.handlers[name].attach(self.trainer, name=f"{name}_momentum", event=event)
        self.to_save = {"model": model, "optimizer": optimizer, "trainer": self.trainer}
        self.to_save |= self.handlers

    def run(self, iterations: int, epochs: int) -> None:
        self.trainer.run([None] * (iterations // epochs), max_epochs=epochs)

    def state(self) -> dict[str, Any]:
        return {name: thing.state_dict() for name, thing in self.to_save.items()}


KILLS = 20


LENGTH, EPOCHS = 40, 4  # a checkpoint every other iteration


LOW = {"ema_dtype": torch.bfloat16, "precision": "stochastic", "seed": 5}


KILLED: dict[str, tuple[dict[str, Any], Any]] = {
    "ema": ({"momentum": 0.1, "momentum_warmup": 0.9, "warmup_iters": 25} | LOW, ITERATION),
    "ema2": ({"schedule": Delayed(CountWarmup(0.99), 3)}, ITERATION(every=3)),
}


def newest(folder: Path) -> Path | None:
    return max(folder.glob("*.pt"), key=lambda file: int(file.stem.split("_")[-1]), default=None)


def train_until_killed(folder: Path, parent: Connection) -> None:
    """In a process of its own: resume from what is there, and tell the parent of each step."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    last = newest(folder)
    run = Training(KILLED, seed=99 if last else 0)
    if last:
        Checkpoint.load_objects(run.to_save, torch.load(last, weights_only=True))
    saver = DiskSaver(str(folder), atomic=True, require_empty=False)
    checkpoint = Checkpoint(run.to_save, saver, n_saved=2)
    run.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: parent.send("iteration"))
    run.trainer.add_event_handler(ITERATION(every=2), lambda: parent.send("saving"))
    run.trainer.add_event_handler(ITERATION(every=2), checkpoint)
    if run.trainer.state.iteration < LENGTH:
        run.run(LENGTH, EPOCHS)
    parent.send("done")


def killed(context: Any, folder: Path, chance: random.Random | None) -> bool:
    """Whether a run, from the last checkpoint on, was killed while it trained; else it is done."""
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=train_until_killed, args=(folder, there))
    child.start()
    there.close()
    told, gap, done = 0, 0.0, False
    last = chance.randint(1, 16) if chance else None
    with suppress(EOFError):  # it ended
        while told != last:
            begin = time.monotonic()
            done |= here.recv() == "done"
            gap = time.monotonic() - begin if told else 0.0  # the first is the way here
            told += 1
        # After a random part of what a step takes on this machine.
        time.sleep(min(gap, 0.1) * chance.random())
        child.kill()
        while True:
            done |= here.recv() == "done"
    child.join()
    assert child.exitcode == 0 or (child.exitcode == -signal.SIGKILL and chance)
    assert done or child.exitcode
    return not done


def test_runs_that_are_killed_at_random_moments(tmp_path: Path) -> None:
    uncut = Training(KILLED, seed=0)
    uncut.run(LENGTH, EPOCHS)
    expected = saved(uncut.state())
    assert [expected[ema]["update_index"] for ema in KILLED] == [LENGTH, LENGTH // 3]
    context = multiprocessing.get_context("forkserver")
    # Optimizers import torch._dynamo when they are built.
    context.set_forkserver_preload(["torch._dynamo", "ema_triton", __name__])
    chance, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        runs += 1
        assert runs <= KILLS, "runs end before they are killed"
        folder = tmp_path / str(runs)
        folder.mkdir()
        while kills < KILLS and killed(context, folder, chance):
            kills += 1
            for file in folder.glob("*.pt"):  # none is half-written
                assert torch.load(file, weights_only=True)["ema"]["version"] == 2
        assert kills < KILLS or not killed(context, folder, None)
        last = newest(folder)
        assert last is not None
        assert same(torch.load(last, weights_only=True), expected)


WARMUP = {"momentum": 0.05, "momentum_warmup": 0.9, "warmup_iters": 5}


PLAIN = {"momentum": 0.3}


GROUPS = {"exclude": ["layers.1", "layers.3.bias"], "momentum_scale": {"layers.0": 0.5}}


AVERAGED = {"schedule": CountWarmup(0.9), "handle_buffers": "update"}


SKIPPING = PLAIN | {"nonfinite": "skip"}


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "always": (PLAIN, ITERATION),
    "every second, with a warm-up": (WARMUP, ITERATION(every=2)),
    "every third": ({"schedule": HalfLife(2, every=3)}, ITERATION(every=3)),
    "once": (PLAIN, ITERATION(once=5)),
    "epochs": ({"schedule": InverseDecay()}, EPOCH),
    "iterations and epochs": (WARMUP, ITERATION(every=3) | EPOCH),
    "started": (PLAIN, Events.ITERATION_STARTED(every=2)),
    "after three": ({"schedule": Delayed(Constant(0.3), 3)}, ITERATION),
    "after two, with a warm-up": (
        {"schedule": Delayed(LinearWarmup(0.9, 0.05, 5), 2)},
        ITERATION(every=2),
    ),
    "groups": (PLAIN | GROUPS, ITERATION),
    "some": (PLAIN | {"include": "layers.3"}, ITERATION),
    "averaged buffers": (AVERAGED, ITERATION),
    "buffers of its own": (PLAIN | {"handle_buffers": "ema_train"}, ITERATION),
    "skip": (SKIPPING, ITERATION),
    "skip in bfloat16": (SKIPPING | PRECISIONS["exact bfloat16"], ITERATION),
    **{name: (WARMUP | options, ITERATION) for name, options in PRECISIONS.items()},
}


def cuts_that_show(build: Callable[[int], Training], leave_out: str | None = None) -> list[int]:
    """After which of 8 iterations a run can not be cut, and resumed into another model."""
    uncut, files = build(0), {}

    def record(engine: Engine) -> None:
        files[engine.state.iteration] = saved(uncut.state())

    uncut.trainer.add_event_handler(ITERATION, record)
    uncut.trainer.add_event_handler(EPOCH, record)  # after the updates at this one
    uncut.run(8, epochs=2)
    assert [*files] == [*range(1, 9)]
    found = []
    for cut in range(1, 8):
        resumed = build(cut)
        to_load = {name: to for name, to in resumed.to_save.items() if name != leave_out}
        Checkpoint.load_objects(to_load, files[cut])
        resumed.run(8, epochs=2)
        found += [] if same(saved(resumed.state()), files[8]) else [cut]
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_handlers_run_may_be_cut_anywhere(case: str, backend: str, device: torch.device) -> None:
    options, event = CASES[case]
    handlers = {"ema": (options | {"backend": backend}, event)}
    assert cuts_that_show(lambda seed: Training(handlers, seed, device)) == []


def test_a_run_with_several_handlers_may_be_cut_anywhere() -> None:
    handlers = {f"ema{number}": case for number, case in enumerate(CASES.values())}
    assert cuts_that_show(lambda seed: Training(handlers, seed)) == []


def test_the_cut_shows_if_the_handler_is_not_loaded() -> None:
    handlers = {"ema": CASES["every second, with a warm-up"]}
    assert cuts_that_show(lambda seed: Training(handlers, seed), "ema") == [*range(1, 8)]


@pytest.mark.parametrize("set_at", [None, 5])
@pytest.mark.parametrize("schedule", [Constant(0.3), Delayed(Constant(0.3), 3)], ids=repr)
def test_the_momentum_shown_may_be_saved_with_the_engine(
    schedule: Schedule, set_at: int | None
) -> None:
    """Be it the handler's own, or set by the user in the middle of the run."""

    def build(seed: int) -> Training:
        run = Training({"ema": ({"schedule": schedule}, ITERATION)}, seed)
        run.trainer.state_dict_user_keys.append("ema_momentum")
        if set_at:
            run.trainer.add_event_handler(
                Events.ITERATION_STARTED(once=set_at),
                lambda engine: setattr(engine.state, "ema_momentum", 0.7),
            )
        return run

    assert cuts_that_show(build) == []


@pytest.mark.parametrize("case", ["plain", "groups", "averaged buffers", "skip", *PRECISIONS])
def test_an_ema_that_follows_may_be_cut_anywhere(
    case: str, backend: str, device: torch.device
) -> None:
    """Also while gradients accumulate, if those are saved; it may follow before or after."""
    options = {
        "plain": {},
        "groups": GROUPS,
        "averaged buffers": {"handle_buffers": "update"},
        "skip": {"nonfinite": "skip"},
    }

    def run(iterations: range, state: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        torch.manual_seed(iterations.start)
        model = Net().to(device)
        ema = ModelEMA(model, backend=backend, **(options | PRECISIONS)[case])
        optimizer = torch.optim.AdamW(model.layers.parameters(), lr=0.1)
        things = {"model": model, "optimizer": optimizer, "ema": ema}
        for number in range(2):
            if number == iterations.start % 2:
                ema.follow(optimizer, Delayed(LinearWarmup(0.9, 0.1, 3), 1))
            if state and number == 0:
                for name, thing in things.items():
                    thing.load_state_dict(state[name])
                for parameter, grad in zip(model.parameters(), state["grads"], strict=True):
                    parameter.grad = None if grad is None else grad.to(device)
        states = []
        for iteration in iterations:
            loss_at(model, iteration, device).backward()
            if iteration % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
            found = {name: thing.state_dict() for name, thing in things.items()}
            found["grads"] = [parameter.grad for parameter in model.parameters()]
            states.append(saved(found))
        return states

    uncut = run(range(1, 11))
    assert [state["ema"]["update_index"] for state in uncut] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    for cut in range(1, 10):
        assert same(run(range(cut + 1, 11), copy.deepcopy(uncut[cut - 1])), uncut[cut:]), cut
