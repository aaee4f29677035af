"""Headers through shared memory: one ring, written by its writer alone, read by every reader at its own pace.

The writer fills a slot and posts each reader's semaphore: a token wakes it and orders the header's bytes (L6, L10). How
many tokens a reader has left is how far it is behind: there is no other word between the two. A reader that stays a
whole ring behind is skipped; what it missed it sees by the number in the slot.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import posix_ipc

from shmcast._layout import SLOT, Slot, pack_slot, parse_slot
from shmcast._peers import WRITER_BYTE, is_taken
from shmcast._points import Point, nowhere
from shmcast.errors import ClosedError, PeerDied

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Sequence

    from shmcast._points import Reached

T = TypeVar("T")

SPIN: Final = 50e-6
BRIEF: Final = 200e-6
SLICE: Final = 0.2
LONGEST_PAUSE: Final = 2e-3
MARGIN: Final = 16


class Audience(Protocol):
    """What a header ring has to know of its readers, and of what they were given."""

    def listening(self) -> Sequence[int]:
        """The readers that can still take headers, as far as is known."""

    def still_listening(self) -> Sequence[int]:
        """The same, after asking the kernel."""

    def granted(self) -> int:
        """The first ticket that was not granted yet."""

    def revoke(self, reader: int, below: int) -> None:
        """Take back every ticket of a reader under a number that it has not opened."""


class HeaderWriter:
    """The writer's end.

    Args:
        control: the control segment.
        base: where its slots start.
        slots: how many they are.
        ready: each reader's semaphore.
        audience: whoever knows the readers.
    """

    def __init__(
        self,
        control: mmap.mmap,
        base: int,
        slots: int,
        ready: Sequence[posix_ipc.Semaphore],
        audience: Audience,
        reached: Reached = nowhere,
    ) -> None:
        self._control = control
        self._reached = reached
        self._base = base
        self._slots = slots
        self._ready = ready
        self._audience = audience
        # One for the header that a reader is reading, the others for tokens that interrupts have lost.
        self._margin = min(MARGIN, slots // 2)
        self._number = 0
        self._tokens = [0] * len(ready)
        self._below = [0] * slots
        self._behind: set[int] = set()

    def post(self, header: bytes, wait: float) -> tuple[int, ...]:
        """Publish a header, after at most `wait` seconds for readers that are a whole ring behind; those it skipped.

        For one thread at a time. A signal handler may raise anywhere in it: then the header was posted to all or to
        none, once the next one is.
        """
        # The kernel is asked where a reader stays behind, not before: they all wait for this.
        listening = self._audience.listening()
        deadline = time.monotonic() + wait
        skipped = tuple(reader for reader in listening if not self._has_room(reader, deadline))
        slot = self._number % self._slots
        for reader in skipped:
            self._audience.revoke(reader, self._below[slot])
        self._below[slot] = self._audience.granted()
        at = self._base + slot * SLOT.size
        self._control[at : at + SLOT.size] = pack_slot(self._number, header)
        self._number += 1
        self._reached(Point.POSTING)
        for reader in listening:
            while self._tokens[reader] < self._number:
                self._tokens[reader] += 1
                # The semaphore of a reader that never looks is full after 2**31.
                with suppress(OSError):
                    self._ready[reader].release()
        return skipped

    def taken(self) -> dict[int, int]:
        """For each reader that has headers to take: how many it has taken."""
        waiting = {reader: ready.value for reader, ready in enumerate(self._ready)}
        return {reader: self._tokens[reader] - value for reader, value in waiting.items() if value}

    def _has_room(self, reader: int, deadline: float) -> bool:
        """Whether a reader has read what the next slot shows."""
        pause = 1e-5
        if self._number < self._slots:
            return True
        enough = self._slots // 2 if reader in self._behind else self._slots - self._margin
        while self._ready[reader].value >= enough:
            # One that was waited for in vain is not waited for again before it has caught up.
            if reader in self._behind or time.monotonic() >= deadline or reader not in self._audience.still_listening():
                self._behind.add(reader)
                return False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self._behind.discard(reader)
        return True


class HeaderReader:
    """A reader's end. `fd`: of the control segment, its own; it is closed with this."""

    def __init__(self, fd: int, base: int, slots: int, ready: posix_ipc.Semaphore) -> None:
        self._fd = fd
        self._pid = os.getpid()
        self._base = base
        self._slots = slots
        self._ready: posix_ipc.Semaphore | None = ready
        # Taken again by a signal handler that closes this end in the middle of `receive`.
        self._lock = threading.RLock()
        self._number = 0
        self._brief = True
        self._closed = False

    def receive(self, timeout: float) -> bytes | None:
        """The next header, in order; None for one that this reader was too late for. One thread at a time.

        Raises `TimeoutError` after `timeout` seconds, `PeerDied` where the writer is gone and has left none,
        `ClosedError` once this end was closed.
        """
        start = time.monotonic()
        slot = self._wait(start + timeout)
        self._brief = time.monotonic() - start < BRIEF
        number, self._number = self._number, self._number + 1
        return slot.header if slot.number == number else None

    def close(self) -> None:
        """End a `receive` that waits, and let go of the semaphore, which nobody may be waiting on then."""
        self._closed = True
        ready = self._ready
        # In a forked child the semaphore is the parent's, and the descriptor closed with all others of the file.
        if ready is not None and self._pid == os.getpid():
            with suppress(OSError, ValueError, posix_ipc.Error):
                ready.release()
            with self._lock:
                if self._ready is not None:
                    self._ready = None
                    ready.close()
                    os.close(self._fd)

    def _wait(self, deadline: float) -> Slot:
        slot = self._spin() if self._brief else None
        while slot is None:
            # Asked before the wait: what a writer posted before it died is still taken.
            lives = self._writer_lives()
            left = deadline - time.monotonic()
            slot = self._take(max(0.0, min(SLICE, left)) if lives else 0.0, sure=False)
            if slot is None and not lives:
                raise PeerDied("the writer is gone, and has left no header")
            if slot is None and left <= 0:
                raise TimeoutError("no header came in time")
        return slot

    def _spin(self) -> Slot | None:
        """A header that comes at once needs no sleep; where the last one did not, this is not called."""
        end = time.perf_counter() + SPIN
        slot = None
        while slot is None and time.perf_counter() < end:
            slot = self._take(0.0, sure=True)
        return slot

    def _take(self, timeout: float, *, sure: bool) -> Slot | None:
        """What the next slot shows after at most `timeout` seconds, if it is the next header or one after it.

        `sure`: only behind a token. Else the slot is looked at without one too: a signal handler that raised between
        the token and its use has taken the token with it. A token too many finds an old slot, and nothing is lost.
        """
        with self._lock:
            ready = self._open()
            at = self._base + self._number % self._slots * SLOT.size
            try:
                ready.acquire(timeout)
            except (posix_ipc.BusyError, posix_ipc.SignalError):
                if sure:
                    return None
            except (posix_ipc.Error, ValueError):
                self._open()  # a signal handler has closed it in between
                raise
            slot = parse_slot(self._look(lambda fd: os.pread(fd, SLOT.size, at)))
            return slot if slot is not None and slot.number >= self._number else None

    def _writer_lives(self) -> bool:
        with self._lock:
            return self._look(lambda fd: is_taken(fd, WRITER_BYTE))

    def _look(self, at: Callable[[int], T]) -> T:
        """What the control segment shows; `ClosedError` where a signal handler closed this end before that was done."""
        self._open()
        try:
            seen = at(self._fd)
        except OSError:
            self._open()
            raise
        self._open()
        return seen

    def _open(self) -> posix_ipc.Semaphore:
        ready = self._ready
        if self._closed or ready is None:
            raise ClosedError("this reader was closed")
        return ready
