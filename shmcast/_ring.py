"""Release rings: what a reader tells its writer, one ring each, no lock between the two.

The reader writes an entry and posts `posted`; the writer takes exactly as many entries as it could acquire. That post
and that acquire are what orders the entry's bytes (L6). Entries never overrun the ring (L7): nobody waits for room.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import posix_ipc

from shmcast._layout import (
    FALLBACKS_OFFSET,
    MAX_REASONS,
    PID_OFFSET,
    RING_HEAD,
    TAKEN_OFFSET,
    WORD,
    Entry,
    EntryKind,
    parse_entry,
    write_entry,
    write_word,
)
from shmcast._points import Point, nowhere
from shmcast.errors import LayoutError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from shmcast._points import Reached


def introduce(ring: mmap.mmap) -> None:
    """Say that this index is taken, and which process has it."""
    write_word(ring, PID_OFFSET, os.getpid())
    write_word(ring, TAKEN_OFFSET, 1)


class Outbox:
    """The reader's end of its ring."""

    def __init__(self, ring: mmap.mmap, entries: int, posted: posix_ipc.Semaphore, reached: Reached = nowhere) -> None:
        self._ring = ring
        self._entries = entries
        self._posted = posted
        self._reached = reached
        self._seq = 0
        self._tokens = 0
        self._lock = threading.Lock()

    def post(self, kind: EntryKind, value: int = 0) -> bool:
        """Tell the writer; never waits. False where a writer that does not drain has left no room."""
        with self._lock:
            # A signal handler may raise between any two of these statements. An entry that was written and not
            # counted counts; a token too few is made up for; a token too many finds no entry.
            with suppress(LayoutError):
                parse_entry(self._ring, self._entries, self._seq)
                self._seq += 1
            # The writer takes a token before it reads the entry: one entry fewer than the ring has room for.
            if self._posted.value >= self._entries - 1:
                return False
            write_entry(self._ring, self._entries, self._seq, kind, value)
            self._seq += 1
            self._reached(Point.TELLING)
            while self._tokens < self._seq:
                self._posted.release()
                self._tokens += 1
            return True

    def tell(self, reason: int, count: int) -> None:
        """Show how often this rank fell back for the reason of this number; for whoever looks on. Takes no lock."""
        # A word that another thread stores later is larger, or is made up for by the next fallback.
        with suppress(AttributeError):
            if reason < MAX_REASONS:
                write_word(self._ring, FALLBACKS_OFFSET + reason * WORD.size, min(count, 2**32 - 1))

    def close(self) -> None:
        """Let go of the ring; nothing is posted after this."""
        with self._lock:
            del self._ring


class Inbox:
    """The writer's end of one reader's ring. `bad` counts entries that were not what they claim."""

    def __init__(self, control: mmap.mmap, base: int, entries: int, posted: posix_ipc.Semaphore) -> None:
        self._control = control
        self._base = base
        self._entries = entries
        self._posted = posted
        self._seq = 0
        self._token = False
        self.bad = 0

    def taken(self) -> bool:
        """Whether a reader has taken this index; a hint that is only ever late."""
        return bool(RING_HEAD.unpack_from(self._control, self._base)[0])

    @property
    def heard(self) -> int:
        """How many entries were read."""
        return self._seq

    def drain(self) -> Iterator[Entry]:
        """Every entry posted so far; one that a signal handler interrupts comes again, which does no harm."""
        for _ in range(min(self._posted.value + self._token, self._entries)):
            if not self._token:
                self._token = True
                try:
                    self._posted.acquire(0)
                except posix_ipc.BusyError:  # somebody else has taken it, which no reader of ours does
                    self._token = False
                    return
            try:
                entry = parse_entry(self._control, self._entries, self._seq, self._base)
            except LayoutError:
                self.bad += 1
            else:
                yield entry
                self._seq += 1
            self._token = False

    def close(self) -> None:
        self._posted.close()


class Peer:
    """What the writer knows of one reader."""

    def __init__(self, inbox: Inbox, wake: posix_ipc.Semaphore, ready: posix_ipc.Semaphore | None) -> None:
        self.inbox = inbox
        self.wake = wake
        self.ready = ready
        self.mapped: set[int] = set()
        self.left = False
        self.dead = False

    def close(self) -> None:
        self.inbox.close()
        self.wake.close()
        if self.ready is not None:
            self.ready.close()

    @property
    def listens(self) -> bool:
        """Whether it can still open what is published."""
        return not (self.left or self.dead)


def acquire_all(semaphore: posix_ipc.Semaphore) -> int:
    """Acquire as often as is possible without waiting; how often that was."""
    acquired = 0
    for _ in range(semaphore.value):
        with suppress(posix_ipc.BusyError):
            semaphore.acquire(0)
            acquired += 1
    return acquired


def fence() -> None:
    """A full memory fence: one read-modify-write that releases and then one that acquires, on one word.

    Reading a semaphore's value, or failing to acquire it, is a plain load: no fence. Dekker's pattern needs one.
    """
    lock = threading.Lock()
    lock.acquire()
    lock.release()
    lock.acquire()


def wait(semaphore: posix_ipc.Semaphore) -> None:
    """Acquire once, however long it takes; a signal is not an answer."""
    while True:
        try:
            semaphore.acquire()
        except posix_ipc.SignalError:
            continue
        return
