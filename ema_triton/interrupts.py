"""SIGINT is deferred while values move; one that ends the body of a swap ends the swap, too."""

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
    """A context in which SIGINT is remembered, and handled on leaving.

    Outside the main thread, and where SIGINT has no handler in Python, it raises no exception, and
    nothing is installed.

    Attributes:
        previous: The handler that is installed on leaving; None where none was replaced.
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
        """Install the previous handler, and have it handle a deferred SIGINT."""
        # A handler that was installed inside stays.
        if self.previous is not None and signal.getsignal(signal.SIGINT) == self._remember:
            signal.signal(signal.SIGINT, self.previous)
        if self._pending:
            signal.raise_signal(signal.SIGINT)

    def _remember(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._pending = True


class SwapContext(Generic[T]):
    """A context whose beginning and end are whole, and which SIGINT cannot leave without its end.

    No code in `__exit__` can do that alone: an exception may be raised before its first line. So a
    handler of SIGINT is installed for the body. It calls the previous one, and if that raises,
    calls `end` before the exception goes on.

    Args:
        begin: Called on entry; what it returns is the context's value.
        end: Called on exit; it does nothing where it was called before.
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
        """End, unless SIGINT did."""
        with DeferSigint() as deferred:
            try:
                self._end()
            finally:
                if self in _entered:
                    _entered.remove(self)
                # Contexts may be left in any order: this handler may be another one's previous.
                holders: list[DeferSigint | SwapContext[Any]] = [deferred, *_entered]
                for holder in holders:
                    if holder.previous == self._interrupted:
                        holder.previous = self.previous

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        assert self.previous is not None
        try:
            self.previous(number, frame)
        except BaseException:
            # The innermost first, as two swaps may be of one model. A process forked inside, as a
            # DataLoader's worker is, has this handler too, but not the swap.
            for context in _entered[::-1]:
                if context._process == os.getpid():
                    context.__exit__()
            raise


# In whose bodies the main thread is, the innermost last.
_entered: list[SwapContext[Any]] = []
