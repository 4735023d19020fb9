"""Several averages in one bank: bit by bit what as many single EMAs are, in fewer launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ema_triton import Constant, EMABank, ModelEMA, PowerFunction
from ema_triton.planner import Planner
from ema_triton.staleness import Staleness
from tests.banks import (
    CHANGES,
    NAMES,
    OPTIONS,
    Net,
    assert_different,
    assert_equal,
    change,
    schedules,
    singles_of,
    train_buffers,
    update,
)

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = (1, 2, 3, 5)


def banks_and_singles(
    model: nn.Module, counts: tuple[int, ...], **options: Any
) -> tuple[list[EMABank], dict[str, ModelEMA]]:
    banks = [EMABank(model, schedules(count), **options) for count in counts]
    return banks, singles_of(model, max(counts), **options)


def assert_updates_equal(model: nn.Module, counts: tuple[int, ...], **options: Any) -> None:
    """Over several updates; banks of one model do not get into each other's way either."""
    banks, singles = banks_and_singles(model, counts, **options)
    start = {
        name: value.clone() for name, value in singles[NAMES[0]].state_dict()["weights"].items()
    }
    for step in range(3):
        change(model, step, nonfinite=options.get("nonfinite") == "skip")
        for bank in banks:
            bank.update()
        update(singles)
        for ema in [*singles.values(), *[ema for bank in banks for ema in bank.values()]]:
            train_buffers(ema, step)
        for bank in banks:
            assert_equal(bank, singles)
            assert bank.update_index == step + 1
    assert_different([*singles.values()])
    for ema in singles.values():
        weights = ema.state_dict()["weights"]
        assert any(not torch.equal(weights[name], start[name]) for name in start)


@pytest.mark.parametrize("case", OPTIONS)
def test_each_average_is_bit_by_bit_what_a_single_ema_is(
    case: str, backend: str, device: torch.device
) -> None:
    assert_updates_equal(Net().to(device), COUNTS, backend=backend, **OPTIONS[case])


@pytest.mark.parametrize("case", CHANGES)
def test_tensors_of_every_kind_are_averaged_as_by_single_emas(
    case: str, kernel_device: torch.device
) -> None:
    model = Net().to(kernel_device)
    CHANGES[case](model)
    assert_updates_equal(model, (3,), backend="triton" if case == "fp64" else "auto")
    options = {"momentum_scale": {"first*": 0.5}, "handle_buffers": "update", "nonfinite": "skip"}
    assert_updates_equal(model, (2,), **options)


@pytest.mark.parametrize("precision", ["exact", "stochastic"])
def test_tensors_the_kernel_does_not_take_go_beside_those_it_takes(
    precision: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With backend="auto" some of a plan's launches are the foreach backend's."""
    monkeypatch.setattr("ema_triton.ops.triton_backend.unsupported_device", lambda device: None)
    model = Net().to(kernel_device)
    CHANGES["gaps"](model)
    options = {"ema_dtype": torch.bfloat16, "precision": precision}
    reason = EMABank(model, schedules(2), **options)[NAMES[0]].backend_reason
    assert "not dense" in reason
    assert_updates_equal(model, (1, 3), backend="auto", **options)


class Launches:
    """What was launched, as (EMAs in one launch, how often)."""

    def __init__(self) -> None:
        self.made: Counter[int] = Counter()

    def during(self, action: Callable[[], object]) -> dict[int, int]:
        self.made.clear()
        action()
        return dict(self.made)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    triton_backend = pytest.importorskip("ema_triton.ops.triton_backend")
    launches = Launches()
    one, several = triton_backend._launch, triton_backend._launch_several

    def launch(launch: Any, effective: Any, chunks: int) -> None:
        launches.made[1] += chunks > 0
        one(launch, effective, chunks)

    def launch_several(together: Any, chunks: int) -> None:
        launches.made[len(together)] += chunks > 0
        several(together, chunks)

    monkeypatch.setattr(triton_backend, "_launch", launch)
    monkeypatch.setattr(triton_backend, "_launch_several", launch_several)
    return launches


def only(made: dict[int, int]) -> dict[int, int]:
    return {size: times for size, times in made.items() if times}


def bank_of(
    momenta: list[float], device: torch.device, **options: Any
) -> tuple[Net, EMABank, dict[str, ModelEMA]]:
    """A bank of constant momenta, beside single EMAs."""
    model = Net().to(device)
    constant = {str(number): Constant(momentum) for number, momentum in enumerate(momenta)}
    bank = EMABank(model, constant, backend="triton", **options)
    singles = {name: ModelEMA(model, backend="triton", **options) for name in constant}
    for name, ema in singles.items():
        ema.schedule = constant[name]
    return model, bank, singles


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, {1: 1}), (2, {2: 1}), (3, {3: 1}), (4, {3: 1, 1: 1}), (5, {3: 1, 2: 1}), (6, {3: 2})],
)
def test_an_update_takes_one_launch_for_up_to_three(
    count: int, expected: dict[int, int], kernel_device: torch.device, launches: Launches
) -> None:
    model, bank, singles = bank_of([0.1 + 0.1 * k for k in range(count)], kernel_device)
    for step in range(2):
        change(model, step)
        assert only(launches.during(bank.update)) == expected
        # A control: single EMAs make as many as there are.
        assert only(launches.during(lambda: update(singles))) == {1: count}
        assert_equal(bank, singles)


GROUPS = {
    "momentum_scale": ({"momentum_scale": {"first*": 0.5}}, 2),
    "two shares and the rest": ({"momentum_scale": {"first*": 0.5, "conv*": 0.25}}, 3),
    "averaged buffers": ({"handle_buffers": "update"}, 1),
    "exact": ({"ema_dtype": torch.bfloat16}, 1),
    "guarded": ({"nonfinite": "skip"}, 1),
}


@pytest.mark.parametrize("case", GROUPS)
def test_each_launch_group_takes_one_launch(
    case: str, kernel_device: torch.device, launches: Launches
) -> None:
    options, groups = GROUPS[case]
    model, bank, singles = bank_of([0.1, 0.2, 0.3], kernel_device, **options)
    change(model, 0)
    assert only(launches.during(bank.update)) == {3: groups}
    assert only(launches.during(lambda: update(singles))) == {1: 3 * groups}
    assert_equal(bank, singles)


@pytest.mark.parametrize(
    ("momenta", "expected"),
    [
        ([1.0], {1: 1}),
        ([0.1, 1.0], {1: 2}),
        ([0.1, 1.0, 0.3], {2: 1, 1: 1}),
        ([1.0, 1.0, 0.3], {1: 3}),
        ([1.0, 0.1, 0.2, 0.3], {3: 1, 1: 1}),
        ([0.0, 0.1, 1.0 - 2**-53], {3: 1}),
    ],
)
@pytest.mark.parametrize("precision", ["exact", "stochastic"])
def test_an_average_that_copies_takes_a_launch_of_its_own(
    momenta: list[float],
    expected: dict[int, int],
    precision: str,
    kernel_device: torch.device,
    launches: Launches,
) -> None:
    options = {"ema_dtype": torch.bfloat16, "precision": precision, "seed": 3}
    model, bank, singles = bank_of(momenta, kernel_device, **options)
    for step in range(2):
        change(model, step)
        assert only(launches.during(bank.update)) == expected
        update(singles)
        assert_equal(bank, singles)


def test_it_takes_one_only_in_the_updates_that_copy(
    kernel_device: torch.device, launches: Launches
) -> None:
    model = Net().to(kernel_device)
    names = {"0.05": PowerFunction(sigma_rel=0.05), "0.10": PowerFunction(sigma_rel=0.10)}
    bank = EMABank(model, names, backend="triton")
    assert only(launches.during(bank.update)) == {1: 2}  # the first copies both
    assert only(launches.during(bank.update)) == {2: 1}


def test_a_share_that_makes_one_momentum_a_copy_takes_that_group_apart(
    kernel_device: torch.device, launches: Launches
) -> None:
    model, bank, singles = bank_of([0.1, 0.6], kernel_device, momentum_scale={"first*": 2.0})
    change(model, 0)
    assert only(launches.during(bank.update)) == {2: 1, 1: 2}  # 2 * 0.6 copies
    update(singles)
    assert_equal(bank, singles)


def test_momenta_given_by_name_count_instead_of_the_schedules(
    backend: str, device: torch.device
) -> None:
    model = Net().to(device)
    bank = EMABank(model, schedules(3), backend=backend)
    singles = singles_of(model, 3, backend=backend)
    tensor = torch.tensor(0.25, device=device)
    given = dict(zip(reversed(NAMES[:3]), [0.3, tensor, 1.0], strict=True))
    for step in range(2):
        change(model, step)
        bank.update(given)
        for name, ema in singles.items():
            ema.update(given[name])
        assert_equal(bank, singles)
    tensor.fill_(2.0)  # no longer a momentum, but nothing waits for the device
    assert bank.update_index == 2


def replaced(model: Net) -> None:
    model.first.bias = nn.Parameter(model.first.bias.detach() + 1)


def moved(model: Net) -> None:
    model.conv.weight.data = model.conv.weight.data.clone()


def one_cast(model: Net) -> None:
    model.conv.bias.data = model.conv.bias.data.to(torch.bfloat16)


def all_cast(model: Net) -> None:
    model.to(torch.bfloat16)


def channels_last(model: Net) -> None:
    model.to(memory_format=torch.channels_last)


def buffer_replaced(model: Net) -> None:
    model.norm.running_mean = torch.ones(7, device=model.frozen.device)


MOVES = {replaced: 1, moved: 1, one_cast: 2, all_cast: 1, channels_last: 1, buffer_replaced: 1}


@pytest.mark.parametrize("precision", ["float32", "exact bfloat16"])
@pytest.mark.parametrize("move", MOVES)
def test_what_moves_is_followed_by_all_averages(
    move: Callable[[Net], None], precision: str, kernel_device: torch.device, launches: Launches
) -> None:
    options = {"ema_dtype": torch.bfloat16} if precision != "float32" else {}
    model, bank, singles = bank_of([0.1, 0.2, 0.6], kernel_device, **options)
    change(model, 0)
    bank.update()
    update(singles)
    move(model)
    for step in (1, 2):
        change(model, step)
        assert only(launches.during(bank.update)) == {3: MOVES[move]}
        assert only(launches.during(lambda: update(singles))) == {1: 3 * MOVES[move]}
        assert_equal(bank, singles)


@pytest.mark.parametrize("move", MOVES)
def test_the_foreach_backend_follows_it_too(move: Callable[[Net], None]) -> None:
    model = Net()
    banks, singles = banks_and_singles(model, (2,), backend="foreach", handle_buffers="update")
    for step in range(3):
        change(model, step)
        banks[0].update()
        update(singles)
        assert_equal(banks[0], singles)
        if step == 0:
            move(model)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Planner]:
    """The planners that have made a plan, in order."""
    made: list[Planner] = []
    make = Planner.make

    def counting(self: Planner, *args: Any, **kwargs: Any) -> Any:
        made.append(self)
        return make(self, *args, **kwargs)

    monkeypatch.setattr(Planner, "make", counting)
    return made


def swap(ema: ModelEMA) -> None:
    with ema.swapped() as model:
        model.first.weight.sum()


def reload(ema: ModelEMA) -> None:
    ema.load_state_dict(ema.state_dict(clone=True))


def measure(ema: ModelEMA) -> None:
    assert ema.distance().distance > 0


def show(ema: ModelEMA) -> None:
    assert ema.backend in ("triton", "foreach")
    assert ema.backend_reason
    ema.state_dict()


def copy_out(ema: ModelEMA) -> None:
    ema.copy_to(Net())


USES = [swap, reload, measure, show, copy_out]


@pytest.mark.parametrize("precision", ["plain", "exact bfloat16", "stochastic float16"])
@pytest.mark.parametrize("use", USES)
def test_using_one_average_between_updates_takes_no_new_plan_and_harms_none(
    use: Callable[[ModelEMA], None], precision: str, plans: list[Planner]
) -> None:
    model = Net()
    (bank,), singles = banks_and_singles(model, (3,), **OPTIONS[precision])
    for step in range(3):
        change(model, step)
        plans.clear()
        bank.update()
        assert plans == []
        update(singles)
        assert_equal(bank, singles)
        for name in NAMES[1:3]:
            use(bank[name])
            use(singles[name])
        assert_equal(bank, singles)
    # A control: what moves makes one plan for all; and then there is none again.
    moved(model)
    plans.clear()
    bank.update()
    assert len(plans) == 1
    use(bank["small"])
    plans.clear()
    bank.update()
    assert plans == []


def test_two_averages_are_swapped_one_after_the_other() -> None:
    model = Net()
    bank = EMABank(model, schedules(2))
    change(model, 0)
    bank.update()
    online = model.first.weight.detach().clone()
    for ema in bank.values():
        expected = ema.state_dict()["weights"]["first.weight"].clone()
        with ema.swapped():
            assert torch.equal(model.first.weight, expected)
    assert torch.equal(model.first.weight, online)


def test_an_update_looks_once_whether_a_tensor_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    is_stale = Staleness.is_stale
    monkeypatch.setattr(Staleness, "is_stale", lambda self: looks.append(self) or is_stale(self))
    (bank,), singles = banks_and_singles(Net(), (3,))
    bank.update()
    update(singles)
    looks.clear()
    bank.update()
    assert len(looks) == 1
    update(singles)
    assert len(looks) == 1 + 3


def half(ema: ModelEMA) -> None:
    ema.ema_model.half()


def double_first(ema: ModelEMA) -> None:
    ema.ema_model.first.double()


def other_weight(ema: ModelEMA) -> None:
    ema.ema_model.first.weight.data = torch.full_like(ema.ema_model.first.weight, 2.0)


def other_parameter(ema: ModelEMA) -> None:
    weight = torch.full_like(ema.ema_model.conv.weight, 2.0)
    ema.ema_model.conv.weight = nn.Parameter(weight, requires_grad=False)


def assigned(ema: ModelEMA) -> None:
    state = {name: value + 1 for name, value in ema.ema_model.state_dict().items()}
    ema.ema_model.load_state_dict(state, assign=True)


def to_channels_last(ema: ModelEMA) -> None:
    ema.ema_model.to(memory_format=torch.channels_last)


def other_buffer(ema: ModelEMA) -> None:
    ema.ema_model.norm.running_var = torch.full_like(ema.ema_model.norm.running_var, 3.0)


REPLACEMENTS = [
    half,
    double_first,
    other_weight,
    other_parameter,
    assigned,
    to_channels_last,
    other_buffer,
]


@pytest.mark.parametrize("options", ["plain", "averaged buffers", "groups", "exact bfloat16"])
@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_one_average_whose_tensors_are_replaced_keeps_the_others_right(
    replace: Callable[[ModelEMA], None], options: str, backend: str, device: torch.device
) -> None:
    model = Net().to(device)
    backend = (
        "auto" if replace is double_first else backend
    )  # fp64 beside fp32 is the foreach one's
    (bank,), singles = banks_and_singles(model, (3,), backend=backend, **OPTIONS[options])
    for step in range(4):
        change(model, step)
        bank.update()
        update(singles)
        assert_equal(bank, singles)
        if step == 1:
            replace(bank["warm-up"])
            replace(singles["warm-up"])


@pytest.mark.parametrize(
    ("replace", "expected"),
    [(half, {1: 1, 2: 1}), (other_weight, {3: 1}), (to_channels_last, {3: 1})],
)
def test_one_that_lies_alike_no_more_is_launched_alone(
    replace: Callable[[ModelEMA], None],
    expected: dict[int, int],
    kernel_device: torch.device,
    launches: Launches,
) -> None:
    model, bank, singles = bank_of([0.1, 0.2, 0.3], kernel_device)
    bank.update()
    update(singles)
    replace(bank["1"])
    replace(singles["1"])
    for step in range(2):
        change(model, step)
        assert only(launches.during(bank.update)) == expected
        update(singles)
        assert_equal(bank, singles)


def test_an_average_written_in_place_goes_on_from_there(backend: str, device: torch.device) -> None:
    model = Net().to(device)
    (bank,), singles = banks_and_singles(model, (2,), backend=backend, **OPTIONS["exact bfloat16"])
    for step in range(3):
        change(model, step)
        bank.update()
        update(singles)
        for emas in (bank, singles):
            emas["warm-up"].ema_model.first.weight.data.fill_(2.0)
        assert_equal(bank, singles)


def test_sync_copies_the_online_model_into_every_average() -> None:
    model = Net()
    (bank,), singles = banks_and_singles(model, (3,), **OPTIONS["exact bfloat16"])
    for step in range(2):
        change(model, step)
        bank.update()
        update(singles)
    bank.sync()
    for ema in bank.values():
        assert torch.equal(ema.ema_model.first.weight, model.first.weight.bfloat16())
    for ema in singles.values():
        ema.sync()
    assert_equal(bank, singles)
