"""Threads, of which the system may have none left."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from threading import Thread

FEW: Final = 4
"""Threads of a pool for work that frees the GIL: more of them take processors from the engine."""


def start(thread: Thread) -> None:
    """Start a thread; `OSError` where the system refuses: a limit on processes, or no memory for its stack."""
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, f"no thread {thread.name}: {error}") from error


def few(name: str) -> ThreadPoolExecutor:
    """A pool of as many threads as there are processors for this process, up to `FEW`; each starts when it is needed.

    `submit` raises `RuntimeError` where the system refuses one.
    """
    return ThreadPoolExecutor(min(FEW, len(os.sched_getaffinity(0))), thread_name_prefix=name)
