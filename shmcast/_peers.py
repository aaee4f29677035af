"""Who is alive: exclusive OFD locks on bytes of a control segment, which the kernel takes back from the dead.

No pid is trusted (in another pid namespace it names somebody else), no clock decides (a stopped process is not dead).
Reader i locks byte i, the writer locks `WRITER_BYTE`; each through a descriptor of its own, so that neither a
mapping's duplicate nor a forked child keeps the lock of a dead process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final
from weakref import WeakSet

WRITER_BYTE: Final = 1 << 30

# struct flock: l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks).
FLOCK: Final = struct.Struct("hhqqi4x")

_seats: WeakSet[Seat] = WeakSet()


class Seat:
    """An exclusive lock on byte `byte` of the file behind `fd`, held until `release` or death."""

    def __init__(self, fd: int, byte: int) -> None:
        """Raises `BlockingIOError` when another holds it."""
        # A new open file description: closing any other descriptor of the file does not give this lock up.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            os.close(self._fd)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, f"byte {byte} is locked") from None
            raise
        _seats.add(self)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def forget(self) -> None:
        """In a forked child: the lock is the parent's, the descriptor closed with all others of the file."""
        self._fd = -1


def is_taken(fd: int, byte: int) -> bool:
    """Whether a living process holds the lock on `byte`; asks through a descriptor that holds no such lock."""
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        # A kernel that has no memory to answer: nobody is taken for dead without its word.
        if error.errno == errno.ENOMEM:
            return True
        raise
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _forget() -> None:
    for seat in list(_seats):
        seat.forget()


os.register_at_fork(after_in_child=_forget)
