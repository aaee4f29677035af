"""Headers through shared memory: one ring, written by its writer alone, read by every reader at its own pace.

The writer fills a slot and posts each reader's semaphore: a token is one header, and orders its bytes (L6, L10). How
many tokens a reader has left is how far it is behind: there is no other word between the two. A reader that stays a
whole ring behind is skipped; what it missed it sees by the number in the slot.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import posix_ipc

from shmcast._layout import SLOT, pack_slot, parse_slot
from shmcast.errors import ClosedError, PeerDied

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Sequence

SPIN: Final = 50e-6
BRIEF: Final = 200e-6
SLICE: Final = 0.2
LONGEST_PAUSE: Final = 2e-3


class HeaderWriter:
    """The writer's end.

    Args:
        control: the control segment.
        base: where its slots start.
        slots: how many they are.
        ready: each reader's semaphore.
        listening: the readers that can still take headers; asks the kernel.
        granted: the first ticket that was not granted yet.
        revoke: take back every ticket of a reader under a number that it has not opened.
    """

    def __init__(
        self,
        control: mmap.mmap,
        base: int,
        slots: int,
        ready: Sequence[posix_ipc.Semaphore],
        listening: Callable[[], Sequence[int]],
        granted: Callable[[], int],
        revoke: Callable[[int, int], None],
    ) -> None:
        self._control = control
        self._base = base
        self._slots = slots
        self._ready = ready
        self._listening = listening
        self._granted = granted
        self._revoke = revoke
        self._number = 0
        self._tokens = [0] * len(ready)
        self._below = [0] * slots
        self._behind: set[int] = set()

    def post(self, header: bytes, wait: float) -> tuple[int, ...]:
        """Publish a header, after at most `wait` seconds for readers that are a whole ring behind; those it skipped.

        For one thread at a time. A signal handler may raise anywhere in it: then the header was posted to all or to
        none, once the next one is.
        """
        listening = self._listening()
        deadline = time.monotonic() + wait
        skipped = tuple(reader for reader in listening if not self._has_room(reader, deadline))
        slot = self._number % self._slots
        for reader in skipped:
            self._revoke(reader, self._below[slot])
        self._below[slot] = self._granted()
        at = self._base + slot * SLOT.size
        self._control[at : at + SLOT.size] = pack_slot(self._number, header)
        self._number += 1
        for reader in listening:
            while self._tokens[reader] < self._number:
                self._tokens[reader] += 1
                self._ready[reader].release()
        return skipped

    def _has_room(self, reader: int, deadline: float) -> bool:
        """Whether a reader has read what the next slot shows. It takes the token first: one more must be gone."""
        pause = 1e-5
        if self._number < self._slots:
            return True
        while self._ready[reader].value >= self._slots - 1:
            # One that was waited for in vain is not waited for again before it has caught up.
            if reader in self._behind or time.monotonic() >= deadline or reader not in self._listening():
                self._behind.add(reader)
                return False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self._behind.discard(reader)
        return True


class HeaderReader:
    """A reader's end. `read(offset, length)` copies bytes out of the control segment; `lives`: the writer does."""

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        base: int,
        slots: int,
        ready: posix_ipc.Semaphore,
        lives: Callable[[], bool],
    ) -> None:
        self._read = read
        self._base = base
        self._slots = slots
        self._ready = ready
        self._lives = lives
        self._lock = threading.Lock()
        self._number = 0
        self._token = False
        self._brief = True
        self._closed = False

    def receive(self, timeout: float) -> bytes | None:
        """The next header, in order; None for one that this reader was too late for. One thread at a time.

        Raises `TimeoutError` after `timeout` seconds, `PeerDied` where the writer is gone and has left none,
        `ClosedError` once this end was closed.
        """
        start = time.monotonic()
        self._wait(start + timeout)
        self._brief = time.monotonic() - start < BRIEF
        # A signal handler may raise between the token and its use: then the next call uses it.
        with self._lock:
            self._check_open()
            slot = self._read(self._base + self._number % self._slots * SLOT.size, SLOT.size)
        header = parse_slot(slot, self._number)
        self._number += 1
        self._token = False
        return header

    def close(self) -> None:
        """End a `receive` that waits, and let go of the semaphore, which nobody may be waiting on then."""
        if not self._closed:
            self._closed = True
            self._ready.release()
            with self._lock:
                self._ready.close()

    def _wait(self, deadline: float) -> None:
        if self._brief and self._spin():
            return
        while not self._token:
            # Asked before the wait: what a writer posted before it died is still taken.
            lives = self._lives()
            left = deadline - time.monotonic()
            if self._take(max(0.0, min(SLICE, left)) if lives else 0.0):
                return
            if not lives:
                raise PeerDied("the writer is gone, and has left no header")
            if left <= 0:
                raise TimeoutError("no header came in time")

    def _spin(self) -> bool:
        """A header that comes at once needs no sleep; where the last one did not, this is not called."""
        end = time.perf_counter() + SPIN
        while time.perf_counter() < end:
            if self._take(0.0):
                return True
        return False

    def _take(self, timeout: float) -> bool:
        with self._lock:
            self._check_open()
            if not self._token:
                with suppress(posix_ipc.BusyError, posix_ipc.SignalError):
                    self._ready.acquire(timeout)
                    self._token = True
            return self._token

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this reader was closed")
