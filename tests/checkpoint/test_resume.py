"""A run that was cut anywhere and resumed is, to the bit, the one that was not cut."""

import copy
import io
import multiprocessing
import random
import signal
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

from ema_triton import EMAHandler, ModelEMA, schedules
from ema_triton.schedules import (
    Constant,
    CountWarmup,
    Delayed,
    HalfLife,
    InverseDecay,
    LinearWarmup,
    Schedule,
)

ITERATION, EPOCH = Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """How a sum is split among threads is no matter of this file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(left: Any, right: Any) -> bool:
    """Of the same types, in the same order, with tensors of the same bits; NaN is NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        sides = [side.detach().cpu().reshape(-1) for side in (left, right)]
        bits = [torch.where(side == side, side, 0).view(torch.uint8) for side in sides]
        return torch.equal(*bits) and torch.equal(*(side != side for side in sides))
    if isinstance(left, dict):
        return [*left] == [*right] and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def saved(state: Any) -> Any:
    """What a file of it holds."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Net(nn.Module):
    """With batch statistics; and with a parameter that nobody trains, which comes to be NaN."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)
        self.layers = nn.Sequential(*layers)
        self.told = nn.Parameter(torch.zeros(5), requires_grad=False)


def loss_at(model: nn.Module, iteration: int, device: torch.device) -> Tensor:
    """Of a batch that this number alone decides."""
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


# --- Killed ------------------------------------------------------------------------------------

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


# --- Cut at every iteration --------------------------------------------------------------------

WARMUP = {"momentum": 0.05, "momentum_warmup": 0.9, "warmup_iters": 5}
PLAIN = {"momentum": 0.3}
PRECISIONS: dict[str, dict[str, Any]] = {
    f"{precision} {dtype}": {"precision": precision, "ema_dtype": getattr(torch, dtype), "seed": 7}
    for precision in ("exact", "stochastic", "nearest")
    for dtype in ("bfloat16", "float16")
}
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


@pytest.fixture(params=["foreach", "triton"])
def place(request: pytest.FixtureRequest, kernel_device: torch.device) -> tuple[str, torch.device]:
    """A backend, and where it runs."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param, kernel_device if request.param == "triton" else CPU


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
def test_a_handlers_run_may_be_cut_anywhere(case: str, place: tuple[str, torch.device]) -> None:
    (options, event), (backend, device) = CASES[case], place
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
    case: str, place: tuple[str, torch.device]
) -> None:
    """Also while gradients accumulate, if those are saved; it may follow before or after."""
    backend, device = place
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


# --- What a state is ---------------------------------------------------------------------------

KEYS = ["version", "update_index", "schedule", "weights", "precision", "residuals", "random_state"]
SCHEDULES = [
    schedules.Constant(0.3),
    LinearWarmup(0.9, 0.1, 7),
    InverseDecay(2.0, 0.75, 0.1, 0.99),
    CountWarmup(0.9),
    schedules.ExponentialRamp(0.9, 20),
    schedules.CosineRamp(0.9, 50),
    HalfLife(3, every=2),
]


def foreign(value: Any, path: str = "state") -> list[str]:
    """Where there is something that is not plain."""
    if type(value) in (str, int, float, type(None), Tensor):
        return []
    if type(value) not in (dict, OrderedDict):
        return [f"{path} is a {type(value).__name__}"]
    found = [f"key {key!r} of {path}" for key in value if type(key) is not str]
    attributes = vars(value) if type(value) is OrderedDict else {}
    for key, inner in [*value.items(), *attributes.items()]:
        found += foreign(inner, f"{path}[{key!r}]")
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_state_is_plain_and_the_same_after_a_file(case: str) -> None:
    options, event = CASES[case]
    run = Training({"ema": (options, event)}, seed=0)
    run.run(8, epochs=2)
    handler = run.handlers["ema"]
    state = handler.ema.state_dict(clone=True)
    assert [*state] == KEYS
    assert [*state["weights"]] == [*run.to_save["model"].state_dict()]
    assert foreign(state) == []
    assert same(saved(state), state)
    assert same(handler.state_dict(), state)
    with handler.ema.swapped():
        assert same(handler.state_dict(), state)
        assert foreign(handler.state_dict()) == []
    own = {name: options[name] for name in ("precision", "ema_dtype") if name in options}
    other = ModelEMA(Net(), **own)
    other.load_state_dict(saved(state))
    assert same(other.state_dict(), state)


def test_what_is_not_plain_is_found() -> None:
    state = Training({"ema": CASES["always"]}, seed=0).handlers["ema"].state_dict()
    state["update_index"], state["weights"]["told"] = True, nn.Parameter(torch.ones(5))
    assert foreign(state) == [
        "state['update_index'] is a bool",
        "state['weights']['told'] is a Parameter",
    ]


@pytest.mark.parametrize("schedule", [*SCHEDULES, *(Delayed(s, 4) for s in SCHEDULES)], ids=repr)
def test_a_schedule_is_the_same_after_a_file(schedule: Callable[[int], float]) -> None:
    ema, other = ModelEMA(nn.Linear(2, 2)), ModelEMA(nn.Linear(2, 2))
    ema.schedule = schedule
    assert foreign(ema.state_dict()) == []
    other.load_state_dict(saved(ema.state_dict()))
    assert other.schedule == schedule


def test_functions_are_no_part_of_a_state() -> None:
    ema = ModelEMA(nn.Linear(2, 2))
    for schedule in (lambda index: 0.5, Delayed(lambda index: 0.5, 2)):
        ema.schedule = schedule
        assert ema.state_dict()["schedule"] is None
        ema.load_state_dict(saved(ema.state_dict()))
        assert ema.schedule is schedule


# --- Checkpoint and handler at one event -------------------------------------------------------


@pytest.mark.parametrize("what", ["handler", "ema", "ema_model", "model"])
@pytest.mark.parametrize(
    ("of_checkpoint", "of_handler", "together"),
    [
        (ITERATION, ITERATION, True),
        (ITERATION(every=2), ITERATION, True),
        (ITERATION(every=4), ITERATION(every=2), True),
        (EPOCH, EPOCH, True),
        (EPOCH, EPOCH | ITERATION, True),
        (EPOCH, ITERATION, False),
        (ITERATION, Events.ITERATION_STARTED, False),
    ],
)
@pytest.mark.parametrize("checkpoint_first", [True, False])
def test_a_checkpoint_that_would_run_before_the_update_is_warned_of(
    what: str, of_checkpoint: Any, of_handler: Any, together: bool, checkpoint_first: bool
) -> None:
    handler = EMAHandler(nn.Linear(2, 2), 0.5)
    thing = {"handler": handler, "ema_model": handler.ema_model}.get(what)
    trainer, indices = Engine(lambda engine, batch: None), []
    checkpoint = Checkpoint(
        {"it": thing or getattr(handler.ema, what, handler.ema)},
        lambda state, *_: indices.append(state.get("update_index")),
        n_saved=None,
    )
    if not checkpoint_first:
        handler.attach(trainer, event=of_handler)
    trainer.add_event_handler(of_checkpoint, checkpoint)
    if checkpoint_first:
        late = together and what != "model"
        with pytest.warns(UserWarning, match="the same event") if late else nullcontext():
            handler.attach(trainer, event=of_handler)
    trainer.run([None] * 4, max_epochs=2)
    if what == "handler" and of_checkpoint is of_handler:  # what is warned of is so
        assert indices == [*range(1 - checkpoint_first, len(indices) + 1 - checkpoint_first)]


# --- Threads -----------------------------------------------------------------------------------

TELLING = {"float32": {}} | {name: PRECISIONS[name] for name in PRECISIONS if "near" not in name}


class Board(nn.Module):
    """Tensors that all tell one number, large enough that writing them takes a while."""

    def __init__(self, number: float) -> None:
        super().__init__()
        for index, size in enumerate([3, 60_000, 5, 60_000]):
            setattr(self, f"value{index}", nn.Parameter(torch.full((size,), float(number))))
        self.register_buffer("buffer", torch.full((60_000,), float(number)))


def told(state: dict[str, Any]) -> set[float]:
    """What the tensors of a state tell, as an fp32 EMA would have it."""
    numbers: set[float] = set()
    for name, weight in state["weights"].items():
        rest, value = state["residuals"].get(name), weight.float()
        if rest is not None and rest.dtype == torch.int16:
            value = (value.view(torch.int32) + rest).view(torch.float32)
        elif rest is not None:
            value = torch.where(rest.half() == weight, rest, float("nan"))
        numbers |= set(value.unique().tolist())
    return numbers


def number_at(update_index: int) -> float:
    """What they tell after so many updates; bf16 has it exactly."""
    return float(update_index % 200)


def count(ema: ModelEMA, until: threading.Event) -> None:
    """Every update goes half of the way to a number twice as far as the next one."""
    while not until.is_set():
        now, following = number_at(ema.update_index), number_at(ema.update_index + 1)
        for name, tensor in ema.model.state_dict().items():
            tensor.fill_(following if name == "buffer" else 2 * following - now)
        ema.update(0.5)


def halve(ema: ModelEMA, until: threading.Event) -> tuple[int, int]:
    """Update towards zeros; how many updates were made, and how many refused."""
    made, refused = 0, 0
    while not until.is_set():
        try:
            if ema.update_index < 100:
                ema.update(0.5)
                made += 1
        except RuntimeError as error:
            refused += "swapped" in str(error)
        time.sleep(1e-4)
    return made, refused


@contextmanager
def in_another_thread(work: Callable[..., Any], ema: ModelEMA) -> Iterator[list[Any]]:
    """While it works, threads take turns a thousand times as often as else."""
    over, result, interval = threading.Event(), [], sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work, ema, over)
        try:
            yield result
        finally:
            over.set()
            sys.setswitchinterval(interval)
        result.append(working.result())


def torn(ema: ModelEMA, look: Callable[[], dict[str, Any]], times: int) -> int:
    """How many of the states seen while another thread updates are none."""
    found = 0
    with in_another_thread(count, ema):
        for _ in range(times):
            state = look()
            updates = (state["random_state"] or {"updates": state["update_index"]})["updates"]
            found += told(state) != {number_at(state["update_index"])}
            found += updates != state["update_index"]
    assert ema.update_index > 1
    return found


@pytest.mark.parametrize("case", TELLING)
def test_a_copy_of_the_state_is_whole_while_another_thread_updates(case: str) -> None:
    ema = ModelEMA(Board(0), **TELLING[case])
    assert torn(ema, lambda: ema.state_dict(clone=True), 60) == 0


def test_without_the_lock_such_copies_are_torn() -> None:
    ema = ModelEMA(Board(0), **TELLING["exact bfloat16"])
    ema._lock = nullcontext()
    end = time.monotonic() + 30
    while not torn(ema, lambda: ema.state_dict(clone=True), 20):
        assert time.monotonic() < end


def test_a_state_that_is_not_a_copy_changes_with_the_next_update() -> None:
    ema = ModelEMA(Board(1))
    shared, own = ema.state_dict(), ema.state_dict(clone=True)
    ema.model.value0.data.fill_(3.0)
    ema.update(0.5)
    assert shared["weights"]["value0"].eq(2.0).all()
    assert own["weights"]["value0"].eq(1.0).all()


@pytest.mark.parametrize("case", ["float32", "exact bfloat16"])
def test_a_deep_copy_is_whole_while_another_thread_updates(case: str) -> None:
    ema = ModelEMA(Board(0), **TELLING[case])
    assert torn(ema, lambda: copy.deepcopy(ema).state_dict(), 40) == 0


@pytest.mark.parametrize("case", ["float32", "exact bfloat16"])
def test_a_swap_and_an_update_in_two_threads_refuse_each_other(case: str) -> None:
    ema = ModelEMA(Board(0), ema_model=Board(1), handle_buffers="update", **TELLING[case])
    with in_another_thread(halve, ema) as result, ThreadPoolExecutor(1) as pool:
        watching = pool.submit(lambda: [ema.state_dict(clone=True) for _ in range(60)])
        for _ in range(40):
            with ema.swapped() as model:
                expected = 2.0**-ema.update_index
                time.sleep(1e-3)
                assert expected == 2.0**-ema.update_index
                for tensor in [*model.parameters(), *model.buffers()]:
                    assert tensor.unique().tolist() == [expected]
            time.sleep(1e-3)
    ((made, refused),) = result
    assert made == ema.update_index > 0
    assert refused > 0
    assert not any(tensor.any() for tensor in ema.model.state_dict().values())
    for state in [*watching.result(), ema.state_dict()]:
        assert told(state) == {2.0 ** -state["update_index"]}


def test_a_state_loaded_while_another_thread_updates_is_loaded_whole() -> None:
    ema = ModelEMA(Board(0), ema_model=Board(1), handle_buffers="update")
    start = ema.state_dict(clone=True)
    with in_another_thread(halve, ema):
        for _ in range(60):
            ema.load_state_dict(start)
            state = ema.state_dict(clone=True)
            assert told(state) == {2.0 ** -state["update_index"]}


def test_a_full_state_of_one_process_is_a_copy_on_the_cpu() -> None:
    model = nn.Linear(2, 2).bfloat16()
    ema, other = ModelEMA(model), ModelEMA(model)
    model.weight.data.add_(1.0)
    ema.update(0.3)
    state, shared = ema.state_dict(full_state_dict=True), ema.state_dict()
    for part in ("weights", "residuals"):
        for name, value in shared[part].items():
            assert torch.equal(state[part][name], value)
            assert state[part][name].data_ptr() != value.data_ptr()
    other.load_state_dict(state, full_state_dict=True)
    assert other.update_index == 1
    assert torch.equal(other.state_dict()["residuals"]["weight"], state["residuals"]["weight"])
    with pytest.raises(ValueError, match="an empty one"):
        other.load_state_dict({}, full_state_dict=True)
