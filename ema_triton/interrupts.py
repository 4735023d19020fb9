"""Ctrl-C that waits while values change places, and acts at once everywhere else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Generic, TypeVar

T = TypeVar("T")


class Uninterrupted(Generic[T]):
    """A context whose beginning and whose end are whole: Ctrl-C comes before them or after.

    An exception cannot be kept out of `__exit__` by anything in it: it may be raised before the
    first line. So for as long as the context lasts, SIGINT is received here, and waits where the
    code that it found running is this file's or called by it.

    Args:
        begin: Called on entry; what it returns is the context's value.
        end: Called on exit, whatever happened inside; and after `begin` if Ctrl-C came meanwhile.
    """

    def __init__(self, begin: Callable[[], T], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end
        self._previous: Callable[[int, FrameType | None], object] | None = None
        self._waiting = False

    def __enter__(self) -> T:
        """Begin."""
        try:
            self._receive()
            value = self._begin()
        except BaseException:
            self._resign()
            raise
        if self._waiting and self._previous is not None:
            self._waiting = False
            try:
                self._previous(signal.SIGINT, None)
            except BaseException:
                self.__exit__()
                raise
        return value

    def __exit__(self, *exception: object) -> None:
        """End, then let Ctrl-C act if it came meanwhile."""
        previous = self._previous
        try:
            self._end()
        finally:
            self._resign()
            if self._waiting and previous is not None:
                self._waiting = False
                previous(signal.SIGINT, None)

    def _receive(self) -> None:
        # Python raises KeyboardInterrupt in the main thread only, from a handler of Python's.
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):
                self._previous = previous
                signal.signal(signal.SIGINT, self._interrupted)

    def _resign(self) -> None:
        # Somebody else may have taken the signal over, and then gives it back to us at most.
        if self._previous is not None and signal.getsignal(signal.SIGINT) == self._interrupted:
            signal.signal(signal.SIGINT, self._previous)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        at = frame
        while at is not None:
            if at.f_code.co_filename == __file__:
                self._waiting = True
                return
            at = at.f_back
        assert self._previous is not None
        self._previous(number, frame)
