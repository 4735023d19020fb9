"""Ctrl-C at any point of a swap: both models have their values again, and it is not lost."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA, interrupts, model_ema, reference, swap
from ema_triton.interrupts import Uninterrupted

FILES = {module.__file__ for module in (interrupts, model_ema, reference, swap)}


class Bomb:
    """Counts the opcodes that run in the library's files, and sends SIGINT at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> object:
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                signal.raise_signal(signal.SIGINT)
        return self


@contextmanager
def traced(bomb: Bomb) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(bomb)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.fixture(autouse=True)
def _pythons_own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    torch.set_grad_enabled(True)  # which the control may have left off, unshielded


def averaged() -> ModelEMA:
    """An exact EMA with a buffer: what is exchanged, and what waits in a copy."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).bfloat16()
    ema = ModelEMA(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.add_(1.25)
    ema.update(0.3)
    return ema


def everything(ema: ModelEMA) -> dict[str, Tensor]:
    state = ema.state_dict(clone=True)
    online = {name: value.clone() for name, value in ema.model.state_dict().items()}
    return {
        f"{whose} {name}": value
        for whose, part in (
            ("online", online),
            ("ema", state["weights"]),
            ("", state["companions"]),
        )
        for name, value in part.items()
    }


def swap_with(ema: ModelEMA, bomb: Bomb) -> tuple[bool, bool]:
    """Whether the body ran, and whether Ctrl-C came out of the swap."""
    ran = interrupted = False
    try:
        with traced(bomb), ema.swapped():
            ran = True
    except KeyboardInterrupt:
        interrupted = True
    return ran, interrupted


def test_ctrl_c_at_every_opcode_leaves_both_models_as_they_were() -> None:
    ema = averaged()
    before = everything(ema)
    counting = Bomb(at=-1)
    assert swap_with(ema, counting) == (True, False)
    assert counting.count > 1000
    ran = set()
    for at in range(1, counting.count + 1):
        ran_now, interrupted = swap_with(ema, Bomb(at))
        ran.add(ran_now)
        assert interrupted, at
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, at
        assert not ema.model._state_dict_pre_hooks, at
        after = everything(ema)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before), at
    assert ran == {False, True}  # on the way in, and on the way out
    ema.update(0.5)


def test_without_the_shield_it_would_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Uninterrupted, "_receive", lambda self: None)
    counting = Bomb(at=-1)
    swap_with(averaged(), counting)
    broken = 0
    for at in range(1, counting.count + 1, 7):
        ema = averaged()
        before = everything(ema)
        swap_with(ema, Bomb(at))
        with pytest.MonkeyPatch.context() as context:
            context.setattr(ema, "_swap", None)
            ema.model._state_dict_pre_hooks.clear()
            after = everything(ema)
        broken += any(not torch.equal(after[name], before[name]) for name in before)
    assert broken > 10


def test_inside_it_acts_at_once() -> None:
    ema, reached = averaged(), []

    def interrupted() -> None:
        with ema.swapped():
            signal.raise_signal(signal.SIGINT)
            reached.append("the next line")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == []


def test_a_handler_that_does_not_raise_is_called_and_the_swap_goes_on() -> None:
    ema, calls = averaged(), []
    signal.signal(signal.SIGINT, mine := lambda number, frame: calls.append(number))
    before, counting = everything(ema), Bomb(at=-1)
    swap_with(ema, counting)
    for at in range(1, counting.count + 1, 97):
        calls.clear()
        with traced(Bomb(at)), ema.swapped() as model:
            seen = torch.equal(model[0].weight, before["ema 0.weight"])
        assert seen, at
        assert calls == [signal.SIGINT], at
        assert signal.getsignal(signal.SIGINT) is mine
        assert all(torch.equal(value, before[name]) for name, value in everything(ema).items())


def test_a_handler_set_inside_stays() -> None:
    ema = averaged()
    with ema.swapped():
        signal.signal(signal.SIGINT, mine := lambda number, frame: None)
    assert signal.getsignal(signal.SIGINT) is mine


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_is_no_handler_of_pythons_stays(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, handler)
    with averaged().swapped():
        assert signal.getsignal(signal.SIGINT) is handler
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_thread_leaves_the_signal_alone() -> None:
    ema, found = averaged(), []

    def elsewhere() -> None:
        with ema.swapped():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_an_end_that_fails_gives_the_signal_back() -> None:
    def fail() -> None:
        raise ValueError("no end")

    with pytest.raises(ValueError, match="no end"), Uninterrupted(lambda: 7, fail) as value:
        assert value == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ValueError, match="no end"), Uninterrupted(fail, lambda: None):
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
