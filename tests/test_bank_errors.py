"""What a bank refuses, and in which words; and the optimizer that it follows."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ema_triton import Constant, EMABank, HalfLife, InverseDecay, ModelEMA
from tests.banks import NAMES, Net, assert_equal, change, schedules, singles_of, update
from tests.states import same

HALF = Constant(0.5)


def bank_of_two(model: nn.Module | None = None, **options: Any) -> EMABank:
    return EMABank(model or nn.Linear(2, 1), {"a": Constant(0.1), "b": HALF}, **options)


UNBUILT: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ({}, {}, ValueError, r"schedules must .* but got \{\}.*Give e\.g\. \{'short': HalfLife"),
    (HALF, {}, TypeError, r"schedules must map names .* but got Constant\(momentum=0\.5\)"),
    ([HALF], {}, TypeError, r"schedules must map names .* but got \[Constant"),
    (None, {}, TypeError, "schedules must map names .* but got None"),
    ({1: HALF}, {}, TypeError, "name of an average must be a string, but got 1"),
    ({"a": HALF, None: HALF}, {}, TypeError, "must be a string, but got None"),
    ({"a": 0.1}, {}, TypeError, r"schedule must be a function .* but got 0\.1"),
    ({"a": lambda index: 2.0}, {}, ValueError, "Invalid momentum: 2.0, from the schedule"),
    ({"a": HALF}, {"mometum_scale": {}}, TypeError, "'mometum_scale', which would do nothing"),
    (
        {"a": HALF},
        {"ema_model": nn.Linear(2, 1)},
        ValueError,
        "ema_model was given, .* Leave it out",
    ),
    ({"a": HALF}, {"backend": "cuda"}, ValueError, "backend can only be one of .* 'cuda'"),
    ({"a": HALF}, {"handle_buffers": "no"}, ValueError, "handle_buffers can only be one of"),
    ({"a": HALF}, {"precision": "no"}, ValueError, "precision can only be one of"),
    ({"a": HALF}, {"exclude": "nothing"}, ValueError, "exclude"),
    ({"a": HALF}, {"seed": -1}, ValueError, "seed"),
]


@pytest.mark.parametrize(("given", "options", "error", "text"), UNBUILT)
def test_what_is_given_is_checked(
    given: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        EMABank(nn.Linear(2, 1), given, **options)


def test_unknown_options_are_told_those_there_are() -> None:
    with pytest.raises(TypeError, match=r"It takes: model, schedules, .*momentum_scale"):
        EMABank(nn.Linear(2, 1), {"a": HALF}, momentums=1)


def test_the_model_is_checked() -> None:
    with pytest.raises(ValueError, match=r"model should be an instance of nn.Module .* NoneType"):
        EMABank(None, {"a": HALF})
    bank = bank_of_two()
    with pytest.raises(AttributeError, match="online model cannot be assigned"):
        bank.model = nn.Linear(2, 1)


def test_an_ema_model_of_none_is_none_given() -> None:
    assert [*bank_of_two(ema_model=None)] == ["a", "b"]


def test_a_name_that_is_none_of_the_banks_is_told_those_there_are() -> None:
    bank = bank_of_two()
    for name in ("c", 0, None):
        with pytest.raises(KeyError, match=f"no average {name!r} .*'?a'?, '?b'?"):
            bank[name]
    assert "c" not in bank
    assert bank.get("c") is None
    assert len(bank) == 2
    assert [*bank.items()] == [("a", bank["a"]), ("b", bank["b"])]
    assert all(type(ema) is ModelEMA for ema in bank.values())


def test_a_bank_has_no_ema_model_of_its_own() -> None:
    with pytest.raises(RuntimeError, match=r"a, b.*bank\['a'\]\.ema_model"):
        _ = bank_of_two().ema_model


MOMENTA: list[tuple[Any, type[Exception], str]] = [
    ({"a": 0.1}, ValueError, "'a', but this bank has 'a', 'b'"),
    ({}, ValueError, "momentum has nothing, but this bank has 'a', 'b'"),
    ({"a": 0.1, "b": 0.1, "c": 0.1}, ValueError, "'c', but this bank has 'a', 'b'"),
    ({"a": 0.1, "b": 1.5}, ValueError, r"Invalid momentum: 1\.5"),
    ({"a": 0.1, "b": float("nan")}, ValueError, "Invalid momentum: nan"),
    ({"a": 0.1, "b": "0.1"}, TypeError, "momentum"),
    ({"a": 0.1, "b": None}, TypeError, "momentum"),
    ({"a": 0.1, "b": torch.ones(2)}, ValueError, "momentum"),
    (0.1, TypeError, r"momentum must map the names .* 'a', 'b', .* but got 0\.1"),
    ([0.1, 0.1], TypeError, r"momentum must map .* but got \[0\.1, 0\.1\]"),
]


@pytest.mark.parametrize(("given", "error", "text"), MOMENTA)
def test_momenta_are_checked_before_anything_moves(
    given: Any, error: type[Exception], text: str
) -> None:
    bank = bank_of_two()
    before = bank.state_dict(clone=True)
    change(bank.model, 0)
    with pytest.raises(error, match=text):
        bank.update(given)
    assert same(bank.state_dict(), before)
    bank.update()  # a control
    assert not same(bank.state_dict(), before)


def test_a_schedule_that_turns_bad_stops_the_update_of_all() -> None:
    bank = EMABank(nn.Linear(2, 1), {"a": HALF, "b": lambda index: 0.5 * index})
    change(bank.model, 0)
    bank.update()
    bank.update()
    before = bank.state_dict(clone=True)
    change(bank.model, 1)
    with pytest.raises(ValueError, match=r"Invalid momentum: 1\.5, from the schedule at update 3"):
        bank.update()
    assert same(bank.state_dict(), before)


def test_a_member_alone_is_not_updated() -> None:
    bank = bank_of_two()
    change(bank.model, 0)
    before = bank.state_dict(clone=True)
    optimizer = torch.optim.SGD(bank.model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"update\(\) of .*'b'.*EMABank.*together"):
        bank["b"].update(0.1)
    with pytest.raises(RuntimeError, match=r"follow\(\) of .*'b'.*EMABank"):
        bank["b"].follow(optimizer, HALF)
    assert same(bank.state_dict(), before)
    assert not optimizer._optimizer_step_post_hooks
    ModelEMA(bank.model).update(0.1)  # a control


@pytest.mark.parametrize("which", ["one of the bank's", "a single EMA"])
def test_inside_a_swap_of_the_online_model_nothing_is_updated(which: str) -> None:
    bank = bank_of_two()
    other = bank["a"] if which == "one of the bank's" else ModelEMA(bank.model)
    change(bank.model, 0)
    online = bank.model.weight.detach().clone()
    with other.swapped():
        before = bank.state_dict(clone=True)
        with pytest.raises(RuntimeError, match=r"update\(\) while .* swapped"):
            bank.update()
        with pytest.raises(RuntimeError, match=r"sync\(\) while .* swapped"):
            bank.sync()
        with pytest.raises(RuntimeError, match="swapped"), bank["b"].swapped():
            pass
        assert same(bank.state_dict(), before)
        assert bank.update_index == 0
    assert same(bank.state_dict(), before)
    assert torch.equal(bank.model.weight, online)
    bank.update()
    assert bank.update_index == 1


def test_a_tensor_that_vanished_or_changed_its_shape_is_an_error_that_changes_nothing() -> None:
    model = Net()
    bank = EMABank(model, schedules(2))
    before = bank.state_dict(clone=True)
    bias, model.first.bias = model.first.bias, None
    with pytest.raises(ValueError, match=r"'first\.bias'"):
        bank.update()
    model.first.bias = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match=r"first\.bias.*8"):
        bank.update()
    assert same(bank.state_dict(), before)
    model.first.bias = bias
    singles = singles_of(model, 2)
    change(model, 0)
    bank.update()
    update(singles)
    assert_equal(bank, singles)


def test_the_schedules_may_be_assigned() -> None:
    bank = bank_of_two()
    bank.update()
    bank.schedule = {"b": Constant(0.2), "a": HalfLife(2)}
    assert bank.schedule == {"a": HalfLife(2), "b": Constant(0.2)}
    assert bank.next_momentum() == {"a": HalfLife(2)(2), "b": 0.2}
    before = bank.schedule
    for given, error, text in [
        ({"a": HALF}, ValueError, "'a', but this bank has 'a', 'b'"),
        ({"a": HALF, "c": HALF}, ValueError, "'c', but this bank has 'a', 'b'"),
        (HALF, TypeError, "schedules must map names"),
        ({"a": HALF, "b": 0.1}, TypeError, "must be a function"),
    ]:
        with pytest.raises(error, match=text):
            bank.schedule = given
        assert bank.schedule == before


def test_the_update_index_may_be_assigned_to_all() -> None:
    bank = EMABank(nn.Linear(2, 1), {"a": InverseDecay(), "b": InverseDecay(power=0.5)})
    assert bank.next_momentum() == {"a": 1.0, "b": 1.0}
    bank.update_index = 3
    assert [ema.update_index for ema in bank.values()] == [3, 3]
    assert bank.update_index == 3
    assert bank.next_momentum() == {"a": InverseDecay()(4), "b": 0.5}


def test_a_momentum_that_rounds_away_is_warned_of_once_for_each_average() -> None:
    model = nn.Linear(2, 1, dtype=torch.bfloat16)
    momenta = {"a": Constant(1e-4), "b": HALF, "c": Constant(2e-4)}
    bank = EMABank(model, momenta, precision="nearest")
    with pytest.warns(UserWarning, match=r"momentum .* is below the resolution") as caught:
        bank.update()
    assert [str(warning.message).split()[1] for warning in caught] == ["0.0001", "0.0002"]
    assert {warning.filename for warning in caught} == {__file__}
    bank.update()


def test_a_momentum_that_another_average_rounds_away_is_not_warned_of() -> None:
    model = nn.Linear(2, 1)
    bank = EMABank(model, {"small": Constant(1e-4), "half": HALF}, precision="nearest")
    bank["half"].ema_model.half()
    bank.update()  # warnings are errors
    bank["small"].ema_model.half()  # a control
    with pytest.warns(UserWarning, match="momentum 0.0001 is below the resolution"):
        bank.update()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_copy_of_one_average_alone_is_a_single_ema(
    duplicate: Callable[[ModelEMA], ModelEMA],
) -> None:
    bank = bank_of_two()
    bank.update()
    single = duplicate(bank["b"])
    single.update(0.5)
    assert (single.update_index, bank.update_index) == (2, 1)
    with pytest.raises(RuntimeError, match="EMABank"):
        bank["b"].update(0.5)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(6, 5)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("every", [1, 3])
def test_a_bank_follows_every_nth_step_of_an_optimizer(every: int) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bank, singles = EMABank(model, schedules(3)), singles_of(model, 3)
    handle = bank.follow(optimizer, every=every)
    for number in range(1, 8):
        stepped(model, optimizer)
        if number % every == 0:
            update(singles)
        assert bank.update_index == number // every
        assert_equal(bank, singles)
    with pytest.raises(RuntimeError, match="follows an optimizer already"):
        bank.follow(optimizer)
    handle.remove()
    stepped(model, optimizer)
    assert bank.update_index == 7 // every
    bank.follow(optimizer)
    stepped(model, optimizer)
    assert bank.update_index == 7 // every + 1


@pytest.mark.parametrize(
    ("optimizer", "every", "error", "text"),
    [
        (object(), 1, TypeError, "cannot be followed"),
        (torch.optim.SGD([torch.ones(1)], lr=0.1), 1, ValueError, "none of"),
        (None, 0, ValueError, "Invalid every: 0"),
        (None, 0.5, TypeError, "Invalid every: 0.5"),
    ],
)
def test_what_a_bank_follows_is_checked(
    optimizer: object, every: Any, error: type[Exception], text: str
) -> None:
    bank = bank_of_two()
    optimizer = optimizer or torch.optim.SGD(bank.model.parameters(), lr=0.1)
    with pytest.raises(error, match=text):
        bank.follow(optimizer, every=every)


def test_a_step_inside_of_a_swap_is_loud() -> None:
    model = nn.Linear(5, 1)
    optimizer, bank = torch.optim.SGD(model.parameters(), lr=0.0), bank_of_two(model)
    bank.follow(optimizer)
    with (
        pytest.warns(UserWarning, match="was written"),
        bank["a"].swapped(),
        pytest.raises(RuntimeError, match=r"update\(\) while .*swapped"),
    ):
        stepped(model, optimizer)
    assert bank.update_index == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_copied_bank_follows_nothing(duplicate: Callable[[EMABank], EMABank]) -> None:
    model = nn.Linear(5, 1)
    optimizer, bank = torch.optim.SGD(model.parameters(), lr=0.1), bank_of_two(model)
    bank.follow(optimizer)
    twin = duplicate(bank)
    stepped(model, optimizer)
    assert (bank.update_index, twin.update_index) == (1, 0)
    other = torch.optim.SGD(twin.model.parameters(), lr=0.1)
    twin.follow(other)
    stepped(twin.model, other)
    assert (bank.update_index, twin.update_index) == (1, 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_step_may_update_a_bank() -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    bank, singles = EMABank(model, schedules(2)), singles_of(model, 2)

    @torch.compile(backend="eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        result = model(x) + 1
        bank.update()
        return result

    for number in range(2):
        change(model, number)
        step(torch.randn(6, 5))
        update(singles)
        assert_equal(bank, singles)
    gc.collect()
    assert [*bank] == NAMES[:2]
