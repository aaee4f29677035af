"""Functions run in forked children, so that each finds a fresh copy of this process, and harms nobody but itself.

`fork_each(f, g)` calls `f()` and `g()` at once, each in a child of its own, and returns what they returned. A child
that raises, dies of a signal or hangs is a failure that says so. For processes with few threads and everything
imported: a rank of `Ranks.start_each`, not pytest itself.
"""

import ctypes
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests.support._rank import PR_SET_PDEATHSIG

TIMEOUT = 40.0
STACKS_SECONDS = 1.0


class ForkFailed(AssertionError):
    """A child raised, died or hung."""


def fork_each(*functions: Callable[[], Any], timeout: float = TIMEOUT) -> list[Any]:
    """What each function returned, in order. After `timeout` seconds all are killed, their stacks in the rank's log."""
    children = [_Child(function) for function in functions]
    deadline = time.monotonic() + timeout
    try:
        told = [child.reply(deadline) for child in children]
    finally:
        for child in children:
            child.end()
    stories = [f"child {number} of {len(children)}: {value}" for number, (well, value) in enumerate(told) if not well]
    if stories:
        raise ForkFailed("\n".join(stories))
    return [value for _, value in told]


def fork(function: Callable[[], Any], *, timeout: float = TIMEOUT) -> Any:
    """What `function` returned in a child."""
    return fork_each(function, timeout=timeout)[0]


class _Child:
    def __init__(self, function: Callable[[], Any]) -> None:
        self._pipe, theirs = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _serve(function, theirs, parent)
        os.close(theirs)
        self._ended = False

    def reply(self, deadline: float) -> tuple[bool, Any]:
        """Whether all went well, and the result; else the story."""
        raw = bytearray()
        while True:
            if not select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False, "hangs"
            piece = os.read(self._pipe, 1 << 16)
            if not piece:
                break
            raw += piece
        self._ended = True
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        if code:
            return False, f"ended with {signal.Signals(-code).name if code < 0 else code}"
        well, value = pickle.loads(raw)
        return well, value

    def end(self) -> None:
        """Have nothing of it left."""
        os.close(self._pipe)
        if not self._ended:
            os.kill(self._pid, signal.SIGUSR1)  # faulthandler of a rank: all stacks
            select.select([], [], [], STACKS_SECONDS)
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def _serve(function: Callable[[], Any], pipe: int, parent: int) -> None:
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        try:
            told = pickle.dumps((True, function()))
        except BaseException:
            told = pickle.dumps((False, traceback.format_exc()))
        while told:
            told = told[os.write(pipe, told) :]
        os._exit(0)
    finally:
        os._exit(1)
