"""The lock of a writer: one call at a time, and an error where waiting would be for ever."""

from __future__ import annotations

import threading

from shmcast.errors import ShmcastError


class Turn:
    """A lock that its holder cannot take again: a signal handler or `__del__` gets an error, not a deadlock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside = False

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._inside:
            self._lock.release()
            raise Reentered("a signal handler or finalizer called in the middle of another call: call it later")
        self._inside = True

    def __exit__(self, *exc: object) -> None:
        self._inside = False
        self._lock.release()


class Reentered(ShmcastError):
    """A call from a signal handler or a finalizer that came in the middle of another one of the same thread."""
