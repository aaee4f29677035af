"""The lock of a writer: one call at a time, and an error where waiting would be for ever."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from shmcast.errors import ShmcastError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Turn:
    """A lock that its holder cannot take again: a signal handler or `__del__` gets an error, not a deadlock.

        with turn.free():

    A `with` on the C lock itself: Ctrl-C inside an `__enter__` written in Python would leave the lock taken for good.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @property
    def is_mine(self) -> bool:
        """Whether this thread has it, in a frame below."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]

    def free(self) -> AbstractContextManager[bool]:
        """The lock, to be taken by `with`; raises `Reentered` where this thread has it already."""
        if self.is_mine:
            raise Reentered("a signal handler or finalizer called in the middle of another call: call it later")
        return self._lock


class Reentered(ShmcastError):
    """A call from a signal handler or a finalizer that came in the middle of another one of the same thread."""
