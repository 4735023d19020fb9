"""SIGINT at any point of a swap, a load or a sync: each is whole, and the signal is not lost."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ema_triton import Constant, ModelEMA, interrupts, model_ema, swap
from ema_triton.checkpoint import state_dict
from ema_triton.interrupts import DeferSigint, SwapContext
from ema_triton.ops import foreach_backend, precision

FILES = {
    module.__file__
    for module in (interrupts, state_dict, model_ema, precision, foreach_backend, swap)
}


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
            ("", state["residuals"]),
        )
        for name, value in part.items()
    }


def swap_with(ema: ModelEMA, bomb: Bomb) -> tuple[bool, bool]:
    """Whether the body ran, and whether KeyboardInterrupt came out of the swap."""
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


@pytest.fixture
def undeferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeferSigint, "__enter__", lambda self: self)


@pytest.mark.usefixtures("undeferred")
def test_without_deferral_a_swap_would_break() -> None:
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


WRITES: dict[str, Callable[[ModelEMA, dict], None]] = {
    "sync": lambda ema, state: ema.sync(),
    "load_state_dict": lambda ema, state: ema.load_state_dict(state),
    "full_state_dict": lambda ema, state: ema.load_state_dict(state, full_state_dict=True),
    "load_weights": lambda ema, state: ema.load_weights(state["weights"]),
}


def same(left: dict, right: dict) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right


def old_or_new(what: str, step: int) -> list[str]:
    """What the EMA is after SIGINT at each `step`-th opcode."""
    ema, donor, counting, found = in_parts(), in_parts(), Bomb(-1), []
    ema.schedule, donor.schedule = Constant(0.5), Constant(0.25)
    donor.update(0.5)
    old, other = ema.state_dict(clone=True), donor.state_dict()
    online = {name: value.clone() for name, value in ema.model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another schedule, and of the digits in no weights
        with traced(counting):
            WRITES[what](ema, other)
        new = ema.state_dict(clone=True)
        assert not any(torch.equal(new["weights"][name], old["weights"][name]) for name in PARTS)
        for at in range(1, counting.count + 1, step):
            ema.load_state_dict(old)
            assert same(ema.state_dict(), old), at
            with pytest.raises(KeyboardInterrupt), traced(Bomb(at)):
                WRITES[what](ema, other)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, at
            now = ema.state_dict()
            found.append("old" if same(now, old) else "new" if same(now, new) else "mixed")
            assert same(ema.model.state_dict(), online), at
    return found


PARTS = ["0.weight", "1.weight", "2.running_mean"]


def in_parts() -> ModelEMA:
    """With two buckets and a buffer, all of which differ from the online model's."""
    model = nn.Sequential(nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = ModelEMA(model)
    for _ in range(2):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[2].running_mean):
                tensor.add_(torch.rand(()) + 1)
        if ema.update_index == 0:
            ema.update(0.3)
    return ema


@pytest.mark.parametrize(
    ("what", "step"),
    [("sync", 1), ("load_state_dict", 1), ("full_state_dict", 7), ("load_weights", 7)],
)
def test_ctrl_c_at_every_opcode_of_a_write_leaves_the_old_or_the_new_ema(
    what: str, step: int
) -> None:
    found = old_or_new(what, step)
    assert len(found) * step > 250
    assert set(found) == {"old", "new"}
    assert found == sorted(found, reverse=True)  # the old one first


@pytest.mark.usefixtures("undeferred")
@pytest.mark.parametrize(("what", "step"), [("sync", 5), ("load_state_dict", 5)])
def test_without_deferral_a_write_would_be_mixed(what: str, step: int) -> None:
    assert old_or_new(what, step).count("mixed") > 10


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


def test_a_handler_set_inside_is_deferred_too_while_values_move() -> None:
    ema, counting = averaged(), Bomb(at=-1)
    before, outcomes = everything(ema), set()

    def stop(number: int, frame: FrameType | None) -> None:
        raise InterruptedError

    def leave(bomb: Bomb) -> None:
        context = ema.swapped()
        context.__enter__()
        signal.signal(signal.SIGINT, stop)
        with traced(bomb):
            context.__exit__()

    leave(counting)
    for at in range(1, counting.count + 1, 3):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(InterruptedError):
            leave(Bomb(at))
        assert signal.getsignal(signal.SIGINT) is stop
        outcomes.add(ema._swap is None)
        ema.swap_out()  # where it came before the end began
        assert same(everything(ema), before), at
    assert outcomes == {True, False}


def test_left_by_ctrl_c_it_is_left_though_the_body_goes_on() -> None:
    ema = averaged()
    before = everything(ema)
    with ema.swapped():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert same(everything(ema), before)
        ema.update(0.5)
        after = everything(ema)
    assert same(everything(ema), after)


def test_a_second_ctrl_c_in_the_handler_is_harmless() -> None:
    ema, count = averaged(), 0
    before = everything(ema)

    def impatient(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count < 3:
            signal.raise_signal(signal.SIGINT)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, impatient)
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        signal.raise_signal(signal.SIGINT)
    assert count == 3
    assert signal.getsignal(signal.SIGINT) is impatient
    assert same(everything(ema), before)


def in_order(outer: ModelEMA, inner: ModelEMA) -> None:
    with outer.swapped(), inner.swapped():
        pass


def in_another_order(outer: ModelEMA, inner: ModelEMA) -> None:
    first, second = outer.swapped(), inner.swapped()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)


def with_a_load(outer: ModelEMA, inner: ModelEMA) -> None:
    with outer.swapped():
        inner.load_state_dict(inner.state_dict(clone=True))


def with_a_sync(outer: ModelEMA, inner: ModelEMA) -> None:
    with outer.swapped():
        ModelEMA(nn.Linear(2, 2)).sync()


@pytest.mark.parametrize("use", [in_order, in_another_order, with_a_load, with_a_sync])
def test_two_emas_are_both_as_they_were(use: Callable[[ModelEMA, ModelEMA], None]) -> None:
    outer, inner, counting = averaged(), averaged(), Bomb(at=-1)
    inner.update(0.9)
    before = everything(outer), everything(inner)
    assert not same(*before)
    with traced(counting):
        use(outer, inner)
    for at in range(1, counting.count + 1, 37):
        with pytest.raises(KeyboardInterrupt), traced(Bomb(at)):
            use(outer, inner)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, at
        assert interrupts._entered == [], at
        assert same(everything(outer), before[0]), at
        assert same(everything(inner), before[1]), at


def test_two_swaps_are_left_the_innermost_first() -> None:
    outer, inner = ModelEMA(nn.Linear(2, 2)), ModelEMA(nn.Linear(2, 2))
    models = outer.model, outer.ema_model, inner.model, inner.ema_model
    for value, model in enumerate(models):
        for parameter in model.parameters():
            parameter.data.fill_(value)
    counting = Bomb(at=-1)
    with traced(counting):
        in_order(outer, inner)
    for at in range(1, counting.count + 1, 37):
        with pytest.raises(KeyboardInterrupt), traced(Bomb(at)):
            in_order(outer, inner)
        assert [model.bias.tolist() for model in models] == [[0, 0], [1, 1], [2, 2], [3, 3]], at


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_inside_swaps_nothing_back() -> None:
    """As the workers of a DataLoader, which a terminal's Ctrl-C reaches, too."""
    ema = averaged()
    ema.model.share_memory()
    ema.ema_model.share_memory()
    ema.update(0.0)  # a new plan
    before = everything(ema)
    with ema.swapped():
        if (child := os.fork()) == 0:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert torch.equal(ema.model[0].weight, before["ema 0.weight"])
    assert same(everything(ema), before)


def test_ctrl_c_where_torch_compile_has_fake_tensors() -> None:
    ema = averaged()
    before = everything(ema)
    with pytest.raises(KeyboardInterrupt), ema.swapped(), FakeTensorMode():
        signal.raise_signal(signal.SIGINT)
    assert same(everything(ema), before)


@pytest.mark.gpu
def test_ctrl_c_inside_of_another_stream_swaps_back_on_the_first_one() -> None:
    ema = averaged()
    ema.model.cuda()
    ema.ema_model.cuda()
    ema.update(0.0)
    before = everything(ema)
    used, other = [], torch.cuda.Stream()

    def interrupted() -> None:
        with ema.swapped():
            leave = ema._swap.leave
            ema._swap.leave = lambda: (used.append(torch.cuda.current_stream()), leave())
            with torch.cuda.stream(other):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert used == [torch.cuda.current_stream()] != [other]
    assert same(everything(ema), before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_is_no_handler_of_pythons_stays(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, handler)
    with averaged().swapped(), DeferSigint():
        assert signal.getsignal(signal.SIGINT) is handler
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_thread_leaves_the_signal_alone() -> None:
    ema, found = averaged(), []

    def elsewhere() -> None:
        with ema.swapped(), DeferSigint():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_an_end_that_fails_gives_the_signal_back() -> None:
    def fail() -> None:
        raise ValueError("no end")

    with pytest.raises(ValueError, match="no end"), SwapContext(lambda: 7, fail) as value:
        assert value == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ValueError, match="no end"), SwapContext(fail, lambda: None):
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
