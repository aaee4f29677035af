"""Worlds for processes to live in: a /dev/shm of another size or none, other limits, another user.

A process enters a world and never leaves it, so it is a child of `forks` that does. What takes namespaces needs root;
where the system refuses, `NoWorld` says what it refused, and the test skips.
"""

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SHM = "/dev/shm"
NOBODY = 65534

CLONE_NEWNS = 0x20000
MS_RDONLY = 1
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MCL_FUTURE = 2

_libc = ctypes.CDLL(None, use_errno=True)


class NoWorld(Exception):
    """This machine does not let us make such a world."""


@dataclass(frozen=True)
class World:
    """What a process finds.

    Attributes:
        shm: options of a tmpfs of its own over /dev/shm; `none`: there is no /dev/shm; empty: it is as outside.
        limits: soft limits, by number of the resource.
        nobody: the process is of another user.
        locks: every page that it maps from now on is locked.
    """

    shm: str = ""
    read_only: bool = False
    limits: dict[int, int] = field(default_factory=dict)
    nobody: bool = False
    locks: bool = False

    def enter(self) -> None:
        """Live in this world from now on."""
        if self.shm:
            _call("unshare", CLONE_NEWNS)
            _mount("none", "/", None, MS_REC | MS_PRIVATE)
            if self.shm == "none":
                _mount("tmpfs", "/dev", "size=64k")
            else:
                _mount("tmpfs", SHM, f"mode=1777,{self.shm}", MS_RDONLY if self.read_only else 0)
        for what, limit in self.limits.items():
            resource.setrlimit(what, (limit, resource.getrlimit(what)[1]))
        if self.nobody:
            if os.geteuid():
                raise NoWorld("only root can be another user")
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        if self.locks:
            _call("mlockall", MCL_FUTURE)


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    """A soft limit for a while."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@contextmanager
def few_descriptors(free: int) -> Iterator[None]:
    """As many descriptors as are open, and `free` more."""
    taken = {int(entry) for entry in os.listdir("/proc/self/fd")}
    taken = {fd for fd in taken if Path(f"/proc/self/fd/{fd}").exists()}
    limit = 0
    while free >= 0:
        free -= limit not in taken
        limit += free >= 0
    with limited(resource.RLIMIT_NOFILE, limit):
        yield


def address_space() -> int:
    """Bytes that are mapped here: what `RLIMIT_AS` counts."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _mount(what: str, where: str, options: str | None, flags: int = 0) -> None:
    kind = what.encode() if what != "none" else None
    _call("mount", what.encode(), where.encode(), kind, ctypes.c_ulong(flags), options and options.encode())


def _call(name: str, *args: object) -> None:
    if getattr(_libc, name)(*args):
        raise NoWorld(f"{name}: {os.strerror(ctypes.get_errno())}")
