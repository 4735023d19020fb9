"""A state is plain: dictionaries, text, numbers and tensors, the same after a file."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ignite")


from ema_triton import ModelEMA, schedules
from ema_triton.schedules import CountWarmup, Delayed, HalfLife, InverseDecay, LinearWarmup
from tests.checkpoint.test_resume import CASES, Net, Training
from tests.states import same, saved

pytestmark = pytest.mark.usefixtures("one_thread")


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
