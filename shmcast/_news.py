"""When the board is written: soon after something changed, never on a thread that publishes, never for nothing.

A publish only says that there is news, which costs it a look at a flag. The thread that writes waits for the rest of
the burst and writes once; while there is no news it sleeps, without a timeout.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakMethod, finalize

from shmcast._board import Board, Row, nanoseconds, store_board

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterable, Mapping

INTERVAL: Final = 0.25


class Counted(Protocol):
    """Whatever counts what travelled on this rank."""

    def totals(self) -> tuple[int, int, Mapping[str, int]]:
        """Messages, bytes of their tensors, fallbacks by reason."""

    def watch(self, tell: Callable[[str, int], None]) -> None:
        """Have `tell` called at each fallback with its reason, and how often that was one so far."""


class News:
    """One writer's board.

    Args:
        write: a method that calls `take` and `post`; called after `stir`, by a thread of its own, `INTERVAL` seconds
            later. Whoever it belongs to is not kept alive.
        at: where the board lies in the control segment.
        capacity: the most bytes that the writer will use.
        clock: the monotonic clock, in seconds.
    """

    def __init__(self, write: Callable[[], None], at: int, capacity: int, clock: Callable[[], float]) -> None:
        self._at = at
        self._capacity = capacity
        self._clock = clock
        self._made = nanoseconds(clock())
        self._number = 0
        self._stirred = False
        self._counted: list[Counted] = []
        # Its put() may interrupt itself: a publish in a signal handler has news, too.
        self._queue: SimpleQueue[bool] = SimpleQueue()
        end = finalize(self, self._queue.put, False)
        end.atexit = False
        method: WeakMethod[Any] = WeakMethod(write)
        # Where there is no thread to be had, the board stays as it is until `close`.
        with suppress(RuntimeError):
            threading.Thread(target=_serve, args=(self._queue, method), name="shmcast-board", daemon=True).start()

    def stir(self, reason: str = "", count: int = 0) -> None:
        """There is news. From any thread, a signal handler, a finalizer."""
        if not self._stirred:
            self._stirred = True
            self._queue.put(True)

    def take(self) -> None:
        """What is written from now on is news again; whoever writes calls it first."""
        self._stirred = False

    def count(self, counted: Counted) -> None:
        """Have the board show what this counts."""
        self._counted.append(counted)
        counted.watch(self.stir)
        self.stir()

    def post(
        self,
        control: mmap.mmap,
        closed: bool,
        granted: int,
        usage: tuple[int, int, int, int],
        readers: Iterable[tuple[tuple[int, int, float | None], int]],
    ) -> None:
        """Write the board. One thread at a time.

        `granted`: the first ticket that was not. `usage`: live blocks, free bytes, largest hole, bytes in all.
        `readers`: for each what it holds, opened and since when, and how many entries of its ring were read.
        """
        rows = tuple(
            Row(held, opened, 0 if since is None else max(1, nanoseconds(since)), heard)
            for (held, opened, since), heard in readers
        )
        written = max(self._made, nanoseconds(self._clock()))
        counts = self._capacity, granted, *usage, *self._totals()
        self._number += 1
        board = Board(written, self._made, os.getpid(), closed, *counts, rows)
        store_board(control, self._at, self._number, board)

    def _totals(self) -> tuple[int, int, dict[str, int]]:
        """Messages, bytes and fallbacks of all that counts for this board, the most frequent reason first."""
        messages = size = 0
        fallbacks: Counter[str] = Counter()
        for counted in self._counted:
            more, nbytes, reasons = counted.totals()
            messages, size = messages + more, size + nbytes
            fallbacks.update(reasons)
        return messages, size, dict(fallbacks.most_common())

    def close(self) -> None:
        """End the thread."""
        self._queue.put(False)


def _serve(queue: SimpleQueue[bool], method: WeakMethod[Any]) -> None:
    while queue.get():
        with suppress(Empty):
            if not queue.get(timeout=INTERVAL):
                return
        write = method()
        if write is None:
            return
        write()
        del write
