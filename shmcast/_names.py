"""A writer's names in /dev/shm, and when they go: each as soon as every reader has mapped what it leads to.

From then on a SIGKILL of all processes leaves nothing behind.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import posix_ipc

from shmcast._layout import Kind
from shmcast._points import Point

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcast._points import Reached
    from shmcast._segment import Segment
    from shmcast._wire import Address

IDLE_POLLS = 600
LONGEST_PAUSE = 0.1


class Names:
    """The names of one writer. All but `watch` and the thread run under the lock of its arena.

    `drain` hears the readers, and calls `unlink_mapped`. `stop` is set when the writer is closed.
    """

    def __init__(self, address: Address, drain: Callable[[], None], stop: threading.Event, reached: Reached) -> None:
        self._address = address
        self._drain = drain
        self._stop = stop
        self._reached = reached
        self._segments: list[Segment] = []
        self._idle: threading.Thread | None = None
        self._polls = 0

    def __len__(self) -> int:
        return len(self._segments)

    def add(self, segment: Segment) -> None:
        """It has a name now."""
        self._segments.append(segment)

    def unlink_mapped(self, mapped_by_all: Callable[[int], bool]) -> None:
        """Remove the names of those segments, by number, that every reader has mapped."""
        for segment in list(self._segments):
            if mapped_by_all(segment.header.number):
                self._unlink(segment)

    def unlink_all(self) -> None:
        """Remove what is left."""
        while self._segments:
            self._unlink(self._segments[0])

    def watch(self) -> None:
        """Have a thread hear the readers while the writer idles: until no name is left, and not for ever."""
        self._polls = 0
        if self._idle is None or not self._idle.is_alive():
            self._idle = threading.Thread(target=self._serve, name="shmcast-unlink", daemon=True)
            self._idle.start()

    def _serve(self) -> None:
        pause = 1e-3
        while self._polls < IDLE_POLLS:
            self._polls += 1
            if not self._segments or self._stop.wait(pause):
                return
            self._drain()
            pause = min(2 * pause, LONGEST_PAUSE)

    def _unlink(self, segment: Segment) -> None:
        if segment.header.kind == Kind.CONTROL:
            # Before the control segment's name goes: who finds that name finds every semaphore that may exist.
            for i in range(self._address.readers):
                for name in (self._address.posted(i), self._address.wake(i), self._address.ready(i)):
                    with suppress(posix_ipc.ExistentialError):
                        posix_ipc.unlink_semaphore(name)
        self._reached(Point.CLOSING if self._stop.is_set() else Point.UNLINKING)
        segment.unlink()
        self._segments.remove(segment)
