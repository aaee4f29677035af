"""What becomes of a process at a named point of its life: the callables that ends take as `reached`."""

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
import warnings
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal, NoReturn

from shmcast._points import Point
from tests.support._rank import PR_SET_PDEATHSIG

# Looked up before any fork: another thread may be in the loader, whose locks a child inherits.
_prctl = ctypes.CDLL(None).prctl

How = Literal["kill", "raise", "stop", "term", "leave", "fork", "orphan"]
LEFT = 3


class Struck(Exception):
    """What a fate raises."""


@dataclass
class Fate:
    """At the `nth` time that a process comes to `point`, this becomes of it. Travels by pickle.

    `how`: `kill` and `stop` by these signals; `raise` of an exception. `term`: SIGTERM, in a process that does not
    expect it; `leave`: in one that raises SystemExit then. `fork`: the process goes on, once a child of it has ended
    with `sys.exit`. `orphan`: as `kill`, while a child lives that ends with the last writer of the FIFO `lives`.
    """

    point: Point
    nth: int = 1
    how: How = "kill"
    lives: str = ""
    child: int = field(default=0, compare=False)
    seen: int = field(default=0, compare=False)

    def __call__(self, point: Point) -> None:
        if point is not self.point:
            return
        self.seen += 1
        if self.seen == self.nth:
            self._strike()

    def prepare(self) -> None:
        """In the process that it is for, before anything else."""
        signal.signal(signal.SIGTERM, _leave if self.how == "leave" else signal.SIG_DFL)

    def _strike(self) -> None:
        if self.how == "raise":
            raise Struck(str(self))
        if self.how == "fork":
            self.child = _outlived_child()
            return
        if self.how == "orphan":
            _leave_orphan(self.lives)
        signals = {"stop": signal.SIGSTOP, "term": signal.SIGTERM, "leave": signal.SIGTERM}
        os.kill(os.getpid(), signals.get(self.how, signal.SIGKILL))

    def __str__(self) -> str:
        return f"{self.point.value}-{self.nth}" if self.nth > 1 else self.point.value


def end(code: int) -> NoReturn:
    """End this process as an interpreter does that came to its end; what its threads run is cut off."""
    gc.collect()
    atexit._run_exitfuncs()
    os._exit(code)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(LEFT)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: this process has threads
        return os.fork()


def _outlived_child() -> int:
    """The exit code of a child that leaves by `sys.exit`; where a thread forks, it has no frames to leave."""
    unwinds = threading.current_thread() is threading.main_thread()
    child = _fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if unwinds:
        sys.exit(0)
    end(0)


def _leave_orphan(fifo: str) -> None:
    ready, said = os.pipe()
    if _fork():
        os.read(ready, 1)
        return
    os.write(said, b".")
    # What tells others that the parent died, and is not the library's: sockets of gloo, pipes of the test.
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}") and _is_channel(fd):
            os.close(fd)
    os.read(os.open(fifo, os.O_RDONLY), 1)
    os._exit(0)


def _is_channel(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").startswith(("socket:", "pipe:"))


@dataclass
class Path:
    """Remembers every point that was come to."""

    points: list[Point] = field(default_factory=list)

    def __call__(self, point: Point) -> None:
        self.points.append(point)
