"""Removes what dead writers left: a SIGKILL of all ranks before every reader had mapped leaves names in /dev/shm.

A segment is removed only if it is a regular file of our own uid, shows our magic under the name that its header gives,
and nobody alive holds its shared `flock`. Whatever is in doubt stays. Needs neither torch nor numpy.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from shmcast._layout import SEGMENT, Kind, parse_segment
from shmcast._room import SHM
from shmcast._wire import Address
from shmcast.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME: Final = re.compile(r"shmcast-[0-9a-f]{32}-\d+-(c|\d+)")


def sweep(folder: str = SHM) -> list[str]:
    """Remove the segments, and with a control segment the semaphores, that no living process has; their file names."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    removed: list[str] = []
    for name in names:
        if NAME.fullmatch(name):
            with suppress(OSError, LayoutError):
                removed += _sweep_one(folder, name)
    return removed


def _sweep_one(folder: str, name: str) -> Iterator[str]:
    path = os.path.join(folder, name)
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return
        header = parse_segment(os.pread(fd, SEGMENT.size, 0))
        address = Address(header.token, header.rank, header.readers)
        if f"/{name}" != (address.control if header.kind == Kind.CONTROL else address.segment(header.number)):
            return
        # A creator locks before it writes the magic, a reader before it reads the header: whoever uses it holds a lock.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.stat(path, follow_symlinks=False), status):
            return
        # Semaphores first: they have no header of their own, only this name tells whose they are. Looked for under the
        # lock: before it, their creator may have been alive and making more.
        others = os.listdir(folder) if header.kind == Kind.CONTROL else []
        for entry in (*sorted(o for o in others if o.startswith(f"sem.{address.stem[1:]}-")), name):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, entry))
                yield entry
    finally:
        os.close(fd)
