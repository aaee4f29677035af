"""Threads, of which the system may have none left."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threading import Thread


def start(thread: Thread) -> None:
    """Start a thread; `OSError` where the system refuses: a limit on processes, or no memory for its stack."""
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, f"no thread {thread.name}: {error}") from error
