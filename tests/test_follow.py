"""Updates where an optimizer really steps, and what goes before averaging begins."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from ema_triton.schedules import (
    Constant,
    CosineRamp,
    Delayed,
    HalfLife,
    InverseDecay,
    LinearWarmup,
    Schedule,
)
from tests.states import saved

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


HALF = Constant(0.5)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.randn(5, 3)).square().mean()


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)


def followed(
    schedule: Callable[[int], float] = HALF, kind: str = "SGD"
) -> tuple[nn.Module, torch.optim.Optimizer, ModelEMA]:
    """A model, its optimizer, and an EMA that follows it."""
    model = network()
    optimizer, ema = OPTIMIZERS[kind](model.parameters()), ModelEMA(model)
    ema.follow(optimizer, schedule)
    return model, optimizer, ema


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_step_is_followed_as_by_hand(kind: str) -> None:
    """One update with the schedule's momentum after a step, however often its closure is called."""
    model = network()
    optimizer, schedule = OPTIMIZERS[kind](model.parameters()), LinearWarmup(0.5, 0.1, 3)
    following, by_hand = ModelEMA(model), ModelEMA(model)
    following.follow(optimizer, schedule)
    for count in range(1, 6):
        before = weights(model)
        step(model, optimizer)
        assert not all(map(torch.equal, model.parameters(), before))
        by_hand.update(schedule(count))
        assert following.update_index == count
        assert equal(following.ema_model, by_hand.ema_model)
    assert not equal(following.ema_model, model)  # the control: it is an average
    assert following.schedule == schedule


def test_accumulating_gradients_is_no_step() -> None:
    """Nor does it matter that a scheduler of the learning rate puts a `step` of its own."""
    model, optimizer, ema = followed()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for batch in range(1, 13):
        loss_of(model).backward()
        if batch % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        assert ema.update_index == batch // 4


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW foreach", "fused Adam"])
def test_steps_that_grad_scaler_skips_do_not_count(kind: str, groups: int) -> None:
    model = network()
    halves = [{"params": model[i].parameters()} for i in (0, 2)] if groups == 2 else None
    optimizer = OPTIMIZERS[kind](halves or model.parameters())
    ema, called = ModelEMA(model), []
    ema.follow(optimizer, InverseDecay())
    optimizer.register_step_pre_hook(lambda *_: called.append(True))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    overflows, updates = [False, True, True, False, True, False], 0
    for overflow in overflows:
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if overflow:
            model[2].bias.grad.fill_(float("inf"))
        before, averaged = weights(model), weights(ema.ema_model)
        scaler.step(optimizer)
        scaler.update()
        updates += not overflow
        assert ema.update_index == updates
        assert all(map(torch.equal, model.parameters(), before)) == overflow
        assert all(map(torch.equal, ema.ema_model.parameters(), averaged)) == overflow
    # The control: a fused optimizer is called all the same, and skips by itself.
    assert len(called) == (len(overflows) if kind == "fused Adam" else updates)
    assert scaler.get_scale() == 1.0
    step(model, optimizer)  # without a scaler
    assert ema.update_index == updates + 1


def test_unscaling_first_skips_as_well() -> None:
    model, optimizer, ema = followed(kind="fused Adam")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad, updates in ((float("nan"), 0), (0.0, 1)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        model[0].weight.grad[0, 0] = bad
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert ema.update_index == updates


def test_it_ends_by_remove_and_follows_one_at_a_time() -> None:
    model = network()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    ema = ModelEMA(model)
    handle = ema.follow(first, Constant(0.25))
    for other in (first, second):
        with pytest.raises(RuntimeError, match=r"follows an optimizer already.*Call remove\(\)"):
            ema.follow(other, Constant(0.5))
    assert ema.schedule == Constant(0.25)
    step(model, second)
    assert ema.update_index == 0
    step(model, first)
    assert ema.update_index == 1
    for _ in range(2):
        handle.remove()
    step(model, first)
    assert ema.update_index == 1
    with ema.follow(second, Constant(0.5)):
        step(model, second)
    step(model, second)
    assert (ema.update_index, ema.schedule) == (2, Constant(0.5))
    third = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.follow(third, Constant(0.5))
    del third
    gc.collect()
    ema.follow(first, Constant(0.5))  # the other one is gone
    step(model, first)
    assert ema.update_index == 3


def test_two_emas_follow_one_optimizer() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    emas = [ModelEMA(model), ModelEMA(model)]
    for number, ema in enumerate(emas):
        ema.follow(optimizer, Constant(0.25 * number))
    step(model, optimizer)
    assert [ema.update_index for ema in emas] == [1, 1]
    assert not equal(emas[0].ema_model, emas[1].ema_model)


@pytest.mark.parametrize(
    ("schedule", "error", "text"),
    [
        (0.1, TypeError, "schedule must be a function"),
        (None, TypeError, "schedule must be a function"),
        (lambda index: 1.5, ValueError, r"Invalid momentum: 1\.5.*update 1"),
        (lambda index: "0.1", ValueError, "Invalid momentum: '0.1'"),
        (lambda index: 1 / (index - 1), ZeroDivisionError, "division"),
    ],
)
def test_what_it_follows_is_checked(schedule: object, error: type, text: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEMA(model)
    with pytest.raises(error, match=text):
        ema.follow(optimizer, schedule)
    for other in (network(), ema.ema_model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="none of this model's parameters"):
            ema.follow(torch.optim.SGD(other.parameters(), lr=0.1), Constant(0.1))
    assert ema.schedule is None
    part = torch.optim.SGD([*network().parameters(), model[2].bias], lr=0.1)
    ema.follow(part, Constant(0.1))  # one that trains a part of the model, and others
    step(model, optimizer)
    assert ema.update_index == 0


def test_a_schedule_that_turns_bad_is_told_at_its_step() -> None:
    model, optimizer, ema = followed(lambda index: 0.1 if index < 3 else 2.0)
    for _ in range(2):
        step(model, optimizer)
    with pytest.raises(ValueError, match="from the schedule at update 3"):
        step(model, optimizer)
    assert ema.update_index == 2
    ema.schedule = Constant(0.1)
    step(model, optimizer)
    assert ema.update_index == 3


def test_a_schedule_taken_away_is_told_in_words() -> None:
    model, optimizer, ema = followed()

    def without() -> None:
        ema.schedule = None
        step(model, optimizer)

    with pytest.raises((RuntimeError, ValueError, TypeError), match="schedule"):
        without()


def test_a_step_inside_swapped_is_loud() -> None:
    model, optimizer, ema = followed()
    step(model, optimizer)

    def inside() -> None:
        with ema.swapped(), pytest.raises(RuntimeError, match=r"update\(\) while the models' wei"):
            step(model, optimizer)

    with pytest.warns(UserWarning, match=r"written, or replaced, while the models' wei"):
        inside()
    assert ema.update_index == 1
    step(model, optimizer)
    assert ema.update_index == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_follow_nothing(duplicate: Callable) -> None:
    model, optimizer, ema = followed(kind="Adam")
    step(model, optimizer)
    twin = duplicate(ema)
    assert (twin.update_index, twin.schedule) == (1, Constant(0.5))
    step(model, optimizer)
    other = duplicate(optimizer)
    assert (twin.update_index, ema.update_index) == (1, 2)
    other.step()
    assert ema.update_index == 2
    mine = torch.optim.SGD(twin.model.parameters(), lr=0.1)
    twin.follow(mine, Constant(0.1))
    step(twin.model, mine)
    optimizer.load_state_dict(optimizer.state_dict())
    step(model, optimizer)
    assert (twin.update_index, ema.update_index) == (2, 3)


@pytest.mark.parametrize("again", [CosineRamp(0.5, 8), Constant(0.3)])
def test_a_resumed_run_goes_on_as_if_uninterrupted(again: object) -> None:
    model, optimizer, ema = followed(CosineRamp(0.5, 8))
    for _ in range(3):
        step(model, optimizer)
    states = saved([part.state_dict() for part in (model, optimizer, ema)])
    twin, twins, resumed = followed(again)
    for part, state in zip((twin, twins), states, strict=False):
        part.load_state_dict(state)
    other = again == Constant(0.3)
    with (
        pytest.warns(UserWarning, match="The checkpoint's schedule .* replaces")
        if other
        else nullcontext()
    ):
        resumed.load_state_dict(states[2])
    assert (resumed.update_index, resumed.schedule) == (3, CosineRamp(0.5, 8))
    for net, stepper in ((model, optimizer), (twin, twins)):
        torch.manual_seed(5)
        for _ in range(3):
            step(net, stepper)
    assert equal(model, twin)
    assert equal(ema.ema_model, resumed.ema_model)
    assert resumed.update_index == 6


@pytest.mark.parametrize("every", [1, 3, 4.0])
def test_it_may_update_after_every_nth_step(every: int) -> None:
    model = network()
    optimizer, schedule = OPTIMIZERS["SGD"](model.parameters()), LinearWarmup(0.5, 0.1, 3)
    following, by_hand = ModelEMA(model), ModelEMA(model)
    following.follow(optimizer, schedule, every=every)
    for count in range(1, 14):
        step(model, optimizer)
        if count % every == 0:
            by_hand.update(schedule(by_hand.update_index + 1))
        assert following.update_index == count // every
        assert equal(following.ema_model, by_hand.ema_model)


def test_every_nth_step_goes_with_a_half_life_in_steps() -> None:
    """The weight stands still, so that the distance halves in so many steps, however it is cut."""
    for every in (1, 2, 4):
        model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ema = ModelEMA(model)
        ema.follow(optimizer, HalfLife(4, every=every), every=every)
        model.weight.data.fill_(1.0)
        ema.ema_model.weight.data.fill_(0.0)
        for _ in range(8):
            model.weight.grad = torch.zeros(1, 1)
            optimizer.step()
        assert ema.update_index == 8 // every
        assert ema.ema_model.weight.item() == pytest.approx(0.75, rel=0, abs=8 * 2**-24)


def test_the_count_of_steps_begins_with_follow() -> None:
    model, optimizer, ema = followed()
    step(model, optimizer)
    twin = ModelEMA(model)
    twin.load_state_dict(ema.state_dict())
    handle = twin.follow(optimizer, HALF, every=2)
    step(model, optimizer)
    assert twin.update_index == 1
    handle.remove()
    twin.follow(optimizer, HALF, every=2)
    step(model, optimizer)
    assert twin.update_index == 1
    step(model, optimizer)
    assert twin.update_index == 2


@pytest.mark.parametrize(
    ("every", "error", "text"),
    [
        (0, ValueError, "Invalid every: 0. It counts .* give at least 1"),
        (-2, ValueError, "Invalid every: -2"),
        (1.5, TypeError, "Invalid every: 1.5, a float. It counts .* give an integer"),
        ("2", TypeError, "Invalid every: '2', a str"),
        (True, TypeError, "Invalid every: True, a bool"),
        (None, TypeError, "Invalid every: None"),
    ],
)
def test_every_is_checked(every: object, error: type, text: str) -> None:
    model = network()
    optimizer, ema = torch.optim.SGD(model.parameters(), lr=0.1), ModelEMA(model)
    with pytest.raises(error, match=text):
        ema.follow(optimizer, HALF, every=every)
    assert ema.schedule is None
    ema.follow(optimizer, HALF)
    step(model, optimizer)
    assert ema.update_index == 1


class Line:
    """A model of one weight, an engine that adds 1 to it, and what a handler did and showed."""

    def __init__(self, *, every: int = 1, **options: object) -> None:
        ignite = pytest.importorskip("ignite.engine")
        from ema_triton import EMAHandler

        self.model = nn.Linear(1, 1, bias=False)
        self.model.weight.data.fill_(0.0)
        self.step = lambda: self.model.weight.data.add_(1.0)
        self.handler = EMAHandler(self.model, **options)
        self.engine = ignite.Engine(lambda engine, batch: self.step().item())
        self.event, self.seen = ignite.Events.ITERATION_COMPLETED(every=every), []

    def run(self, iterations: int) -> Line:
        self.handler.attach(self.engine, event=self.event)
        self.shown = getattr(self.engine.state, "ema_momentum", None)  # before any update
        self.engine.add_event_handler(self.event, self.note)
        self.engine.run(range(iterations))
        return self

    def note(self) -> None:
        weight = self.handler.ema_model.weight.item()
        self.seen.append((self.engine.state.ema_momentum, weight))


def delayed(updates: int, schedule: Schedule | None = None) -> Delayed:
    return Delayed(schedule or Constant(0.5), updates)


def test_nothing_is_averaged_before() -> None:
    line = Line(schedule=delayed(2))
    # EMA = online twice; then halfway to 3, 4 and 5.
    assert line.run(5).seen == [(1.0, 1.0), (1.0, 2.0), (0.5, 2.5), (0.5, 3.25), (0.5, 4.125)]
    assert line.shown == 1.0


def test_the_schedule_counts_from_where_averaging_begins() -> None:
    line = Line(schedule=delayed(2, LinearWarmup(0.75, 0.25, 3)))
    assert [shown for shown, _ in line.run(6).seen] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.25]
    own = Line(schedule=delayed(1, lambda index: 1 / (index + 1)))
    assert [shown for shown, _ in own.run(3).seen] == [1.0, 1 / 2, 1 / 3]
    assert own.handler.momentum is None


def test_the_delay_is_in_updates_not_iterations() -> None:
    line = Line(schedule=delayed(2), every=3)
    assert line.run(12).seen == [(1.0, 3.0), (1.0, 6.0), (0.5, 7.5), (0.5, 9.75)]
    assert line.handler.update_index == 4


@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_run_resumed_in_the_delay_waits_for_the_rest_of_it(before: int) -> None:
    schedule = delayed(2, LinearWarmup(0.5, 0.25, 2))
    whole, first = Line(schedule=schedule).run(5), Line(schedule=schedule).run(before)
    second = Line(schedule=schedule)
    second.model.load_state_dict(first.model.state_dict())
    second.handler.load_state_dict(first.handler.state_dict())
    assert second.run(5 - before).seen == whole.seen[before:]


@pytest.mark.parametrize("scale", [0.5, 0.0, 1.0])
def test_in_the_delay_the_ema_is_the_online_model_whatever_the_scale(scale: float) -> None:
    line = Line(schedule=delayed(2), momentum_scale={"weight": scale})
    assert [weight for _, weight in line.run(2).seen] == [1.0, 2.0]


@pytest.mark.parametrize(("old", "new"), [(float("nan"), 1.0), (float("inf"), 1.0), (-3e38, 3e38)])
def test_in_the_delay_no_old_value_stays(old: float, new: float) -> None:
    line = Line(schedule=delayed(3))
    values = iter([old, new])
    line.step = lambda: line.model.weight.data.fill_(next(values))
    line.run(2)
    assert line.handler.ema_model.weight.item() == torch.tensor(new).item()
