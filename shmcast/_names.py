"""A writer's names in /dev/shm, and when they go: each as soon as every reader has mapped what it leads to.

From then on a SIGKILL of all processes leaves nothing behind.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from shmcast._layout import Kind
from shmcast._named import Semaphores
from shmcast._points import Point

if TYPE_CHECKING:
    from collections.abc import Callable

    import posix_ipc

    from shmcast._points import Reached
    from shmcast._segment import Segment

IDLE_POLLS = 600
LONGEST_PAUSE = 0.1


class Names:
    """The names of one writer. All but `watch` and the thread run under the lock of its arena.

    `drain` hears the readers, and calls `unlink_mapped`. `stop` is set when the writer is closed.
    """

    def __init__(self, drain: Callable[[], None], stop: threading.Event, reached: Reached) -> None:
        self._drain = drain
        self._stop = stop
        self._reached = reached
        self._segments: list[Segment] = []
        self._semaphores = Semaphores()
        self._idle: threading.Thread | None = None
        self._polls = 0

    def __len__(self) -> int:
        return len(self._segments)

    def semaphore(self, name: str) -> posix_ipc.Semaphore:
        """A new one; `OSError` where the system refuses it, or somebody has taken its name."""
        return self._semaphores.make(name)

    def add(self, segment: Segment) -> None:
        """It has a name now."""
        self._segments.append(segment)

    def unlink_mapped(self, mapped_by_all: Callable[[int], bool]) -> None:
        """Remove the names of those segments, by number, that every reader has mapped."""
        for segment in list(self._segments):
            if mapped_by_all(segment.header.number):
                self._unlink(segment)

    def unlink_all(self) -> None:
        """Remove what is left, once."""
        for segment in list(self._segments):
            self._unlink(segment)
        self._segments.clear()

    def watch(self) -> None:
        """Have a thread hear the readers while the writer idles: until no name is left, and not for ever."""
        self._polls = 0
        if self._idle is None or not self._idle.is_alive():
            self._idle = threading.Thread(target=self._serve, name="shmcast-unlink", daemon=True)
            # Where there is no thread to be had, each publish looks after them, and `close`.
            with suppress(RuntimeError):
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
        # Semaphores before the control segment: who finds that name finds every semaphore that may exist.
        if segment.header.kind == Kind.CONTROL and not self._semaphores.unlink():
            return
        self._reached(Point.CLOSING if self._stop.is_set() else Point.UNLINKING)
        if segment.unlink():
            self._segments.remove(segment)
