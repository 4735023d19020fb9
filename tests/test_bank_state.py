"""A bank saved and loaded, copied, and used in several threads."""

from __future__ import annotations

import copy
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ema_triton import Constant, EMABank, HalfLife, ModelEMA
from ema_triton.checkpoint import state_dict
from tests.banks import (
    NAMES,
    OPTIONS,
    SCHEDULES,
    Net,
    assert_different,
    assert_equal,
    change,
    schedules,
    singles_of,
    tensors,
    train_buffers,
    update,
)
from tests.states import same, saved

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(count: int = 3, steps: int = 3, **options: Any) -> EMABank:
    """After some updates."""
    model = Net()
    bank = EMABank(model, schedules(count), **options)
    for step in range(steps):
        change(model, step)
        bank.update()
    return bank


def dcp_saved(bank: EMABank, folder: Path) -> Callable[[EMABank], None]:
    """A bank saved by torch.distributed.checkpoint; what loads it into another."""
    dcp.save({"ema": bank}, checkpoint_id=folder)
    return lambda other: dcp.load({"ema": other}, checkpoint_id=folder)


def torch_saved(bank: EMABank, folder: Path) -> Callable[[EMABank], None]:
    state = saved(bank.state_dict())
    return lambda other: other.load_state_dict(state)


def gathered(bank: EMABank, folder: Path) -> Callable[[EMABank], None]:
    state = saved(bank.state_dict(full_state_dict=True))
    return lambda other: other.load_state_dict(state, full_state_dict=True)


WAYS = [torch_saved, dcp_saved, gathered]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", OPTIONS)
def test_a_resumed_bank_goes_on_bit_by_bit(
    case: str, way: Callable[..., Callable[[EMABank], None]], tmp_path: Path
) -> None:
    model = Net()
    options = OPTIONS[case]
    bank, singles = EMABank(model, schedules(3), **options), singles_of(model, 3, **options)
    for step in range(2):
        change(model, step)
        bank.update()
        update(singles)
        for ema in [*bank.values(), *singles.values()]:
            train_buffers(ema, step)
    load = way(bank, tmp_path)
    # Other values, residuals and random states, which must not stay.
    other = EMABank(model, schedules(3), **{**options, "seed": 99})
    change(model, 7)
    other.update()
    assert not same(other.state_dict(), bank.state_dict())
    load(other)
    assert same(other.state_dict(), bank.state_dict())
    assert other.update_index == 2
    assert other.schedule == schedules(3)
    for step in range(2, 4):
        change(model, step)
        other.update()
        update(singles)
    if options.get("nonfinite") != "skip":
        assert_equal(other, singles)  # which has skip counts of its own
    for name, ema in singles.items():
        assert same(other[name].state_dict(), ema.state_dict())


def test_the_state_has_each_average_as_of_a_single_ema() -> None:
    bank = trained(**OPTIONS["exact bfloat16"])
    state = bank.state_dict()
    for name, ema in bank.items():
        assert same(state["averages"][name], ema.state_dict())
    shared = [tensor.data_ptr() for tensor in tensors(state)]
    copied = [tensor.data_ptr() for tensor in tensors(bank.state_dict(clone=True))]
    assert not {*shared} & {*copied}
    assert shared == [tensor.data_ptr() for tensor in tensors(bank.state_dict())]


def test_one_averages_state_is_loaded_by_a_single_ema_and_back() -> None:
    bank = trained()
    single = ModelEMA(bank.model)
    single.load_state_dict(saved(bank.state_dict())["averages"]["warm-up"])
    assert same(single.state_dict(), bank["warm-up"].state_dict())
    change(bank.model, 9)
    single.update(0.3)
    others = bank.state_dict(clone=True)
    bank["warm-up"].load_state_dict(saved(single.state_dict()))
    assert same(bank["warm-up"].state_dict(), single.state_dict())
    for name in ("copy first", "small"):
        assert same(bank[name].state_dict(), others["averages"][name])


def test_weights_of_one_average_go_to_a_file_and_back(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    bank = trained()
    bank["small"].save_weights(tmp_path / "small.safetensors")
    other = trained(steps=1)
    before = other.state_dict(clone=True)["averages"]
    other["small"].load_weights(tmp_path / "small.safetensors")
    found, expected = other["small"].state_dict(), bank["small"].state_dict()
    assert same(found["weights"], expected["weights"])
    for name in ("copy first", "warm-up"):
        assert same(other[name].state_dict(), before[name])


def edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[], dict[str, Any]]:
    """A bank's state with its averages edited."""

    def state() -> dict[str, Any]:
        state = trained(steps=2).state_dict(clone=True)
        edit(state["averages"])
        return state

    return state


def renamed(averages: dict[str, Any]) -> None:
    averages["other"] = averages.pop("small")


def reshaped(averages: dict[str, Any]) -> None:
    averages["small"]["weights"]["first.bias"] = torch.ones(8)


def without_a_weight(averages: dict[str, Any]) -> None:
    del averages["small"]["weights"]["first.bias"]


def of_no_version(averages: dict[str, Any]) -> None:
    averages["small"]["version"] = 99


def damaged(averages: dict[str, Any]) -> None:
    averages["small"]["schedule"] = '{"name": "Unheard"}'


def no_state(averages: dict[str, Any]) -> None:
    averages["small"] = None


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "another name": (edited(renamed), r"'other'.*'small'"),
    "one missing": (edited(lambda a: a.pop("small")), r"'copy first', 'warm-up'.*'small'"),
    "one more": (edited(lambda a: a.update(more=a["small"])), r"'more'"),
    "none": (edited(lambda a: a.clear()), r"'small'"),
    "a shape": (edited(reshaped), r"'small'(.|\n)*first\.bias"),
    "a weight missing": (edited(without_a_weight), r"'small'(.|\n)*first\.bias"),
    "a version": (edited(of_no_version), r"'small'(.|\n)*99"),
    "a schedule": (edited(damaged), r"'small'(.|\n)*Unheard"),
    "no state of one": (edited(no_state), r"'small'(.|\n)*NoneType"),
    "no averages": (lambda: {"averages": None}, "averages"),
    "a list": (lambda: [1, 2], "EMABank.state_dict.*list"),
    "nothing": (lambda: None, r"EMABank.state_dict\(\).*NoneType"),
    "of one average": (
        lambda: trained()["small"].state_dict(),
        r"bank\[name\].load_state_dict\(\)",
    ),
    "of a module": (lambda: Net().state_dict(), r"EMABank.state_dict\(\)"),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("case", MISFITS)
def test_a_state_that_does_not_fit_loads_nothing_of_any_average(case: str, full: bool) -> None:
    state, text = MISFITS[case]
    bank = trained()
    before, plan = bank.state_dict(clone=True), bank.schedule
    with pytest.raises(ValueError, match=text):
        bank.load_state_dict(state(), full_state_dict=full)
    assert same(bank.state_dict(), before)
    assert bank.schedule == plan
    # A control: the same state, not edited, changes every average.
    bank.load_state_dict(trained(steps=2).state_dict(), full_state_dict=full)
    for name, ema in before["averages"].items():
        assert not same(bank.state_dict()["averages"][name], ema)


def test_a_bank_can_load_without_strict() -> None:
    """What the state has of each average, where each is named."""
    state = edited(without_a_weight)()
    bank = trained()
    kept = bank["small"].state_dict(clone=True)["weights"]["first.bias"]
    with pytest.warns(UserWarning, match=r"(?s)small.*first\.bias"):
        bank.load_state_dict(state, strict=False)
    assert torch.equal(bank["small"].ema_model.first.bias, kept)
    assert torch.equal(
        bank["small"].ema_model.frozen, state["averages"]["small"]["weights"]["frozen"]
    )
    del state["averages"]["warm-up"]  # still an error: nothing says what that one would be
    before = bank.state_dict(clone=True)
    with pytest.raises(ValueError, match="'warm-up'"):
        bank.load_state_dict(state, strict=False)
    assert same(bank.state_dict(), before)


def test_a_warning_of_a_load_says_of_which_average() -> None:
    model = Net()
    bank = EMABank(model, schedules(2))
    other = EMABank(model, {**schedules(2), "warm-up": HalfLife(3)})
    with pytest.warns(UserWarning, match=r"(?s)warm-up.*HalfLife") as caught:
        other.load_state_dict(bank.state_dict())
    assert [warning.filename for warning in caught] == [__file__]
    assert other.schedule == schedules(2)


def test_all_is_loaded_before_anything_is_warned_of() -> None:
    """Or a warning that is an error would leave the second average as it was."""
    model = Net()
    bank, other = (
        EMABank(model, schedules(2)),
        EMABank(model, dict.fromkeys(NAMES[:2], HalfLife(3))),
    )
    change(model, 0)
    bank.update()
    with pytest.raises(UserWarning, match=r"(?s)Average 'copy first'.*HalfLife"):
        other.load_state_dict(bank.state_dict())  # warnings are errors
    assert same(other.state_dict(), bank.state_dict())


def test_a_sigint_waits_until_every_average_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, state = trained(), trained(steps=1).state_dict()
    restore, done = state_dict.restore, []

    def interrupted(*args: Any) -> list[str]:
        signal.raise_signal(signal.SIGINT)
        done.append(restore(*args))
        return done[-1]

    monkeypatch.setattr(state_dict, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bank.load_state_dict(state)
    assert len(done) == 3
    assert same(bank.state_dict(), state)


def test_nothing_is_loaded_inside_a_swap() -> None:
    bank = trained()
    state = trained(steps=1).state_dict()
    with bank["small"].swapped():
        before = bank.state_dict(clone=True)
        with pytest.raises(RuntimeError, match=r"load_state_dict\(\) while .* swapped"):
            bank.load_state_dict(state)
        assert same(bank.state_dict(), before)
    assert same(bank.state_dict(), before)
    bank.load_state_dict(state)
    assert same(bank.state_dict(), state)


def pickled(bank: Any) -> Any:
    return pickle.loads(pickle.dumps(bank))


COPIES = [copy.deepcopy, pickled]


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("case", ["plain", "exact bfloat16", "stochastic float16", "all at once"])
def test_a_copy_is_a_bank_of_one_online_model_that_goes_on(
    case: str, duplicate: Callable[[Any], Any], backend: str, device: torch.device
) -> None:
    options = {**OPTIONS[case], "backend": backend}
    model = Net().to(device)
    bank, singles = EMABank(model, schedules(3), **options), singles_of(model, 3, **options)
    change(model, 0)
    bank.update()
    update(singles)
    twin = duplicate(bank)
    assert type(twin) is EMABank
    assert [*twin] == [*bank]
    assert twin.model is not model
    assert all(ema.model is twin.model for ema in twin.values())
    assert_equal(twin, singles)
    kept = bank.state_dict(clone=True)
    for step in (1, 2):
        for net in (model, twin.model):
            change(net, step)
        twin.update()
        update(singles)
        assert_equal(twin, singles)
        assert same(bank.state_dict(), kept)  # it shares nothing
    assert_different([*twin.values()])
    before = twin.state_dict(clone=True)
    with pytest.raises(RuntimeError, match=r"'small'.*EMABank"):
        twin["small"].update(0.1)
    assert same(twin.state_dict(), before)
    # And the original goes on as well, to where the copy is.
    change(model, 1)
    bank.update()
    assert bank.update_index == 2


def test_a_copy_made_together_with_the_model_averages_that_model() -> None:
    bank = trained()
    model, twin = copy.deepcopy((bank.model, bank))
    assert twin.model is model
    assert all(ema.model is model for ema in twin.values())
    before = twin.state_dict(clone=True)
    change(model, 5)
    twin.update()
    for name, ema in twin.items():
        assert not same(ema.state_dict(), before["averages"][name])


@pytest.mark.parametrize("duplicate", COPIES)
def test_nothing_is_copied_inside_a_swap(duplicate: Callable[[Any], Any]) -> None:
    bank = trained()
    with bank["small"].swapped(), pytest.raises(RuntimeError, match="swapped"):
        duplicate(bank)
    duplicate(bank)


def halves(count: int = 2) -> dict[str, Constant]:
    return dict.fromkeys(NAMES[:count], Constant(0.5))


class Board(nn.Module):
    """Tensors that all tell one number, large enough that writing them takes a while."""

    def __init__(self) -> None:
        super().__init__()
        for index, size in enumerate([3, 60_000, 60_000]):
            setattr(self, f"value{index}", nn.Parameter(torch.zeros(size)))


def told(state: Mapping[str, Any]) -> set[float]:
    return {value for weight in state["weights"].values() for value in weight.unique().tolist()}


@contextmanager
def repeated(work: Callable[[], object]) -> Iterator[None]:
    """In another thread, until this context ends."""
    over = threading.Event()

    def repeat() -> None:
        while not over.is_set():
            work()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(repeat)
        try:
            yield
        finally:
            over.set()
        working.result()


def on_board() -> EMABank:
    """Its averages are 0, and go half of the way to 1 with each update."""
    bank = EMABank(Board(), halves())
    for tensor in bank.model.parameters():
        tensor.data.fill_(1.0)
    return bank


def board_at(index: int) -> set[float]:
    """What every average tells after so many updates; from the 25th on that is rounded to 1."""
    return {1.0 - 2.0**-index if index < 25 else 1.0}


def assert_whole(averages: dict[str, Any], tells: Callable[[int], set[float]]) -> int:
    """All tell the same update index, and what belongs to it."""
    (index,) = {average["update_index"] for average in averages.values()}
    assert [told(average) for average in averages.values()] == [tells(index)] * len(averages)
    return index


def test_copies_of_states_are_whole_while_another_thread_updates_the_bank() -> None:
    bank = EMABank(Board(), halves())

    def update_to_the_next_number() -> None:
        for tensor in bank.model.parameters():
            tensor.data.fill_(float(bank.update_index + 2))
        bank.update()

    def number(index: int) -> set[float]:
        return {float(index)}

    seen = set()
    with repeated(update_to_the_next_number):
        for _ in range(40):
            for name in bank:
                assert_whole({name: bank[name].state_dict(clone=True)}, number)
            seen.add(assert_whole(bank.state_dict(clone=True)["averages"], number))
            assert_whole(copy.deepcopy(bank).state_dict()["averages"], number)
    assert len(seen) > 2


def test_a_state_loaded_while_another_thread_updates_is_loaded_whole() -> None:
    bank = on_board()
    start = bank.state_dict(clone=True)
    with repeated(bank.update):
        for _ in range(30):
            bank.load_state_dict(start)
            assert_whole(bank.state_dict(clone=True)["averages"], board_at)


def test_a_swap_of_one_average_and_an_update_in_two_threads_refuse_each_other() -> None:
    bank, refused = on_board(), []

    def try_to_update() -> None:
        try:
            bank.update()
        except RuntimeError as error:
            refused.append("swapped" in str(error))
        time.sleep(1e-4)

    with repeated(try_to_update):
        for turn in range(40):
            with bank[NAMES[turn % 2]].swapped() as model:
                index = bank.update_index
                time.sleep(1e-3)
                for tensor in model.parameters():
                    assert {*tensor.unique().tolist()} == board_at(index)
                assert bank.update_index == index
            time.sleep(1e-3)
    assert refused
    assert all(refused)
    assert all(tensor.eq(1.0).all() for tensor in bank.model.parameters())


def test_averages_measure_and_load_in_threads_without_waiting_for_each_other_forever() -> None:
    bank = trained(2)
    start = bank.state_dict(clone=True)
    jobs = [
        bank.update,
        bank[NAMES[0]].distance,
        lambda: bank[NAMES[1]].load_state_dict(start["averages"][NAMES[1]]),
        partial(bank.load_state_dict, start),
        partial(bank.state_dict, clone=True),
        bank.sync,
        partial(copy.deepcopy, bank),
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(10):
            for done in [pool.submit(job) for job in jobs]:
                done.result(timeout=60)
    bank.load_state_dict(start)
    assert same(bank.state_dict(), start)
    assert {*bank.schedule} == {*SCHEDULES} - {*NAMES[2:]}
