"""Copies to a device that are under way: what they read stays until an event says that they are done.

A copy may read after the last tensor over its source is gone. So the sources are held here, with them the exporters,
and with those the leases. One thread asks the events, while there are any: never a finalizer, which may run under any
lock, CUDA's own too. At exit it lets go of nothing more: torch gives up the interpreter's lock to free a tensor, and a
thread that then finds the interpreter gone aborts the process.
"""

from __future__ import annotations

import atexit
import os
import threading
from ctypes import py_object, pythonapi
from typing import TYPE_CHECKING, Final

from shmcast import _cuda, _threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

ASK_SECONDS: Final = 0.001
IDLE_SECONDS = 1.0  # before the thread ends


class Copy:
    """One call's copies on one stream: the event behind them, and the tensors that they read."""

    def __init__(self, event: torch.cuda.Event, device: int, sources: Sequence[torch.Tensor]) -> None:
        self.event = event
        self.device = device
        self.sources = sources

    def is_done(self) -> bool:
        """Whether nothing of it reads any more."""
        try:
            with _cuda.calls(self.device) as allowed:
                return allowed and bool(self.event.query())  # type: ignore[no-untyped-call]  # torch's
        except RuntimeError:
            # Another thread captures a graph, and it may be asked later; or the context is lost, for good.
            return False


class Copies:
    """The copies of this process, and the thread that asks whether they are done; there while it has to do."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way: set[Copy] = set()
        self._dropping = threading.Lock()
        self._thread: threading.Thread | None = None

    def hold(self, copy: Copy) -> None:
        """Keep what `copy` reads until it is done; waits for that here where the system has no thread left."""
        try:
            with self._changed:
                self._under_way.add(copy)
                if self._thread is None:
                    thread = threading.Thread(target=self._serve, name="shmcast-copies", daemon=True)
                    _threads.start(thread)
                    self._thread = thread
                self._changed.notify()
        except OSError:
            copy.event.synchronize()
            with self._changed:
                self._under_way.discard(copy)

    def _serve(self) -> None:
        while True:
            self._drop_done()
            with self._changed:
                busy = bool(self._under_way)
                told = self._changed.wait(ASK_SECONDS if busy else IDLE_SECONDS)
                if not (busy or told or self._under_way):
                    self._thread = None
                    return

    def end(self) -> None:
        """At exit: wait for what is being let go of, and keep the rest for good."""
        self._dropping.acquire()

    def _drop_done(self) -> None:
        """Let go of what is done; its end runs finalizers, which is why no lock is held then that any other waits for.

        Only the exit of the interpreter waits for `_dropping`.
        """
        done = {copy for copy in tuple(self._under_way) if copy.is_done()}
        with self._dropping:
            with self._changed:
                self._under_way -= done
            done.clear()


_copies = Copies()


def hold(copy: Copy) -> None:
    """Keep what `copy` reads until it is done."""
    _copies.hold(copy)


def _end() -> None:
    _copies.end()


def _forget() -> None:
    """In a forked child: the copies are the parent's, and to free their events would call CUDA."""
    global _copies
    pythonapi.Py_IncRef(py_object(_copies))
    _copies = Copies()


atexit.register(_end)
os.register_at_fork(after_in_child=_forget)
