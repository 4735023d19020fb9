"""Updates, copies of the state, swaps and loads in several threads: each is whole."""

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from ema_triton import ModelEMA
from tests.states import PRECISIONS

pytestmark = pytest.mark.usefixtures("one_thread")


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
        residual, value = state["residuals"].get(name), weight.float()
        if residual is not None and residual.dtype == torch.int16:
            value = (value.view(torch.int32) + residual).view(torch.float32)
        elif residual is not None:
            value = torch.where(residual.half() == weight, residual, float("nan"))
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
