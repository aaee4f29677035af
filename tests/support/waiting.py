"""Waiting for what other threads and processes do, without sleeping for a time that somebody guessed."""

import threading
import time
from collections.abc import Callable

import pytest

DEADLINE_SECONDS = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition()` holds; only a bug makes the deadline pass."""
    deadline, never = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"still not so after {DEADLINE_SECONDS:g} s: {what}")
        never.wait(0.001)
