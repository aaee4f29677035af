"""Has call number k of the library into the system fail, for any k.

    with Failing(3, errno.EMFILE) as failing:
        ...                     # the third call that can give EMFILE gives it
    failing.failed              # which call that was, and from where; empty: there were fewer

Only calls count that the library's own code makes, on threads of one kind, to functions that can give this error; so
the numbers are the same in each run. It patches the modules of this process: for a child that ends after it.
"""

import errno
import fcntl
import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Final

import posix_ipc

from shmcast import _pages

MAIN: Final = "MainThread"
READER: Final = "shmcast-reader"
UNLINK: Final = "shmcast-unlink"
PLANE: Final = "shmcast-plane"

NAMED = (errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ENOSPC, errno.EINTR)

CALLS: Final[tuple[tuple[Any, str, tuple[int, ...]], ...]] = (
    (posix_ipc, "SharedMemory", NAMED),
    (posix_ipc, "Semaphore", NAMED),
    (posix_ipc, "unlink_shared_memory", (errno.EACCES,)),
    (posix_ipc, "unlink_semaphore", (errno.EACCES,)),
    (os, "open", (errno.EACCES, errno.EMFILE, errno.ENOMEM)),
    (os, "dup", (errno.EMFILE,)),
    (os, "listdir", (errno.EACCES, errno.EMFILE, errno.ENOMEM)),
    (os, "lstat", (errno.EACCES, errno.ENOMEM)),
    (os, "stat", (errno.EACCES, errno.ENOMEM)),
    (os, "fstat", (errno.ENOMEM,)),
    (os, "fchmod", (errno.EACCES,)),
    (os, "statvfs", (errno.EACCES, errno.ENOMEM)),
    (os, "posix_fallocate", (errno.ENOSPC, errno.ENOMEM)),
    (os, "pread", (errno.ENOMEM,)),
    (os, "preadv", (errno.ENOMEM,)),
    (os, "unlink", (errno.EACCES,)),
    (Path, "read_text", (errno.EACCES, errno.EMFILE, errno.ENOMEM)),
    (fcntl, "flock", (errno.ENOMEM,)),
    (fcntl, "fcntl", (errno.ENOMEM,)),
    (fcntl, "ioctl", (errno.ENOMEM,)),
    (threading.Thread, "start", (errno.ENOMEM,)),
)
LIBC: Final = ("madvise", "mprotect", "munlock")


def error_of(name: str, code: int) -> Exception:
    """What the caller of a function gets where the system gives `code`."""
    if name == "start":
        return RuntimeError("can't start new thread")
    if name in ("SharedMemory", "Semaphore") and code == errno.EMFILE:
        return OSError("This process already has the maximum number of files open")
    if name == "Semaphore" and code == errno.ENOMEM:
        return MemoryError("Not enough memory")
    if name in ("SharedMemory", "Semaphore", "unlink_shared_memory", "unlink_semaphore") and code == errno.EACCES:
        refused: Exception = posix_ipc.PermissionsError("Permission denied")
        return refused
    return OSError(code, os.strerror(code))


class Failing:
    """One call that fails, while it is entered.

    Args:
        number: which; 1 is the first.
        code: what the system gives.
        thread: what the names of the threads begin with whose calls count.
        lasts: all calls from that one on fail.
    """

    def __init__(self, number: int, code: int, thread: str = MAIN, *, lasts: bool = False) -> None:
        self.failed = ""
        self._number = number
        self._code = code
        self._thread = thread
        self._lasts = lasts
        self._count = 0
        self._lock = threading.Lock()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Failing":
        for owner, name, codes in CALLS:
            if self._code in codes:
                self._replace(owner, name, self._wrapped(name, getattr(owner, name)))
        if self._code in (errno.ENOMEM, errno.EMFILE):
            self._replace(mmap, "mmap", self._mapping())
        if self._code == errno.ENOMEM:
            real = _pages._libc
            self._replace(_pages, "_libc", SimpleNamespace(**{n: self._refused(n, getattr(real, n)) for n in LIBC}))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, new: object) -> None:
        real = getattr(owner, name)
        setattr(owner, name, new)
        self._undo.append(lambda: setattr(owner, name, real))

    def _fails(self, name: str) -> bool:
        """Whether this call is the one."""
        caller = sys._getframe(2)
        if not caller.f_globals.get("__name__", "").startswith("shmcast."):
            return False
        if not threading.current_thread().name.startswith(self._thread):
            return False
        with self._lock:
            self._count += 1
            if not (self._count == self._number or (self._lasts and self._count > self._number)):
                return False
            self.failed = self.failed or (
                f"call {self._count} on {self._thread}: {name} gives {errno.errorcode[self._code]}"
                f"{', and so do all after it' if self._lasts else ''}, in {caller.f_code.co_name} of "
                f"{caller.f_globals['__name__']}"
            )
            return True

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._fails(name):
                raise error_of(name, self._code)
            return real(*args, **kwargs)

        return call

    def _refused(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def call(*args: Any) -> int:
            return -1 if self._fails(name) else real(*args)

        return call

    def _mapping(self) -> type[mmap.mmap]:
        failing = self

        class Mapping(mmap.mmap):
            def __new__(cls, *args: Any, **kwargs: Any) -> "Mapping":
                if failing._fails("mmap"):
                    raise error_of("mmap", failing._code)
                return super().__new__(cls, *args, **kwargs)

            def madvise(self, *args: int) -> None:
                if failing._code == errno.ENOMEM and failing._fails("madvise"):
                    raise error_of("madvise", failing._code)
                super().madvise(*args)

        return Mapping
