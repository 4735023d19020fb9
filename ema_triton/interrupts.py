"""SIGINT is deferred while values move; if it ends the body of a swap, it ends the swap first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], object]


class DeferSigint:
    """A context in which SIGINT is remembered, and handled on exit.

    Outside the main thread, and where SIGINT has no Python handler, no exception can be raised, and
    nothing is installed.

    Attributes:
        previous: The handler to install on exit; None if none was replaced.
    """

    def __init__(self) -> None:
        self.previous: Handler | None = None
        self._pending = False

    def __enter__(self) -> DeferSigint:
        """Defer SIGINT."""
        previous = signal.getsignal(signal.SIGINT)
        if callable(previous) and threading.current_thread() is threading.main_thread():
            self.previous = previous
            signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        """Install the previous handler, and raise a deferred SIGINT again."""
        # A handler that was installed inside stays.
        if self.previous is not None and signal.getsignal(signal.SIGINT) == self._remember:
            signal.signal(signal.SIGINT, self.previous)
        if self._pending:
            signal.raise_signal(signal.SIGINT)

    def _remember(self, *_: object) -> None:
        self._pending = True


class SwapContext(Generic[T]):
    """A context that `begin` and `end` enclose, uninterrupted, even if SIGINT ends its body.

    `__exit__` alone cannot promise that: an exception may be raised before its first line. So a
    handler of SIGINT is installed for the body. It calls the previous one, and if that raises,
    calls `end` before the exception goes on.

    Args:
        begin: Called on entry; returns the context's value.
        end: Called on exit, even if the handler called it before; it does nothing then.
    """

    def __init__(self, begin: Callable[[], T], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end
        self._process = 0
        self.previous: Handler | None = None

    def __enter__(self) -> T:
        """Begin."""
        with DeferSigint() as deferred:
            value = self._begin()
            if deferred.previous is not None:
                self._process = os.getpid()
                self.previous, deferred.previous = deferred.previous, self._interrupted
                _entered.append(self)
        return value

    def __exit__(self, *exception: object) -> None:
        """End, unless the handler did."""
        with DeferSigint() as deferred:
            try:
                self._end()
            finally:
                if self in _entered:
                    _entered.remove(self)
                # Contexts may end in any order: this handler may be another context's previous one.
                contexts: list[DeferSigint | SwapContext[Any]] = [deferred, *_entered]
                for context in contexts:
                    if context.previous == self._interrupted:
                        context.previous = self.previous

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        assert self.previous is not None
        try:
            self.previous(number, frame)
        except BaseException:
            # The innermost first, as two swaps may be of one model. A process forked inside, such
            # as a DataLoader's worker, has this handler too, but not the swap.
            for context in reversed(_entered.copy()):
                if context._process == os.getpid():
                    context.__exit__()
            raise


# The contexts whose bodies the main thread is in, the innermost last.
_entered: list[SwapContext[Any]] = []
