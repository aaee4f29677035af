"""The processes of this user and the files that they have open, without touching either."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROC: Final = "/proc"
COMMAND: Final = 200
OFD_LOCK: Final = re.compile(rb"^lock:\s+\d+: OFDLCK\s+ADVISORY\s+WRITE \S+ \S+ (\d+) \1$", re.MULTILINE)


@dataclass(frozen=True)
class Process:
    """A process. `command`: its command line, cut; `stopped`: it gets no time until somebody lets it go on."""

    pid: int
    command: str
    stopped: bool


class OpenFile(NamedTuple):
    """A file that a process has open, while it is looked at.

    `path_fd`: leads to it, and can neither read nor change it. `link`: its path, as the kernel tells it. `locks`: the
    single bytes that are locked exclusively through this descriptor.
    """

    path_fd: int
    link: str
    locks: tuple[int, ...]


def processes() -> Iterator[Process]:
    """Every process of this user but this one, by pid; one that ends meanwhile may be there or not."""
    for pid in sorted(int(name) for name in os.listdir(PROC) if name.isdecimal()):
        with suppress(OSError):
            if pid != os.getpid() and os.stat(f"{PROC}/{pid}").st_uid == os.geteuid():
                yield Process(pid, _command(pid), _is_stopped(pid))


def open_files(process: Process, wanted: Callable[[str], bool]) -> Iterator[OpenFile]:
    """What the process has open under a path that is `wanted`; each is closed before the next one comes.

    Raises `PermissionError` where that may not be seen, another `OSError` where the process has ended.
    """
    # A directory of /proc stays that of the process that it was opened for, whoever gets its pid then.
    with _folder(f"{PROC}/{process.pid}") as home, _folder("fd", home) as fds:
        for name in os.listdir(fds):
            with suppress(OSError):
                link = os.readlink(name, dir_fd=fds)
                if wanted(link):
                    yield from _open_file(name, home, fds, wanted)


def _open_file(name: str, home: int, fds: int, wanted: Callable[[str], bool]) -> Iterator[OpenFile]:
    # Not opened for reading: it may be something else by now.
    fd = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=fds)
    try:
        link = os.readlink(f"{PROC}/self/fd/{fd}")
        if wanted(link):
            locks = OFD_LOCK.findall(_read(f"fdinfo/{name}", home))
            yield OpenFile(fd, link, tuple(int(byte) for byte in locks))
    finally:
        os.close(fd)


@contextmanager
def _folder(path: str, above: int | None = None) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above)
    try:
        yield fd
    finally:
        os.close(fd)


def _read(path: str, above: int | None = None) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=above)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _command(pid: int) -> str:
    raw = _read(f"{PROC}/{pid}/cmdline") or b"[" + _read(f"{PROC}/{pid}/comm").strip() + b"]"
    text = raw.rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
    # It goes to a terminal, and a process may call itself what it likes.
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:COMMAND]


def _is_stopped(pid: int) -> bool:
    # After the name, which may have parentheses of its own.
    return _read(f"{PROC}/{pid}/stat").rpartition(b")")[2].split()[0] in (b"T", b"t")
